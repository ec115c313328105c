"""Comparisons: what is compared, and pairs of images and of seeds counted by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import draw_photos, tiny_config

from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.experiments import comparison, sweep
from ramslib.experiments.comparison import (
    AXES,
    METHODS,
    choose_axes,
    collect,
    compare,
    describe,
    differences,
    grid,
    headlines,
    match_training_time,
    one_at_a_time,
    paired_differences,
    paired_image_differences,
    plan_methods,
    published,
    scale_training,
    summarize,
)
from ramslib.training.trainer import train


def predictions_of(ranks, output="scale 1", labels=None):
    """A table of predictions with these ranks."""
    labels = [0] * len(ranks) if labels is None else labels
    paths = [f"{number}.png" for number in range(len(ranks))]
    return pd.DataFrame({"path": paths, "label": labels, "output": output, "rank": ranks})


def binomial_tail(better, worse):
    """McNemar's exact two-sided p-value, term by term."""
    count = better + worse
    ways = [math.comb(count, k) for k in range(count + 1)]
    return min(1.0, 2 * sum(ways[: min(better, worse) + 1]) / 2**count)


@pytest.mark.slow
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
    padded = [*values, 1, -1, 0, 0]  # half an image in each entry of the table of pairs
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
        counts = pd.DataFrame(draw.multinomial(100, [better, worse, 1 - better - worse], 400))
        found, truth = comparison._paired(counts[0], counts[1], 100), 100 * (better - worse)
        assert ((found["low"] <= truth) & (truth <= found["high"])).mean() >= 0.93


def test_every_output_is_compared_with_the_one_output_of_the_baseline():
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
        predictions_of([0, 1, 1], output="scale 2"),
    ],
)
def test_models_that_were_tested_on_other_images_are_refused(baseline):
    with pytest.raises(InputError, match="different images"):
        paired_image_differences(predictions_of([0, 1, 1]), baseline)


def test_a_plan_has_the_baseline_first_and_all_seeds():
    base = Config()
    plan = plan_methods(base, list(METHODS)[::-1], [3, 4])
    assert list(plan) == ["plain ViT", *list(METHODS)[:0:-1]]
    assert [config.seed for config in plan["TransFG"]] == [3, 4]
    assert plan["plain ViT"][0] == base.replace(scales=1, seed=3), "shared with other notebooks"
    assert plan["RAMS-Trans"][0] == base.replace(seed=3)
    assert plan["RAMS-Trans, low-resolution crop"][0].highres_size is None
    own = plan_methods(base, {"mine": {"threshold": 1.4}}, [0])
    assert list(own) == ["plain ViT", "mine"] and own["mine"][0].threshold == 1.4
    with pytest.raises(
        InputError, match="unknown method ViT; choose from plain ViT; plain ViT, center; TransFG"
    ):
        plan_methods(base, ["ViT", "TransFG"], [0])
    with pytest.raises(InputError, match="nothing to compare with the plain ViT"):
        plan_methods(base, ["plain ViT"], [0])


def test_equal_time_gives_the_faster_methods_more_epochs():
    plan = plan_methods(Config(epochs=5), ["TransFG", "RAMS-Trans"], [0, 1])
    seconds = {"plain ViT": [9, 11], "TransFG": [14, 18], "RAMS-Trans": [20, 22]}
    rows = [{"method": name, "train_seconds": s} for name in seconds for s in seconds[name]]
    longer = match_training_time(plan, pd.DataFrame(rows))
    epochs = {name: {config.epochs for config in configs} for name, configs in longer.items()}
    assert epochs == {"plain ViT": {10}, "TransFG": {7}, "RAMS-Trans": {5}}
    assert longer["RAMS-Trans"] == plan["RAMS-Trans"], "the slowest is not trained again"


def test_published_numbers_carry_their_uncertainty():
    table = published().set_index("method")
    assert table.loc[["ViT-B/16", "TransFG with PSM", "RAMS-Trans"], "top1"].tolist() == [
        90.6,
        90.9,
        91.3,
    ]
    assert table.loc["RAMS-Trans", "standard_error"] == pytest.approx(0.37, abs=0.005)
    assert table["top1"].is_monotonic_increasing


