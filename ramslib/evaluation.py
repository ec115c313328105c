"""Evaluation: every image once, every scale and their fusions, accuracy with its uncertainty.

Predictions are one tidy table with a row per image and output: ``scale 1`` .. ``scale S``, and for
S > 1 the two fusions ``mean softmax`` and ``mean logits``, in which scales count as in the loss.
All scores are computed from it, also by a notebook from the CSV of a finished run. The last output
of an image is its answer everywhere.

Calibration (Guo et al., "On Calibration of Modern Neural Networks", 2017): the logarithms of an
output's probabilities are divided by its temperature, which is fitted on the validation split. No
prediction changes. ``confidence`` stays that of the logits; ``calibrated`` follows the temperature.

Early exit: where the largest softmax probability of scale 1 is above a threshold, scale 1 is the
answer; for other images alone the later scales run. `choose_exit_threshold` needs no model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ramslib.boxes import box_area, box_iou
from ramslib.classifier import ImageClassifier
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import ImageDataset, ImageTransform
from ramslib.distributed import Processes, load_batches, sum_over_processes
from ramslib.dppm import seed_random_proposals
from ramslib.errors import InputError

METRICS = ["prediction", "confidence", "true_probability", "rank", "calibrated"]
COLUMNS = [*METRICS, *BOX_COLUMNS]
CALIBRATED = 10_000  # images; their logits are kept
TEMPERATURES = (0.05, 20.0)
PRIOR_DEVIATION = 0.35  # of log T: without images, T is within a factor of 2 of 1 with 95 %
RELIABLE = 0.95  # share of right images among those that are not unsure
PRIOR_IMAGES = 50  # what calibrated confidences promise counts as so many validation images


def output_names(scales: int) -> list[str]:
    """Names of the rows that an image has in a table of predictions; the last is its answer."""
    fused = ["mean softmax", "mean logits"] if scales > 1 else []
    return [f"scale {scale + 1}" for scale in range(scales)] + fused


def fuse(logits: tuple[Tensor, ...], weights: Sequence[float] = ()) -> tuple[Tensor, ...]:
    """Class probabilities per output: each scale, mean of softmax, softmax of mean logits.

    Args:
        logits: (B, K) per scale.
        weights: of the scales in both means, by default equal; scales beyond the last weight have
            that one, and those before it are equal where none of them has a weight.

    Returns:
        (B, K) probabilities per name of `output_names`.
    """
    stacked = torch.stack([scale.float() for scale in logits])
    single = stacked.softmax(dim=-1)
    if len(logits) == 1:
        return tuple(single)
    weights = [*weights, *weights[-1:] * len(logits)][: len(logits)]
    if any(weights) and len(set(weights)) > 1:
        shares = torch.tensor(weights, device=stacked.device) / sum(weights)
        single_mean, mean = (torch.tensordot(shares, each, 1) for each in (single, stacked))
    else:
        single_mean, mean = single.mean(dim=0), stacked.mean(dim=0)
    return (*single, single_mean, mean.softmax(dim=-1))


def probabilities(
    logits: Sequence[Tensor], model: ImageClassifier, index: int = 0
) -> dict[str, Tensor]:
    """(K,) calibrated class probabilities of one image: each scale, and the answer of several.

    Args:
        logits: (B, K) per scale.
        model: that of the logits.
        index: of the image in the batch.
    """
    fused = fuse(tuple(scale[index : index + 1] for scale in logits), model.scale_weights)
    return {
        name: temper(values[0], model.temperatures.get(name, 1.0)).cpu()
        for name, values in zip(output_names(len(logits)), fused, strict=True)
        if name != "mean softmax"
    }


def temper(probabilities: Tensor, temperature: float) -> Tensor:
    """Class probabilities (..., K) with logarithms divided by a temperature; 1 changes nothing."""
    if temperature == 1:
        return probabilities
    smallest = torch.finfo(probabilities.dtype).tiny
    return (probabilities.clamp(min=smallest).log() / temperature).softmax(dim=-1)


@torch.inference_mode()
def fit_calibration(
    model: ImageClassifier,
    table: pd.DataFrame,
    transform: ImageTransform,
    batch_size: int = 32,
    workers: int = 0,
    processes: Processes | None = None,
) -> pd.DataFrame:
    """Fit the temperature of each output, and the confidence above which it can be relied on.

    The arguments are those of `predict`; of more than ``CALIBRATED`` images, those of the
    validation split, a sample is used.

    Returns:
        One row per output: ``output``; ``temperature``, the most probable one: it has the smallest
        nll where images are many and is near 1 where they are few, for its logarithm has a normal
        prior of deviation ``PRIOR_DEVIATION``; ``unsure_below``, the smallest calibrated confidence
        such that ``RELIABLE`` of the images that have it or more are right, 1 where there is none
        (the images seen, and ``PRIOR_IMAGES`` more that are right as often as their confidences
        say); and ``exit_above``, for scale 1 of several, the threshold of `early_exit`. Without
        images 1, NaN and NaN.
    """
    table = table.sample(min(len(table), CALIBRATED), random_state=0).reset_index(drop=True)
    shape = model.num_scales, model.classifier.out_features
    given = processes, model, table, transform, batch_size, workers
    logits = _map_images(lambda b: torch.stack(model(b["pixels"]).logits, dim=1), shape, *given)
    labels, rows, answers = torch.tensor(table["label"].to_numpy()), [], []
    fused = fuse(logits.unbind(1), model.scale_weights)
    for name, values in zip(output_names(model.num_scales), fused, strict=True):
        temperature = fit_temperature(values, labels) if len(table) else 1.0
        confidence, prediction = temper(values, temperature).max(dim=1)
        unsure_below = reliable_confidence(confidence, prediction == labels)
        rows.append({"output": name, "temperature": temperature, "unsure_below": unsure_below})
        found = {"output": name, "confidence": confidence, "rank": (prediction != labels).int()}
        answers.append(pd.DataFrame(found))
    exits = len(table) > 0 and model.num_scales > 1
    threshold = choose_exit_threshold(pd.concat(answers)) if exits else math.nan
    return pd.DataFrame(rows).assign(exit_above=[threshold, *[math.nan] * (len(rows) - 1)])


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The most probable temperature, see `fit_calibration`: (N, K), (N,)."""

    def surprise(exponent: float) -> float:
        true = temper(probabilities.double(), math.exp(exponent)).gather(1, labels[:, None])
        return -float(true.clamp(min=1e-300).log().sum()) + (exponent / PRIOR_DEVIATION) ** 2 / 2

    bounds = math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1])
    return math.exp(minimize_scalar(surprise, bounds=bounds, method="bounded").x)


