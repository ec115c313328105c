#!/usr/bin/env bash
# supervision 0.31.2, DetectionDataset.from_pascal_voc, and as_yolo.
#
# Expected: two splits of the same classes have the same class numbers, as they have when they are read
# from COCO or YOLO, whose files say the numbers.
# Seen: classes are numbered in the order in which the files of a split, sorted by name, first name
# them; those of another split are numbered by its own files. as_yolo writes these numbers, and the
# class list of each split into a file of its own. No warning.
# Three photos per split, each with one box; number of each class:
#   train: dunnock 0, wren 1, robin 2
#   test: robin 0, dunnock 1, wren 2
#   test as YOLO labels, read with the class list of train: 0 of 3 right
# Why it matters here: annotations of Stanford Dogs and of most labeling tools are in this format. A
# detector of heads or cars scores near zero on a test set that one library read, or, if most classes
# happen to agree, merely too low. Map class numbers by name, split by split.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  supervision==0.31.2 numpy==2.4.6 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from pathlib import Path

from PIL import Image
from supervision import DetectionDataset

SPLITS = {"train": ["dunnock", "wren", "robin"], "test": ["robin", "dunnock", "wren"]}
ANNOTATION = """<annotation><filename>{number}.png</filename>
<size><width>50</width><height>40</height><depth>3</depth></size>
<object><name>{name}</name>
<bndbox><xmin>4</xmin><ymin>6</ymin><xmax>20</xmax><ymax>21</ymax></bndbox></object>
</annotation>"""
numbers, labels = {}, {}
for split, names in SPLITS.items():
    Path(split).mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (50, 40)).save(f"{split}/{number}.png")
        Path(split, f"{number}.xml").write_text(ANNOTATION.format(number=number, name=name))
    photos = DetectionDataset.from_pascal_voc(split, split)
    numbers[split] = {name: photos.classes.index(name) for name in names}
    print(f"{split}:", ", ".join(f"{name} {number}" for name, number in numbers[split].items()))
    photos.as_yolo(annotations_directory_path=f"yolo/{split}", data_yaml_path=f"{split}.yaml")
    files = (Path(f"yolo/{split}/{row}.txt") for row in range(len(names)))
    labels[split] = [int(file.read_text().split()[0]) for file in files]
right = sum(numbers["train"][name] == label for name, label in zip(SPLITS["test"], labels["test"]))
print(f"test as YOLO labels, read with the class list of train: {right} of 3 right")
assert numbers["train"] == {"dunnock": 0, "wren": 1, "robin": 2}
assert numbers["test"] == {"robin": 0, "dunnock": 1, "wren": 2} and right == 0
PYTHON
