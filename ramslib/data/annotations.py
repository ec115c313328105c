"""Files of others, read so that any mistake is one line that names it, and the table they make.

A table has a row per image: ``path`` (absolute), ``label`` (from 0), ``class_name`` (as the files
write it), ``split`` ("train", "validation" or "test") and the annotated box ``top, left, bottom,
right`` in pixels of the upright image, bottom and right exclusive, NaN where there is none.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat

from ramslib.errors import InputError, one_line

BOX_COLUMNS = ["top", "left", "bottom", "right"]
TABLE_COLUMNS = ["path", "label", "class_name", "split", *BOX_COLUMNS]
SPLITS = ("train", "validation", "test")


class Annotations(NamedTuple):
    """What a reader found: an entry per image in every field but ``home`` and ``names``.

    Attributes:
        home: folder of the data set, for messages.
        names: name of each label.
        paths: absolute path of each image.
        labels: from 0; -1 is an image whose class is unknown.
        splits: "train", "validation" or "test".
        boxes: (images, 4) top, left, bottom, right, bottom and right exclusive; None: no boxes.
        sizes: (images, 2) height, width, where annotated.
        locate: says where the box of a row is written, for messages.
    """

    home: str
    names: Sequence[str]
    paths: Sequence[str]
    labels: Sequence[int]
    splits: Sequence[str]
    boxes: np.ndarray | None = None
    sizes: np.ndarray | None = None
    locate: Callable[[int], str] = str


def table_reader(read: Callable[..., Annotations]) -> Callable[..., pd.DataFrame]:
    """Turn a reader of annotations into a reader of tables, with the checks that all share."""

    def reader(
        root: Path | str, check_images: bool = True, allow_missing: bool = False, **options: object
    ) -> pd.DataFrame:
        found = read(root, **options)
        table = _build_table(found)
        if check_images:
            table = _check_images(table, found.home, allow_missing)
            check_classes(table, found.names, found.home)
        return table

    reader.__name__ = reader.__qualname__ = read.__name__
    reader.__doc__ = f"""{read.__doc__}

    Args:
        root: folder of the official archive, or the one above it.
        check_images: False reads the annotations alone: image files and classes may be absent.
        allow_missing: leave missing images out, with a warning, instead of refusing the data set.
        options: the reader's own, as said above.
    """
    return reader


def _build_table(found: Annotations) -> pd.DataFrame:
    names = np.array([*found.names, ""], dtype=object)  # so that label -1 has the name ""
    labels = np.array(found.labels, dtype=np.int64)
    columns = found.paths, labels, names[labels], found.splits
    table = pd.DataFrame(dict(zip(TABLE_COLUMNS[:4], columns, strict=True)))
    table[BOX_COLUMNS] = np.nan if found.boxes is None else _check_boxes(found)
    if table["path"].duplicated().any():
        path = table["path"][table["path"].duplicated()].iloc[0]
        raise InputError(f"{found.home}: {path} is listed more than once; keep one line of it")
    return table


def _check_boxes(found: Annotations) -> np.ndarray:
    """Refuse boxes without area or outside their image; clip those that overhang it."""
    top, left, bottom, right = found.boxes.T
    height, width = np.inf, np.inf
    if found.sizes is not None:
        height, width = found.sizes.T
    wrong = ~((bottom > top) & (right > left) & np.isfinite(found.boxes).all(axis=1))
    outside = (top < -2) | (left < -2) | (top >= height) | (left >= width)  # -2: rounded by hand
    if (wrong | outside).any():
        row = int(np.argmax(wrong | outside))
        what = "has no area" if wrong[row] else "lies outside the image"
        raise InputError(
            f"{found.locate(row)}: the box of {found.paths[row]} {what} "
            f"(top, left, bottom, right = {found.boxes[row].tolist()}); correct this entry"
        )
    limits = np.broadcast_arrays(height, width, height, width, top)[:4]
    return np.clip(found.boxes, 0, np.column_stack(limits))


def _check_images(table: pd.DataFrame, home: str, allow_missing: bool) -> pd.DataFrame:
    """Compare with the file system, one listing per folder instead of a call per image."""
    entries = map(list_folder, set(map(os.path.dirname, table["path"])))
    files = {entry.path for folder in entries for entry in folder if is_file(entry)}
    missing = ~table["path"].isin(files)
    if not missing.any():
        return table
    counts = missing.groupby(table["split"]).agg(["sum", "size"])
    counts = counts.reindex([split for split in SPLITS if split in counts.index]).itertuples()
    report = ", ".join(
        f"{lost:,} of {size:,} {split} images missing" if lost else
        f"{size:,} of {size:,} {split} images found"
        for split, lost, size in counts
    )  # fmt: skip
    report = f"{home}: {report}, first: {table['path'][missing].iloc[0]}"
    if not allow_missing:
        raise InputError(
            f"{report}; complete the images, or read it with allow_missing=True in Python"
        )
    warnings.warn(f"{report}; they are left out", stacklevel=3)
    return table[~missing].reset_index(drop=True)


def list_folder(folder: str) -> list[os.DirEntry]:
    """What a folder holds, by name; nothing where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); correct that") from None