def reliable_confidence(confidence: Tensor, correct: Tensor) -> float:
    """The smallest confidence from which on ``RELIABLE`` are right, see `fit_calibration`: (N,)."""
    order = confidence.argsort(descending=True, stable=True)
    confidence, correct = confidence[order], correct[order]
    images = torch.arange(1, len(order) + 1)
    promised = confidence.double().cumsum(0) / images
    accuracy = (correct.cumsum(0) + PRIOR_IMAGES * promised) / (images + PRIOR_IMAGES)
    ends = torch.cat([confidence[1:] < confidence[:-1], confidence[:1] > -1])  # of equal values
    reliable = confidence[(accuracy >= RELIABLE) & ends]
    return float(reliable[-1]) if len(reliable) else 1.0 if len(order) else math.nan


def iterate_batches(
    model: ImageClassifier,
    table: pd.DataFrame,
    transform: ImageTransform,
    batch_size: int = 32,
    workers: int = 0,
    rows: range | None = None,
) -> Iterator[dict]:
    """Batches of `ImageDataset` with ``pixels`` and ``label`` on the model's device.

    Random proposals are drawn per image, by its row, so they are the same in any batch.

    Args:
        model: in evaluation mode.
        table: a dataset table.
        transform: the deterministic one of the test.
        batch_size: images per batch.
        workers: loader processes.
        rows: which images; all by default.
    """
    device, dataset = model.device, ImageDataset(table, transform)
    for batch in load_batches(dataset, workers, batch_size=batch_size, sampler=rows):
        for name in ("pixels", "label"):
            batch[name] = batch[name].to(device, non_blocking=True)
        with seed_random_proposals(batch["index"]):
            yield batch