@pytest.mark.slow
def test_methods_are_trained_and_compared(tmp_path, monkeypatch):
    def train_here(config, run, processes, show):
        return train(config, run)

    monkeypatch.setattr(sweep.launch, "train", train_here)
    base = tiny_config(draw_photos(tmp_path / "photos"), epochs=1)
    plan = plan_methods(base, ["TransFG", "RAMS-Trans"], [0])
    results = compare(plan, tmp_path / "runs")
    pd.testing.assert_frame_equal(results, compare(plan, tmp_path / "runs"))
    assert len(list((tmp_path / "runs").glob("*/results.csv"))) == 3
    assert len(results) == 2 * (1 + 1 + 4)  # checkpoints, outputs
    found = differences(results, tmp_path / "runs")
    assert len(found) == 2 * (1 + 4) and set(found["method"]) == {"TransFG", "RAMS-Trans"}
    plain = results[results["method"] == "plain ViT"].set_index("checkpoint")["top1"]
    joined = found.merge(results, on=[*comparison.COMPARED, "output"])
    expected = joined["top1"] - joined["checkpoint"].map(plain)
    np.testing.assert_allclose(joined["difference"], expected, atol=1e-9)


def test_budgets_checkpoints_and_seeds_are_not_mixed(tmp_path, monkeypatch):
    rows, predictions = [], {}
    ranks = np.random.default_rng(0).integers(0, 2, (16, 30))
    keys = itertools.product(["time", "epochs"], ["last", "best"], ["plain ViT", "TransFG"], [0, 1])
    for key, drawn in zip(keys, ranks, strict=True):
        budget, checkpoint, method, seed = key
        run = tmp_path / f"{budget} {method} {seed}"
        predictions[run, checkpoint] = predictions_of(drawn)
        rows.append([*key, run.name, 100 * (drawn == 0).mean()])
    monkeypatch.setattr(comparison, "read_predictions", lambda *key: predictions[key])
    results = pd.DataFrame(rows, columns=[*comparison.COMPARED, "run", "top1"])
    found = differences(results, tmp_path).set_index(comparison.COMPARED)["difference"]
    top1 = results.set_index(comparison.COMPARED)["top1"]
    assert len(found) == 8
    for budget, checkpoint, method, seed in found.index:
        plain = top1[budget, checkpoint, "plain ViT", seed]
        expected = top1[budget, checkpoint, method, seed] - plain
        assert found[budget, checkpoint, method, seed] == pytest.approx(expected)


def test_a_grid_has_every_combination_in_order():
    configs = grid(Config(), scales=[1, 2], seed=range(3))
    assert [(config.scales, config.seed) for config in configs] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    assert grid(Config()) == [Config()]
    with pytest.raises(InputError, match="did you mean 'scales'"):
        grid(Config(), scale=[1, 2])


def test_one_at_a_time_is_the_base_and_each_single_change_once():
    base = Config()
    configs = one_at_a_time(base, scales=[1, 2, 3], loss=["first", (1, 0.5)], highres_size=[None])
    found = ["base", "scales=1", "scales=3", "loss=first", "loss=(1.0, 0.5)", "highres_size=None"]
    assert [describe(config, base) for config in configs] == found
    assert configs[0] == base and len(set(configs)) == 6
    assert describe(base.replace(seed=7, root="elsewhere", workers=9), base) == "base"
    assert describe(base.replace(threshold=1.2, scales=3), base) == "scales=3, threshold=1.2"


def test_ideas_are_described_by_their_files_content(tmp_path):
    ideas, copy = tmp_path / "ideas.py", tmp_path / "sources" / "ideas.py"
    copy.parent.mkdir()
    for file in (ideas, copy):
        file.write_text("def window(strength, threshold, recorded): ...")
    base = Config().replace(proposal=f"{ideas}:window")
    mine = base.replace(proposal=f"{copy}:window")
    assert describe(mine, base) == "base"
    assert describe(mine, Config()) == "proposal=ideas.py:window"
    copy.write_text("def window(strength, threshold, recorded): pass")
    assert describe(mine, base) == "proposal=ideas.py:window"


