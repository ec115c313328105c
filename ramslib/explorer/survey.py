"""A whole set of images through one lens, stored, so that the explorer answers at once.

`survey_images` runs the model: predictions of every image, attention strengths of scale 1, and the
accuracy of scale 2 on a grid of thresholds. `effect` then says what any threshold does to the set,
and `sort_images` which photos are worth a look, without the model.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from safetensors.torch import load_file, save_file

from ramslib.errors import InputError
from ramslib.evaluation import predict, score_boxes
from ramslib.explorer.lenses import Lens
from ramslib.explorer.looking import SINGLE, strength_names
from ramslib.files import write_atomically, write_table
from ramslib.localisation import (
    Strengths,
    accuracy_by_threshold,
    record_strengths,
    regions,
    score_regions,
)
from ramslib.regions import box_area

GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)  # thresholds whose accuracy is stored
LIMIT = 200  # images; more are sampled, for the waiting


class Survey(NamedTuple):
    """What was found out about a set of images.

    Attributes:
        predictions: from `evaluation.predict`, with the lens's own thresholds.
        strengths: of scale 1, every name of the registry that the backbone has.
        accuracy: from `accuracy_by_threshold`; empty for models that it does not fit.
        total: how many images the set has; the survey may hold fewer.
    """

    predictions: pd.DataFrame
    strengths: Strengths
    accuracy: pd.DataFrame
    total: int


def images_to_survey(lens: Lens) -> tuple[pd.DataFrame, int]:
    """The validation images of a lens (the test images where it has none), and how many there are.

    Above ``LIMIT`` the table is a sample, always the same.
    """
    split = "validation" if (lens.table["split"] == "validation").any() else "test"
    table = lens.table[lens.table["split"] == split]
    sample = table.sample(min(LIMIT, len(table)), random_state=0).sort_index()
    return sample.reset_index(drop=True), len(table)


def stored_survey(lens: Lens, folder: Path | str) -> Survey | None:
    """What an earlier `survey_images` stored below ``folder``, or None."""
    table, total = images_to_survey(lens)
    home = _home(lens, table, folder)
    if not (home / "strengths.safetensors").exists():
        return None
    maps = load_file(home / "strengths.safetensors")
    sizes = maps.pop("sizes")
    strengths = Strengths(maps, table, lens.view, sizes, lens.model.image_size)
    predictions = pd.read_csv(home / "predictions.csv")
    return Survey(predictions, strengths, pd.read_csv(home / "accuracy.csv"), total)


def survey_images(lens: Lens, folder: Path | str, say: Callable[[str], None] = print) -> Survey:
    """Run the lens over its validation images, or read what an earlier call has stored.

    Args:
        lens: the model.
        folder: where surveys are stored.
        say: told what is being done.

    Raises:
        InputError: an image that cannot be read, or none to survey.
    """
    table, _ = images_to_survey(lens)
    if table.empty:
        raise InputError("no images to survey; choose a data set with a validation split")
    if stored_survey(lens, folder) is None:
        _run(lens, table, _home(lens, table, folder), say)
    return stored_survey(lens, folder)


def _home(lens: Lens, table: pd.DataFrame, folder: Path | str) -> Path:
    """The folder of a survey, named by all that decides it."""
    parts = [lens.key, table["path"].tolist(), table["label"].tolist(), GRID]
    return Path(folder) / f"survey-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]}"


def _run(lens: Lens, table: pd.DataFrame, home: Path, say: Callable[[str], None]) -> None:
    """Fill a survey's folder; its last file marks it complete."""
    home.mkdir(parents=True, exist_ok=True)
    count = f"{len(table)} images"
    say(f"predicting {count}, 1 of 3")
    write_table(predict(lens.model, table, lens.view), home / "predictions.csv")
    accuracy = pd.DataFrame(columns=["threshold", "scale", "top1"])
    if lens.classes and lens.model.num_scales == 2:
        say(f"accuracy of {count} at {len(GRID)} thresholds, 2 of 3")
        accuracy = accuracy_by_threshold(lens.model, table, lens.view, GRID)
    write_table(accuracy, home / "accuracy.csv")
    say(f"attention of {count}, 3 of 3")
    names = [name for name in strength_names(lens) if name not in SINGLE]
    strengths = record_strengths(lens.model, table, lens.view, names)
    tensors = {**strengths.maps, "sizes": strengths.sizes}
    write_atomically(home / "strengths.safetensors", lambda part: save_file(tensors, part))


def effect(survey: Survey, strength: str, threshold: float, proposal: str) -> dict[str, float]:
    """What a threshold of scale 1 does to the set, from the stored strengths.

    Returns:
        Means over the images: ``area`` (share of the image) and, with annotated boxes, ``iou`` and
        ``hit`` (share with IoU above 0.5).
    """
    boxes = regions(survey.strengths, strength, threshold, proposal)
    means = {"area": float((box_area(boxes) / survey.strengths.sizes.prod(dim=1)).mean())}
    if survey.strengths.table["top"].notna().any():
        iou = score_regions(boxes, survey.strengths)["iou"].dropna()
        means |= {"iou": iou.mean(), "hit": (iou > 0.5).mean()}
    return means


