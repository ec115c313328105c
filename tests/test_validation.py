"""Cached validation predictions: computed once, equal to the library's, and sorted as they say."""

import dataclasses
import os

import numpy as np
import pandas as pd
import pytest
import torch
from explorer_run import make_run, shake
from safetensors.torch import save_file
from tiny import draw_photos, tiny_config

from ramslib.backbone import create_backbone
from ramslib.data.datasets import read_table
from ramslib.data.transforms import ImageTransform
from ramslib.errors import InputError
from ramslib.evaluation import confusion_matrix, predict, score
from ramslib.explorer import validation
from ramslib.explorer.page import describe_run, find_runs
from ramslib.explorer.validation import (
    example_images,
    images_of,
    predict_validation,
    read_cached_validation,
    sort_images,
    threshold_effect,
    validation_images,
)
from ramslib.inspector import Inspector
from ramslib.model import build_model
from ramslib.runs.inference import LoadedModel, load_backbone

BOX = ["top", "left", "bottom", "right"]


@pytest.fixture
def table(tmp_path):
    """Photos of three classes with made-up boxes; the last test photo has none."""
    table = read_table("folder", draw_photos(tmp_path / "photos"), 0.25)
    table[BOX] = 5.0, 8.0, 30.0, 40.0
    table.loc[table.index[-1], BOX] = np.nan
    return table


@pytest.fixture
def loaded(table):
    """Two scales of timm's test_vit at 64 pixels (4 x 4 patches), crops from 96."""
    config = tiny_config("", image_size=64, highres_size=96, class_token="per_scale")
    model, classes = shake(build_model(config, 3)), ["a", "b", "c"]
    return LoadedModel("tiny", model, ImageTransform(96), classes, table, "random", "tiny")


@pytest.fixture
def cached(loaded, tmp_path):
    return predict_validation(loaded, tmp_path / "validation", log=lambda text: None)


def test_finished_runs_are_found_and_described(tmp_path):
    run = make_run(tmp_path / "birds", tmp_path / "runs" / "deep" / "one")
    (tmp_path / "runs" / "unfinished").mkdir()
    (tmp_path / "runs" / "unfinished" / "config.json").write_text("{}")
    assert find_runs(tmp_path / "runs") == [run] and find_runs(tmp_path / "none") == []
    line = describe_run(run, tmp_path / "runs")
    assert (
        line.startswith("deep/one (scales=2, strength=last_class, ") and "% at mean logits" in line
    )


def test_it_is_of_the_validation_images_and_runs_once(loaded, cached, tmp_path, monkeypatch):
    table = loaded.table[loaded.table["split"] == "validation"].reset_index(drop=True)
    expected = predict(loaded.model, table, loaded.transform)
    assert cached.strengths.table["path"].equals(table["path"])
    pd.testing.assert_frame_equal(cached.predictions, expected, check_dtype=False, atol=1e-6)
    monkeypatch.setattr(validation, "predict", None)  # a second run would fail
    again = predict_validation(loaded, tmp_path / "validation")
    assert again.accuracy.equals(cached.accuracy)
    assert torch.equal(again.strengths.maps["last_class"], cached.strengths.maps["last_class"])
    other = dataclasses.replace(loaded, key="other")
    assert read_cached_validation(other, tmp_path / "validation") is None


def test_names_of_files_may_be_no_unicode(loaded, tmp_path):
    for path in (table := loaded.table)["path"]:
        os.rename(path, os.path.dirname(path).encode() + b"/\xe9" + os.path.basename(path).encode())
    table["path"] = table["path"].str.replace(r"([^/]+)$", "\udce9\\1", regex=True)
    cached = predict_validation(loaded, tmp_path / "validation", log=lambda text: None)
    assert set(cached.predictions["path"]) == set(table["path"][table["split"] == "validation"])


def test_a_large_split_is_sampled_once_and_for_all(loaded, monkeypatch):
    monkeypatch.setattr(validation, "LIMIT", 2)
    first, total = validation_images(loaded)
    assert len(first) == 2 < total and first.equals(validation_images(loaded)[0])


def test_no_images_are_refused(loaded, tmp_path):
    with pytest.raises(InputError, match="no images"):
        predict_validation(dataclasses.replace(loaded, table=loaded.table.iloc[:0]), tmp_path)


def test_without_validation_images_the_test_images_are_predicted(loaded):
    table = loaded.table[loaded.table["split"] != "validation"]
    images, total = validation_images(dataclasses.replace(loaded, table=table))
    assert total == len(images) == (table["split"] == "test").sum()