def test_every_named_axis_is_an_ablation_of_every_preset():
    for preset in ("small", "tiny", "paper-cub"):
        base = Config.preset(preset)
        configs = one_at_a_time(base, **choose_axes(AXES))
        assert all(sum(getattr(c, n) != getattr(base, n) for n in AXES) == 1 for c in configs[1:])
        assert len(configs) > 15
    assert choose_axes(["loss"]) == {"loss": AXES["loss"]}
    assert choose_axes({"epochs": [7]}) == {"epochs": [7]} and choose_axes([]) == {}
    with pytest.raises(InputError, match="no values for epochs; give them, or choose from scales"):
        choose_axes(["loss", "epochs"])


def test_a_longer_training_is_never_shorter():
    assert scale_training(Config(epochs=5), 1.74).epochs == 9
    assert scale_training(Config(epochs=5), 0.5).epochs == 5
    longer = scale_training(Config(epochs=5, steps=100), 1.74)
    assert (longer.steps, longer.epochs) == (174, 5)


def test_results_are_collected_with_their_settings(tmp_path):
    base = tiny_config(draw_photos(tmp_path / "photos"), epochs=1)
    configs = [base.replace(scales=1), base]
    runs = [train(config, tmp_path / str(config.scales)) for config in configs]
    results = collect([*runs, runs[0]], base=base)
    assert results["condition"].tolist() == ["scales=1", *["base"] * 4]
    assert results["scales"].tolist() == [1, 2, 2, 2, 2] and set(results["run"]) == {"1", "2"}
    assert results["output"].tolist()[:3] == ["scale 1", "scale 1", "scale 2"]
    assert set(results["backbone"]) == {"test_vit"} and "iou" not in results
    assert set(results["checkpoint"]) == {"best"}
    assert set(collect(runs, "last")["checkpoint"]) == {"last"}
    (runs[0] / "results.csv").unlink()
    with pytest.raises(InputError, match="1: the run is not finished"):
        collect(runs)


