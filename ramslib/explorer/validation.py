"""Validation predictions of a model, cached, so that the explorer answers at once.

`predict_validation` runs the model: predictions of every image, attention strengths of scale 1, and
the accuracy of scale 2 on a grid of thresholds. From what it stored, `threshold_effect` computes
what a threshold does to all images, and `sort_images` which images are worth a look. ``FIGURES``
are views of it (see `views`), whose option ``stored`` is the folder that holds it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ramslib import localization, plots
from ramslib.data.transforms import open_image
from ramslib.errors import InputError, write_atomically, write_table
from ramslib.evaluation import confusion_matrix, predict, score, score_boxes
from ramslib.inspector import Inspector
from ramslib.model import ProposalSettings
from ramslib.plots.drawing import new_grid
from ramslib.runs.folder import TABLE, read_csv
from ramslib.runs.inference import LoadedModel

GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)  # thresholds whose accuracy is stored
LIMIT = 200  # images; of more, a sample is predicted
PAGE = 18  # images at once
CLASSES = 12  # in a confusion matrix
VALUES = {  # the orders of images, and the value that each sorts by
    "corrected by scale 2": "change of the true class's probability",
    "misclassified by scale 2": "change of the true class's probability",
    "most uncertain": "confidence",
    "best boxes": "IoU with the annotated box",
    "worst boxes": "IoU with the annotated box",
}


@dataclass(frozen=True, eq=False)
class CachedValidation:
    """What is stored about the validation images of a model.

    Attributes:
        predictions: from `evaluation.predict`, with the model's own settings.
        strengths: of scale 1: the built-in ones that the backbone has, and the model's own.
        accuracy: from `accuracy_by_threshold`; empty for models that it does not fit.
        classes: names; empty without a trained classifier.
        folder: where it is stored.
    """

    predictions: pd.DataFrame
    strengths: localization.StrengthMaps
    accuracy: pd.DataFrame
    classes: Sequence[str]
    folder: Path


def validation_images(loaded: LoadedModel) -> tuple[pd.DataFrame, int]:
    """The validation images of a model (the test images where it has none), and their number.

    Above ``LIMIT`` the table is a sample, always the same.
    """
    split = "validation" if (loaded.table["split"] == "validation").any() else "test"
    table = loaded.table[loaded.table["split"] == split]
    sample = table.sample(min(LIMIT, len(table)), random_state=0).sort_index()
    return sample.reset_index(drop=True), len(table)


def predict_validation(
    loaded: LoadedModel, folder: Path | str, log: Callable[[str], object] = print
) -> CachedValidation:
    """Run a model over its validation images, or read what an earlier call has stored.

    Args:
        loaded: the model.
        folder: where results are cached.
        log: called with what is being done.

    Raises:
        InputError: an image that cannot be read, or no images.
    """
    if (cached := read_cached_validation(loaded, folder)) is None:
        _evaluate(loaded, folder, log)
        cached = read_cached_validation(loaded, folder)
    return cached


def read_cached_validation(loaded: LoadedModel, folder: Path | str) -> CachedValidation | None:
    """What an earlier `predict_validation` stored below ``folder``, or None."""
    cache = _cache(loaded, validation_images(loaded)[0], folder)
    try:
        return read_stored(cache, loaded)
    except InputError:  # none, or damaged: computed again
        return None


def read_stored(folder: Path | str, model: LoadedModel | Inspector) -> CachedValidation:
    """What is stored in a folder about a model.

    Raises:
        InputError: nothing, or it is damaged.
    """
    try:
        maps = load_file((folder := Path(folder)) / "strengths.safetensors")
        table = read_csv(folder / "images.csv", TABLE, "")
        given = table, model.transform, maps.pop("sizes"), model.model.image_size
        tables = [read_csv(folder / f"{n}.csv", {}, "") for n in ("predictions", "accuracy")]
    except (OSError, ValueError, KeyError, SafetensorError):
        raise InputError(f"{folder}: no predictions; evaluate the validation set again") from None
    return CachedValidation(
        tables[0], localization.StrengthMaps(maps, *given), tables[1], model.classes, folder
    )


def _cache(loaded: LoadedModel, table: pd.DataFrame, folder: Path | str) -> Path:
    """The folder of stored results, named by all that decides them."""
    text = json.dumps([loaded.key, table["path"].tolist(), table["label"].tolist(), GRID])
    return Path(folder) / f"validation-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _evaluate(loaded: LoadedModel, folder: Path | str, log: Callable[[str], object]) -> None:
    """Compute and store; the last file marks the folder complete."""
    table, _ = validation_images(loaded)
    if table.empty:
        raise InputError("no images to evaluate; choose a dataset with a validation split")
    images, cache = (loaded.model, table, loaded.transform), _cache(loaded, table, folder)
    cache.mkdir(parents=True, exist_ok=True)
    log(f"predicting {len(table)} images, 1 of 3")
    write_table(table, cache / "images.csv")
    write_table(predict(*images), cache / "predictions.csv")
    accuracy = pd.DataFrame(columns=["threshold", "output", "top1"])
    if loaded.classes and loaded.model.num_scales == 2:
        log(f"accuracy of {len(table)} images at {len(GRID)} thresholds, 2 of 3")
        accuracy = localization.accuracy_by_threshold(*images, GRID)
    write_table(accuracy, cache / "accuracy.csv")
    log(f"attention of {len(table)} images, 3 of 3")
    names = {*Inspector(loaded.model, loaded.transform).strengths(), loaded.model.settings.strength}
    maps, _, _, sizes, _ = localization.record_strengths(*images, sorted(names))
    tensors = {_stored_name(name): each for name, each in maps.items()} | {"sizes": sizes}
    write_atomically(cache / "strengths.safetensors", lambda part: save_file(tensors, part))


def _stored_name(strength: str | Callable) -> str:
    """The key of a strength: of a run's copy of a file, without the place of the run."""
    return str(strength).rpartition("/")[2]