def is_file(entry: os.DirEntry) -> bool:
    """Whether an entry is a file, or a link to one; asks the disk for links alone."""
    return entry.is_file(follow_symlinks=False) or entry.is_symlink() and os.path.isfile(entry)


def check_classes(table: pd.DataFrame, names: Sequence[str], home: str) -> None:
    """Refuse classes that nothing can be learned about."""
    without = set(range(len(names))) - set(table["label"][table["split"] == "train"])
    if without:
        raise InputError(
            f"{home}: {len(without):,} of {len(names):,} classes have no training image, first: "
            f"{names[min(without)]}; add images, or take the class out of the data set"
        )


def find_root(root: Path | str, marker: str, *subfolders: str) -> str:
    """Where ``marker`` lies: in ``root`` or in the folder that the official archive makes there."""
    root = os.path.abspath(os.path.expanduser(root))
    for home in (root, *(f"{root}/{name}" for name in subfolders)):
        if os.path.exists(f"{home}/{marker}"):
            return home
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; give the folder that holds {marker}")
    held = ", ".join(sorted(os.listdir(root))[:5]) or "nothing"
    raise InputError(f"{root}: no {marker} here (but {held}); give the folder that holds it")


def read_text(file: str) -> str:
    """The text of a file."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: missing; fetch the data set's annotation files again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text ({error}); fetch it again") from None


def read_rows(file: str, **columns: Callable[[str], object]) -> Iterator[tuple[int, list]]:
    """Line number and converted fields of every line; the last column takes the rest of the line.

    Args:
        file: a text file of columns between spaces; blank lines are passed over.
        columns: name of each column and what converts its text, by ValueError or KeyError if bad.
    """
    for number, line in enumerate(read_text(file).split("\n"), 1):
        fields = line.strip().split(maxsplit=len(columns) - 1)
        if not fields:
            continue
        try:
            pairs = zip(columns.values(), fields, strict=True)
            yield number, [convert(field) for convert, field in pairs]
        except (ValueError, KeyError) as error:
            why = f"{error} is unknown" if isinstance(error, KeyError) else "it is out of shape"
            raise InputError(
                f"{file}:{number}: expected '{' '.join(columns)}', found '{line[:80].strip()}': "
                f"{why[:80]}; correct this line"
            ) from None


def read_by_id(
    file: str, known: Collection[str] | None = None, **columns: Callable[[str], object]
) -> dict[str, object]:
    """Read ``id column ...`` lines: the value of one column, or the list of several, by id.

    Args:
        file: the text file.
        known: the ids that must be there, each once; any ids, each once, by default.
        columns: as in `read_rows`, without the id.
    """
    values: dict[str, object] = {}
    for number, (key, *fields) in read_rows(file, id=str, **columns):
        if key in values:
            raise InputError(f"{file}:{number}: id {key} a second time; keep one line of it")
        if known is not None and key not in known:
            raise InputError(
                f"{file}:{number}: id {key} is not among the images; correct this line"
            )
        values[key] = fields if len(fields) > 1 else fields[0]
    if not values:
        raise InputError(f"{file}: has no line; fetch the data set's annotation files again")
    missing = [key for key in known or () if key not in values]
    if missing:
        raise InputError(
            f"{file}: no line for {len(missing):,} of {len(known):,} images, first: id "
            f"{missing[0]}; add them, or take these images out of the list of images"
        )
    return values


def locate_id(file: str, key: str) -> str:
    """``file:line`` of an id, for messages."""
    return next(
        f"{file}:{n}" for n, fields in read_rows(file, id=str, rest=str) if fields[0] == key
    )


def read_mat(file: str, key: str, kind: type = object) -> np.ndarray:
    """One variable of a MATLAB file, as a vector of a kind; nothing in the file is executed."""
    with file_errors(file):
        values = np.ravel(loadmat(file, squeeze_me=True, variable_names=[key])[key])
        return values if kind is object else values.astype(kind)


@contextlib.contextmanager
def file_errors(file: str) -> Iterator[None]:
    """Turn whatever goes wrong with a structured file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{file}: missing; fetch the data set's annotation files again") from None
    except InputError:
        raise
    except Exception as error:  # parsers of foreign files fail in any way they like
        raise InputError(
            f"{file}: not as expected ({one_line(error)}); fetch this file again"
        ) from None


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of the upright image, from the header alone."""
    with image_file(path) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image once turned as its EXIF orientation says."""
    width, height = image.size
    # Pillow turns a TIFF itself; asking a PNG without EXIF for it would decode the image
    asked = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    turned = asked and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


@contextlib.contextmanager
def image_file(path: str) -> Iterator[Image.Image]:
    """Open an image file; whatever goes wrong inside becomes one line that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images and damaged EXIF
            with Image.open(path) as image:
                yield image
    except FileNotFoundError:
        raise InputError(f"{path}: no such image; put it back or read the data set again") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image that Pillow can read; replace it") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large to decode ({error}); scale it down") from None
    except Exception as error:  # decoders of broken files fail in any way they like
        raise InputError(f"{path}: broken or truncated ({one_line(error)}); replace it") from None
