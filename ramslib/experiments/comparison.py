"""Results of many runs side by side: which to compare, and how certain a difference is.

`grid` and `one_at_a_time` list the configurations of an ablation, `plan_methods` those of several
methods. `sweep.train_all` trains them; `collect` reads what came out, one row per run and output.

Two models that are tested on the same images share their difficulty, and two that start from one
seed share its luck. So a difference is measured in pairs, over images within a seed
(`paired_image_differences`) or over seeds (`paired_differences`): that is far more precise than the
difference of two accuracies with an uncertainty each.
"""

import itertools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ramslib.attention import STRENGTHS
from ramslib.config import Config
from ramslib.dppm import PROPOSALS
from ramslib.errors import InputError
from ramslib.evaluation import score_boxes
from ramslib.experiments.sweep import run_folder, train_all
from ramslib.extensions import is_reference
from ramslib.runs.folder import changed_settings, read_run
from ramslib.runs.results import read_predictions, read_results

AXES: dict[str, Sequence] = {  # settings that an ablation varies by name
    "scales": (1, 2, 3, 4),
    "threshold": (0.8, 1.0, 1.2, 1.5),
    "strength": tuple(STRENGTHS),
    "proposal": tuple(PROPOSALS),
    "loss": ("first", "sum", "last", (1.0, 0.5, 0.25, 0.125)),
    "class_token": ("per_scale", "shared"),
    "highres_size": (None,),  # crops of the previous input; the base crops high-resolution pixels
}

_DATA = tomllib.loads(Path(__file__).with_name("comparison.toml").read_text("utf-8"))
METHODS: dict[str, dict] = _DATA["methods"]  # name: settings that differ from the shared ones
BASELINE = "plain ViT"
COMPARED = ["budget", "checkpoint", "method", "seed"]  # what identifies one evaluated model


def choose_axes(chosen: Iterable[str] | Mapping[str, Sequence]) -> dict[str, Sequence]:
    """Settings to vary, with their values: given, or by name with those of ``AXES``.

    Raises:
        InputError: a name without values that ``AXES`` does not have.
    """
    if isinstance(chosen, Mapping):
        return dict(chosen)
    if unknown := ", ".join(sorted(set(chosen) - set(AXES))):
        raise InputError(f"no values for {unknown}; give them, or choose from {', '.join(AXES)}")
    return {name: AXES[name] for name in chosen}


def grid(base: Config, **axes: Sequence) -> list[Config]:
    """All combinations of settings: ``grid(base, scales=[1, 2], seed=[0, 1])`` has four."""
    combinations = itertools.product(*axes.values())
    return [base.replace(**dict(zip(axes, values, strict=True))) for values in combinations]


def one_at_a_time(base: Config, **axes: Sequence) -> list[Config]:
    """The base, then every single change of it: the rows of an ablation table, none twice."""
    changed = (base.replace(**{name: value}) for name in axes for value in axes[name])
    return list(dict.fromkeys([base, *changed]))


def describe(config: Config, base: Config) -> str:
    """What a configuration changes, except the seed: ``scales=3, threshold=1.2``, or ``base``.

    Files of one's own are compared by their content, wherever they are, and named without folder.
    """
    names = [name for name in changed_settings(base, config) if name != "seed"]
    changed = {name: getattr(config, name) for name in names}
    named = {k: v.rpartition("/")[2] if is_reference(v) else v for k, v in changed.items()}
    return ", ".join(f"{name}={value}" for name, value in named.items()) or "base"


def scale_training(config: Config, factor: float) -> Config:
    """The same training, longer by a factor: in whole epochs (or steps), never shorter."""
    name = "steps" if config.steps else "epochs"
    length = getattr(config, name)
    return config.replace(**{name: max(length, round(length * factor))})


def collect(
    runs: Iterable[Path | str], checkpoint: str = "best", base: Config | None = None
) -> pd.DataFrame:
    """Results of finished runs: one row per run and output, settings beside scores.

    Args:
        runs: folders of finished runs.
        checkpoint: ``best`` (by validation) or ``last``.
        base: adds a column ``condition``: how each run differs from it, see `describe`.

    Returns:
        The columns of ``results.csv``, ``run`` (name of the folder), the run's settings, and
        ``iou`` (mean over test images of a scale's crop with the annotated box) where there are
        boxes.

    Raises:
        InputError: a run that is not finished, or one of its files is damaged.
    """
    tables = []
    for run in dict.fromkeys(map(Path, runs)):
        config, _, table = read_run(run)
        results = read_results(run).query("checkpoint == @checkpoint")
        if table["top"].notna().any():
            predictions = read_predictions(run, checkpoint)
            iou = score_boxes(predictions, table).groupby("output")["iou"].mean()
            results = results.assign(iou=results["output"].map(iou))
        if base:
            results = results.assign(condition=describe(config, base))
        names = [name for name in Config.names() if name not in results]
        settings = {name: [getattr(config, name)] * len(results) for name in names}
        tables.append(results.assign(run=run.name, **settings))
    return pd.concat(tables, ignore_index=True)


