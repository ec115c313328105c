"""Datasets that files describe: lists of one's own, the field's official ones; nothing is decoded.

Every reader takes the folder of the official archive (or the one above it) and returns a row per
image, which `annotations.complete_table` checks and completes: class names are those of the files,
labels their class ids. Whether the image files exist is checked by `datasets.read_table`.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ramslib.data.annotations import (
    BOX_COLUMNS,
    LISTS,
    SIZE_COLUMNS,
    SPLIT_WORDS,
    clip_boxes,
    find_root,
    list_folder,
    read_by_id,
    read_columns,
    read_mat,
    read_rows,
    read_text,
)
from ramslib.errors import InputError, file_errors, shorten

PART_COLUMNS = ["path", "part", "y", "x"]
TEXT_LAYOUTS = "CUB_200_2011", "nabirds"  # folders in archives


def read_cub(root: Path | str) -> pd.DataFrame:
    """CUB-200-2011, or any dataset written in its layout; bounding_boxes.txt may be absent.

    NABirds is one, with image sizes; its classes are those that images have (555 leaves of a
    hierarchy of 1,011).
    """
    root = find_root(root, "images.txt", *TEXT_LAYOUTS)
    names = read_by_id(f"{root}/classes.txt", name=str)["name"]
    names = names[sorted(names.index, key=lambda key: (len(key), key))]
    table = read_by_id(f"{root}/images.txt", path=str)
    table["path"], ids = f"{root}/images/" + table["path"], table.index
    rank = {key: label for label, key in enumerate(names.index)}.__getitem__
    table["label"] = read_by_id(f"{root}/image_class_labels.txt", ids, class_id=rank)
    table["class_name"] = names.iloc[table["label"]].to_numpy()
    kinds = {"1": "train", "0": "test"}.__getitem__
    table["split"] = read_by_id(f"{root}/train_test_split.txt", ids, is_train=kinds)
    if os.path.exists(file := f"{root}/sizes.txt"):
        table[SIZE_COLUMNS[::-1]] = read_by_id(file, ids, width=float, height=float)
    if os.path.exists(file := f"{root}/bounding_boxes.txt"):
        found = read_by_id(file, ids, x=float, y=float, width=float, height=float)
        x, y, width, height = found.to_numpy().T
        boxes = np.column_stack([y, x, y + height, x + width])
        limits = table.reindex(columns=SIZE_COLUMNS, fill_value=np.inf).to_numpy()
        table[BOX_COLUMNS] = clip_boxes(boxes, f"{file}: id " + ids, limits)
    table.index = f"{root}/images.txt: id " + ids
    return table


def read_parts(root: Path | str) -> pd.DataFrame:
    """Visible parts in the CUB (or NABirds) layout: `PART_COLUMNS`, y and x in pixels.

    A layout without the folder ``parts`` has none: no rows.
    """
    root = find_root(root, "images.txt", *TEXT_LAYOUTS)
    if not os.path.isdir(f"{root}/parts"):
        return pd.DataFrame(columns=PART_COLUMNS)
    images = read_by_id(f"{root}/images.txt", path=str)["path"]
    path = (f"{root}/images/" + images).to_dict().__getitem__
    part = read_by_id(f"{root}/parts/parts.txt", name=str)["name"].to_dict().__getitem__
    file = f"{root}/parts/part_locs.txt"
    rows = read_rows(file, image_id=path, part_id=part, x=float, y=float, visible=int)
    visible = [(path, part, y, x) for _, (path, part, x, y, is_visible) in rows if is_visible]
    return pd.DataFrame(visible, columns=PART_COLUMNS)


def read_cars(root: Path | str) -> pd.DataFrame:
    """Stanford Cars: devkit, cars_train, cars_test, cars_test_annos_withlabels.mat.

    The devkit's own cars_test_annos.mat has no classes and will not do.
    """
    root = find_root(root, "devkit/cars_train_annos.mat", "stanford_cars")
    names = dict(enumerate(read_mat(f"{root}/devkit/cars_meta.mat", "class_names", str), 1))
    labeled = "cars_test_annos_withlabels.mat"
    tests = (labeled, f"devkit/{labeled}", "devkit/cars_test_annos.mat")
    test = next((name for name in tests if os.path.exists(f"{root}/{name}")), labeled)
    tables = []
    for split, name in (("train", "devkit/cars_train_annos.mat"), ("test", test)):
        file = f"{root}/{name}"
        records = read_mat(file, "annotations")
        with file_errors(file):
            table = pd.DataFrame({key: records[key] for key in records.dtype.names})
            corners = table[["bbox_y1", "bbox_x1", "bbox_y2", "bbox_x2"]].to_numpy(float)
            table[BOX_COLUMNS] = corners - [1, 1, 0, 0]  # pixels from 1, ends inclusive
        if "class" not in table:
            raise InputError(
                f"{file}: {len(table):,} {split} images without a class; put the separate "
                f"official file {labeled} into {root}"
            )
        table["class_name"] = table["class"].map(names)
        table["path"], table["split"] = f"{root}/cars_{split}/" + table["fname"], split
        tables.append(table.set_index(f"{file}: entry " + (table.index + 1).astype(str)))
    return pd.concat(tables).rename(columns={"class": "label"})


def read_dogs(root: Path | str) -> pd.DataFrame:
    """Stanford Dogs: train_list.mat, test_list.mat, Images, and Annotation where it exists.

    Boxes lie in one small file per image (20,580 in all); of several dogs, the largest box counts.
    """
    root = find_root(root, "train_list.mat", "stanford_dogs")
    lists = {}
    for split in ("train", "test"):
        with file_errors(file := f"{root}/{split}_list.mat"):
            images = read_mat(file, "file_list", str)
            lists[split] = pd.DataFrame({"label": read_mat(file, "labels", int)}, images)
    table = _join(lists)
    table["class_name"] = table["key"].map(os.path.dirname)
    table["path"] = f"{root}/Images/" + table["key"]
    if os.path.isdir(f"{root}/Annotation"):
        table.index = [f"{root}/Annotation/{os.path.splitext(name)[0]}" for name in table["key"]]
        table[BOX_COLUMNS + SIZE_COLUMNS] = list(map(_read_dog, table.index))
    return table


def _join(lists: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One table of the list of each split, with the columns split and key, the list's index."""
    return pd.concat(lists, names=["split", "key"]).reset_index()


