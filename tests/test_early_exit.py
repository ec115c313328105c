"""Adaptive inference: as few looks as it takes, each image on its own, thresholds from a table."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluation import VIEW, opinionated, table  # noqa: F401 (a fixture)

from ramslib.early_exit import (
    choose_threshold,
    early_exit_curve,
    early_exit_predict,
    predict_early_exit,
)
from ramslib.errors import InputError
from ramslib.evaluation import predict, score


@pytest.fixture(scope="module", params=[2, 3])
def model(request):
    return opinionated(scales=request.param)


def middle(predictions):
    """A threshold between the confidences of scale 1, with images on both sides."""
    confidence = np.sort(predictions.query("output == 'scale 1'")["confidence"])
    return confidence[7:9].mean()


@pytest.mark.parametrize("threshold, name", [(0.0, "scale 1"), (1.0, "mean softmax")])
def test_the_extremes_are_one_look_and_all(model, table, threshold, name):  # noqa: F811
    expected = predict(model, table, VIEW, batch_size=4).query("output == @name")
    found = predict_early_exit(model, table, VIEW, threshold, batch_size=4)
    assert found["looks"].eq(1 if threshold == 0 else model.num_scales).all()
    columns = ["path", "label", "prediction", "confidence", "true_probability", "rank"]
    pd.testing.assert_frame_equal(
        found[columns], expected[columns].reset_index(drop=True), rtol=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 3, 17])
def test_each_image_gets_its_own_answer_in_any_batch(model, table, batch_size):  # noqa: F811
    full = predict(model, table, VIEW, batch_size=17)
    first, fused = (
        full.query("output == @name").reset_index(drop=True) for name in ("scale 1", "mean softmax")
    )
    threshold = middle(full)
    found = predict_early_exit(model, table, VIEW, threshold, batch_size)
    sure = first["confidence"] > threshold
    assert 0 < sure.sum() < len(table)
    assert found["looks"].tolist() == [1 if one else model.num_scales for one in sure]
    assert found["path"].tolist() == table["path"].tolist()
    for name in ("prediction", "confidence", "true_probability", "rank"):
        np.testing.assert_allclose(found[name], first[name].where(sure, fused[name]), rtol=1e-4)


def test_only_the_unsure_are_encoded_again(model, table):  # noqa: F811
    encoded = []
    hook = model.backbone.blocks[0].register_forward_hook(
        lambda _, given, __: encoded.append(len(given[0]))
    )
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        confidence = model(images).logits[0].softmax(dim=1).amax(dim=1)
    encoded.clear()
    _, sure = early_exit_predict(model, images, None, confidence.sort().values[2:4].mean())
    assert sure.sum() == 3 and encoded == [6, *[3] * (model.num_scales - 1)]
    encoded.clear()
    assert early_exit_predict(model, images, None, 0.0)[1].all() and encoded == [6]
    hook.remove()


def test_one_scale_is_always_sure_enough(table):  # noqa: F811
    model = opinionated(scales=1)
    found = predict_early_exit(model, table, VIEW, 0.9)
    expected = predict(model, table, VIEW)
    np.testing.assert_allclose(found["confidence"], expected["confidence"], rtol=1e-5)
    assert found["looks"].eq(1).all()


def test_a_damaged_model_is_told(table):  # noqa: F811
    model = opinionated()
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="logits are not finite"):
        predict_early_exit(model, table, VIEW, 0.5)


def predictions_of(confidence, first, full):
    """A table of predictions as `predict` gives it, of confidences and ranks."""
    rows = []
    for index, values in enumerate(zip(confidence, first, full, strict=True)):
        for name, rank in zip(("scale 1", "mean softmax"), values[1:], strict=True):
            rows.append({"path": index, "output": name, "confidence": values[0], "rank": rank})
    return pd.DataFrame(rows)


def test_the_threshold_is_the_lowest_that_keeps_the_accuracy():
    # the second look mends the images of confidence 0.3 and 0.5 and spoils that of 0.7
    predictions = predictions_of([0.3, 0.5, 0.7, 0.9], [1, 1, 0, 0], [0, 0, 1, 0])
    curve = early_exit_curve(predictions)
    assert curve["threshold"].tolist() == [0, 0.3, 0.5, 0.7, 0.9, 1]
    assert curve["stopped"].tolist() == [1, 0.75, 0.5, 0.25, 0, 0]
    assert curve["top1"].tolist() == [50, 75, 100, 75, 75, 75]
    assert curve["loss"].tolist() == [25, 0, -25, 0, 0, 0]
    assert choose_threshold(predictions, 0.0) == 0.3
    assert choose_threshold(predictions, 25.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_a_chosen_threshold_loses_no_more_than_was_allowed(images):
    confidence, first, full = zip(*images, strict=True)
    predictions = predictions_of(confidence, map(int, first), map(int, full))
    curve = early_exit_curve(predictions).set_index("threshold")
    assert curve["loss"].iloc[-1] == 0 and curve["stopped"].is_monotonic_decreasing
    for allowed in (0.0, 10.0, 100.0):
        chosen = choose_threshold(predictions, allowed)
        assert (curve.loc[chosen:, "loss"] <= allowed).all()


def test_scores_read_the_table(model, table):  # noqa: F811
    scores = score(predict_early_exit(model, table, VIEW, 0.5))
    assert scores["output"].tolist() == ["early exit"] and scores["images"].item() == 17


def test_bad_input_is_told():
    with pytest.raises(InputError, match="chooses between scales"):
        choose_threshold(predictions_of([0.5], [0], [0]).query("output == 'scale 1'"))
    with pytest.raises(InputError, match="points that may be lost are -1; give 0 or more"):
        choose_threshold(predictions_of([0.5], [0], [0]), -1)
