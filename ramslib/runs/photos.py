"""Classify photos of one's own, with the model of a run or an exported one."""

import io
import math
import os
import re
import shutil
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from glob import glob
from itertools import chain, count
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from ramslib import evaluation
from ramslib.data.annotations import BOX_COLUMNS, image_size
from ramslib.data.datasets import PHOTO_SUFFIXES, list_files
from ramslib.data.transforms import open_image, reading_error
from ramslib.errors import InputError, write_atomically, writing
from ramslib.runs.inference import load_exported, load_model

SHEET = Path(__file__).with_name("contact_sheet.html.j2")
THUMBNAIL = 240  # pixels


def find_images(paths: Sequence[str | Path] | str | Path) -> list[Path]:
    """Image files named by files, folders (searched deeply) or patterns, in order, each once.

    Raises:
        InputError: a path that leads to no image.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        exists = os.path.lexists(path)
        named = [Path(path)] if exists else sorted(map(Path, glob(str(path), recursive=True)))
        inside = [file for one in named for file in (_photos(one) if one.is_dir() else [one])]
        if not inside:
            raise InputError(f"{path}: no image there; give image files, folders or patterns")
        found += inside
    return list(dict.fromkeys(found))


def _photos(folder: Path) -> list[Path]:
    """All photos below a folder, sorted, without hidden ones."""
    return [Path(path) for path, kind in list_files(folder).items() if kind in PHOTO_SUFFIXES]


def predict(
    run: Path | str,
    paths: Sequence[str | Path] | str | Path,
    checkpoint: str = "best",
    batch_size: int = 16,
    unsure_below: float | None = None,
    early_exit: bool = False,
) -> pd.DataFrame:
    """Classify images with a trained run, or with an exported ``.onnx`` file and no model built.

    Args:
        run: its folder, or the file.
        paths: image files, folders or patterns, or one of them.
        checkpoint: ``best`` or ``last``.
        batch_size: images per forward pass.
        unsure_below: the probability below which an answer is unsure; by default that of the run,
            see `evaluation.fit_calibration`.
        early_exit: run further scales only for images of which scale 1 is not sure: faster. The
            table then has the answer alone, no regions, and ``scales``, how many were run.

    Returns:
        One row per image and output, the last of which is the answer: ``path, output, class_name``;
        ``probability``, calibrated; ``unsure``, missing where the run has no such probability; per
        scale its region as ``top, left, bottom, right`` in pixels of the upright image; and
        ``error``: why a file could not be read, which then has a single row.

    Raises:
        InputError: no run there, no image there, or none that can be read; a probability outside
            of 0 to 1; or early exit with a run that has no threshold for it.
    """
    if unsure_below is not None and not 0 <= unsure_below <= 1:
        raise InputError(f"unsure_below is {unsure_below}; give a probability from 0 to 1")
    is_file = Path(run).suffix == ".onnx" or Path(run).is_file()
    loaded = load_exported(run) if is_file else load_model(run, checkpoint)
    predict_table, known = evaluation.predict, loaded.unsure_below
    if early_exit:
        if math.isnan(loaded.exit_above):
            raise InputError(
                f"{run}: has no threshold for early exit; that takes a run (no exported file) of "
                "several scales with a validation split, finished by version 0.2 or later"
            )
        predict_table = partial(evaluation.predict_early_exit, threshold=loaded.exit_above)
        known = {"early exit": known[evaluation.output_names(loaded.model.num_scales)[-1]]}
    files = pd.DataFrame({"path": [str(file) for file in find_images(paths)], "label": 0})
    errors = {}
    try:
        predictions = predict_table(loaded.model, files, loaded.transform, batch_size=batch_size)
    except InputError:
        errors = {path: error for path in files["path"] if (error := reading_error(path))}
        if len(errors) in (0, len(files)):  # the model is at fault, or nothing is left
            raise
        sound = files[~files["path"].isin(errors)].reset_index(drop=True)
        predictions = predict_table(loaded.model, sound, loaded.transform, batch_size=batch_size)
    names = np.array(loaded.classes, dtype=object)[predictions["prediction"]]
    table = predictions[["path", "output"]].assign(class_name=names)
    table["probability"] = predictions["calibrated"].round(4)
    if unsure_below is not None:
        known = dict.fromkeys(predictions["output"], unsure_below)
    limits = predictions["output"].map(lambda name: known.get(name, np.nan))
    unsure = (predictions["calibrated"] < limits).astype("boolean")
    table["unsure"] = unsure.mask(limits.isna())
    further = {"scales": "Int64"} if early_exit else dict.fromkeys(BOX_COLUMNS, float)
    table = table.join(predictions[list(further)].astype(further))
    failed = pd.DataFrame({"path": errors.keys(), "error": errors.values()})
    return pd.concat([table.assign(error=""), failed], ignore_index=True)


def save_pictures(predictions: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Draw the regions of scale 2 and further ones into copies of the images.

    A copy lies below the folder as its image lies below the folder that holds all images.

    Args:
        predictions: from `predict`.
        folder: made when missing; existing files are never replaced.

    Returns:
        The new files, PNG.

    Raises:
        InputError: a picture of that name exists, or the folder cannot be written.
    """
    readable = predictions[predictions["error"] == ""]
    targets = picture_paths(readable["path"].unique(), folder)
    for path, rows in readable.groupby("path", sort=False):
        picture = _draw_regions(open_image(path), rows.dropna(subset=BOX_COLUMNS))
        with writing(Path(folder)):
            targets[path].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(targets[path], lambda part, picture=picture: picture.save(part, "PNG"))
    return list(targets.values())