def _read_dog(file: str) -> list[float]:
    """The largest box (top, left, bottom, right) and the image size (height, width) of one file."""
    values: dict[str, list[float]] = {}
    for tag, number in re.findall(r"<(width|height|[xy]m(?:in|ax))>\s*(-?\d+)", read_text(file)):
        values.setdefault(tag, []).append(float(number))
    with file_errors(file):
        corners = [values[tag] for tag in ("ymin", "xmin", "ymax", "xmax")]
        boxes = [[y1 - 1, x1 - 1, y2, x2] for y1, x1, y2, x2 in zip(*corners, strict=True)]
        largest = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        return [*largest, values["height"][0], values["width"][0]]


def read_inaturalist(root: Path | str, year: int = 2017) -> pd.DataFrame:
    """iNaturalist of a year: train2017.json, val2017.json (2021: train.json, val.json) and images.

    Its test labels are unpublished: its validation images are the test split here, as in papers.
    """
    ending = ".json" if year == 2021 else f"{year}.json"
    root = find_root(root, f"train{ending}")
    files = {"train": f"{root}/train{ending}", "test": f"{root}/val{ending}"}
    table = pd.concat([_read_json(file).assign(split=split) for split, file in files.items()])
    table["label"] = table["category_id"]  # class names are taxa: not all of them differ
    return table.rename(columns={"file_name": "path"})


def _read_json(file: str) -> pd.DataFrame:
    """Images of a COCO file with category and box, paired by id.

    Where there are boxes, the object of the largest counts, and images without one are left out.
    """
    ids = {"left_on": "id", "right_on": "image_id", "validate": "one_to_one"}
    with file_errors(file):
        content = json.loads(read_text(file))
        images, labels = (pd.DataFrame(content[name]) for name in ("images", "annotations"))
        names = pd.DataFrame(content["categories"]).set_index("id")["name"]
        if "bbox" in labels:
            listed = [box if isinstance(box, list) else [] for box in labels["bbox"]]
            sides = [[*box, np.nan, np.nan, np.nan, np.nan][:4] for box in listed]
            left, top, width, height = np.array(sides, float).T
            labels[BOX_COLUMNS] = np.column_stack([top, left, top + height, left + width])
            labels = labels.iloc[np.argsort(np.nan_to_num(width * height), kind="stable")]
            labels = labels.drop_duplicates("image_id", keep="last")
            images = images[images["id"].isin(labels["image_id"])]
        labels = labels.reindex(columns=["image_id", "category_id", *BOX_COLUMNS])
        table = images[["id", "file_name"]].merge(labels, "outer", **ids)
        table["class_name"] = table["category_id"].map(names)
    if table[["file_name", "class_name"]].isna().any(axis=None):
        raise InputError(
            f"{file}: {len(images):,} images, {len(labels):,} annotations and their categories "
            "do not pair one to one by id; download this file again"
        )
    return table.set_index(f"{file}: image " + table["id"].astype(str))


