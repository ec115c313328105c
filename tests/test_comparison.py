"""Comparisons: pairs of images counted by hand, equal budgets, each cell once."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import draw_photos, tiny_config

import ramslib.experiments.ablation
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.experiments import comparison
from ramslib.experiments.comparison import (
    METHODS,
    compare,
    differences,
    match_training_time,
    paired_image_differences,
    plan_methods,
    published,
)
from ramslib.training.trainer import train


def predictions_of(ranks, scale="scale 1", labels=None):
    """A table of predictions with these ranks."""
    labels = [0] * len(ranks) if labels is None else labels
    paths = [f"{number}.png" for number in range(len(ranks))]
    return pd.DataFrame({"path": paths, "label": labels, "output": scale, "rank": ranks})


def binomial_tail(better, worse):
    """McNemar's exact two-sided p-value, term by term."""
    count = better + worse
    ways = [math.comb(count, k) for k in range(count + 1)]
    return min(1.0, 2 * sum(ways[: min(better, worse) + 1]) / 2**count)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=60))
def test_pairs_are_counted_image_by_image(pairs):
    one, other = ([ranks[side] for ranks in pairs] for side in (0, 1))
    shuffled = predictions_of(other).sample(frac=1, random_state=len(pairs))
    (row,) = paired_image_differences(predictions_of(one), shuffled).itertuples()
    values = [(a == 0) - (b == 0) for a, b in pairs]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) / len(values))
    assert row.images == len(pairs) and row.output == "scale 1"
    assert row.difference == pytest.approx(100 * mean)
    assert row.standard_error == pytest.approx(100 * error, abs=1e-9)
    assert (row.better, row.worse) == (values.count(1), values.count(-1))
    assert row.p_value == pytest.approx(binomial_tail(row.better, row.worse))
    padded = [*values, 1, -1, 0, 0]  # half an image in each cell of the table of pairs
    weights = [1] * len(values) + [0.5] * 4
    center = sum(w * v for w, v in zip(weights, padded, strict=True)) / sum(weights)
    spread = sum(w * (v - center) ** 2 for w, v in zip(weights, padded, strict=True))
    reach = 1.959964 * math.sqrt(spread) / sum(weights)
    assert row.low == pytest.approx(max(-100, 100 * (center - reach)), abs=1e-4)
    assert row.high == pytest.approx(min(100, 100 * (center + reach)), abs=1e-4)
    assert row.low < row.high and row.low - 1e-9 <= row.difference <= row.high + 1e-9


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    for better, worse in ((0.02, 0.01), (0.1, 0.1), (0.3, 0.05)):
        hits = 0
        for _ in range(400):
            counts = draw.multinomial(100, [better, worse, 1 - better - worse])
            told = comparison._paired(*map(int, counts[:2]), 100)
            hits += told["low"] <= 100 * (better - worse) <= told["high"]
        assert hits / 400 >= 0.93


def test_every_view_is_compared_with_the_one_view_of_the_baseline():
    first, second = predictions_of([0, 1, 0]), predictions_of([0, 0, 0], "scale 2")
    found = paired_image_differences(pd.concat([first, second]), predictions_of([0, 1, 1]))
    assert found["output"].tolist() == ["scale 1", "scale 2"]
    assert found["difference"].tolist() == pytest.approx([100 / 3, 200 / 3])


@pytest.mark.parametrize(
    "baseline",
    [
        predictions_of([0, 1]),
        predictions_of([0, 1, 1, 0]),
        predictions_of([0, 1, 1], labels=[0, 0, 1]),
        predictions_of([0, 1, 1], scale="scale 2"),
    ],
)
def test_models_that_were_tested_on_other_images_are_refused(baseline):
    with pytest.raises(InputError, match="different images"):
        paired_image_differences(predictions_of([0, 1, 1]), baseline)


