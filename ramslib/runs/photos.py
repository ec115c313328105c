"""Classify photos of one's own, with the model of a run or an exported one."""

import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd

from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.datasets import HIDDEN, PHOTO_SUFFIXES
from ramslib.data.transforms import open_image
from ramslib.errors import InputError, write_atomically, writing
from ramslib.evaluation import predict as predict_table
from ramslib.runs.inference import load_exported, load_model


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files named by files, folders (searched deeply) or patterns, in order, each once.

    Raises:
        InputError: a path that leads to no image.
    """
    found: list[Path] = []
    for path in paths:
        exists = os.path.lexists(path)
        named = [Path(path)] if exists else sorted(map(Path, glob(str(path), recursive=True)))
        inside = [file for one in named for file in (_photos(one) if one.is_dir() else [one])]
        if not inside:
            raise InputError(f"{path}: no image there; give image files, folders or patterns")
        found += inside
    return list(dict.fromkeys(found))


def _photos(folder: Path) -> list[Path]:
    """All photos below a folder, sorted, without hidden ones."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in PHOTO_SUFFIXES
        and file.is_file()
        and not any(part.startswith(HIDDEN) for part in file.relative_to(folder).parts)
    ]


def predict(
    run: Path | str, paths: Sequence[str | Path], checkpoint: str = "best", batch_size: int = 16
) -> pd.DataFrame:
    """Classify images with a trained run, or with an exported ``.onnx`` file and no model built.

    Args:
        run: its folder, or the file.
        paths: image files, folders or patterns.
        checkpoint: ``best`` or ``last``.
        batch_size: images per forward pass.

    Returns:
        One row per image and output: ``path, output, class_name, probability``, per scale its
        region as ``top, left, bottom, right`` in pixels of the upright image, and ``error``: why a
        file could not be read, which then has a single row.

    Raises:
        InputError: no run there, no image there, or none that can be read.
    """
    is_file = Path(run).suffix == ".onnx" or Path(run).is_file()
    loaded = load_exported(run) if is_file else load_model(run, checkpoint)
    files = pd.DataFrame({"path": [str(file) for file in find_images(paths)], "label": 0})
    errors = {}
    try:
        predictions = predict_table(loaded.model, files, loaded.transform, batch_size)
    except InputError:
        errors = {path: error for path in files["path"] if (error := _reading_error(path))}
        if len(errors) in (0, len(files)):  # the model is at fault, or nothing is left
            raise
        sound = files[~files["path"].isin(errors)].reset_index(drop=True)
        predictions = predict_table(loaded.model, sound, loaded.transform, batch_size)
    names = np.array(loaded.classes, dtype=object)[predictions["prediction"]]
    table = predictions[["path", "output"]].assign(class_name=names)
    table["probability"] = predictions["confidence"].round(4)
    table[BOX_COLUMNS] = predictions[BOX_COLUMNS]
    failed = pd.DataFrame({"path": errors.keys(), "error": errors.values()})
    return pd.concat([table.assign(error=""), failed], ignore_index=True)


def _reading_error(path: str) -> str:
    try:
        open_image(path)
    except InputError as error:
        return str(error)
    return ""


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
    from ramslib.plots.drawing import draw_box, output_color  # matplotlib: only pictures need it

    readable = predictions[predictions["error"] == ""]
    targets = picture_paths(readable["path"].unique(), folder)
    for path, rows in readable.groupby("path", sort=False):
        picture = open_image(path)
        for row in rows.dropna(subset=BOX_COLUMNS).iloc[1:].itertuples():
            box = row.top, row.left, row.bottom, row.right
            picture = draw_box(picture, box, output_color(row.output))
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
