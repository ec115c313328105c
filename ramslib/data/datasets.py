"""Datasets as tables: read any of them, your own photos included, and describe what they hold.

`load_table` reads what a configuration names, `read_table` any dataset. The columns of a table are
described in `annotations`. The validation split is taken from the training images, class by class;
the test split is never touched. An image is drawn by a hash of the seed and its path, so the draw
depends neither on the order of the rows nor on the process, and other images coming or going hardly
change it.

A reader of your own is a function ``(root, **options)`` that returns a DataFrame with a row per
image: ``path`` (absolute, or below the root), ``label`` or ``class_name``, ``split``, and
``top, left, bottom, right`` where boxes are known. `annotations.complete_table` says what may be
left out; where ``split`` is, a test split is drawn.
"""

import csv
import hashlib
import inspect
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd

from ramslib.config import Config
from ramslib.data import annotations, readers
from ramslib.data.annotations import BOX_COLUMNS, SPLIT_WORDS, SPLITS
from ramslib.errors import InputError, write_atomically
from ramslib.extensions import load_source, resolve

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif")
PHOTO_SUFFIXES += (".tiff", ".gif", ".jp2", ".ppm", ".avif")
HIDDEN = (".", "__MACOSX")  # how names of files begin that no person put there
CSV = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}  # names of any bytes
PREPARATION = Path(__file__).resolve().parents[2] / "data" / "prepare"


def load_table(config: Config) -> pd.DataFrame:
    """The dataset that a configuration names, with its validation split; see `read_table`."""
    options = {"test_fraction": config.test_fraction, "allow_missing": config.allow_missing}
    return read_table(config.data, config.root, config.validation_fraction, config.seed, **options)


def read_table(
    data: str,
    root: Path | str,
    validation_fraction: float = 0.1,
    seed: int = 0,
    *,
    test_fraction: float = 0.2,
    allow_missing: bool = False,
    **options: object,
) -> pd.DataFrame:
    """Read a dataset and take a validation split from its training images.

    A dataset that brings a validation split keeps its own. A class with a single training image
    has none to give.

    Args:
        data: a key of `READERS`, or a reader of your own as ``path/to/file.py:name``.
        root: folder of the dataset.
        validation_fraction: share of each class's training images; 0 takes none.
        seed: of this draw; nothing else depends on it.
        test_fraction: share of each class to test on, where a dataset has no splits of its own.
        allow_missing: leave missing images out, with a warning, instead of refusing the dataset.
        options: the reader's own.

    Raises:
        InputError: an unknown name, or whatever is wrong with the dataset.
    """
    for name, share in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= share < 1:
            raise InputError(f"{name}_fraction is {share}; it must lie in [0, 1)")
    reader, root = resolve(data, READERS, "data"), os.path.abspath(os.path.expanduser(root))
    signature = inspect.signature(reader)
    if "test_fraction" in signature.parameters:
        options["test_fraction"] = test_fraction
    try:
        signature.bind(root, **options)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[1:]) or "none"
        raise InputError(f"data={data}: {error}; its options: {known}") from None
    table = annotations.complete_table(reader(Path(root), **options), root, data)
    if table["split"].isna().all():
        drawn = _draw(relative_paths(table), table["label"], test_fraction, seed=0)
        table["split"] = np.where(drawn, "test", "train")
    table = annotations.check_images(table, root, allow_missing)
    if validation_fraction and not (table["split"] == "validation").any():
        train = table[table["split"] == "train"]
        drawn = _draw(relative_paths(table)[train.index], train["label"], validation_fraction, seed)
        table.loc[train.index[drawn], "split"] = "validation"
    return table


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


def _draw(keys: Sequence[str], labels: Sequence[int], fraction: float, seed: int) -> np.ndarray:
    """Hold out a share of each class (at least one image, never all), by a hash of seed and key.

    Returns (images,) bool.
    """
    texts = (f"{seed}/{key}".encode("utf-8", "surrogateescape") for key in keys)
    hashes = [int.from_bytes(hashlib.sha256(text).digest()[:7]) for text in texts]
    by_class = pd.Series(hashes, dtype=np.int64).groupby(np.asarray(labels))
    size = by_class.transform("size")
    wanted = (fraction * size + 0.5).astype(int).clip(lower=1).clip(upper=size - 1)
    return (by_class.rank(method="first") <= wanted).to_numpy()


# ---------------------------------------------------------------- preparation


def preparation(name: str) -> ModuleType:
    """A module of ``data/prepare``, which a clone of the repository holds beside the data."""
    file = PREPARATION / f"{name}.py"
    if not file.exists():
        raise InputError(f"{file}: missing; use ramslib from a clone of its repository for this")
    return load_source(file)


def download(data: str, root: Path | str) -> None:
    """Bring into ``root`` what is missing there of a dataset's official files.

    See ``data/prepare/download.py``; an InputError says what a person must do.
    """
    preparation("download").download(data, root)