def _map_images(
    function: Callable, shape: tuple[int, ...], processes: Processes | None, *given
) -> Tensor:
    """What a function of a batch gives, (B, *shape), for all images: (N, *shape), on the CPU.

    The processes share the work. ``given`` are the first five arguments of `iterate_batches`.
    """
    model, table = given[:2]
    processes = processes or Processes(device=model.device)
    results = torch.zeros(len(table), *shape, dtype=torch.float64)
    for batch in iterate_batches(*given, range(processes.rank, len(table), processes.world)):
        results[batch["index"]] = function(batch).double().cpu()
    return sum_over_processes(results.to(processes.device), processes).cpu()


@torch.inference_mode()
def predict(
    model: ImageClassifier,
    table: pd.DataFrame,
    transform: ImageTransform,
    batch_size: int = 32,
    workers: int = 0,
    processes: Processes | None = None,
) -> pd.DataFrame:
    """Predict every image of a table, once, however many processes share the work.

    Args:
        model: in evaluation mode, on its device.
        table: a dataset table; its order is kept.
        transform: the deterministic one of the test.
        batch_size: images per batch and process.
        workers: loader processes per process.
        processes: those that share the images; each calls this and gets the whole result.

    Returns:
        One row per image and output: ``path, label, output, prediction, confidence,
        true_probability, rank`` (classes ranked before the true one; 0 is correct), ``calibrated``
        (the confidence at the model's temperature) and, per scale, its region as ``top, left,
        bottom, right`` in pixels of the upright image.

    Raises:
        InputError: an image that cannot be read, or for which the model gives no number.
    """
    names = output_names(model.num_scales)
    given = processes, model, table, transform, batch_size, workers
    rows = partial(_rows, model, transform)
    return tidy(_map_images(rows, (len(names), len(COLUMNS)), *given).numpy(), table, names)


def _rows(model: ImageClassifier, transform: ImageTransform, batch: dict) -> Tensor:
    """(B, outputs, columns) in the order of `COLUMNS`; fused rows have no region."""
    output, labels = model(batch["pixels"]), batch["label"][:, None]
    regions = [
        transform.boxes_to_image(first_region(boxes, len(labels)), batch["size"], model.image_size)
        for boxes in output.boxes
    ]
    no_region = torch.full((len(labels), 4), torch.nan, dtype=torch.float64)
    fused = fuse(output.logits, model.scale_weights)
    given = output_names(model.num_scales), fused, [*regions, no_region, no_region]
    rows = []
    for name, probabilities, region in zip(*given, strict=False):
        metrics = prediction_metrics(probabilities, labels, model.temperatures.get(name, 1.0))
        rows.append(torch.cat([metrics, region.double()], dim=1))
    return torch.stack(rows, dim=1)


def first_region(boxes: Tensor, images: int) -> Tensor:
    """Of R regions per image the first: (B * R, 4) -> (B, 4)."""
    return boxes.unflatten(0, (images, -1))[:, 0]


