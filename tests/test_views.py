"""Views give the inspector's numbers; an exported page holds what the library computes."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from explorer_run import make_run
from matplotlib.figure import Figure
from PIL import Image

from ramslib.__main__ import main
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.errors import InputError
from ramslib.explorer import views
from ramslib.explorer.validation import predict_validation, threshold_effect
from ramslib.explorer.views import VIEWS, export_page, inspector_of, load

BOX = [20.0, 30.0, 70.0, 90.0]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Photos, and a folder with a finished run of two scales."""
    folder = tmp_path_factory.mktemp("views")
    make_run(folder / "photos", folder / "runs" / "two")
    return folder


@pytest.fixture(scope="module")
def loaded(places):
    return load(places / "runs" / "two")


@pytest.fixture
def inspector(loaded):
    return inspector_of(loaded).set_image(loaded.table["path"][0], 0, BOX)


def draw(inspector, view, **options):
    """The numbers of a view, and its figure."""
    figure = Figure()
    return VIEWS[view](inspector, inspector.settings, figure, **options), figure


def test_numbers_of_all_scales(inspector):
    table, _ = draw(inspector, "recursion")
    outputs = inspector.outputs()
    shown = inspector.probabilities(outputs)
    assert table["output"].tolist() == list(shown)
    for name, row in table.set_index("output").iterrows():
        assert row[inspector.classes].tolist() == pytest.approx(shown[name].tolist())
    boxes = inspector.image_boxes(torch.cat([output.boxes for output in outputs]))
    np.testing.assert_allclose(table[BOX_COLUMNS].head(2).astype(float), boxes)
    stats = inspector.region_stats(inspector.region())
    assert table["iou"][1] == pytest.approx(stats["iou"]) and np.isnan(table["top"][2])


def test_numbers_of_the_threshold(inspector):
    table, _ = draw(inspector, "threshold")
    assert list(table) == ["threshold", "area", "iou", "probability"] and len(table) == 41
    row = table.set_index("threshold").loc[1.3]
    stats = inspector.region_stats(inspector.region(threshold=1.3))
    assert (row["area"], row["iou"]) == pytest.approx((stats["area"], stats["iou"]))
    logits = inspector.outputs(threshold=1.3)[1].logits[0]
    assert row["probability"] == pytest.approx(float(logits.softmax(0)[0]), abs=1e-6)


def test_numbers_of_tokens_and_heads(inspector):
    table, figure = draw(inspector, "tokens", block=3, token=[1, 2], head=2)
    assert len(figure.axes) == 6, "three maps with their color bars"
    row = inspector.attention_rows(3, (1, 2), 2)[0, -16:]
    np.testing.assert_allclose(table["attention"], row)
    place = table.set_index(["row", "column"]).loc[(2, 3)]
    similarity = float(inspector.patch_similarity((1, 2))[2, 3])
    assert place["cosine similarity"] == pytest.approx(similarity)
    assert place["class token − patch"] == pytest.approx(
        float(inspector.disagreement(3, (1, 2), 2)[2, 3])
    )
    alone, figure = draw(inspector, "tokens", block=3, token="class 2")
    assert list(alone) == ["row", "column", "attention"] and len(figure.axes) == 2
    table, _ = draw(inspector, "heads", block=2, token="class 1")
    rows = inspector.attention_rows(2, "class 1")[:, -16:]
    np.testing.assert_allclose(table[["head 1", "head 2"]].T, rows[:2])
    table, _ = draw(inspector, "blocks")
    last = inspector.strength_per_block()[-1]
    np.testing.assert_allclose(table["block 6"], last.flatten())


def test_colors_are_shared_components(inspector, loaded):
    others = loaded.table["path"][5:8].tolist()
    table, figure = draw(inspector, "colors", images=others)
    tokens = [inspector_of(loaded).set_image(p).patch_tokens() for p in (inspector.path, *others)]
    flat = torch.stack(tokens).flatten(0, 2).double().numpy()
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    centered = flat - flat.mean(axis=0)
    directions = np.linalg.eigh(centered.T @ centered)[1][:, ::-1][:, :3]
    for number in (1, 2, 3):
        expected = centered @ directions[:, number - 1]
        found = table[f"component {number}"].to_numpy()
        np.testing.assert_allclose(abs(found), abs(expected), atol=1e-4)
        border = table["row"].isin([0, 3]) | table["column"].isin([0, 3])
        assert found[border].sum() <= 0
    assert table["image"].unique().tolist() == [inspector.path, *others] and len(table) == 64
    assert len(figure.axes) == 12


def test_numbers_by_hand_and_elsewhere(inspector):
    before = [output.logits.clone() for output in inspector.outputs()]
    table, _ = draw(inspector, "by hand", box=[10, 20, 60, 80])
    given = inspector.outputs(inspector.by_hand([10, 20, 60, 80]))[1]
    row = table.set_index("output").loc["by hand"]
    assert row[BOX_COLUMNS].tolist() == pytest.approx([10, 20, 60, 80], abs=1e-3)
    assert row[inspector.classes].tolist() == pytest.approx(given.logits[0].softmax(0).tolist())
    assert row["iou"] == pytest.approx(40 * 50 / (2 * 50 * 60 - 40 * 50))
    table, _ = draw(inspector, "elsewhere", box=BOX, steps=2)
    boxes = torch.tensor(table[BOX_COLUMNS].to_numpy())
    assert torch.equal(boxes, inspector.sliding_boxes(BOX, 2))
    for box, chance in zip(boxes, table["probability"], strict=True):
        logits = inspector.outputs(inspector.by_hand(box))[1].logits[0]
        assert chance == pytest.approx(float(logits.softmax(0)[0]), abs=1e-6)
    for old, output in zip(before, inspector.outputs(), strict=True):
        assert torch.allclose(old, output.logits, atol=1e-5)