def picture_paths(paths: Sequence[str], folder: Path | str) -> dict[str, Path]:
    """Where the picture of each image goes: images of one name in two folders do not collide.

    Raises:
        InputError: one of them exists.
    """
    full = {path: os.path.abspath(path) for path in paths}
    base = os.path.commonpath([os.path.dirname(path) for path in full.values()])
    targets = {path: Path(folder, os.path.relpath(full[path], base) + ".png") for path in paths}
    for target in targets.values():
        if os.path.lexists(target):
            raise InputError(f"{target} exists; choose another folder for the pictures")
    return targets


def answers(predictions: pd.DataFrame) -> pd.DataFrame:
    """The rows that count: of each readable photo its last output, see `evaluation`."""
    return predictions[predictions["error"] == ""].groupby("path", sort=False).tail(1)


def save_contact_sheet(predictions: pd.DataFrame, path: Path | str) -> None:
    """Write a page of thumbnails with regions, class and probability, unsure ones first.

    Args:
        predictions: from `predict`.
        path: the new page, HTML that holds its pictures.

    Raises:
        InputError: it cannot be written.
    """
    regions = predictions.dropna(subset=BOX_COLUMNS).groupby("path")
    order = answers(predictions).sort_values(["class_name", "probability"])
    order = order.sort_values("unsure", ascending=False, kind="stable")
    failed = predictions[predictions["error"] != ""].to_dict("records")
    rows = [
        {**row, "picture": _thumbnail(row["path"], regions.get_group(row["path"]))}
        for row in order.fillna({"unsure": False}).to_dict("records")
    ]
    page = jinja2.Template(SHEET.read_text("utf-8"), autoescape=True)
    content = page.render(rows=rows, failed=failed).encode("utf-8", "replace")
    write_atomically(Path(path), lambda part: part.write_bytes(content))


def _thumbnail(path: str, regions: pd.DataFrame) -> str:
    """A small JPEG with the regions of scale 2 and further ones, in base64."""
    picture, content = open_image(path, 2 * THUMBNAIL), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    _draw_regions(picture, regions, picture.width / image_size(path)[1]).save(content, "JPEG")
    return b64encode(content.getvalue()).decode()


def _draw_regions(picture: Image.Image, regions: pd.DataFrame, scale: float = 1.0) -> Image.Image:
    """Draw all regions but the first, that of scale 1, into a picture of another scale."""
    from ramslib.plots.drawing import draw_box, output_color  # matplotlib: only pictures need it

    for row in regions.iloc[1:].itertuples():
        box = np.array([row.top, row.left, row.bottom, row.right]) * scale
        picture = draw_box(picture, box, output_color(row.output))
    return picture


def sort_into(predictions: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Copy photos into a folder per predicted class; the photos stay where they are.

    Args:
        predictions: from `predict`.
        folder: a new or an empty one.

    Returns:
        The copies; of photos with one name, further ones end in a number.

    Raises:
        InputError: the folder holds something, or a copy cannot be written.
    """
    check_empty(folder)
    found, copies = answers(predictions), []
    classes, folders = sorted(found["class_name"].unique()), set()
    places = {name: (_unused(safe_name(name), folders), set()) for name in classes}
    for row in found.itertuples():
        place, taken = places[row.class_name]
        copies.append(Path(folder, place, _unused(Path(row.path).name, taken)))
        with writing(copies[-1]):
            copies[-1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(row.path, copies[-1])
    return copies


def check_empty(folder: Path | str) -> None:
    """Raise InputError for a folder that holds something."""
    with writing(Path(folder)):
        if os.path.lexists(folder) and os.listdir(folder):
            raise InputError(f"{folder}: holds files already; choose a new folder")


def safe_name(class_name: str) -> str:
    """A class name as the name of a folder on any system."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", class_name)[:80].strip(". ") or "_"


def _unused(name: str, taken: set[str]) -> str:
    """The name, numbered before its ending where it is taken, whatever the case; now it is."""
    stem, suffix = os.path.splitext(name)
    numbered = (f"{stem} {number}{suffix}" for number in count(2))
    unused = next(each for each in chain([name], numbered) if each.lower() not in taken)
    taken.add(unused.lower())
    return unused
