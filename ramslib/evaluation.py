"""Evaluation: every image once, every scale and their fusions, accuracy with its uncertainty.

Predictions are one tidy table with a row per image and view: ``scale 1`` .. ``scale S``, and for
S > 1 the two fusions ``mean softmax`` and ``mean logits``. All scores are computed from that table,
so a notebook can recompute any of them from the CSV of a finished run.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ramslib.classifier import ImageClassifier
from ramslib.data.transforms import ImageDataset, ImageTransform, prepare
from ramslib.distributed import Processes, load_batches, sum_over_processes
from ramslib.dppm import seed_random_proposals
from ramslib.errors import InputError
from ramslib.regions import box_area, box_iou

BOX = ["top", "left", "bottom", "right"]
_COLUMNS = ["prediction", "confidence", "true_probability", "rank", *BOX]


def output_names(scales: int) -> list[str]:
    """Names of the rows that an image has in a table of predictions."""
    fused = ["mean softmax", "mean logits"] if scales > 1 else []
    return [f"scale {scale + 1}" for scale in range(scales)] + fused


@torch.inference_mode()
def predict(
    model: ImageClassifier,
    table: pd.DataFrame,
    view: ImageTransform,
    batch_size: int = 32,
    workers: int = 0,
    processes: Processes | None = None,
) -> pd.DataFrame:
    """Predict every image of a table, once, however many processes share the work.

    Random proposals are drawn per image, by its row, so they are the same in any batch.

    Args:
        model: in evaluation mode, on its device.
        table: a data set table; its order is kept.
        view: the deterministic view of the test.
        batch_size: images per batch and process.
        workers: loader processes per process.
        processes: those that share the images; each calls this and gets the whole result.

    Returns:
        One row per image and view name: ``path, label, output, prediction, confidence,
        true_probability, rank`` (classes ranked before the true one; 0 is correct) and, per scale,
        the region it looked at as ``top, left, bottom, right`` in pixels of the upright image.

    Raises:
        InputError: an image that cannot be read, or for which the model gives no number.
    """
    processes = processes or Processes(device=next(model.parameters()).device)
    mine = range(processes.rank, len(table), processes.world)
    batches = load_batches(ImageDataset(table, view), workers, batch_size=batch_size, sampler=mine)
    names = output_names(model.num_scales)
    results = torch.zeros(len(table), len(names), len(_COLUMNS), dtype=torch.float64)
    for batch in batches:
        with seed_random_proposals(batch["index"]):
            results[batch["index"]] = _rows(model, view, batch, processes.device)
    results = sum_over_processes(results.to(processes.device), processes).cpu().numpy()
    check_finite(results[:, :, _COLUMNS.index("confidence")].sum(axis=1), table)
    return _tidy(results, table, names)


def check_finite(confidence: np.ndarray, table: pd.DataFrame) -> None:
    """Check that the model gave a number for every image of a table.

    Raises:
        InputError: NaN for one of them.
    """
    unknown = np.isnan(confidence)
    if unknown.any():
        path = table["path"].iloc[int(unknown.argmax())]
        raise InputError(f"{path}: the model's logits are not finite; its weights are damaged")


def fuse(logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Class probabilities per view name: each scale, mean of softmax, softmax of mean logits.

    Args:
        logits: (B, K) per scale.

    Returns:
        (B, K) probabilities per name of `output_names`.
    """
    stacked = torch.stack([scale.float() for scale in logits])
    single = stacked.softmax(dim=-1)
    if len(logits) == 1:
        return tuple(single)
    return (*single, single.mean(dim=0), stacked.mean(dim=0).softmax(dim=-1))


def _rows(
    model: ImageClassifier, view: ImageTransform, batch: dict, device: torch.device
) -> Tensor:
    """(B, views, columns) in the order of `_COLUMNS`; fused rows have no region."""
    images, source = prepare(batch["pixels"].to(device), model.image_size, *model.mean_std)
    output = model(images, source)
    logits, labels = output.logits, batch["label"].to(device)[:, None]
    regions = [
        view.boxes_to_image(boxes.cpu(), batch["size"], model.image_size) for boxes in output.boxes
    ]
    no_region = torch.full((len(labels), 4), torch.nan, dtype=torch.float64)
    rows = []
    for number, probabilities in enumerate(fuse(logits)):
        region = regions[number].double() if number < len(regions) else no_region
        rows.append(torch.cat([prediction_metrics(probabilities, labels), region], dim=1))
    return torch.stack(rows, dim=1)


