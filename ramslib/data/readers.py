"""The official data sets of the field, each read from its own annotation files; nothing decoded.

Every reader takes the folder of the official archive (or the one above it) and gives the table that
`annotations` describes. Class names are those of the files, labels follow the files' class order.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from ramslib.data.annotations import (
    Annotations,
    file_errors,
    find_root,
    locate_id,
    read_by_id,
    read_mat,
    read_rows,
    read_text,
    table_reader,
)
from ramslib.errors import InputError


@table_reader
def read_cub(root: Path) -> Annotations:
    """CUB-200-2011, or any data set written in its layout; bounding_boxes.txt may be absent."""
    home = find_root(root, "images.txt", "CUB_200_2011")
    names = read_by_id(f"{home}/classes.txt", name=str)
    return _read_text_layout(home, names, names)


@table_reader
def read_nabirds(root: Path) -> Annotations:
    """NABirds; labels follow the class ids in use (555 leaves of a hierarchy of 1,011 nodes)."""
    home = find_root(root, "images.txt", "nabirds")
    names = read_by_id(f"{home}/classes.txt", name=str)
    used = read_by_id(f"{home}/image_class_labels.txt", class_id=str).values()
    return _read_text_layout(home, names, set(used))


def _read_text_layout(home: str, names: dict[str, str], used: Collection[str]) -> Annotations:
    """The text files that CUB-200-2011 and NABirds share, and the latter's image sizes."""
    classes = sorted(names.keys() & used, key=lambda key: (len(key), key))  # 2 before 10
    rank = {key: label for label, key in enumerate(classes)}
    images = read_by_id(f"{home}/images.txt", path=str)
    labels = read_by_id(f"{home}/image_class_labels.txt", images, class_id=rank.__getitem__)
    kinds = {"1": "train", "0": "test"}
    splits = read_by_id(f"{home}/train_test_split.txt", images, is_train=kinds.__getitem__)
    boxes, sizes, file = None, None, f"{home}/bounding_boxes.txt"
    if os.path.exists(file):
        found = read_by_id(file, images, x=float, y=float, width=float, height=float)
        x, y, width, height = np.array([found[key] for key in images]).T
        boxes = np.column_stack([y, x, y + height, x + width])
    if os.path.exists(f"{home}/sizes.txt"):
        found = read_by_id(f"{home}/sizes.txt", images, width=float, height=float)
        sizes = np.array([found[key][::-1] for key in images])
    return Annotations(
        home,
        [names[key] for key in classes],
        [f"{home}/images/{path}" for path in images.values()],
        [labels[key] for key in images],
        [splits[key] for key in images],
        boxes,
        sizes,
        lambda row: locate_id(file, list(images)[row]),
    )


PART_COLUMNS = ["path", "part", "y", "x"]


def read_parts(root: Path) -> pd.DataFrame:
    """Visible parts in the CUB (or NABirds) layout: `PART_COLUMNS`, y and x in pixels.

    A layout without the folder ``parts`` has none: no rows.
    """
    home = find_root(root, "images.txt", "CUB_200_2011", "nabirds")
    if not os.path.isdir(f"{home}/parts"):
        return pd.DataFrame(columns=PART_COLUMNS)
    images = read_by_id(f"{home}/images.txt", path=str)
    names = read_by_id(f"{home}/parts/parts.txt", name=str)
    rows = read_rows(
        f"{home}/parts/part_locs.txt",
        image_id={key: f"{home}/images/{path}" for key, path in images.items()}.__getitem__,
        part_id=names.__getitem__,
        x=float,
        y=float,
        visible=int,
    )
    visible = [(path, part, y, x) for _, (path, part, x, y, is_visible) in rows if is_visible]
    return pd.DataFrame(visible, columns=PART_COLUMNS)


def read_hierarchy(root: Path) -> pd.DataFrame:
    """The tree of NABirds' classes: columns class_name, parent; a row per node but the root."""
    home = find_root(root, "hierarchy.txt", "nabirds")
    name = read_by_id(f"{home}/classes.txt", name=str).__getitem__
    rows = read_rows(f"{home}/hierarchy.txt", class_id=name, parent_id=name)
    return pd.DataFrame([row for _, row in rows], columns=["class_name", "parent"])