def summarize(results: pd.DataFrame, by: Sequence[str], value: str = "top1") -> pd.DataFrame:
    """Mean of a score over seeds with its 95 % confidence interval (Student's t).

    Args:
        results: from `collect`.
        by: columns that identify a condition.
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
    """Differences to a baseline with the same seed: mean and 95 % interval over seeds.

    What a seed does to both (order of the images, crops) cancels, so that the interval is narrower
    than those of the means. It covers seeds alone: a single seed has none, and all runs share the
    test images.

    Args:
        results: from `collect`.
        by: columns that identify a condition.
        baseline: value of some of these columns, ``{"condition": "base"}``: all others are compared
            with the baseline of their own value, such as their own ``output``.
        value: the score.

    Returns:
        One row per condition that has the baseline's seeds: ``mean, half_width, runs``.

    Raises:
        InputError: no such baseline, or several with one seed.
    """
    shared = ["seed", *(name for name in by if name not in baseline)]
    chosen = np.logical_and.reduce([results[name] == is_ for name, is_ in baseline.items()])
    reference = results.loc[chosen, [*shared, value]]
    if reference.empty or reference.duplicated(shared).any():
        count = "several rows" if len(reference) else "no row"
        wanted = ", ".join(f"{name}={is_}" for name, is_ in baseline.items())
        raise InputError(f"{count} of the results for {wanted} and one seed; name one baseline")
    pairs = results.merge(reference, on=shared, suffixes=("", "_baseline"))
    difference = pairs[value] - pairs[f"{value}_baseline"]
    return summarize(pairs.assign(difference=difference), by, "difference")


def published() -> pd.DataFrame:
    """Published accuracies (not run here) with the standard error of CUB's 5,794 test images."""
    table = pd.DataFrame(_DATA["published"].items(), columns=["method", "top1"])
    share = table["top1"] / 100
    return table.assign(standard_error=100 * np.sqrt(share * (1 - share) / 5794))


def plan_methods(
    base: Config, methods: Sequence[str] | Mapping[str, dict], seeds: Sequence[int]
) -> dict[str, list[Config]]:
    """The configurations of each method, one per seed.

    Args:
        base: what all methods share.
        methods: keys of ``METHODS``, or names of your own with their settings; the baseline comes
            first, named or not.
        seeds: of every method.

    Raises:
        InputError: an unknown method, or none but the baseline.
    """
    known = METHODS | dict(methods) if isinstance(methods, Mapping) else METHODS
    if unknown := ", ".join(sorted(set(methods) - set(known))):
        raise InputError(f"unknown method {unknown}; choose from {'; '.join(known)}")
    if not set(methods) - {BASELINE}:
        raise InputError(f"nothing to compare with the {BASELINE}; choose from {'; '.join(known)}")
    names = dict.fromkeys([BASELINE, *methods])
    return {name: [base.replace(**known[name], seed=seed) for seed in seeds] for name in names}


def match_training_time(plan: Mapping[str, Sequence[Config]], results: pd.DataFrame) -> dict:
    """The same plan with each method trained for as many epochs as fit into the slowest one's time.

    Args:
        plan: from `plan_methods`.
        results: from `compare`: how long each method took at equal epochs.
    """
    seconds = results.groupby("method")["train_seconds"].mean()
    factors = seconds.max() / seconds
    return {
        name: [scale_training(config, factors[name]) for config in configs]
        for name, configs in plan.items()
    }


def compare(
    plan: Mapping[str, Sequence[Config]],
    folder: Path | str,
    processes: int = 1,
    budget: str = "equal epochs",
) -> pd.DataFrame:
    """Train all runs of a plan that are not finished and collect their results.

    Args:
        plan: configurations per method.
        folder: of all runs.
        processes: per training.
        budget: what the methods have in common, a name for the table.

    Returns:
        `collect` of the best and of the last checkpoint, with ``method`` and ``budget``.
    """
    train_all([config for configs in plan.values() for config in configs], folder, processes)
    tables = []
    for name, configs in plan.items():
        runs = [run_folder(config, folder) for config in configs]
        both = [collect(runs, checkpoint) for checkpoint in ("best", "last")]
        tables.append(pd.concat(both).assign(method=name, budget=budget))
    return pd.concat(tables, ignore_index=True)


def differences(results: pd.DataFrame, folder: Path | str) -> pd.DataFrame:
    """Every output of every method against the baseline of equal budget, checkpoint and seed.

    Args:
        results: from `compare`.
        folder: of its runs.

    Returns:
        The keys ``budget, checkpoint, method, seed`` and the columns of `paired_image_differences`.
    """
    runs = results.drop_duplicates(COMPARED).set_index(COMPARED)["run"]
    tables = []
    for (budget, checkpoint, method, seed), run in runs.items():
        if method != BASELINE:
            both = run, runs[budget, checkpoint, BASELINE, seed]
            pair = (read_predictions(Path(folder, name), checkpoint) for name in both)
            keys = dict(zip(COMPARED, (budget, checkpoint, method, seed), strict=True))
            tables.append(paired_image_differences(*pair).assign(**keys))
    found = pd.concat(tables, ignore_index=True)
    return found[[*COMPARED, *found.columns.drop(COMPARED)]]