@pytest.mark.parametrize("threshold", [0.6, 1.0, 1.5])
def test_effect_of_a_threshold_is_the_mean_over_images(loaded, cached, threshold):
    settings = loaded.model.settings
    found = threshold_effect(cached, settings, [threshold]).iloc[0]
    rows = []
    for row in cached.strengths.table.to_dict("records"):
        inspector = Inspector(loaded.model, loaded.transform)
        inspector.set_image(row["path"], 0, [row[side] for side in BOX])
        rows.append(inspector.region_stats(inspector.region(threshold=threshold)))
    rows = pd.DataFrame(rows)
    assert found["area"] == pytest.approx(rows["area"].mean(), abs=1e-5)
    assert found["iou"] == pytest.approx(rows["iou"].mean(), abs=1e-5)
    assert found["iou_above_half"] == pytest.approx((rows["iou"].dropna() > 0.5).mean())


def test_stored_accuracy_is_that_of_the_nearest_threshold(cached):
    near = validation.nearest_stored_accuracy(cached, 1.04)
    own = score(cached.predictions).set_index("output")["top1"]
    assert set(near["threshold"]) == {1.0}
    assert near.set_index("output")["top1"].to_dict() == pytest.approx(own.to_dict())
    assert validation.nearest_stored_accuracy(
        dataclasses.replace(cached, accuracy=cached.accuracy.iloc[:0]), 1.0
    ).empty


def test_orders_hold_what_they_say(cached):
    orders = sort_images(cached)
    assert list(orders) == list(validation.VALUES)
    rows = cached.predictions.set_index(["path", "output"])
    for path in cached.strengths.table["path"]:
        before, after = (rows.loc[(path, f"scale {n}"), "rank"] == 0 for n in (1, 2))
        assert (path in orders["corrected by scale 2"]) == (after and not before)
        assert (path in orders["misclassified by scale 2"]) == (before and not after)
    assert orders["most uncertain"].is_monotonic_increasing
    assert len(orders["most uncertain"]) == len(cached.strengths.table)
    best, worst = orders["best boxes"], orders["worst boxes"]
    assert best.is_monotonic_decreasing and worst.is_monotonic_increasing
    assert orders["corrected by scale 2"].is_monotonic_decreasing
    assert orders["misclassified by scale 2"].is_monotonic_increasing
    shown = example_images(cached, 4)
    assert len(shown) == 4 and shown["path"].is_unique and shown["why"].nunique() > 1


def test_a_backbone_alone_is_sorted_by_boxes_only(loaded, tmp_path):
    plain = dataclasses.replace(loaded, classes=[], key="plain")
    cached = predict_validation(plain, tmp_path, log=lambda text: None)
    assert list(sort_images(cached)) == ["best boxes", "worst boxes"]
    unknown = cached.strengths.table.assign(**dict.fromkeys(BOX, np.nan))
    cached = dataclasses.replace(cached, strengths=cached.strengths._replace(table=unknown))
    assert sort_images(cached) == {} and set(example_images(cached, 3)["why"]) == {"in order"}


@pytest.mark.parametrize("limit", [12, 2])
def test_confusion_cells_hold_their_images(cached, limit):
    for output in ("scale 1", "mean softmax"):
        counts = confusion_matrix(cached.predictions, 3, output, limit)
        assert len(counts) == min(limit, 3) and list(counts.index) == list(counts.columns)
        for true in counts.index:
            for predicted in counts.columns:
                paths = images_of(cached, true, predicted, output)
                assert len(paths) == counts.loc[true, predicted]
        if limit > 3:
            assert counts.to_numpy().sum() == len(cached.strengths.table)


def test_a_backbone_alone_is_evaluated(table, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    weights.mkdir()
    backbone = create_backbone("test_vit", 160)
    save_file(backbone.state_dict(), weights / "test_vit.safetensors")
    monkeypatch.setattr(f"{load_backbone.__module__}.cache_folder", lambda: weights)
    loaded = load_backbone("test_vit", table, image_size=64, highres_size=96)
    assert loaded.classes == [] and "test_vit.safetensors" in loaded.origin
    cached = predict_validation(loaded, tmp_path / "validation", log=lambda text: None)
    assert cached.accuracy.empty
    assert set(example_images(cached, 3)["why"]) <= {"best boxes", "worst boxes"}
    inspector = Inspector(loaded.model, loaded.transform).set_image(table["path"][0])
    assert len(inspector.outputs(scales=3)) == 3
