"""The page of a run: whole, without network, and no other people's text is taken as code."""

import json
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
from tiny import draw_photos, tiny_config

from ramslib.__main__ import main
from ramslib.errors import InputError
from ramslib.experiments.report import write_report
from ramslib.training.trainer import train

EVIL = '<script>alert("x")</script> & $\\frac$'


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "onerror")]

    def handle_data(self, data):
        self.text += " ".join(data.split()) + " "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose classes have names that are code."""
    folder = tmp_path_factory.mktemp("report")
    photos = draw_photos(folder / "photos")
    return train(tiny_config(photos, epochs=2, threshold=1.25), folder / "a run")


def rename_classes(run, copy, names):
    """A copy of a run in which other people named the classes."""
    shutil.copytree(run, copy)
    description = json.loads((run / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(description | {"classes": names}))
    return copy


@pytest.fixture(scope="module")
def page(run):
    """Its page."""
    assert write_report(run) == run / "report.html"
    return Page((run / "report.html").read_text())


def test_the_page_says_what_the_files_say(run, page):
    results = pd.read_csv(run / "results.csv")
    for row in results.itertuples():
        assert f"{row.top1:.1f} ± {row.standard_error:.1f}" in page.text
    for word in ("a run", "3 classes, 18 train, 6 validation, 15 test images", "threshold 1.25"):
        assert word in page.text
    assert "test_vit" in page.text and "random initialization" in page.text
    assert "epochs=2" in page.text, "the command that trains it again"
    assert re.search(r"torch \d+\.\d+", page.text) and "Surest" in page.text


def test_everything_is_inside(page):
    assert len(page.addresses) >= 5
    kinds = {address.partition(",")[0] for address in page.addresses}
    assert kinds == {"data:image/svg+xml;base64", "data:image/jpeg;base64"}
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_names_are_text_and_never_code(run, tmp_path):
    copy = rename_classes(run, tmp_path / "<b>run", [EVIL, "plain", EVIL * 2])
    text = write_report(copy).read_text()
    assert "<script" not in text and "<b>run" not in text
    assert "&lt;b&gt;run" in text


def test_a_run_without_its_photos_still_has_a_page(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "moved")
    predictions = pd.read_csv(copy / "predictions_last.csv")
    predictions["path"] = "gone/" + predictions["path"].str[1:]
    predictions.to_csv(copy / "predictions_last.csv", index=False)
    page = Page(write_report(copy).read_text())
    assert "no longer where they were" in page.text and "Surest" not in page.text


def test_one_scale_and_no_mistake(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "perfect")
    predictions = pd.read_csv(copy / "predictions_last.csv").query("output == 'scale 1'")
    predictions = predictions.assign(prediction=predictions["label"], rank=0)
    predictions.to_csv(copy / "predictions_last.csv", index=False)
    assert "every test image was right" in Page(write_report(copy).read_text()).text


def test_what_is_no_finished_run_is_told(run, tmp_path, capsys):
    with pytest.raises(InputError, match="not the folder of a run"):
        write_report(tmp_path)
    copy = shutil.copytree(run, tmp_path / "cut")
    (copy / "predictions_last.csv").write_text("path\n")
    with pytest.raises(InputError, match="its results cannot be read"):
        write_report(copy)
    (copy / "results.csv").unlink()
    assert main(["report", str(copy)]) == 2
    assert "the run is not finished" in capsys.readouterr().err
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
