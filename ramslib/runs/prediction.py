"""Use a trained run on photos of one's own: class, probability and the regions looked at."""

import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd

from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.datasets import HIDDEN, PHOTO_SUFFIXES
from ramslib.data.transforms import ImageTransform, open_image
from ramslib.errors import InputError, write_atomically
from ramslib.evaluation import predict
from ramslib.runs.run import load, read_run


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
        and not any(part.startswith(HIDDEN) for part in file.relative_to(folder).parts)
    ]


def predict_paths(
    run: Path | str, paths: Sequence[str | Path], checkpoint: str = "best", batch_size: int = 16
) -> pd.DataFrame:
    """Classify photos with a trained run.

    Args:
        run: its folder.
        paths: image files, folders or patterns.
        checkpoint: ``best`` or ``last`` weights.
        batch_size: photos per forward pass.

    Returns:
        One row per photo and view name: ``path, scale, class_name, probability`` and, per scale,
        the region looked at as ``top, left, bottom, right`` in pixels of the upright photo.

    Raises:
        InputError: no run there, no photo there, or a photo that cannot be read.
    """
    config, description, _ = read_run(run)
    files = pd.DataFrame({"path": [str(file) for file in find_images(paths)], "label": 0})
    view = ImageTransform(config.highres_size or config.image_size, config.crop_fraction)
    predictions = predict(load(run, checkpoint), files, view, batch_size)
    names = np.array(description["classes"], dtype=object)[predictions["prediction"]]
    told = predictions[["path", "output"]].assign(class_name=names)
    told["probability"] = predictions["confidence"].round(4)
    return pd.concat([told, predictions[BOX_COLUMNS]], axis=1)


def save_pictures(predictions: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Draw the regions that each scale looked at into copies of the photos.

    A copy lies below the folder as its photo lies below the folder that holds all photos.

    Args:
        predictions: from `predict_paths`.
        folder: made when missing; existing files are never replaced.

    Returns:
        The new files, PNG.

    Raises:
        InputError: a picture of that name exists, or the folder cannot be written.
    """
    from ramslib.plots.drawing import draw_box, output_color  # matplotlib: only pictures need it

    targets = picture_paths(predictions["path"].unique(), folder)
    for path, rows in predictions.groupby("path", sort=False):
        photo = open_image(path)
        for row in rows.dropna(subset=BOX_COLUMNS).iloc[1:].itertuples():
            box = row.top, row.left, row.bottom, row.right
            photo = draw_box(photo, box, output_color(row.output))
        try:
            targets[path].parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error}); choose another") from None
        write_atomically(targets[path], lambda part, photo=photo: photo.save(part, "PNG"))
    return list(targets.values())


def picture_paths(paths: Sequence[str], folder: Path | str) -> dict[str, Path]:
    """Where the picture of each photo goes: photos of one name in two folders do not collide.

    Raises:
        InputError: one of them exists.
    """
    full = {path: os.path.abspath(path) for path in paths}
    base = os.path.commonpath([os.path.dirname(path) for path in full.values()])
    targets = {path: Path(folder, os.path.relpath(full[path], base) + ".png") for path in paths}
    for target in targets.values():
        if target.exists():
            raise InputError(f"{target} exists; choose another folder for the pictures")
    return targets
