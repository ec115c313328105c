"""Readers against their own layouts, torchvision's readers and hand-made mistakes."""

import hashlib
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from ramslib.data import annotations, datasets, readers
from ramslib.data.datasets import fingerprint, read_folder, read_table
from ramslib.data.summary import describe, describe_boxes, describe_parts, load_parts
from ramslib.errors import InputError

BOX_COLUMNS = annotations.BOX_COLUMNS


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_image(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def write_cub(root, classes=("001.Crow", "002.Wren"), train=4, test=2, images=True):
    """A data set in the CUB layout: ids from 1, boxes (1, 2, 3, 4) as x, y, width, height."""
    lists = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    number = 0
    for class_id, name in enumerate(classes, 1):
        for index in range(train + test):
            number += 1
            file = f"{name}/{name[4:]}_{index:04d}.jpg"
            lists["images"].append(f"{number} {file}")
            lists["image_class_labels"].append(f"{number} {class_id}")
            lists["train_test_split"].append(f"{number} {int(index < train)}")
            lists["bounding_boxes"].append(f"{number} 1.0 2.0 3.0 4.0")
            if images:
                write_image(root / "images" / file)
    lists["classes"] = [f"{class_id} {name}" for class_id, name in enumerate(classes, 1)]
    for name, lines in lists.items():
        write(root / f"{name}.txt", "\n".join(lines) + "\n")
    return root


def change_line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [] if text is None else [text]
    path.write_text("\n".join(lines) + "\n")


def message(call):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- CUB layout


def test_cub_table(tmp_path):
    table = readers.read_cub(write_cub(tmp_path))
    assert list(table.columns) == annotations.TABLE_COLUMNS
    assert table["split"].value_counts().to_dict() == {"train": 8, "test": 4}
    assert table["label"].tolist() == [0] * 6 + [1] * 6
    assert set(table["class_name"]) == {"001.Crow", "002.Wren"}
    assert (table[BOX_COLUMNS] == [2.0, 1.0, 6.0, 4.0]).all(axis=None)
    assert table["path"].map(os.path.isabs).all() and table["path"].map(os.path.exists).all()


def test_cub_archive_folder_relative_root_and_optional_boxes(tmp_path, monkeypatch):
    write_cub(tmp_path / "CUB_200_2011")
    (tmp_path / "CUB_200_2011/bounding_boxes.txt").unlink()
    monkeypatch.chdir(tmp_path)
    table = readers.read_cub(".")
    assert table[BOX_COLUMNS].isna().all(axis=None)
    assert table["path"][0].startswith(str(tmp_path / "CUB_200_2011/images"))


def test_labels_follow_class_ids_as_numbers(tmp_path):
    root = write_cub(tmp_path, [f"{number:03d}.Bird" for number in range(1, 12)], 1, 1)
    table = readers.read_cub(root)
    assert table["label"].tolist() == [label for label in range(11) for _ in range(2)]


def test_paths_with_spaces_windows_lines_blank_lines_and_a_byte_order_mark(tmp_path):
    root = write_cub(tmp_path, ["001.Great Crow", "002.Wren"])
    for file in root.glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    table = readers.read_cub(root)
    assert table["class_name"][0] == "001.Great Crow" and len(table) == 12


MISTAKES = {
    "bad id": ("image_class_labels.txt", 3, "3 9", "'9' is unknown"),
    "text for number": ("bounding_boxes.txt", 2, "2 1.0 x 3.0 4.0", "out of shape"),
    "too few fields": ("bounding_boxes.txt", 4, "4 1.0 2.0 3.0", "out of shape"),
    "too many fields": ("bounding_boxes.txt", 4, "4 1 2 3 4 5", "out of shape"),
    "id twice": ("images.txt", 5, "4 001.Crow/other.jpg", "a second time"),
    "unknown image": ("train_test_split.txt", 12, "99 1", "id 99 is not among the images"),
    "split flag": ("train_test_split.txt", 1, "1 2", "expected 'id is_train'"),
    "negative width": ("bounding_boxes.txt", 6, "6 1.0 2.0 -3.0 4.0", "has no area"),
    "not a number": ("bounding_boxes.txt", 6, "6 nan 2.0 3.0 4.0", "has no area"),
    "left of it": ("bounding_boxes.txt", 7, "7 -4.0 2.0 30.0 4.0", "outside the image"),
    "above it": ("bounding_boxes.txt", 7, "7 4.0 -3.0 30.0 4.0", "outside the image"),
}


@pytest.mark.parametrize("file,line,text,why", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_named_by_file_and_line(tmp_path, file, line, text, why):
    root = write_cub(tmp_path)
    change_line(root / file, line, text)
    found = message(lambda: readers.read_cub(root))
    assert f"{root / file}:{line}: " in found and why in found


def test_box_rounded_beyond_the_edge_is_clipped(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "bounding_boxes.txt", 7, "7 -1.0 -0.5 30.0 4.0")
    assert readers.read_cub(root).loc[6, BOX_COLUMNS].tolist() == [0.0, 0.0, 3.5, 29.0]


@pytest.mark.parametrize("name", ["image_class_labels", "train_test_split", "bounding_boxes"])
def test_missing_line_is_counted(tmp_path, name):
    root = write_cub(tmp_path)
    change_line(root / f"{name}.txt", 3, None)
    found = message(lambda: readers.read_cub(root))
    assert f"{root / name}.txt: no line for 1 of 12 images, first: id 3" in found


@pytest.mark.parametrize("name", ["classes", "image_class_labels", "train_test_split"])
def test_missing_file_is_named(tmp_path, name):
    root = write_cub(tmp_path)
    (root / f"{name}.txt").unlink()
    assert f"{root / name}.txt: missing" in message(lambda: readers.read_cub(root))


def test_binary_file_is_not_text(tmp_path):
    root = write_cub(tmp_path)
    (root / "classes.txt").write_bytes(b"1 \xff\xfe")
    assert "classes.txt: cannot be read as text" in message(lambda: readers.read_cub(root))


@pytest.mark.parametrize("name", ["images", "classes", "train_test_split", "bounding_boxes"])
def test_empty_file_is_named(tmp_path, name):
    root = write_cub(tmp_path)
    write(root / f"{name}.txt", "\n")
    assert f"{root / name}.txt: has no line" in message(lambda: readers.read_cub(root))


def test_long_line_is_cut_short(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "train_test_split.txt", 1, "1 " + "9" * 5000)
    assert len(message(lambda: readers.read_cub(root))) < 400 + len(str(root))


def test_wrong_root_says_what_is_there(tmp_path):
    write(tmp_path / "cars_meta.mat")
    found = message(lambda: readers.read_cub(tmp_path))
    assert "no images.txt here (but cars_meta.mat)" in found
    assert "no such folder" in message(lambda: readers.read_cub(tmp_path / "nowhere"))


def test_missing_images_are_counted_per_split(tmp_path):
    root = write_cub(tmp_path, test=3)
    for name in ("0005", "0006"):
        (root / f"images/001.Crow/Crow_{name}.jpg").unlink()
    found = message(lambda: readers.read_cub(root))
    assert "8 of 8 train images found, 2 of 6 test images missing, first: " in found
    assert "Crow_0005.jpg" in found
    with pytest.warns(UserWarning, match="2 of 6 test images missing.*left out"):
        table = readers.read_cub(root, allow_missing=True)
    assert len(table) == 12 and table.index.tolist() == list(range(12))
    assert len(readers.read_cub(root, check_images=False)) == 14


@pytest.mark.parametrize("what", ["folder", "link to nothing", "link to itself"])
def test_what_only_has_the_name_of_an_image_is_missing(tmp_path, what):
    root = write_cub(tmp_path)
    photo = root / "images/001.Crow/Crow_0000.jpg"
    photo.unlink()
    photo.mkdir() if what == "folder" else photo.symlink_to(photo if "itself" in what else "none")
    assert f"1 of 8 train images missing, 4 of 4 test images found, first: {photo}" in message(
        lambda: readers.read_cub(root)
    )


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root, photos = write_cub(tmp_path / "cub"), write_folder(tmp_path / "own", crow=2, wren=2)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(("001.Crow", "crow")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = message(lambda: readers.read_cub(root))
    assert f"{root}/images/001.Crow: cannot be listed (Permission denied)" in found
    found = message(lambda: read_folder(photos))
    assert f"{photos}/crow: cannot be listed (Permission denied)" in found


def test_no_image_folder_at_all(tmp_path):
    root = write_cub(tmp_path, images=False)
    assert "8 of 8 train images missing, 4 of 4 test" in message(lambda: readers.read_cub(root))


def test_class_without_training_image(tmp_path):
    root = write_cub(tmp_path)
    flags = root / "train_test_split.txt"
    flags.write_text(flags.read_text().replace("7 1", "7 0").replace("8 1", "8 0"))
    readers.read_cub(root)
    flags.write_text(flags.read_text().replace("9 1", "9 0").replace("10 1", "10 0"))
    found = message(lambda: readers.read_cub(root))
    assert "1 of 2 classes have no training image, first: 002.Wren" in found
    write(root / "classes.txt", "1 001.Crow\n2 002.Wren\n3 003.Owl\n")
    found = message(lambda: read_table("cub", root))
    assert "2 of 3 classes" in found


def test_image_listed_twice(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "images.txt", 2, "2 001.Crow/Crow_0000.jpg")
    assert "listed more than once" in message(lambda: readers.read_cub(root))


def test_parts(tmp_path):
    root = write_cub(tmp_path)
    write(root / "parts/parts.txt", "1 back\n2 left wing\n")
    write(root / "parts/part_locs.txt", "1 1 5.0 6.0 1\n1 2 0.0 0.0 0\n3 2 7.0 8.0 1\n")
    parts = readers.read_parts(root)
    assert parts[["part", "y", "x"]].to_numpy().tolist() == [
        ["back", 6.0, 5.0],
        ["left wing", 8.0, 7.0],
    ]
    assert parts["path"].tolist() == readers.read_cub(root)["path"].iloc[[0, 2]].tolist()
    table = readers.read_cub(root)
    summary = describe_parts(table, parts)
    assert summary.index.tolist() == ["back", "left wing"]
    assert summary["visible"].tolist() == [1 / 12, 1 / 12]
    assert summary[["y", "x"]].to_numpy().tolist() == [[1.0, 4 / 3], [1.5, 2.0]]
    pd.testing.assert_frame_equal(load_parts("cub", root), parts)
    write(root / "parts/part_locs.txt", "1 1 5.0 6.0 1\n1 3 0.0 0.0 0\n")
    assert "part_locs.txt:2: " in message(lambda: readers.read_parts(root))


# ---------------------------------------------------------------- the other official layouts


def write_nabirds(root):
    write_cub(root, ["0817", "0085", "1010"], 2, 1)
    write(root / "classes.txt", "0 Birds\n3 Ducks\n85 Teal\n817 Titmouse\n1010 Grebe (Adult)\n")
    write(root / "hierarchy.txt", "3 0\n85 3\n817 0\n1010 3\n")
    labels = root / "image_class_labels.txt"
    ids = {"1": "817", "2": "85", "3": "1010"}
    pairs = [line.split() for line in labels.read_text().splitlines()]
    labels.write_text("".join(f"{image} {ids[class_id]}\n" for image, class_id in pairs))
    write(root / "sizes.txt", "".join(f"{image} 3 100\n" for image, _ in pairs))
    return root


def test_nabirds_labels_are_contiguous_and_boxes_clipped(tmp_path):
    table = readers.read_nabirds(write_nabirds(tmp_path))
    assert table["label"].tolist() == [1, 1, 1, 0, 0, 0, 2, 2, 2]
    assert table["class_name"].iloc[[0, 3, 6]].tolist() == ["Titmouse", "Teal", "Grebe (Adult)"]
    assert (table[BOX_COLUMNS] == [2.0, 1.0, 6.0, 3.0]).all(
        axis=None
    )  # width 3 clips the right edge


def test_nabirds_mistakes_and_hierarchy(tmp_path):
    root = write_nabirds(tmp_path)
    tree = readers.read_hierarchy(root)
    assert tree.to_dict("records")[1] == {"class_name": "Teal", "parent": "Ducks"}
    change_line(root / "bounding_boxes.txt", 2, "2 3.0 2.0 9.0 9.0")
    assert "bounding_boxes.txt:2: " in message(lambda: readers.read_nabirds(root))
    change_line(root / "image_class_labels.txt", 4, "4 86")
    assert "image_class_labels.txt:4: " in message(lambda: readers.read_nabirds(root))


def cars_records(count, with_class=True):
    fields = [(f"bbox_{side}", object) for side in ("x1", "y1", "x2", "y2")]
    fields += [("class", object)] * with_class + [("fname", object)]
    rows = [
        (1, 2, 300 + row, 40, *((row % 2 + 1,) if with_class else ()), f"{row + 1:05d}.jpg")
        for row in range(count)
    ]
    return np.array(rows, dtype=fields)


def write_cars(root, labeled=True):
    (root / "devkit").mkdir(parents=True)
    names = np.array(["Acura RL Sedan 2012", "Audi TT"], dtype=object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": cars_records(4)})
    savemat(root / "devkit/cars_test_annos.mat", {"annotations": cars_records(3, False)})
    if labeled:
        labels = {"annotations": cars_records(3)}
        savemat(root / "cars_test_annos_withlabels.mat", labels)
    for split, count in (("train", 4), ("test", 3)):
        for row in range(count):
            write(root / f"cars_{split}/{row + 1:05d}.jpg")
    return root


def test_cars(tmp_path):
    table = readers.read_cars(write_cars(tmp_path))
    assert table["split"].value_counts().to_dict() == {"train": 4, "test": 3}
    assert table["label"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert table["class_name"][1] == "Audi TT"
    assert table[BOX_COLUMNS].iloc[2].tolist() == [1.0, 0.0, 40.0, 302.0]  # 302 is beyond a byte
    assert table["path"][4] == str(tmp_path / "cars_test/00001.jpg")


def test_cars_test_file_without_classes(tmp_path):
    root = write_cars(tmp_path, labeled=False)
    found = message(lambda: readers.read_cars(root))
    assert "cars_test_annos.mat: 3 test images without a class" in found
    assert "cars_test_annos_withlabels.mat" in found
    table = readers.read_cars(root, unlabeled=True)
    assert table["label"][table["split"] == "test"].eq(-1).all()
    assert table["class_name"][table["split"] == "test"].eq("").all()


def test_cars_broken_files(tmp_path):
    root = write_cars(tmp_path)
    file = root / "devkit/cars_train_annos.mat"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "cars_train_annos.mat: not as expected" in message(lambda: readers.read_cars(root))
    bad = cars_records(4)
    bad["class"][1] = 3
    savemat(file, {"annotations": bad})
    assert "class ids from 1 to 3" in message(lambda: readers.read_cars(root))
    bad["class"][1], bad["bbox_x2"][2] = 1, 0
    savemat(file, {"annotations": bad})
    assert "cars_train_annos.mat: entry 3" in message(lambda: readers.read_cars(root))


def write_dogs(root):
    for split, rows in (("train", (1, 2, 3)), ("test", (4,))):
        names = [f"n0208{c}-{c}_dog/n0208{c}_{row}" for c in "ab" for row in rows]
        listed = np.array([f"{name}.jpg" for name in names], dtype=object)
        values = {"file_list": listed, "annotation_list": np.array(names, dtype=object)}
        savemat(root / f"{split}_list.mat", values | {"labels": np.repeat([1, 2], len(rows))})
        for name in names:
            write(root / f"Images/{name}.jpg")
            small, large = ((5, 6, 9, 9), (11, 21, 40, 51))
            objects = "".join(
                f"<object><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
                f"<ymax>{y2}</ymax></bndbox></object>"
                for x1, y1, x2, y2 in (small, large)
            )
            size = "<size><width>50</width><height>45</height><depth>3</depth></size>"
            write(root / f"Annotation/{name}", f"<annotation>{size}{objects}</annotation>")
    return root


def test_dogs(tmp_path):
    root = write_dogs(tmp_path)
    table = readers.read_dogs(root)
    assert table["label"].tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    assert table["class_name"][3] == "n0208b-b_dog"
    assert (table[BOX_COLUMNS] == [20.0, 10.0, 45.0, 40.0]).all(axis=None)  # largest, clipped at 45
    assert readers.read_dogs(root, boxes=False)[BOX_COLUMNS].isna().all(axis=None)
    file = write(root / "Annotation/n0208a-a_dog/n0208a_2", "<annotation><xmin>3</xmin>")
    assert f"{file}: not as expected" in message(lambda: readers.read_dogs(root))


def inaturalist(rows, first_image):
    """COCO-style content whose annotations come in another order than its images."""
    images = [
        {"id": first_image + row, "file_name": f"train_val_images/{row}/{first_image}.jpg"}
        for row in range(len(rows))
    ]
    annotations = [
        {"id": row, "image_id": first_image + row, "category_id": category}
        for row, category in enumerate(rows)
    ]
    categories = [{"id": 7, "name": "Fern"}, {"id": 3, "name": "Moss"}, {"id": 40, "name": "Fox"}]
    return {"images": images, "annotations": annotations[::-1], "categories": categories}


def write_inaturalist(root, train=(40, 3, 7, 3), val=(7, 40)):
    for name, rows, first in (("train2017", train, 100), ("val2017", val, 500)):
        content = inaturalist(rows, first)
        write(root / f"{name}.json", json.dumps(content))
        for image in content["images"]:
            write(root / image["file_name"])
    return root


def test_inaturalist_pairs_by_id(tmp_path):
    table = readers.read_inaturalist(write_inaturalist(tmp_path))
    assert table["class_name"].tolist() == ["Fox", "Moss", "Fern", "Moss", "Fern", "Fox"]
    assert table["label"].tolist() == [2, 0, 1, 0, 1, 2]
    assert table["split"].tolist() == ["train"] * 4 + ["test"] * 2


def test_inaturalist_mistakes(tmp_path):
    root = write_inaturalist(tmp_path, train=(40, 3, 7, 8))
    assert "train2017.json: its categories" in message(lambda: readers.read_inaturalist(root))
    content = inaturalist((40, 3, 7), 100)
    content["annotations"].append(content["annotations"][0])
    write(root / "train2017.json", json.dumps(content))
    found = message(lambda: readers.read_inaturalist(root))
    assert "3 images and 4 annotations do not pair one to one" in found
    write(root / "train2017.json", '{"images": []')
    assert "train2017.json: not as expected" in message(lambda: readers.read_inaturalist(root))


def write_aircraft(root):
    data = root / "fgvc-aircraft-2013b/data"
    write(data / "variants.txt", "707-320\nDC-9-30\nCessna 172\n")
    boxes = []
    for number, split in enumerate(("train", "val", "test")):
        names = ("Cessna 172", "707-320", "DC-9-30")
        lines = [f"{number}{row:06d} {name}" for row, name in enumerate(names)]
        write(data / f"images_variant_{split}.txt", "\n".join(lines) + "\n")
        for line in lines:
            write(data / f"images/{line.split()[0]}.jpg")
            boxes.append(f"{line.split()[0]} 3 144 998 431")
    write(data / "images_box.txt", "\n".join(boxes))
    return root


def test_aircraft_equals_torchvision(tmp_path):
    from torchvision.datasets import FGVCAircraft

    table = readers.read_aircraft(write_aircraft(tmp_path))
    for ours, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        reference = FGVCAircraft(tmp_path, theirs)
        part = table[table["split"] == ours]
        assert part["path"].tolist() == reference._image_files
        assert part["label"].tolist() == reference._labels
        assert part["class_name"].tolist() == [reference.classes[i] for i in reference._labels]
    assert (table[BOX_COLUMNS] == [143.0, 2.0, 431.0, 998.0]).all(axis=None)


def test_aircraft_image_in_two_splits(tmp_path):
    data = write_aircraft(tmp_path) / "fgvc-aircraft-2013b/data"
    write(data / "images_variant_val.txt", (data / "images_variant_train.txt").read_text())
    (data / "images_box.txt").write_text(
        "\n".join(
            line
            for line in (data / "images_box.txt").read_text().splitlines()
            if not line.startswith("1")
        )
    )
    assert "listed more than once" in message(lambda: readers.read_aircraft(tmp_path))


def test_flowers_equals_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import Flowers102

    home = tmp_path / "flowers-102"
    labels = np.tile(np.arange(1, 103), 3)
    sets = {"trnid": np.arange(204, 102, -1), "valid": np.arange(1, 103), "tstid": [205, 301]}
    home.mkdir()
    savemat(home / "imagelabels.mat", {"labels": labels})
    savemat(home / "setid.mat", sets)
    for number in range(1, 307):
        write(home / f"jpg/image_{number:05d}.jpg")
    table = readers.read_flowers(tmp_path)
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    for ours, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        reference = Flowers102(tmp_path, theirs)
        part = table[table["split"] == ours]
        assert part["path"].tolist() == list(map(str, reference._image_files))
        assert part["label"].tolist() == reference._labels
    assert table["class_name"][table["label"] == 4].eq("english marigold").all()
    savemat(home / "setid.mat", sets | {"tstid": [307]})
    assert "beyond the 306 labeled" in message(lambda: readers.read_flowers(tmp_path))


def test_pets_equals_torchvision(tmp_path):
    from torchvision.datasets import OxfordIIITPet

    home = tmp_path / "oxford-iiit-pet"
    write(home / "annotations/trainval.txt", "Bombay_2 2 1 1\nAbyssinian_1 1 1 1\n")
    write(home / "annotations/test.txt", "Abyssinian_7 1 1 1\nBombay_9 2 1 1\n")
    for name in ("Bombay_2", "Abyssinian_1", "Abyssinian_7", "Bombay_9"):
        write(home / f"images/{name}.jpg")
    table = readers.read_pets(tmp_path)
    for ours, theirs in (("train", "trainval"), ("test", "test")):
        reference = OxfordIIITPet(tmp_path, theirs)
        part = table[table["split"] == ours]
        assert part["path"].tolist() == list(map(str, reference._images))
        assert part["label"].tolist() == reference._labels
    assert table["class_name"].tolist() == ["Bombay", "Abyssinian", "Abyssinian", "Bombay"]


# ---------------------------------------------------------------- own photos


def write_folder(root, **classes):
    for name, count in classes.items():
        for index in range(count):
            write_image(root / name / f"photo{index}.png")
    return root


def test_folder_of_class_folders(tmp_path):
    root = write_folder(tmp_path, wren=10, crow=5)
    write_image(root / "crow/deep/er/One.JPEG")
    write(root / "crow/notes.txt")
    write(root / "wren/.hidden.jpg")
    write(root / "wren/phone.heic")
    write_image(root / "loose.jpg")
    with pytest.warns(UserWarning, match="4 files left out: .*") as caught:
        table = read_folder(root)
    for kind in ("1 .txt", "1 hidden", "1 .heic", "1 outside class folders"):
        assert kind in str(caught[0].message)
    assert list(table.columns) == annotations.TABLE_COLUMNS and len(table) == 16
    assert table.groupby("class_name")["label"].unique().map(list).to_dict() == {
        "crow": [0],
        "wren": [1],
    }
    counts = table[table["split"] == "test"]["class_name"].value_counts().to_dict()
    assert counts == {"crow": 1, "wren": 2}


def test_folder_split_is_saved_and_binding(tmp_path):
    root = write_folder(tmp_path, crow=10, wren=10)
    first = read_folder(root, seed=3)
    text = (root / "split.csv").read_text()
    assert text.startswith("path,split\ncrow/photo0.png,") and len(text.splitlines()) == 21
    pd.testing.assert_frame_equal(first, read_folder(root, test_fraction=0.5, seed=4))
    assert (root / "split.csv").read_text() == text
    (root / "split.csv").unlink()
    pd.testing.assert_frame_equal(first, read_folder(root, seed=3))
    (root / "split.csv").unlink()
    assert (read_folder(root, seed=4)["split"] != first["split"]).any()


def test_new_photos_are_appended_and_lost_ones_kept(tmp_path):
    root = write_folder(tmp_path, crow=10, wren=10)
    before = read_folder(root).set_index("path")["split"]
    lines = (root / "split.csv").read_text().splitlines()
    (root / "crow/photo3.png").unlink()
    for index in range(10, 20):
        write_image(root / f"wren/photo{index}.png")
    with pytest.warns(UserWarning) as caught:
        after = read_folder(root).set_index("path")["split"]
    gone, new = (str(warning.message) for warning in caught)
    assert "1 of its 20 photos missing, first: crow/photo3.png" in gone
    assert "10 new photos appended: 8 train, 2 test" in new or "2 test, 8 train" in new
    kept = before.index.intersection(after.index)
    assert len(kept) == 19 and after.loc[kept].equals(before.loc[kept])
    assert (root / "split.csv").read_text().splitlines()[: len(lines)] == lines
    write_image(root / "crow/photo3.png")
    again = read_folder(root).set_index("path")["split"]
    assert again.loc[before.index].equals(before)


def test_split_saved_by_a_spreadsheet_is_read(tmp_path):
    root = write_folder(tmp_path, crow=3, wren=3)
    first = read_folder(root)
    text = (root / "split.csv").read_bytes()
    (root / "split.csv").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(read_folder(root), first)


def test_what_is_no_photo_is_left_out(tmp_path):
    root = write_folder(tmp_path, crow=3, wren=3)
    (root / "crow/folder.jpg").mkdir()
    (root / "crow/none.jpg").symlink_to("nowhere")
    (root / "crow/circle").symlink_to("..")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "wren/pipe.jpg")  # reading it would never end
    with pytest.warns(UserWarning, match="3 files left out: 3 that are no files"):
        assert len(read_folder(root)) == 6


def test_split_by_hand_is_respected(tmp_path):
    root = write_folder(tmp_path, crow=3, wren=3)
    rows = [
        f"{name}/photo{i}.png,{split}"
        for name in ("crow", "wren")
        for i, split in enumerate(("train", "validation", "test"))
    ]
    write(root / "split.csv", "\n".join(["path,split", *rows]))
    table = read_table("folder", root, validation_fraction=0.5, seed=1)
    assert table["split"].tolist() == ["train", "validation", "test"] * 2


@pytest.mark.parametrize(
    "line,text",
    [(1, "file,split"), (2, "crow/photo0.png,tset"), (3, "crow/photo0.png,train"), (4, "a")],
)
def test_split_out_of_shape(tmp_path, line, text):
    root = write_folder(tmp_path, crow=3, wren=3)
    read_folder(root)
    change_line(root / "split.csv", line, text)
    before = (root / "split.csv").read_bytes()
    assert f"{root / 'split.csv'}:{line}: " in message(lambda: read_folder(root))
    assert (root / "split.csv").read_bytes() == before


def test_read_only_folder_still_works(tmp_path, monkeypatch):
    root = write_folder(tmp_path, crow=5, wren=5)

    def refuse(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match="split.csv cannot be written .read-only.*not kept"):
        first = read_folder(root)
    with pytest.warns(UserWarning):
        pd.testing.assert_frame_equal(first, read_folder(root))


def test_folder_that_is_too_small(tmp_path):
    root = write_folder(tmp_path, crow=5)
    assert "1 class folders with photos; at least two" in message(lambda: read_folder(root))
    write_folder(root, owl=1, wren=1)
    found = message(lambda: read_folder(root))
    assert f"{root}/owl: 1 photo; a class needs at least 2" in found and "(2 such" in found
    write(root / "wren2/photo.heic")
    assert f"{root}/wren2: no photo" in message(lambda: read_folder(root))
    assert "no such folder" in message(lambda: read_folder(root / "nowhere"))
    assert "test_fraction is 1.0" in message(lambda: read_folder(root, 1.0))
    assert not (root / "split.csv").exists()


def test_given_folders_are_used_as_they_are(tmp_path):
    root = tmp_path
    for split, count in (("train", 3), ("valid", 2), ("Test", 1)):
        write_folder(root / split, crow=count, wren=count)
    table = read_table("folder", root, 0.3)
    counts = table.groupby("class_name")["split"].value_counts().to_dict()
    splits = {"train": 3, "validation": 2, "test": 1}
    assert counts == {(n, s): c for n in ("crow", "wren") for s, c in splits.items()}
    assert not (root / "split.csv").exists()
    write_folder(root / "Test", owl=1)
    assert "1 of 3 classes have no training image, first: owl" in message(lambda: read_folder(root))


def test_val_is_the_test_split_where_there_is_no_other(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        write_folder(tmp_path / split, crow=count, wren=count)
    write(tmp_path / "logs/run.txt")
    with pytest.warns(UserWarning, match="train, val are used, not logs"):
        table = read_table("folder", tmp_path, 0.25)
    assert table["split"].value_counts().to_dict() == {"train": 6, "validation": 2, "test": 4}


def test_train_alone_is_no_split_and_classes_may_be_called_train(tmp_path):
    write_folder(tmp_path / "a/train", crow=3, wren=3)
    assert f"give {tmp_path}/a/train" in message(lambda: read_folder(tmp_path / "a"))
    table = read_folder(write_folder(tmp_path / "b", train=3, test=3, bus=3))
    assert sorted(set(table["class_name"])) == ["bus", "test", "train"]


# ---------------------------------------------------------------- validation, fingerprint, summary


def test_validation_is_stratified_and_never_from_test(tmp_path):
    root = write_cub(tmp_path, ["001.Crow", "002.Wren", "003.Owl"], train=10, test=4)
    plain, table = read_table("cub", root, 0), read_table("cub", root, 0.3, seed=5)
    assert plain["split"].value_counts().to_dict() == {"train": 30, "test": 12}
    assert table["split"][plain["split"] == "test"].eq("test").all()
    drawn = table[table["split"] == "validation"]
    assert drawn["class_name"].value_counts().to_dict() == dict.fromkeys(table["class_name"], 3)
    other = read_table("cub", root, 0.3, seed=6)
    assert (other["split"] != table["split"]).any()
    pd.testing.assert_frame_equal(table.drop(columns="split"), plain.drop(columns="split"))


def test_validation_does_not_depend_on_row_order_place_or_process(tmp_path):
    first = read_table("cub", write_cub(tmp_path / "one/CUB_200_2011", train=10), 0.3, seed=5)
    moved = write_cub(tmp_path / "two", train=10)
    for name in ("images", "bounding_boxes"):
        lines = (moved / f"{name}.txt").read_text().splitlines()
        write(moved / f"{name}.txt", "\n".join(lines[::-1]))
    code = (
        "import sys; from ramslib.data.datasets import read_table, relative_paths as p; "
        "t = read_table('cub', sys.argv[1], 0.3, seed=5); "
        "print(*sorted(p(t)[t['split'] == 'validation']))"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(moved)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    paths = datasets.relative_paths(first)[first["split"] == "validation"]
    assert run.stdout.split() == sorted(paths) and len(paths) == 6


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_draw_takes_its_share_of_every_class(labels, fraction, seed):
    keys = [f"image {row}" for row in range(len(labels))]
    drawn = datasets._draw(keys, labels, fraction, seed)
    for label in set(labels):
        of_class = np.array(labels) == label
        count, taken = of_class.sum(), drawn[of_class].sum()
        assert taken == min(max(int(fraction * count + 0.5), 1), count - 1)
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = datasets._draw([keys[i] for i in order], np.array(labels)[order], fraction, seed)
    assert (shuffled == drawn[order]).all()


def test_draw_is_the_documented_hash():
    keys = ["a", "b", "c", "d"]
    lowest = min(keys, key=lambda key: hashlib.sha256(f"9/{key}".encode()).digest())
    assert datasets._draw(keys, [0] * 4, 0.25, 9).tolist() == [key == lowest for key in keys]


def test_diagnostic_set_is_drawn_once(tmp_path, monkeypatch):
    drawn = []
    write_set = "ramslib.data.diagnostic.write_diagnostic_set"
    monkeypatch.setattr(write_set, lambda root: drawn.append(write_cub(root)), raising=False)
    for _ in range(2):
        assert len(read_table("diagnostic", tmp_path / "new")) == 12
    assert drawn == [tmp_path / "new"]
    write(tmp_path / "other/file.txt")
    assert "no images.txt here" in message(lambda: read_table("diagnostic", tmp_path / "other"))


def test_read_table_refuses(tmp_path):
    assert "choose one of diagnostic, folder, cub" in message(lambda: read_table("cubs", tmp_path))
    assert "validation_fraction is 1" in message(lambda: read_table("cub", tmp_path, 1))


def test_fingerprint(tmp_path):
    root = write_cub(tmp_path / "one")
    table = read_table("cub", root, 0.2)
    found = fingerprint(table)
    assert len(found) == 64 and fingerprint(table.sample(frac=1, random_state=0)) == found
    assert fingerprint(read_table("cub", write_cub(tmp_path / "two"), 0.2)) == found
    csv = tmp_path / "table.csv"
    table.to_csv(csv, index=False)
    assert fingerprint(pd.read_csv(csv)) == found
    for column, value in (("label", 1), ("split", "test"), ("top", 0.5)):
        changed = table.copy()
        changed.loc[0, column] = value
        assert fingerprint(changed) != found
    write_image(root / "images/001.Crow/Crow_0000.jpg", (80, 60))
    assert fingerprint(table) != found


def test_describe(tmp_path):
    root = write_cub(tmp_path)
    write_image(root / "images/001.Crow/Crow_0000.jpg", (80, 5))
    summary = describe(read_table("cub", root, 0.25))
    assert summary.index.tolist() == ["train", "validation", "test"]
    assert summary["images"].tolist() == [6, 2, 4]
    assert summary.loc["test"].drop("box_share").to_dict() == {
        "images": 4,
        "classes": 2,
        "smallest_class": 2,
        "largest_class": 2,
        "height": 6,
        "width": 8,
        "shortest_side": 6,
        "boxes": 4,
    }
    assert summary.loc["test", "box_share"] == pytest.approx(12 / 48)
    assert summary.loc[["train", "validation"], "shortest_side"].min() == 5
    assert describe(readers.read_cub(root), sample=1).loc["train", "width"] == 80


def test_describe_boxes(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "bounding_boxes.txt", 1, "1 2.0 3.0 100.0 3.0")
    table = readers.read_cub(root)
    found = describe_boxes(table).iloc[0]  # clipped to 6 x 3 pixels of 8 x 6
    wanted = {"area": 18 / 48, "height": 0.5, "width": 0.75, "aspect": 2.0, "y": 0.75, "x": 5 / 8}
    assert found.to_dict() == pytest.approx(wanted)
    assert len(describe_boxes(table, sample=5)) == 4
    none = table.assign(**dict.fromkeys(BOX_COLUMNS, np.nan))
    assert len(describe_boxes(none)) == 0
    assert len(describe_parts(none, load_parts("pets", root))) == 0


def test_describe_finds_a_box_outside_and_a_broken_image(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "bounding_boxes.txt", 5, "5 8.0 1.0 5.0 5.0")
    table = readers.read_cub(root)
    found = message(lambda: describe(table))
    assert "Crow_0004.jpg: the box [1.0, 8.0, 6.0, 13.0] lies outside" in found
    write(root / "images/001.Crow/Crow_0000.jpg", "text")
    assert "Crow_0000.jpg: not an image" in message(lambda: describe(table))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_large_lists_load_fast_and_small(tmp_path):
    """As many lines as NABirds has; memory of the whole process, pandas and scipy included."""
    names = [f"{label:04d}" for label in range(555)]
    write_cub(tmp_path, names, train=48, test=40, images=False)
    code = (
        "import sys, time; from ramslib.data.readers import read_nabirds; "
        "start = time.process_time(); "
        "table = read_nabirds(sys.argv[1], check_images=False); "
        "seconds = time.process_time() - start; "
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]; "
        "print(len(table), seconds, int(peak) / 1024)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    images, seconds, megabytes = map(float, run.stdout.split())
    assert images == 48_840 and seconds < 2 and megabytes < 300


def test_readers_are_named_and_described():
    for name, reader in datasets.READERS.items():
        assert reader.__doc__ and reader.__name__ == f"read_{name}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "allow_missing" in readers.read_cub.__doc__
