"""Ablations: each cell once, and tables that say what was compared."""

import math

import numpy as np
import pandas as pd
import pytest
from tiny import draw_photos, tiny_config

import ramslib.experiments.ablation
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.experiments.ablation import cell_folder, collect, grid, summarise, train_cells
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


def test_cells_train_once_and_are_collected_with_their_settings(tmp_path, monkeypatch):
    trained = []

    def train_here(cell, run, processes, show):
        if not (run / "results.csv").exists():
            trained.append(cell.scales)
            train(cell, run)

    monkeypatch.setattr(ramslib.experiments.ablation, "train_in_processes", train_here)
    cells = grid(tiny_config(draw_photos(tmp_path / "photos"), epochs=1), scales=[1, 2])
    said = []
    first = train_cells(cells, tmp_path / "cells", say=said.append)
    second = train_cells(cells, tmp_path / "cells", say=said.append)
    assert trained == [1, 2]
    assert "0 of 2 cells" in said[0] and "training (1 of 2" in said[2] and len(said) == 4
    assert "2 of 2 cells" in said[3]
    pd.testing.assert_frame_equal(first, second)
    assert first["scales"].tolist() == [1, 2, 2, 2, 2]
    assert first["scale"].tolist()[:3] == ["scale 1", "scale 1", "scale 2"]
    assert set(first["backbone"]) == {"test_vit"} and "iou" not in first
    assert set(first["run"]) == {cell_folder(cell, "").name for cell in cells}
    assert len(collect([cell_folder(cells[0], tmp_path / "cells")] * 2, "best")) == 1


def test_boxes_are_scored_where_there_are_some(tmp_path, monkeypatch):
    config = tiny_config(draw_photos(tmp_path / "photos"), epochs=1)
    run = train(config, tmp_path / "run")
    table = pd.read_csv(run / "table.csv")
    predictions = pd.read_csv(run / "predictions_last.csv")
    whole = predictions[predictions["scale"] == "scale 1"].set_index("path")
    sides = ["top", "left", "bottom", "right"]
    table[sides] = whole[sides].reindex(table["path"]).to_numpy()
    table.to_csv(run / "table.csv", index=False)
    iou = collect([run]).set_index("scale")["iou"]
    assert iou["scale 1"] == pytest.approx(1) and 0 < iou["scale 2"] < 1
    assert math.isnan(iou["mean softmax"])


def test_intervals_are_students():
    results = pd.DataFrame({"scales": [1, 1, 1, 2], "top1": [70.0, 72.0, 77.0, 80.0]})
    summary = summarise(results, ["scales"]).set_index("scales")
    mean = (70 + 72 + 77) / 3
    deviation = math.sqrt(sum((v - mean) ** 2 for v in (70, 72, 77)) / 2)
    assert summary.loc[1, "mean"] == pytest.approx(mean)
    assert summary.loc[1, "half_width"] == pytest.approx(4.302653 * deviation / math.sqrt(3), 1e-5)
    assert summary.loc[2, "runs"] == 1 and np.isnan(summary.loc[2, "half_width"])