def prediction_metrics(probabilities: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """What class probabilities predict, and how right they are.

    Args:
        probabilities: (B, K).
        labels: (B, 1).
        temperature: of the calibrated confidence.

    Returns:
        (B, 5) float64 on the CPU: prediction, confidence, probability and rank of the true class,
        calibrated confidence.
    """
    classes = torch.arange(probabilities.shape[1], device=labels.device)
    confidence, prediction = probabilities.max(dim=1, keepdim=True)
    true = probabilities.gather(1, labels)
    ahead = (probabilities > true) | ((probabilities == true) & (classes < labels))
    rank = ahead.sum(dim=1, keepdim=True)
    calibrated = temper(probabilities, temperature).amax(dim=1, keepdim=True)
    return torch.cat([prediction, confidence, true, rank, calibrated], dim=1).double().cpu()


def tidy(results: np.ndarray, table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """A table of predictions.

    Args:
        results: (images, outputs, columns), the first of `COLUMNS`.
        table: the images.
        names: of the outputs.

    Raises:
        InputError: the model gave no number for an image.
    """
    images, outputs, columns = results.shape
    unknown = np.isnan(results[:, :, COLUMNS.index("confidence")]).any(axis=1)
    if unknown.any():
        raise InputError(
            f"{table['path'].iloc[int(unknown.argmax())]}: the model's logits are not finite; its "
            "weights are damaged, train it again with a lower learning_rate"
        )
    tidy = pd.DataFrame(results.reshape(images * outputs, columns), columns=COLUMNS[:columns])
    tidy = tidy.astype({"prediction": int, "rank": int})
    keys = {
        "path": table["path"].repeat(outputs).to_numpy(),
        "label": table["label"].repeat(outputs).to_numpy(),
        "output": names * images,
    }
    return pd.concat([pd.DataFrame(keys), tidy], axis=1)


def score(predictions: pd.DataFrame) -> pd.DataFrame:
    """Scores per output, from a table of predictions.

    Returns:
        One row per output: ``images, top1, standard_error, top5, mean_per_class_accuracy, ece,
        nll``; accuracies and ``ece`` (expected calibration error) in percent, the standard error
        that of ``top1``, ``nll`` (negative log-likelihood) in nats; ``ece_calibrated`` of the
        calibrated confidence.
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
                "ece_calibrated": 100 * expected_calibration_error(group["calibrated"], correct),
            }
        )
    return pd.DataFrame(rows)


def expected_calibration_error(confidence: pd.Series, correct: pd.Series, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, in [0, 1]."""
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = (confidence - correct).groupby(bin_of).sum().abs()
    return float(gaps.sum() / len(confidence))


def score_boxes(predictions: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Intersection over union of each scale's region with the annotated box.

    Args:
        predictions: from `predict`.
        table: the dataset table that holds the annotated boxes.

    Returns:
        One row per image and scale: ``path, output, iou, area`` (share of the annotated box's).

    Raises:
        InputError: no image of the predictions has an annotated box.
    """
    annotated = table.dropna(subset=BOX_COLUMNS)[["path", *BOX_COLUMNS]]
    regions = predictions.dropna(subset=BOX_COLUMNS)
    joined = regions.merge(annotated, on="path", suffixes=("", "_annotated"))
    if joined.empty:
        raise InputError("none of these images has an annotated box; use a dataset with boxes")
    region = torch.tensor(joined[BOX_COLUMNS].to_numpy(float))
    truth = torch.tensor(joined[[f"{side}_annotated" for side in BOX_COLUMNS]].to_numpy(float))
    area = box_area(region) / box_area(truth)
    return joined[["path", "output"]].assign(iou=box_iou(region, truth).numpy(), area=area.numpy())


def confusion_matrix(
    predictions: pd.DataFrame, num_classes: int, output: str, limit: int | None = None
) -> pd.DataFrame:
    """Images by true label (rows) and predicted label (columns) at one output.

    Args:
        predictions: from `predict`.
        num_classes: K.
        output: a name of `output_names`.
        limit: of more classes, only those with the most mistakes.
    """
    rows, labels = predictions[predictions["output"] == output], range(num_classes)
    counts = pd.crosstab(rows["label"], rows["prediction"])
    counts = counts.reindex(index=labels, columns=labels, fill_value=0).astype(int)
    mistakes = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    shown = sorted(mistakes.sort_values(ascending=False, kind="stable").index[:limit])
    return counts.loc[shown, shown]


@torch.inference_mode()
def early_exit(model: ImageClassifier, pixels: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Run scale 1, and the later scales where it is not confident.

    Args:
        model: in evaluation mode.
        pixels: (B, 3, Hs, Ws), see `ImageClassifier.forward`.
        threshold: calibrated confidence in [0, 1] that scale 1 must exceed; 1 runs all scales.

    Returns:
        Calibrated class probabilities (B, K), and (B,) bool, true where scale 1 was enough.
    """
    outputs = model.forward_scales(pixels)
    first, temperatures = next(outputs).logits, model.temperatures
    probabilities = temper(first.float().softmax(dim=1), temperatures.get("scale 1", 1.0))
    confident = probabilities.amax(dim=1) > threshold
    if model.num_scales > 1 and not confident.all():
        later = [outputs.send(~confident).logits, *(output.logits for output in outputs)]
        temperature = temperatures.get(output_names(model.num_scales)[-1], 1.0)
        fused = fuse((first[~confident], *later), model.scale_weights)
        probabilities[~confident] = temper(fused[-1], temperature)
    return probabilities, confident


def predict_early_exit(
    model: ImageClassifier,
    table: pd.DataFrame,
    transform: ImageTransform,
    threshold: float,
    batch_size: int = 32,
    workers: int = 0,
) -> pd.DataFrame:
    """Predict every image of a table with as few scales as it needs.

    Args:
        model: in evaluation mode, on its device.
        table: a dataset table; its order is kept.
        transform: the deterministic one of the test.
        threshold: see `early_exit`; from `choose_exit_threshold`.
        batch_size: images whose scale 1 runs together.
        workers: loader processes.

    Returns:
        One row per image, which `score` reads: ``path, label, output`` ("early exit"),
        ``prediction, confidence, true_probability, rank, calibrated`` and ``scales``, how many
        were run; both confidences are the calibrated one.

    Raises:
        InputError: an image that cannot be read, or for which the model gives no number.
    """
    metrics, scales = [], []
    for batch in iterate_batches(model, table, transform, batch_size, workers):
        probabilities, confident = early_exit(model, batch["pixels"], threshold)
        metrics.append(prediction_metrics(probabilities, batch["label"][:, None]))
        scales += torch.where(confident, 1, model.num_scales).tolist()
    results = torch.cat(metrics).numpy()[:, None]
    return tidy(results, table, ["early exit"]).assign(scales=scales)


def early_exit_curve(predictions: pd.DataFrame) -> pd.DataFrame:
    """What each threshold that makes a difference would give.

    Args:
        predictions: of two scales or more, from `predict`.

    Returns:
        One row per threshold, from 0 up to 1: ``threshold, exit_rate`` (share of images with one
        scale), ``top1``, ``accuracy_drop``, the points of ``top1`` lost against all scales, and
        ``expected_drop``, those of other images: ``PRIOR_IMAGES`` are added to the ones seen, of
        which scale 1 is wrong as often as its confidence says, and it alone as often as here.

    Raises:
        InputError: predictions of one scale, or of no image.
    """
    outputs = predictions["output"].unique()
    if len(outputs) < 2:
        raise InputError("early exit chooses between scales; give predictions of two or more")
    first, full = (predictions[predictions["output"] == outputs[place]] for place in (0, -1))
    confidence = first.get("calibrated", first["confidence"]).to_numpy()
    correct = [(part["rank"] == 0).to_numpy() for part in (first, full)]
    corrected = (1 + (correct[1] & ~correct[0]).sum()) / (2 + (~correct[0]).sum())  # Laplace's rule
    rows = []
    for threshold in sorted({0.0, *confidence, 1.0}):
        confident = confidence > threshold
        top1 = 100 * (confident * correct[0] + ~confident * correct[1]).mean()
        drop = 100 * correct[1].mean() - top1
        promised = 100 * corrected * (confident * (1 - confidence)).mean()
        expected = (len(first) * drop + PRIOR_IMAGES * promised) / (len(first) + PRIOR_IMAGES)
        rows.append((threshold, confident.mean(), top1, drop, expected))
    columns = ["threshold", "exit_rate", "top1", "accuracy_drop", "expected_drop"]
    return pd.DataFrame(rows, columns=columns)


def choose_exit_threshold(predictions: pd.DataFrame, accuracy_drop: float = 0.5) -> float:
    """The lowest threshold from which on at most ``accuracy_drop`` points are expected to be lost.

    Args:
        predictions: of the validation split, see `early_exit_curve`.
        accuracy_drop: points of top-1 accuracy, 0 or more.

    Raises:
        InputError: see `early_exit_curve`; or a negative drop.
    """
    if not accuracy_drop >= 0:
        raise InputError(f"accuracy_drop is {accuracy_drop}; give 0 or more points")
    curve = early_exit_curve(predictions)
    too_much = curve.index[curve["expected_drop"] > accuracy_drop]
    return float(curve["threshold"][0 if too_much.empty else too_much[-1] + 1])