@table_reader
def read_cars(root: Path, unlabeled: bool = False) -> Annotations:
    """Stanford Cars: devkit, cars_train, cars_test, cars_test_annos_withlabels.mat.

    The devkit's own cars_test_annos.mat has no classes. With ``unlabeled=True`` it will do, and
    the test images get label -1: good for predicting, not for scoring.
    """
    home = find_root(root, "devkit/cars_train_annos.mat", "stanford_cars")
    names = read_mat(f"{home}/devkit/cars_meta.mat", "class_names", str).tolist()
    labeled = "cars_test_annos_withlabels.mat"
    tests = [
        f"{home}/{labeled}",
        f"{home}/devkit/{labeled}",
        f"{home}/devkit/cars_test_annos.mat",
    ]
    test = next((file for file in tests if os.path.exists(file)), tests[0])
    paths, labels, splits, boxes, places = [], [], [], [], []
    for split, file in (("train", f"{home}/devkit/cars_train_annos.mat"), ("test", test)):
        records = read_mat(file, "annotations")
        with file_errors(file):
            corners = [records[f"bbox_{side}"].astype(float) for side in ("y1", "x1", "y2", "x2")]
            paths += [f"{home}/cars_{split}/{name}" for name in records["fname"]]
        if "class" in records.dtype.names:
            labels += _labels(file, records["class"], names)
        elif split == "test" and unlabeled:
            labels += [-1] * len(records)
        else:
            raise InputError(
                f"{file}: {len(records):,} {split} images without a class; put the separate "
                f"official file {labeled} into {home}, or pass unlabeled=True"
            )
        boxes.append(np.column_stack(corners) - [1, 1, 0, 0])  # pixels from 1, ends inclusive
        splits += [split] * len(records)
        places += [f"{file}: entry {row + 1}" for row in range(len(records))]
    boxes = np.concatenate(boxes)
    return Annotations(home, names, paths, labels, splits, boxes, None, places.__getitem__)


def _labels(file: str, class_ids: np.ndarray, names: Collection[str]) -> list[int]:
    """Class ids from 1 as labels from 0."""
    with file_errors(file):
        labels = class_ids.astype(int) - 1
    if labels.size and not (0 <= labels.min() and labels.max() < len(names)):
        raise InputError(
            f"{file}: class ids from {labels.min() + 1} to {labels.max() + 1} where there are "
            f"{len(names)} class names; fetch this file again"
        )
    return labels.tolist()


@table_reader
def read_dogs(root: Path, boxes: bool = True) -> Annotations:
    """Stanford Dogs: train_list.mat, test_list.mat, Images, and Annotation where it is there.

    Boxes lie in one small file per image (20,580 in all), which ``boxes=False`` leaves alone; where
    an image has several dogs, the largest box counts.
    """
    home = find_root(root, "train_list.mat", "stanford_dogs")
    images, class_ids, splits = [], [], []
    for split in ("train", "test"):
        file = f"{home}/{split}_list.mat"
        images += read_mat(file, "file_list", str).tolist()
        class_ids += read_mat(file, "labels", int).tolist()
        splits += [split] * (len(images) - len(splits))
        if len(images) != len(class_ids):
            raise InputError(f"{file}: file_list and labels differ in length; fetch it again")
    folders = dict(zip(class_ids, map(os.path.dirname, images), strict=True))
    names = [folders[class_id] for class_id in sorted(folders)]
    labels = _labels(file, np.array(class_ids), names)
    files = [f"{home}/Annotation/{os.path.splitext(name)[0]}" for name in images]
    found, sizes = None, None
    if boxes and os.path.isdir(f"{home}/Annotation"):
        found, sizes = map(np.array, zip(*map(_read_dog, files), strict=True))
    paths = [f"{home}/Images/{name}" for name in images]
    return Annotations(home, names, paths, labels, splits, found, sizes, files.__getitem__)


def _read_dog(file: str) -> tuple[list[float], list[float]]:
    """The largest box (top, left, bottom, right) and the image size (height, width) of one file."""
    values: dict[str, list[float]] = {}
    for tag, number in re.findall(r"<(width|height|[xy]m(?:in|ax))>\s*(-?\d+)", read_text(file)):
        values.setdefault(tag, []).append(float(number))
    with file_errors(file):
        corners = [values[tag] for tag in ("ymin", "xmin", "ymax", "xmax")]
        boxes = [[y1 - 1, x1 - 1, y2, x2] for y1, x1, y2, x2 in zip(*corners, strict=True)]
        largest = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        return largest, [values["height"][0], values["width"][0]]


