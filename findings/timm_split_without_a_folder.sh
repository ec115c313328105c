#!/usr/bin/env bash
# timm 1.0.31, create_dataset("folder", root, split=...) (timm/data/dataset_factory.py).
#
# Expected: split="test" reads root/test, and is an error where there is no such folder.
# Seen: without that folder the split is the root itself with all that is below. Classes are named by
# the innermost folder, so the training images count as test images of the same classes. It happens
# to names that are nearly right as well: Test, testing, val_images. No error, no warning.
# Two classes, of each 6 images in train and 2 in val; number of images and of classes:
#   train: 12 images, 2 classes
#   validation: 4 images, 2 classes
#   test: 16 images, 2 classes, 12 of them from train
# Why it matters here: the number of classes is right and the accuracy is high, as most of the images
# were trained on: 100 % of 12 and 50 % of 4 are 88 %. Compare the number of images with the known
# one, or give the folder of the split as root with search_split=False.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  timm==1.0.31 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

from PIL import Image
from timm.data import create_dataset

IMAGES = {"train": 6, "val": 2}
for part, images in IMAGES.items():
    for name in ("dunnock", "wren"):
        Path("birds", part, name).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (32, 24)).save(f"birds/{part}/{name}/{number}.png")
found = {}
for split in ("train", "validation", "test"):
    photos = create_dataset("folder", "birds", split=split)
    files = [photos.filename(row, absolute=True) for row in range(len(photos))]
    trained = sum(Path(file).parts[-3] == "train" for file in files)
    found[split] = len(files), len(photos.reader.class_to_idx), trained
    print("{}: {} images, {} classes, {} of them from train".format(split, *found[split]))
assert found == {"train": (12, 2, 12), "validation": (4, 2, 0), "test": (16, 2, 12)}
PYTHON
