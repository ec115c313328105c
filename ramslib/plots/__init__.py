"""Figures for notebooks and papers: one function per figure, tensors or tables in, Axes out.

Each draws on ``ax`` (or ``axes``) where given, else on a new figure, in the style ``STYLE``. With
``plt.style.use(plots.STYLE)`` a notebook's own figures have it, too, and vector graphics real text.
Here are figures of tables: balance, learning, ablations, differences, thresholds, errors,
calibration; ``images`` has those of images, ``drawing`` what all of them share.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from torch import Tensor

from ramslib.evaluation import confusion_matrix, expected_calibration_error
from ramslib.plots import drawing
from ramslib.plots.drawing import STYLE, clean_class_name, new_axes, output_style, styled
from ramslib.plots.images import (
    plot_image,
    plot_map,
    plot_mask,
    plot_patch_grid,
    plot_probabilities,
    plot_problems,
    plot_recursion,
    plot_samples,
    plot_strength,
    plot_strength_per_block,
)

CMAP = "viridis"
LINE_COLORS = ("#56b4e9", "#d55e00", "#882255", "#117733", "#ddaa33")  # no color of an output
ZERO = {"color": "#222222", "linewidth": 1, "linestyle": ":"}
LABELS = {
    "threshold": "threshold (× mean strength)",
    "area": "area of the box (share of the image)",
    "iou": "IoU with the annotated box",
    "iou_above_half": "IoU above 0.5 (share of images)",
    "parts_inside": "visible parts inside the box (share)",
    "probability": "probability of the true class",
    "top1": "accuracy (%)",
    "difference": "accuracy minus the baseline's (points)",
    "scales": "number of scales",
}


@styled
def plot_class_balance(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Images per class and split; classes in the order of their labels."""
    counts = table.groupby(["label", "split"]).size().unstack(fill_value=0)
    counts = counts[[name for name in ("train", "validation", "test") if name in counts]]
    below = counts.cumsum(axis=1) - counts
    ax = new_axes(ax, min(9, 3 + 0.12 * len(counts)), 2.4)
    for name, color in zip(counts, ("#0072b2", "#56b4e9", "#d9d9d9"), strict=False):
        ax.bar(counts.index, counts[name], 0.85, below[name], label=name, color=color)
    ax.set(xlabel="class (label)", ylabel="images", title=f"{len(counts)} classes")
    ax.grid(False, axis="x")
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return ax


