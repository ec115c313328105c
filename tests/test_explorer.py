"""The page, without a browser: widget values go in, pictures and messages come out."""

import gc
import html
import io
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from explorer_run import make_run
from nbformat import read
from PIL import Image

from ramslib.__main__ import main
from ramslib.evaluation import probabilities
from ramslib.explorer import Explorer
from ramslib.explorer.app import write_page
from ramslib.explorer.browser import ALL
from ramslib.explorer.components import BackgroundWorker, Chart, Panel, probability_bars
from ramslib.explorer.gallery import PAGE
from ramslib.explorer.looking import choose, follow, measure
from ramslib.explorer.validation import images_of, sort_images
from ramslib.plots import plot_threshold


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Photos, and a folder with a finished run of two scales and one of a single scale."""
    folder = tmp_path_factory.mktemp("explorer")
    make_run(folder / "photos", folder / "runs" / "one", scales=1)
    make_run(folder / "photos", folder / "runs" / "two")
    return folder


@pytest.fixture
def explorer(places):
    page = Explorer("folder", places / "photos", places / "runs")
    page.later.delay = 0.01
    page.later.wait()
    assert page.message.value == ""
    return page


def text_of(widget):
    """What an HTML widget says, without tags."""
    return html.unescape(re.sub(r"<[^>]+>", " ", widget.value))


def numbers_of(explorer):
    """The library's numbers for what the controls say."""
    choice = explorer.controls.choice()
    region = choose(explorer.lens, explorer.photo, explorer.seen[0], choice)
    return measure(explorer.lens, explorer.photo, region), region


def pixels(panel):
    """The picture that a panel shows."""
    return np.asarray(Image.open(io.BytesIO(panel.image.value)))


def test_opens_a_run_of_several_scales_at_its_first_validation_photo(explorer):
    assert explorer.lens.name == "two"
    table = explorer.lens.table
    assert explorer.photo.path == table[table["split"] == "validation"]["path"].iloc[0]
    assert len(explorer.seen) == 2 and len(explorer.stage.children) == 1
    labels = [label for label, _ in explorer.models.options]
    assert any("1 scale," in label for label in labels) and "pre-trained" in labels[-1]


@pytest.mark.parametrize("threshold", [0.3, 1.2, 1.5])
def test_moved_slider_shows_the_librarys_mask_box_and_crop(explorer, threshold):
    row = explorer.rows[0]
    explorer.controls.thresholds[0].value = 4
    explorer.later.wait()
    before = [panel.image.value for panel in (row.view, row.mask, row.crop)]
    explorer.controls.thresholds[0].value = threshold
    numbers, region = numbers_of(explorer)
    patches = f"{numbers['patches']} of 16 patches above {threshold:.2f}"
    assert patches in text_of(row.mask.note)
    assert f"{numbers['kept']} patches kept" in text_of(row.mask.note)
    box = f"y {numbers['top']:.0f}–{numbers['bottom']:.0f}, x {numbers['left']:.0f}–"
    assert box in text_of(row.crop.note)
    after = [panel.image.value for panel in (row.view, row.mask, row.crop)]
    assert [old != new for old, new in zip(before, after, strict=True)] == [True] * 3
    explorer.later.wait()
    assert torch.equal(explorer.seen[1].view, region.crop) and not row.crop.is_stale


def test_mask_picture_is_bright_where_the_component_is(explorer):
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
    explorer.later.wait()
    choice = explorer.controls.choice()
    seen = follow(explorer.lens, explorer.photo, explorer.seen[:1], choice)
    for values in probabilities([one.logits for one in seen]).values():
        assert f"{float(values.max()):.3f}" in text_of(explorer.scores)


def test_a_next_scale_that_is_not_ready_says_so(explorer):
    explorer.controls.scales.value = 3
    explorer.later.wait()
    explorer.later.delay = 5
    second = explorer.rows[1]
    assert not second.heat.is_stale and len(explorer.stage.children) == 2
    explorer.controls.thresholds[0].value = 3.9
    assert second.heat.is_stale and "computing" in text_of(second.heat.note)
    assert "computing" in text_of(explorer.scores)
    explorer.later.delay = 0.01
    explorer.controls.thresholds[0].value = 3.85
    explorer.later.wait()
    assert not second.heat.is_stale and "computing" not in text_of(explorer.scores)


