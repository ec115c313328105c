#!/usr/bin/env bash
# avalanche-lib 0.6.0, avalanche.benchmarks.datasets.CUB200.
#
# Expected: "a standard PyTorch data set" of CUB gives the photos; boxes, if it read them, would be
# an option.
# Seen: every photo is cropped to the bird's annotated box before any transform, for test as for
# training. There is no option for it, and the docstrings do not mention boxes.
# Photos of 500 x 375 pixels, each with the box 100, 50, 200, 150 (left, top, width, height):
#   train: 2 photos, the first of 200 x 150 pixels
#   test: 1 photos, the first of 200 x 150 pixels
# Why it matters here: tables of fine-grained methods keep those that get the box of a test image apart
# from those that must find the bird. With these images nothing is left to find: a proposed region is
# a part of what a person cut out. Read CUB with ramslib's reader, or keep only the first two entries
# of each tuple in data_set.imgs.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  avalanche-lib==0.6.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import inspect
from pathlib import Path

from avalanche.benchmarks.datasets import CUB200
from PIL import Image

LISTS = {
    "images.txt": ["a/1.png", "a/2.png", "b/3.png"],
    "image_class_labels.txt": ["1", "1", "2"],
    "train_test_split.txt": ["1", "0", "1"],
    "bounding_boxes.txt": ["100.0 50.0 200.0 150.0"] * 3,
}
root = Path("CUB_200_2011")
for name, rows in LISTS.items():
    root.mkdir(exist_ok=True)
    (root / name).write_text("".join(f"{number} {row}\n" for number, row in enumerate(rows, 1)))
for name in LISTS["images.txt"]:
    (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (500, 375)).save(root / "images" / name)
found = {}
for split in ("train", "test"):
    photos = CUB200(".", train=split == "train", download=False)
    width, height = photos[0][0].size
    found[split] = len(photos), (width, height)
    print(f"{split}: {len(photos)} photos, the first of {width} x {height} pixels")
assert found == {"train": (2, (200, 150)), "test": (1, (200, 150))}
described = (CUB200.__doc__ + CUB200.__init__.__doc__).lower()
assert not any(word in described for word in ("crop", "box"))
assert not any("box" in name or "crop" in name for name in inspect.signature(CUB200).parameters)
PYTHON