def read_diagnostic(root: Path | str) -> pd.DataFrame:
    """The synthetic dataset; drawn with its defaults where ``root`` is missing or empty."""
    if not os.path.isdir(root) or not os.listdir(root):
        preparation("diagnostic").write_diagnostic_set(root)
    return readers.read_cub(root)


# ---------------------------------------------------------------- your own photos


def read_folder(root: Path | str, test_fraction: float = 0.2) -> pd.DataFrame:
    """Your own photos: a folder per class, nested folders allowed.

    Folders ``train`` and ``test`` (and ``val``) of class folders are used as they are; without
    ``test``, ``val`` is the test split. Otherwise a test split is drawn per class and written to
    ``<root>/split.csv``, which from then on decides: photos in it keep their split, new ones are
    drawn among themselves and appended, lines of photos that are gone stay for their return.

    Args:
        root: the folder.
        test_fraction: share of each class's photos to test on, at least one photo.

    Raises:
        InputError: no class folders, a class without enough photos, a split.csv out of shape.
    """
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; give the folder that holds the class folders")
    given = _given_splits(root)
    photos = [
        (path, os.path.relpath(path, f"{root}/{folder}").split(os.sep)[0], split)
        for folder, split in (given or {".": ""}).items()
        for path in _find_photos(os.path.normpath(f"{root}/{folder}"))
    ]
    table = pd.DataFrame(photos, columns=["path", "class_name", "split"])
    if (count := table["class_name"].nunique()) < 2:
        raise InputError(f"{root}: {count} class folders with photos; at least two are needed")
    if not given:
        table["split"] = _draw_test(root, table, test_fraction)
    return table


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
        kinds = {entry.path: _kind(entry) for entry in _entries(folder)}
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


def _entries(folder: str) -> Iterator[os.DirEntry]:
    """Everything below a folder but folders; neither hidden nor linked folders are entered."""
    for entry in annotations.list_folder(folder):
        if not entry.is_dir(follow_symlinks=False):
            yield entry
        elif not entry.name.startswith(HIDDEN):
            yield from _entries(entry.path)


def _kind(entry: os.DirEntry) -> str:
    if entry.name.startswith(HIDDEN):
        return "hidden"
    if not annotations.is_file(entry):
        return "that are no files"
    return os.path.splitext(entry.name)[1].lower() or "without suffix"


def _draw_test(root: str, table: pd.DataFrame, fraction: float) -> list[str]:
    """Splits as split.csv says; photos that it does not know are drawn, and appended to it."""
    counts = table["class_name"].value_counts()
    if counts.min() < 2:
        few = sorted(counts.index[counts < 2])
        raise InputError(
            f"{root}/{few[0]}: 1 photo; a class needs at least 2, one to train and one to test on"
            + (f" ({len(few)} such classes)" if len(few) > 1 else "")
        )
    file, keys = f"{root}/split.csv", [os.path.relpath(path, root) for path in table["path"]]
    splits, separator = _read_split(file, keys) if os.path.lexists(file) else ({}, ",")
    if gone := splits.keys() - set(keys):
        report = f"{len(gone):,} of its {len(splits):,} photos missing, first: {min(gone)}"
        warnings.warn(f"{file}: {report}; their lines stay for their return", stacklevel=4)
    new = table[[key not in splits for key in keys]]
    if len(new):
        drawn = _draw([keys[row] for row in new.index], new["class_name"], fraction, seed=0)
        pairs = zip(new.index, drawn, strict=True)
        added = {keys[row]: "test" if is_test else "train" for row, is_test in pairs}
        _write_split(file, splits, added, separator)
        splits |= added
    return [splits[key] for key in keys]


def _read_split(file: str, keys: Sequence[str]) -> tuple[dict[str, str], str]:
    """Split of each path, spelled as in ``keys`` where that is known, and the column separator.

    Semicolons, tabs, backslashes and the other Unicode form of a name, as other systems write them,
    are read.
    """
    if not os.path.exists(file):
        remedy = "restore that file, or delete the link"
        raise InputError(f"{file}: links to {os.readlink(file)}, which is missing; {remedy}")
    splits: dict[str, str] = {}
    spelling = {_portable(key): key for key in keys} | dict(zip(keys, keys, strict=True))
    with annotations.file_errors(file), open(file, **CSV) as lines:
        header = lines.readline().rstrip()
        separator = header[4:5]
        if header not in ("path,split", "path;split", "path\tsplit"):
            raise InputError(f"{file}:1: the first line must be path,split; correct it")
        for number, row in enumerate(csv.reader(lines, delimiter=separator), 2):
            split = SPLIT_WORDS.get(row[1].strip().lower()) if len(row) == 2 else None
            key = spelling.get(row[0], spelling.get(_portable(row[0]), row[0])) if split else ""
            if not split or key in splits:
                raise InputError(
                    f"{file}:{number}: expected a new path and train, validation or test, found "
                    f"{separator.join(row)!r}; correct this line"
                )
            splits[key] = split
    return splits, separator


