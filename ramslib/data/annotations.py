"""Annotation files and image files, read so that any mistake is one line that names it.

Readers make a table: a row per image with ``path`` (absolute), ``label`` (from 0), ``class_name``
(as the files write it), ``split`` ("train", "validation" or "test") and the annotated box
``top, left, bottom, right`` in pixels of the upright image, bottom and right exclusive, NaN where
there is none, and ``group``: images of one group, such as a burst, stay in one split; NaN is none.
"""

import contextlib
import csv
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat

from ramslib.errors import InputError, file_errors

BOX_COLUMNS = ["top", "left", "bottom", "right"]
SIZE_COLUMNS = ["image_height", "image_width"]  # of readers that know them without the images
TABLE_COLUMNS = ["path", "label", "class_name", "split", *BOX_COLUMNS, "group"]
SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
LISTS = {"split": "split.csv", "reason": "exclude.csv", "group": "groups.csv"}  # by their column
CSV = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}  # names of any bytes
# Pillow chooses a reader by content: without a list, a file named .jpg may start Ghostscript (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # JPEG: also MPO
HEIF = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1")  # how such files begin, after 4 bytes


def complete_table(found: object, root: str, origin: str) -> pd.DataFrame:
    """Check what a reader returned, and fill in the columns that it left out.

    Args:
        found: a DataFrame of a row per image with ``path`` and ``label`` or ``class_name``. Labels
            are whole numbers, by default the rank of the class name, and are numbered anew from 0
            in their order. Class names are by default the labels as text; splits, boxes and groups
            NaN. `SIZE_COLUMNS` clip boxes; further ones are dropped. An index of texts says where
            each row is written.
        root: folder that relative paths start from.
        origin: name of the dataset or reader, for messages.

    Raises:
        InputError: a column is missing, a value is not what its column holds, an image is listed
            twice, or a box is impossible.
    """
    columns = set(found) if isinstance(found, pd.DataFrame) else set()
    if "path" not in columns or not {"label", "class_name"} & columns or found.empty:
        got = f"{len(found)} rows of {sorted(columns)}" if columns else f"a {type(found).__name__}"
        raise InputError(
            f"{origin}: a reader returns a DataFrame with a row per image and the columns path, "
            f"label or class_name, and split; this one returned {got}"
        )
    places = [at if isinstance(at, str) else f"{origin}: row {at}" for at in found.index]
    table = found.reset_index(drop=True).reindex(columns=TABLE_COLUMNS)
    if "class_name" not in columns:
        table["class_name"] = table["label"].convert_dtypes()
    table["class_name"] = table["class_name"].astype(str)
    if is_ranked := "label" not in columns:
        table["label"] = table["class_name"].rank(method="dense")
    names = table.groupby("label")["class_name"].transform("nunique")
    numbers = table[["label", *BOX_COLUMNS]].apply(pd.to_numeric, errors="coerce").astype(float)
    labels, splits = numbers.pop("label"), table["split"].astype(str).str.lower().map(SPLIT_WORDS)
    sound = {  # column: whether each value is what it must be, and what to do
        "path": (table["path"].map(lambda path: isinstance(path, str | Path)), "give a path"),
        "split": (splits.notna() | table["split"].isna().all(), f"use {', '.join(SPLITS)}"),
        "label": (labels.mod(1).eq(0) & labels.ge(0) | is_ranked, "use whole numbers from 0"),
        "class_name": (table["class_name"].notna() & ~(names > 1), "give one name to each label"),
        **{side: (numbers[side].notna() | table[side].isna(), "use pixels") for side in numbers},
    }
    for column, (is_sound, remedy) in sound.items():
        if not is_sound.all():
            row = is_sound.idxmin()
            value = table.loc[row, column]
            shown = "missing" if pd.isna(value) else repr(str(value)[:80])
            if column == "class_name" and not is_ranked:
                column = f"class_name of label {labels[row]:g}"
            raise InputError(f"{places[row]}: {column} is {shown}; {remedy}")
    table["path"] = [os.path.normpath(os.path.join(root, path)) for path in table["path"]]
    if (twice := table["path"].duplicated()).any():
        row = twice.idxmax()
        raise InputError(f"{places[row]}: {table['path'][row]} a second time; keep one line of it")
    table["split"], table["group"] = splits, table["group"].astype(str)
    table["label"] = labels.rank(method="dense").astype(np.int64) - 1
    sizes = found.reindex(columns=SIZE_COLUMNS).apply(pd.to_numeric, errors="coerce")
    boxed = numbers.notna().any(axis=1).to_numpy()
    entries = [f"{places[row]}: {table['path'][row]}" for row in np.flatnonzero(boxed)]
    limits = sizes.fillna(np.inf).to_numpy(float)[boxed]
    numbers.loc[boxed] = clip_boxes(numbers.loc[boxed].to_numpy(), entries, limits)
    table[BOX_COLUMNS] = numbers
    return table


