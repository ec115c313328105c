"""The explorer's numbers equal the library's, and no control costs a forward pass of scale 1."""

import dataclasses
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from explorer_run import make_run, shake
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import draw_photos, tiny_config

from ramslib.attention import attention_probabilities, record_attention
from ramslib.backbone import create_backbone
from ramslib.data.datasets import read_table
from ramslib.data.transforms import ImageTransform
from ramslib.dppm import PROPOSALS, propose
from ramslib.errors import InputError
from ramslib.evaluation import confusion_matrix, predict, score
from ramslib.explorer import validation as validations
from ramslib.explorer.lenses import (
    LoadedModel,
    describe_run,
    find_runs,
    open_backbone,
    open_photo,
    open_run,
)
from ramslib.explorer.looking import (
    ProposalSettings,
    choose,
    default_choice,
    follow,
    measure,
    probability_curve,
    run_first_scale,
    strength_names,
    strength_of,
    strength_per_block,
    threshold_curve,
)
from ramslib.explorer.validation import (
    examples,
    images_of,
    orders_of,
    predict_validation,
    read_cached_validation,
    sort_images,
    threshold_effect,
    validation_images,
)
from ramslib.model import RAMSTrans, build_model
from ramslib.plots.images import probabilities_of
from ramslib.strength import STRENGTHS, attention_strength


@pytest.fixture
def table(tmp_path):
    """Photos of three classes with made-up boxes; the last test photo has none."""
    table = read_table("folder", draw_photos(tmp_path / "photos"), 0.25)
    table[["top", "left", "bottom", "right"]] = 5.0, 8.0, 30.0, 40.0
    table.loc[table.index[-1], ["top", "left", "bottom", "right"]] = np.nan
    return table


@pytest.fixture
def lens(table):
    """Two scales of timm's test_vit at 64 pixels (4 x 4 patches), crops from 96."""
    model = shake(
        build_model(tiny_config("", image_size=64, highres_size=96, class_token="per_scale"), 3)[0]
    )
    return LoadedModel(
        "tiny", model, ImageTransform(96, 0.875), ["a", "b", "c"], table, "random", "tiny"
    )


@pytest.fixture
def photo(lens, table):
    row = table.iloc[0]
    return open_photo(lens, row["path"], 1, row[["top", "left", "bottom", "right"]].to_list())


@pytest.fixture
def forwards(lens, monkeypatch):
    """Count the passes through the backbone."""
    calls, run = [], lens.model.backbone.forward_features
    monkeypatch.setattr(
        lens.model.backbone, "forward_features", lambda view: calls.append(1) or run(view)
    )
    return calls


@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("highres_size", [32, 48])
@pytest.mark.parametrize("class_token", ["per_scale", "shared"])
def test_looks_are_those_of_the_model(table, scales, highres_size, class_token):
    config = tiny_config("", scales=scales, threshold=0.9, class_token=class_token)
    model = shake(build_model(config, 3)[0])
    lens = LoadedModel("", model, ImageTransform(highres_size), ["a", "b", "c"], table, "", "")
    photo = open_photo(lens, table["path"][0])
    choice = dataclasses.replace(default_choice(lens), scales=scales)
    seen = follow(lens, photo, [run_first_scale(lens, photo)], choice)
    with torch.no_grad():
        looks = list(model.scales(photo.images, photo.source))
    assert len(seen) == len(looks) == scales
    for number, (mine, look) in enumerate(zip(seen, looks, strict=True)):
        assert torch.allclose(mine.logits, look.logits, atol=1e-5)
        assert torch.equal(mine.view, look.view) and torch.equal(mine.boxes, look.boxes)
        if look.strength is not None:
            region = choose(lens, photo, mine, choice, number)
            assert torch.allclose(region.strength, look.strength, atol=1e-6)
            assert all(map(torch.equal, region.proposal, look.proposal))


def test_crop_source_is_a_control(lens, photo):
    seen, choice = run_first_scale(lens, photo), ProposalSettings()
    sharp = choose(lens, photo, seen, choice)
    coarse = choose(lens, photo, seen, dataclasses.replace(choice, from_source=False))
    assert torch.equal(sharp.boxes, coarse.boxes) and not torch.equal(sharp.crop, coarse.crop)
    expected = lens.model.crop_region(seen.view, None, seen.boxes, coarse.proposal.patch_boxes)[0]
    assert torch.equal(coarse.crop, expected)


def test_more_scales_than_trained_read_the_last_token(lens, photo):
    choice = dataclasses.replace(default_choice(lens), scales=4)
    seen = follow(lens, photo, [run_first_scale(lens, photo)], choice)
    assert [look.token for look in seen] == [0, 1, 1, 1]
    mean = torch.stack([look.logits[0].softmax(0) for look in seen]).mean(0)
    assert torch.allclose(probabilities_of(seen)["mean softmax"], mean)


