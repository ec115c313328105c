"""The page, without a browser: widget values go in, images and messages come out."""

import base64
import dataclasses
import gc
import html
import io
import json
import re
import shutil
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from explorer_run import make_run
from PIL import Image

from ramslib import Explorer, ProposalSettings
from ramslib.__main__ import main
from ramslib.errors import InputError
from ramslib.explorer.gallery import ALL, PAGE
from ramslib.explorer.validation import images_of, sort_images

pytestmark = pytest.mark.slow

IDEAS = """
import torch
import ramslib

def upper_half(strength, threshold, recorded):
    h, w = recorded.grid
    return torch.tensor([[0, 0, h // 2, w]]).repeat(len(strength), 1)

def two_boxes(strength, threshold, recorded):
    h, w = recorded.grid
    both = torch.tensor([[0, 0, h // 2, w], [h // 2, 0, h, w]])
    return both.repeat(len(strength), 1, 1)

@ramslib.reads(blocks=1)
def token_norm(recorded):
    return recorded.tokens.norm(dim=-1) if recorded.tokens is not None else None

def broken(strength, threshold, recorded):
    return 1 / 0
"""


@pytest.fixture(autouse=True)
def trusted(monkeypatch, tmp_path):
    """A list of trusted code that is not the person's."""
    monkeypatch.setattr("ramslib.extensions.TRUSTED", tmp_path / "trusted")
    return tmp_path / "trusted"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Photos, and a folder with a finished run of two scales and one of a single scale."""
    folder = tmp_path_factory.mktemp("explorer")
    make_run(folder / "photos", folder / "runs" / "one", scales=1)
    make_run(folder / "photos", folder / "runs" / "two")
    return folder


@pytest.fixture
def ideas(tmp_path):
    """A file with strengths and proposals of one's own."""
    path = tmp_path / "ideas.py"
    path.write_text(IDEAS)
    return path


def open_explorer(*arguments, **options):
    """An explorer at rest, which answers quickly."""
    page = Explorer(*arguments, **options)
    page.worker.delay = 0.01
    page.worker.wait()
    return page


@pytest.fixture
def explorer(places):
    page = open_explorer("folder", places / "photos", places / "runs")
    assert messages_of(page) == ""
    return page


def text_of(widget):
    """What an HTML widget says, without tags."""
    return html.unescape(re.sub(r"<[^>]+>", " ", widget.value))


def messages_of(explorer):
    """All messages on the page."""
    return "\n".join(text_of(line.children[0]).strip() for line in explorer.messages.children)


def numbers_of(explorer):
    """The library's numbers for what the controls say."""
    region = explorer.inspector.region(0, explorer.controls.settings())
    return explorer.inspector.region_stats(region), region


def pixels(panel):
    """The image that a panel shows."""
    return np.asarray(Image.open(io.BytesIO(panel.image.value)))


def test_opens_a_run_of_several_scales_at_its_first_validation_image(explorer):
    assert explorer.loaded.name == "two"
    table = explorer.loaded.table
    assert explorer.inspector.path == table[table["split"] == "validation"]["path"].iloc[0]
    assert len(explorer.stage.children) == 1 and not explorer.rows[0].crop.is_outdated
    labels = [label for label, _ in explorer.models.options]
    assert any("scales=1" in label for label in labels) and "pre-trained" in labels[-1]


def test_the_menu_reports_the_best_checkpoint_at_its_last_output(places):
    results = places / "runs" / "two" / "results.csv"
    kept = results.read_text()
    table = pd.read_csv(results)
    table.loc[table["checkpoint"] == "last", "top1"] = 99.0
    best = table["checkpoint"] == "best"
    table.loc[best, "top1"] = [11.0, 12.0, 13.0, 14.0]
    table.to_csv(results, index=False)
    page = Explorer("folder", places / "photos", places / "runs")
    results.write_text(kept)
    label = next(label for label, value in page.models.options if value.endswith("two"))
    assert "14.0% at mean logits" in label and "best checkpoint" in page.models.tooltip


@pytest.mark.parametrize("threshold", [0.3, 1.2, 1.5])
def test_moved_slider_shows_the_librarys_mask_box_and_crop(explorer, threshold):
    row = explorer.rows[0]
    explorer.controls.thresholds[0].value = 4
    explorer.worker.wait()
    before = [panel.image.value for panel in (row.input, row.mask, row.crop)]
    explorer.controls.thresholds[0].value = threshold
    numbers, region = numbers_of(explorer)
    patches = f"{numbers['patches']} of 16 patches above {threshold:.2f}"
    assert patches in text_of(row.mask.note)
    assert f"{numbers['kept']} patches kept" in text_of(row.mask.note)
    box = f"y {numbers['top']:.0f}–{numbers['bottom']:.0f}, x {numbers['left']:.0f}–"
    assert box in text_of(row.crop.note)
    after = [panel.image.value for panel in (row.input, row.mask, row.crop)]
    assert [old != new for old, new in zip(before, after, strict=True)] == [True] * 3
    explorer.worker.wait()
    assert explorer.inspector.has_run(1, region.crop) and not row.crop.is_outdated


