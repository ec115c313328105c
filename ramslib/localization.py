"""Where a model proposes to look, scored against annotated boxes and parts, by the threshold.

Annotations score regions here and nowhere else: they never train or choose anything. Scale 1 runs
once per image and its strengths are kept, so a sweep over thresholds, strengths and proposals costs
no further forward pass; only accuracies of scale 2 do.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ramslib.attention import attention_strength
from ramslib.boxes import box_area, box_iou, full_image_boxes, rescale_boxes
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import ImageTransform
from ramslib.dppm import seed_random_proposals
from ramslib.errors import InputError
from ramslib.evaluation import fuse, iterate_batches, output_names
from ramslib.model import ProposalSettings, RAMSTrans


class StrengthMaps(NamedTuple):
    """Attention strengths of scale 1 for a table of images.

    Attributes:
        maps: (n, h, w) per name of strength.
        table: the images, in the same order.
        transform: through which they were seen.
        sizes: (n, 2) height and width of the upright images.
        image_size: (H, W) of the input.
    """

    maps: dict[str, Tensor]
    table: pd.DataFrame
    transform: ImageTransform
    sizes: Tensor
    image_size: tuple[int, int]


@torch.inference_mode()
def record_strengths(
    model: RAMSTrans,
    table: pd.DataFrame,
    transform: ImageTransform,
    names: Sequence[str],
    batch_size: int = 32,
    workers: int = 0,
) -> StrengthMaps:
    """Run scale 1 once per image, and keep its attention strengths.

    Args:
        model: in evaluation mode; it needs no training.
        table: the images.
        transform: the deterministic one of the test.
        names: keys of ``STRENGTHS``, or references to your own.
        batch_size: images per forward pass.
        workers: loader processes.
    """
    maps: dict[str, list[Tensor]] = {name: [] for name in names}
    sizes = []
    for batch in iterate_batches(model, table, transform, batch_size, workers):
        images, _ = model.preprocess(batch["pixels"])
        recorded = model.run_scale(images, 0, blocks=None, tokens=True)[2]
        for name in names:
            maps[name].append(attention_strength(recorded, name).cpu())
        sizes.append(batch["size"])
    joined = {name: torch.cat(parts) for name, parts in maps.items()}
    table = table.reset_index(drop=True)
    return StrengthMaps(joined, table, transform, torch.cat(sizes), model.image_size)


def propose_boxes(strengths: StrengthMaps, settings: ProposalSettings) -> Tensor:
    """The proposed region of every image: (n, 4) in pixels of the upright images.

    Random ones are those that `evaluation.predict` uses.

    Args:
        strengths: they hold the strength of the settings, by its name.
        settings: how scale 1 proposes.
    """
    strength = strengths.maps[settings.strength]
    with seed_random_proposals(range(len(strength))):
        patch_boxes = settings.propose(strength, 0, None).patch_boxes
    patch_boxes = patch_boxes[:, 0] if patch_boxes.ndim == 3 else patch_boxes
    whole = torch.tensor([0.0, 0.0, *strengths.image_size])
    boxes = rescale_boxes(patch_boxes, strength.shape[1:], whole)
    return strengths.transform.boxes_to_image(boxes, strengths.sizes, strengths.image_size)


def score_regions(
    boxes: Tensor, strengths: StrengthMaps, parts: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Score one region per image.

    Args:
        boxes: (n, 4) pixels of the upright images.
        strengths: whose table has the annotated boxes.
        parts: visible parts (``path, y, x``), where the dataset has them.

    Returns:
        One row per image: ``path, iou`` (NaN without an annotated box), ``area`` (share of the
        image) and, with parts, ``parts_inside`` (share of its visible parts).
    """
    annotated = torch.tensor(strengths.table[BOX_COLUMNS].to_numpy(float))
    scores = strengths.table[["path"]].copy()
    scores["iou"] = box_iou(boxes.double(), annotated).numpy()
    scores["area"] = (box_area(boxes) / strengths.sizes.prod(dim=1)).numpy()
    if parts is not None:
        scores["parts_inside"] = scores["path"].map(_parts_inside(boxes, scores["path"], parts))
    return scores


def _parts_inside(boxes: Tensor, paths: pd.Series, parts: pd.DataFrame) -> pd.Series:
    """Share of visible parts inside its image's region, by path."""
    region = pd.DataFrame(boxes.numpy(), columns=BOX_COLUMNS).assign(path=paths.to_numpy())
    joined = parts.merge(region, on="path")
    inside = joined["y"].between(joined["top"], joined["bottom"], inclusive="left")
    inside &= joined["x"].between(joined["left"], joined["right"], inclusive="left")
    return inside.groupby(joined["path"]).mean()


