"""Methods side by side: equal seeds, equal epochs and equal training time, differences in pairs.

Two methods that are tested on the same images share the images' difficulty, so their difference is
told far better by pairs than by two accuracies: over images within a seed
(`paired_image_differences`), and over seeds by `ablation.summarize` of those differences.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.experiments.ablation import collect, run_folder, scale_training, train_all

METHODS: dict[str, dict] = {  # name: settings that differ from those all methods share
    "plain ViT": {"model": "vit"},
    "TransFG": {"model": "transfg"},
    "RAMS-Trans": {"model": "rams", "scales": 2},
    "RAMS-Trans, crop of the view": {"model": "rams", "scales": 2, "highres_size": None},  # paper
}
BASELINE = "plain ViT"
COMPARED = ["budget", "checkpoint", "method", "seed"]  # what tells one evaluated model from another

# Hu et al., "RAMS-Trans", ACM Multimedia 2021, Table 1: CUB-200-2011, accuracy in percent.
PUBLISHED = {
    "ResNet-50": 84.5,
    "RA-CNN": 85.3,
    "GP-256": 85.8,
    "MaxExt": 86.6,
    "DFL-CNN": 87.4,
    "NTS-Net": 87.5,
    "Cross-X": 87.7,
    "DCL": 87.8,
    "CIN": 88.1,
    "DBTNet": 88.1,
    "ACNet": 88.1,
    "S3N": 88.5,
    "FDL": 89.1,
    "PMG": 89.6,
    "MMAL-Net": 89.6,
    "API-Net": 90.0,
    "StackedLSTM": 90.4,
    "ViT-B/16": 90.6,
    "TransFG with PSM": 90.9,
    "RAMS-Trans": 91.3,
}


def published() -> pd.DataFrame:
    """``PUBLISHED``, not run here, with the standard error that 5,794 test images give each."""
    table = pd.DataFrame({"published": PUBLISHED.keys(), "top1": PUBLISHED.values()})
    share = table["top1"] / 100
    return table.assign(standard_error=100 * np.sqrt(share * (1 - share) / 5794))


def plan_methods(
    base: Config, methods: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[Config]]:
    """The cells of each method, one per seed.

    Args:
        base: what all methods share.
        methods: keys of ``METHODS``; the baseline stands first, named or not.
        seeds: of every method.

    Raises:
        InputError: an unknown method, or none but the baseline.
    """
    known = "; ".join(METHODS)
    if unknown := ", ".join(sorted(set(methods) - set(METHODS))):
        raise InputError(f"unknown method {unknown}; choose from {known}")
    if not set(methods) - {BASELINE}:
        raise InputError(f"nothing to compare with the {BASELINE}; choose from {known}")
    names = dict.fromkeys([BASELINE, *methods])
    return {name: [base.replace(**METHODS[name], seed=seed) for seed in seeds] for name in names}


def match_training_time(plan: Mapping[str, Sequence[Config]], results: pd.DataFrame) -> dict:
    """The same plan, each method for as many epochs as fit into the slowest method's time.

    Args:
        plan: from `plan_methods`.
        results: from `compare`: how long each method took at equal epochs.
    """
    seconds = results.groupby("method")["train_seconds"].mean()
    factors = seconds.max() / seconds
    return {
        name: [scale_training(cell, factors[name]) for cell in cells]
        for name, cells in plan.items()
    }


def compare(
    plan: Mapping[str, Sequence[Config]],
    folder: Path | str,
    processes: int = 1,
    budget: str = "equal epochs",
) -> pd.DataFrame:
    """Train all cells of a plan that are not finished and collect their results.

    Args:
        plan: cells per method.
        folder: where runs lie.
        processes: per training.
        budget: what the methods have in common, a name for the table.

    Returns:
        `ablation.collect` of the last and of the best epoch, with ``method`` and ``budget``.
    """
    train_all([cell for cells in plan.values() for cell in cells], folder, processes)
    tables = []
    for name, cells in plan.items():
        runs = [run_folder(cell, folder) for cell in cells]
        both = [collect(runs, checkpoint) for checkpoint in ("last", "best")]
        tables.append(pd.concat(both).assign(method=name, budget=budget))
    return pd.concat(tables, ignore_index=True)


def differences(results: pd.DataFrame, folder: Path | str) -> pd.DataFrame:
    """Every view of every method against the baseline of the same budget, weights and seed.

    Args:
        results: from `compare`.
        folder: where its runs lie.

    Returns:
        The keys ``budget, checkpoint, method, seed`` and the columns of `paired_image_differences`.
    """
    runs = results.drop_duplicates(COMPARED).set_index(COMPARED)["run"]
    pairs = {}
    for key, run in runs.items():
        budget, checkpoint, method, seed = key
        if method != BASELINE:
            both = run, runs[budget, checkpoint, BASELINE, seed]
            files = (Path(folder, name, f"predictions_{checkpoint}.csv") for name in both)
            tables = [pd.read_csv(file, encoding_errors="surrogateescape") for file in files]
            pairs[key] = paired_image_differences(*tables)
    return pd.concat(pairs, names=COMPARED).reset_index(COMPARED).reset_index(drop=True)


def paired_image_differences(
    predictions: pd.DataFrame, baseline: pd.DataFrame, baseline_scale: str = "scale 1"
) -> pd.DataFrame:
    """How much more accurate one model is than another on the same images, image by image.

    Args:
        predictions: of a model, from `evaluation.predict`.
        baseline: of another, on the same images.
        baseline_scale: which of its views is compared with.

    Returns:
        One row per view name: ``scale, images``; ``difference`` in points with its
        ``standard_error``; ``low, high`` its 95 % interval over images (Agresti and Min, 2005: half
        an image is added to each cell of the table of pairs, so that few differing images do not
        feign certainty); ``better, worse`` images right in one model only; ``p_value`` of
        McNemar's exact test on these two counts. Other seeds move the difference too.

    Raises:
        InputError: the two were not tested on the same images and labels.
    """
    other = _correct(baseline, baseline_scale)
    rows = []
    for scale in predictions["output"].unique():
        one = _correct(predictions, scale)
        if not one.index.sort_values().equals(other.index.sort_values()):
            raise InputError("two models tested on different images; compare runs of one data set")
        other = other.reindex(one.index)
        better, worse = int((one & ~other).sum()), int((other & ~one).sum())
        rows.append({"output": scale, "images": len(one)} | _paired(better, worse, len(one)))
    return pd.DataFrame(rows)


def _correct(predictions: pd.DataFrame, scale: str) -> pd.Series:
    """Whether each image, by path and label, is told right at one view."""
    rows = predictions[predictions["output"] == scale]
    return (rows.set_index(["path", "label"])["rank"] == 0).rename("correct")


def _paired(better: int, worse: int, images: int) -> dict[str, float]:
    """Statistics of a sample of pairs, from the numbers of those that only one side gets right."""
    difference, deviation = _mean_and_error(better, worse, images)
    center, error = _mean_and_error(better + 0.5, worse + 0.5, images + 2)  # Agresti and Min
    reach = stats.norm.ppf(0.975) * error
    decided = better + worse
    return {
        "difference": difference,
        "standard_error": deviation,
        "low": max(-100.0, center - reach),
        "high": min(100.0, center + reach),
        "better": better,
        "worse": worse,
        "p_value": stats.binomtest(better, decided).pvalue if decided else 1.0,
    }


def _mean_and_error(better: float, worse: float, images: float) -> tuple[float, float]:
    """Mean in points, and its standard error, of values 1 (better), -1 (worse) and 0."""
    mean = (better - worse) / images
    return 100 * mean, 100 * np.sqrt(((better + worse) / images - mean**2) / images)