def test_mask_is_bright_where_the_component_is(explorer):
    explorer.controls.thresholds[0].value = 1.1
    _, region = numbers_of(explorer)
    side = pixels(explorer.rows[0].mask).shape[0] // 4
    shown = pixels(explorer.rows[0].mask).astype(float)
    plain = np.asarray(explorer.rows[0].base[1]).astype(float)
    for y in range(4):
        for x in range(4):
            inside = np.s_[y * side + 15 : (y + 1) * side - 15, x * side + 15 : (x + 1) * side - 15]
            share = shown[inside].mean() / plain[inside].mean()
            kept, strong = region.proposal.component[0, y, x], region.proposal.mask[0, y, x]
            assert share == pytest.approx(
                1 if kept else 140 / 255 if strong else 60 / 255, abs=0.05
            )


def test_class_probabilities_are_the_models_at_rest(explorer):
    explorer.controls.thresholds[0].value = 1.4
    explorer.worker.wait()
    inspector = explorer.inspector
    outputs = inspector.outputs(explorer.controls.settings())
    shown = inspector.probabilities(outputs)
    assert list(shown) == ["scale 1", "scale 2", "mean logits"]
    for values in shown.values():
        assert f"{float(values.max()):.3f}" in text_of(explorer.scores)


def test_a_next_scale_that_is_not_ready_says_so(explorer):
    explorer.controls.scales.value = 3
    explorer.worker.wait()
    explorer.worker.delay = 5
    second = explorer.rows[1]
    assert not second.heat.is_outdated and len(explorer.stage.children) == 2
    explorer.controls.thresholds[0].value = 3.9
    assert second.heat.is_outdated and "computing" in text_of(second.heat.note)
    assert "computing" in text_of(explorer.scores)
    explorer.worker.delay = 0.01
    explorer.controls.thresholds[0].value = 3.85
    explorer.worker.wait()
    assert not second.heat.is_outdated and "computing" not in text_of(explorer.scores)


@pytest.mark.parametrize("name", ["rollout_mean", "rollout_class", "single_block", "single_head"])
def test_every_control_redraws(explorer, name):
    heat = explorer.rows[0].heat.image.value
    explorer.controls.strength.value = name
    explorer.controls.block.value = 2
    assert explorer.rows[0].heat.image.value != heat
    numbers, _ = numbers_of(explorer)
    assert f"{numbers['patches']} of 16" in text_of(explorer.rows[0].mask.note)
    hidden = [c.layout.display == "none" for c in (explorer.controls.block, explorer.controls.head)]
    assert hidden == [not name.startswith("single"), name != "single_head"]
    explorer.controls.reset.click()
    assert explorer.controls.strength.value == "last_class"
    assert explorer.rows[0].heat.image.value == heat


def test_proposal_crop_source_and_opacity(explorer):
    row = explorer.rows[0]
    explorer.controls.proposal.value = "whole"
    assert "y 6–84, x 6–92" in text_of(row.crop.note), "the center crop of 90 x 98 pixels"
    sharp = row.crop.image.value
    explorer.controls.from_high_res.value = False
    assert row.crop.image.value != sharp
    explorer.controls.opacity.value = 0
    assert np.abs(pixels(row.heat).astype(int) - np.asarray(row.base[1])).mean() < 3


def test_annotated_boxes_are_drawn_and_scored(explorer, places):
    table = explorer.loaded.table.assign(top=20.0, left=30.0, bottom=70.0, right=90.0)
    boxed = dataclasses.replace(explorer.loaded, table=table, key="boxed")
    page = open_explorer("folder", places / "photos", places / "runs", boxed)
    numbers, _ = numbers_of(page)
    assert f"IoU {numbers['iou']:.2f}" in text_of(page.rows[0].crop.note)
    assert "annotated" in text_of(page.rows[0].input.note)
    plain = pixels(explorer.rows[0].input).astype(int)
    changed = np.abs(pixels(page.rows[0].input).astype(int) - plain).max(axis=2) > 60
    scale = plain.shape[0] / 90
    rows, columns = np.nonzero(changed)
    found = rows.min() / scale, columns.min() / scale, rows.max() / scale, columns.max() / scale
    assert found == pytest.approx((20, 30, 70, 90), abs=2)


def test_a_trained_threshold_beyond_the_slider_is_shown(places, tmp_path):
    run = make_run(places / "photos", tmp_path / "runs" / "far", threshold=6.5)
    page = open_explorer("folder", places / "photos", tmp_path / "runs", run)
    assert page.controls.settings().threshold(0) == 6.5 and "above 6.50" in text_of(
        page.rows[0].mask.note
    )


def test_filter_search_and_keyboard_choose_images(explorer):
    browser = explorer.browser
    browser.split.value = ALL
    assert len(browser.list.options) == len(explorer.loaded.table)
    browser.class_name.value = "bird 1"
    browser.search.value = "2.png"
    assert [label for label, _ in browser.list.options] == ["bird 1/2.png"] * 2
    browser.list.index = 1
    assert explorer.inspector.path == browser.shown["path"].iloc[1]
    assert explorer.inspector.label == 1
    browser.search.value = "no such image"
    assert browser.list.options == () and "0 images" in text_of(browser.count)


def upload(explorer, *files):
    """Give files to the upload button, as a browser does."""
    explorer.browser.source.value = "upload"
    items = [
        {"name": name, "type": "", "size": len(data), "content": memoryview(data)}
        | {"last_modified": pd.Timestamp.now()}
        for name, data in files
    ]
    explorer.browser.upload.value = items