@pytest.mark.parametrize("name", ["rollout_mean", "rollout_class", "single_block", "single_head"])
def test_every_control_redraws(explorer, name):
    heat = explorer.rows[0].heat.image.value
    explorer.controls.strength.value = name
    explorer.controls.block.value = 2
    assert explorer.rows[0].heat.image.value != heat
    numbers, _ = numbers_of(explorer)
    assert f"{numbers['patches']} of 16" in text_of(explorer.rows[0].mask.note)
    shown = explorer.controls.box.children
    assert (explorer.controls.block in shown) == name.startswith("single")
    assert (explorer.controls.head in shown) == (name == "single_head")
    explorer.controls.reset.click()
    assert explorer.controls.strength.value == "last_class"
    assert explorer.rows[0].heat.image.value == heat


def test_proposal_crop_source_and_opacity(explorer):
    row = explorer.rows[0]
    explorer.controls.proposal.value = "whole"
    assert "y 6–84, x 6–92" in text_of(row.crop.note), "the center crop of 90 x 98 pixels"
    sharp = row.crop.image.value
    explorer.controls.source.value = False
    assert row.crop.image.value != sharp
    explorer.controls.opacity.value = 0
    assert np.abs(pixels(row.heat).astype(int) - np.asarray(row.base[1])).mean() < 3


def test_filter_search_and_keyboard_choose_photos(explorer):
    browser = explorer.browser
    browser.split.value = ALL
    assert len(browser.list.options) == len(explorer.lens.table)
    browser.class_name.value = "bird 1"
    browser.search.value = "2.png"
    assert [label for label, _ in browser.list.options] == ["bird 1/2.png"] * 2
    browser.list.index = 1
    assert explorer.photo.path == browser.shown["path"].iloc[1]
    assert explorer.photo.label == 1
    browser.search.value = "no such photo"
    assert browser.list.options == () and "0 photos" in text_of(browser.count)


def upload(explorer, *files):
    """Give files to the upload button, as a browser does."""
    explorer.browser.source.value = "upload"
    items = [
        {"name": name, "type": "", "size": len(data), "content": memoryview(data)}
        | {"last_modified": pd.Timestamp.now()}
        for name, data in files
    ]
    explorer.browser.upload.value = items


def encoded(size, form="png", mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size, 100).save(data, form)
    return data.getvalue()


def test_own_photos_by_upload_and_folder(explorer, places, tmp_path):
    upload(
        explorer, ("mine.png", encoded((50, 40))), ("../../other.jpg", encoded((60, 40), "jpeg"))
    )
    assert explorer.photo.path.endswith("mine.png") and explorer.photo.label is None
    explorer.browser.list.index = 1
    assert explorer.photo.path.endswith("other.jpg") and explorer.message.value == ""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "photo.webp").write_bytes(encoded((70, 80), "webp"))
    explorer.browser.source.value = "folder"
    explorer.browser.folder.value = str(tmp_path)
    assert explorer.photo.path == str(tmp_path / "deep" / "photo.webp")
    assert "80 × 70 px" in text_of(explorer.rows[0].view.note)
    explorer.browser.folder.value = str(tmp_path / "nothing")
    assert "no image there" in text_of(explorer.message)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no photo")
    explorer.browser.folder.value = str(tmp_path / "empty")
    assert "empty: no image there" in text_of(explorer.message)
    assert explorer.photo.path == str(tmp_path / "deep" / "photo.webp")
    explorer.browser.source.value = "data set"
    assert explorer.photo.path.startswith(str(places)) and explorer.message.value == ""


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("text.jpg", b"this is no photo", "not an image"),
        ("notes.txt", b"this is no photo", "not an image"),
        ("empty.png", b"", "not an image"),
        ("dot.png", encoded((1, 1)), "less than one patch"),
        ("cut.jpg", encoded((300, 300), "jpeg")[:600], "truncated"),
        ("huge.png", encoded((14000, 13500), mode="1"), "too large"),
    ],
)
def test_wrong_photos_are_messages_and_the_rest_keeps_working(explorer, name, data, words):
    before = explorer.photo
    upload(explorer, (name, data))
    assert words in text_of(explorer.message) and "Traceback" not in explorer.message.value
    assert name in text_of(explorer.message) and explorer.photo is before
    test_moved_slider_shows_the_librarys_mask_box_and_crop(explorer, 1.2)


