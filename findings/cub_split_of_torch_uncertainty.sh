#!/usr/bin/env bash
# torch-uncertainty 0.13.0, torch_uncertainty.datasets.classification.CUB.
#
# Expected: the training images are those that train_test_split.txt names, and each image has its own
# attributes.
# Seen: the images are those of an ImageFolder, sorted by name; the lines of train_test_split.txt and
# image_attribute_labels.txt are taken in their order, which is by image number. Within a class,
# images.txt is not sorted, so each line meets another image of that class. No warning.
# Six images of one class, named as in CUB; each has one attribute, its own number:
#   official: training images 2, 4, 5, test images 1, 3, 6
#   train=True: images 2, 4, 5 wanted; 2, 1, 4 found, with the attributes of 2, 4, 5
#   train=False: images 1, 3, 6 wanted; 3, 5, 6 found, with the attributes of 1, 3, 6
# Why it matters here: CUB is the most used set of fine-grained classes. Numbers on this split are not
# those of papers; weights trained on the official one have seen some of these test images. Birds are
# described by the attributes of others of their kind, also in concept bottlenecks. Pair by the image
# number, as ramslib does.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  "torch-uncertainty[cpu]==0.13.0" torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from pathlib import Path

from PIL import Image
from torch_uncertainty.datasets.classification import CUB

KIND, ATTRIBUTES = "Black_footed_Albatross", 312
NAMES = ["0046_18", "0009_34", "0002_55", "0074_59", "0014_89", "0085_92"]
IS_TRAINING = [False, True, False, True, True, False]


class SmallCUB(CUB):
    """CUB without the checksum of its archive, which a few images of the layout cannot have."""

    def _check_integrity(self):
        return True


def write(file, rows):
    """A text file of numbered rows."""
    lines = (f"{number} {row}\n" for number, row in enumerate(rows, 1))
    Path(file).write_text("".join(lines))


names = [f"001.{KIND}/{KIND}_{name}.png" for name in NAMES]
Path("CUB_200_2011/attributes").mkdir(parents=True)
for number, name in enumerate(names, 1):
    Path("CUB_200_2011/images", name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number, 0, 0)).save(f"CUB_200_2011/images/{name}")
write("CUB_200_2011/images.txt", names)
write("CUB_200_2011/train_test_split.txt", map(int, IS_TRAINING))
write("CUB_200_2011/classes.txt", [f"001.{KIND}"])
write("attributes.txt", (f"has_mark::{attribute}" for attribute in range(1, ATTRIBUTES + 1)))
with open("CUB_200_2011/attributes/image_attribute_labels.txt", "w") as file:
    for image in range(1, len(names) + 1):
        for attribute in range(1, ATTRIBUTES + 1):
            file.write(f"{image} {attribute} {int(attribute == image)} 4 1.0\n")

official = {True: [], False: []}
for number, is_training in enumerate(IS_TRAINING, 1):
    official[is_training].append(number)
text = {is_training: ", ".join(map(str, numbers)) for is_training, numbers in official.items()}
print(f"official: training images {text[True]}, test images {text[False]}")
found = {}
for train, wanted in text.items():
    photos = SmallCUB(".", train=train)
    images = [photos[row][0].getpixel((0, 0))[0] for row in range(len(photos))]
    described = (photos.attributes.argmax(dim=1) + 1).tolist()
    print(f"train={train}: images {wanted} wanted; {', '.join(map(str, images))} found,", end=" ")
    print("with the attributes of", ", ".join(map(str, described)))
    found[train] = images, described
assert found == {True: ([2, 1, 4], [2, 4, 5]), False: ([3, 5, 6], [1, 3, 6])}
PYTHON
