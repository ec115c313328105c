"""Where a model looks, scored against annotated boxes and parts, as a function of the threshold.

Annotations score regions here and nowhere else: they never train or choose anything. Scale 1 runs
once per image and its strengths are kept, so a sweep over thresholds, strengths and proposals costs
no further forward pass; only accuracies of scale 2 do.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ramslib.attention import record_attention
from ramslib.data.transforms import ImageDataset, ImageTransform, prepare
from ramslib.distributed import load_batches
from ramslib.dppm import propose, seed_random_proposals
from ramslib.errors import InputError
from ramslib.evaluation import BOX, fuse, output_names
from ramslib.model import RAMSTrans
from ramslib.regions import box_area, box_iou, full_image_boxes, rescale_boxes
from ramslib.strength import attention_strength


class StrengthMaps(NamedTuple):
    """Attention strengths of scale 1 for a table of images.

    Attributes:
        maps: (n, h, w) per name of strength.
        table: the images, in the same order.
        view: through which they were seen.
        sizes: (n, 2) height and width of the upright images.
        image_size: (H, W) of the input.
    """

    maps: dict[str, Tensor]
    table: pd.DataFrame
    view: ImageTransform
    sizes: Tensor
    image_size: tuple[int, int]


def _batches(
    model: RAMSTrans, table: pd.DataFrame, view: ImageTransform, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor | None, dict]]:
    """Normalized images and sources of a table, on the model's device, batch by batch."""
    device = next(model.parameters()).device
    for batch in load_batches(ImageDataset(table, view), workers, batch_size=batch_size):
        pixels = batch["pixels"].to(device)
        yield *prepare(pixels, model.image_size, *model.mean_std), batch


@torch.inference_mode()
def record_strengths(
    model: RAMSTrans,
    table: pd.DataFrame,
    view: ImageTransform,
    names: Sequence[str],
    batch_size: int = 32,
    workers: int = 0,
) -> StrengthMaps:
    """Look at every image once, at scale 1, and keep its attention strengths.

    Args:
        model: in evaluation mode; it needs no training.
        table: the images.
        view: the deterministic view of the test.
        names: keys of ``STRENGTHS``.
        batch_size: images per forward pass.
        workers: loader processes.
    """
    maps: dict[str, list[Tensor]] = {name: [] for name in names}
    sizes = []
    for images, _, batch in _batches(model, table, view, batch_size, workers):
        with record_attention(model.backbone) as blocks:
            model.backbone.forward_features(images)
        for name in names:
            maps[name].append(attention_strength(blocks, name, model.grid).cpu())
        sizes.append(batch["size"])
    joined = {name: torch.cat(parts) for name, parts in maps.items()}
    return StrengthMaps(
        joined, table.reset_index(drop=True), view, torch.cat(sizes), model.image_size
    )


def regions(strengths: StrengthMaps, name: str, threshold: float, proposal: str) -> Tensor:
    """The proposed region of every image: (n, 4) in pixels of the upright images.

    Random ones are those that `evaluation.predict` looks at.
    """
    strength = strengths.maps[name]
    with seed_random_proposals(range(len(strength))):
        patch_boxes = propose(strength, threshold, proposal).patch_boxes
    whole = torch.tensor([0.0, 0.0, *strengths.image_size])
    boxes = rescale_boxes(patch_boxes, strength.shape[1:], whole)
    return strengths.view.boxes_to_image(boxes, strengths.sizes, strengths.image_size)