def has_effect(cached: CachedValidation, settings: ProposalSettings) -> bool:
    """Whether `threshold_effect` can be computed: nothing but a stored strength is read."""
    is_stored = _stored_name(settings.strength) in cached.strengths.maps
    return is_stored and getattr(settings.functions[1], "reads_blocks", None) == 0


def threshold_effect(
    cached: CachedValidation, settings: ProposalSettings, thresholds: Sequence[float]
) -> pd.DataFrame:
    """What thresholds of scale 1 do to all images, from the stored strengths.

    Returns:
        One row per threshold, means over the images: ``threshold, area`` (share of the image) and,
        with annotated boxes, ``iou`` and ``iou_above_half`` (share of images).
    """
    name = _stored_name(settings.strength)
    one = cached.strengths._replace(maps={name: cached.strengths.maps[name]})
    proposals = [settings.proposal], None, settings
    sweep = localization.sweep_thresholds(one, thresholds, *proposals)
    return sweep[["threshold", "area", "iou", "iou_above_half"]].dropna(axis=1)


def nearest_stored_accuracy(cached: CachedValidation, threshold: float) -> pd.DataFrame:
    """Rows of the stored accuracies at the nearest threshold, itself included."""
    stored = cached.accuracy["threshold"]
    return cached.accuracy[stored == min(stored, key=lambda eta: abs(eta - threshold), default=0)]


def compare_models(
    mine: CachedValidation, other: CachedValidation
) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """How much more accurate one model is than another on the same images, and where they differ.

    Each is read at its last output.

    Returns:
        `paired_image_differences` by output, the last one last; and paths of the images that only
        one gets right.

    Raises:
        InputError: not evaluated on the same images and labels, or one has no trained classifier.
    """
    from ramslib.experiments.comparison import paired_image_differences  # 20 MiB with Optuna

    if not (mine.classes and other.classes):
        raise InputError("one of the two models has no trained classifier; choose two runs")
    tables = [each.predictions for each in (mine, other)]
    names = [table["output"].iloc[-1] for table in tables]
    differences = paired_image_differences(*tables, names[1])
    first, second = (
        table[table["output"] == name].set_index("path")["rank"] == 0
        for table, name in zip(tables, names, strict=True)
    )
    only = {"right in this model only": first & ~second}
    only["right in the other only"] = second & ~first
    return differences, {name: each.index[each].tolist() for name, each in only.items()}


def sort_images(cached: CachedValidation) -> dict[str, pd.Series]:
    """Images worth a look in several orders, those of ``VALUES`` that are known.

    Returns:
        Values by path, the clearest first.
    """
    rows, orders = cached.predictions.pivot(index="path", columns="output"), {}
    correct, probability = rows["rank"] == 0, rows["true_probability"]
    if cached.classes and "scale 2" in correct:
        first, second = correct["scale 1"], correct["scale 2"]
        change = (probability["scale 2"] - probability["scale 1"]).sort_values(kind="stable")
        orders["corrected by scale 2"] = change.loc[second & ~first][::-1]
        orders["misclassified by scale 2"] = change.loc[first & ~second]
    if cached.classes:
        confidence = rows["confidence"][cached.predictions["output"].iloc[-1]]
        orders["most uncertain"] = confidence.sort_values(kind="stable")
    if "scale 2" in correct and cached.strengths.table["top"].notna().any():
        scores = score_boxes(cached.predictions, cached.strengths.table)
        iou = scores[scores["output"] == "scale 2"].set_index("path")["iou"]
        orders["worst boxes"] = iou.dropna().sort_values(kind="stable")
        orders["best boxes"] = orders["worst boxes"][::-1]
    return {name: orders[name] for name in VALUES if name in orders}


