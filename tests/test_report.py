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
from ramslib.evaluation import score
from ramslib.experiments import notebooks
from ramslib.experiments.notebooks import write_report
from ramslib.training.trainer import train

EVIL = '<script>alert("x")</script> & $\\frac$ \udcff'


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "onerror")
        self.addresses += [value for name, value in attrs if name in names and value[:1] != "#"]

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("report")
    photos = draw_photos(folder / "photos")
    return train(tiny_config(photos, epochs=2, threshold=1.25), folder / "a run")


@pytest.fixture(scope="module")
def page(run):
    """Its page, written by the command after the images were moved."""
    moved = (run.parent / "photos").rename(run.parent / "moved")
    assert main(["report", str(run), "--root", str(moved)]) == 0
    return Page((run / "report.html").read_text())


def test_the_page_says_what_the_files_say(run, page):
    results = pd.read_csv(run / "results.csv")
    for row in results.query("checkpoint == 'best'").itertuples():
        assert f"{row.output} {row.checkpoint} 15 {row.top1:.1f}" in page.text
    best = results[results["checkpoint"] == "best"].iloc[-1]
    assert f"{best['top1']:.1f} ± {best['standard_error']:.1f} % (mean logits)" in page.text
    for word in (
        "a run: RAMS-Trans, 2 scales",
        "18 train, 6 validation, 15 test",
        "threshold 1.25",
    ):
        assert word in page.text
    threshold = results.query("checkpoint == 'best'")["exit_above"].max()
    tested = pd.read_csv(run / "predictions_best.csv").groupby("output")
    first, whole = (tested.get_group(name).set_index("path") for name in ("scale 1", "mean logits"))
    sure = first["calibrated"] > threshold
    right = 100 * (first["rank"].where(sure, whole["rank"]) == 0).mean()
    alone = f"{100 * sure.mean():.0f} % of the test images need scale 1 alone; then {right:.1f} %"
    assert alone in page.text
    assert f"epoch {best['best_epoch']} of 2: smallest validation nll" in page.text
    assert "test_vit" in page.text and "random initialization" in page.text
    assert "epochs=2" in page.text, "the command that trains it again"
    assert re.search(r"torch \d+\.\d+", page.text)


def test_everything_is_inside(page):
    assert len(page.addresses) >= 5
    assert {address.partition(",")[0] for address in page.addresses} == {"data:image/png;base64"}
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_names_are_text_and_never_code_and_lost_images_are_reported(run, tmp_path):
    """All predictions are wrong, classes have hostile names, and the images are gone."""
    copy = shutil.copytree(run, tmp_path / "<b>run")
    metadata = json.loads((run / "config.json").read_text())
    metadata["classes"] = [EVIL, "plain", EVIL * 2]
    (copy / "config.json").write_text(json.dumps(metadata))
    table = pd.read_csv(copy / "predictions_best.csv")
    table = table.assign(prediction=(table["label"] + 1) % 3, rank=1, path="gone/" + table["path"])
    table.to_csv(copy / "predictions_best.csv", index=False)
    results = pd.read_csv(copy / "results.csv").query("checkpoint == 'last'")
    best = score(table).assign(checkpoint="best", **results.iloc[0][["epochs", "best_epoch"]])
    pd.concat([results, best]).ffill().to_csv(copy / "results.csv", index=False)
    text = write_report(copy).read_text()
    assert "<script" not in text and "<b>run" not in text
    assert "&lt;b&gt;run" in text and "&lt;script&gt;" in text
    assert "no longer where they were" in text


def test_damaged_and_unfinished_runs_are_refused_by_file(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "execute", None)
    with pytest.raises(InputError):
        write_report(tmp_path)
    copy = shutil.copytree(run, tmp_path / "cut")
    predictions = copy / "predictions_best.csv"
    lines = predictions.read_text().splitlines(keepends=True)
    for text in ("path\n", "", "".join(lines[: len(lines) // 2]), lines[0]):
        predictions.write_text(text)
        with pytest.raises(InputError, match="predictions_best.csv"):
            write_report(copy)
    (copy / "results.csv").write_text("output\n")
    with pytest.raises(InputError, match="results.csv"):
        write_report(copy)
    (copy / "results.csv").unlink()
    assert main(["report", str(copy)]) == 2
    assert "cut: the run is not finished" in capsys.readouterr().err
