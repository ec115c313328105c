"""Regions scored against boxes and parts: loops in plain Python on maps that are made up."""

import math

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from tiny import draw_photos, tiny_model

from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.datasets import read_table
from ramslib.data.transforms import ImageTransform
from ramslib.errors import InputError
from ramslib.evaluation import predict
from ramslib.localization import (
    StrengthMaps,
    accuracy_by_threshold,
    best_median_worst,
    propose_boxes,
    record_strengths,
    score_regions,
    sweep_thresholds,
)
from ramslib.model import ProposalSettings

GRID, INPUT = (4, 5), (32, 40)
TRANSFORM = ImageTransform((64, 80), 0.8)  # resized to 80 x 100, margins 8 and 10
SIZES = [(120, 200), (90, 60), (80, 100), (50, 50), (300, 310)]


@pytest.fixture
def strengths():
    """Five images of several shapes; the fourth has no annotated box."""
    draw = np.random.default_rng(0)
    rows = []
    for number, (height, width) in enumerate(SIZES):
        top, left = draw.uniform(0, 0.4, 2) * (height, width)
        bottom, right = draw.uniform(0.6, 1, 2) * (height, width)
        rows.append((f"{number}.jpg", top, left, bottom, right))
    table = pd.DataFrame(rows, columns=["path", *BOX_COLUMNS])
    table.loc[3, BOX_COLUMNS] = np.nan
    maps = {
        name: torch.rand(5, *GRID, generator=torch.Generator().manual_seed(1)) ** 3 for name in "ab"
    }
    maps["b"] = maps["b"].flip(2)
    return StrengthMaps(maps, table, TRANSFORM, torch.tensor(SIZES), INPUT)


@pytest.fixture
def parts(strengths):
    """Visible parts at random places; the second image has none."""
    draw = np.random.default_rng(2)
    rows = [
        (path, f"part {number}", *(draw.uniform(0, 1, 2) * size))
        for path, size in zip(strengths.table["path"], SIZES, strict=True)
        for number in range(7)
        if path != "1.jpg"
    ]
    return pd.DataFrame(rows, columns=["path", "part", "y", "x"])


def settings(threshold, proposal="attention", strength="a"):
    """How scale 1 proposes, from the stored strength of that name."""
    return ProposalSettings((threshold,), strength, proposal)


def region_by_hand(strength, threshold, size):
    """Patch box to pixels of the image: margins, and the resize before the crop."""
    top, left, bottom, right = reference.propose(strength.numpy(), threshold)
    scale = (size[0] / 80, size[1] / 100)  # image pixels per pixel of the resized image
    side = (64 / GRID[0], 80 / GRID[1])
    return (
        (top * side[0] + 8) * scale[0],
        (left * side[1] + 10) * scale[1],
        (bottom * side[0] + 8) * scale[0],
        (right * side[1] + 10) * scale[1],
    )


def iou_by_hand(one, other):
    """Intersection over union of two boxes."""
    high = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    wide = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return high * wide / (sum(areas) - high * wide)


@pytest.mark.parametrize("threshold", [0.5, 1.1, 2.5])
def test_scores_equal_the_loops(strengths, parts, threshold):
    boxes = propose_boxes(strengths, settings(threshold))
    scores = score_regions(boxes, strengths, parts)
    assert scores.columns.tolist() == ["path", "iou", "area", "parts_inside"]
    for number, size in enumerate(SIZES):
        region = region_by_hand(strengths.maps["a"][number], threshold, size)
        assert boxes[number].tolist() == pytest.approx(region, rel=1e-5)
        row = scores.iloc[number]
        share = (region[2] - region[0]) * (region[3] - region[1]) / (size[0] * size[1])
        assert row["area"] == pytest.approx(share, rel=1e-4)
        annotated = strengths.table.loc[number, BOX_COLUMNS].tolist()
        if number == 3:
            assert math.isnan(row["iou"])
        else:
            assert row["iou"] == pytest.approx(iou_by_hand(region, annotated), rel=1e-4)
        own = parts[parts["path"] == row["path"]]
        inside = [
            region[0] <= y < region[2] and region[1] <= x < region[3]
            for y, x in zip(own["y"], own["x"], strict=True)
        ]
        if number == 1:
            assert math.isnan(row["parts_inside"])
        else:
            assert row["parts_inside"] == pytest.approx(sum(inside) / 7)


def test_a_sweep_has_the_means_of_every_combination(strengths, parts):
    swept = sweep_thresholds(strengths, [0.8, 1.2], ["attention", "whole", "center"], parts)
    assert len(swept) == 2 * 3 * 2
    keys = swept[["strength", "proposal", "threshold"]].itertuples(index=False, name=None)
    for key, row in zip(keys, swept.to_dict("records"), strict=True):
        scores = score_regions(
            propose_boxes(strengths, settings(key[2], key[1], key[0])), strengths, parts
        )
        iou = [value for value in scores["iou"] if value == value]
        assert row["iou"] == pytest.approx(sum(iou) / 4)
        assert row["iou_above_half"] == sum(value > 0.5 for value in iou) / 4
        assert row["area"] == pytest.approx(scores["area"].mean())
        assert row["parts_inside"] == pytest.approx(scores["parts_inside"].mean())
    whole = swept[swept["proposal"] == "whole"]
    assert whole["area"].tolist() == pytest.approx([0.64] * 4), (
        "of the image, not of its center crop"
    )
    areas = swept.pivot(index=["strength", "threshold"], columns="proposal", values="area")
    assert areas["center"].tolist() == pytest.approx(areas["attention"].tolist())