def test_a_photo_of_100_megapixels_opens(explorer):
    upload(explorer, ("large.jpg", encoded((10000, 10000), "jpeg", "L")))
    assert explorer.message.value == "" and "10000 × 10000" in text_of(explorer.rows[0].view.note)


def test_wrong_models_are_messages_and_the_rest_keeps_working(explorer, places):
    lens = explorer.lens
    for name in (str(places / "none"), "vit_no_such_thing", str(places / "photos")):
        explorer.other.value = name
        assert "rams-say bad" in explorer.message.value and explorer.lens is lens, name
        assert "\n" not in explorer.message.value
    explorer.controls.thresholds[0].value = 1.3
    numbers, _ = numbers_of(explorer)
    assert f"{numbers['patches']} of 16" in text_of(explorer.rows[0].mask.note)


def test_another_model_looks_at_the_same_photo(explorer):
    path = explorer.photo.path
    explorer.models.value = next(v for label, v in explorer.models.options if "(1 scale," in label)
    explorer.later.wait()
    assert explorer.lens.model.num_scales == 1 and explorer.photo.path == path
    assert "scale 2" in text_of(explorer.rows[0].view.note)
    explorer.controls.scales.value = 1
    explorer.later.wait()
    assert "scale 2" not in text_of(explorer.rows[0].view.note)
    assert "scale 2" not in text_of(explorer.scores)


def test_without_data_and_runs_there_is_a_page_with_a_message(tmp_path):
    page = Explorer("folder", tmp_path / "none", tmp_path / "runs")
    assert "no such folder" in text_of(page.message) or page.lens is not None


def marker(chart):
    """Where a chart's marker stands: share of the picture's width."""
    return float(re.search(r"left: ([\d.]+)%", chart.marker.value)[1]) / 100


def test_the_threshold_curve_gets_a_marker_and_the_blocks_their_maps(explorer):
    curve, blocks = explorer.tabs.curve, explorer.tabs.blocks
    explorer.controls.thresholds[0].value = 1.0
    explorer.later.wait()
    before, picture = marker(curve), curve.image.value
    assert curve.key[1] and "computing" not in text_of(curve.note), "probabilities are there"
    explorer.controls.thresholds[0].value = 3.0
    assert marker(curve) > before
    explorer.later.wait()
    assert curve.image.value == picture, "the curve itself is not drawn anew"
    explorer.tabs.selected_index = 1
    explorer.later.wait()
    assert blocks.image.value and not blocks.is_stale
    explorer.controls.strength.value = "rollout_mean"
    assert blocks.is_stale
    explorer.later.wait()
    assert not blocks.is_stale


def test_marker_stands_at_its_threshold():
    curve = pd.DataFrame({"threshold": [0.0, 4.0], "area": [1.0, 0.0]})
    chart = Chart()
    chart.draw(1, lambda ax: plot_threshold(curve, ax=ax))()
    line = Chart()
    for value in (0, 1.5, 4):
        chart.mark(value)
        line.draw(value, lambda ax, x=value: plot_threshold(curve, mark=x, ax=ax))()
        changed = pixels(chart) != pixels(line)
        columns = np.nonzero(changed.any(axis=(0, 2)))[0]
        assert abs(columns.mean() / changed.shape[1] - marker(chart)) < 0.003


@pytest.fixture
def surveyed(explorer):
    """The explorer after looking at the whole validation set."""
    explorer.tabs.selected_index = 2
    if explorer.tabs.survey is None:
        assert "not looked at yet" in text_of(explorer.tabs.state)
        explorer.tabs.start.click()
        explorer.tabs.later.wait()
    assert explorer.tabs.survey is not None and explorer.message.value == ""
    return explorer


def test_the_threshold_of_the_whole_set_answers_at_once(surveyed):
    surveyed.controls.thresholds[0].value = 1.5
    surveyed.later.wait()
    text = text_of(surveyed.tabs.effect.note)
    images = len(surveyed.tabs.survey.strengths.table)
    assert f"threshold 1.50, {images} images" in text and "stored at threshold 1.50" in text
    stored = surveyed.tabs.survey.accuracy.query("threshold == 1.5 and output == 'scale 2'")
    assert f"scale 2 {stored['top1'].item():.1f} %" in text
    surveyed.controls.strength.value = "single_head"
    assert "choose one of those" in text_of(surveyed.tabs.effect.note)
    surveyed.controls.strength.value = "rollout_mean"
    assert "computing" in text_of(surveyed.tabs.effect.note)
    surveyed.later.wait()
    assert "mean IoU" not in text_of(surveyed.tabs.effect.note), "these photos have no boxes"
    assert "% of the image" in text_of(surveyed.tabs.effect.note)
    assert "accuracy" not in text_of(surveyed.tabs.effect.note), "stored for the run's own strength"


