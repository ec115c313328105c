#!/usr/bin/env bash
# datasets 5.2.0 (Hugging Face), load_dataset("imagefolder", data_dir=...), datasets/data_files.py.
#
# Expected: a folder with one folder per class, bus, car and train, is one split of nine images with
# three classes, as it is for bus, car and tram.
# Seen: the class folder named train is taken for a split. Its three images are loaded, without a
# label; the six images of the other two classes are left out. No error, no warning. The same
# happens to classes named training, test, testing, dev, val, valid, validation, eval or evaluation,
# and to names that begin or end with such a word and a separator, such as "freight train".
# Why it matters here: train is a class of data sets of vehicles (CIFAR-100 has it). A model that is
# trained on what remains sees one class and reports 100 %.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$folder"
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

from datasets import load_dataset
from PIL import Image


def load(name, classes):
    """Splits of a folder with three images per class: number of images, names of classes."""
    for number, class_name in enumerate(classes):
        Path(name, class_name).mkdir(parents=True)
        for shade in range(3):
            image = Image.new("RGB", (32, 24), (80 * number, 50 * shade, 9))
            image.save(Path(name, class_name, f"{shade}.png"))
    splits = load_dataset("imagefolder", data_dir=name)
    labels = {split: rows.features.get("label") for split, rows in splits.items()}
    return {split: (len(splits[split]), label and label.names) for split, label in labels.items()}


tram = load("tram", ["bus", "car", "tram"])
train = load("train", ["bus", "car", "train"])
freight = load("freight", ["bus", "car", "freight train"])
print("classes bus, car, tram:", tram)
print("classes bus, car, train:", train)
print("classes bus, car, freight train:", freight)
assert tram == {"train": (9, ["bus", "car", "tram"])}
assert train == {"train": (3, None)}
assert freight == {"train": (3, None)}
PYTHON