def test_another_model_is_asked_the_same(inspector, places):
    table, figure = draw(inspector, "compare", other=[str(places / "runs" / "two"), "last"])
    mine, other = (rows.drop(columns="model") for _, rows in table.groupby("model"))
    pd.testing.assert_frame_equal(
        mine.reset_index(drop=True), other.reset_index(drop=True), check_exact=False
    )
    assert len(figure.subfigs) == 2 and views.load_once.cache_info().currsize == 1


@pytest.mark.slow
def test_numbers_of_the_validation_images(inspector, loaded, places):
    folder = places / "stored"
    mine = predict_validation(loaded, folder, log=str)
    make_run(places / "photos", places / "runs" / "one", scales=1)
    other = predict_validation(load(places / "runs" / "one"), folder, log=str)
    stored, rows = {"stored": str(mine.folder)}, mine.predictions.set_index("output")
    last = rows.loc["mean logits"]
    table, figure = draw(inspector, "confusion", **stored, output="mean logits")
    counts = table.set_index("true")
    assert counts.to_numpy().sum() == len(last) and list(counts) == inspector.classes
    assert np.trace(counts) == (last["rank"] == 0).sum() and len(figure.axes) == 2
    table, figure = draw(inspector, "calibration", **stored)
    assert table["output"].tolist() == list(rows.index.unique()) and len(figure.axes) == len(table)
    assert table["top1"].iloc[-1] == pytest.approx(100 * (last["rank"] == 0).mean())
    table, figure = draw(inspector, "gallery", **stored, order="most uncertain")
    assert table["path"].tolist() == last.sort_values("confidence")["path"].tolist()
    assert sum(len(ax.images) for ax in figure.axes) == len(last) and len(figure.axes) == 6
    table, _ = draw(inspector, "all thresholds", **stored)
    expected = threshold_effect(mine, inspector.settings, [1.3])["area"].item()
    assert table.set_index("threshold")["area"][1.3] == pytest.approx(expected)
    table, _ = draw(inspector, "differences", **stored, other=str(other.folder))
    difference = (last["rank"] == 0).mean() - (other.predictions["rank"] == 0).mean()
    assert table["difference"].iloc[-1] == pytest.approx(100 * difference)
    with pytest.raises(InputError, match="evaluate the validation set"):
        draw(inspector, "calibration", stored=str(places))


@pytest.mark.slow
def test_the_exported_page_holds_the_librarys_numbers(loaded, places, tmp_path):
    paths = loaded.table["path"].head(12).tolist()
    out = tmp_path / "page.html"
    command = ["export-page", "--run", str(places / "runs" / "two"), "--out", str(out), *paths]
    assert main(command) == 0
    assert out.stat().st_size < 3 * 10**6
    text = out.read_text()
    assert not re.search(r"(src|href)=.https?:", text)
    images = json.loads(re.search(r"const images = (.*?), thresholds = ", text)[1])
    assert [image["name"] for image in images] == [path.rpartition("/")[2] for path in paths]
    inspector = inspector_of(loaded).set_image(paths[3], int(loaded.table["label"][3]))
    for number in (0, 12, 40):
        eta, step = views.PAGE_THRESHOLDS[number], images[3]["steps"][number]
        region = inspector.region(threshold=eta)
        assert step["kept"] == region.proposal.component.flatten().int().tolist()
        strong = [value > eta for value in images[3]["strength"]]
        assert np.mean(strong == region.proposal.mask.flatten().numpy()) > 0.95, "rounded"
        stats = inspector.region_stats(region)
        assert step["box"] == pytest.approx([stats[side] for side in BOX_COLUMNS], abs=0.51)
        shown = inspector.probabilities(inspector.outputs(threshold=eta))
        highest = max(float(values.max()) for values in shown.values())
        assert max(step["classes"][0][1:]) == pytest.approx(highest, abs=6e-4)
        assert images[3]["outputs"] == list(shown)


def test_a_page_never_replaces_a_file(loaded, places, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.write_text("mine")
    command = ["export-page", "--run", str(places / "runs" / "two"), "--out", str(out)]
    assert main([*command, loaded.table["path"][0]]) == 2 and out.read_text() == "mine"
    assert "give a new file that ends in .html" in capsys.readouterr().err


def test_names_are_escaped_in_the_page(loaded, places, tmp_path):
    path = tmp_path / "<img onerror=alert(1)>.png"
    Image.new("RGB", (80, 80)).save(path)
    page = export_page(places / "runs" / "two", [path], tmp_path / "page.html")
    assert "<img onerror" not in page.read_text()