@pytest.mark.parametrize("name", STRENGTHS)
def test_strengths_are_the_registrys(lens, photo, name):
    with torch.no_grad(), record_attention(lens.model.backbone) as blocks:
        lens.model.backbone.forward_features(photo.images)
    expected = attention_strength(blocks, name, lens.model.grid)
    seen = run_first_scale(lens, photo)
    assert torch.allclose(
        strength_of(lens, seen, ProposalSettings(strength=name)), expected, atol=1e-6
    )


def test_single_blocks_and_heads_are_rows_of_the_attention(lens, photo):
    seen = run_first_scale(lens, photo)
    patches = lens.model.grid[0] * lens.model.grid[1]
    for block in (1, 4):
        rows = attention_probabilities(seen.blocks[block - 1])[0, :, 0, -patches:]
        mean = strength_of(lens, seen, ProposalSettings(strength="single_block", block=block))
        assert torch.allclose(mean.flatten(), rows.mean(dim=0), atol=1e-6)
        for head in (1, 2):
            choice = ProposalSettings(strength="single_head", block=block, head=head)
            assert torch.allclose(strength_of(lens, seen, choice).flatten(), rows[head - 1])


def test_models_without_class_token_and_with_bias_can_be_explored(backbone_of, table):
    for family in ("average", "beit", "relpos", "dinov3"):
        token = "rollout_mean"
        model = RAMSTrans(backbone_of(family), 3, 2, strength=token, per_scale_token=False)
        lens = LoadedModel(family, model.eval(), ImageTransform(32), [], table, "", "")
        lens = dataclasses.replace(lens, view=ImageTransform((24, 32)))
        photo = open_photo(lens, table["path"][0])
        seen = run_first_scale(lens, photo)
        names = strength_names(lens)
        assert ("last_class" in names) == (family != "average")
        for name in names:
            choice = ProposalSettings(strength=name, block=2, head=2)
            region = choose(lens, photo, seen, choice)
            assert region.strength.isfinite().all() and region.strength.shape == (1, 3, 4)
            assert strength_per_block(lens, seen, choice).shape == (3, 3, 4)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_controls_need_no_forward_pass(lens, photo, forwards, proposal):
    seen = run_first_scale(lens, photo)
    assert len(forwards) == 1
    for threshold in (0.0, 0.7, 1.3, 50.0):
        choice = ProposalSettings((threshold,), "rollout_class", proposal=proposal)
        first, second = (choose(lens, photo, seen, choice) for _ in range(2))
        assert torch.equal(first.boxes, second.boxes), "the random proposal stays where it is"
        if proposal != "random":
            expected = propose(strength_of(lens, seen, choice), threshold, proposal)
            assert all(map(torch.equal, first.proposal, expected))
    assert len(forwards) == 1


def test_only_changed_scales_run_again(lens, photo, forwards):
    choice = ProposalSettings((0.8, 1.4), scales=3)
    seen = follow(lens, photo, [run_first_scale(lens, photo)], choice)
    assert len(forwards) == 3
    assert follow(lens, photo, seen, choice) == seen and len(forwards) == 3
    other = dataclasses.replace(choice, thresholds=(0.8, 0.0))
    assert not torch.equal(choose(lens, photo, seen[1], other, 1).boxes, seen[2].boxes)
    changed = follow(lens, photo, seen, other)
    assert changed[:2] == seen[:2] and changed[2] is not seen[2] and len(forwards) == 4


def test_numbers_of_a_region(lens, photo):
    seen = run_first_scale(lens, photo)
    region = choose(lens, photo, seen, ProposalSettings((1.0,)))
    numbers = measure(lens, photo, region)
    patch = 64 // lens.model.grid[0]
    box = [float(side) * patch for side in region.proposal.patch_boxes[0]]  # input pixels
    resized = round(96 / 0.875)
    margin = round((resized - 96) / 2)
    height, width = photo.size[0].tolist()
    scales = (height, width, height, width)
    sides = [(side * 96 / 64 + margin) * s / resized for side, s in zip(box, scales, strict=True)]
    assert [numbers[k] for k in ("top", "left", "bottom", "right")] == pytest.approx(sides)
    top, left, bottom, right = sides
    assert numbers["area"] == pytest.approx((bottom - top) * (right - left) / (height * width))
    tall = max(0, min(bottom, 30) - max(top, 5))
    wide = max(0, min(right, 40) - max(left, 8))
    union = (bottom - top) * (right - left) + 25 * 32 - tall * wide
    assert numbers["iou"] == pytest.approx(tall * wide / union)
    assert numbers["patches"] == int(region.proposal.mask.sum())
    assert numbers["kept"] <= numbers["patches"] and numbers["components"] >= 1