def effect_curve(
    survey: Survey, strength: str, proposal: str, thresholds: Sequence[float]
) -> pd.DataFrame:
    """`effect` at every threshold: one row each."""
    effects = [{"threshold": t} | effect(survey, strength, t, proposal) for t in thresholds]
    return pd.DataFrame(effects)


def accuracy_near(survey: Survey, threshold: float) -> dict[str, float]:
    """Accuracy (%) by view name at the stored threshold that is nearest, itself included."""
    if survey.accuracy.empty:
        return {}
    stored = survey.accuracy["threshold"]
    nearest = stored.loc[(stored - threshold).abs().idxmin()]
    rows = survey.accuracy[stored == nearest]
    return {"threshold": float(nearest)} | dict(zip(rows["scale"], rows["top1"], strict=True))


CHANGE = "change of the true class's probability"
UNITS = {  # the orders of a gallery, and what they sort by
    "repaired by scale 2": CHANGE,
    "broken by scale 2": CHANGE,
    "most uncertain": "confidence",
    "best boxes": "IoU with the annotated box",
    "worst boxes": "IoU with the annotated box",
}
ORDERS = tuple(UNITS)


def orders_of(lens: Lens, survey: Survey) -> list[str]:
    """Those of ``ORDERS`` that this survey can tell."""
    scales = lens.model.num_scales
    classified = [bool(lens.classes) and scales > 1] * 2 + [bool(lens.classes)]
    boxed = scales > 1 and survey.strengths.table["top"].notna().any()
    return [name for name, has in zip(ORDERS, [*classified, boxed, boxed], strict=True) if has]


def sort_images(survey: Survey, order: str) -> pd.DataFrame:
    """The images that an order of ``ORDERS`` is about, first what it is most about.

    Returns:
        Columns ``path, value``; ``UNITS`` says what the value is.
    """
    if order.endswith("boxes"):
        scores = score_boxes(survey.predictions, survey.strengths.table)
        values = scores[scores["scale"] == "scale 2"].set_index("path")["iou"].dropna()
    else:
        rows = survey.predictions.pivot(index="path", columns="scale")
        if order == "most uncertain":
            fused = "mean softmax" if "mean softmax" in rows["rank"] else "scale 1"
            values = rows["confidence"][fused]
        else:
            right = rows["rank"] == 0
            before, after = right["scale 1"], right["scale 2"]
            chosen = after & ~before if order.startswith("repaired") else before & ~after
            gain = rows["true_probability"]["scale 2"] - rows["true_probability"]["scale 1"]
            values = gain[chosen]
    ascending = not order.startswith(("repaired", "best"))
    values = values.sort_values(ascending=ascending, kind="stable")
    return pd.DataFrame({"path": values.index, "value": values.to_numpy()})


def examples(lens: Lens, survey: Survey, count: int) -> pd.DataFrame:
    """Photos worth a look, from each order in turn: columns ``why, path, value``."""
    orders = orders_of(lens, survey)
    ranked = [sort_images(survey, name).assign(why=name, turn=n) for n, name in enumerate(orders)]
    ranked = [rows.assign(rank=range(len(rows))) for rows in ranked]
    if not ranked:
        return (
            survey.strengths.table[["path"]].head(count).assign(why="in order", value=float("nan"))
        )
    merged = pd.concat(ranked).sort_values(["rank", "turn"]).drop_duplicates("path")
    return merged.head(count)[["why", "path", "value"]].reset_index(drop=True)


def images_of(survey: Survey, label: int, prediction: int, scale: str) -> list[str]:
    """Paths of one cell of the confusion matrix of a view name."""
    rows = survey.predictions.query("label == @label and prediction == @prediction")
    return rows.loc[rows["scale"] == scale, "path"].tolist()


def confusion(survey: Survey, scale: str, limit: int = 12) -> pd.DataFrame:
    """Images by true (rows) and predicted label at a view name.

    Of more than ``limit`` classes, those with the most mistakes.
    """
    rows = survey.predictions[survey.predictions["scale"] == scale]
    wrong = rows[rows["rank"] > 0]
    mistakes = wrong["label"].value_counts().add(wrong["prediction"].value_counts(), fill_value=0)
    labels = sorted(set(rows["label"]) | set(rows["prediction"]))
    if len(labels) > limit:
        labels = sorted(mistakes.sort_values(ascending=False, kind="stable").index[:limit])
    counts = pd.crosstab(rows["label"], rows["prediction"])
    return counts.reindex(index=labels, columns=labels, fill_value=0)
