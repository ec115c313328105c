"""A reader of photos whose object lies off center: the photos of a dataset on a larger canvas.

    OFF_CENTER=photos ramslib probe --out runs/off \
        data=benchmarks/off_center.py:read_cub root=path/to/CUB_200_2011

A photo lies at a place drawn by its name; around it is itself, enlarged and blurred. The canvases
are written once, as JPEG files, to the folder that `FOLDER` of the environment names. Around the
photo nothing is to be seen: this asks whether an object is found, not which one of several.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from ramslib.data import readers
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import open_image
from ramslib.errors import InputError, write_atomically

LARGER = 2.0  # sides of a canvas, in those of its photo
FOLDER = "OFF_CENTER"


def read_cub(root: Path | str) -> pd.DataFrame:
    """CUB-200-2011, or another dataset of its layout.

    Raises:
        InputError: the environment names no folder.
    """
    if not os.environ.get(FOLDER):
        raise InputError(f"no folder for the canvases; name one in the variable {FOLDER}")
    table = readers.read_cub(root)
    base = os.path.commonpath(table["path"].map(os.path.dirname).tolist())
    folder = Path(os.environ[FOLDER], f"{LARGER:g}")
    return pd.DataFrame([_place(row, base, folder) for row in table.to_dict("records")])


def _place(row: dict, base: str, folder: Path) -> dict:
    """Write the canvas of a photo, if it is not there; returns its row, with the box on it."""
    key = os.path.relpath(row["path"], base)
    image, target = open_image(row["path"]), (folder / key).with_suffix(".jpg")
    size = np.array(image.size[::-1])
    canvas = np.round(LARGER * size).astype(int)
    shares = np.array(list(hashlib.sha256(key.encode()).digest()[:2])) / 255
    top, left = np.round(shares * (canvas - size)).astype(int).tolist()
    if not target.exists():
        around = image.resize(canvas[::-1].tolist(), Image.Resampling.BILINEAR)
        around = around.filter(ImageFilter.GaussianBlur(0.08 * float(max(canvas))))
        around.paste(image, (left, top))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: around.save(file, "JPEG", quality=92))
    box = np.array([row[side] for side in BOX_COLUMNS]) + [top, left, top, left]
    return row | {"path": str(target)} | dict(zip(BOX_COLUMNS, box, strict=True))
