"""Evaluation and early exit against scores and choices written out in numpy and plain Python."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import draw_photos, tiny_model

import ramslib.evaluation
from ramslib.classifier import RAMSOutput
from ramslib.data.datasets import read_table
from ramslib.data.transforms import ImageTransform
from ramslib.distributed import Processes
from ramslib.errors import InputError
from ramslib.evaluation import (
    BOX_COLUMNS,
    choose_exit_threshold,
    confusion_matrix,
    early_exit,
    early_exit_curve,
    expected_calibration_error,
    fuse,
    iterate_batches,
    output_names,
    predict,
    predict_early_exit,
    score,
    score_boxes,
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """17 test photos, of two shapes."""
    root = draw_photos(tmp_path_factory.mktemp("photos"), classes=1, test=9)
    draw_photos(root / "more", classes=2, test=8, size=60)
    for name in ("train", "test"):
        (root / "more" / name / "bird 1").rename(root / name / "bird 1")
    shutil.rmtree(root / "more")
    table = read_table("folder", root, 0)
    return table[table["split"] == "test"].reset_index(drop=True)


TRANSFORM = ImageTransform(48, 0.875)


def test_every_image_is_predicted_once_at_every_scale(table):
    model = tiny_model(scales=3)
    predictions = predict(model, table, TRANSFORM, batch_size=4)
    assert len(predictions) == 17 * 5
    assert predictions["path"].tolist() == table["path"].repeat(5).tolist()
    assert predictions["label"].tolist() == table["label"].repeat(5).tolist()
    assert predictions["output"].tolist() == output_names(3) * 17
    assert predictions["confidence"].between(0.2, 1).all()
    assert predictions["true_probability"].le(predictions["confidence"]).all()
    assert (predictions["rank"] == 0).eq(predictions["prediction"] == predictions["label"]).all()


def test_predictions_do_not_depend_on_batches_workers_or_place_in_the_table(table):
    model = tiny_model()
    expected = predict(model, table, TRANSFORM, batch_size=1)
    for batch_size, workers in ((5, 0), (64, 1)):
        found = predict(model, table, TRANSFORM, batch_size, workers)
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4)
    turned = predict(model, table[::-1].reset_index(drop=True), TRANSFORM, batch_size=4)
    key = ["path", "output"]
    turned, expected = (each.sort_values(key, ignore_index=True) for each in (turned, expected))
    pd.testing.assert_frame_equal(turned, expected, rtol=1e-4)


@pytest.mark.parametrize("proposal", ["attention", "random"])
@pytest.mark.parametrize("world", [2, 3, 20])
def test_processes_share_the_images_without_overlap(table, monkeypatch, world, proposal):
    """Their sum is the table of one: each row is filled by one process and 0 in the others."""
    model, parts = tiny_model(proposal=proposal), []
    whole = predict(model, table, TRANSFORM, batch_size=4)
    monkeypatch.setattr(
        ramslib.evaluation,
        "sum_over_processes",
        lambda results, _: parts.append(results) or results,
    )
    for rank in range(world):
        predict(model, table, TRANSFORM, 4, processes=Processes(rank, world))
    filled = torch.stack([part[:, 0, 1] > 0 for part in parts])
    assert filled.sum(dim=0).tolist() == [1] * 17
    columns = ["prediction", "confidence", "true_probability", "rank", "calibrated", *BOX_COLUMNS]
    total = sum(parts).numpy().reshape(-1, len(columns))
    np.testing.assert_allclose(total, whole[columns].to_numpy(float), rtol=1e-4)


def test_random_regions_are_random_but_reproducible_and_leave_the_generator_alone(table):
    model = tiny_model(proposal="random")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = predict(model, table, TRANSFORM, 4)
    assert torch.rand(3).equal(expected)
    second = predict(model, table, TRANSFORM, 16)
    pd.testing.assert_frame_equal(first, second)
    corners = first.query("output == 'scale 2'")[["top", "left"]].drop_duplicates()
    assert len(corners) > 3


def test_regions_are_in_pixels_of_the_upright_image(table):
    """Scale 1 sees the center crop; scale 2 whole patches inside it."""
    predictions = predict(tiny_model(), table, TRANSFORM, 4)
    sizes = {path: (40, 48) if "bird 0" in path else (60, 68) for path in table["path"]}
    resized, margin = 55, 3  # 48 / 0.875, and (55 - 48) / 2 rounded
    for row in predictions.dropna(subset=BOX_COLUMNS).itertuples():
        height, width = sizes[row.path]
        box = np.array([row.top, row.left, row.bottom, row.right])
        inside = box * (np.array([resized] * 4) / [height, width, height, width]) - margin
        assert inside.min() > -1 - 1e-6 and inside.max() < 49 + 1e-6
        if row.output == "scale 1":
            assert inside == pytest.approx([0, 0, 48, 48], abs=1.01)
    fused = predictions["output"].str.startswith("mean")
    assert predictions.loc[fused, BOX_COLUMNS].isna().all(axis=None)


def test_weights_that_give_no_number_are_an_error_and_not_a_correct_answer(table):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias[2] = float("nan")
    with pytest.raises(InputError, match=r"0.png: the model's logits are not finite"):
        predict(model, table, TRANSFORM, 4)


def halves(strength, threshold, recorded):
    """A proposal of two regions: left and right."""
    height, width = recorded.grid
    boxes = torch.tensor([[0, 0, height, width // 2], [0, width // 2, height, width]])
    return boxes.expand(len(strength), 2, 4)


def left(strength, threshold, recorded):
    return halves(strength, threshold, recorded)[:, 0]


def test_of_several_regions_the_first_is_reported_and_all_are_averaged(table):
    model = tiny_model(scales=3)
    predictions = []
    for proposal in (halves, left):
        model.settings = replace(model.settings, proposal=proposal)
        predictions.append(predict(model, table, TRANSFORM, 4))
        (batch,) = iterate_batches(model, table, TRANSFORM, 17)
        with torch.no_grad():
            output = model(batch["pixels"])
        probabilities = torch.stack(fuse(output.logits), dim=1).flatten(0, 1)
        confidence, prediction = probabilities.max(dim=1)
        np.testing.assert_allclose(predictions[-1]["confidence"], confidence, rtol=1e-4)
        assert predictions[-1]["prediction"].tolist() == prediction.tolist()
    several, first = predictions
    pd.testing.assert_frame_equal(several[BOX_COLUMNS], first[BOX_COLUMNS])
    change = (several["confidence"] - first["confidence"]).abs().groupby(several["output"]).max()
    assert change["scale 1"] == 0 and change.drop("scale 1").min() > 0.01


def test_fusions_are_means():
    logits = tuple(torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(3))
    probabilities = [each.numpy() for each in fuse(logits)]
    single = [np.exp(each.numpy()) for each in logits]
    single = [each / each.sum(axis=1, keepdims=True) for each in single]
    mean = np.exp(sum(each.numpy() for each in logits) / 3)
    expected = [*single, sum(single) / 3, mean / mean.sum(axis=1, keepdims=True)]
    assert len(probabilities) == len(output_names(3)) == 5
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    assert len(fuse(logits[:1])) == len(output_names(1)) == 1


@pytest.mark.parametrize(
    ("weights", "used"),
    [
        ((1.0, 0.25, 0.0), (1, 0.25, 0)),
        ((0.0, 0.0, 1.0), (0, 0, 1)),
        ((0.2, 1.0), (0.2, 1, 1)),
        ((0.0, 0.0, 0.0, 1.0), (1, 1, 1)),
    ],
    ids=["all", "last", "fewer than scales", "none of them"],
)
def test_scales_count_in_the_means_by_their_weights(weights, used):
    logits = tuple(torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(3))
    *_, softmax, logit = fuse(logits, weights)
    expected = np.average([each.softmax(1) for each in logits], axis=0, weights=used)
    np.testing.assert_allclose(softmax, expected, rtol=1e-5)
    expected = torch.tensor(np.average(logits, axis=0, weights=used)).softmax(1)
    np.testing.assert_allclose(logit, expected, rtol=1e-5)


def test_the_answer_counts_scales_as_the_loss_does(table):
    found = predict(tiny_model(loss="last"), table, TRANSFORM, 4)
    found = found.pivot(index="path", columns="output", values="true_probability")
    for mean in ("mean softmax", "mean logits"):
        np.testing.assert_allclose(found[mean], found["scale 2"], rtol=1e-6)
    assert (found["scale 1"] - found["scale 2"]).abs().max() > 0.01


class Fixed(torch.nn.Module):
    """Gives each image the logits that are written for it."""

    num_scales, image_size, device, temperatures = 1, (48, 48), torch.device("cpu"), {}
    scale_weights = ()

    def __init__(self, logits):
        super().__init__()
        self.logits, self.place = torch.nn.Parameter(logits), 0

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        rows = slice(self.place, self.place + len(pixels))
        self.place += len(pixels)
        boxes = torch.tensor([0.0, 0, 48, 48]).repeat(len(pixels), 1)
        return RAMSOutput((self.logits[rows],), (boxes,), (), ())


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=15)
def test_scores_are_those_of_independent_formulas(table, seed, ties):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(17, 9)) * 3
    logits = (logits.round() if ties else logits).astype(np.float32)
    labeled = table.assign(label=draw.integers(0, 9, 17))
    predictions = predict(Fixed(torch.tensor(logits)), labeled, TRANSFORM, 5)
    found = score(predictions).iloc[0]
    expected = _reference(logits.astype(float), labeled["label"].tolist())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def _reference(logits, labels):
    """Every score in plain Python; of classes that tie, the first is ahead."""
    correct, among_five, of_class, losses, pairs = [], [], {}, [], []
    for row, label in zip(logits, labels, strict=True):
        exponents = [math.exp(value - max(row)) for value in row]
        probabilities = [value / sum(exponents) for value in exponents]
        order = sorted(range(len(row)), key=lambda k: (-row[k], k))
        correct.append(order[0] == label)
        among_five.append(label in order[:5])
        of_class.setdefault(label, []).append(order[0] == label)
        losses.append(-math.log(probabilities[label]))
        pairs.append((max(probabilities), order[0] == label))
    share = sum(correct) / len(labels)
    gap = 0.0
    for number in range(15):
        inside = [p for p in pairs if number <= min(p[0] * 15, 14.999999) < number + 1]
        if inside:
            confidence = sum(p[0] for p in inside) / len(inside)
            accuracy = sum(p[1] for p in inside) / len(inside)
            gap += len(inside) / len(pairs) * abs(confidence - accuracy)
    return {
        "images": len(labels),
        "top1": 100 * share,
        "standard_error": 100 * math.sqrt(share * (1 - share) / len(labels)),
        "top5": 100 * sum(among_five) / len(labels),
        "mean_per_class_accuracy": 100
        * sum(sum(c) / len(c) for c in of_class.values())
        / len(of_class),
        "ece": 100 * gap,
        "nll": sum(losses) / len(losses),
    }


def test_calibration_error_of_known_cases():
    sure, right = pd.Series([1.0, 1.0, 1.0, 1.0]), pd.Series([True, True, False, False])
    assert expected_calibration_error(sure, right) == pytest.approx(0.5)
    assert expected_calibration_error(pd.Series([0.5] * 4), right) == pytest.approx(0)
    assert expected_calibration_error(
        pd.Series([0.0, 1.0]), right[[0, 2]].set_axis([0, 1])
    ) == pytest.approx(1)


def test_boxes_are_scored_against_annotations_in_the_same_pixels():
    regions = pd.DataFrame(
        [
            ("a", "scale 1", 0, 0, 10, 10),
            ("a", "scale 2", 0, 0, 5, 10),
            ("b", "scale 1", 1, 1, 2, 2),
        ],
        columns=["path", "output", *BOX_COLUMNS],
    )
    fused = pd.DataFrame({"path": ["a"], "output": ["mean softmax"]})
    table = pd.DataFrame(
        [("a", 0, 5, 10, 15), ("b", np.nan, np.nan, np.nan, np.nan)], columns=["path", *BOX_COLUMNS]
    )
    scores = score_boxes(pd.concat([regions, fused]), table)
    assert scores["output"].tolist() == ["scale 1", "scale 2"]
    assert scores["iou"].tolist() == pytest.approx([50 / 150, 25 / 125])
    assert scores["area"].tolist() == pytest.approx([1.0, 0.5])
    with pytest.raises(InputError, match="no.* annotated box"):
        score_boxes(regions, table[1:])


def test_confusion_matrix_counts_every_image_and_keeps_the_classes_with_most_mistakes():
    rows = [(0, 0), (0, 2), (2, 0), (2, 0), (3, 3), (3, 1)]
    predictions = pd.DataFrame(rows, columns=["label", "prediction"]).assign(output="scale 1")
    whole = confusion_matrix(predictions, 4, "scale 1")
    counted = [[rows.count((true, given)) for given in range(4)] for true in range(4)]
    assert whole.to_numpy().tolist() == counted
    few = confusion_matrix(predictions, 4, "scale 1", limit=2)
    assert few.index.tolist() == few.columns.tolist() == [0, 2]
    assert few.equals(whole.loc[[0, 2], [0, 2]])
    assert confusion_matrix(predictions, 4, "scale 2").to_numpy().tolist() == [[0] * 4] * 4


# --- early exit ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(2, "attention"), (3, "attention"), (3, "random")], ids=str)
def model(request):
    scales, proposal = request.param
    return tiny_model(scales=scales, proposal=proposal)


def middle(predictions):
    """A threshold between the confidences of scale 1, with images on both sides."""
    confidence = np.sort(predictions.query("output == 'scale 1'")["confidence"])
    return confidence[7:9].mean()


@pytest.mark.parametrize("threshold, name", [(0.0, "scale 1"), (1.0, "mean logits")])
def test_the_extremes_are_one_scale_and_all(model, table, threshold, name):
    expected = predict(model, table, TRANSFORM, batch_size=4).query("output == @name")
    found = predict_early_exit(model, table, TRANSFORM, threshold, batch_size=4)
    assert found["scales"].eq(1 if threshold == 0 else model.num_scales).all()
    columns = ["path", "label", "prediction", "confidence", "true_probability", "rank"]
    pd.testing.assert_frame_equal(
        found[columns], expected[columns].reset_index(drop=True), rtol=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 3, 17])
def test_each_image_gets_its_own_answer_in_any_batch(model, table, batch_size):
    full = predict(model, table, TRANSFORM, batch_size=17)
    first, fused = (
        full.query("output == @name").reset_index(drop=True) for name in ("scale 1", "mean logits")
    )
    threshold = middle(full)
    found = predict_early_exit(model, table, TRANSFORM, threshold, batch_size)
    confident = first["confidence"] > threshold
    assert 0 < confident.sum() < len(table)
    assert found["scales"].tolist() == [1 if one else model.num_scales for one in confident]
    assert found["path"].tolist() == table["path"].tolist()
    for name in ("prediction", "confidence", "true_probability", "rank"):
        np.testing.assert_allclose(
            found[name], first[name].where(confident, fused[name]), rtol=1e-4
        )


def test_only_the_unconfident_are_encoded_again(model, table):
    encoded = []
    hook = model.backbone.blocks[0].register_forward_hook(
        lambda _, given, __: encoded.append(len(given[0]))
    )
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        confidence = model(pixels).logits[0].softmax(dim=1).amax(dim=1)
    encoded.clear()
    _, confident = early_exit(model, pixels, confidence.sort().values[2:4].mean())
    assert confident.sum() == 3 and encoded == [6, *[3] * (model.num_scales - 1)]
    encoded.clear()
    assert early_exit(model, pixels, 0.0)[1].all() and encoded == [6]
    hook.remove()


def test_one_scale_is_always_confident_enough(table):
    model = tiny_model(scales=1)
    found = predict_early_exit(model, table, TRANSFORM, 0.9)
    expected = predict(model, table, TRANSFORM)
    np.testing.assert_allclose(found["confidence"], expected["confidence"], rtol=1e-5)
    assert found["scales"].eq(1).all()


def test_early_exit_of_a_damaged_model_is_an_error(table):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="logits are not finite"):
        predict_early_exit(model, table, TRANSFORM, 0.5)


def predictions_of(confidence, first, full):
    """A table of predictions as `predict` gives it, of confidences and ranks."""
    rows = []
    for index, values in enumerate(zip(confidence, first, full, strict=True)):
        for name, rank in zip(("scale 1", "mean logits"), values[1:], strict=True):
            rows.append({"path": index, "output": name, "confidence": values[0], "rank": rank})
    return pd.DataFrame(rows)


def test_the_threshold_is_the_lowest_that_keeps_the_accuracy():
    # scale 2 corrects the images of confidence 0.3 and 0.5 and misclassifies that of 0.7
    predictions = predictions_of([0.3, 0.5, 0.7, 0.9], [1, 1, 0, 0], [0, 0, 1, 0])
    curve = early_exit_curve(predictions)
    assert curve["threshold"].tolist() == [0, 0.3, 0.5, 0.7, 0.9, 1]
    assert curve["exit_rate"].tolist() == [1, 0.75, 0.5, 0.25, 0, 0]
    assert curve["top1"].tolist() == [50, 75, 100, 75, 75, 75]
    assert curve["accuracy_drop"].tolist() == [25, 0, -25, 0, 0, 0]
    # 4 images seen, 50 promised; scale 2 corrects 2 of the 2 that scale 1 misclassifies, or 3 of 4
    wrong = [100 * sum(1 - c for c in (0.3, 0.5, 0.7, 0.9)[kept:]) / 4 for kept in range(5)]
    expected = [4 * 25 / 54 + 50 * 0.75 * wrong[0] / 54, 50 * 0.75 * wrong[1] / 54]
    expected += [4 * -25 / 54 + 50 * 0.75 * wrong[2] / 54, 50 * 0.75 * wrong[3] / 54, 0, 0]
    np.testing.assert_allclose(curve["expected_drop"], expected)
    assert [choose_exit_threshold(predictions, each) for each in (1, 4, 6, 16)] == [
        0.9,
        0.7,
        0.5,
        0.3,
    ]
    assert choose_exit_threshold(predictions, 100.0) == 0.0


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_a_chosen_threshold_is_expected_to_lose_no_more_than_was_allowed(images):
    confidence, first, full = zip(*images, strict=True)
    predictions = predictions_of(confidence, map(int, first), map(int, full))
    curve = early_exit_curve(predictions).set_index("threshold")
    assert curve["accuracy_drop"].iloc[-1] == 0 and curve["exit_rate"].is_monotonic_decreasing
    for allowed in (0.0, 10.0, 100.0):
        chosen = choose_exit_threshold(predictions, allowed)
        assert (curve.loc[chosen:, "expected_drop"] <= allowed).all()


def test_a_threshold_loses_little_on_other_images_however_few_were_seen():
    """Of images of which scale 1 is right as often as its confidence says; chosen by what the seen
    ones alone lost, it would lose 8.1, 3.0 and 1.2 points."""
    draw = np.random.default_rng(0)

    def draw_images(count):
        confidence, luck = draw.beta(4, 1.5, count), draw.random(count)
        right = luck < confidence, luck < (1 + confidence) / 2
        return predictions_of(confidence, *(1 - part.astype(int) for part in right))

    curve = early_exit_curve(draw_images(2000)).set_index("threshold")
    for count in (10, 40, 160):
        chosen = [choose_exit_threshold(draw_images(count), 1.0) for _ in range(20)]
        lost = [curve.loc[:threshold, "accuracy_drop"].iloc[-1] for threshold in chosen]
        assert np.mean(lost) < 1.5, count


def test_scores_read_the_table(model, table):
    scores = score(predict_early_exit(model, table, TRANSFORM, 0.5))
    assert scores["output"].tolist() == ["early exit"] and scores["images"].item() == 17


def test_a_threshold_needs_two_scales_and_a_drop_of_0_or_more():
    with pytest.raises(InputError, match="chooses between scales"):
        choose_exit_threshold(predictions_of([0.5], [0], [0]).query("output == 'scale 1'"))
    with pytest.raises(InputError, match="accuracy_drop is -1; give 0 or more"):
        choose_exit_threshold(predictions_of([0.5], [0], [0]), -1)