def prediction_metrics(probabilities: Tensor, labels: Tensor) -> Tensor:
    """What class probabilities say, and how right they are.

    Args:
        probabilities: (B, K).
        labels: (B, 1).

    Returns:
        (B, 4) float64 on the CPU: prediction, confidence, probability and rank of the true class.
    """
    classes = torch.arange(probabilities.shape[1], device=labels.device)
    confidence, prediction = probabilities.max(dim=1, keepdim=True)
    true = probabilities.gather(1, labels)
    ahead = (probabilities > true) | ((probabilities == true) & (classes < labels))
    rank = ahead.sum(dim=1, keepdim=True)
    return torch.cat([prediction, confidence, true, rank], dim=1).double().cpu()


def _tidy(results: np.ndarray, table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    images, views, columns = results.shape
    tidy = pd.DataFrame(results.reshape(images * views, columns), columns=_COLUMNS)
    tidy = tidy.astype({"prediction": int, "rank": int})
    keys = {
        "path": table["path"].repeat(views).to_numpy(),
        "label": table["label"].repeat(views).to_numpy(),
        "output": names * images,
    }
    return pd.concat([pd.DataFrame(keys), tidy], axis=1)


def score(predictions: pd.DataFrame) -> pd.DataFrame:
    """Scores per scale and fusion, from a table of predictions.

    Returns:
        One row per view name: ``images, top1, standard_error, top5, mean_per_class_accuracy, ece,
        nll``; accuracies in percent, the standard error that of ``top1``.
    """
    rows = []
    for name, group in predictions.groupby("output", sort=False):
        correct = group["rank"] == 0
        top1 = correct.mean()
        rows.append(
            {
                "output": name,
                "images": len(group),
                "top1": 100 * top1,
                "standard_error": 100 * np.sqrt(top1 * (1 - top1) / len(group)),
                "top5": 100 * (group["rank"] < 5).mean(),
                "mean_per_class_accuracy": 100 * correct.groupby(group["label"]).mean().mean(),
                "ece": 100 * expected_calibration_error(group["confidence"], correct),
                "nll": -np.log(group["true_probability"].clip(lower=1e-12)).mean(),
            }
        )
    return pd.DataFrame(rows)


def expected_calibration_error(confidence: pd.Series, correct: pd.Series, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, in [0, 1]."""
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = (confidence - correct).groupby(bin_of).sum().abs()
    return float(gaps.sum() / len(confidence))


def score_boxes(predictions: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Intersection over union of each looked-at region with the annotated box.

    Args:
        predictions: from `predict`.
        table: the data set table that holds the annotated boxes.

    Returns:
        One row per image and scale: ``path, output, iou, area`` (share of the annotated box's).

    Raises:
        InputError: no image of the predictions has an annotated box.
    """
    annotated = table.dropna(subset=BOX)[["path", *BOX]]
    looked = predictions.dropna(subset=BOX)
    joined = looked.merge(annotated, on="path", suffixes=("", "_annotated"))
    if joined.empty:
        raise InputError("none of these images has an annotated box; use a data set with boxes")
    region = torch.tensor(joined[BOX].to_numpy(float))
    truth = torch.tensor(joined[[f"{side}_annotated" for side in BOX]].to_numpy(float))
    scores = joined[["path", "output"]].copy()
    scores["iou"] = box_iou(region, truth).numpy()
    scores["area"] = (box_area(region) / box_area(truth)).numpy()
    return scores


def confusions(
    predictions: pd.DataFrame, names: list[str], output: str, count: int = 10
) -> pd.DataFrame:
    """The most frequent mistakes: ``true, predicted, images``, most frequent first."""
    wrong = predictions[(predictions["output"] == output) & (predictions["rank"] > 0)]
    counts = wrong.groupby(["label", "prediction"]).size().sort_values(ascending=False)
    rows = [(names[true], names[given], images) for (true, given), images in counts.items()]
    return pd.DataFrame(rows[:count], columns=["true", "predicted", "images"])