def read_coco(root: Path | str) -> pd.DataFrame:
    """COCO's JSON files, here, in ``annotations`` or in a folder per split.

    Splits are read from the names of files and folders, such as ``instances_train2017.json`` or
    ``valid/_annotations.coco.json``. Of several objects in an image, the largest counts.
    """
    files = sorted(Path(root).glob("*.json")) + sorted(Path(root).glob("*/*.json"))
    files = [file for file in files if "instances" in file.name] or files
    if not files:
        raise InputError(f"{root}: no JSON file here; give the folder that holds it")
    tables = []
    for file in files:
        table = _read_json(str(file))
        words = re.findall("[a-z]+", f"{file.parent.name} {file.stem}".lower())
        table["split"] = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
        name, first = file.stem.rpartition("_")[2], table["file_name"].iloc[0]
        places = [file.parent, *(Path(root, sub) for sub in ("", name, "images", f"images/{name}"))]
        place = next((place for place in places if (place / first).exists()), root)
        tables.append(table.assign(path=f"{place}/" + table["file_name"]))
    return pd.concat(tables)


def read_csv(root: Path | str) -> pd.DataFrame:
    """Photos listed in ``labels.csv``, or in the only CSV or TSV file here, a line per photo.

    Its first line names the columns: path (from here) and class, if known also split, group (of
    images that stay in one split) and top, left, bottom, right; others are ignored.
    """
    files = [e for e in list_folder(str(root)) if e.name.lower().endswith((".csv", ".tsv"))]
    files = [entry.path for entry in files if entry.name not in LISTS.values()]
    files = [file for file in files if Path(file).stem.lower() == "labels"] or files
    if len(files) != 1:
        found = shorten([os.path.basename(file) for file in files]) or "none"
        raise InputError(f"{root}: CSV files here: {found}; name that of the labels labels.csv")
    table = read_columns(files[0], "path", "class")[0].rename(columns={"class": "class_name"})
    table["path"] = table["path"].str.replace("\\", "/")
    return table.replace("", np.nan)


def read_aircraft(root: Path | str) -> pd.DataFrame:
    """FGVC-Aircraft: 100 variants, its own train, val and test lists, images_box.txt."""
    root = find_root(root, "variants.txt", "data", "fgvc-aircraft-2013b/data")
    names = [name for _, (name,) in read_rows(f"{root}/variants.txt", variant=str)]
    rank = {name: label for label, name in enumerate(names)}.__getitem__
    lists = {name: f"{root}/images_variant_{name}.txt" for name in ("train", "val", "test")}
    table = _join({name: read_by_id(file, label=rank) for name, file in lists.items()})
    table["class_name"] = table["label"].map(dict(enumerate(names)))
    table["path"] = f"{root}/images/" + table["key"] + ".jpg"
    corners = dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), float)
    found = read_by_id(f"{root}/images_box.txt", pd.Index(table["key"]).unique(), **corners)
    left, top, right, bottom = found.loc[table["key"]].to_numpy().T
    # pixels are numbered from 1, ends included
    table[BOX_COLUMNS] = np.column_stack([top - 1, left - 1, bottom, right])
    return table


def read_flowers(root: Path | str) -> pd.DataFrame:
    """Oxford Flowers-102: imagelabels.mat, setid.mat, jpg; class names are torchvision's."""
    from torchvision.datasets import Flowers102  # here: importing torch takes seconds

    root = find_root(root, "imagelabels.mat", "flowers-102")
    file, keys = f"{root}/setid.mat", {"train": "trnid", "val": "valid", "test": "tstid"}
    numbers = {split: pd.Series(read_mat(file, key, int)) for split, key in keys.items()}
    table = pd.concat(numbers, names=["split"]).reset_index("split", name="number")
    table["path"] = [f"{root}/jpg/image_{number:05d}.jpg" for number in table["number"]]
    class_ids = read_mat(f"{root}/imagelabels.mat", "labels", int)
    table["label"] = table["number"].map(dict(enumerate(class_ids, 1)))
    table["class_name"] = table["label"].map(dict(enumerate(Flowers102.classes, 1)))
    return table.set_index(f"{file}: image " + table["number"].astype(str))


def read_pets(root: Path | str) -> pd.DataFrame:
    """Oxford-IIIT Pets: annotations/trainval.txt, test.txt, images. It boxes heads: not read."""
    root = find_root(root, "annotations/trainval.txt", "oxford-iiit-pet")
    columns = {"label": int, "species": int, "breed_id": int}
    files = {"train": f"{root}/annotations/trainval.txt", "test": f"{root}/annotations/test.txt"}
    table = _join({split: read_by_id(file, **columns) for split, file in files.items()})
    table["class_name"] = table["key"].str.rpartition("_")[0]
    table["path"] = f"{root}/images/" + table["key"] + ".jpg"
    return table


READERS = {
    "csv": read_csv,
    "coco": read_coco,
    "cub": read_cub,
    "cars": read_cars,
    "dogs": read_dogs,
    "nabirds": read_cub,
    "inaturalist": read_inaturalist,
    "aircraft": read_aircraft,
    "flowers": read_flowers,
    "pets": read_pets,
}
