"""Datasets as tables: read any of them, your own photos included.

`load_table` reads what a configuration names. The columns of a table are
described in `annotations`. The validation split is taken from the training images, class by class;
the test split is never touched. An image is drawn by a hash of the seed and its path, so the draw
depends neither on the order of the rows nor on the process, and other images coming or going hardly
change it.

A reader of your own is a function ``(root)`` that returns a DataFrame with a row per
image: ``path`` (absolute, or below the root), ``label`` or ``class_name``, ``split``, and
``top, left, bottom, right`` where boxes are known. `annotations.complete_table` says what may be
left out; where ``split`` is, a test split is drawn.
"""

import hashlib
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd

from ramslib.config import Config
from ramslib.data import annotations, readers
from ramslib.data.annotations import BOX_COLUMNS, LISTS, SPLIT_WORDS
from ramslib.errors import InputError, write_table
from ramslib.extensions import load_source, resolve

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif")
PHOTO_SUFFIXES += (".tiff", ".gif", ".jp2", ".ppm", ".avif", ".heic", ".heif")
HIDDEN = (".", "__MACOSX")  # how names of files begin that no person put there
PREPARATION = Path(__file__).resolve().parents[2] / "data" / "prepare"


def load_table(config: Config) -> pd.DataFrame:
    """Read the dataset that a configuration names; its validation split is taken from train.

    A dataset that brings a validation split keeps its own. A class with a single training image
    has none to give. Lists beside the images are honored: ``exclude.csv`` (path, reason) names
    images to leave out, ``groups.csv`` (path, group) those that stay in one split.

    Raises:
        InputError: an unknown name, or whatever is wrong with the dataset.
    """
    reader, root = resolve(config.data, READERS, "data"), absolute(config.root)
    options = {"year": config.year} if reader is readers.read_inaturalist else {}
    folder, fraction = absolute(config.lists or root), config.test_fraction
    if config.data in READERS.keys() - {"diagnostic"} and not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; give the folder of the dataset")
    if config.lists and not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; make it, or leave the setting lists out")
    table = annotations.complete_table(reader(Path(root), **options), root, config.data)
    keys = pd.Series([os.path.relpath(path, root) for path in table["path"]])
    groups = keys.map(read_list(folder, "group", keys)[0]).astype(str)
    table["group"] = table["group"].fillna(groups)
    is_out = keys.isin(read_list(folder, "reason", keys)[0])
    if table["split"].isna().all() and reader is read_folder:
        table["split"] = _keep_draw(folder, keys, table, fraction, is_out)
    elif table["split"].isna().all():
        drawn = _draw(table, relative_paths(table), fraction, seed=0)
        table["split"] = np.where(drawn, "test", "train")
    if is_out.any():
        report = f"{is_out.sum():,} of {len(table):,} images left out"
        warnings.warn(f"{folder}/{LISTS['reason']}: {report}", stacklevel=2)
    table = annotations.check_images(table[~is_out], root, config.allow_missing)
    table["label"] = table["label"].rank(method="dense").astype(np.int64) - 1  # a class may be out
    if config.validation_fraction and not (table["split"] == "validation").any():
        train = table[table["split"] == "train"]
        paths = relative_paths(table)[train.index]
        drawn = _draw(train, paths, config.validation_fraction, config.seed)
        table.loc[train.index[drawn], "split"] = "validation"
    return table


def read_table(
    data: str, root: Path | str, validation_fraction: float = 0.1, seed: int = 0, **settings: object
) -> pd.DataFrame:
    """`load_table` of a reader and a folder; ``settings`` are further ones of `Config`."""
    settings |= {"validation_fraction": validation_fraction, "seed": seed}
    return load_table(Config().replace(data=data, root=str(root), **settings))


def absolute(folder: Path | str) -> str:
    """A folder's absolute path."""
    return os.path.abspath(os.path.expanduser(folder))


def relative_paths(table: pd.DataFrame) -> pd.Series:
    """Paths below the deepest folder that holds all images: the same wherever the dataset lies."""
    base = os.path.commonpath(set(map(os.path.dirname, table["path"])))
    return table["path"].str[len(base) :].str.lstrip("/")