def test_gallery_opens_photos(surveyed):
    surveyed.tabs.selected_index = 3
    gallery = surveyed.tabs.gallery.photos
    for order in surveyed.tabs.gallery.menu.options:
        surveyed.tabs.gallery.menu.value = order
        rows = sort_images(surveyed.tabs.survey, order)
        assert gallery.paths == rows["path"].tolist()
        assert len(gallery.grid.children) == min(PAGE, len(rows))
        for cell, path in list(zip(gallery.grid.children, gallery.paths, strict=False))[:2]:
            cell.children[0].click()
            assert surveyed.photo.path == path


def test_gallery_turns_pages(surveyed, places):
    gallery = surveyed.tabs.gallery.photos
    paths = surveyed.lens.table["path"].tolist()
    gallery.show(paths, ["" for _ in paths])
    gallery.ahead.click()
    gallery.grid.children[0].children[0].click()
    assert surveyed.photo.path == paths[PAGE]
    gallery.back.click()
    assert gallery.back.disabled and gallery.pictures.value.count("url(") == PAGE


def test_confusion_cells_open_their_photos(surveyed):
    surveyed.tabs.selected_index = 4
    surveyed.tabs.confusion.menu.value = "scale 2"
    buttons = [w for w in surveyed.tabs.confusion.matrix.children if hasattr(w, "description")]
    buttons = [w for w in buttons if getattr(w, "tooltip", None)]
    filled = [button for button in buttons if button.description]
    assert sum(int(b.description) for b in filled) == len(surveyed.tabs.survey.strengths.table)
    for button in filled[:2]:
        button.click()
        assert len(surveyed.tabs.confusion.photos.paths) == int(button.description)
    surveyed.tabs.confusion.photos.grid.children[0].children[0].click()
    assert surveyed.photo.path == surveyed.tabs.confusion.photos.paths[0]
    shown = {
        tuple(images_of(surveyed.tabs.survey, t, g, "scale 2")) for t in range(3) for g in range(3)
    }
    assert tuple(surveyed.tabs.confusion.photos.paths) in shown


def test_a_survey_is_there_at_once_when_the_page_opens_again(surveyed, places):
    again = Explorer("folder", places / "photos", places / "runs")
    assert again.tabs.survey is not None


def test_moves_leave_nothing_behind(explorer):
    slider = explorer.controls.thresholds[0]

    def count(moves):
        for number in range(moves):
            slider.value = 0.05 + number % 60 * 0.05
            if number % 20 == 0:
                explorer.later.wait()
        explorer.later.wait()
        gc.collect()
        return len(gc.get_objects())

    count(60)
    before, threads = count(60), threading.active_count()
    assert count(120) - before < 60, "less than one object for two moves"
    assert threading.active_count() == threads


def test_unforeseen_errors_are_messages_too(explorer, monkeypatch):
    monkeypatch.setattr("ramslib.explorer.page.measure", lambda *_: 1 / 0)
    explorer.controls.thresholds[0].value = 1.05
    assert "ZeroDivisionError" in text_of(explorer.message)
    monkeypatch.undo()
    explorer.controls.thresholds[0].value = 1.1
    explorer.later.wait()
    numbers, _ = numbers_of(explorer)
    assert f"{numbers['patches']} of 16" in text_of(explorer.rows[0].mask.note)


def test_later_does_the_newest_work_and_reports_errors():
    done, errors = [], []
    later = BackgroundWorker(threading.RLock(), errors.append, delay=0.05)

    def work(name):
        def steps():
            yield lambda: done.append(name)
            time.sleep(0.05)
            yield lambda: done.append(name + " again")

        return steps

    for name in "abc":
        later(work(name))
    later.wait()
    assert done == ["c", "c again"]
    later(work("d"))
    while "d" not in done:
        time.sleep(0.005)
    later(work("e"))
    later.wait()
    assert done[2:] == ["d", "e", "e again"], "abandoned between two steps"

    def fail():
        yield lambda: 1 / 0

    later(fail)
    later.wait()
    assert [type(error) for error in errors] == [ZeroDivisionError]