def encoded(size, form="png", mode="RGB", color=100):
    data = io.BytesIO()
    Image.new(mode, size, color).save(data, form)
    return data.getvalue()


def test_own_photos_by_upload_and_folder(explorer, places, tmp_path):
    upload(
        explorer, ("mine.png", encoded((50, 40))), ("../../other.jpg", encoded((60, 40), "jpeg"))
    )
    assert explorer.inspector.path.endswith("mine.png") and explorer.inspector.label is None
    explorer.browser.list.index = 1
    assert explorer.inspector.path.endswith("other.jpg") and messages_of(explorer) == ""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "photo.webp").write_bytes(encoded((70, 80), "webp"))
    explorer.browser.source.value = "folder"
    explorer.browser.folder.value = str(tmp_path)
    assert explorer.inspector.path == str(tmp_path / "deep" / "photo.webp")
    assert "80 × 70 px" in text_of(explorer.rows[0].input.note)
    explorer.browser.folder.value = str(tmp_path / "nothing")
    assert "nothing: no image there" in messages_of(explorer)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no photo")
    explorer.browser.folder.value = str(tmp_path / "empty")
    assert "empty: no image there" in messages_of(explorer)
    assert explorer.inspector.path == str(tmp_path / "deep" / "photo.webp")
    explorer.browser.source.value = "dataset"
    assert explorer.inspector.path.startswith(str(places)) and messages_of(explorer) == ""


def test_two_uploads_of_one_name_are_two_images(explorer):
    upload(explorer, ("photo.png", encoded((50, 40), color=10)))
    first = explorer.inspector
    upload(explorer, ("photo.png", encoded((60, 40), color=200)))
    assert explorer.inspector is not first and explorer.inspector.size.tolist() == [[40, 60]]
    assert explorer.inspector.path != first.path
    explorer.browser.list.index = 1
    assert explorer.inspector.size.tolist() == [[40, 50]] and explorer.inspector.path == first.path


def test_home_is_understood_in_the_folder_box_and_as_root(places, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(places))
    page = open_explorer("folder", "~/photos", "~/runs", "~/runs/one")
    assert messages_of(page) == "" and page.loaded.name == "one" and len(page.table)
    page.browser.source.value = "folder"
    page.browser.folder.value = "~/photos/test"
    assert page.inspector.path.startswith(str(places / "photos" / "test"))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("text.jpg", b"this is no photo", "not an image"),
        ("notes.txt", b"this is no photo", "not an image"),
        ("empty.png", b"", "not an image"),
        ("dot.png", encoded((1, 1)), "less than one patch"),
        ("cut.jpg", encoded((300, 300), "jpeg")[:600], "Truncated"),
        ("huge.png", encoded((14000, 13500), mode="1"), "at most"),
    ],
)
def test_wrong_photos_are_messages_and_the_rest_keeps_working(explorer, name, data, words):
    before = explorer.inspector
    upload(explorer, (name, data))
    message = messages_of(explorer)
    assert words in message and name in message and "\n" not in message
    assert explorer.inspector is before
    test_moved_slider_shows_the_librarys_mask_box_and_crop(explorer, 1.2)
    assert messages_of(explorer) == message, "the complaint stays until another image is chosen"
    upload(explorer, ("good.png", encoded((50, 40))))
    assert messages_of(explorer) == ""


def test_a_photo_of_100_megapixels_opens(explorer):
    upload(explorer, ("large.jpg", encoded((10000, 10000), "jpeg", "L")))
    assert messages_of(explorer) == "" and "10000 × 10000" in text_of(explorer.rows[0].input.note)


def test_wrong_models_are_messages_and_the_rest_keeps_working(explorer, places):
    loaded = explorer.loaded
    for name in (str(places / "none"), "vit_no_such_thing", str(places / "photos")):
        explorer.other.value = name
        assert Path(name).name in messages_of(explorer) and explorer.loaded is loaded, name
        assert "rams-error" in explorer.messages.children[0].children[0].value
    explorer.controls.thresholds[0].value = 1.3
    numbers, _ = numbers_of(explorer)
    assert f"{numbers['patches']} of 16" in text_of(explorer.rows[0].mask.note)


def test_another_model_shows_the_same_image(explorer):
    explorer.browser.split.value = "test"
    explorer.browser.list.index = 3
    path = explorer.inspector.path
    explorer.models.value = next(v for label, v in explorer.models.options if "scales=1" in label)
    explorer.worker.wait()
    assert explorer.loaded.model.num_scales == 1 and explorer.inspector.path == path
    assert "scale 2" in text_of(explorer.rows[0].input.note)
    explorer.controls.scales.value = 1
    explorer.worker.wait()
    assert "scale 2" not in text_of(explorer.rows[0].input.note)
    assert "scale 2" not in text_of(explorer.scores)


def test_a_typed_model_is_not_the_menus_choice(explorer, places):
    two = explorer.models.value
    explorer.other.value = str(places / "runs" / "one")
    assert explorer.loaded.name == "one" and explorer.models.value is None
    explorer.models.value = two
    assert explorer.loaded.name == "two"


