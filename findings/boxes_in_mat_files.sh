#!/usr/bin/env bash
# SciPy 1.17.1, scipy.io.loadmat, with NumPy 2.4.6, on numbers that are doubles in MATLAB.
#
# Expected: a double of MATLAB is a double in Python.
# Seen: MATLAB writes whole numbers of a double in as few bytes as they need, each value of a struct
# in its own; loadmat returns the type of the file, so one side of a box is uint8, the other uint16,
# and all further arithmetic wraps around: centers of small boxes, areas of large ones. The values are
# arrays of 1 x 1, for which NumPy does not warn. mat_dtype=True gives doubles.
# Annotations as those of Stanford Cars (x1, y1, x2, y2); center of x and area:
#   39, 116, 569, 375: center 304, area 6198; with mat_dtype=True 304 and 137270
#   150, 30, 240, 90: center 67, area 24; with mat_dtype=True 195 and 5400
# Why it matters here: crops around such a center miss the car, and "the largest object" or the share
# of a box in the image are of any order; large boxes become small ones, which looks like bad labels.
# Convert before arithmetic, as ramslib's reader does.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W error - <<'PYTHON'
from io import BytesIO

import numpy as np
from scipy.io import loadmat, savemat

BOXES = [(39, 116, 569, 375), (150, 30, 240, 90)]
SIDES = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
# Flags of an array of a MATLAB 5 file: their type and size, then the class: 6 is double.
FLAGS = b"\x06\0\0\0\x08\0\0\0"


def as_matlab_writes(boxes):
    """A file of doubles that are stored in as few bytes as they need."""
    records = np.zeros(len(boxes), [(side, object) for side in SIDES])
    for record, box in zip(records, boxes, strict=True):
        for side, value in zip(SIDES, box, strict=True):
            record[side] = np.array([[value]], np.min_scalar_type(value))
    file = BytesIO()
    savemat(file, {"annotations": records})
    content = file.getvalue()
    for integers in (b"\x09\0\0\0", b"\x0b\0\0\0"):  # uint8 and uint16
        content = content.replace(FLAGS + integers, FLAGS + b"\x06\0\0\0")
    return BytesIO(content)


def measured(**options):
    """Center of x and area of each box, computed from what is loaded."""
    records = loadmat(as_matlab_writes(BOXES), **options)["annotations"].ravel()
    for record in records:
        x1, y1, x2, y2 = (record[side] for side in SIDES)
        yield float(((x1 + x2) / 2).item()), float(((x2 - x1) * (y2 - y1)).item())


found, true = list(measured()), list(measured(mat_dtype=True))
for box, (center, area), (true_center, true_area) in zip(BOXES, found, true, strict=True):
    print(f"{', '.join(map(str, box))}: center {center:.0f}, area {area:.0f};", end=" ")
    print(f"with mat_dtype=True {true_center:.0f} and {true_area:.0f}")
assert true == [(304, 137270), (195, 5400)]
assert found == [(304, 6198), (67, 24)]
PYTHON