@styled
def plot_learning(metrics: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """How a run learned: training loss and validation accuracy, side by side.

    Losses of each scale are drawn per step (pale) and as a running mean over ten steps;
    accuracies of each output per epoch, with a band of +- one standard error.

    Args:
        metrics: from `read_metrics`; empty at the start of a run.
        axes: two, where to draw.
    """
    axes = plt.subplots(1, 2, figsize=(8, 2.8))[1] if axes is None else axes
    metrics = metrics.reindex(columns=metrics.columns.union(["split", "step", "output"]))
    steps = metrics[metrics["split"] == "train"].set_index("step")
    for column, loss in steps.filter(regex=r"^loss_\d+$").items():
        name = f"scale {column.removeprefix('loss_')}"
        color, line = drawing.output_color(name), output_style(name)["linestyle"]
        axes[0].plot(loss, color=color, alpha=0.25, linewidth=0.8)
        axes[0].plot(loss.rolling(10, min_periods=1).mean(), color=color, ls=line, label=name)
    axes[0].set(xlabel="step", ylabel="loss (nats)", title="training loss", ylim=(0, None))
    for name, rows in metrics[metrics["split"] == "validation"].groupby("output", sort=False):
        style = output_style(name)
        axes[1].plot(rows["epoch"], rows["top1"], **style, label=name)
        band = [rows["top1"] + sign * rows["standard_error"] for sign in (-1, 1)]
        axes[1].fill_between(rows["epoch"], *band, color=style["color"], alpha=0.1, lw=0)
    axes[1].set(xlabel="epoch", ylabel="top-1 accuracy (%)", title="validation accuracy")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    for ax in axes:
        if ax.lines:
            ax.legend()
    return axes


@styled
def plot_ablation(
    summary: pd.DataFrame, by: str, label: str = "top1", ax: Axes | None = None
) -> Axes:
    """Mean and 95 % interval of each condition, from `comparison.summarize`.

    Args:
        summary: columns ``output, mean, half_width, runs`` and the one named by ``by``.
        by: the column whose values are the rows, in the order of their appearance.
        label: the score that was summarized; ``difference`` of `comparison.paired_differences`.
        ax: where to draw.
    """
    low, high = (summary["mean"] + sign * summary["half_width"] for sign in (-1, 1))
    ax = _plot_intervals(summary.assign(low=low, high=high), by, ax)
    if label == "difference":
        ax.axvline(0, **ZERO)
    is_single = set(summary["runs"]) == {1}
    title = "one run each, no interval" if is_single else "mean and 95 % interval over seeds"
    ax.set(xlabel=LABELS.get(label, label), ylabel=LABELS.get(by, by), title=title)
    return ax


@styled
def plot_differences(differences: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """Differences to a baseline with their 95 % intervals over images.

    Args:
        differences: from `comparison.differences`, of one budget and one checkpoint.
        title: above it.
        ax: where to draw.
    """
    names, seeds = differences["method"], differences["seed"].astype(str)
    names = names if seeds.nunique() == 1 else names + ", seed " + seeds
    table = differences.assign(mean=differences["difference"], method=names)
    ax = _plot_intervals(table, "method", ax)
    ax.axvline(0, **ZERO)
    ax.set(xlabel="difference to the baseline (points, 95 % over images)", title=title)
    return ax


def _plot_intervals(table: pd.DataFrame, by: str, ax: Axes | None) -> Axes:
    """A row per value of ``by``, in it a point and an interval (NaN: none) per output.

    Args:
        table: columns ``output, mean, low, high`` and the one named by ``by``.
        by: a column.
        ax: where to draw.
    """
    names, count = list(dict.fromkeys(table[by])), table["output"].nunique()
    ax = new_axes(ax, 6, 1 + (0.1 + 0.13 * count) * len(names))
    for number, (output, rows) in enumerate(table.groupby("output", sort=False)):
        places = [names.index(name) + 0.8 * ((number + 0.5) / count - 0.5) for name in rows[by]]
        ends = np.nan_to_num([rows["mean"] - rows["low"], rows["high"] - rows["mean"]]).clip(0)
        style = output_style(output) | {"linestyle": "none", "label": output}
        ax.errorbar(rows["mean"], places, xerr=ends, **style)
    ax.set_yticks(range(len(names)), list(map(str, names)))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.legend(title="output", loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


@styled
def plot_threshold(
    curve: pd.DataFrame,
    mark: float | None = None,
    accuracy: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The effect of a threshold: shares such as area, IoU and accuracy against it.

    Args:
        curve: ``threshold`` and columns in [0, 1]; ``LABELS`` has their names.
        mark: a threshold to mark.
        accuracy: ``threshold, output, top1`` (%) as of `localization.accuracy_by_threshold`.
        ax: where to draw.
    """
    ax = new_axes(ax, 7)
    shares = curve.set_index("threshold").rename(columns=LABELS)
    ax.set_prop_cycle(color=LINE_COLORS, linestyle=drawing.LINE_STYLES[: len(LINE_COLORS)])
    ax.plot(shares, label=list(shares))
    for name, rows in accuracy.groupby("output", sort=False) if accuracy is not None else ():
        style = output_style(name) | {"linewidth": 0.8, "label": f"accuracy, {name}"}
        ax.plot(rows["threshold"], rows["top1"] / 100, **style)
    if mark is not None:
        ax.axvline(mark, **ZERO)
    ax.set(xlabel=LABELS["threshold"], ylim=(0, 1.02), ylabel="share")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


@styled
def plot_heat_map(
    table: pd.DataFrame, rows: str, columns: str, value: str, ax: Axes | None = None
) -> Axes:
    """A score by two settings, such as ``scales`` and ``threshold``; means where runs repeat."""
    pivot = table.pivot_table(index=rows, columns=columns, values=value, sort=False)
    ax = new_axes(ax, 1.8 + 0.7 * pivot.shape[1], 0.8 + 0.45 * len(pivot))
    form = ".1f" if pivot.max(axis=None) > 1 else ".2f"
    bar = {"label": LABELS.get(value, value)}
    sns.heatmap(pivot, annot=True, fmt=form, cmap=CMAP, cbar_kws=bar, ax=ax, linewidths=1)
    ax.set(xlabel=LABELS.get(columns, columns), ylabel=LABELS.get(rows, rows))
    return ax


@styled
def plot_confusion(
    predictions: pd.DataFrame,
    classes: Sequence[str],
    output: str,
    limit: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Images by true and predicted class at one output; rows are colored by their share.

    Args:
        predictions: from `evaluation.predict`.
        classes: K names.
        output: such as ``mean logits``.
        limit: of more classes, only those with the most mistakes are shown.
        ax: where to draw.
    """
    counts = confusion_matrix(predictions, len(classes), output, limit)
    shares, text = counts.div(counts.sum(axis=1).clip(lower=1), axis=0), None
    if len(counts) <= 20:  # room for names and numbers
        names = [clean_class_name(classes[label]) for label in counts]
        shares = shares.set_axis(names).set_axis(names, axis=1)
        text = counts.astype(str).where(counts > 0, "")
    side = min(9, 2 + 0.35 * len(counts))
    ax = new_axes(ax, side + 1, side)
    options = {"cmap": CMAP, "vmin": 0, "vmax": 1, "square": True, "annot": text, "fmt": ""}
    sns.heatmap(shares, **options, cbar_kws={"label": "share of the true class"}, ax=ax)
    ax.set(xlabel="predicted", ylabel="true", title=f"confusion, {output}")
    return ax


@styled
def plot_reliability(
    predictions: pd.DataFrame, output: str, bins: int = 10, ax: Axes | None = None
) -> Axes:
    """Accuracy against confidence in equal bins; the diagonal is a calibrated model."""
    rows = predictions[predictions["output"] == output]
    table = pd.DataFrame({"confidence": rows["confidence"], "correct": rows["rank"] == 0})
    bins_of = table.groupby(np.minimum((table["confidence"] * bins).astype(int), bins - 1))
    means, sizes = bins_of.mean(), 15 + 200 * bins_of.size() / len(rows)
    ax = new_axes(ax, 2.8, 2.8)
    ax.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1)
    ax.scatter(means["confidence"], means["correct"], sizes, drawing.output_color(output))
    error = 100 * expected_calibration_error(table["confidence"], table["correct"])
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_title(f"{output}: ECE {error:.1f} points")
    return ax


@styled
def plot_attention(matrix: Tensor, ax: Axes | None = None) -> Axes:
    """An attention matrix (N, N) of one head, or the mean over heads: its rows sum to 1.

    The color bar ends at the 99.5th percentile, or a few strong tokens would darken all others.
    """
    ax = new_axes(ax, 3.6, 3)
    values = matrix.detach().float().cpu().numpy()
    drawn = ax.imshow(values, drawing.HEATMAP_CMAP, vmin=0, vmax=np.quantile(values, 0.995))
    ax.figure.colorbar(drawn, ax=ax, label="attention probability", extend="max")
    ax.set(xlabel="token that is read (key)", ylabel="token that reads (query)")
    ax.grid(False)
    return ax