@pytest.mark.parametrize(("data", "words"), [("nope", "nope"), ("folder", "no such folder")])
def test_complaints_about_the_dataset_stay_until_they_are_closed(places, data, words):
    page = open_explorer(data, places / "none", places / "runs")
    assert words in messages_of(page) and page.inspector is not None
    page.other.value = str(places / "runs" / "one")
    page.browser.list.index = 1
    page.controls.thresholds[0].value = 2.0
    page.worker.wait()
    assert words in messages_of(page)
    page.messages.children[0].children[1].click()
    assert messages_of(page) == ""


def marker(panel):
    """Where a chart's marker is: share of the image's width."""
    return float(re.search(r"left: ([\d.]+)%", panel.marker.value)[1]) / 100


def test_the_threshold_curve_gets_a_marker_and_the_blocks_their_maps(explorer):
    curve, blocks = explorer.tabs.curve, explorer.tabs.views["blocks"].panels["blocks"]
    explorer.controls.thresholds[0].value = 1.0
    explorer.worker.wait()
    before, image = marker(curve), curve.image.value
    assert curve.key[1] and "computing" not in text_of(curve.note), "probabilities are there"
    explorer.controls.thresholds[0].value = 3.0
    assert marker(curve) > before
    explorer.worker.wait()
    assert curve.image.value == image, "the curve itself is not drawn again"
    explorer.tabs.selected_index = 1
    explorer.worker.wait()
    assert blocks.image.value and not blocks.is_outdated
    explorer.controls.strength.value = "rollout_mean"
    assert blocks.is_outdated
    explorer.worker.wait()
    assert not blocks.is_outdated


@pytest.fixture
def evaluated(explorer):
    """The explorer after evaluating the validation set."""
    explorer.tabs.selected_index = explorer.tabs.titles.index("validation set")
    if explorer.tabs.cached is None:
        assert "not evaluated yet" in text_of(explorer.tabs.state)
        assert explorer.tabs.start.description == "Evaluate validation set"
        explorer.tabs.start.click()
        explorer.tabs.worker.wait()
        explorer.worker.wait()
    assert explorer.tabs.cached is not None and messages_of(explorer) == ""
    return explorer


def test_an_evaluation_that_fails_can_be_started_again(explorer, tmp_path):
    explorer.out = tmp_path
    explorer.tabs.use()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    sound = explorer.loaded
    table = sound.table.assign(path=str(broken))
    explorer.loaded = dataclasses.replace(sound, table=table)
    explorer.tabs.start.click()
    explorer.tabs.worker.wait()
    assert "broken.png" in messages_of(explorer) and not explorer.tabs.start.disabled
    explorer.loaded = sound
    explorer.tabs.start.click()
    explorer.tabs.worker.wait()
    assert messages_of(explorer) == "" and explorer.tabs.cached is not None


def test_the_threshold_of_the_validation_set_answers_at_once(evaluated):
    evaluated.controls.thresholds[0].value = 1.5
    evaluated.worker.wait()
    tabs = evaluated.tabs
    text = text_of(tabs.effect.note)
    images = len(tabs.cached.strengths.table)
    assert f"threshold 1.50, {images} images" in text and "stored at threshold 1.50" in text
    stored = tabs.cached.accuracy.query("threshold == 1.5 and output == 'scale 2'")
    assert f"scale 2 {stored['top1'].item():.1f}%" in text
    evaluated.controls.strength.value = "single_head"
    assert tabs.effect.is_outdated and "stored" in text_of(tabs.effect.note)
    evaluated.controls.strength.value = "rollout_mean"
    assert "computing" in text_of(tabs.effect.note)
    evaluated.worker.wait()
    assert "IoU" not in text_of(tabs.effect.note), "these photos have no boxes"
    assert "share of the image" in text_of(tabs.effect.note)
    assert "accuracy" not in text_of(tabs.effect.note), "stored for the run's own strength"


def test_gallery_opens_images(evaluated):
    evaluated.tabs.selected_index = evaluated.tabs.titles.index("gallery")
    gallery = evaluated.tabs.gallery
    orders = sort_images(evaluated.tabs.cached)
    assert [label for label, _ in gallery.menu.options] == list(orders)
    for order, values in orders.items():
        gallery.menu.value = order
        assert gallery.images.paths == values.index.tolist()
        assert len(gallery.images.grid.children) == min(PAGE, len(values))
        cells = list(zip(gallery.images.grid.children, gallery.images.paths, strict=False))
        for cell, path in cells[:2]:
            cell.children[1].click()
            assert evaluated.inspector.path == path