def clip_boxes(boxes: np.ndarray, entries: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """Clip boxes that overhang their image; refuse those without area or outside it.

    Args:
        boxes: (N, 4) top, left, bottom, right in pixels, bottom and right exclusive.
        entries: where each is written, for messages.
        sizes: (N, 2) height, width of the images, infinite where not known.
    """
    starts, ends = boxes[:, :2], boxes[:, 2:]
    sound = (ends > starts).all(axis=1) & np.isfinite(boxes).all(axis=1)
    inside = ((starts >= -2) & (starts < sizes)).all(axis=1)  # -2: rounded by hand
    if not (sound & inside).all():
        row = int(np.argmin(sound & inside))
        size = f" of {sizes[row].tolist()} pixels" if np.isfinite(sizes[row]).all() else ""
        raise InputError(
            f"{entries[row]}: the box (top, left, bottom, right) = {boxes[row].tolist()} "
            f"{f'lies outside its image{size}' if sound[row] else 'has no area'}; correct it"
        )
    return np.clip(boxes, 0, np.tile(sizes, 2))


def check_images(table: pd.DataFrame, root: str, allow_missing: bool) -> pd.DataFrame:
    """Compare a table with the file system, one listing per folder instead of a call per image.

    Returns:
        The rows whose images exist.

    Raises:
        InputError: images are missing and that is not allowed, a class has none to learn from, or
            there is only one class.
    """
    entries = map(list_folder, set(map(os.path.dirname, table["path"])))
    files = {entry.path for folder in entries for entry in folder if is_file(entry)}
    exists = table["path"].isin(files)
    if not exists.all():
        counts = exists.groupby(table["split"]).agg(["sum", "size"]).itertuples()
        parts = ", ".join(f"{found:,} of {size:,} {split}" for split, found, size in counts)
        report = f"{root}: images found: {parts}; first missing: {table['path'][~exists].iloc[0]}"
        if not allow_missing:
            raise InputError(f"{report}; complete the images, or set allow_missing=true")
        warnings.warn(f"{report}; those missing are left out", stacklevel=3)
    classes = table.groupby("label")["class_name"].first()
    without = classes.drop(table["label"][exists & (table["split"] == "train")].unique())
    if len(without):
        raise InputError(
            f"{root}: {len(without):,} of {len(classes):,} classes have no training image, first: "
            f"{without.iloc[0]}; add images, or take the class out of the dataset"
        )
    if len(classes) < 2:
        raise InputError(f"{root}: images of {len(classes)} classes; at least two are needed")
    return table[exists].reset_index(drop=True)


def list_folder(folder: str) -> list[os.DirEntry]:
    """What a folder holds, by name; nothing where there is no such folder."""
    with file_errors(folder, "correct that"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as held:
            return sorted(held, key=lambda entry: entry.name)
    return []


def is_file(entry: os.DirEntry) -> bool:
    """Whether an entry is a file, or a link to one; asks the disk for links alone."""
    return entry.is_file(follow_symlinks=False) or entry.is_symlink() and os.path.isfile(entry)


def find_root(root: Path | str, marker_file: str, *subfolders: str) -> str:
    """The folder of ``marker_file``: ``root``, or what the official archive makes there."""
    root = os.path.abspath(os.path.expanduser(root))
    for folder in (root, *(f"{root}/{name}" for name in subfolders)):
        if os.path.exists(f"{folder}/{marker_file}"):
            return folder
    held = ", ".join(sorted(os.listdir(root))[:5]) or "nothing"
    raise InputError(f"{root}: no {marker_file} here (but {held}); give the folder that holds it")


def read_text(file: str) -> str:
    """The text of a file."""
    with file_errors(file):
        return Path(file).read_text(encoding="utf-8-sig")


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
    file: str, known: pd.Index | None = None, **columns: Callable[[str], object]
) -> pd.DataFrame:
    """Read ``id column ...`` lines: a row per id.

    Args:
        file: the text file.
        known: the ids that must be there, each once, whose order the rows get; by default any ids,
            each once.
        columns: as in `read_rows`, without the id.
    """
    values: dict[str, list] = {}
    for number, (key, *fields) in read_rows(file, id=str, **columns):
        if key in values:
            raise InputError(f"{file}:{number}: id {key} a second time; keep one line of it")
        if known is not None and key not in known:
            raise InputError(
                f"{file}:{number}: id {key} is not among the images; correct this line"
            )
        values[key] = fields
    if not values:
        raise InputError(f"{file}: has no line; download the dataset's annotation files again")
    known = pd.Index(values) if known is None else known
    if missing := [key for key in known if key not in values]:
        raise InputError(
            f"{file}: no line for {len(missing):,} of {len(known):,} images, first: id "
            f"{missing[0]}; add them, or take these images out of the list of images"
        )
    return pd.DataFrame.from_dict(values, "index", columns=list(columns)).loc[known]


def read_columns(file: str, *needed: str, exactly: bool = False) -> tuple[pd.DataFrame, str]:
    """A table of commas, semicolons or tabs whose first line names the columns.

    Args:
        file: a text file of any encoding; blank lines are passed over.
        needed: columns that must be there, in any order.
        exactly: these columns and no others, in this order.

    Returns:
        The fields as text, by ``file:line``, and the separator.
    """
    with file_errors(file, "correct it"), open(file, **CSV) as lines:
        header = lines.readline().rstrip().lower()
        separator = next((mark for mark in ";\t" if mark in header), ",")
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        if names != list(needed) if exactly else not set(needed) <= set(names):
            wanted = f"be {','.join(needed)}" if exactly else f"name {' and '.join(needed)}"
            raise InputError(f"{file}:1: the first line must {wanted}; correct or move this file")
        rows = {}
        for number, row in enumerate(csv.reader(lines, delimiter=separator), 2):
            if row and len(row) != len(names):
                found = separator.join(row)[:80]
                wanted = separator.join(names)
                raise InputError(
                    f"{file}:{number}: expected {wanted!r}, found {found!r}; correct this line"
                )
            rows |= {f"{file}:{number}": row} if row else {}
    return pd.DataFrame.from_dict(rows, "index", columns=names, dtype=str), separator


def read_mat(file: str, key: str, kind: type = object) -> np.ndarray:
    """One variable of a MATLAB file, as a vector of a kind; nothing in the file is executed."""
    with file_errors(file):
        values = np.ravel(loadmat(file, squeeze_me=True, variable_names=[key])[key])
        return values if kind is object else values.astype(kind)


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
    """Open an image file of `FORMATS`; whatever goes wrong inside is one line that names it."""
    most = f"at most {2 * Image.MAX_IMAGE_PIXELS:,} pixels"  # more: DecompressionBombError
    remedy = f"replace it by a whole image ({', '.join(FORMATS)}) of {most}"
    with file_errors(path, remedy), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large images and damaged EXIF
        try:
            image = Image.open(path, formats=_formats(path))
        except UnidentifiedImageError:
            raise InputError(f"{path}: not an image; {remedy}") from None
        with image:
            yield image


def _formats(path: str) -> tuple[str, ...]:
    """`FORMATS`, or HEIF for a file that begins so; iPhones name some of them .jpg.

    Raises:
        InputError: the package that reads HEIF is not installed.
    """
    with open(path, "rb") as file:
        if file.read(12)[4:] not in HEIF:
            return FORMATS
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        remedy = "install the package pillow-heif, or convert it to JPEG"
        raise InputError(f"{path}: a HEIC image; {remedy}") from None
    return ("HEIF",)
