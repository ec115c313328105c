"""Ablations: each cell once, and tables that say what was compared."""

import math

import numpy as np
import pandas as pd
import pytest
from tiny import draw_photos, tiny_config

import ramslib.experiments.ablation
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.experiments.ablation import (
    AXES,
    choose_axes,
    collect,
    describe,
    grid,
    one_at_a_time,
    paired_differences,
    run_folder,
    scale_training,
    summarize,
    train_all,
)
from ramslib.training.trainer import train


def test_a_grid_has_every_combination_in_order():
    cells = grid(Config(), scales=[1, 2], seed=range(3))
    assert [(cell.scales, cell.seed) for cell in cells] == [
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
    cells = one_at_a_time(base, scales=[1, 2, 3], loss=["first", (1, 0.5)], highres_size=[None])
    told = ["base", "scales=1", "scales=3", "loss=first", "loss=(1.0, 0.5)", "highres_size=None"]
    assert [describe(cell, base) for cell in cells] == told
    assert cells[0] == base and len(set(cells)) == 6
    assert describe(base.replace(seed=7, root="elsewhere", workers=9), base) == "base"
    assert describe(base.replace(threshold=1.2, scales=3), base) == "scales=3, threshold=1.2"


def test_every_named_axis_is_an_ablation_of_every_preset():
    for preset in ("small", "tiny", "paper-cub"):
        base = Config.preset(preset)
        cells = one_at_a_time(base, **choose_axes(AXES))
        assert all(sum(getattr(c, n) != getattr(base, n) for n in AXES) == 1 for c in cells[1:])
        assert len(cells) > 15
    assert choose_axes(["loss"]) == {"loss": AXES["loss"]}
    assert choose_axes({"epochs": [7]}) == {"epochs": [7]} and choose_axes([]) == {}
    with pytest.raises(InputError, match="no values for epochs; give them, or choose from scales"):
        choose_axes(["loss", "epochs"])


def test_a_longer_training_is_never_shorter():
    assert scale_training(Config(epochs=5), 1.74).epochs == 9
    assert scale_training(Config(epochs=5), 0.5).epochs == 5
    longer = scale_training(Config(epochs=5, steps=100), 1.74)
    assert (longer.steps, longer.epochs) == (174, 5)


def test_cells_train_once_and_are_collected_with_their_settings(tmp_path, monkeypatch):
    trained = []

    def train_here(cell, run, processes, show):
        if not (run / "results.csv").exists():
            trained.append(cell.scales)
            train(cell, run)

    monkeypatch.setattr(ramslib.experiments.ablation, "train_in_processes", train_here)
    cells = grid(tiny_config(draw_photos(tmp_path / "photos"), epochs=1), scales=[1, 2])
    said = []
    first = train_all([*cells, cells[0]], tmp_path / "cells", say=said.append)
    second = train_all(cells, tmp_path / "cells", say=said.append)
    assert trained == [1, 2]
    assert "0 of 2 cells" in said[0] and "training (1 of 2" in said[2] and len(said) == 4
    assert "2 of 2 cells" in said[3]
    pd.testing.assert_frame_equal(first, second)
    assert first["scales"].tolist() == [1, 2, 2, 2, 2]
    assert first["output"].tolist()[:3] == ["scale 1", "scale 1", "scale 2"]
    assert set(first["backbone"]) == {"test_vit"} and "iou" not in first
    assert set(first["run"]) == {run_folder(cell, "").name for cell in cells}
    described = collect([run_folder(cell, tmp_path / "cells") for cell in cells], base=cells[1])
    assert described["condition"].tolist() == ["scales=1", *["base"] * 4]
    assert len(collect([run_folder(cells[0], tmp_path / "cells")] * 2, "best")) == 1


def test_boxes_are_scored_where_there_are_some(tmp_path, monkeypatch):
    config = tiny_config(draw_photos(tmp_path / "photos"), epochs=1)
    run = train(config, tmp_path / "run")
    table = pd.read_csv(run / "table.csv")
    predictions = pd.read_csv(run / "predictions_last.csv")
    whole = predictions[predictions["output"] == "scale 1"].set_index("path")
    sides = ["top", "left", "bottom", "right"]
    table[sides] = whole[sides].reindex(table["path"]).to_numpy()
    table.to_csv(run / "table.csv", index=False)
    iou = collect([run]).set_index("output")["iou"]
    assert iou["scale 1"] == pytest.approx(1) and 0 < iou["scale 2"] < 1
    assert math.isnan(iou["mean softmax"])


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
        (name, view, seed, value + shift)
        for name, values in scores.items()
        for seed, value in enumerate(values)
        for view, shift in (("scale 1", 0), ("scale 2", 5 if name == "eta" else 0))
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