def test_gallery_turns_pages(evaluated):
    images = evaluated.tabs.gallery.images
    paths = evaluated.loaded.table["path"].tolist()
    images.show(paths, ["" for _ in paths])
    assert images.page.max == -(-len(paths) // PAGE) > 1
    images.page.value = 2
    images.grid.children[0].children[1].click()
    assert evaluated.inspector.path == paths[PAGE]
    first = images.cells[0].children[0].value
    images.page.value = 1
    assert len(images.grid.children) == PAGE and images.cells[0].children[0].value != first
    images.show(paths[:2], ["", ""])
    assert images.page.layout.display == "none" and len(images.grid.children) == 2


def test_confusion_cells_open_their_images(evaluated):
    evaluated.tabs.selected_index = evaluated.tabs.titles.index("confusion")
    confusion, cached = evaluated.tabs.confusion, evaluated.tabs.cached
    confusion.menu.value = "scale 2"
    buttons = [w for w in confusion.matrix.children if getattr(w, "tooltip", None)]
    filled = [button for button in buttons if button.description]
    assert sum(int(b.description) for b in filled) == len(cached.strengths.table)
    for button in filled[:2]:
        button.click()
        assert len(confusion.images.paths) == int(button.description)
    confusion.images.grid.children[0].children[1].click()
    assert evaluated.inspector.path == confusion.images.paths[0]
    cells = [tuple(images_of(cached, t, g, "scale 2")) for t in range(3) for g in range(3)]
    assert tuple(confusion.images.paths) in cells


def test_cached_predictions_are_shown_at_once_when_the_page_opens_again(evaluated, places):
    again = Explorer("folder", places / "photos", places / "runs")
    assert again.tabs.cached is not None


def test_damaged_cached_predictions_are_computed_again(evaluated, places):
    stored = next((places / "runs" / "explorer").glob("validation-*"))
    whole = (stored / "strengths.safetensors").read_bytes()
    for name, data in (("strengths.safetensors", whole[:100]), ("predictions.csv", b"")):
        kept = (stored / name).read_bytes()
        (stored / name).unlink()  # the explorer may have the old file mapped into memory
        (stored / name).write_bytes(data)
        page = Explorer("folder", places / "photos", places / "runs")
        assert messages_of(page) == "" and page.tabs.cached is None
        (stored / name).write_bytes(kept)


def open_tab(explorer, title):
    """Bring a tab to the front and wait; returns it."""
    explorer.tabs.selected_index = explorer.tabs.titles.index(title)
    explorer.worker.wait()
    assert messages_of(explorer) == ""
    return explorer.tabs.views[title]


def test_a_patch_is_asked_by_a_click_or_by_text(explorer):
    tab = open_tab(explorer, "attention")
    field, shown = tab.pointer.field, tab.panels["tokens"].image
    assert field.value == "class 1" and list(field.options) == ["class 1", "class 2"]
    assert 'data-rows="4" data-columns="4"' in tab.pointer.area.value
    before = shown.value
    field.value = "2, 1"
    explorer.worker.wait()
    assert (
        shown.value != before and "inset: 50.00% 50.00% 25.00% 25.00%" in tab.pointer.marker.value
    )
    every, head = tab.panels["heads"], tab.controls["head"]
    every.field.value = "0, 1"
    assert head.value == 2 and tab.options() == {"token": [2, 1], "block": 6, "head": 2}
    explorer.worker.wait()
    for wrong, words in (("2", "give row, column"), ("9, 9", "row 9: there is none")):
        field.value = wrong
        explorer.worker.wait()
        assert words in messages_of(explorer)
    field.value = "3, 3"
    explorer.worker.wait()
    assert messages_of(explorer) == "" and not tab.panels["tokens"].is_outdated


def test_a_box_by_hand_starts_as_the_proposed_one_and_is_kept_for_its_image(explorer):
    tab = open_tab(explorer, "by hand")
    numbers, _ = numbers_of(explorer)
    sides = [numbers[side] for side in ("top", "left", "bottom", "right")]
    assert tab.options()["box"] == pytest.approx(sides, abs=0.5)
    tab.pointer.field.value = "10, 12, 60, 70"
    explorer.worker.wait()
    explorer.controls.thresholds[0].value = 1.4
    explorer.worker.wait()
    assert tab.options()["box"] == [10, 12, 60, 70]
    assert all(panel.image.value and not panel.is_outdated for panel in tab.panels.values())
    explorer.browser.list.index = 1
    explorer.worker.wait()
    assert tab.options()["box"] != [10, 12, 60, 70]


def test_a_map_of_elsewhere_stops_when_its_tab_is_left(explorer, monkeypatch):
    seen, steps = [], threading.Event()

    def slow(self, proposed):
        for number, _ in enumerate(proposed):
            seen.append(number)
            steps.set()
            yield 0.5
            time.sleep(0.02)

    monkeypatch.setattr("ramslib.inspector.Inspector.true_probabilities", slow)
    explorer.tabs.selected_index = explorer.tabs.titles.index("by hand")
    assert steps.wait(20)
    explorer.tabs.selected_index = explorer.tabs.titles.index("gallery")
    explorer.worker.wait()
    assert len(seen) < 64


def test_two_models_are_shown_with_the_same_controls(explorer):
    tab = open_tab(explorer, "compare")
    names = [value for _, value in tab.controls["other"].options]
    runs = [Path(name).name for name, *_ in names]
    assert {"one", "two"} <= set(runs) and {mark for _, mark, _ in names} == {"best", "last"}
    before = tab.panels["compare"].image.value
    assert Path(tab.controls["other"].value[0]).name != explorer.loaded.name
    tab.controls["other"].value = next(each for each in names if Path(each[0]).name == "two")
    explorer.worker.wait()
    assert tab.panels["compare"].image.value != before and messages_of(explorer) == ""


def test_images_that_only_one_of_two_models_gets_right(explorer):
    tab = open_tab(explorer, "compare")
    names = [value for _, value in tab.controls["other"].options]
    tab.controls["other"].value = next(e for e in names if Path(e[0]).name == "one")
    block = explorer.tabs.views["attention"].controls["block"]
    block.value = 1
    explorer.worker.wait()
    explorer.tabs.both.click()
    explorer.tabs.worker.wait()
    assert messages_of(explorer) == "" and not explorer.tabs.both.disabled
    pair = explorer.tabs.pair
    assert pair.layout.display is None and block.value == 1, "shown, and all controls are left"
    assert Path(tab.controls["other"].value[0]).name == "one" and explorer.tabs.cached is not None
    right = [
        {row.path for row in each.predictions.itertuples() if row.output == name and row.rank == 0}
        for each, name in zip(pair.cached, ("mean logits", "scale 1"), strict=True)
    ]
    only = right[0] - right[1], right[1] - right[0]
    for (side, _), expected in zip(pair.menu.options, only, strict=True):
        pair.menu.value = side
        assert set(pair.images.paths) == expected
    text = text_of(pair.images.caption)
    assert f"{len(only[0])} right in this model only, {len(only[1])} in the other only" in text
    folders = [str(each.folder) for each in pair.cached]
    shown = explorer.state()["views"]
    assert shown["differences"] == dict(zip(("stored", "other"), folders, strict=True))
    tab.controls["other"].value = next(e for e in names if Path(e[0]).name == "two")
    explorer.worker.wait()
    assert list(explorer.state()["views"]) == ["compare"] and pair.layout.display == "none"


def test_what_an_evaluation_was_doing_is_not_shown_after_its_error(explorer, monkeypatch):
    def fail(loaded, folder, log):
        log("predicting")
        raise InputError("a.jpg: no image")

    monkeypatch.setattr("ramslib.explorer.validation.predict_validation", fail)
    explorer.tabs.start.click()
    explorer.tabs.worker.wait()
    assert "a.jpg: no image" in messages_of(explorer) and text_of(explorer.tabs.state) == ""


def test_a_figure_is_saved_and_its_state_reopened(explorer, places):
    explorer.controls.thresholds[0].value = 1.3
    explorer.controls.strength.value = "single_head"
    explorer.controls.head.value = 2
    open_tab(explorer, "by hand").pointer.field.value = "10, 12, 60, 70"
    explorer.worker.wait()
    explorer.save.click()
    explorer.saver.wait()
    names = re.findall(r'download="([^"]+)"', explorer.saved.value)
    forms = ("png", "svg", "pdf", "csv")
    views = ("by hand", "elsewhere")
    assert names == ["state.json", *(f"{view}.{form}" for view in views for form in forms)]
    data = dict(re.findall(r'href="data:[^,]+;base64,([^"]+)">([^<]+)<', explorer.saved.value))
    found = {name: base64.b64decode(content) for content, name in data.items()}
    assert found["by hand.png"][:4] == b"\x89PNG" and found["by hand.pdf"][:4] == b"%PDF"
    ElementTree.fromstring(found["by hand.svg"])
    numbers = pd.read_csv(io.BytesIO(found["by hand.csv"])).set_index("output")
    assert numbers.loc["by hand", ["top", "left", "bottom", "right"]].tolist() == pytest.approx(
        [10, 12, 60, 70], abs=1e-3
    )
    code = html.unescape(
        re.search(r"<textarea[^>]*>(.*)</textarea>", explorer.saved.value, re.S)[1]
    )
    names = {}
    exec(code, names)
    again = names["numbers"]
    pd.testing.assert_frame_equal(again["by hand"].set_index("output"), numbers, rtol=1e-4)
    assert len(again["elsewhere"]) == 64
    other = open_explorer("folder", places / "photos", places / "runs", places / "runs" / "one")
    item = {"name": "state.json", "type": "", "size": 1, "content": memoryview(found["state.json"])}
    other.reopen.value = [item | {"last_modified": pd.Timestamp.now()}]
    other.worker.wait()
    assert messages_of(other) == "" and other.loaded.name == "two"
    assert json.dumps(other.state()) == json.dumps(explorer.state())


def test_figures_of_the_validation_images_are_saved(evaluated):
    stored, saved = {"stored": str(evaluated.tabs.cached.folder)}, {}
    for title in ("validation set", "gallery", "confusion"):
        evaluated.tabs.selected_index = evaluated.tabs.titles.index(title)
        evaluated.worker.wait()
        saved |= evaluated.state()["views"]
    order, output = evaluated.tabs.gallery.menu.value, evaluated.tabs.confusion.menu.value
    options = {"gallery": stored | {"order": order}, "confusion": stored | {"output": output}}
    assert saved == {"all thresholds": stored, "calibration": stored} | options
    evaluated.save.click()
    evaluated.saver.wait()
    names = re.findall(r'download="([^"]+)"', evaluated.saved.value)
    assert names == ["state.json", *(f"confusion.{form}" for form in ("png", "svg", "pdf", "csv"))]
    assert messages_of(evaluated) == ""


def test_states_that_are_none_are_messages(explorer):
    for content in (b"{", b"{}", json.dumps(explorer.state() | {"image": "none.png"}).encode()):
        item = {"name": "state.json", "type": "", "size": 1, "content": memoryview(content)}
        explorer.reopen.value = [item | {"last_modified": pd.Timestamp.now()}]
        assert messages_of(explorer) != ""
    wrong = explorer.state()
    wrong["widgets"]["proposal"] = "evil.py:run"
    item["content"] = memoryview(json.dumps(wrong).encode())
    explorer.reopen.value = [item | {"last_modified": pd.Timestamp.now()}]
    assert "not found" in messages_of(explorer) and "evil" not in str(explorer.controls.settings())


def test_moves_leave_nothing_behind(explorer):
    slider = explorer.controls.thresholds[0]

    def count(moves):
        for number in range(moves):
            slider.value = 0.05 + number % 60 * 0.05
            if number % 20 == 0:
                explorer.worker.wait()
        explorer.worker.wait()
        gc.collect()
        return len(gc.get_objects())

    count(60)
    before, threads = count(60), threading.active_count()
    assert count(120) - before < 60, "less than one object for two moves"
    assert threading.active_count() == threads


def test_unforeseen_errors_are_messages_until_they_are_over(explorer, monkeypatch):
    monkeypatch.setattr("ramslib.inspector.Inspector.region_stats", lambda *_: 1 / 0)
    explorer.controls.thresholds[0].value = 1.05
    assert "ZeroDivisionError" in messages_of(explorer)
    monkeypatch.undo()
    explorer.controls.thresholds[0].value = 1.1
    explorer.worker.wait()
    numbers, _ = numbers_of(explorer)
    assert f"{numbers['patches']} of 16" in text_of(explorer.rows[0].mask.note)
    assert messages_of(explorer) == ""


# functions of one's own


def test_further_strengths_and_proposals_are_offered(places, ideas):
    def middle(recorded):
        return torch.ones(len(recorded.image), *recorded.grid).index_fill(1, torch.tensor([0]), 0)

    own = {"strengths": [middle], "proposals": [f"{ideas}:upper_half", f"{ideas}:two_boxes"]}
    page = open_explorer("folder", places / "photos", places / "runs", **own)
    assert "middle" in dict(page.controls.strength.options)
    assert {"upper_half", "two_boxes"} <= set(dict(page.controls.proposal.options))
    page.controls.strength.value = middle
    assert "12 of 16 patches above 1.00" in text_of(page.rows[0].mask.note)
    page.controls.proposal.value = own["proposals"][0]
    page.worker.wait()
    assert page.inspector.region(0, page.controls.settings()).proposal.patch_boxes.tolist() == [
        [0, 0, 2, 4]
    ]
    page.controls.proposal.value = own["proposals"][1]
    page.worker.wait()
    assert "first of 2:" in text_of(page.rows[0].crop.note) and messages_of(page) == ""
    page.controls.scales.value = 3
    page.worker.wait()
    assert "first of 4:" in text_of(page.rows[1].crop.note) and messages_of(page) == ""
    assert int(text_of(page.rows[1].mask.note).split(" of 16")[0]) <= 16, "of the first alone"


def test_wrong_functions_are_messages_and_others_work(places, ideas):
    own = [f"{ideas}:broken", f"{ideas}:missing", "nowhere.py:mine"]
    page = open_explorer("folder", places / "photos", places / "runs", proposals=own)
    before = text_of(page.rows[0].mask.note)
    for choice, words in zip(own, ("ZeroDivisionError", "missing", "nowhere.py"), strict=True):
        page.controls.proposal.value = choice
        assert words in messages_of(page)
        page.controls.proposal.value = "attention"
        page.worker.wait()
        assert messages_of(page) == "" and text_of(page.rows[0].mask.note) == before


def test_a_run_offers_the_functions_that_it_was_trained_with(places, ideas, tmp_path):
    make_run(places / "photos", tmp_path / "runs" / "own", proposal=f"{ideas}:upper_half")
    page = open_explorer("folder", places / "photos", tmp_path / "runs")
    assert page.loaded.name == "own" and messages_of(page) == ""
    assert page.controls.proposal.label == "upper_half"
    assert "y 6–45, x 6–92" in text_of(page.rows[0].crop.note)
    page.tabs.selected_index = page.tabs.titles.index("validation set")
    page.tabs.start.click()
    page.tabs.worker.wait()
    page.worker.wait()
    assert messages_of(page) == "" and page.tabs.cached is not None
    assert "reads no more" in text_of(page.tabs.effect.note), "it reads the recorded scale"
    assert page.models.label.startswith("own (scales=2, strength=last_class,")
    own = [f"{ideas}:upper_half", f"{ideas}:two_quarters"]
    page = open_explorer("folder", places / "photos", tmp_path / "runs", proposals=own)
    *_, copy, original, other = page.controls.proposal.options
    assert copy[0].endswith(f"-{ideas.name}:upper_half"), "two of one name: whose they are"
    assert original == (f"{ideas.name}:upper_half", own[0]) and other == ("two_quarters", own[1])


def test_a_run_whose_code_is_not_trusted_is_not_offered(places, ideas, tmp_path, trusted):
    run = make_run(places / "photos", tmp_path / "runs" / "own", proposal=f"{ideas}:upper_half")
    trusted.write_text("")
    page = Explorer("folder", places / "photos", tmp_path / "runs", model=places / "runs" / "one")
    assert page.model == str(places / "runs" / "one")
    assert len(page.models.options) == 1 and messages_of(page) == ""
    assert f"ramslib trust {run}" in text_of(page.notice)
    page.other.value = str(run)
    assert f"ramslib trust {run}" in messages_of(page)


# threads


def test_handlers_may_be_called_from_any_thread(explorer):
    """ipykernel may run handlers in one thread and the next in another; both have own modes."""
    threads = [ThreadPoolExecutor(1) for _ in range(2)]
    modes = set()
    for number, threshold in enumerate((0.4, 0.9, 1.3, 1.7, 2.2, 0.6)):
        thread = threads[number % 2]
        thread.submit(torch.set_grad_enabled, number % 3 == 0).result()
        thread.submit(setattr, explorer.controls.thresholds[0], "value", threshold).result()
        modes.add(thread.submit(torch.is_grad_enabled).result())
        numbers, region = numbers_of(explorer)
        assert f"{numbers['patches']} of 16 patches above {threshold:.2f}" in text_of(
            explorer.rows[0].mask.note
        )
        assert not region.crop.requires_grad and region.strength.is_inference()
        explorer.worker.wait()
        assert all(not logits.requires_grad for logits in explorer.inspector.logits(2))
        thread.submit(setattr, explorer.browser.list, "index", number % 3).result()
        assert messages_of(explorer) == ""
    assert modes == {True, False}, "their own modes are left alone"
    counts = {thread.submit(torch.get_num_threads).result() for thread in threads}
    assert counts == {explorer.threads}


def test_work_on_the_image_before_does_not_reach_the_new_one(explorer):
    explorer.controls.thresholds[0].value = 1.4
    old = explorer.inspector
    started, go_on = threading.Event(), threading.Event()
    original = old.outputs

    def slow(settings):
        started.set()
        assert go_on.wait(20)
        return original(settings)

    old.outputs = slow
    explorer.controls.thresholds[0].value = 2.9
    assert started.wait(20)
    explorer.browser.list.index = 1
    new, before = explorer.inspector, text_of(explorer.rows[0].mask.note)
    assert new is not old
    go_on.set()
    explorer.worker.wait()
    assert text_of(explorer.rows[0].mask.note) == before and explorer.inspector is new
    region = new.region(0, explorer.controls.settings())
    assert new.has_run(1, region.crop) and messages_of(explorer) == ""


# runs


def test_app_is_a_command_that_refuses_what_is_no_run(tmp_path, capsys):
    assert main(["app", "--run", str(tmp_path), "--", "--no-browser"]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_can_be_named_and_is_then_chosen_in_the_menu(places, kind):
    run = kind(places / "runs" / "one")
    page = Explorer("folder", places / "photos", places / "runs", model=run)
    assert page.loaded.name == "one" and page.models.value == str(run)
    assert messages_of(page) == ""


@pytest.fixture
def runs(places, tmp_path):
    """A copy of a finished run, to be damaged."""
    shutil.copytree(places / "runs" / "two", tmp_path / "runs" / "damaged")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "not the folder of a run"),
        ("table.csv", "path", "damaged"),
        ("results.csv", "", "results.csv"),
        ("results.csv", "split,weights\ntest,last\n", "results.csv"),
    ],
)
def test_a_damaged_run_is_not_offered_and_the_others_are(places, runs, name, text, words):
    shutil.copytree(places / "runs" / "one", runs / "sound")
    (runs / "damaged" / name).write_text(text)
    page = Explorer("folder", places / "photos", runs, str(runs / "sound"))
    assert [label.split()[0] for label, _ in page.models.options[:-1]] == ["sound"]
    assert words in text_of(page.notice) and "not offered" in text_of(page.notice)
    assert messages_of(page) == "" and page.inspector is not None


