"""Figures for notebooks and papers: one function per figure, tensors or tables in, Axes out.

``show_*`` show photos (they live in `stories`), ``plot_*`` show tables. Each draws on ``ax`` (or a
row of ``axes``) where given, else on a new figure; `panels` makes a grid of Axes, `save` writes
vector graphics.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ramslib.evaluation import expected_calibration_error
from ramslib.plots.drawing import clean_class_name, new_axes, output_color, panels, styled

CMAP = "viridis"
LINE_COLORS = (
    "#56b4e9",
    "#d55e00",
    "#882255",
    "#117733",
    "#ddaa33",
)  # apart from the scales' colors
LABELS = {
    "threshold": "threshold (× mean strength)",
    "area": "area of the box (share of the image)",
    "iou": "IoU with the annotated box",
    "hit": "IoU above 0.5 (share of images)",
    "iou_above_half": "IoU above 0.5 (share of images)",
    "parts_inside": "visible parts inside the box (share)",
    "accuracy": "accuracy (share of images)",
    "probability": "probability of the true class",
    "top1": "accuracy (%)",
    "difference": "accuracy above the baseline's (points)",
    "output": "read at",
    "scales": "number of scales",
}


@styled
def plot_class_balance(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Images per class and split; classes in the order of their labels."""
    counts = table.groupby(["label", "split"]).size().unstack(fill_value=0)
    order = [name for name in ("train", "validation", "test") if name in counts]
    ax = new_axes(ax, 2.4, min(9, 3 + 0.12 * len(counts)))
    below = np.zeros(len(counts))
    for name in order:
        ax.bar(counts.index, counts[name], bottom=below, label=name, width=0.85)
        below += counts[name].to_numpy()
    ax.set(xlabel="class (label)", ylabel="images", title=f"{len(counts)} classes")
    ax.grid(False, axis="x")
    ax.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return ax


@styled
def plot_losses(metrics: pd.DataFrame, ax: Axes | None = None, smooth: int = 10) -> Axes:
    """Training loss of each scale against the step: every step, and a running mean."""
    ax = new_axes(ax)
    steps = metrics[metrics["split"] == "train"]
    for name in sorted(c for c in steps if c.startswith("loss_")):
        scale = f"scale {name.removeprefix('loss_')}"
        ax.plot(steps["step"], steps[name], color=output_color(scale), alpha=0.2, linewidth=0.8)
        mean = steps[name].rolling(smooth, min_periods=1).mean()
        ax.plot(steps["step"], mean, color=output_color(scale), label=scale)
    ax.set(xlabel="step", ylabel="loss (nats)", title="training loss")
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax


