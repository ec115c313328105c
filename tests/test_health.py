"""The health of a dataset: planted problems are found, and nothing else; no photo is touched."""

import hashlib
import io
import os

import numpy as np
import pandas as pd
import pytest
from layouts import write, write_cub, write_image
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tiny import draw_photos, tiny_config

from ramslib.__main__ import main
from ramslib.data import health, readers
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.datasets import read_table
from ramslib.data.health import (
    describe,
    describe_boxes,
    describe_parts,
    find_problems,
    load_parts,
    measure_images,
    suspicious_labels,
    write_fixes,
)
from ramslib.errors import InputError
from ramslib.training.trainer import train

CANON, MAKE, EXIF, TAKEN = "Canon", 0x010F, 0x8769, 0x9003


def photo(seed, size=(160, 120)):
    """A picture of soft shapes, another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def draw(root, seeds, quality=90, **options):
    """Write photos by relative path and seed; returns the root."""
    for path, seed in seeds.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        photo(seed).save(root / path, quality=quality, **options)
    return root


def birds(root, count=8):
    """A folder of two classes with given splits, all photos different."""
    names = [
        f"{split}/{name}/{name}{index}.jpg"
        for split in ("train", "test")
        for name in ("crow", "wren")
        for index in range(count)
    ]
    return draw(root, {path: seed for seed, path in enumerate(names)})


def problems_of(root, data="folder", **settings):
    return find_problems(measure_images(read_table(data, root, 0, **settings)))


def of(problems, kind):
    """Names and place of a kind of problem, sorted."""
    rows = problems[problems["kind"] == kind].itertuples()
    return sorted((os.path.basename(row.path), row.across) for row in rows)


def hashes(root):
    return {p: hashlib.sha256(p.read_bytes()).digest() for p in root.rglob("*.jpg")}


def message(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- single images


def test_sound_photos_have_no_problem(tmp_path):
    problems = problems_of(birds(tmp_path))
    assert set(problems["kind"]) == {"few to test"}  # 16 in all
    assert problems["detail"].tolist() == ["16 test images: accuracy is known to 24 points"]


def test_bodies_are_decoded(tmp_path):
    root = birds(tmp_path)
    for name, share in (("crow0", 0.9), ("crow1", 0.2)):
        file = root / f"train/crow/{name}.jpg"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    write(root / "test/wren/wren3.jpg", "<html>")
    problems = problems_of(root)
    found = of(problems, "unreadable")
    assert found == [("crow0.jpg", ""), ("crow1.jpg", ""), ("wren3.jpg", "")]
    details = problems[problems["kind"] == "unreadable"].set_index("path")["detail"]
    assert "truncated" in details[str(root / "train/crow/crow0.jpg")]
    assert "not an image" in details[str(root / "test/wren/wren3.jpg")]


def test_small_odd_and_blank_images(tmp_path):
    root = birds(tmp_path)
    photo(90, (15, 40)).save(root / "train/crow/small.png")
    photo(91, (400, 90)).save(root / "train/crow/long.png")
    Image.new("RGB", (60, 60), "gray").save(root / "train/crow/blank.png")
    photo(94).save(root / "train/crow/phone.jpg", "MPO", save_all=True, append_images=[photo(95)])
    frames = [photo(92), photo(93)]
    frames[0].save(root / "train/crow/film.gif", save_all=True, append_images=frames[1:])
    problems = problems_of(root)
    assert of(problems, "smaller than a patch") == [("small.png", "")]
    assert of(problems, "odd") == [("blank.png", ""), ("film.gif", ""), ("long.png", "")]
    details = set(problems[problems["kind"] == "odd"]["detail"])
    assert details == {"blank", "2 frames", "90 x 400 pixels"}
    table = measure_images(read_table("folder", root, 0))
    assert of(find_problems(table, "vit_base_patch14_dinov2"), "smaller than a patch") == []


def test_classes_too_small_and_unequal(tmp_path):
    seeds = {f"train/crow/{i}.jpg": i for i in range(22)} | {"train/wren/0.jpg": 30}
    seeds |= {"train/wren/1.jpg": 31, "test/wren/2.jpg": 32}
    seeds |= {f"test/crow/{i}.jpg": 40 + i for i in range(5)}
    problems = problems_of(draw(tmp_path, seeds)).set_index("kind")["detail"]
    assert problems["unequal classes"] == "2 to 22 training images"
    assert problems["few to test"].tolist()[0] == "wren: 1 test images"


# ---------------------------------------------------------------- images that belong together


def recompress(image):
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=20)
    return Image.open(packed)


def caption(image):
    copy = image.copy()
    ImageDraw.Draw(copy).rectangle((0, 110, 160, 120), "white")
    return copy


CHANGES = {
    "recompressed": recompress,
    "half the size": lambda image: image.resize((80, 60)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "gray": ImageOps.grayscale,
    "mirrored": ImageOps.mirror,
    "cropped": lambda image: image.crop((3, 2, 158, 118)),
    "turned": lambda image: image.rotate(2, Image.Resampling.BICUBIC),
    "with a caption": caption,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_near_duplicates(tmp_path, change):
    root = birds(tmp_path)
    change(Image.open(root / "test/crow/crow3.jpg")).save(root / "train/crow/copy.png")
    problems = problems_of(root)
    assert of(problems, "near duplicate") == [("copy.png", "splits"), ("crow3.jpg", "splits")]
    assert of(problems, "duplicate") == []


def test_many_photos_of_a_fixed_camera_are_one_scene(tmp_path):
    root, scene = birds(tmp_path), photo(99)
    for number in range(60):
        animal = scene.copy()
        place = 2 * number, number, 2 * number + 12, number + 10
        ImageDraw.Draw(animal).ellipse(place, (200, 3 * number, 60))
        folder = root / ("test" if number % 4 == 0 else "train") / ("crow", "wren")[number % 2]
        animal.save(folder / f"camera{number}.jpg")
    problems = problems_of(root)
    assert len(of(problems, "one scene")) == 60 and of(problems, "near duplicate") == []
    assert set(dict(of(problems, "one scene")).values()) == {"splits, classes"}
    table = measure_images(read_table("folder", root, 0))
    assert write_fixes(find_problems(table), table, root) == ["nothing to fix"]
    for number in range(30):
        (root / ("test" if number % 4 == 0 else "train") / ("crow", "wren")[number % 2]
         / f"camera{number}.jpg").unlink()  # fmt: skip
    assert len(of(problems_of(root), "near duplicate")) == 30


def test_duplicates_whatever_their_metadata(tmp_path):
    root = birds(tmp_path)
    data = (root / "test/crow/crow3.jpg").read_bytes()
    (root / "train/crow/a.jpg").write_bytes(data[:2] + b"\xff\xfe\x00\x06note" + data[2:])
    (root / "train/wren/b.jpg").write_bytes((root / "train/crow/crow1.jpg").read_bytes())
    (root / "train/crow/c.jpg").write_bytes((root / "train/crow/crow2.jpg").read_bytes())
    (root / "train/wren/d.jpg").write_bytes((root / "test/crow/crow5.jpg").read_bytes())
    problems = problems_of(root)
    assert of(problems, "duplicate") == [
        ("a.jpg", "splits"),
        ("b.jpg", "classes"),
        ("c.jpg", ""),
        ("crow1.jpg", "classes"),
        ("crow2.jpg", ""),
        ("crow3.jpg", "splits"),
        ("crow5.jpg", "splits, classes"),
        ("d.jpg", "splits, classes"),
    ]
    assert of(problems, "near duplicate") == []


def test_bursts_by_name(tmp_path):
    root = birds(tmp_path)
    names = ["IMG_1234", "IMG_1234_1", "IMG_1234 (2)", "IMG_1234 copy", "IMG_12345", "DSC_0001_7"]
    names += ["n02085620_7", "n02085620_10", "n02085620_199"]  # numbers of a whole series
    draw(root, {f"train/wren/{name}.jpg": 50 + i for i, name in enumerate(names)})
    draw(root, {"train/crow/IMG_1234_1.jpg": 70, "test/crow/DSC_0001.jpg": 71})
    draw(root, {"test/wren/DSC_0001.jpg": 72})
    assert of(problems_of(root), "burst") == [
        ("DSC_0001.jpg", "splits"),
        ("DSC_0001_7.jpg", "splits"),
        ("IMG_1234 (2).jpg", ""),
        ("IMG_1234 copy.jpg", ""),
        ("IMG_1234.jpg", ""),
        ("IMG_1234_1.jpg", ""),
    ]


def test_bursts_by_time_and_camera(tmp_path):
    root = birds(tmp_path)
    shots = [("train/crow/a", CANON, "10:00:00"), ("test/crow/b", CANON, "10:00:02")]
    shots += [("train/crow/c", CANON, "10:00:09"), ("train/crow/d", "Nikon", "10:00:03")]
    shots += [("train/wren/e", CANON, "10:00:01"), ("train/crow/f", CANON, "00:00:00")]
    shots += [("train/crow/g", CANON, "00:00:00"), ("train/crow/h", CANON, "nonsense")]
    for number, (path, make, time) in enumerate(shots):
        exif = Image.Exif()
        exif[MAKE] = make
        exif.get_ifd(EXIF)[TAKEN] = f"2024:05:01 {time}"
        draw(root, {f"{path}.jpg": 50 + number}, exif=exif)
    draw(root, {f"train/wren/PXL_20240501_1000{s}.jpg": 70 + s for s in (10, 12, 30)})
    assert of(problems_of(root), "burst") == [
        ("PXL_20240501_100010.jpg", ""),
        ("PXL_20240501_100012.jpg", ""),
        ("a.jpg", "splits"),
        ("b.jpg", "splits"),
    ]


def test_given_groups_across_splits(tmp_path):
    root = draw(tmp_path, {f"{number}.jpg": number for number in range(6)})
    rows = ["0.jpg,crow,train,walk", "1.jpg,crow,test,walk", "2.jpg,crow,train,walk"]
    rows += ["3.jpg,wren,train,home", "4.jpg,wren,train,home", "5.jpg,wren,test,"]
    write(root / "labels.csv", "\n".join(["path,class,split,group", *rows]))
    found = of(problems_of(root, "csv"), "group")
    assert found == [(f"{number}.jpg", "splits") for number in range(3)]


# ---------------------------------------------------------------- labels


def test_suspicious_labels_by_confident_learning():
    rng, classes, images = np.random.default_rng(0), 4, 120
    probabilities = rng.dirichlet(np.ones(classes) / 2, images)
    predicted, paths = probabilities.argmax(axis=1), [f"photos/{row}.jpg" for row in range(images)]
    labels = np.where(rng.random(images) < 0.8, predicted, rng.integers(4, size=images))
    held = pd.DataFrame({"path": paths, "label": labels, "prediction": predicted})
    held["confidence"] = probabilities.max(axis=1)
    held["true_probability"] = probabilities[np.arange(images), labels]
    wanted = []
    usual = [probabilities[labels == k, k].mean() for k in range(classes)]
    for row, (own, top) in enumerate(zip(labels, predicted, strict=True)):
        doubted = probabilities[row, own] < usual[own]
        if doubted and top != own and probabilities[row, top] >= usual[top]:
            wanted.append((probabilities[row, own], row, f"bird {own}, or rather bird {top}"))
    table = pd.DataFrame({"path": paths, "label": labels})
    table["class_name"] = "bird " + table["label"].astype(str)
    found = suspicious_labels(table, held.sample(frac=1, random_state=0))
    assert len(wanted) > 5
    assert list(found.items()) == [(row, text) for _, row, text in sorted(wanted)]
    assert len(suspicious_labels(table.iloc[:3], held)) <= 3  # others were left out since


# ---------------------------------------------------------------- lists that solve problems


def plant(root):
    """Problems of every kind that has a list; returns the names that are to be left out."""
    first = root / "train/crow/crow0.jpg"
    first.write_bytes(first.read_bytes()[:800])
    for name, source in (("test/crow/crow1", "leak"), ("train/crow/crow2", "again")):
        copy = (root / f"{name}.jpg").read_bytes()
        (root / f"train/crow/{source}.jpg").write_bytes(copy)
    (root / "train/wren/label.jpg").write_bytes((root / "train/crow/crow3.jpg").read_bytes())
    photo(0, (80, 60)).save(root / "train/crow/x.png")
    ImageOps.mirror(Image.open(root / "test/wren/wren4.jpg")).save(root / "train/wren/near.png")
    ImageOps.mirror(Image.open(root / "train/wren/wren5.jpg")).save(root / "train/wren/pair.png")
    draw(root, {"train/crow/IMG_0007_1.jpg": 80, "train/crow/IMG_0007_2.jpg": 81})
    draw(root, {"test/wren/IMG_0008_1.jpg": 82, "train/wren/IMG_0008_2.jpg": 83})
    out = "crow0.jpg leak.jpg crow2.jpg crow3.jpg label.jpg near.png IMG_0008_2.jpg"
    return set(out.split())


def test_fixes_are_lists_and_solve_what_they_can(tmp_path):
    root = birds(tmp_path)
    wanted = plant(root)
    before = hashes(root)
    table = measure_images(read_table("folder", root, 0.2))
    lines = write_fixes(find_problems(table), table, root)
    assert lines == [f"{root}/exclude.csv: 7 images added", f"{root}/groups.csv: 4 images added"]
    excluded = pd.read_csv(root / "exclude.csv").set_index("path")["reason"]
    assert {os.path.basename(path) for path in excluded.index} == wanted
    assert excluded["train/crow/leak.jpg"] == "duplicate of test/crow/crow1.jpg"
    assert excluded["train/crow/crow0.jpg"] == "unreadable"
    assert excluded["train/crow/crow3.jpg"] == "duplicate of train/wren/label.jpg"
    assert excluded["train/wren/label.jpg"] == "duplicate of train/crow/crow3.jpg"
    assert hashes(root) == before
    with pytest.warns(UserWarning, match="7 of 42 images left out"):
        table = measure_images(read_table("folder", root, 0.3))
    left = find_problems(table)
    assert set(left["across"]) == {""} and set(left["kind"]) == {"few to test"}
    groups = table.set_index("path")["group"]
    for one, other in (("wren/pair.png", "wren/wren5.jpg"), ("crow/IMG_0007_1", "crow/IMG_0007_2")):
        paths = [f"{root}/train/{name}{'' if '.' in name else '.jpg'}" for name in (one, other)]
        assert groups[paths].nunique() == 1
    assert write_fixes(find_problems(table), table, root) == ["nothing to fix"]


def test_bursts_across_a_drawn_split_are_grouped_and_drawn_anew(tmp_path):
    seeds = {f"crow/{i}.jpg": i for i in range(8)} | {f"wren/{i}.jpg": 20 + i for i in range(8)}
    seeds |= {f"wren/IMG_0007_{i}.jpg": 50 + i for i in range(9)}
    root = draw(tmp_path, seeds)
    table = measure_images(read_table("folder", root, 0))
    problems = find_problems(table)
    assert set(problems[problems["kind"] == "burst"]["across"]) == {"splits"}
    assert write_fixes(problems, table, root) == [f"{root}/groups.csv: 9 images added"]
    (root / "split.csv").unlink()
    table = read_table("folder", root, 0.2)
    assert table[table["path"].str.contains("IMG_")]["split"].nunique() == 1


def test_a_list_of_somebody_else_is_refused(tmp_path):
    root = birds(tmp_path)
    plant(root)
    table = measure_images(read_table("folder", root, 0))
    file = write(root / "exclude.csv", "photo,stars\ncrow0.jpg,5\n")
    found = message(lambda: write_fixes(find_problems(table), table, root))
    assert f"{file}:1: the first line must be path,reason; correct or move this file" in found
    assert file.read_text() == "photo,stars\ncrow0.jpg,5\n" and not (root / "groups.csv").exists()


def test_lines_of_a_person_stay(tmp_path):
    root = birds(tmp_path)
    plant(root)
    write(root / "exclude.csv", "path;reason\ntest/crow/crow7.jpg;blurred\n")
    with pytest.warns(UserWarning, match="1 of 42"):
        table = measure_images(read_table("folder", root, 0))
    write_fixes(find_problems(table), table, root)
    lines = (root / "exclude.csv").read_text().splitlines()
    assert lines[:2] == ["path;reason", "test/crow/crow7.jpg;blurred"] and len(lines) == 9


# ---------------------------------------------------------------- before training


def test_a_training_starts_only_with_sound_images(tmp_path):
    config = tiny_config(draw_photos(tmp_path / "photos"))
    file = tmp_path / "photos/test/bird 1/2.png"
    file.write_bytes(file.read_bytes()[:900])
    found = message(lambda: train(config, tmp_path / "run"))
    assert found.startswith(f"1 of 39 images cannot be read, first: {file}") and "--fix" in found
    assert not (tmp_path / "run/config.json").exists()


# ---------------------------------------------------------------- the command


def test_the_command_describes_and_fixes(tmp_path, capsys):
    root = birds(tmp_path / "photos")
    plant(root)
    words = ["describe-data", "data=folder", f"root={root}"]
    assert main([*words, "--out", str(tmp_path / "found.csv"), "--fix"]) == 0
    told = capsys.readouterr().out
    assert "near duplicate across splits: 2 (groups: 1), first: " in told
    assert "unreadable: 1, first: " in told and f"{root}/exclude.csv: 7 images added" in told
    found = pd.read_csv(tmp_path / "found.csv")
    assert found.columns.tolist() == health.COLUMNS and "burst" in set(found["kind"])
    assert main([*words, "--out", str(tmp_path / "found.csv")]) == 2
    assert "found.csv exists" in capsys.readouterr().err


def test_the_command_reads_a_probe(tmp_path, capsys):
    root = birds(tmp_path / "photos")
    held = pd.DataFrame({"path": [f"train/crow/crow{i}.jpg" for i in range(4)], "label": 0})
    held["prediction"], held["true_probability"] = [0, 0, 0, 1], [0.9, 0.9, 0.9, 0.1]
    held["confidence"] = 0.9
    other = held.assign(path=[f"train/wren/wren{i}.jpg" for i in range(4)], label=1, prediction=1)
    held = pd.concat([held, other.assign(true_probability=0.8)])
    (tmp_path / "probe").mkdir()
    held.to_csv(tmp_path / "probe/out_of_sample.csv", index=False)
    words = ["describe-data", "data=folder", f"root={root}", "--probe"]
    assert main([*words, str(tmp_path / "probe")]) == 0
    assert f"suspicious label: 1, first: {root}/train/crow/crow3.jpg" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "none")]) == 2
    found = capsys.readouterr().err
    assert "out_of_sample.csv: cannot be read (" in found and "run ramslib probe first" in found


# ---------------------------------------------------------------- what a dataset holds


def cub(root, data="cub"):
    return measure_images(read_table(data, root, 0))


def change_line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def test_describe(tmp_path):
    root = write_cub(tmp_path)
    write_image(root / "images/001.Crow/Crow_0000.jpg", (80, 5))
    summary = describe(measure_images(read_table("cub", root, 0.25)))
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


def test_describe_boxes(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "bounding_boxes.txt", 1, "1 2.0 3.0 100.0 3.0")
    write(root / "images/001.Crow/Crow_0001.jpg", "no image")
    table = cub(root)
    boxes = describe_boxes(table)
    found = boxes.iloc[0]  # clipped to 6 x 3 pixels of 8 x 6
    wanted = {"area": 18 / 48, "height": 0.5, "width": 0.75, "aspect": 2.0, "y": 0.75, "x": 5 / 8}
    assert found.to_dict() == pytest.approx(wanted) and len(boxes) == 11
    none = table.assign(**dict.fromkeys(BOX_COLUMNS, np.nan))
    assert len(describe_boxes(none)) == 0 and describe(none)["box_share"].isna().all()
    assert len(describe_parts(none, load_parts("pets", root))) == 0


def test_a_box_outside_its_image_is_named_by_its_image(tmp_path):
    root = write_cub(tmp_path)
    change_line(root / "bounding_boxes.txt", 5, "5 8.0 1.0 5.0 5.0")
    found = message(lambda: describe(cub(root)))
    start = f"{root}/images/001.Crow/Crow_0004.jpg: the box"
    assert found.startswith(start) and "[1.0, 8.0, 6.0, 13.0]" in found
    assert "lies outside its image of [6, 8] pixels" in found


def test_describe_parts(tmp_path):
    root = write_cub(tmp_path)
    write(root / "parts/parts.txt", "1 back\n2 left wing\n")
    write(root / "parts/part_locs.txt", "1 1 5.0 6.0 1\n1 2 0.0 0.0 0\n3 2 7.0 8.0 1\n")
    table, parts = read_table("cub", root, 0), readers.read_parts(root)
    summary = describe_parts(table, parts)
    assert summary.index.tolist() == ["back", "left wing"]
    assert summary["visible"].tolist() == [1 / 12, 1 / 12]
    assert summary[["y", "x"]].to_numpy().tolist() == [[1.0, 4 / 3], [1.5, 2.0]]
    pd.testing.assert_frame_equal(load_parts("cub", root), parts)