def test_a_photo_without_a_box_has_no_iou(lens, table):
    photo = open_photo(lens, table["path"].iloc[-1], truth=[np.nan] * 4)
    seen = run_first_scale(lens, photo)
    assert np.isnan(measure(lens, photo, choose(lens, photo, seen, ProposalSettings()))["iou"])
    assert list(threshold_curve(lens, photo, seen, ProposalSettings(), [0.5, 1])) == [
        "threshold",
        "area",
    ]


def test_curves_of_a_photo_are_its_numbers_at_every_threshold(lens, photo):
    seen, thresholds = run_first_scale(lens, photo), [0.0, 0.9, 1.1, 9.0]
    curve = threshold_curve(lens, photo, seen, ProposalSettings(), thresholds)
    chances = list(probability_curve(lens, photo, seen, ProposalSettings(), thresholds))
    for threshold, row, chance in zip(thresholds, curve.itertuples(), chances, strict=True):
        choice = ProposalSettings((threshold,))
        numbers = measure(lens, photo, choose(lens, photo, seen, choice))
        assert (row.area, row.iou) == pytest.approx((numbers["area"], numbers["iou"]))
        second = follow(lens, photo, [seen], choice)[1]
        assert chance == pytest.approx(float(second.logits[0].softmax(0)[photo.label]), abs=1e-6)


@pytest.mark.parametrize("name", STRENGTHS)
def test_build_up_ends_with_the_strength(lens, photo, name):
    seen, choice = run_first_scale(lens, photo), ProposalSettings(strength=name)
    maps = strength_per_block(lens, seen, choice)
    assert maps.shape == (6, *lens.model.grid)
    assert torch.equal(maps[-1:], strength_of(lens, seen, choice))
    assert torch.equal(maps[1], attention_strength(seen.blocks[:2], name, lens.model.grid)[0])


