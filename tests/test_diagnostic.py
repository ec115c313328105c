"""The synthetic dataset: what a scene promises, and the files of the dataset."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ramslib.data.datasets import preparation
from ramslib.errors import InputError

write_diagnostic_set = preparation("diagnostic").write_diagnostic_set
SIGNS, draw_scene = preparation("scenes").SIGNS, preparation("scenes").draw_scene

SIZE = (120, 160)
SMALL = {"species": 3, "train_per_species": 2, "test_per_species": 1, "image_size": SIZE}
KEYS = st.integers(0, 10**6)


def scene(species, key, size=SIZE):
    return draw_scene(species, np.random.default_rng(key), size)


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def table(root, name):
    return [line.split() for line in (root / f"{name}.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_diagnostic_set(tmp_path_factory.mktemp("set") / "diagnostic", **SMALL)


# --- scenes ---


@settings(max_examples=15, deadline=None)
@given(KEYS)
def test_box_lies_in_the_image_and_holds_the_parts(key):
    image, (top, left, bottom, right), parts = scene(key % len(SIGNS), key)
    width, height = image.size
    assert 0.06 * height < top < bottom < 0.94 * height
    assert 0.06 * width < left < right < 0.94 * width
    assert 0.25 < np.sqrt((bottom - top) * (right - left) / (height * width)) < 0.56
    assert "mark" in parts
    for y, x in parts.values():
        assert top <= y <= bottom and left <= x <= right


@settings(max_examples=10, deadline=None)
@given(KEYS, st.integers(0, 7), st.integers(1, 7))
def test_species_differ_in_a_small_visible_mark_only(key, one, step):
    """The same key drawn as two species: equal outside the badge, different inside it."""
    size = (240, 320)
    first, second = (scene(species, key, size) for species in (one, (one + step) % len(SIGNS)))
    assert first.box == second.box and first.parts == second.parts
    difference = abs(np.asarray(first.image, int) - np.asarray(second.image, int)).max(axis=2)
    rows, columns = np.nonzero(difference > 25)
    assert len(rows) > 0, "the mark cannot be seen"
    y, x = first.parts["mark"]
    side = np.sqrt(difference.size)
    outside = np.hypot(*(np.argwhere(difference > 0) + 0.5 - (y, x)).T)
    assert outside.max() < 0.045 * side  # so the mark is at most 9 % of the side across


@pytest.mark.slow
def test_mark_is_about_five_percent_of_the_image_side():
    shares = []
    for key in range(24):
        one, other = (scene(species, key, (240, 320)).image for species in (0, 1))
        changed = np.argwhere(np.asarray(one) != np.asarray(other))[:, :2]
        shares.append(np.ptp(changed, axis=0).max() / np.sqrt(one.width * one.height))
    assert 0.035 < np.mean(shares) < 0.06
    assert 0.02 < min(shares) and max(shares) < 0.08


@pytest.mark.parametrize("sign", SIGNS)
def test_every_sign_has_the_same_ink_within_the_disc(sign):
    canvas = Image.new("L", (800, 800))
    for stroke in SIGNS[sign]:
        corners = [(400 + 400 * z.real, 400 + 400 * z.imag) for z in stroke.tolist()]
        ImageDraw.Draw(canvas).polygon(corners, fill=255)
    ink = np.argwhere(np.asarray(canvas) > 0)
    assert len(ink) / (np.pi * 400**2) == pytest.approx(0.28, abs=0.006)
    assert np.hypot(*(ink - 400).T).max() < 400


def test_color_pose_and_size_vary_within_a_species():
    scenes = [scene(0, key) for key in range(12)]
    boxes = np.array([s.box for s in scenes]) / np.array([s.image.size[::-1] * 2 for s in scenes])
    assert (boxes.std(axis=0) > 0.04).all()
    assert len({s.parts["beak"][1] > s.parts["tail"][1] for s in scenes}) == 2  # looks both ways
    assert len({s.image.size for s in scenes}) > 6
    means = [np.asarray(s.image).mean(axis=(0, 1)) for s in scenes]
    assert (np.std(means, axis=0) > 8).all()


def test_a_scene_draws_chance_from_its_generator_only():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    one, other = scene(1, 7), scene(1, 7)
    assert one.image.tobytes() == other.image.tobytes() and one[1:] == other[1:]
    assert (np.random.get_state()[1] == before).all()


# --- the set on disk ---


def test_layout_is_that_of_cub(root):
    images = table(root, "images")
    assert [row[0] for row in images] == [str(number) for number in range(1, 10)]
    assert all((root / "images" / path).is_file() for _, path in images)
    assert len(list(root.rglob("*.jpg"))) == len(images)
    classes = dict(table(root, "classes"))
    labels = dict(table(root, "image_class_labels"))
    assert list(classes.values())[0].startswith("001.") and len(classes) == 3
    assert all(Path(path).parent.name == classes[labels[number]] for number, path in images)
    sides = dict(table(root, "train_test_split"))
    for label in classes:
        split = [sides[number] for number, _ in images if labels[number] == label]
        assert (split.count("1"), split.count("0")) == (2, 1)


def test_boxes_and_part_locations_are_the_scenes(root):
    scenes = [
        scene(label, [0, label, train, index])
        for label in range(3)
        for train, index in ((1, 0), (1, 1), (0, 0))
    ]
    names = dict(table(root, "parts/parts"))
    places = table(root, "parts/part_locs")
    assert len(places) == len(scenes) * len(names)
    for number, x, y, width, height in table(root, "bounding_boxes"):
        drawn = scenes[int(number) - 1]
        top, left, bottom, right = drawn.box
        wanted = (left, top, right - left, bottom - top)
        assert [float(v) for v in (x, y, width, height)] == pytest.approx(wanted, abs=0.051)
    for number, part, x, y, visible in places:
        wanted = scenes[int(number) - 1].parts[names[part]]
        assert (float(y), float(x)) == pytest.approx(wanted, abs=0.051) and visible == "1"
    with Image.open(root / "images" / table(root, "images")[4][1]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", scenes[4].image.size)
        error = abs(np.asarray(image, int) - np.asarray(scenes[4].image, int)).mean()
    assert error < 6


def test_a_second_writing_is_equal_byte_for_byte(root, tmp_path):
    assert contents(write_diagnostic_set(tmp_path / "again", **SMALL)) == contents(root)


def test_larger_sets_hold_the_smaller(root, tmp_path):
    larger = SMALL | {"species": 4, "train_per_species": 3, "test_per_species": 2}
    files = contents(write_diagnostic_set(tmp_path / "larger", **larger))
    pictures = {name: data for name, data in contents(root).items() if name.endswith(".jpg")}
    assert pictures and pictures.items() <= files.items()


def test_seeds_give_other_scenes(root, tmp_path):
    files = contents(write_diagnostic_set(tmp_path / "other", **SMALL, seed=1))
    assert all(files[name] != data for name, data in contents(root).items() if "jpg" in name)


def test_a_second_call_finds_the_set_and_draws_nothing(root):
    steps = []
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_diagnostic_set(str(root), **SMALL, progress=lambda *step: steps.append(step))
    assert steps == [] and stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_progress_counts_every_scene_and_an_empty_folder_is_filled(tmp_path):
    steps = []
    wanted = SMALL | {"species": 2, "train_per_species": 1}
    write_diagnostic_set(tmp_path, **wanted, progress=lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_other_parameters_are_refused_and_nothing_is_overwritten(root):
    before = contents(root)
    with pytest.raises(
        InputError, match="seed 0 instead of 5; name a new folder or delete"
    ) as told:
        write_diagnostic_set(root, **SMALL | {"seed": 5, "test_per_species": 9})
    assert "test_per_species 1 instead of 9" in str(told.value) and str(root) in str(told.value)
    assert "train_per_species" not in str(told.value) and "\n" not in str(told.value)
    assert contents(root) == before


@pytest.mark.parametrize("text", [None, "", "[1, 2]", "{", '"set"', "null"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, text):
    (tmp_path / "photo.jpg").write_text("mine")
    if text is not None:
        (tmp_path / "diagnostic.json").write_text(text)
    with pytest.raises(InputError, match="no synthetic dataset; name a new folder"):
        write_diagnostic_set(tmp_path, **SMALL)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_a_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="no synthetic dataset"):
        write_diagnostic_set(tmp_path / "file", **SMALL)


def test_an_interrupted_writing_leaves_nothing(tmp_path):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_diagnostic_set(tmp_path / "set", **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [{"species": 1}, {"species": 9}, {"train_per_species": 0}, {"image_size": (32, 64)}]
    + [{"test_per_species": 0}, {"seed": -1}],
)
def test_values_out_of_range_are_told(tmp_path, change):
    with pytest.raises(InputError, match="use 2 to 8 species") as told:
        write_diagnostic_set(tmp_path / "set", **SMALL | change)
    assert json.dumps(list(change)[0])[1:-1] in str(told.value) and not list(tmp_path.iterdir())
