"""A whole set of images through one lens, stored, so that the explorer answers at once.

`predict_validation` runs the model: predictions of every image, attention strengths of scale 1, and the
accuracy of scale 2 on a grid of thresholds. `threshold_effect` then says what any threshold does to the
set, and `sort_images` which photos are worth a look, without the model.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ramslib.errors import InputError, write_atomically, write_table
from ramslib.evaluation import predict, score_boxes
from ramslib.explorer.lenses import LoadedModel
from ramslib.explorer.looking import SINGLE, strength_names
from ramslib.localization import (
    StrengthMaps,
    accuracy_by_threshold,
    record_strengths,
    sweep_thresholds,
)

GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)  # thresholds whose accuracy is stored
LIMIT = 200  # images; more are sampled, for the waiting


@dataclass(frozen=True, eq=False)
class CachedValidation:
    """What was found out about a set of images.

    Attributes:
        predictions: from `evaluation.predict`, with the lens's own thresholds.
        strengths: of scale 1, every name of the registry that the backbone has.
        accuracy: from `accuracy_by_threshold`; empty for models that it does not fit.
        total: how many images the set has; the survey may hold fewer.
    """

    predictions: pd.DataFrame
    strengths: StrengthMaps
    accuracy: pd.DataFrame
    total: int


def validation_images(lens: LoadedModel) -> tuple[pd.DataFrame, int]:
    """The validation images of a lens (the test images where it has none), and how many there are.

    Above ``LIMIT`` the table is a sample, always the same.
    """
    split = "validation" if (lens.table["split"] == "validation").any() else "test"
    table = lens.table[lens.table["split"] == split]
    sample = table.sample(min(LIMIT, len(table)), random_state=0).sort_index()
    return sample.reset_index(drop=True), len(table)


def read_cached_validation(lens: LoadedModel, folder: Path | str) -> CachedValidation | None:
    """What an earlier `predict_validation` stored below ``folder``, or None."""
    table, total = validation_images(lens)
    home = _home(lens, table, folder)
    try:
        maps = load_file(home / "strengths.safetensors")
        sizes = maps.pop("sizes")
        tables = [pd.read_csv(home / f"{name}.csv") for name in ("predictions", "accuracy")]
    except (OSError, ValueError, KeyError, SafetensorError):  # none, or damaged: made again
        return None
    strengths = StrengthMaps(maps, table, lens.view, sizes, lens.model.image_size)
    return CachedValidation(tables[0], strengths, tables[1], total)


def predict_validation(
    lens: LoadedModel, folder: Path | str, say: Callable[[str], None] = print
) -> CachedValidation:
    """Run the lens over its validation images, or read what an earlier call has stored.

    Args:
        lens: the model.
        folder: where surveys are stored.
        say: told what is being done.

    Raises:
        InputError: an image that cannot be read, or none to survey.
    """
    table, _ = validation_images(lens)
    if table.empty:
        raise InputError("no images to survey; choose a data set with a validation split")
    if read_cached_validation(lens, folder) is None:
        _run(lens, table, _home(lens, table, folder), say)
    return read_cached_validation(lens, folder)


def _home(lens: LoadedModel, table: pd.DataFrame, folder: Path | str) -> Path:
    """The folder of a survey, named by all that decides it."""
    parts = [lens.key, table["path"].tolist(), table["label"].tolist(), GRID]
    return Path(folder) / f"survey-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]}"


def _run(lens: LoadedModel, table: pd.DataFrame, home: Path, say: Callable[[str], None]) -> None:
    """Fill a survey's folder; its last file marks it complete."""
    home.mkdir(parents=True, exist_ok=True)
    count = f"{len(table)} images"
    say(f"predicting {count}, 1 of 3")
    write_table(predict(lens.model, table, lens.view), home / "predictions.csv")
    accuracy = pd.DataFrame(columns=["threshold", "output", "top1"])
    if lens.classes and lens.model.num_scales == 2:
        say(f"accuracy of {count} at {len(GRID)} thresholds, 2 of 3")
        accuracy = accuracy_by_threshold(lens.model, table, lens.view, GRID)
    write_table(accuracy, home / "accuracy.csv")
    say(f"attention of {count}, 3 of 3")
    names = [name for name in strength_names(lens) if name not in SINGLE]
    strengths = record_strengths(lens.model, table, lens.view, names)
    tensors = {**strengths.maps, "sizes": strengths.sizes}
    write_atomically(home / "strengths.safetensors", lambda part: save_file(tensors, part))