def test_a_plan_has_the_baseline_first_and_all_seeds():
    base = Config()
    plan = plan_methods(base, list(METHODS)[::-1], [3, 4])
    assert list(plan) == ["plain ViT", *list(METHODS)[:0:-1]]
    assert [cell.seed for cell in plan["TransFG"]] == [3, 4]
    assert plan["plain ViT"][0] == base.replace(scales=1, seed=3), "shared with other notebooks"
    assert plan["RAMS-Trans"][0] == base.replace(seed=3)
    assert plan["RAMS-Trans, crop of the view"][0].highres_size is None
    with pytest.raises(InputError, match="unknown method ViT; choose from plain ViT; TransFG"):
        plan_methods(base, ["ViT", "TransFG"], [0])
    with pytest.raises(InputError, match="nothing to compare with the plain ViT"):
        plan_methods(base, ["plain ViT"], [0])


def test_equal_time_gives_the_faster_methods_more_epochs():
    plan = plan_methods(Config(epochs=5), ["TransFG", "RAMS-Trans"], [0, 1])
    seconds = {"plain ViT": [9, 11], "TransFG": [14, 18], "RAMS-Trans": [20, 22]}
    rows = [{"method": name, "train_seconds": s} for name in seconds for s in seconds[name]]
    longer = match_training_time(plan, pd.DataFrame(rows))
    epochs = {name: {cell.epochs for cell in cells} for name, cells in longer.items()}
    assert epochs == {"plain ViT": {10}, "TransFG": {7}, "RAMS-Trans": {5}}
    assert longer["RAMS-Trans"] == plan["RAMS-Trans"], "the slowest is not trained again"


def test_published_numbers_carry_their_uncertainty():
    table = published().set_index("published")
    assert table.loc[["ViT-B/16", "TransFG with PSM", "RAMS-Trans"], "top1"].tolist() == [
        90.6,
        90.9,
        91.3,
    ]
    assert table.loc["RAMS-Trans", "standard_error"] == pytest.approx(0.37, abs=0.005)
    assert table["top1"].is_monotonic_increasing


def test_methods_are_trained_and_compared(tmp_path, monkeypatch):
    def train_here(cell, run, processes, show):
        return train(cell, run)

    monkeypatch.setattr(ramslib.experiments.ablation, "train_in_processes", train_here)
    base = tiny_config(draw_photos(tmp_path / "photos"), epochs=1)
    plan = plan_methods(base, ["TransFG", "RAMS-Trans"], [0])
    results = compare(plan, tmp_path / "cells")
    pd.testing.assert_frame_equal(results, compare(plan, tmp_path / "cells"))
    assert len(list((tmp_path / "cells").glob("*/results.csv"))) == 3
    assert len(results) == 2 * (1 + 1 + 4)  # weights, views
    found = differences(results, tmp_path / "cells")
    assert len(found) == 2 * (1 + 4) and set(found["method"]) == {"TransFG", "RAMS-Trans"}
    plain = results[results["method"] == "plain ViT"].set_index("checkpoint")["top1"]
    joined = found.merge(results, on=[*comparison.COMPARED, "output"])
    expected = joined["top1"] - joined["checkpoint"].map(plain)
    np.testing.assert_allclose(joined["difference"], expected, atol=1e-9)


def test_budgets_weights_and_seeds_are_not_mixed(tmp_path):
    rows, ranks = [], np.random.default_rng(0).integers(0, 2, (16, 30))
    keys = itertools.product(["time", "epochs"], ["last", "best"], ["plain ViT", "TransFG"], [0, 1])
    for key, drawn in zip(keys, ranks, strict=True):
        budget, weights, method, seed = key
        run = tmp_path / f"{budget} {method} {seed}"
        run.mkdir(exist_ok=True)
        predictions_of(drawn).to_csv(run / f"predictions_{weights}.csv", index=False)
        rows.append([*key, run.name, 100 * (drawn == 0).mean()])
    results = pd.DataFrame(rows, columns=[*comparison.COMPARED, "run", "top1"])
    found = differences(results, tmp_path).set_index(comparison.COMPARED)["difference"]
    top1 = results.set_index(comparison.COMPARED)["top1"]
    assert len(found) == 8
    for budget, weights, method, seed in found.index:
        expected = top1[budget, weights, method, seed] - top1[budget, weights, "plain ViT", seed]
        assert found[budget, weights, method, seed] == pytest.approx(expected)