def test_photos_that_cannot_be_looked_at(lens, tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    for name, words in (("text.jpg", "image"), ("dot.png", "1 x 1"), ("none.png", "no such")):
        with pytest.raises(InputError, match=words) as error:
            open_photo(lens, tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run with random weights."""
    return make_run(tmp_path / "birds", tmp_path / "runs" / "deep" / "one")


def test_finished_runs_are_found_and_opened(run, tmp_path):
    (tmp_path / "runs" / "unfinished").mkdir()
    (tmp_path / "runs" / "unfinished" / "config.json").write_text("{}")
    assert find_runs(tmp_path / "runs") == [run] and find_runs(tmp_path / "none") == []
    line = describe_run(run, tmp_path / "runs")
    assert line.startswith("deep/one (2 scales, last_class, ") and "% at" in line
    lens = open_run(run)
    assert lens.classes == ["bird 0", "bird 1", "bird 2"] and lens.view.size == (96, 96)
    stored = load_file(run / "best.safetensors")["model.classifier.weight"]
    assert torch.equal(lens.model.classifier.weight, stored)
    with pytest.raises(InputError, match="not the folder of a run"):
        open_run(tmp_path / "runs" / "nothing")


def test_a_run_of_transfg_is_refused(tmp_path):
    run = make_run(tmp_path / "birds", tmp_path / "runs" / "fg", model="transfg")
    assert find_runs(tmp_path / "runs") == [run]
    for look in (open_run, partial(describe_run, folder=tmp_path)):
        with pytest.raises(InputError, match="shows RAMS-Trans and plain ViT, not transfg"):
            look(run)


@pytest.fixture
def surveyed(lens, tmp_path):
    """A lens and its stored survey."""
    return lens, predict_validation(lens, tmp_path / "validations", say=lambda text: None)


def test_survey_is_of_the_validation_images_and_runs_once(surveyed, tmp_path, monkeypatch):
    lens, survey = surveyed
    table = lens.table[lens.table["split"] == "validation"].reset_index(drop=True)
    expected = predict(lens.model, table, lens.view)
    assert survey.total == len(table) and survey.strengths.table["path"].equals(table["path"])
    pd.testing.assert_frame_equal(survey.predictions, expected, check_dtype=False, atol=1e-6)
    monkeypatch.setattr(validations, "predict", None)  # a second run would fail
    again = predict_validation(lens, tmp_path / "validations")
    assert again.accuracy.equals(survey.accuracy)
    assert torch.equal(again.strengths.maps["last_class"], survey.strengths.maps["last_class"])
    assert (
        read_cached_validation(dataclasses.replace(lens, key="other"), tmp_path / "validations")
        is None
    )


def test_survey_of_nothing_is_refused(lens, tmp_path):
    with pytest.raises(InputError, match="no images"):
        predict_validation(dataclasses.replace(lens, table=lens.table.iloc[:0]), tmp_path)


def test_without_validation_images_the_test_images_are_surveyed(lens):
    table = lens.table[lens.table["split"] != "validation"]
    images, total = validation_images(dataclasses.replace(lens, table=table))
    assert total == len(images) == (table["split"] == "test").sum()


@pytest.mark.parametrize("threshold", [0.6, 1.0, 1.5])
def test_effect_of_a_threshold_is_the_mean_over_photos(surveyed, threshold):
    lens, survey = surveyed
    found = threshold_effect(survey, "last_class", "attention", [threshold]).iloc[0]
    rows = []
    for row in survey.strengths.table.to_dict("records"):
        photo = open_photo(
            lens, row["path"], 0, [row[s] for s in ("top", "left", "bottom", "right")]
        )
        seen = run_first_scale(lens, photo)
        rows.append(measure(lens, photo, choose(lens, photo, seen, ProposalSettings((threshold,)))))
    rows = pd.DataFrame(rows)
    assert found["area"] == pytest.approx(rows["area"].mean(), abs=1e-5)
    assert found["iou"] == pytest.approx(rows["iou"].mean(), abs=1e-5)
    assert found["iou_above_half"] == pytest.approx((rows["iou"].dropna() > 0.5).mean())


def test_stored_accuracy_is_that_of_the_nearest_threshold(surveyed):
    lens, survey = surveyed
    near = validations.nearest_stored_accuracy(survey, 1.04)
    own = score(survey.predictions).set_index("output")["top1"]
    assert near.pop("threshold") == 1.0
    assert near == pytest.approx(own.to_dict())


def test_galleries_hold_what_they_say(surveyed):
    lens, survey = surveyed
    assert orders_of(lens, survey) == list(validations.ORDERS)
    rows = survey.predictions.set_index(["path", "output"])
    for path in survey.strengths.table["path"]:
        before, after = (rows.loc[(path, f"scale {n}"), "rank"] == 0 for n in (1, 2))
        repaired = sort_images(survey, "repaired by scale 2")["path"].tolist()
        broken = sort_images(survey, "broken by scale 2")["path"].tolist()
        assert (path in repaired) == (after and not before)
        assert (path in broken) == (before and not after)
    uncertain = sort_images(survey, "most uncertain")
    assert uncertain["value"].is_monotonic_increasing
    assert len(uncertain) == len(survey.strengths.table)
    best, worst = (sort_images(survey, f"{name} boxes") for name in ("best", "worst"))
    assert best["value"].is_monotonic_decreasing and worst["value"].is_monotonic_increasing
    shown = examples(lens, survey, 4)
    assert len(shown) == 4 and shown["path"].is_unique and shown["why"].nunique() > 1


def test_a_backbone_alone_is_judged_by_boxes_only(surveyed):
    lens, survey = surveyed
    plain = dataclasses.replace(lens, classes=[])
    assert orders_of(plain, survey) == ["best boxes", "worst boxes"]


@pytest.mark.parametrize("limit", [12, 2])
def test_confusion_cells_hold_their_photos(surveyed, limit):
    _, survey = surveyed
    for scale in ("scale 1", "mean softmax"):
        counts = confusion_matrix(survey.predictions, 3, scale, limit)
        assert len(counts) == min(limit, 3) and list(counts.index) == list(counts.columns)
        for true in counts.index:
            for given in counts.columns:
                paths = images_of(survey, true, given, scale)
                assert len(paths) == counts.loc[true, given]
        if limit > 3:
            assert counts.to_numpy().sum() == len(survey.strengths.table)


def test_a_backbone_alone_is_surveyed_and_explored(table, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    weights.mkdir()
    backbone = create_backbone("test_vit", 160)[0]
    save_file(backbone.state_dict(), weights / "test_vit.safetensors")
    monkeypatch.setattr("ramslib.explorer.lenses.cache_folder", lambda: weights)
    lens = open_backbone("test_vit", table, image_size=64, highres_size=96)
    assert lens.classes == [] and "test_vit.safetensors" in lens.origin
    survey = predict_validation(lens, tmp_path / "validations", say=lambda text: None)
    assert survey.accuracy.empty and set(examples(lens, survey, 3)["why"]) <= set(
        validations.ORDERS[3:]
    )
    photo = open_photo(lens, table["path"][0])
    assert len(follow(lens, photo, [run_first_scale(lens, photo)], ProposalSettings(scales=3))) == 3