def fingerprint(table: pd.DataFrame) -> str:
    """SHA-256 of what decides results: relative paths, labels, splits, boxes, sizes of the files.

    The order of the rows and the place of the dataset do not matter.
    """
    columns = [table[name] for name in ("label", "split", *BOX_COLUMNS)]
    sizes = (os.path.getsize(path) if os.path.exists(path) else -1 for path in table["path"])
    rows = zip(relative_paths(table), *columns, sizes, strict=True)
    text = "\n".join(sorted("\t".join(map(str, row)) for row in rows))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _draw(table: pd.DataFrame, keys: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Hold out a share of each class (at least one image, never all), by a hash of seed and key.

    A group is drawn as a whole, by its name, for the first of its classes; groups larger than the
    share come last.

    Args:
        table: images with ``label`` and ``group``.
        keys: names of the images.
        fraction: the share.
        seed: of the hashes.

    Returns:
        (images,) bool.
    """
    names = table["group"].fillna(pd.Series(keys, table.index, dtype=str))
    texts = (f"{seed}/{name}".encode("utf-8", "surrogateescape") for name in names)
    hashes = [int.from_bytes(hashlib.sha256(text).digest()[:7]) for text in texts]
    drawn = pd.DataFrame({"hash": hashes, "label": table["label"].to_numpy()})
    of_group = drawn.groupby("hash")["label"]
    drawn["label"] = of_group.transform("min")
    size = drawn.groupby("label")["hash"].transform("size")
    wanted = (fraction * size + 0.5).astype(int).clip(lower=1).clip(upper=size - 1)
    drawn["hash"] += (of_group.transform("size") > wanted) * 2**56
    order = drawn.groupby("label")["hash"]
    chosen = (order.rank() <= wanted) | (order.rank("min") == 1)
    return (chosen & (drawn["hash"] < order.transform("max"))).to_numpy()


def read_list(folder: str, column: str, keys: Sequence[str]) -> tuple[dict[str, str], str]:
    """One of our `LISTS`: its value for each path, and its separator; nothing where it is missing.

    Semicolons, tabs, backslashes and the other Unicode form of a name, as other systems write them,
    are read.

    Args:
        folder: of the list.
        column: the one beside ``path``.
        keys: relative paths of the images, whose spelling is taken.
    """
    file = f"{folder}/{LISTS[column]}"
    if not os.path.lexists(file):
        return {}, ","
    if not os.path.exists(file):
        remedy = "restore that file, or delete the link"
        raise InputError(f"{file}: links to {os.readlink(file)}, which is missing; {remedy}")
    rows, separator = annotations.read_columns(file, "path", column, exactly=True)
    spelling = {_portable(key): key for key in keys} | dict(zip(keys, keys, strict=True))
    paths = rows["path"].map(lambda path: spelling.get(path, spelling.get(_portable(path), path)))
    values = rows[column].str.strip()
    if column == "split":
        values = values.str.lower().map(SPLIT_WORDS)
    if (wrong := paths.duplicated() | values.isna() | (values == "")).any():
        found, what = separator.join(rows.loc[wrong.idxmax()]), "train, validation or test"
        raise InputError(
            f"{wrong.idxmax()}: expected a new path and {what if column == 'split' else column}, "
            f"found {found!r}; correct this line"
        )
    return dict(zip(paths, values, strict=True)), separator


def _portable(path: str) -> str:
    """One spelling of a relative path for all systems."""
    return os.path.normpath(unicodedata.normalize("NFC", path.replace("\\", "/")))


def write_list(folder: str, column: str, values: Mapping[str, str], separator: str = ",") -> None:
    """Write one of our `LISTS`; where it is a link to a file, that file."""
    file = Path(os.path.realpath(f"{folder}/{LISTS[column]}"))
    rows = pd.DataFrame(values.items(), columns=["path", column])
    write_table(rows, file, separator)


# ---------------------------------------------------------------- preparation


def preparation(name: str) -> ModuleType:
    """A module of ``data/prepare``, which a clone of the repository holds beside the data."""
    file = PREPARATION / f"{name}.py"
    if not file.exists():
        raise InputError(f"{file}: missing; use ramslib from a clone of its repository for this")
    return load_source(file)


def read_diagnostic(root: Path | str) -> pd.DataFrame:
    """The synthetic dataset; drawn with its defaults where ``root`` is missing or empty."""
    if not os.path.isdir(root) or not os.listdir(root):
        preparation("diagnostic").write_diagnostic_set(root)
    return readers.read_cub(root)


# ---------------------------------------------------------------- your own photos


def read_folder(root: Path | str) -> pd.DataFrame:
    """Your own photos: a folder per class, nested folders allowed.

    Folders ``train`` and ``test`` (and ``val``) of class folders are used as they are; without
    ``test``, ``val`` is the test split. Otherwise a test split is drawn per class and written to
    ``<root>/split.csv``, which from then on decides: photos in it keep their split, new ones are
    drawn among themselves and appended, lines of photos that are gone stay for their return.

    Args:
        root: the folder.

    Raises:
        InputError: no class folders, a class without enough photos, a split.csv out of shape.
    """
    root = absolute(root)
    given = _given_splits(root)
    photos = [
        (path, os.path.relpath(path, f"{root}/{folder}").split(os.sep)[0], split)
        for folder, split in (given or {".": ""}).items()
        for path in _find_photos(os.path.normpath(f"{root}/{folder}"))
    ]
    table = pd.DataFrame(photos, columns=["path", "class_name", "split"])
    if (count := table["class_name"].nunique()) < 2:
        raise InputError(f"{root}: {count} class folders with photos; at least two are needed")
    return table if given else table.drop(columns="split")


def _given_splits(root: str) -> dict[str, str]:
    """Folder -> split where folders of ``root`` are splits that hold class folders, else {}."""
    folders = _folders(root)
    named = {name: split for name in folders if (split := _split_of(name))}
    splits = {name: split for name, split in named.items() if _folders(f"{root}/{name}")}
    if "test" not in splits.values():
        splits = {name: split.replace("validation", "test") for name, split in splits.items()}
    if {"train", "test"} <= set(splits.values()):
        if others := ", ".join(name for name in folders if name not in splits):
            warnings.warn(f"{root}: {', '.join(splits)} are used, not {others}", stacklevel=3)
        return splits
    classes = {inner for name in splits for inner in _folders(f"{root}/{name}")}
    alike = {name for name in folders if classes.intersection(_folders(f"{root}/{name}"))}
    alike |= set(named)
    if classes and len(alike) > 1 or len(named) == len(folders) > 0:
        remedy = f", or give {root}/{next(iter(splits))} to draw a test split" if splits else ""
        raise InputError(
            f"{root}: {', '.join(sorted(alike))} may be splits, but class folders are needed in "
            f"train and in test or val; complete or rename them{remedy}"
        )
    return {}


def _split_of(name: str) -> str | None:
    """The split that a folder is named after, such as "Training", "val" or "test_set"."""
    return SPLIT_WORDS.get(re.sub(r"[\W\d_]|(set|data|images)$", "", name.lower()))


def _folders(folder: str) -> list[str]:
    """Names of the visible folders in a folder, sorted."""
    found = annotations.list_folder(folder)
    return [e.name for e in found if not e.name.startswith(HIDDEN) and os.path.isdir(e)]


def _find_photos(base: str) -> list[str]:
    """Paths of all photos in the class folders of ``base``, sorted; what is none is counted."""
    loose = sum(os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES for name in os.listdir(base))
    photos, ignored = [], Counter({"outside class folders": loose} if loose else {})
    for folder in (f"{base}/{name}" for name in _folders(base)):
        kinds = list_files(folder)
        found = [path for path, kind in kinds.items() if kind in PHOTO_SUFFIXES]
        holds_run = any(path.endswith("/config.json") for path in kinds)
        if holds_run or set(kinds.values()) <= {"hidden"}:
            why = "it holds a run" if holds_run else "it is empty"
            warnings.warn(f"{folder}: no class folder, {why}; move it elsewhere", stacklevel=3)
            continue
        if not found:
            known = ", ".join(PHOTO_SUFFIXES)
            raise InputError(
                f"{folder}: no photo ({known}) in this class folder; add some, or move it elsewhere"
            )
        photos += found
        ignored.update(kind for kind in kinds.values() if kind not in PHOTO_SUFFIXES)
    if ignored:
        report = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common())
        warnings.warn(f"{base}: {ignored.total()} files left out: {report}", stacklevel=3)
    return photos


def list_files(folder: Path | str) -> dict[str, str]:
    """All files below a folder by path, with their kind: the suffix of a photo or why it is none.

    Neither hidden nor linked folders are entered.
    """
    kinds: dict[str, str] = {}
    for entry in annotations.list_folder(str(folder)):
        if not entry.is_dir(follow_symlinks=False):
            kinds[entry.path] = _kind(entry)
        elif not entry.name.startswith(HIDDEN):
            kinds |= list_files(entry.path)
    return kinds


def _kind(entry: os.DirEntry) -> str:
    if entry.name.startswith(HIDDEN):
        return "hidden"
    if not annotations.is_file(entry):
        return "that are no files"
    return os.path.splitext(entry.name)[1].lower() or "without suffix"


def _keep_draw(
    folder: str, keys: pd.Series, table: pd.DataFrame, fraction: float, is_out: pd.Series
) -> pd.Series:
    """Splits as split.csv says; photos that it does not know are drawn, and appended to it.

    A photo whose group has a split gets that. Photos that will be left out have a split, too, for
    their return.
    """
    size = table.groupby("class_name")["path"].transform("size")
    if len(alone := table["path"][(size < 2) & ~is_out]):
        raise InputError(
            f"{alone.iloc[0]}: the only photo of its class ({len(alone)} such classes); a class "
            "needs at least 2, one to train and one to test on; add some, or name it in exclude.csv"
        )
    file, (splits, separator) = f"{folder}/{LISTS['split']}", read_list(folder, "split", keys)
    if gone := splits.keys() - set(keys):
        report = f"{len(gone):,} of its {len(splits):,} photos missing, first: {min(gone)}"
        warnings.warn(f"{file}: {report}; their lines stay for their return", stacklevel=3)
    known = keys.map(splits).astype(str)
    chosen = known.fillna(known.groupby(table["group"]).transform("first"))
    new = table[chosen.isna()]
    drawn = np.where(_draw(new, keys[new.index], fraction, 0), "test", "train")
    chosen = chosen.fillna(pd.Series(drawn, new.index, dtype=str))
    if not (added := dict(zip(keys[known.isna()], chosen[known.isna()], strict=True))):
        return chosen
    try:
        write_list(folder, "split", splits | added, separator)
    except InputError as error:
        warnings.warn(f"{error}; until then the split is not kept", stacklevel=3)
        return chosen
    if splits:
        counts = ", ".join(f"{n} {split}" for split, n in Counter(added.values()).items())
        warnings.warn(f"{file}: {len(added)} new photos appended: {counts}", stacklevel=3)
    return chosen


READERS = {"diagnostic": read_diagnostic, "folder": read_folder, **readers.READERS}