def test_boxes_are_scored_where_there_are_some(tmp_path, monkeypatch):
    config = tiny_config(draw_photos(tmp_path / "photos"), epochs=1)
    run = train(config, tmp_path / "run")
    table = pd.read_csv(run / "table.csv")
    predictions = pd.read_csv(run / "predictions_best.csv")
    whole = predictions[predictions["output"] == "scale 1"].set_index("path")
    sides = ["top", "left", "bottom", "right"]
    table[sides] = whole[sides].reindex(table["path"]).to_numpy()
    table.to_csv(run / "table.csv", index=False)
    iou = collect([run]).set_index("output")["iou"]
    assert iou["scale 1"] == pytest.approx(1) and 0 < iou["scale 2"] < 1
    assert math.isnan(iou["mean softmax"])
    predictions[: len(predictions) // 2].to_csv(run / "predictions_best.csv", index=False)
    with pytest.raises(InputError, match=r"predictions_best.csv: has \d+ of 15 test images"):
        collect([run])


def test_intervals_are_students():
    results = pd.DataFrame({"scales": [1, 1, 1, 2], "top1": [70.0, 72.0, 77.0, 80.0]})
    summary = summarize(results, ["scales"]).set_index("scales")
    mean = (70 + 72 + 77) / 3
    deviation = math.sqrt(sum((v - mean) ** 2 for v in (70, 72, 77)) / 2)
    assert summary.loc[1, "mean"] == pytest.approx(mean)
    assert summary.loc[1, "half_width"] == pytest.approx(4.302653 * deviation / math.sqrt(3), 1e-5)
    assert summary.loc[2, "runs"] == 1 and np.isnan(summary.loc[2, "half_width"])


def test_paired_differences_are_those_of_each_seed():
    """A change of 2 points on seeds that differ by 20: the seeds cancel, the means tell nothing."""
    scores = {"base": [60.0, 80.0, 70.0], "eta": [62.0, 81.0, 73.0]}
    rows = [
        (name, output, seed, value + shift)
        for name, values in scores.items()
        for seed, value in enumerate(values)
        for output, shift in (("scale 1", 0), ("scale 2", 5 if name == "eta" else 0))
    ]
    results = pd.DataFrame(rows, columns=["condition", "output", "seed", "top1"])
    by = ["condition", "output"]
    found = paired_differences(results, by, {"condition": "base"}).set_index(by)
    deviation = math.sqrt(sum((v - 2) ** 2 for v in (2, 1, 3)) / 2)
    half = 4.302653 * deviation / math.sqrt(3)
    assert found.loc[("eta", "scale 1"), "mean"] == pytest.approx(2)
    assert found.loc[("eta", "scale 1"), "half_width"] == pytest.approx(half, 1e-5)
    assert found.loc[("eta", "scale 2"), "mean"] == pytest.approx(7)
    assert found.loc["base", "mean"].tolist() == found.loc["base", "half_width"].tolist() == [0, 0]
    assert summarize(results, by).set_index(by).loc[("eta", "scale 1"), "half_width"] > 20
    other = paired_differences(results, by, {"condition": "base", "output": "scale 1"})
    assert other["mean"].tolist() == pytest.approx([0, 0, 2, 7])


def test_pairs_need_one_baseline_and_shared_seeds():
    rows = [("base", 0, 60.0), ("base", 1, 70.0), ("eta", 1, 71.0), ("eta", 2, 99.0)]
    results = pd.DataFrame(rows, columns=["condition", "seed", "top1"])
    found = paired_differences(results, ["condition"], {"condition": "base"})
    assert found["mean"].tolist() == [0, 1] and found["runs"].tolist() == [2, 1]
    assert math.isnan(found["half_width"][1]), "one seed, no interval over seeds"
    with pytest.raises(InputError, match="^no row of the results for condition=beta and one seed"):
        paired_differences(results, ["condition"], {"condition": "beta"})
    with pytest.raises(InputError, match="^several rows"):
        paired_differences(pd.concat([results] * 2), ["condition"], {"condition": "base"})


def test_headlines_are_the_last_output_with_its_uncertainty():
    columns = ["condition", "seed", "checkpoint", "output", "top1", "standard_error"]
    rows = [
        ("2 scales", 0, "best", "scale 1", 90.0, 1.0),
        ("2 scales", 0, "best", "mean logits", 82.5, 3.0),
        ("2 scales", 0, "last", "mean logits", 11.0, 3.0),
        ("1 scale", 0, "best", "scale 1", 45.0, 3.9),
    ]
    ablation = pd.DataFrame(rows, columns=columns)
    rows = [
        ("best", "equal time", "plain ViT", 0, "scale 1", 45.0, None, None, None),
        ("best", "equal time", "RAMS-Trans", 0, "mean logits", 82.5, 37.5, 28.0, 48.0),
    ]
    columns = ["checkpoint", "budget", "method", "seed", "output", "top1"]
    compared = pd.DataFrame(rows, columns=[*columns, "difference", "low", "high"])
    tables = [pd.DataFrame({"images": [3]}), ablation, compared.assign(standard_error=3.0)]
    first, second, third = headlines(tables)
    assert "2 scales" in first and "mean logits" in first and "82.5 ± 3.0 %" in first
    assert "best checkpoint" in first and "1 scale" in second and "45.0 ± 3.9 %" in second
    assert "RAMS-Trans" in third and "equal time" in third and "plain ViT" in third
    assert "+37.5 points [28.0, 48.0]" in third
    assert headlines(tables, count=2) == [first, "and 2 more conditions"]

    seeds = pd.concat([ablation, ablation.assign(seed=1, top1=ablation["top1"] + 2)])
    half = 12.7062 * math.sqrt(2) / math.sqrt(2)
    assert f"83.5 ± {half:.1f} % (95 % over 2 seeds)" in headlines([seeds])[0]