def example_images(cached: CachedValidation, count: int) -> pd.DataFrame:
    """Images worth a look, from each order in turn: columns ``why, path, value``."""
    unknown = pd.Series(float("nan"), cached.strengths.table["path"])
    orders = sort_images(cached) or {"in order": unknown}  # neither classes nor boxes
    rows = pd.concat(orders, names=["why", "path"]).rename("value").reset_index()
    in_turn = rows.assign(turn=rows.groupby("why").cumcount()).sort_values("turn", kind="stable")
    chosen = in_turn.drop_duplicates("path").head(count)
    return chosen[["why", "path", "value"]].reset_index(drop=True)


def images_of(cached: CachedValidation, label: int, prediction: int, output: str) -> list[str]:
    """Paths of one cell of the confusion matrix of an output."""
    rows = cached.predictions.query("label == @label and prediction == @prediction")
    return rows.loc[rows["output"] == output, "path"].tolist()


def all_thresholds(
    inspector: Inspector, settings: ProposalSettings, figure: Figure, stored: str
) -> pd.DataFrame:
    """What the threshold of scale 1 does to all images, and its stored accuracies."""
    cached = read_stored(stored, inspector)
    curve = threshold_effect(cached, settings, np.linspace(0, 4, 41).round(1))
    figure.set_size_inches(7, 2.8)
    accuracy = cached.accuracy if settings.functions == inspector.settings.functions else None
    plots.plot_threshold(curve, settings.threshold(0), accuracy, figure.subplots())
    return curve


def calibration(inspector: Inspector, _, figure: Figure, stored: str) -> pd.DataFrame:
    """Accuracy against confidence, and the scores, of each output."""
    predictions = read_stored(stored, inspector).predictions
    scores = score(predictions)
    axes = new_grid(figure, (2.8 * len(scores), 3), 1, len(scores))[0]
    for ax, output in zip(axes, scores["output"], strict=True):
        plots.plot_reliability(predictions, output, ax=ax)
    return scores


def gallery(inspector: Inspector, _, figure: Figure, stored: str, order: str) -> pd.DataFrame:
    """The first images in one of the orders of `sort_images`; the table has all."""
    cached = read_stored(stored, inspector)
    values, table = sort_images(cached)[order], cached.strengths.table.set_index("path")
    rows = pd.DataFrame({order: values, "class": table["class_name"].reindex(values.index)})
    lines = max(1, math.ceil(min(PAGE, len(rows)) / 6))
    axes = new_grid(figure, (9, 1.7 * lines), lines, 6, blank=True)
    for ax, (path, value, name) in zip(axes.flat, rows.head(PAGE).itertuples(), strict=False):
        title = f"{value:.2f}, {plots.clean_class_name(name)}"
        plots.plot_image(open_image(path, 200), title=title, ax=ax)
    return rows.reset_index()


def confusion(inspector: Inspector, _, figure: Figure, stored: str, output: str):
    """Images by true and predicted class; of many classes, those with the most mistakes."""
    predictions, classes = read_stored(stored, inspector).predictions, inspector.classes
    counts = confusion_matrix(predictions, len(classes), output, CLASSES)
    figure.set_size_inches(3.4 + 0.4 * len(counts), 2.4 + 0.4 * len(counts))
    plots.plot_confusion(predictions, classes, output, CLASSES, figure.subplots())
    names = [classes[label] for label in counts]
    return counts.set_axis(names, axis=1).set_axis(names).rename_axis("true").reset_index()


def differences(inspector: Inspector, _, figure: Figure, stored: str, other: str) -> pd.DataFrame:
    """Differences in accuracy of each output to another model's last, with their intervals."""
    table, _ = compare_models(*(read_stored(each, inspector) for each in (stored, other)))
    figure.set_size_inches(6, 2.2)
    shown = table.assign(method="this − other", seed=0)
    plots.plot_differences(shown, ax=figure.subplots())
    return table


FIGURES = all_thresholds, calibration, gallery, confusion, differences
