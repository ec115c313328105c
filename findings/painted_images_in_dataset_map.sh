#!/usr/bin/env bash
# datasets 5.2.0 (Hugging Face), Dataset.map (datasets/features/image.py, encode_pil_image).
#
# Expected: what a function that is mapped over a data set does to an image is in the new data set,
# whether it returns a new image or changes the one it got.
# Seen: of images from files, changes in place are lost: a thumbnail keeps its old size, a painted
# box is not there. An image that still knows its file name is stored as that name, and read from
# the file again. The same function on the same images as bytes, the form of the Hub's data sets,
# works; so does with_transform. No error, no warning.
# A photo of 64 x 48 pixels, black, from a folder and as bytes:
#   thumbnail in place: (64, 48) and (16, 12)
#   white box in place: 0 and 255
#   resize, a new image: (16, 12) and (16, 12)
# Why it matters here: image.thumbnail is the usual way to shrink a data set once, before training,
# and ImageDraw the usual way to cover a bird's head or its background and see whether the classifier
# minds. It never does: the images are the old ones. Return image.copy() or a new image.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$folder"
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from PIL import ImageDraw

photo = Path("photos", "wren", "1.png")
photo.parent.mkdir(parents=True)
PILImage.new("RGB", (64, 48)).save(photo)
files = load_dataset("imagefolder", data_dir="photos", split="train")
rows = {"image": [{"bytes": photo.read_bytes(), "path": None}]}
in_bytes = Dataset.from_dict(rows).cast_column("image", Image())


def thumbnail(row):
    row["image"].thumbnail((16, 16))
    return row


def white_box(row):
    ImageDraw.Draw(row["image"]).rectangle((0, 0, 31, 47), fill="white")
    return row


def resized(row):
    return {"image": row["image"].resize((16, 12))}


def mapped(function):
    """Size and first value of the photo after a map, from a folder and as bytes."""
    images = [photos.map(function)[0]["image"] for photos in (files, in_bytes)]
    return [(image.size, image.getpixel((0, 0))[0]) for image in images]


(small, _), (small_in_bytes, _) = mapped(thumbnail)
(_, painted), (_, painted_in_bytes) = mapped(white_box)
(new, _), (new_in_bytes, _) = mapped(resized)
print("thumbnail in place:", small, "and", small_in_bytes)
print("white box in place:", painted, "and", painted_in_bytes)
print("resize, a new image:", new, "and", new_in_bytes)
assert small == (64, 48) and small_in_bytes == new == new_in_bytes == (16, 12)
assert painted == 0 and painted_in_bytes == 255
PYTHON
