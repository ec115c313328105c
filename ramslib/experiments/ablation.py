"""Ablations: configurations, each trained once, as one tidy table.

A cell is a `Config`. It trains in a folder named after everything that decides its result, so no
finished cell runs twice, a killed one goes on, and notebooks that share a cell share its run. An
ablation is a list of cells, `grid` or `one_at_a_time`, and a table over seeds: means (`summarize`)
or, sharper, differences to a baseline seed by seed (`paired_differences`).
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ramslib.config import Config
from ramslib.data.datasets import fingerprint, load_table
from ramslib.dppm import PROPOSALS
from ramslib.errors import InputError
from ramslib.evaluation import score_boxes
from ramslib.experiments.sweep import open_study, work
from ramslib.runs.run import NON_RESULT_SETTINGS, is_finished, read_run, run_key
from ramslib.strength import STRENGTHS
from ramslib.training.launch import train_in_processes

AXES: dict[str, Sequence] = {
    "scales": (1, 2, 3, 4),
    "threshold": (0.8, 1.0, 1.2, 1.5),
    "strength": tuple(STRENGTHS),
    "proposal": tuple(PROPOSALS),  # random and center of equal area; all_patches, connected or not
    "loss": ("first", "sum", "last", (1.0, 0.5, 0.25, 0.125)),
    "class_token": ("per_scale", "shared"),
    "highres_size": (None,),  # crops of the previous view; the base has the high resolution
}


def choose_axes(chosen: Iterable[str] | Mapping[str, Sequence]) -> dict[str, Sequence]:
    """Settings to vary, with their values: given, or by name with those of ``AXES``.

    Raises:
        InputError: a name without values that ``AXES`` does not have.
    """
    if isinstance(chosen, Mapping):
        return dict(chosen)
    if unknown := set(chosen) - set(AXES):
        names = ", ".join(sorted(unknown))
        raise InputError(f"no values for {names}; give them, or choose from {', '.join(AXES)}")
    return {name: AXES[name] for name in chosen}


def grid(base: Config, **axes: Sequence) -> list[Config]:
    """All combinations of settings: ``grid(base, scales=[1, 2], seed=[0, 1])`` has four cells."""
    combinations = itertools.product(*axes.values())
    return [base.replace(**dict(zip(axes, values, strict=True))) for values in combinations]


def one_at_a_time(base: Config, **axes: Sequence) -> list[Config]:
    """The base, then every single change of it: the rows of an ablation table, none twice."""
    changed = (base.replace(**{name: value}) for name in axes for value in axes[name])
    return list(dict.fromkeys([base, *changed]))


def describe(cell: Config, base: Config) -> str:
    """What a cell changes, seed apart: ``scales=3, threshold=1.2``, or ``base``."""
    names = [name for name in Config.names() if name not in ("seed", *NON_RESULT_SETTINGS)]
    pairs = [(name, getattr(cell, name)) for name in names]
    changed = [f"{name}={value}" for name, value in pairs if value != getattr(base, name)]
    return ", ".join(changed) or "base"


def scale_training(config: Config, factor: float) -> Config:
    """The same training so many times as long, in whole steps or epochs, never shorter."""
    name = "steps" if config.steps else "epochs"
    length = getattr(config, name)
    return config.replace(**{name: max(length, round(length * factor))})


def run_folder(config: Config, folder: Path | str) -> Path:
    """Where a cell's run lies: below ``folder``, named by the key of configuration and data."""
    table = load_table(config)
    return Path(folder) / run_key(config, fingerprint(table))


def train_all(
    cells: Iterable[Config],
    folder: Path | str,
    processes: int = 1,
    say: Callable[[str], object] = print,
    base: Config | None = None,
    storage: str | None = None,
) -> pd.DataFrame:
    """Train every cell that is not finished and collect all results.

    Call it with the same cells and folder from as many shells or machines as there are: each cell
    is trained once (see `sweep`).

    Args:
        cells: configurations; one that comes again is the same cell.
        folder: where the runs lie.
        processes: training processes per cell.
        say: told what happens.
        base: what conditions are described against, see `collect`.
        storage: address of the queue's database; by default a file in the folder.

    Returns:
        See `collect`.

    Raises:
        InputError: a cell failed twice; all others are finished.
    """
    runs = {run_folder(cell, folder): cell for cell in cells}
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
    return collect(runs, base=base)


def collect(
    runs: Iterable[Path | str], checkpoint: str = "last", base: Config | None = None
) -> pd.DataFrame:
    """Results of finished runs: one row per run and scale, settings beside scores.

    Args:
        runs: folders of finished runs.
        checkpoint: ``last`` or ``best``.
        base: adds a column ``condition``: how each run differs from it, see `describe`.

    Returns:
        The columns of ``results.csv``, the run's settings, and ``iou`` (mean over test images of
        the looked-at region with the annotated box) where there are boxes.
    """
    rows = []
    for run in dict.fromkeys(map(Path, runs)):
        config, _, table = read_run(run)
        results = pd.read_csv(run / "results.csv").query("checkpoint == @checkpoint")
        if table["top"].notna().any():
            file = run / f"predictions_{checkpoint}.csv"
            predictions = pd.read_csv(file, encoding_errors="surrogateescape")
            iou = score_boxes(predictions, table).groupby("output")["iou"].mean()
            results = results.assign(iou=results["output"].map(iou))
        names = [name for name in Config.names() if name not in results]
        settings = {name: [getattr(config, name)] * len(results) for name in names}
        named = {"condition": describe(config, base)} if base else {}
        rows.append(results.assign(**named, run=run.name, **settings))
    return pd.concat(rows, ignore_index=True)


def summarize(results: pd.DataFrame, by: Sequence[str], value: str = "top1") -> pd.DataFrame:
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


def paired_differences(
    results: pd.DataFrame, by: Sequence[str], baseline: Mapping, value: str = "top1"
) -> pd.DataFrame:
    """Differences to a baseline with the same seed, mean and 95 % interval over seeds.

    What a seed does to both (order of the images, crops) cancels, so that the interval is narrower
    than those of the means. It is over seeds alone: a single seed has none, and the test images are
    the same for all.

    Args:
        results: from `collect`.
        by: columns that tell conditions apart.
        baseline: value of some of these columns, ``{"condition": "base"}``: all others are compared
            with the baseline of their own value, such as their own ``scale``.
        value: the score.

    Returns:
        One row per condition that has the baseline's seeds: ``mean, half_width, runs``.

    Raises:
        InputError: no such baseline, or several with one seed.
    """
    shared = ["seed", *(name for name in by if name not in baseline)]
    chosen = np.logical_and.reduce([results[name] == is_ for name, is_ in baseline.items()])
    reference = results.loc[chosen, [*shared, value]]
    told = ", ".join(f"{name}={is_}" for name, is_ in baseline.items())
    if reference.empty or reference.duplicated(shared).any():
        count = "several rows" if len(reference) else "no row"
        raise InputError(f"{count} of the results for {told} and one seed; name one baseline")
    pairs = results.merge(reference, on=shared, suffixes=("", "_baseline"))
    difference = pairs[value] - pairs[f"{value}_baseline"]
    return summarize(pairs.assign(difference=difference), by, "difference")
