"""Data sets as tables: one function to load any of them, own photos included.

``load_table`` reads what a configuration names, ``read_table`` any data set. The columns of a table
are described in `annotations`. The validation split is taken from the training images, class by
class; the test split is never touched. An image is drawn by a hash of the seed and its path, so the
draw depends neither on the order of the rows nor on the process, and other images coming or going
hardly change it.
"""

import csv
import hashlib
import inspect
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ramslib.config import Config
from ramslib.data import annotations, readers
from ramslib.errors import InputError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CSV = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
HIDDEN = (".", "__MACOSX")  # how names of files begin that no person put there
FOLDER_SPLITS = {"train": "train", "test": "test"}
FOLDER_SPLITS |= dict.fromkeys(("val", "valid", "validation"), "validation")


def read_diagnostic(root: Path | str) -> pd.DataFrame:
    """The diagnostic set; drawn first, as its defaults say, where ``root`` is missing or empty."""
    from ramslib.data.diagnostic import write_diagnostic_set

    if not os.path.isdir(root) or not os.listdir(root):
        write_diagnostic_set(Path(root))
    return readers.read_cub(root)


def read_folder(root: Path | str, test_fraction: float = 0.2, seed: int = 0) -> pd.DataFrame:
    """Own photos: a folder per class, nested folders allowed.

    Folders ``train`` and ``test`` (and ``val``) of class folders are used as they are; without
    ``test``, ``val`` is the test split. Otherwise a test split is drawn per class and written to
    ``<root>/split.csv``, which from then on decides: photos in it keep their split, new ones are
    drawn among themselves and appended, lines of photos that are gone stay for their return.

    Args:
        root: the folder.
        test_fraction: share of each class's photos to test on, at least one photo.
        seed: of the draw.

    Raises:
        InputError: no class folders, a class without enough photos, a split.csv out of shape.
    """
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; give the folder that holds the class folders")
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction is {test_fraction}; it must lie between 0 and 1")
    given = _given_splits(root)
    photos = [
        (path, os.path.relpath(path, f"{root}/{folder}").split(os.sep)[0], split)
        for folder, split in (given or {".": ""}).items()
        for path in _find_photos(os.path.normpath(f"{root}/{folder}"))
    ]
    table = pd.DataFrame(photos, columns=["path", "class_name", "split"])
    names = sorted(table["class_name"].unique())
    if len(names) < 2:
        raise InputError(f"{root}: {len(names)} class folders with photos; at least two are needed")
    table["label"] = table["class_name"].map({name: label for label, name in enumerate(names)})
    if not given:
        table["split"] = _draw_test(root, table, test_fraction, seed)
    annotations.check_classes(table, names, root)
    return table.reindex(columns=annotations.TABLE_COLUMNS)


def _given_splits(root: str) -> dict[str, str]:
    """Folder -> split where folders of ``root`` are splits that hold class folders, else {}."""
    all_folders = _folders(root)
    folders = [name for name in all_folders if name.lower() in FOLDER_SPLITS]
    splits = {name: FOLDER_SPLITS[name.lower()] for name in folders if _folders(f"{root}/{name}")}
    if "test" not in splits.values():
        splits = {name: split.replace("validation", "test") for name, split in splits.items()}
    if not {"train", "test"} <= set(splits.values()):
        if "train" in splits.values() and len(all_folders) == 1:
            raise InputError(f"{root}: train but no test or val; add one, or give {root}/train")
        return {}
    if len(all_folders) > len(splits):
        others = ", ".join(name for name in all_folders if name not in splits)
        warnings.warn(f"{root}: {', '.join(splits)} are used, not {others}", stacklevel=3)
    return splits


def _folders(folder: str) -> list[str]:
    """Names of the visible folders in a folder, sorted."""
    found = annotations.list_folder(folder)
    return [e.name for e in found if os.path.isdir(e) and not e.name.startswith(HIDDEN)]


def _find_photos(base: str) -> list[str]:
    """Paths of all photos in the class folders of ``base``, sorted; what is none is counted."""
    loose = sum(os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES for name in os.listdir(base))
    photos, ignored = [], Counter({"outside class folders": loose} if loose else {})
    for class_name in _folders(base):
        kinds = {entry.path: _kind(entry) for entry in _entries(f"{base}/{class_name}")}
        found = [path for path, kind in kinds.items() if kind in PHOTO_SUFFIXES]
        photos += found
        ignored.update(kind for kind in kinds.values() if kind not in PHOTO_SUFFIXES)
        if not found:
            kinds = ", ".join(PHOTO_SUFFIXES)
            raise InputError(
                f"{base}/{class_name}: no photo ({kinds}) in this class folder; add some"
            )
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common())
        warnings.warn(f"{base}: {ignored.total()} files left out: {kinds}", stacklevel=3)
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