def test_damaged_weights_are_a_message_and_another_model_works(places, runs):
    (runs / "damaged" / "best.safetensors").write_bytes(b"no weights")
    page = Explorer("folder", places / "photos", runs)
    assert "best.safetensors" in messages_of(page) and page.loaded is None
    page.controls.thresholds[0].value = 2.0
    page.controls.reset.click()
    page.other.value = str(places / "runs" / "two")
    assert messages_of(page) == "" and page.inspector is not None


def test_a_run_of_another_method_is_refused_in_words(places, tmp_path):
    run = make_run(places / "photos", tmp_path / "runs" / "fg", model="transfg")
    page = Explorer("folder", places / "photos", tmp_path / "runs", str(run))
    assert len(page.models.options) == 1, "no run is offered, a backbone is"
    assert "RAMS-Trans and plain ViT, not" in messages_of(page)
    assert "RAMS-Trans and plain ViT, not" in text_of(page.notice)


def test_images_that_were_moved_are_found_below_the_new_root(places, tmp_path):
    shutil.copytree(places / "photos", tmp_path / "photos")
    run = make_run(tmp_path / "photos", tmp_path / "runs" / "two")
    (tmp_path / "photos").rename(tmp_path / "moved")
    page = open_explorer("folder", tmp_path / "moved", tmp_path / "runs", run)
    assert messages_of(page) == "" and page.inspector.path.startswith(str(tmp_path / "moved"))


def test_names_that_images_share_are_distinguished(explorer):
    explorer.browser.split.value = ALL
    labels = [label for label, _ in explorer.browser.list.options]
    assert "bird 1/2.png" in labels and "2.png" not in labels


def test_settings_of_the_controls_are_those_of_the_model(explorer):
    trained = explorer.loaded.model.settings
    shown = explorer.controls.settings()
    assert isinstance(shown, ProposalSettings) and shown.functions == trained.functions
    assert shown.threshold(0) == trained.threshold(0) and shown.scales == trained.scales
