"""Adaptive inference: an image whose first look is sure is not looked at again.

The confidence of scale 1 (its largest softmax probability) decides: above the threshold it is the
answer, otherwise the later scales run for that image alone and the mean softmax of all scales is.
No accuracy is lost where confidence can be trusted, and a second look costs as much as the first.
`choose_threshold` finds the threshold in predictions of the validation split, without a model.
"""

import pandas as pd
import torch
from torch import Tensor

from ramslib.data.transforms import ImageDataset, ImageTransform, prepare
from ramslib.distributed import load_batches
from ramslib.errors import InputError
from ramslib.evaluation import check_finite, fuse, output_names, prediction_metrics
from ramslib.model import RAMSTrans


@torch.inference_mode()
def early_exit_predict(
    model: RAMSTrans, images: Tensor, source: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Look once, and at all scales where that was not sure.

    Args:
        model: in evaluation mode.
        images: (B, 3, H, W), see `RAMSTrans.forward`.
        source: (B, 3, Hs, Ws) or None.
        threshold: confidence in [0, 1] that scale 1 must exceed; 1 looks at all scales.

    Returns:
        Class probabilities (B, K), and (B,) bool, true where one look was enough.
    """
    looks = model.scales(images, source)
    first = next(looks).logits
    probabilities = first.float().softmax(dim=1)
    sure = probabilities.amax(dim=1) > threshold
    if model.num_scales > 1 and not sure.all():
        later = [looks.send(~sure).logits, *(look.logits for look in looks)]
        fused = fuse((first[~sure], *later))
        probabilities[~sure] = fused[output_names(model.num_scales).index("mean softmax")]
    return probabilities, sure


def predict_early_exit(
    model: RAMSTrans,
    table: pd.DataFrame,
    view: ImageTransform,
    threshold: float,
    batch_size: int = 32,
    workers: int = 0,
) -> pd.DataFrame:
    """Predict every image of a table with as few looks as it needs.

    Args:
        model: in evaluation mode, on its device.
        table: a data set table; its order is kept.
        view: the deterministic view of the test.
        threshold: see `early_exit_predict`; from `choose_threshold`.
        batch_size: images whose first look is taken together.
        workers: loader processes.

    Returns:
        One row per image, which `evaluation.score` reads: ``path, label, output`` ("early exit"),
        ``prediction, confidence, true_probability, rank`` and ``looks``, 1 or the number of scales.

    Raises:
        InputError: an image that cannot be read, or for which the model gives no number.
    """
    device = next(model.parameters()).device
    judged, looks = [], []
    for batch in load_batches(ImageDataset(table, view), workers, batch_size=batch_size):
        inputs = prepare(batch["pixels"].to(device), model.image_size, *model.mean_std)
        probabilities, sure = early_exit_predict(model, *inputs, threshold)
        judged.append(prediction_metrics(probabilities, batch["label"].to(device)[:, None]))
        looks += torch.where(sure, 1, model.num_scales).tolist()
    columns = ["prediction", "confidence", "true_probability", "rank"]
    rows = pd.DataFrame(torch.cat(judged).numpy(), columns=columns)
    check_finite(rows["confidence"], table)
    rows = rows.astype({"prediction": int, "rank": int})
    keys = table[["path", "label"]].reset_index(drop=True).assign(output="early exit")
    return pd.concat([keys, rows], axis=1).assign(looks=looks)


def early_exit_curve(predictions: pd.DataFrame) -> pd.DataFrame:
    """What each threshold that makes a difference would give.

    Args:
        predictions: of two scales or more, from `evaluation.predict`.

    Returns:
        One row per threshold, from 0 up to 1: ``threshold, stopped`` (share of images with one
        look), ``top1`` and ``loss``, the points of ``top1`` lost against looking at all scales.

    Raises:
        InputError: predictions of one scale, or of no image.
    """
    first, full = (predictions.query("output == @name") for name in ("scale 1", "mean softmax"))
    if full.empty:
        raise InputError("adaptive inference chooses between scales; give predictions of two")
    confidence = first["confidence"].to_numpy()
    correct = [(part["rank"] == 0).to_numpy() for part in (first, full)]
    rows = []
    for threshold in sorted({0.0, *confidence, 1.0}):
        sure = confidence > threshold
        top1 = 100 * (sure * correct[0] + ~sure * correct[1]).mean()
        rows.append({"threshold": threshold, "stopped": sure.mean(), "top1": top1})
    curve = pd.DataFrame(rows)
    return curve.assign(loss=100 * correct[1].mean() - curve["top1"])


def choose_threshold(predictions: pd.DataFrame, loss: float = 0.5) -> float:
    """The lowest threshold from which on no more than ``loss`` points of accuracy are lost.

    Args:
        predictions: of the validation split, see `early_exit_curve`.
        loss: points of top-1 accuracy, 0 or more.

    Raises:
        InputError: see `early_exit_curve`; or a negative loss.
    """
    if not loss >= 0:
        raise InputError(f"points that may be lost are {loss}; give 0 or more")
    curve = early_exit_curve(predictions)
    too_much = curve.index[curve["loss"] > loss]
    return float(curve["threshold"][0 if too_much.empty else too_much[-1] + 1])
