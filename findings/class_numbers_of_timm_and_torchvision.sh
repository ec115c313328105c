#!/usr/bin/env bash
# timm 1.0.31, create_dataset("folder", ...) (timm/data/readers/reader_image_folder.py), beside
# torchvision 0.29.1, ImageFolder.
#
# Expected: both number the classes of one folder alike, by the sorted names of its folders.
# Seen: they do not. torchvision sorts by code point: 1, 10, 2, Zebra, ant. timm sorts by the numbers
# inside of names and without regard to case: 1, 2, 10, ant, Zebra. Neither writes the order into a
# checkpoint.
# Why it matters here: folders named 1 to 102 are the usual form of the Oxford flowers. A model that
# one of the two trained, evaluated on the folder as the other reads it, has most of its classes
# exchanged: its accuracy is near chance although nothing fails. Keep the list of class names with
# the weights, as ramslib's runs do; compare by names, not by numbers.
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
from torchvision.datasets import ImageFolder

for name in ("1", "2", "10", "Zebra", "ant"):
    Path("photos", name).mkdir(parents=True)
    Image.new("RGB", (32, 24)).save(f"photos/{name}/1.png")
timms = create_dataset("folder", "photos").reader.class_to_idx
torchvisions = ImageFolder("photos").class_to_idx
print("timm:", timms)
print("torchvision:", torchvisions)
assert list(timms) == ["1", "2", "10", "ant", "Zebra"]
assert list(torchvisions) == ["1", "10", "2", "Zebra", "ant"]
PYTHON