def threshold_effect(
    survey: CachedValidation, strength: str, proposal: str, thresholds: Sequence[float]
) -> pd.DataFrame:
    """What thresholds of scale 1 do to the set, from the stored strengths.

    Returns:
        One row per threshold, means over the images: ``threshold, area`` (share of the image) and,
        with annotated boxes, ``iou`` and ``iou_above_half`` (share of images).
    """
    one = survey.strengths._replace(maps={strength: survey.strengths.maps[strength]})
    sweep = sweep_thresholds(one, thresholds, [proposal])
    return sweep[["threshold", "area", "iou", "iou_above_half"]].dropna(axis=1)


def nearest_stored_accuracy(survey: CachedValidation, threshold: float) -> dict[str, float]:
    """Accuracy (%) by view name at the stored threshold that is nearest, itself included."""
    if survey.accuracy.empty:
        return {}
    stored = survey.accuracy["threshold"]
    nearest = stored.loc[(stored - threshold).abs().idxmin()]
    rows = survey.accuracy[stored == nearest]
    return {"threshold": float(nearest)} | dict(zip(rows["output"], rows["top1"], strict=True))


CHANGE = "change of the true class's probability"
UNITS = {  # the orders of a gallery, and what they sort by
    "repaired by scale 2": CHANGE,
    "broken by scale 2": CHANGE,
    "most uncertain": "confidence",
    "best boxes": "IoU with the annotated box",
    "worst boxes": "IoU with the annotated box",
}
ORDERS = tuple(UNITS)


def orders_of(lens: LoadedModel, survey: CachedValidation) -> list[str]:
    """Those of ``ORDERS`` that this survey can tell."""
    scales = lens.model.num_scales
    classified = [bool(lens.classes) and scales > 1] * 2 + [bool(lens.classes)]
    boxed = scales > 1 and survey.strengths.table["top"].notna().any()
    return [name for name, has in zip(ORDERS, [*classified, boxed, boxed], strict=True) if has]


def sort_images(survey: CachedValidation, order: str) -> pd.DataFrame:
    """The images that an order of ``ORDERS`` is about, first what it is most about.

    Returns:
        Columns ``path, value``; ``UNITS`` says what the value is.
    """
    if order.endswith("boxes"):
        scores = score_boxes(survey.predictions, survey.strengths.table)
        values = scores[scores["output"] == "scale 2"].set_index("path")["iou"].dropna()
    else:
        values = _change(survey.predictions, order)
    ascending = not order.startswith(("repaired", "best"))
    values = values.sort_values(ascending=ascending, kind="stable")
    return pd.DataFrame({"path": values.index, "value": values.to_numpy()})


def _change(predictions: pd.DataFrame, order: str) -> pd.Series:
    """The value of an order that predictions tell, by path."""
    rows = predictions.pivot(index="path", columns="output")
    if order == "most uncertain":
        return rows["confidence"]["mean softmax" if "mean softmax" in rows["rank"] else "scale 1"]
    right, chance = rows["rank"] == 0, rows["true_probability"]
    first, then = ("scale 2", "scale 1") if order.startswith("repaired") else ("scale 1", "scale 2")
    return (chance["scale 2"] - chance["scale 1"])[right[first] & ~right[then]]


def examples(lens: LoadedModel, survey: CachedValidation, count: int) -> pd.DataFrame:
    """Photos worth a look, from each order in turn: columns ``why, path, value``."""
    ranked = [sort_images(survey, name).assign(why=name) for name in orders_of(lens, survey)]
    if not ranked:  # neither classes nor boxes
        ranked = [survey.strengths.table[["path"]].assign(why="in order", value=float("nan"))]
    merged = pd.concat(ranked).sort_index(kind="stable").drop_duplicates("path")
    return merged.head(count)[["why", "path", "value"]].reset_index(drop=True)


def images_of(survey: CachedValidation, label: int, prediction: int, scale: str) -> list[str]:
    """Paths of one cell of the confusion matrix of a view name."""
    rows = survey.predictions.query("label == @label and prediction == @prediction")
    return rows.loc[rows["output"] == scale, "path"].tolist()
