"""Ablations: a grid of configurations, each trained once, as one tidy table.

A cell is a `Config`. It trains in a folder named after everything that decides its result, so no
finished cell runs twice, a killed one goes on, and notebooks that share a cell share its run.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ramslib.config import Config
from ramslib.data.datasets import fingerprint, load_table
from ramslib.errors import InputError
from ramslib.evaluation import score_boxes
from ramslib.experiments.sweep import open_study, work
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
    cells: Sequence[Config],
    folder: Path | str,
    processes: int = 1,
    say: Callable[[str], object] = print,
    storage: str | None = None,
) -> pd.DataFrame:
    """Train every cell that is not finished and collect all results.

    Call it with the same cells and folder from as many shells or machines as there are: each cell
    is trained once (see `sweep`).

    Args:
        cells: configurations.
        folder: where the runs lie.
        processes: training processes per cell.
        say: told what happens.
        storage: address of the queue's database; by default a file in the folder.

    Returns:
        See `collect`.

    Raises:
        InputError: a cell failed twice; all others are finished.
    """
    runs = {cell_folder(cell, folder): cell for cell in cells}
    finished = sum(map(is_finished, runs))
    say(f"{finished} of {len(runs)} cells in {folder} are finished")
    if finished < len(runs):
        train = partial(train_in_processes, processes=processes, show=lambda metrics: None)
        failed = work(open_study(Path(folder), storage), runs, train, say=say)
        if failed:
            run, reason = next(iter(failed.items()))
            raise InputError(
                f"{len(failed)} of {len(runs)} cells failed, {run.name}: {reason}; the others are "
                "finished, and the same command tries again"
            )
    return collect(list(runs))


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