def _draw_test(root: str, table: pd.DataFrame, fraction: float, seed: int) -> list[str]:
    """Splits as split.csv says; photos that it does not know are drawn, and appended to it."""
    counts = table["class_name"].value_counts()
    if counts.min() < 2:
        few = sorted(counts.index[counts < 2])
        raise InputError(
            f"{root}/{few[0]}: 1 photo; a class needs at least 2, one to train and one to test on"
            + (f" ({len(few)} such classes)" if len(few) > 1 else "")
        )
    file = f"{root}/split.csv"
    splits = _read_split(file) if os.path.exists(file) else {}
    keys = [os.path.relpath(path, root).replace(os.sep, "/") for path in table["path"]]
    new = [row for row, key in enumerate(keys) if key not in splits]
    known = set(keys)
    if gone := [key for key in splits if key not in known]:
        report = f"{len(gone):,} of its {len(splits):,} photos missing, first: {gone[0]}"
        warnings.warn(f"{file}: {report}; their lines stay for their return", stacklevel=4)
    if new:
        drawn = _draw([keys[row] for row in new], table["label"].iloc[new], fraction, seed)
        added = {keys[r]: "test" if test else "train" for r, test in zip(new, drawn, strict=True)}
        _write_split(file, splits | added, added if splits else {})
        splits |= added
    return [splits[key] for key in keys]


def _read_split(file: str) -> dict[str, str]:
    """Split by path relative to the root, from split.csv."""
    splits: dict[str, str] = {}
    with annotations.file_errors(file), open(file, **CSV | {"encoding": "utf-8-sig"}) as lines:
        rows = csv.reader(lines)
        if next(rows, None) != ["path", "split"]:
            raise InputError(f"{file}:1: the first line must be path,split; correct it")
        for row in rows:
            if len(row) != 2 or row[1] not in annotations.SPLITS or row[0] in splits:
                raise InputError(
                    f"{file}:{rows.line_num}: expected a new path and train, validation or test, "
                    f"found {','.join(row)!r}; correct this line"
                )
            splits[row[0]] = row[1]
    return splits


def _write_split(file: str, splits: dict[str, str], new: dict[str, str]) -> None:
    part = f"{file}.{os.getpid()}.part"
    try:
        with open(part, "w", **CSV) as lines:
            csv.writer(lines, lineterminator="\n").writerows([("path", "split"), *splits.items()])
        os.replace(part, file)
    except OSError as error:
        warnings.warn(f"{file} cannot be written ({error}): the split is not kept", stacklevel=4)
        return
    if new:
        counts = ", ".join(f"{n} {split}" for split, n in Counter(new.values()).items())
        warnings.warn(f"{file}: {len(new)} new photos appended: {counts}", stacklevel=4)


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


READERS: dict[str, Callable[..., pd.DataFrame]] = {
    "diagnostic": read_diagnostic,
    "folder": read_folder,
    "cub": readers.read_cub,
    "cars": readers.read_cars,
    "dogs": readers.read_dogs,
    "nabirds": readers.read_nabirds,
    "inaturalist": readers.read_inaturalist,
    "aircraft": readers.read_aircraft,
    "flowers": readers.read_flowers,
    "pets": readers.read_pets,
}


def load_table(config: Config) -> pd.DataFrame:
    """The data set that a configuration names, with its validation split; see `read_table`."""
    wanted = {name: getattr(config, name, None) for name in ("allow_missing", "test_fraction")}
    accepted = inspect.signature(READERS[config.data]).parameters if config.data in READERS else ()
    options = {k: v for k, v in wanted.items() if k in accepted and v is not None}
    return read_table(config.data, config.root, config.validation_fraction, config.seed, **options)


def read_table(
    data: str, root: Path | str, validation_fraction: float = 0.1, seed: int = 0, **options: object
) -> pd.DataFrame:
    """Read a data set and take a validation split from its training images.

    A data set that brings a validation split keeps its own. A class with a single training image
    has none to give.

    Args:
        data: a key of `READERS`.
        root: folder of the data set.
        validation_fraction: share of each class's training images; 0 takes none.
        seed: of the draw; nothing else depends on it.
        options: the reader's own.

    Raises:
        InputError: an unknown name, or whatever is wrong with the data set.
    """
    if data not in READERS:
        raise InputError(f"unknown data set {data!r}; choose one of {', '.join(READERS)}")
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction is {validation_fraction}; it must lie in [0, 1)")
    table = READERS[data](root, **options)
    if validation_fraction and not (table["split"] == "validation").any():
        train = table.index[table["split"] == "train"]
        keys = relative_paths(table).loc[train].tolist()
        drawn = _draw(keys, table["label"].loc[train].to_numpy(), validation_fraction, seed)
        table.loc[train[drawn], "split"] = "validation"
    return table


def relative_paths(table: pd.DataFrame) -> pd.Series:
    """Paths below the deepest folder that holds all images: the same wherever the data set lies."""
    base = os.path.commonpath(set(map(os.path.dirname, table["path"])))
    return table["path"].str[len(base) :].str.lstrip("/")


def fingerprint(table: pd.DataFrame) -> str:
    """SHA-256 of what decides results: relative paths, labels, splits, boxes, sizes of the files.

    The order of the rows and the place of the data set do not matter.
    """
    columns = [table[name] for name in ("label", "split", *annotations.BOX_COLUMNS)]
    sizes = (os.path.getsize(path) if os.path.exists(path) else -1 for path in table["path"])
    rows = zip(relative_paths(table), *columns, sizes, strict=True)
    text = "\n".join(sorted("\t".join(map(str, row)) for row in rows))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
