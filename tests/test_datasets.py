"""Readers against their own layouts, torchvision's readers and hand-made mistakes."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    cars_records,
    inaturalist,
    write,
    write_aircraft,
    write_cars,
    write_cub,
    write_dogs,
    write_folder,
    write_image,
    write_inaturalist,
    write_nabirds,
)
from scipy.io import savemat

from ramslib.config import Config
from ramslib.data import annotations, datasets, readers
from ramslib.data.datasets import fingerprint, load_table, read_table
from ramslib.errors import InputError

BOX_COLUMNS = annotations.BOX_COLUMNS


def change_line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [] if text is None else [text]
    path.write_text("\n".join(lines) + "\n")


def read(data, root, **options):
    """A dataset without a validation split drawn from it."""
    return read_table(data, root, 0, **options)


def message(call):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- CUB layout


def test_cub_table(tmp_path):
    table = read("cub", write_cub(tmp_path))
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
    table = read("cub", ".")
    assert table[BOX_COLUMNS].isna().all(axis=None)
    assert table["path"][0].startswith(str(tmp_path / "CUB_200_2011/images"))


def test_labels_follow_class_ids_as_numbers(tmp_path):
    root = write_cub(tmp_path, [f"{number:03d}.Bird" for number in range(1, 12)], 1, 1)
    table = read("cub", root)
    assert table["label"].tolist() == [label for label in range(11) for _ in range(2)]


def test_paths_with_spaces_windows_lines_blank_lines_and_a_byte_order_mark(tmp_path):
    root = write_cub(tmp_path, ["001.Great Crow", "002.Wren"])
    for file in root.glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    table = read("cub", root)
    assert table["class_name"][0] == "001.Great Crow" and len(table) == 12


MISTAKES = {
    "bad id": ("image_class_labels.txt", 3, "3 9", "'9' is unknown"),
    "text for number": ("bounding_boxes.txt", 2, "2 1.0 x 3.0 4.0", "out of shape"),
    "too few fields": ("bounding_boxes.txt", 4, "4 1.0 2.0 3.0", "out of shape"),
    "too many fields": ("bounding_boxes.txt", 4, "4 1 2 3 4 5", "out of shape"),
    "id twice": ("images.txt", 5, "4 001.Crow/other.jpg", "a second time"),
    "unknown image": ("train_test_split.txt", 12, "99 1", "id 99 is not among the images"),
    "split flag": ("train_test_split.txt", 1, "1 2", "expected 'id is_train'"),
}
IMPOSSIBLE = {
    "negative width": ("1.0 2.0 -3.0 4.0", "has no area"),
    "not a number": ("nan 2.0 3.0 4.0", "has no area"),
    "left of it": ("-4.0 2.0 30.0 4.0", "outside its image"),
    "above it": ("4.0 -3.0 30.0 4.0", "outside its image"),
}


@pytest.mark.parametrize("file,line,text,why", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_named_by_file_and_line(tmp_path, file, line, text, why):
    root = write_cub(tmp_path)
    change_line(root / file, line, text)
    found = message(lambda: read("cub", root))
    assert f"{root / file}:{line}: " in found and why in found


@pytest.mark.parametrize("box,why", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_an_impossible_box_is_named_by_file_and_id(tmp_path, box, why):
    root = write_cub(tmp_path)
    change_line(root / "bounding_boxes.txt", 6, f"6 {box}")
    found = message(lambda: read("cub", root))
    assert f"{root}/bounding_boxes.txt: id 6: the box" in found
    assert why in found


def test_box_rounded_beyond_the_edge_is_clipped(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "bounding_boxes.txt", 7, "7 -1.0 -0.5 30.0 4.0")
    assert read("cub", root).loc[6, BOX_COLUMNS].tolist() == [0.0, 0.0, 3.5, 29.0]


@pytest.mark.parametrize("name", ["image_class_labels", "train_test_split", "bounding_boxes"])
def test_missing_line_is_counted(tmp_path, name):
    root = write_cub(tmp_path)
    change_line(root / f"{name}.txt", 3, None)
    found = message(lambda: read("cub", root))
    assert f"{root / name}.txt: no line for 1 of 12 images, first: id 3" in found


@pytest.mark.parametrize("name", ["classes", "image_class_labels", "train_test_split"])
def test_missing_file_is_named(tmp_path, name):
    root = write_cub(tmp_path)
    (root / f"{name}.txt").unlink()
    assert f"{root / name}.txt: cannot be read (No such file" in message(lambda: read("cub", root))


def test_binary_file_is_not_text(tmp_path):
    root = write_cub(tmp_path)
    (root / "classes.txt").write_bytes(b"1 \xff\xfe")
    assert "classes.txt: cannot be read (UnicodeDecodeError" in message(lambda: read("cub", root))


@pytest.mark.parametrize("name", ["images", "classes", "train_test_split", "bounding_boxes"])
def test_empty_file_is_named(tmp_path, name):
    root = write_cub(tmp_path)
    write(root / f"{name}.txt", "\n")
    assert f"{root / name}.txt: has no line" in message(lambda: read("cub", root))


def test_long_line_is_cut_short(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "train_test_split.txt", 1, "1 " + "9" * 5000)
    assert len(message(lambda: read("cub", root))) < 400 + len(str(root))


def test_wrong_root_says_what_is_there(tmp_path):
    write(tmp_path / "cars_meta.mat")
    found = message(lambda: read("cub", tmp_path))
    assert "no images.txt here (but cars_meta.mat)" in found
    assert "no such folder" in message(lambda: read("cub", tmp_path / "nowhere"))


def test_missing_images_are_counted_per_split(tmp_path):
    root = write_cub(tmp_path, test=3)
    for name in ("0005", "0006"):
        (root / f"images/001.Crow/Crow_{name}.jpg").unlink()
    found = message(lambda: read("cub", root))
    assert "images found: 4 of 6 test, 8 of 8 train; first missing: " in found
    assert "Crow_0005.jpg" in found
    with pytest.warns(UserWarning, match="4 of 6 test.*left out"):
        table = read("cub", root, allow_missing=True)
    assert len(table) == 12 and table.index.tolist() == list(range(12))
    assert len(readers.read_cub(root)) == 14


@pytest.mark.parametrize("what", ["folder", "link to nothing", "link to itself"])
def test_what_only_has_the_name_of_an_image_is_missing(tmp_path, what):
    root = write_cub(tmp_path)
    photo = root / "images/001.Crow/Crow_0000.jpg"
    photo.unlink()
    photo.mkdir() if what == "folder" else photo.symlink_to(photo if "itself" in what else "none")
    assert f"4 of 4 test, 7 of 8 train; first missing: {photo}" in message(
        lambda: read("cub", root)
    )


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root, photos = write_cub(tmp_path / "cub"), write_folder(tmp_path / "own", crow=2, wren=2)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(("001.Crow", "crow")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = message(lambda: read("cub", root))
    assert f"{root}/images/001.Crow: cannot be read (Permission denied" in found
    found = message(lambda: read("folder", photos))
    assert f"{photos}/crow: cannot be read (Permission denied" in found


def test_no_image_folder_at_all(tmp_path):
    root = write_cub(tmp_path, images=False)
    assert "0 of 4 test, 0 of 8 train" in message(lambda: read("cub", root))


def test_class_without_training_image(tmp_path):
    root = write_cub(tmp_path)
    flags = root / "train_test_split.txt"
    flags.write_text(flags.read_text().replace("7 1", "7 0").replace("8 1", "8 0"))
    read("cub", root)
    flags.write_text(flags.read_text().replace("9 1", "9 0").replace("10 1", "10 0"))
    found = message(lambda: read("cub", root))
    assert "1 of 2 classes have no training image, first: 002.Wren" in found
    write(root / "classes.txt", "1 001.Crow\n2 002.Wren\n3 003.Owl\n")
    assert "1 of 2 classes" in message(lambda: read_table("cub", root))  # no image: no class


def test_image_listed_twice(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "images.txt", 2, "2 001.Crow/Crow_0000.jpg")
    found = message(lambda: read("cub", root))
    assert "images.txt: id 2: " in found and "Crow_0000.jpg a second time" in found


def test_parts(tmp_path):
    root = write_cub(tmp_path)
    write(root / "parts/parts.txt", "1 back\n2 left wing\n")
    write(root / "parts/part_locs.txt", "1 1 5.0 6.0 1\n1 2 0.0 0.0 0\n3 2 7.0 8.0 1\n")
    parts = readers.read_parts(root)
    assert parts[["part", "y", "x"]].to_numpy().tolist() == [
        ["back", 6.0, 5.0],
        ["left wing", 8.0, 7.0],
    ]
    assert parts["path"].tolist() == read("cub", root)["path"].iloc[[0, 2]].tolist()
    write(root / "parts/part_locs.txt", "1 1 5.0 6.0 1\n1 3 0.0 0.0 0\n")
    assert "part_locs.txt:2: " in message(lambda: readers.read_parts(root))


# ---------------------------------------------------------------- the other official layouts


def test_nabirds_labels_are_contiguous_and_boxes_clipped(tmp_path):
    table = read("nabirds", write_nabirds(tmp_path))
    assert table["label"].tolist() == [1, 1, 1, 0, 0, 0, 2, 2, 2]
    assert table["class_name"].iloc[[0, 3, 6]].tolist() == ["Titmouse", "Teal", "Grebe (Adult)"]
    assert (table[BOX_COLUMNS] == [2.0, 1.0, 6.0, 3.0]).all(
        axis=None
    )  # width 3 clips the right edge


def test_nabirds_mistakes(tmp_path):
    root = write_nabirds(tmp_path)
    change_line(root / "bounding_boxes.txt", 2, "2 3.0 2.0 9.0 9.0")
    found = message(lambda: read("nabirds", root))
    assert (
        "bounding_boxes.txt: id 2: " in found
        and "outside its image of [100.0, 3.0] pixels" in found
    )
    change_line(root / "image_class_labels.txt", 4, "4 86")
    assert "image_class_labels.txt:4: " in message(lambda: read("nabirds", root))


def test_cars(tmp_path):
    table = read("cars", write_cars(tmp_path))
    assert table["split"].value_counts().to_dict() == {"train": 4, "test": 3}
    assert table["label"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert table["class_name"][1] == "Audi TT"
    assert table[BOX_COLUMNS].iloc[2].tolist() == [1.0, 0.0, 40.0, 302.0]  # 302 is beyond a byte
    assert table["path"][4] == str(tmp_path / "cars_test/00001.jpg")


def test_cars_test_file_without_classes(tmp_path):
    root = write_cars(tmp_path, labeled=False)
    found = message(lambda: read("cars", root))
    assert "cars_test_annos.mat: 3 test images without a class" in found
    assert "cars_test_annos_withlabels.mat" in found


def test_cars_broken_files(tmp_path):
    root = write_cars(tmp_path)
    file = root / "devkit/cars_train_annos.mat"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "cars_train_annos.mat: cannot be read" in message(lambda: read("cars", root))
    bad = cars_records(4)
    bad["class"][1] = 3
    savemat(file, {"annotations": bad})
    assert "annos.mat: entry 2: class_name of label 3 is missing" in message(
        lambda: read("cars", root)
    )
    bad["class"][1], bad["bbox_x2"][2] = 1, 0
    savemat(file, {"annotations": bad})
    assert "cars_train_annos.mat: entry 3" in message(lambda: read("cars", root))


def test_dogs(tmp_path):
    root = write_dogs(tmp_path)
    table = read("dogs", root)
    assert table["label"].tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    assert table["class_name"][3] == "n0208b-b_dog"
    assert (table[BOX_COLUMNS] == [20.0, 10.0, 45.0, 40.0]).all(axis=None)  # largest, clipped at 45
    file = write(root / "Annotation/n0208a-a_dog/n0208a_2", "<annotation><xmin>3</xmin>")
    assert f"{file}: cannot be read" in message(lambda: read("dogs", root))


def test_inaturalist_pairs_by_id(tmp_path):
    table = read("inaturalist", write_inaturalist(tmp_path))
    assert table["class_name"].tolist() == ["Fox", "Moss", "Fern", "Moss", "Fern", "Fox"]
    assert table["label"].tolist() == [2, 0, 1, 0, 1, 2]
    assert table["split"].tolist() == ["train"] * 4 + ["test"] * 2


def test_inaturalist_mistakes(tmp_path):
    root = write_inaturalist(tmp_path, train=(40, 3, 7, 8))
    assert "train2017.json: 4 images, 4 annotations and their categories" in message(
        lambda: read("inaturalist", root)
    )
    content = inaturalist((40, 3, 7), 100)
    content["annotations"].append(content["annotations"][0])
    write(root / "train2017.json", json.dumps(content))
    found = message(lambda: read("inaturalist", root))
    assert "train2017.json: cannot be read (MergeError: " in found
    write(root / "train2017.json", '{"images": []')
    assert "train2017.json: cannot be read" in message(lambda: read("inaturalist", root))


@pytest.mark.parametrize("year,ending", [(2018, "2018"), (2021, "")])
def test_inaturalist_of_another_year(tmp_path, year, ending):
    root = write_inaturalist(tmp_path)
    for name in ("train", "val"):
        (root / f"{name}2017.json").rename(root / f"{name}{ending}.json")
    config = Config().replace(data="inaturalist", root=str(root), year=year)
    assert load_table(config)["split"].value_counts()["test"] == 2
    assert "no train2019.json here" in message(lambda: load_table(config.replace(year=2019)))


def test_aircraft_equals_torchvision(tmp_path):
    from torchvision.datasets import FGVCAircraft

    table = read("aircraft", write_aircraft(tmp_path))
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
    assert "a second time" in message(lambda: read("aircraft", tmp_path))


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
    table = read("flowers", tmp_path)
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    for ours, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        reference = Flowers102(tmp_path, theirs)
        part = table[table["split"] == ours]
        assert part["path"].tolist() == list(map(str, reference._image_files))
        assert part["label"].tolist() == reference._labels
    assert table["class_name"][table["label"] == 4].eq("english marigold").all()
    savemat(home / "setid.mat", sets | {"tstid": [307]})
    found = message(lambda: read("flowers", tmp_path))
    assert "setid.mat: image 307: label is missing" in found


def test_pets_equals_torchvision(tmp_path):
    from torchvision.datasets import OxfordIIITPet

    home = tmp_path / "oxford-iiit-pet"
    write(home / "annotations/trainval.txt", "Bombay_2 2 1 1\nAbyssinian_1 1 1 1\n")
    write(home / "annotations/test.txt", "Abyssinian_7 1 1 1\nBombay_9 2 1 1\n")
    for name in ("Bombay_2", "Abyssinian_1", "Abyssinian_7", "Bombay_9"):
        write(home / f"images/{name}.jpg")
    table = read("pets", tmp_path)
    for ours, theirs in (("train", "trainval"), ("test", "test")):
        reference = OxfordIIITPet(tmp_path, theirs)
        part = table[table["split"] == ours]
        assert part["path"].tolist() == list(map(str, reference._images))
        assert part["label"].tolist() == reference._labels
    assert table["class_name"].tolist() == ["Bombay", "Abyssinian", "Abyssinian", "Bombay"]


# ---------------------------------------------------------------- own photos


def test_folder_of_class_folders(tmp_path):
    root = write_folder(tmp_path, wren=10, crow=5)
    write_image(root / "crow/deep/er/One.JPEG")
    write(root / "crow/notes.txt")
    write(root / "wren/.hidden.jpg")
    write(root / "wren/phone.mov")
    write_image(root / "loose.jpg")
    with pytest.warns(UserWarning, match="4 files left out: .*") as caught:
        table = read("folder", root)
    for kind in ("1 .txt", "1 hidden", "1 .mov", "1 outside class folders"):
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
    first = read("folder", root, seed=3)
    text = (root / "split.csv").read_text()
    assert text.startswith("path,split\ncrow/photo0.png,") and len(text.splitlines()) == 21
    pd.testing.assert_frame_equal(first, read("folder", root, test_fraction=0.5, seed=4))
    assert (root / "split.csv").read_text() == text
    (root / "split.csv").unlink()
    pd.testing.assert_frame_equal(first, read("folder", root, seed=4))
    (root / "split.csv").unlink()
    assert (read("folder", root, test_fraction=0.5)["split"] == "test").sum() == 10


def test_new_photos_are_appended_and_lost_ones_kept(tmp_path):
    root = write_folder(tmp_path, crow=10, wren=10)
    before = read("folder", root).set_index("path")["split"]
    lines = (root / "split.csv").read_text().splitlines()
    (root / "crow/photo3.png").unlink()
    for index in range(10, 20):
        write_image(root / f"wren/photo{index}.png")
    with pytest.warns(UserWarning) as caught:
        after = read("folder", root).set_index("path")["split"]
    gone, new = (str(warning.message) for warning in caught)
    assert "1 of its 20 photos missing, first: crow/photo3.png" in gone
    assert "10 new photos appended: 8 train, 2 test" in new or "2 test, 8 train" in new
    kept = before.index.intersection(after.index)
    assert len(kept) == 19 and after.loc[kept].equals(before.loc[kept])
    assert (root / "split.csv").read_text().splitlines()[: len(lines)] == lines
    write_image(root / "crow/photo3.png")
    again = read("folder", root).set_index("path")["split"]
    assert again.loc[before.index].equals(before)


def test_split_saved_by_a_spreadsheet_is_read(tmp_path):
    root = write_folder(tmp_path, crow=3, wren=3)
    first = read("folder", root)
    text = (root / "split.csv").read_bytes()
    (root / "split.csv").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(read("folder", root), first)


def test_what_is_no_photo_is_left_out(tmp_path):
    root = write_folder(tmp_path, crow=3, wren=3)
    (root / "crow/folder.jpg").mkdir()
    (root / "crow/none.jpg").symlink_to("nowhere")
    (root / "crow/circle").symlink_to("..")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "wren/pipe.jpg")  # reading it would never end
    with pytest.warns(UserWarning, match="3 files left out: 3 that are no files"):
        assert len(read("folder", root)) == 6


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
    read("folder", root)
    change_line(root / "split.csv", line, text)
    before = (root / "split.csv").read_bytes()
    assert f"{root / 'split.csv'}:{line}: " in message(lambda: read("folder", root))
    assert (root / "split.csv").read_bytes() == before


def test_read_only_folder_still_works(tmp_path, monkeypatch):
    root = write_folder(tmp_path, crow=5, wren=5)

    def refuse(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match="split.csv: cannot be written .read-only.*not kept"):
        first = read("folder", root)
    with pytest.warns(UserWarning):
        pd.testing.assert_frame_equal(first, read("folder", root))


def test_folder_that_is_too_small(tmp_path):
    root = write_folder(tmp_path, crow=5)
    assert "1 class folders with photos; at least two" in message(lambda: read("folder", root))
    write_folder(root, owl=1, wren=1)
    found = message(lambda: read("folder", root))
    assert f"{root}/owl/photo0.png: the only photo of its class (2 such" in found
    write(root / "wren2/photo.txt")
    assert f"{root}/wren2: no photo" in message(lambda: read("folder", root))
    assert "no such folder" in message(lambda: read("folder", root / "nowhere"))
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
    assert "1 of 3 classes have no training image, first: owl" in message(
        lambda: read("folder", root)
    )


def test_val_is_the_test_split_where_there_is_no_other(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        write_folder(tmp_path / split, crow=count, wren=count)
    write(tmp_path / "logs/run.txt")
    with pytest.warns(UserWarning, match="train, val are used, not logs"):
        table = read_table("folder", tmp_path, 0.25)
    assert table["split"].value_counts().to_dict() == {"train": 6, "validation": 2, "test": 4}


def test_train_alone_is_no_split_and_classes_may_be_called_train(tmp_path):
    write_folder(tmp_path / "a/train", crow=3, wren=3)
    assert f"give {tmp_path}/a/train" in message(lambda: read("folder", tmp_path / "a"))
    table = read("folder", write_folder(tmp_path / "b", train=3, test=3, bus=3))
    assert sorted(set(table["class_name"])) == ["bus", "test", "train"]


@pytest.mark.parametrize(
    "train,test",
    [("Training", "Test"), ("Training", "Testing"), ("TRAIN", "dev"), ("training", "validation")]
    + [("training_set", "test_set"), ("trainset", "testset"), ("train_images", "val_images")],
)
def test_split_folders_of_other_names(tmp_path, train, test):
    write_folder(tmp_path / train, crow=3, wren=3)
    write_folder(tmp_path / test, crow=1, wren=1)
    table = read("folder", tmp_path)
    assert table["split"].value_counts().to_dict() == {"train": 6, "test": 2}
    assert sorted(set(table["class_name"])) == ["crow", "wren"]


@pytest.mark.parametrize("test", ["holdout", "test"])
def test_split_folders_do_not_become_classes(tmp_path, test):
    write_folder(tmp_path / "train", crow=3, wren=3)
    if test == "test":  # photos without class folders
        write_folder(tmp_path, test=3)
    else:
        write_folder(tmp_path / test, crow=1, wren=1)
    found = message(lambda: read("folder", tmp_path))
    names = ", ".join(sorted(["train", test]))
    assert f"{tmp_path}: {names} may be splits" in found and f"give {tmp_path}/train" in found
    assert not (tmp_path / "split.csv").exists()


def test_flat_split_folders_are_refused(tmp_path):
    write_folder(tmp_path, train=3, test=3)
    assert "test, train may be splits" in message(lambda: read("folder", tmp_path))


def test_folders_of_runs_and_empty_folders_are_no_classes(tmp_path):
    root = write_folder(tmp_path, crow=3, wren=3)
    write(root / "out/run/config.json", "{}")
    write_image(root / "out/run/figures/story.png")
    (root / "new/deep").mkdir(parents=True)
    write(root / "hidden/.lock")
    with pytest.warns(UserWarning) as caught:
        table = read("folder", root)
    told = {str(warning.message) for warning in caught}
    assert sorted(set(table["class_name"])) == ["crow", "wren"] and len(table) == 6
    for name, why in (("out", "it holds a run"), ("new", "it is empty"), ("hidden", "it is empty")):
        assert f"{root}/{name}: no class folder, {why}; move it elsewhere" in told


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_split_of_another_system_is_read(tmp_path, separator):
    root = write_folder(tmp_path, **{"cafe\u0301": 3, "wren": 3})
    rows = [("path", "split")]
    for name in ("caf\u00e9", "wren"):  # composed here, decomposed on the disk
        kinds = enumerate(("train", "val", "Test"))
        rows += [(f"{name}\\photo{index}.png", split) for index, split in kinds]
    lines = [separator.join(row) for row in rows]
    write(root / "split.csv", "\n".join(lines[:-1]) + "\n")
    with pytest.warns(UserWarning, match="1 new photos appended"):
        table = read("folder", root)
    assert table["split"].tolist()[:5] == ["train", "validation", "test", "train", "validation"]
    text = (root / "split.csv").read_text()
    assert text.startswith(f"path{separator}split\ncafe\u0301/photo0.png{separator}train\n")
    pd.testing.assert_frame_equal(read("folder", root), table)


def test_split_that_is_a_link_stays_one(tmp_path):
    root, kept = write_folder(tmp_path / "photos", crow=3, wren=3), tmp_path / "kept.csv"
    (root / "split.csv").symlink_to(kept)
    found = message(lambda: read("folder", root))
    assert f"{root}/split.csv: links to {kept}, which is missing" in found
    assert (root / "split.csv").is_symlink() and not kept.exists()
    write(kept, "path,split\ncrow/photo0.png,test\n")
    with pytest.warns(UserWarning, match="5 new photos appended"):
        table = read("folder", root)
    assert (root / "split.csv").is_symlink() and len(kept.read_text().splitlines()) == 7
    assert table["split"][0] == "test"


# ---------------------------------------------------------------- CSV files and COCO


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_of_labels(tmp_path, separator):
    root = write_folder(tmp_path, a=3, b=2)
    write(root / "split.csv", "of another reader")
    lines = ["path,class,split,top,left,bottom,right,group,photographer"]
    lines += ["a/photo0.png,wren,train,1,2,5,7.5,walk,Ann", "a\\photo1.png,wren,val,,,,,walk,"]
    lines += ["", "a/photo2.png,wren,test,,,,,,", "b/photo0.png,crow,Training,,,,,,Bob"]
    lines += ["b/photo1.png,NA,train,,,,,,"]
    text = "\n".join(lines).replace(",", separator) + "\n"
    write(root / "birds.tsv", text)
    table = read("csv", root)
    assert table["class_name"].tolist() == ["wren", "wren", "wren", "crow", "NA"]
    assert table["label"].tolist() == [2, 2, 2, 1, 0]
    assert table["split"].tolist() == ["train", "validation", "test", "train", "train"]
    assert table.loc[0, BOX_COLUMNS].tolist() == [1, 2, 5, 7.5]
    assert table.loc[1:, BOX_COLUMNS].isna().all(axis=None)
    assert table["group"].fillna("").tolist() == ["walk", "walk", "", "", ""]
    assert table["path"][1] == f"{root}/a/photo1.png"


@pytest.mark.parametrize("header", ['"","path","Class","split"', "number, path ,class , split"])
def test_a_header_may_have_quotes_and_spaces(tmp_path, header):
    """As R and people write it."""
    for name in "ab":
        write_image(tmp_path / f"{name}.png")
    write(tmp_path / "labels.csv", f'{header}\n"1","a.png","crow","train"\n2,b.png,wren,train\n')
    assert read("csv", tmp_path)["class_name"].tolist() == ["crow", "wren"]


def test_csv_without_splits_is_drawn_by_class(tmp_path):
    root = write_folder(tmp_path, a=10)
    rows = [f"a/photo{index}.png,{'crow' if index < 5 else 'wren'}" for index in range(10)]
    write(root / "labels.csv", "\n".join(["path,class", *rows]))
    write(root / "others.csv", "x")
    table = read("csv", root)
    assert (table["split"] == "test").groupby(table["class_name"]).sum().tolist() == [1, 1]


CSV_MISTAKES = {
    "header": (1, "file,class", "the first line must name path and class"),
    "fields": (3, "a/photo1.png", "expected 'path,class,split,top,left,bottom,right', found"),
    "no class": (3, "a/photo1.png,,test,,,,", "class_name is missing"),
    "no path": (3, ",crow,test,,,,", "path is missing; give a path"),
    "split": (3, "a/photo1.png,crow,tset,,,,", "split is 'tset'; use train, validation, test"),
    "half a split": (3, "a/photo1.png,crow,,,,,", "split is missing; use train, validation, test"),
    "pixels": (3, "a/photo1.png,crow,test,1,x,5,5", "left is 'x'; use pixels"),
    "half a box": (3, "a/photo1.png,crow,test,1,2,5,", "has no area"),
    "area": (3, "a/photo1.png,crow,test,5,1,2,9", "has no area"),
    "twice": (3, "./a/photo0.png,crow,test,,,,", "a/photo0.png a second time"),
}


@pytest.mark.parametrize("line,text,why", CSV_MISTAKES.values(), ids=CSV_MISTAKES.keys())
def test_mistake_in_a_csv_is_named_by_line(tmp_path, line, text, why):
    root = write_folder(tmp_path, a=3)
    lines = ["path,class,split,top,left,bottom,right", "a/photo0.png,crow,train,1,1,4,4"]
    lines += ["a/photo1.png,crow,test,1,1,4,4", "a/photo2.png,wren,train,,,,"]
    lines[line - 1] = text
    file = write(root / "labels.csv", "\n".join(lines))
    found = message(lambda: read("csv", root))
    assert f"{file}:{line}: " in found and why in found


def test_csv_that_cannot_be_chosen(tmp_path):
    root = write_folder(tmp_path, a=2)
    assert "CSV files here: none; name that of" in message(lambda: read("csv", root))
    for name in ("one.csv", "two.csv"):
        write(root / name, "path,class\n")
    assert "CSV files here: one.csv, two.csv; name" in message(lambda: read("csv", root))
    assert "two.csv" not in message(lambda: read("csv", write(root / "labels.csv").parent))


def coco(names, boxes, categories=("crow", "wren")):
    """COCO content: images by name, (image, category, box as x, y, width, height) per object."""
    return {
        "images": [{"id": 7 + i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": 7 + i, "category_id": c, "bbox": box} for i, c, box in boxes],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
    }


def test_coco(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    objects = [(0, 0, [1, 2, 3, 3]), (0, 1, [0, 0, 5, 2])]
    objects += [(2, 0, [1, 1, 2, 2]), (2, 1, [0, 0, 1, 1])]
    contents = {"instances_train2017": coco(names, objects), "captions_train2017": {}}
    contents["instances_val2017"] = coco(["d.png"], [(0, 1, [0, 0, 9, 9])])
    for name, content in contents.items():
        write(tmp_path / f"annotations/{name}.json", json.dumps(content))
    for name in names:
        write_image(tmp_path / "train2017" / name)
    write_image(tmp_path / "val2017/d.png")
    table = read("coco", tmp_path)
    assert table["path"].str.removeprefix(f"{tmp_path}/").tolist() == [
        "train2017/a.png",
        "train2017/c.png",
        "val2017/d.png",
    ]
    assert table["class_name"].tolist() == ["wren", "crow", "wren"]
    assert table["split"].tolist() == ["train", "train", "validation"]
    assert table[BOX_COLUMNS].to_numpy().tolist() == [[0, 0, 2, 5], [1, 1, 3, 3], [0, 0, 9, 9]]


def test_coco_with_a_folder_per_split(tmp_path):
    for folder, name in (("train", "a.png"), ("valid", "b.png"), ("test", "c.png")):
        content = coco([name, f"2{name}"], [(0, 0, [1, 1, 2, 2]), (1, 1, [1, 1, 2, 2])])
        write_image(tmp_path / folder / f"2{name}")
        write(tmp_path / folder / "_annotations.coco.json", json.dumps(content))
        write_image(tmp_path / folder / name)
    assert read("coco", tmp_path)["split"].tolist()[::2] == ["test", "train", "validation"]


def test_coco_mistakes(tmp_path):
    assert "no JSON file here" in message(lambda: read("coco", tmp_path))
    content = coco(["a.png"], [(0, 0, [1, 1, 0, 2])])
    file = write(tmp_path / "train.json", json.dumps(content))
    write_image(tmp_path / "a.png")
    found = message(lambda: read("coco", tmp_path))
    assert f"{file}: image 7: {tmp_path}/a.png: the box" in found and "has no area" in found
    content["annotations"][0]["category_id"] = 5
    write(file, json.dumps(content))
    assert "do not pair one to one by id" in message(lambda: read("coco", tmp_path))
    content["annotations"][0]["bbox"] = ["x"]
    write(file, json.dumps(content))
    assert f"{file}: cannot be read" in message(lambda: read("coco", tmp_path))


def test_coco_boxes_that_are_no_boxes(tmp_path):
    content = coco(["a.png", "b.png"], [(0, 0, [1, 1, 2, 2]), (1, 1, [1, 1])])
    root = tmp_path / "birds"
    for name in ("a.png", "b.png"):
        write_image(root / name)
    file = write(root / "train.json", json.dumps(content))
    assert f"{file}: image 8: {root}/b.png: the box" in message(lambda: read("coco", root))
    del content["annotations"][1]["bbox"]  # a class without a box
    write(file, json.dumps(content))
    assert read("coco", root)["top"].isna().tolist() == [False, True]


# ---------------------------------------------------------------- lists: what to leave out, groups


def test_excluded_photos_leave_the_table(tmp_path):
    root = write_folder(tmp_path, crow=10, wren=10)
    before = read("folder", root)
    write(root / "exclude.csv", "path;reason\ncrow\\photo3.png;twice\nowl/gone.png;blurred\n")
    with pytest.warns(UserWarning, match=r"exclude.csv: 1 of 20 images left out"):
        after = read("folder", root)
    assert set(before["path"]) - set(after["path"]) == {f"{root}/crow/photo3.png"}
    assert fingerprint(after) != fingerprint(before)
    kept = before.set_index("path").drop(f"{root}/crow/photo3.png")
    pd.testing.assert_frame_equal(after.set_index("path"), kept)


def test_a_class_may_be_left_out_as_a_whole(tmp_path):
    root = write_folder(tmp_path, crow=4, owl=3, wren=4)
    rows = [f"owl/photo{index}.png,no owls" for index in range(3)]
    write(root / "exclude.csv", "\n".join(["path,reason", *rows]))
    with pytest.warns(UserWarning, match="3 of 11 images left out"):
        table = read("folder", root)
    assert table.groupby("class_name")["label"].unique().map(list).to_dict() == {
        "crow": [0],
        "wren": [1],
    }


def test_a_list_may_not_leave_out_everything(tmp_path):
    root = write_folder(tmp_path, crow=2, wren=2)
    rows = [f"{name}/photo{index}.png,x" for name in ("crow", "wren") for index in range(2)]
    for left, lines in ((0, rows), (1, rows[:2])):
        file = write(root / "exclude.csv", "\n".join(["path,reason", *lines]))
        with pytest.warns(UserWarning, match=f"{file}: {len(lines)} of 4 images left out"):
            found = message(lambda: read("folder", root))
        assert found == f"{root}: images of {left} classes; at least two are needed"


def test_the_only_photo_of_a_class_may_be_left_out(tmp_path):
    root = write_folder(tmp_path, crow=4, owl=1, wren=4)
    assert "owl/photo0.png: the only photo of its class" in message(lambda: read("folder", root))
    write(root / "exclude.csv", "path,reason\nowl/photo0.png,no owls\n")
    for _ in range(2):  # split.csv is drawn, then read
        with pytest.warns(UserWarning, match="1 of 9 images left out"):
            table = read("folder", root)
        assert set(table["class_name"]) == {"crow", "wren"} and set(table["label"]) == {0, 1}


@pytest.mark.parametrize("name,column", [("exclude", "reason"), ("groups", "group")])
def test_lists_out_of_shape(tmp_path, name, column):
    root = write_folder(tmp_path, crow=4, wren=4)
    file = write(root / f"{name}.csv", "photo,stars\n")
    found = message(lambda: read("folder", root))
    assert f"{file}:1: the first line must be path,{column}; correct or move this file" in found
    write(file, f"path,{column}\ncrow/photo0.png,x\ncrow/photo0.png,y\n")
    assert f"{file}:3: expected a new path and {column}" in message(lambda: read("folder", root))


def test_lists_may_lie_elsewhere(tmp_path):
    root = write_folder(tmp_path / "photos", crow=4, wren=4)
    lists = tmp_path / "lists"
    found = message(lambda: read("folder", root, lists=str(lists)))
    assert f"{lists}: no such folder" in found
    write(lists / "exclude.csv", "path,reason\ncrow/photo0.png,dark\n")
    with pytest.warns(UserWarning, match="1 of 8 images left out"):
        table = read("folder", root, lists=str(lists))
    assert len(table) == 7 and (lists / "split.csv").exists() and not (root / "split.csv").exists()


def test_groups_stay_in_one_split(tmp_path):
    root = write_folder(tmp_path, crow=20, wren=20)
    rows = [f"{n}/photo{i}.png,{n} {i // 4}" for n in ("crow", "wren") for i in range(16)]
    write(root / "groups.csv", "\n".join(["path,group", *rows]))
    table = read_table("folder", root, 0.25, seed=1)
    assert (table.groupby("group")["split"].nunique() == 1).all() and table["group"].nunique() == 8
    shares = table.groupby("class_name")["split"].value_counts().unstack()
    assert shares["test"].between(2, 6).all() and shares["validation"].between(2, 6).all()
    for index in range(3):  # of a known group, and of none
        write_image(root / f"crow/new{index}.png")
    write(root / "groups.csv", "\n".join(["path,group", *rows, "crow/new0.png,crow 2"]))
    with pytest.warns(UserWarning, match="3 new photos appended"):
        again = read("folder", root)
    of_group = again[again["group"] == "crow 2"]
    assert len(of_group) == 5 and of_group["split"].nunique() == 1


# ---------------------------------------------------------------- readers of one's own


def own(tmp_path, body):
    """A reference to a reader whose body is given, and a root with images to read."""
    code = "import pandas as pd\n\n\ndef birds(root, **options):\n"
    write(tmp_path / "ideas.py", code + "".join(f"    {line}\n" for line in body.splitlines()))
    write_folder(tmp_path / "photos", crow=4, wren=4, owl=1)
    return f"{tmp_path}/ideas.py:birds", tmp_path / "photos"


NAMES = "files = sorted(root.rglob('*.png'))\nnames = [file.parent.name for file in files]\n"


def test_own_reader_with_all_columns(tmp_path):
    body = "files = sorted(root.rglob('*.png'))\nframe = pd.DataFrame({'path': files})\n"
    body += "frame['label'] = [3] * 4 + [2] + [9] * 4\nframe['class_name'] = list('ccccowwww')\n"
    body += "frame['split'] = ['train', 'train', 'val', 'test'] + ['train'] * 5\n"
    body += "frame['top'] = frame['left'] = 1\nframe['bottom'] = frame['right'] = 3.5\n"
    body += "frame.loc[2, ['top', 'left', 'bottom', 'right']] = float('nan')\n"
    table = read_table(*own(tmp_path, body + "return frame.assign(species='bird')"), 0.5)
    assert list(table.columns) == annotations.TABLE_COLUMNS
    assert table["label"].tolist() == [1] * 4 + [0] + [2] * 4
    assert table["split"].tolist() == ["train", "train", "validation", "test"] + ["train"] * 5
    assert (
        table.loc[0, BOX_COLUMNS].tolist() == [1, 1, 3.5, 3.5]
        and table.loc[2, BOX_COLUMNS].isna().all()
    )
    assert table["path"][4] == str(tmp_path / "photos/owl/photo0.png")


def test_own_reader_leaves_columns_out(tmp_path):
    body = NAMES + "paths = [str(file.relative_to(root)) for file in files]\n"
    body += "return pd.DataFrame({'path': paths, 'class_name': names})"
    reference, root = own(tmp_path, body)
    table = read(reference, root, test_fraction=0.5)
    assert table["label"].tolist() == [0] * 4 + [1] + [2] * 4 and table[BOX_COLUMNS].isna().all(
        axis=None
    )
    assert table["path"].map(os.path.isfile).all()
    assert (table["split"] == "test").groupby(table["class_name"]).sum().tolist() == [2, 0, 2]
    pd.testing.assert_frame_equal(read(reference, root, test_fraction=0.5), table)
    config = Config().replace(data=reference, root=str(root), test_fraction=0.5, seed=3)
    drawn = load_table(config.replace(validation_fraction=0.5))
    assert (drawn["split"] == "test").equals(table["split"] == "test")
    assert (drawn["split"] == "validation").sum() == 2
    body = NAMES + "return pd.DataFrame({'path': files, 'label': [len(name) for name in names]})"
    table = read(*own(tmp_path / "labels", body))
    assert table["class_name"].tolist() == ["4"] * 4 + ["3"] + ["4"] * 4
    assert table["label"].tolist() == [1] * 4 + [0] + [1] * 4


WRONG = {
    "nothing": ("return None", "this one returned a NoneType"),
    "no rows": ("return pd.DataFrame({'path': [], 'label': []})", "returned 0 rows of ['label', "),
    "no label": ("return pd.DataFrame({'path': ['a']})", "1 rows of ['path']"),
    "path": ("return pd.DataFrame({'path': ['a', 3], 'label': 0})", "row 1: path is '3'"),
    "label": (
        "return pd.DataFrame({'path': ['a', 'b'], 'label': [0, .5]})",
        "row 1: label is '0.5'",
    ),
    "no number": ("return pd.DataFrame({'path': ['a'], 'label': ['x']})", "row 0: label is 'x'"),
    "minus": ("return pd.DataFrame({'path': ['a'], 'label': [-1]})", "row 0: label is '-1'"),
    "name": (
        "return pd.DataFrame({'path': ['a', 'b'], 'class_name': ['c', None]})",
        "row 1: class_name is missing",
    ),
    "names": (
        "return pd.DataFrame({'path': ['a', 'b'], 'label': [0, 0], 'class_name': ['c', 'd']})",
        "give one name to each label",
    ),
    "split": (
        "return pd.DataFrame({'path': ['a'], 'label': [0], 'split': ['tset']})",
        "row 0: split is 'tset'; use train, validation, test",
    ),
    "pixels": (
        "return pd.DataFrame({'path': ['a'], 'label': [0], 'top': ['x']})",
        "is 'x'; use pix",
    ),
    "box": (
        "return pd.DataFrame({'path': ['a'], 'label': 0, 'top': 1, 'left': 1, 'bottom': 1})",
        "row 0: ",
    ),
    "twice": ("return pd.DataFrame({'path': ['a', './a'], 'label': 0})", "a second time"),
    "train": (
        "return pd.DataFrame({'path': ['crow/photo0.png'], 'label': 0, 'split': 'test'})",
        "1 of 1 classes have no training image",
    ),
    "missing": ("return pd.DataFrame({'path': ['a', 'b'], 'label': 0})", "images found: 0 of"),
    "one class": (
        NAMES + "return pd.DataFrame({'path': files, 'class_name': 'crow'})",
        "images of 1 classes; at least two are needed",
    ),
}


@pytest.mark.parametrize("body,why", WRONG.values(), ids=WRONG.keys())
def test_own_reader_that_is_wrong(tmp_path, body, why):
    reference, root = own(tmp_path, body)
    found = message(lambda: read(reference, root))
    assert why in found and ("ideas.py:birds" in found or str(root) in found)


def test_a_configuration_passes_what_readers_take(tmp_path):
    root = write_cub(tmp_path / "cub", train=3)
    (root / "images/001.Crow/Crow_0000.jpg").unlink()
    config = Config().replace(data="cub", root=str(root), validation_fraction=0.5)
    assert "allow_missing=true" in message(lambda: load_table(config))
    with pytest.warns(UserWarning, match="4 of 4 test, 5 of 6 train"):
        table = load_table(config.replace(allow_missing=True))
    assert table["split"].value_counts().to_dict() == {"test": 4, "train": 2, "validation": 3}
    root = write_folder(tmp_path / "own", crow=10, wren=10)
    config = config.replace(data="folder", root=str(root), test_fraction=0.4)
    assert (load_table(config)["split"] == "test").sum() == 8


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


def draw(keys, labels, fraction, seed, groups=None):
    table = pd.DataFrame({"label": labels, "group": groups or [None] * len(keys)}, dtype=object)
    return datasets._draw(table.astype({"group": str}), keys, fraction, seed)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_draw_takes_its_share_of_every_class(labels, fraction, seed):
    keys = [f"image {row}" for row in range(len(labels))]
    drawn = draw(keys, labels, fraction, seed)
    for label in set(labels):
        of_class = np.array(labels) == label
        count, taken = of_class.sum(), drawn[of_class].sum()
        assert taken == min(max(int(fraction * count + 0.5), 1), count - 1)
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = draw([keys[i] for i in order], np.array(labels)[order], fraction, seed)
    assert (shuffled == drawn[order]).all()


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=40),
    st.sampled_from([0.1, 0.2, 0.5]),
)
@settings(max_examples=30, deadline=None)
def test_draw_keeps_groups_together(images, fraction):
    labels = [label for label, _ in images]
    groups = [f"{label}-{group}" for label, group in images]
    keys = [f"image {row}" for row in range(len(images))]
    drawn = draw(keys, labels, fraction, 3, groups)
    for label in set(labels):
        of_class = {g for row, g in enumerate(groups) if labels[row] == label}
        taken = {g for row, g in enumerate(groups) if labels[row] == label and drawn[row]}
        left = {g for row, g in enumerate(groups) if labels[row] == label and not drawn[row]}
        assert not taken & left and left and bool(taken) == (len(of_class) > 1)
    backwards = draw(keys[::-1], labels[::-1], fraction, 3, groups[::-1])
    assert (backwards[::-1] == drawn).all()


def test_draw_takes_about_its_share_of_images_in_groups():
    sizes = np.random.default_rng(0).integers(1, 6, 60)
    groups = [f"walk {number}" for number, size in enumerate(sizes) for _ in range(size)]
    drawn = draw(groups, [0] * len(groups), 0.25, 0, groups)
    assert drawn.mean() == pytest.approx(0.25, abs=0.02)


def test_draw_is_the_documented_hash():
    keys = ["a", "b", "c", "d"]
    lowest = min(keys, key=lambda key: hashlib.sha256(f"9/{key}".encode()).digest())
    assert draw(keys, [0] * 4, 0.25, 9).tolist() == [key == lowest for key in keys]


def test_diagnostic_set_is_drawn_once(tmp_path, monkeypatch):
    drawn = []
    write_set = datasets.preparation("diagnostic")
    monkeypatch.setattr(write_set, "write_diagnostic_set", lambda r: drawn.append(write_cub(r)))
    for _ in range(2):
        assert len(read_table("diagnostic", tmp_path / "new")) == 12
    assert drawn == [tmp_path / "new"]
    write(tmp_path / "other/file.txt")
    assert "no images.txt here" in message(lambda: read_table("diagnostic", tmp_path / "other"))


def test_read_table_refuses(tmp_path):
    assert "choose one of diagnostic, folder, csv, coco, cub" in message(
        lambda: read_table("cubs", tmp_path)
    )
    assert "takes numbers 0 to 0.5" in message(lambda: read_table("cub", tmp_path, 1))


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


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_large_lists_load_fast_and_small(tmp_path):
    """As many lines as NABirds has; memory of the whole process, pandas and scipy included."""
    names = [f"{label:04d}" for label in range(555)]
    write_cub(tmp_path, names, train=48, test=40, images=False)
    code = (
        "import sys, time; from ramslib.data import annotations, readers; "
        "start = time.process_time(); "
        "found = readers.read_cub(sys.argv[1]); "
        "table = annotations.complete_table(found, sys.argv[1], 'nabirds'); "
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
        layout = "cub" if name == "nabirds" else name
        assert reader.__doc__ and reader.__name__ == f"read_{layout}"
