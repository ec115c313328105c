"""What `predict` on a folder leaves: unsure answers, a contact sheet, copies by class."""

import base64
import hashlib
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny import draw_photos, tiny_config

from ramslib.__main__ import main
from ramslib.errors import InputError
from ramslib.experiments.comparison import headlines
from ramslib.explorer.page import best_result
from ramslib.runs.inference import load_model
from ramslib.runs.photos import (
    answers,
    predict,
    safe_name,
    save_contact_sheet,
    sort_into,
)
from ramslib.runs.results import read_predictions, read_results
from ramslib.training.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of photos and that of a run."""
    folder = tmp_path_factory.mktemp("photos")
    photos = draw_photos(folder / "photos")
    return photos, train(tiny_config(photos, epochs=2), folder / "run")


def fingerprint(folder):
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def made_up(paths, classes, probabilities, unsure):
    """Predictions of a model with one scale."""
    table = pd.DataFrame({"path": list(map(str, paths)), "output": "scale 1"})
    table = table.assign(class_name=classes, probability=probabilities, error="")
    table["unsure"] = pd.array(unsure, dtype="boolean")
    return table.assign(top=0.0, left=0.0, bottom=9.0, right=9.0)


# --- unsure ------------------------------------------------------------------------------------


def test_an_answer_is_unsure_below_the_confidence_of_the_run(trained):
    photos, run = trained
    limits = load_model(run).unsure_below
    assert set(limits) == {"scale 1", "scale 2", "mean softmax", "mean logits"}
    found = predict(run, [photos])
    for output, rows in found.groupby("output"):
        rows = rows[(rows["probability"] - limits[output]).abs() > 1e-4]  # they are rounded
        assert rows["unsure"].tolist() == (rows["probability"] < limits[output]).tolist()


def test_one_path_needs_no_list(trained):
    photos, run = trained
    assert predict(run, str(photos)).equals(predict(run, [photos]))


def test_the_limit_can_be_given_and_may_be_unknown(trained, tmp_path):
    photos, run = trained
    assert predict(run, [photos], unsure_below=1)["unsure"].sum() > 100
    assert not predict(run, [photos], unsure_below=0.0)["unsure"].any()
    middle = predict(run, [photos])["probability"].median()
    found = predict(run, [photos], unsure_below=middle)
    assert found["unsure"].tolist() == (found["probability"] < middle).tolist()
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "results.csv").unlink()
    assert predict(unfinished, [photos])["unsure"].isna().all()
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="unsure_below is .*; give a probability from 0 to 1"):
            predict(run, [photos], unsure_below=wrong)


# --- early exit --------------------------------------------------------------------------------


def test_early_exit_answers_with_the_scales_that_are_needed(trained, tmp_path, capsys):
    """A run whose threshold is the median confidence of its first scale."""
    photos, run = trained
    rows = predict(run, [photos]).set_index("path")
    first, whole = (rows[rows["output"] == name] for name in ("scale 1", "mean logits"))
    copy, middle = shutil.copytree(run, tmp_path / "run"), first["probability"].median() + 1e-4
    results = pd.read_csv(copy / "results.csv")
    results.loc[results["output"] == "scale 1", "exit_above"] = middle
    results.to_csv(copy / "results.csv", index=False)
    found = predict(copy, [photos], early_exit=True).set_index("path")
    sure = (first["probability"] > middle).loc[found.index]
    assert found["scales"].tolist() == np.where(sure, 1, 2).tolist() and 5 < sure.sum() < 34
    for name in ("class_name", "probability"):
        wanted = first[name].where(sure, whole[name])
        assert (found[name] == wanted).all() or np.allclose(found[name], wanted, atol=2e-4)
    assert (found["output"] == "early exit").all() and not (found["error"] != "").any()
    limit = load_model(copy).unsure_below["mean logits"]
    assert found["unsure"].tolist() == (found["probability"] < limit).tolist()
    (broken := tmp_path / "broken.jpg").write_text("none")
    found = predict(copy, [photos, broken], early_exit=True)  # a count is whole beside a bad photo
    assert found["scales"].dropna().map(str).isin(["1", "2"]).all() and found["scales"].isna().sum()
    arguments = ["predict", "--run", str(copy), str(photos), "--early-exit"]
    assert main([*arguments, "--sort-into", str(tmp_path / "sorted")]) == 0
    assert main([*arguments, "--pictures", str(tmp_path / "pictures")]) == 2
    assert "--early-exit gives no regions" in capsys.readouterr().err


def test_early_exit_needs_a_threshold(trained, tmp_path):
    photos, run = trained
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "results.csv").unlink()
    with pytest.raises(InputError, match="unfinished: has no threshold for early exit; that takes"):
        predict(unfinished, [photos], early_exit=True)


# --- the answer --------------------------------------------------------------------------------


def test_what_photos_get_is_the_output_that_heads_the_results(trained):
    photos, run = trained
    found = answers(predict(run, [photos / "test"]))
    right = found["path"].map(lambda path: Path(path).parent.name) == found["class_name"]
    assert set(found["output"]) == {"mean logits"} and len(found) == 15
    assert 100 * right.mean() == pytest.approx(best_result(run)["top1"])
    (line,) = headlines([read_results(run).assign(condition="photos")])
    assert line.startswith(f"photos (mean logits): {100 * right.mean():.1f} ± ")
    stored = read_predictions(run).set_index(["output", "path"])["calibrated"]
    shown = found.set_index("path")["probability"]
    np.testing.assert_allclose(shown, stored["mean logits"][shown.index], atol=1e-4)
    assert abs(shown - stored["mean softmax"]).max() > 1e-3, "another output would be noticed"


# --- contact sheet -----------------------------------------------------------------------------


def test_a_contact_sheet_shows_every_photo_unsure_ones_first(trained, tmp_path):
    photos, run = trained
    shutil.copytree(photos / "test", tmp_path / "mine")
    (tmp_path / "mine" / "bird 0" / "0.png").write_text("no photo")
    predictions = predict(run, [tmp_path / "mine"])
    middle = answers(predictions)["probability"].median()
    predictions = predict(run, [tmp_path / "mine"], unsure_below=middle)
    save_contact_sheet(predictions, tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    shown = re.findall(
        r"<figure(.*?)>.*?<b>(.*?)</b> (\d+) %(, unsure)?<br><small>(.*?)<", page, re.S
    )
    rows = answers(predictions).set_index("path")
    assert len(shown) == len(rows) == 14 and {each[4] for each in shown} == set(rows.index)
    for _, name, percent, unsure, path in shown:
        row = rows.loc[path]
        assert name == row["class_name"] and percent == f"{100 * row['probability']:.0f}"
        assert bool(unsure) == row["unsure"]
    order = [(not unsure, name) for _, name, _, unsure, _ in shown]
    assert order == sorted(order) and len(set(order)) > 3
    assert "Cannot be read" in page and page.count("0.png: ") == 1
    picture = re.search(r"base64,(.*?)\"", page)[1]
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        assert image.format == "JPEG" and image.size == (48, 40)


def test_regions_lie_in_a_thumbnail_where_they_lie_in_the_photo(tmp_path):
    Image.new("RGB", (960, 720), "black").save(tmp_path / "a.png")
    predictions = made_up([tmp_path / "a.png"] * 2, "a", 0.9, [False] * 2)
    predictions["output"] = ["scale 1", "scale 2"]
    predictions.loc[1, ["top", "left", "bottom", "right"]] = [200.0, 400.0, 600.0, 800.0]
    both = pd.concat([predictions, predictions[:1].assign(output="mean logits", top=np.nan)])
    save_contact_sheet(both, tmp_path / "sheet.html")
    picture = re.search(r"base64,(.*?)\"", (tmp_path / "sheet.html").read_text())[1]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).max(axis=2) > 100
    assert drawn.shape == (180, 240)
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    found = [rows[0], columns[0], rows[-1], columns[-1]]
    np.testing.assert_allclose(found, [50, 100, 150, 200], atol=3)


def test_names_cannot_put_anything_into_the_page(tmp_path):
    path = tmp_path / os.fsdecode(b"<b>\xe9.png")
    Image.new("RGB", (9, 9)).save(path)
    save_contact_sheet(made_up([path], ["<script>"], [0.5], [None]), tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page
    assert "unsure" not in page.partition("<body>")[2]


# --- copies ------------------------------------------------------------------------------------


def test_photos_are_copied_into_the_folders_of_their_classes(trained, tmp_path):
    photos, run = trained
    before, predictions = fingerprint(photos), predict(run, [photos])
    copies = sort_into(predictions, tmp_path / "sorted")
    assert fingerprint(photos) == before
    rows = answers(predictions)
    assert len(copies) == len(set(copies)) == len(rows) == 39
    assert sorted(copies) == sorted(path for path in (tmp_path / "sorted").rglob("*.png"))
    for copy, row in zip(copies, rows.itertuples(), strict=True):
        assert copy.parent.name == row.class_name
        assert copy.read_bytes() == open(row.path, "rb").read()
        assert re.fullmatch(r"\d( \d)?\.png", copy.name)
    assert any(" 2." in copy.name for copy in copies), "photos of one name in several folders"


def test_classes_with_odd_names_stay_apart_and_inside(tmp_path):
    classes = ["a/b", "a_b", "A_B", "..", "../../x", "", "con:", "a\x00b", "x" * 300, " .", "é"]
    paths = []
    for number, _ in enumerate(classes):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_text(str(number))
    predictions = made_up(paths, classes, 0.5, [None] * len(classes))
    copies = sort_into(predictions, tmp_path / "sorted")
    folders = [copy.parent for copy in copies]
    assert len({folder.name.lower() for folder in folders}) == len(classes)
    assert {folder.parent for folder in folders} == {tmp_path / "sorted"}
    assert [copy.read_text() for copy in copies] == list(map(str, range(len(classes))))
    assert folders[-1].name == "é" and {"A_B", "a_b 2", "a_b 3"} <= {each.name for each in folders}
    for name in classes:
        safe = safe_name(name)
        assert 0 < len(safe) <= 80 and not set(safe) & set("/\\:\x00") and safe.strip(".")


def test_a_folder_that_holds_files_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    predictions, before = made_up([tmp_path / "a.png"], ["a"], 0.5, [None]), fingerprint(tmp_path)
    with pytest.raises(InputError, match="full: holds files already; choose a new folder"):
        sort_into(predictions, tmp_path / "full")
    with pytest.raises(InputError, match="notes.txt: cannot be written"):
        sort_into(predictions, tmp_path / "full" / "notes.txt")
    assert fingerprint(tmp_path) == before
    assert sort_into(predictions, tmp_path / "empty") == [tmp_path / "empty" / "a" / "a.png"]


def test_all_of_it_from_the_command_line(trained, tmp_path, capsys):
    photos, run = trained
    names = {"--out": "seen.csv", "--contact-sheet": "seen.html", "--sort-into": "sorted"}
    options = [word for name, file in names.items() for word in (name, str(tmp_path / file))]
    words = ["predict", "--run", str(run), str(photos / "test"), "--unsure-below", "0.99", *options]
    assert main(words) == 0
    table = pd.read_csv(tmp_path / "seen.csv")
    assert table.columns.tolist() == [
        "path", "output", "class_name", "probability", "unsure",
        "top", "left", "bottom", "right", "error",
    ]  # fmt: skip
    assert table["unsure"].tolist() == (table["probability"] < 0.99).tolist()
    assert (tmp_path / "seen.html").exists() and len(list((tmp_path / "sorted").iterdir())) > 1
    before = fingerprint(tmp_path)
    for name in names:
        given = [name, str(tmp_path / names[name])]
        assert main(["predict", "--run", str(run), str(photos / "test"), *given]) == 2
    inside = ["--sort-into", str(photos / "new")]
    assert main(["predict", "--run", str(run), str(photos / "test"), str(photos), *inside]) == 2
    assert capsys.readouterr().err.count("error: ") == 4
    assert fingerprint(tmp_path) == before and not (photos / "new").exists()
