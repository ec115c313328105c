"""Ablations: a grid of configurations, each trained once, as one tidy table.

A cell is a `Config`. It trains in a folder named after everything that decides its result, so no
finished cell runs twice, a killed one goes on, and notebooks that share a cell share its run.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ramslib.config import Config
from ramslib.data.datasets import fingerprint, load_table
from ramslib.evaluation import score_boxes
from ramslib.runs.run import is_finished, read_run, run_key
from ramslib.training.launch import train_in_processes


def grid(base: Config, **axes: Sequence) -> list[Config]:
    """All combinations of settings: ``grid(base, scales=[1, 2], seed=[0, 1])`` has four cells."""
    combinations = itertools.product(*axes.values())
    return [base.replace(**dict(zip(axes, values, strict=True))) for values in combinations]


def cell_folder(config: Config, folder: Path | str) -> Path:
    """Where a cell's run lies: below ``folder``, named by the key of configuration and data."""
    table = load_table(config.data, config.root, config.validation_fraction, config.seed)
    return Path(folder) / run_key(config, fingerprint(table))


def train_cells(
    cells: Sequence[Config], folder: Path | str, processes: int = 1, say=print
) -> pd.DataFrame:
    """Train every cell that is not finished, one after the other, and collect all results.

    Args:
        cells: configurations.
        folder: where the runs lie.
        processes: training processes per cell.
        say: told which cell trains.

    Returns:
        See `collect`.
    """
    runs = [cell_folder(cell, folder) for cell in cells]
    for number, (cell, run) in enumerate(zip(cells, runs, strict=True), start=1):
        state = "finished before" if is_finished(run) else "training"
        say(f"cell {number} of {len(cells)}: {run} {state}")
        train_in_processes(cell, run, processes, show=lambda metrics: None)
    return collect(runs)


def collect(runs: Sequence[Path | str], weights: str = "last") -> pd.DataFrame:
    """Results of finished runs: one row per run and scale, settings beside scores.

    Args:
        runs: folders of finished runs.
        weights: ``last`` or ``best``.

    Returns:
        The columns of ``results.csv``, the run's settings, and ``iou`` (mean over test images of
        the looked-at region with the annotated box) where there are boxes.
    """
    rows = []
    for run in dict.fromkeys(map(Path, runs)):
        config, _, table = read_run(run)
        results = pd.read_csv(run / "results.csv").query("weights == @weights")
        if table["top"].notna().any():
            file = run / f"predictions_{weights}.csv"
            predictions = pd.read_csv(file, encoding_errors="surrogateescape")
            iou = score_boxes(predictions, table).groupby("scale")["iou"].mean()
            results = results.assign(iou=results["scale"].map(iou))
        names = [name for name in Config.names() if name not in results]
        settings = {name: [getattr(config, name)] * len(results) for name in names}
        rows.append(results.assign(run=run.name, **settings))
    return pd.concat(rows, ignore_index=True)


def summarise(results: pd.DataFrame, by: Sequence[str], value: str = "top1") -> pd.DataFrame:
    """Mean of a score over seeds with its 95 % confidence interval (Student's t).

    Args:
        results: from `collect`.
        by: columns that tell conditions apart.
        value: the score.

    Returns:
        One row per condition: ``mean, half_width, runs``; no interval for a single run.
    """
    groups = results.groupby(list(by), sort=False)[value]
    summary = groups.agg(mean="mean", deviation="std", runs="size").reset_index()
    quantile = stats.t.ppf(0.975, (summary["runs"] - 1).clip(lower=1))
    half_width = quantile * summary["deviation"] / np.sqrt(summary["runs"])
    return summary.assign(half_width=half_width).drop(columns="deviation")