@styled
def plot_accuracies(metrics: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Validation accuracy of each scale and fusion against the epoch, +- one standard error."""
    ax = new_axes(ax)
    rows = metrics[metrics["split"] == "validation"]
    for name, group in rows.groupby("output", sort=False) if len(rows) else ():
        color = output_color(name)
        ax.plot(group["epoch"], group["top1"], "o-", markersize=3, color=color, label=name)
        low, high = (group["top1"] + sign * group["standard_error"] for sign in (-1, 1))
        ax.fill_between(group["epoch"], low, high, color=color, alpha=0.1, linewidth=0)
    ax.set(xlabel="epoch", ylabel="top-1 accuracy (%)", title="validation accuracy")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if len(rows):
        ax.legend()
    return ax


@styled
def plot_learning(metrics: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Losses and validation accuracies of a run side by side, from `run.read_metrics`."""
    axes = panels(1, 2, 2.8, 4)[1][0] if axes is None else axes
    if "split" in metrics:
        plot_losses(metrics, axes[0])
        plot_accuracies(metrics, axes[1])
    return axes


@styled
def plot_ablation(
    summary: pd.DataFrame, x: str, hue: str = "output", label: str = "top1", ax: Axes | None = None
) -> Axes:
    """Mean and 95 % interval of each condition, from `ablation.summarize`.

    Args:
        summary: columns ``mean, half_width, runs`` and those named by ``x`` and ``hue``.
        x: what stands along the axis, in the order of its appearance.
        hue: what colors tell apart.
        label: the score that was summarized; ``difference`` of `ablation.paired_differences`.
        ax: where to draw.
    """
    conditions, hues = list(dict.fromkeys(summary[x])), list(dict.fromkeys(summary[hue]))
    ax = new_axes(ax, 2.8, max(4.2, 1.8 + 0.6 * len(conditions)))
    if label == "difference":
        ax.axhline(0, color="#222222", linewidth=1, linestyle=":")
    for number, value in enumerate(hues):
        group = summary[summary[hue] == value]
        places = [conditions.index(c) + 0.14 * (number - (len(hues) - 1) / 2) for c in group[x]]
        color = output_color(value) if hue == "output" else None
        look = {"fmt": "o", "capsize": 3, "markersize": 4, "color": color, "label": str(value)}
        ax.errorbar(places, group["mean"], group["half_width"].fillna(0), **look)
    names = [str(condition) for condition in conditions]
    tilt = {"rotation": 25, "ha": "right"} if max(map(len, names)) > 12 else {}
    ax.set_xticks(range(len(names)), names, **tilt)
    runs = sorted(set(summary["runs"]))
    title = "one run each, no interval" if runs == [1] else "mean and 95 % interval over seeds"
    ax.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(label, label), title=title)
    ax.grid(False, axis="x")
    ax.legend(title=LABELS.get(hue, hue), loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


@styled
def plot_differences(differences: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """Differences to a baseline with their 95 % intervals, a row per method, view and seed.

    Args:
        differences: from `comparison.differences`, of one budget and one choice of weights.
        title: above it.
        ax: where to draw.
    """
    ax = new_axes(ax, 1 + 0.3 * len(differences), 5)
    several = differences["seed"].nunique() > 1
    names = []
    for place, row in enumerate(differences.itertuples()):
        look = {"fmt": "o", "capsize": 3, "markersize": 4, "color": output_color(row.output)}
        ends = [[max(0, row.difference - row.low)], [max(0, row.high - row.difference)]]
        ax.errorbar(row.difference, place, xerr=ends, **look)
        names.append(f"{row.method}: {row.output}" + (f", seed {row.seed}" if several else ""))
    ax.axvline(0, color="#222222", linewidth=1, linestyle=":")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="difference to the baseline (points, 95 % over images)", title=title)
    ax.grid(False, axis="y")
    return ax


@styled
def plot_threshold(
    curve: pd.DataFrame,
    mark: float | None = None,
    title: str = "",
    accuracy: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """What a threshold does: shares such as area, IoU and accuracy against it.

    Args:
        curve: ``threshold`` and columns in [0, 1]; ``LABELS`` has their names.
        mark: a threshold to mark.
        title: above it.
        accuracy: ``threshold, scale, top1`` (%) as of `localization.accuracy_by_threshold`, drawn
            as points.
        ax: where to draw.
    """
    ax = new_axes(ax)
    for name, color in zip(curve.columns.drop("threshold"), LINE_COLORS, strict=False):
        ax.plot(curve["threshold"], curve[name], label=LABELS.get(name, name), color=color)
    for name, rows in accuracy.groupby("output", sort=False) if accuracy is not None else ():
        look = {"color": output_color(name), "markersize": 3, "linewidth": 0.8}
        ax.plot(rows["threshold"], rows["top1"] / 100, "o-", label=f"accuracy, {name}", **look)
    if mark is not None:
        ax.axvline(mark, color="#222222", linewidth=1, linestyle=":")
    ax.set(xlabel=LABELS["threshold"], ylim=(0, 1.02), ylabel="share", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


@styled
def plot_heat_map(
    table: pd.DataFrame, rows: str, columns: str, value: str, ax: Axes | None = None
) -> Axes:
    """A score by two settings, such as ``scales`` and ``threshold``; means where runs repeat."""
    pivot = table.pivot_table(index=rows, columns=columns, values=value, sort=False)
    ax = new_axes(ax, 0.8 + 0.45 * len(pivot), 1.8 + 0.7 * pivot.shape[1])
    form = ".1f" if pivot.max(axis=None) > 1 else ".2f"
    bar = {"label": LABELS.get(value, value)}
    sns.heatmap(pivot, annot=True, fmt=form, cmap=CMAP, cbar_kws=bar, ax=ax, linewidths=1)
    ax.set(xlabel=LABELS.get(columns, columns), ylabel=LABELS.get(rows, rows))
    return ax


@styled
def plot_confusion(
    predictions: pd.DataFrame, classes: Sequence[str], scale: str, ax: Axes | None = None
) -> Axes:
    """Images by true and predicted class at one view name; rows are colored by their share."""
    counts = confusion_counts(predictions, len(classes), scale)
    side = min(9, 2 + 0.35 * len(classes))
    ax = new_axes(ax, side, side + 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(classes) <= 20
    names = [clean_class_name(name) for name in classes] if few else "auto"
    options = {"cmap": CMAP, "vmin": 0, "vmax": 1, "square": True}
    options |= {"annot": np.where(counts, counts.astype(str), "") if few else None, "fmt": ""}
    options |= {"xticklabels": names, "yticklabels": names}
    sns.heatmap(shares, cbar_kws={"label": "share of the true class"}, ax=ax, **options)
    ax.set(xlabel="predicted", ylabel="true", title=f"confusion, {scale}")
    return ax


def confusion_counts(predictions: pd.DataFrame, classes: int, scale: str) -> np.ndarray:
    """(K, K) images by true and predicted label at one view name."""
    rows = predictions[predictions["output"] == scale]
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (rows["label"], rows["prediction"]), 1)
    return counts


@styled
def plot_reliability(
    predictions: pd.DataFrame, scale: str, bins: int = 10, ax: Axes | None = None
) -> Axes:
    """Accuracy against confidence in equal bins; the diagonal is a calibrated model."""
    rows = predictions[predictions["output"] == scale]
    correct = rows["rank"] == 0
    bin_of = np.minimum((rows["confidence"] * bins).astype(int), bins - 1)
    table = pd.DataFrame({"confidence": rows["confidence"], "correct": correct})
    table = table.groupby(bin_of).agg({"confidence": "mean", "correct": ["mean", "size"]})
    ax = new_axes(ax, 2.8, 2.8)
    ax.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1)
    sizes = 15 + 200 * table["correct", "size"] / len(rows)
    ax.scatter(
        table["confidence", "mean"], table["correct", "mean"], s=sizes, c=output_color(scale)
    )
    error = 100 * expected_calibration_error(rows["confidence"], correct)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_title(f"{scale}: calibration error {error:.1f} points")
    return ax