@table_reader
def read_inaturalist(root: Path, year: int = 2017) -> Annotations:
    """iNaturalist: train2017.json, val2017.json, train_val_images; image and label paired by id.

    Its test labels are unpublished: its validation images are the test split here, as in papers.
    """
    home = find_root(root, f"train{year}.json")
    names, paths, labels, splits = [], [], [], []
    for split, file in (("train", f"{home}/train{year}.json"), ("test", f"{home}/val{year}.json")):
        with file_errors(file):
            content = json.loads(read_text(file))
            categories = {item["id"]: item["name"] for item in content["categories"]}
            images = {item["id"]: item["file_name"] for item in content["images"]}
            pairs = {item["image_id"]: item["category_id"] for item in content["annotations"]}
            counts = len(content["images"]), len(content["annotations"])
        rank = {key: label for label, key in enumerate(sorted(categories))}
        if counts != (len(images), len(pairs)) or images.keys() != pairs.keys():
            raise InputError(
                f"{file}: {counts[0]:,} images and {counts[1]:,} annotations do not pair one to "
                "one by id; fetch this file again"
            )
        names = names or [categories[key] for key in rank]
        if not rank.keys() >= set(pairs.values()) or names != [categories[key] for key in rank]:
            raise InputError(f"{file}: its categories are not those of training; fetch it again")
        paths += [f"{home}/{name}" for name in images.values()]
        labels += [rank[pairs[key]] for key in images]
        splits += [split] * len(images)
    return Annotations(home, names, paths, labels, splits)


@table_reader
def read_aircraft(root: Path) -> Annotations:
    """FGVC-Aircraft: 100 variants, its own train, val and test lists, images_box.txt."""
    home = find_root(root, "variants.txt", "data", "fgvc-aircraft-2013b/data")
    names = [name for _, (name,) in read_rows(f"{home}/variants.txt", variant=str)]
    rank = {name: label for label, name in enumerate(names)}
    keys, labels, splits = [], [], []
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        found = read_by_id(f"{home}/images_variant_{name}.txt", variant=rank.__getitem__)
        keys += found
        labels += found.values()
        splits += [split] * len(found)
    file, known = f"{home}/images_box.txt", dict.fromkeys(keys)
    found = read_by_id(file, known, xmin=float, ymin=float, xmax=float, ymax=float)
    left, top, right, bottom = np.array([found[key] for key in keys]).T
    boxes = np.column_stack([top - 1, left - 1, bottom, right])  # pixels from 1, ends inclusive
    paths = [f"{home}/images/{key}.jpg" for key in keys]
    return Annotations(
        home, names, paths, labels, splits, boxes, None, lambda row: locate_id(file, keys[row])
    )


@table_reader
def read_flowers(root: Path) -> Annotations:
    """Oxford Flowers-102: imagelabels.mat, setid.mat, jpg; class names are torchvision's."""
    from torchvision.datasets import Flowers102  # here: importing torch takes seconds

    home = find_root(root, "imagelabels.mat", "flowers-102")
    file, numbers, splits = f"{home}/setid.mat", [], []
    for split, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        numbers += read_mat(file, key, int).tolist()
        splits += [split] * (len(numbers) - len(splits))
    class_ids = read_mat(f"{home}/imagelabels.mat", "labels", int)
    if not numbers or min(numbers) < 1 or max(numbers) > len(class_ids):
        raise InputError(f"{file}: images beyond the {len(class_ids):,} labeled; fetch it again")
    labels = _labels(f"{home}/imagelabels.mat", class_ids, Flowers102.classes)
    paths = [f"{home}/jpg/image_{number:05d}.jpg" for number in numbers]
    labels = [labels[number - 1] for number in numbers]
    return Annotations(home, Flowers102.classes, paths, labels, splits)


@table_reader
def read_pets(root: Path) -> Annotations:
    """Oxford-IIIT Pets: annotations/trainval.txt, test.txt, images. It boxes heads: unread."""
    home = find_root(root, "annotations/trainval.txt", "oxford-iiit-pet")
    images, class_ids, splits = [], [], []
    for split, name in (("train", "trainval"), ("test", "test")):
        file = f"{home}/annotations/{name}.txt"
        found = read_by_id(file, class_id=int, species=int, breed_id=int)
        images += found
        class_ids += [class_id for class_id, _, _ in found.values()]
        splits += [split] * len(found)
    breeds = dict(zip(class_ids, (key.rpartition("_")[0] for key in images), strict=True))
    names = [breeds[class_id] for class_id in sorted(breeds)]
    labels = _labels(file, np.array(class_ids), names)
    paths = [f"{home}/images/{key}.jpg" for key in images]
    return Annotations(home, names, paths, labels, splits)