def _portable(path: str) -> str:
    """One spelling of a relative path for all systems."""
    return os.path.normpath(unicodedata.normalize("NFC", path.replace("\\", "/")))


def _write_split(file: str, splits: dict, added: dict, separator: str) -> None:
    rows = pd.DataFrame({**splits, **added}.items(), columns=["path", "split"])
    options = {"sep": separator, "index": False, "errors": "surrogateescape"}
    try:  # a link to a file stays one
        write_atomically(Path(os.path.realpath(file)), lambda part: rows.to_csv(part, **options))
    except InputError as error:
        warnings.warn(f"{error}; until then the split is not kept", stacklevel=4)
        return
    if splits:
        counts = ", ".join(f"{n} {split}" for split, n in Counter(added.values()).items())
        warnings.warn(f"{file}: {len(added)} new photos appended: {counts}", stacklevel=4)


READERS = {"diagnostic": read_diagnostic, "folder": read_folder, **readers.READERS}


# ---------------------------------------------------------------- what a dataset holds


def describe(table: pd.DataFrame, sample: int = 2000) -> pd.DataFrame:
    """Summary of a table, one row per split.

    Args:
        table: a dataset.
        sample: image sizes are read from the headers of at most this many images per split.

    Returns:
        Columns ``images, classes, smallest_class, largest_class`` (images), ``height, width``
        (median pixels), ``shortest_side`` (smallest), ``boxes`` (count), ``box_share`` (mean share
        of the image's area). A box outside its image is an InputError.
    """
    rows = {}
    for split in [name for name in SPLITS if (table["split"] == name).any()]:
        part = table[table["split"] == split]
        sizes = _image_sizes(_spread(part, sample))
        per_class = part["class_name"].value_counts()
        rows[split] = {
            "images": len(part),
            "classes": len(per_class),
            "smallest_class": per_class.min(),
            "largest_class": per_class.max(),
            "height": np.median(sizes[:, 0]),
            "width": np.median(sizes[:, 1]),
            "shortest_side": sizes.min(),
            "boxes": part["top"].notna().sum(),
            "box_share": describe_boxes(part, sample)["area"].mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def describe_boxes(table: pd.DataFrame, sample: int = 2000) -> pd.DataFrame:
    """Size, shape and place of annotated boxes, a row per image that has one.

    Args:
        table: a dataset.
        sample: at most this many images, spread over the table.

    Returns:
        Columns ``area`` (share of the image), ``height, width`` (share of its sides), ``aspect``
        (width / height in pixels), ``y, x`` (the box's middle, as a share of the image's sides).

    Raises:
        InputError: a box lies outside its image.
    """
    table = _spread(table[table["top"].notna()], sample)
    paths, sizes = table["path"].tolist(), _image_sizes(table)
    boxes = annotations.clip_boxes(table[BOX_COLUMNS].to_numpy(), paths.__getitem__, sizes)
    top, left, bottom, right = (boxes / np.tile(sizes, 2)).T
    found = {"area": (bottom - top) * (right - left), "height": bottom - top, "width": right - left}
    found["aspect"] = found["width"] / found["height"] * sizes[:, 1] / sizes[:, 0]
    found |= {"y": (top + bottom) / 2, "x": (left + right) / 2}
    return pd.DataFrame(found, index=table.index)


def describe_parts(table: pd.DataFrame, parts: pd.DataFrame) -> pd.DataFrame:
    """How often each part is visible, and where, a row per part, from most to least often.

    Args:
        table: a dataset.
        parts: as of `load_parts`.

    Returns:
        Columns ``visible`` (share of the table's images) and ``y, x`` (mean place within the
        annotated box, as a share of its sides; NaN without boxes), by part.
    """
    placed = parts.merge(table, on="path")
    for name, low, high in (("y", "top", "bottom"), ("x", "left", "right")):
        placed[name] = (placed[name] - placed[low]) / (placed[high] - placed[low])
    by_part = placed.groupby("part")
    found = by_part[["y", "x"]].mean()
    found.insert(0, "visible", by_part["path"].nunique() / len(table))
    return found.sort_values("visible", ascending=False)


def load_parts(data: str, root: Path | str) -> pd.DataFrame:
    """Visible parts as of `readers.read_parts`; no rows where a dataset has none."""
    has_parts = data in ("cub", "nabirds", "diagnostic")
    return readers.read_parts(root) if has_parts else pd.DataFrame(columns=readers.PART_COLUMNS)


def _spread(table: pd.DataFrame, sample: int) -> pd.DataFrame:
    return table.iloc[:: max(-(-len(table) // sample), 1)]


def _image_sizes(table: pd.DataFrame) -> np.ndarray:
    """(images, 2) height and width of every upright image, from its header."""
    return np.array([annotations.image_size(path) for path in table["path"]]).reshape(-1, 2)