def best_median_worst(scores: pd.Series) -> dict[str, int]:
    """Positions of three images that show what a mean hides; none where every score is NaN.

    Of an even number the median is the upper one of the two in the middle.
    """
    order = np.argsort(scores.to_numpy(), kind="stable")[: scores.notna().sum()]
    places = {"best": -1, "median": len(order) // 2, "worst": 0}
    return {name: int(order[place]) for name, place in places.items()} if len(order) else {}


def sweep_thresholds(
    strengths: StrengthMaps,
    thresholds: Sequence[float],
    proposals: Sequence[str] = ("attention",),
    parts: pd.DataFrame | None = None,
    settings: ProposalSettings = ProposalSettings(),  # noqa: B008 (frozen)
) -> pd.DataFrame:
    """Scores of the proposed regions for every strength, proposal and threshold.

    Args:
        strengths: from `record_strengths`.
        thresholds: of scale 1.
        proposals: keys of ``PROPOSALS``, or your own that read the strength alone.
        parts: see `score_regions`.
        settings: what is the same for all: upsampling, and margin and aspect of the boxes.

    Returns:
        One row per combination: ``strength, proposal, threshold, iou`` (mean), ``iou_above_half``
        and, where known, ``area`` and ``parts_inside`` (all shares in [0, 1]).
    """
    rows = []
    for name, proposal, threshold in product(strengths.maps, proposals, thresholds):
        each = {"strength": name, "proposal": proposal, "thresholds": (threshold,)}
        boxes = propose_boxes(strengths, replace(settings, **each))
        scores = score_regions(boxes, strengths, parts)
        row = {"strength": name, "proposal": proposal, "threshold": threshold}
        row["iou_above_half"] = (scores["iou"].dropna() > 0.5).mean()
        rows.append(row | scores.drop(columns="path").mean().to_dict())
    return pd.DataFrame(rows)


@torch.inference_mode()
def accuracy_by_threshold(
    model: RAMSTrans,
    table: pd.DataFrame,
    transform: ImageTransform,
    thresholds: Sequence[float],
    batch_size: int = 32,
    workers: int = 0,
) -> pd.DataFrame:
    """Accuracy of a two-scale model at other thresholds than it was trained with.

    Scale 1 runs once per image, scale 2 once per image and region; thresholds often share one.

    Returns:
        One row per threshold and output: ``threshold, output, images, top1, standard_error``
        (percent).

    Raises:
        InputError: the model has not two scales.
    """
    if model.num_scales != 2:
        raise InputError(f"this sweep needs a model of two scales, not {model.num_scales}")
    names = output_names(2)
    correct = torch.zeros(len(thresholds), len(names), dtype=torch.long)
    for batch in iterate_batches(model, table, transform, batch_size, workers):
        images, high_res = model.preprocess(batch["pixels"])
        first, _, recorded = model.run_scale(images, 0, *model.settings.reads)
        known = {}
        for row, threshold in enumerate(thresholds):
            with seed_random_proposals(batch["index"]):
                settings = replace(model.settings, thresholds=(threshold,))
                _, proposal = model.propose(recorded, settings, 0)
            logits = first, _second_scale(model, images, high_res, proposal.patch_boxes, known)
            probabilities = torch.stack(fuse(logits, model.scale_weights))
            correct[row] += (probabilities.argmax(dim=-1) == batch["label"]).sum(dim=1).cpu()
    share = correct.double().numpy() / len(table)
    keys = pd.MultiIndex.from_product([thresholds, names], names=["threshold", "output"])
    result = pd.DataFrame({"top1": 100 * share.ravel()}, index=keys).reset_index()
    error = 100 * np.sqrt(share * (1 - share) / len(table)).ravel()
    return result.assign(images=len(table), standard_error=error)


def _second_scale(
    model: RAMSTrans, images: Tensor, high_res: Tensor | None, patch_boxes: Tensor, known: dict
) -> Tensor:
    """Logits (B, K) of the proposed regions (B, 4) or (B, R, 4); ``known`` by image and boxes."""
    keys = [(image, *box) for image, box in enumerate(patch_boxes.flatten(1).tolist())]
    new = [key[0] for key in keys if key not in known]
    if new:
        source = None if high_res is None else high_res[new]
        place = full_image_boxes(images[new]), patch_boxes[new]
        crops, _ = model.crop_region(images[new], source, *place)
        logits = model.run_scale(crops, 1)[0].unflatten(0, (len(new), -1)).mean(dim=1)
        known.update(zip([keys[image] for image in new], logits, strict=True))
    return torch.stack([known[key] for key in keys])