def score_regions(
    boxes: Tensor, strengths: StrengthMaps, parts: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Score one region per image.

    Args:
        boxes: (n, 4) pixels of the upright images.
        strengths: whose table has the annotated boxes.
        parts: visible parts (``path, y, x``), where the data set has them.

    Returns:
        One row per image: ``path, iou`` (NaN without an annotated box), ``area`` (share of the
        image) and, with parts, ``parts_inside`` (share of its visible parts).
    """
    annotated = torch.tensor(strengths.table[BOX].to_numpy(float))
    scores = strengths.table[["path"]].copy()
    scores["iou"] = box_iou(boxes.double(), annotated).numpy()
    scores.loc[annotated.isnan().any(dim=1).numpy(), "iou"] = np.nan
    scores["area"] = (box_area(boxes) / strengths.sizes.prod(dim=1)).numpy()
    if parts is not None:
        scores["parts_inside"] = scores["path"].map(_parts_inside(boxes, scores["path"], parts))
    return scores


def best_median_worst(scores: pd.Series) -> dict[str, int]:
    """Positions of three images that show what a mean hides; none where every score is NaN.

    Of an even number the median is the upper one of the two in the middle.
    """
    order = np.argsort(scores.to_numpy(), kind="stable")[: scores.notna().sum()]
    places = {"best": -1, "median": len(order) // 2, "worst": 0}
    return {name: int(order[place]) for name, place in places.items()} if len(order) else {}


def _parts_inside(boxes: Tensor, paths: pd.Series, parts: pd.DataFrame) -> pd.Series:
    """Share of visible parts inside its image's region, by path."""
    region = pd.DataFrame(boxes.numpy(), columns=BOX).assign(path=paths.to_numpy())
    joined = parts.merge(region, on="path")
    inside = joined["y"].between(joined["top"], joined["bottom"], inclusive="left")
    inside &= joined["x"].between(joined["left"], joined["right"], inclusive="left")
    return inside.groupby(joined["path"]).mean()


def sweep_thresholds(
    strengths: StrengthMaps,
    thresholds: Sequence[float],
    proposals: Sequence[str] = ("attention",),
    parts: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Scores of the proposed regions for every strength, proposal and threshold.

    Returns:
        One row per combination: ``strength, proposal, threshold, iou`` (mean), ``iou_above_half``
        and, where known, ``area`` and ``parts_inside`` (all shares in [0, 1]).
    """
    rows = []
    for name, proposal, threshold in product(strengths.maps, proposals, thresholds):
        boxes = regions(strengths, name, threshold, proposal)
        scores = score_regions(boxes, strengths, parts)
        row = {"strength": name, "proposal": proposal, "threshold": threshold}
        row["iou_above_half"] = (scores["iou"].dropna() > 0.5).mean()
        rows.append(row | scores.drop(columns="path").mean().to_dict())
    return pd.DataFrame(rows)


@torch.inference_mode()
def accuracy_by_threshold(
    model: RAMSTrans,
    table: pd.DataFrame,
    view: ImageTransform,
    thresholds: Sequence[float],
    batch_size: int = 32,
    workers: int = 0,
) -> pd.DataFrame:
    """Accuracy of a two-scale model at other thresholds than it was trained with.

    Scale 1 runs once per image, scale 2 once per image and region; thresholds often share one.

    Returns:
        One row per threshold and view name: ``threshold, scale, images, top1, standard_error``
        (percent).

    Raises:
        InputError: the model has not two scales.
    """
    if model.num_scales != 2:
        raise InputError(f"this sweep needs a model of two scales, not {model.num_scales}")
    names = output_names(2)
    correct = torch.zeros(len(thresholds), len(names), dtype=torch.long)
    for images, source, batch in _batches(model, table, view, batch_size, workers):
        labels = batch["label"].to(images.device)
        first, strength = model.look(images, 0)
        whole = full_image_boxes(images)
        known: dict[tuple, Tensor] = {}  # (image, its box): logits of scale 2
        for row, threshold in enumerate(thresholds):
            with seed_random_proposals(batch["index"]):
                boxes = propose(strength, threshold, model.proposal).patch_boxes
            keys = [(image, *box) for image, box in enumerate(boxes.tolist())]
            new = [key[0] for key in keys if key not in known]
            if new:
                large = None if source is None else source[new]
                crops, _ = model.crop_region(images[new], large, whole[new], boxes[new])
                found = model.look(crops, 1)[0]
                known.update(zip([keys[image] for image in new], found, strict=True))
            second = torch.stack([known[key] for key in keys])
            probabilities = torch.stack(fuse((first, second)))
            correct[row] += (probabilities.argmax(dim=-1) == labels).sum(dim=1).cpu()
    share = correct.double().numpy() / len(table)
    keys = pd.MultiIndex.from_product([thresholds, names], names=["threshold", "output"])
    result = pd.DataFrame({"top1": 100 * share.ravel()}, index=keys).reset_index()
    error = 100 * np.sqrt(share * (1 - share) / len(table)).ravel()
    return result.assign(images=len(table), standard_error=error)