def test_without_boxes_there_is_no_overlap(strengths):
    table = strengths.table.assign(**dict.fromkeys(BOX_COLUMNS, np.nan))
    swept = sweep_thresholds(strengths._replace(table=table), [1.0])
    assert swept[["iou", "iou_above_half"]].isna().all(axis=None)
    assert swept["area"].notna().all() and "parts_inside" not in swept


def test_random_regions_are_those_of_the_image_and_leave_the_generator_alone(strengths):
    state = torch.get_rng_state()
    first = propose_boxes(strengths, settings(1.2, "random"))
    assert propose_boxes(strengths, settings(1.2, "random")).equal(first)
    assert torch.get_rng_state().equal(state)
    few = StrengthMaps(
        {"a": strengths.maps["a"][:2]}, strengths.table[:2], TRANSFORM, strengths.sizes[:2], INPUT
    )
    assert propose_boxes(few, settings(1.2, "random")).equal(first[:2])


def test_best_median_and_worst():
    scores = pd.Series([0.3, math.nan, 0.9, 0.1, 0.5])
    assert best_median_worst(scores) == {"best": 2, "median": 4, "worst": 3}
    assert best_median_worst(scores[3:4]) == {"best": 0, "median": 0, "worst": 0}
    assert best_median_worst(scores[1:2]) == {}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Test photos of three classes."""
    root = draw_photos(tmp_path_factory.mktemp("photos"))
    table = read_table("folder", root, 0)
    return table[table["split"] == "test"].reset_index(drop=True)


IDEAS = """
import ramslib
import torch

def norms(recorded):
    return recorded.tokens.norm(dim=-1)

@ramslib.reads(blocks=0)
def two(strength, threshold, recorded=None):
    boxes = ramslib.dppm.attention_proposal(strength, threshold).patch_boxes
    whole = torch.tensor([0, 0, *strength.shape[1:]]).expand_as(boxes)
    return torch.stack([boxes, whole], dim=1)
"""


@pytest.mark.parametrize(
    "strength, proposal",
    [("last_class", "attention"), ("last_class", "random"), ("ideas.py:norms", "ideas.py:two")],
)
def test_recorded_regions_and_accuracies_are_those_that_the_model_makes(
    photos, strength, proposal, tmp_path, monkeypatch
):
    (tmp_path / "ideas.py").write_text(IDEAS)
    monkeypatch.chdir(tmp_path)
    model = tiny_model(3, strength=strength, proposal=proposal, threshold=1.1)
    transform = ImageTransform(48, 0.875)
    predictions = predict(model, photos, transform, batch_size=4)
    strengths = record_strengths(model, photos, transform, [strength], batch_size=5)
    shown = predictions.query("output == 'scale 2'")[BOX_COLUMNS].to_numpy()
    found = propose_boxes(strengths, settings(1.1, proposal, strength))
    np.testing.assert_allclose(found, shown, rtol=1e-4, atol=1e-3)
    accuracy = accuracy_by_threshold(model, photos, transform, [0.5, 1.1], batch_size=7)
    for row in accuracy.query("threshold == 1.1").itertuples():
        correct = predictions.loc[predictions["output"] == row.output, "rank"] == 0
        assert row.top1 == pytest.approx(100 * correct.mean())
        error = 100 * math.sqrt(correct.mean() * (1 - correct.mean()) / 15)
        assert row.standard_error == pytest.approx(error) and row.images == 15


def test_a_region_that_thresholds_share_is_run_once(photos):
    model, transform, seen = tiny_model(3), ImageTransform(48, 0.875), []

    def run_scale(inputs, scale, *options, original=model.run_scale):
        seen.append((scale, len(inputs)))
        return original(inputs, scale, *options)

    model.run_scale = run_scale
    accuracy = accuracy_by_threshold(model, photos, transform, [98.0, 99.0, 99.0], batch_size=15)
    assert seen == [(0, 15), (1, 15)], "no patch is that strong: the whole image, each time"
    assert accuracy.groupby("output")["top1"].nunique().eq(1).all()


def test_a_proposal_that_reads_more_than_the_strength_is_not_swept(strengths):
    with pytest.raises(InputError, match="'mine' may read the recorded scale.*reads"):

        def mine(strength, threshold, recorded):
            return recorded.tokens

        propose_boxes(strengths, settings(1.0, mine))


def test_accuracies_by_threshold_need_two_scales(photos):
    with pytest.raises(InputError, match="two scales, not 3"):
        accuracy_by_threshold(tiny_model(3, scales=3), photos, ImageTransform(48), [1.0])