def test_panel_draws_only_what_has_changed():
    panel, drawn = Panel("a <title>"), []
    assert "&lt;title&gt;" in panel.title.value

    def draw():
        drawn.append(1)
        return Image.new("RGB", (8, 8)), "text"

    panel.show(1, draw)
    panel.stale(True)
    assert "computing" in panel.note.value
    panel.show(1, draw)
    assert "text" in panel.note.value and drawn == [1]
    panel.show(2, draw)
    assert drawn == [1, 1]


def test_bars_escape_class_names():
    table = pd.DataFrame({"scale 1": [0.25]}, index=["<b>"])
    assert "&lt;b&gt;" in probability_bars(table) and "0.250" in probability_bars(table)


@pytest.mark.parametrize("run", [(), ("runs/one",)])
def test_app_page_is_the_explorer_alone(tmp_path, run):
    page = read(write_page(tmp_path, "cub", 'it\'s "here"', "runs", *run), 4)
    assert len(page.cells) == 1
    places = []
    exec(page.cells[0].source.split("\n", 1)[1], {"Explorer": lambda *p: places.extend(p)})
    assert places == ["cub", *(str(Path(p).absolute()) for p in ('it\'s "here"', "runs", *run))]


def test_app_is_a_command_that_refuses_what_is_no_run(tmp_path, capsys):
    assert main(["app", "--run", str(tmp_path), "--", "--no-browser"]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


def test_a_run_can_be_named_and_is_then_chosen_in_the_menu(places):
    page = Explorer("folder", places / "photos", places / "runs", str(places / "runs" / "one"))
    assert page.lens.name == "one" and page.models.value == str(places / "runs" / "one")
    assert page.message.value == ""


@pytest.fixture
def runs(places, tmp_path):
    """A copy of a finished run, to be damaged."""
    shutil.copytree(places / "runs" / "two", tmp_path / "runs" / "damaged")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "not the folder of a run"),
        ("table.csv", "path", "not the folder of a run"),
        ("results.csv", "", "results.csv is damaged"),
        ("results.csv", "split,weights\ntest,last\n", "results.csv is damaged"),
    ],
)
def test_a_damaged_run_is_not_offered_and_the_others_are(places, runs, name, text, words):
    shutil.copytree(places / "runs" / "one", runs / "sound")
    (runs / "damaged" / name).write_text(text)
    page = Explorer("folder", places / "photos", runs, str(runs / "sound"))
    assert [label.split()[0] for label, _ in page.models.options[:-1]] == ["sound"]
    assert words in text_of(page.notice) and "damaged" in text_of(page.notice)
    assert page.message.value == "" and page.photo is not None


def test_damaged_weights_are_a_message_and_another_model_works(places, runs):
    (runs / "damaged" / "best.safetensors").write_bytes(b"no weights")
    page = Explorer("folder", places / "photos", runs)
    assert "best.safetensors" in text_of(page.message) and page.lens is None
    page.controls.thresholds[0].value = 2.0
    page.other.value = str(places / "runs" / "two")
    assert page.message.value == "" and page.photo is not None


def test_a_run_of_another_method_is_refused_in_words(places, tmp_path):
    run = make_run(places / "photos", tmp_path / "runs" / "fg", model="transfg")
    page = Explorer("folder", places / "photos", tmp_path / "runs", str(run))
    assert len(page.models.options) == 1, "no run is offered, a backbone is"
    assert "RAMS-Trans and plain ViT, not transfg" in text_of(page.message)


def test_a_damaged_survey_is_made_again(surveyed, places):
    stored = next((places / "runs" / "explorer").glob("survey-*"))
    whole = (stored / "strengths.safetensors").read_bytes()
    for name, data in (("strengths.safetensors", whole[:100]), ("predictions.csv", b"")):
        kept = (stored / name).read_bytes()
        (stored / name).unlink()  # the explorer may have the old file mapped into memory
        (stored / name).write_bytes(data)
        page = Explorer("folder", places / "photos", places / "runs")
        assert page.message.value == "" and page.tabs.survey is None
        (stored / name).write_bytes(kept)


def test_names_that_photos_share_are_told_apart(explorer):
    explorer.browser.split.value = ALL
    labels = [label for label, _ in explorer.browser.list.options]
    assert "bird 1/2.png" in labels and "2.png" not in labels