def paired_image_differences(
    predictions: pd.DataFrame, baseline: pd.DataFrame, baseline_output: str = "scale 1"
) -> pd.DataFrame:
    """How much more accurate one model is than another on the same images, image by image.

    Args:
        predictions: of a model, from `evaluation.predict`.
        baseline: of another, on the same images.
        baseline_output: which of its outputs is compared with.

    Returns:
        One row per output: ``output, images``; ``difference`` in points with its
        ``standard_error``; ``low, high`` its 95 % interval over images (Agresti and Min, 2005: half
        an image is added to each entry of the table of pairs, which keeps the interval from being
        too narrow where few images differ); ``better, worse`` images right in one model only;
        ``p_value`` of McNemar's exact test on these two counts. Other seeds move the difference
        too.

    Raises:
        InputError: the two were not tested on the same images and labels.
    """
    one, other = _correct_images(predictions), _correct_images(baseline).get(baseline_output)
    if other is None or one.isna().any(axis=None) or not one.index.equals(other.index):
        raise InputError("two models tested on different images; compare runs of one split")
    better, worse = one.gt(other, axis=0).sum(), one.lt(other, axis=0).sum()
    return _paired(better, worse, len(one)).rename_axis("output").reset_index()


def _correct_images(predictions: pd.DataFrame) -> pd.DataFrame:
    """Whether each output (columns) is right, by path and label of the image, in their order."""
    correct = predictions.assign(correct=predictions["rank"] == 0)
    images = correct.pivot(index=["path", "label"], columns="output", values="correct")
    return images[predictions["output"].unique()]


def _paired(better: pd.Series, worse: pd.Series, images: int) -> pd.DataFrame:
    """Statistics of samples of pairs, from the numbers of those that only one side gets right."""
    difference, error = _mean_and_error(better, worse, images)
    center, padded_error = _mean_and_error(better + 0.5, worse + 0.5, images + 2)  # Agresti and Min
    reach = stats.norm.ppf(0.975) * padded_error
    decided = zip(better, better + worse, strict=True)
    return pd.DataFrame(
        {
            "images": images,
            "difference": difference,
            "standard_error": error,
            "low": (center - reach).clip(lower=-100.0),
            "high": (center + reach).clip(upper=100.0),
            "better": better,
            "worse": worse,
            "p_value": [stats.binomtest(one, max(both, 1)).pvalue for one, both in decided],
        }
    )


def _mean_and_error(better: pd.Series, worse: pd.Series, images: int) -> tuple[pd.Series, ...]:
    """Mean in points, and its standard error, of values 1 (better), -1 (worse) and 0."""
    mean = (better - worse) / images
    return 100 * mean, 100 * np.sqrt(((better + worse) / images - mean**2) / images)


def headlines(tables: Iterable[pd.DataFrame], count: int = 6) -> list[str]:
    """What came out of the notebooks' comparisons, a line per condition with its uncertainty.

    A condition is read at its last output, by which its checkpoint was chosen; the output with the
    best test accuracy would flatter conditions that have several.

    Args:
        tables: with ``checkpoint, output, top1, standard_error`` and either ``condition`` or
            ``budget, method, difference, low, high``; others are left out.
        count: the largest number of lines.
    """
    lines = []
    for table in tables:
        if by := [name for name in ("condition", "method", "budget") if name in table]:
            groups = table[table["checkpoint"] == "best"].groupby(by, sort=False)
            lines += filter(None, (_headline(key, group) for key, group in groups))
    more = [f"and {len(lines) - count + 1} more conditions"] if len(lines) > count else []
    return lines[: count - len(more)] + more


def _headline(condition: tuple[str, ...], rows: pd.DataFrame) -> str:
    """One condition over its seeds; empty for the baseline of differences."""
    rows = rows[rows["output"] == rows["output"].iloc[-1]].dropna(axis=1, how="all")
    name, seeds = f"{', '.join(condition)} ({rows['output'].iloc[0]})", len(rows)
    value = "difference" if "budget" in rows else "top1"
    if value not in rows:
        return ""
    ((mean, half_width),) = summarize(rows, ["output"], value)[["mean", "half_width"]].to_numpy()
    over = f" (95 % over {seeds} seeds)" if seeds > 1 else ""
    if value == "top1":
        spread = half_width if over else rows["standard_error"].iloc[0]
        return f"{name}: {mean:.1f} ± {spread:.1f} %{over or ' (best checkpoint)'}"
    low, high = (mean - half_width, mean + half_width) if over else rows[["low", "high"]].iloc[0]
    return f"{name}: {mean:+.1f} points [{low:.1f}, {high:.1f}] against the {BASELINE}{over}"
