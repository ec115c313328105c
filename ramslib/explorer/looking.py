"""The explorer's numbers: a photo is recorded once, and what a control changes is computed from it.

`record` runs one scale and keeps query and key of every block; from that, `choose` derives
strength, mask, component, box and crop for any `ProposalSettings` of controls without another forward pass.
Only what a next scale makes of its crop needs one: `follow` runs the scales whose crop has changed.
The steps themselves are the library's (`model`, `strength`, `dppm`, `localization`); no widgets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ramslib.attention import QueryKey, record_attention
from ramslib.backbone import count_class_tokens
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.dppm import Proposal, propose, seed_random_proposals
from ramslib.explorer.lenses import LoadedModel, Photo
from ramslib.localization import StrengthMaps, regions, score_regions
from ramslib.regions import box_area, box_iou, label_components
from ramslib.strength import STRENGTHS, attention_strength

SINGLE = ("single_block", "single_head")  # strengths beside those of the registry


@dataclass(frozen=True)
class ProposalSettings:
    """What the controls say.

    Attributes:
        thresholds: one per proposal; the last one also counts for further scales.
        strength: a key of ``STRENGTHS`` or one of ``SINGLE``.
        block: which block a single strength reads, from 1.
        head: which head, from 1.
        proposal: a key of ``PROPOSALS``.
        scales: how many looks.
        from_source: crops are cut from the high-resolution source, else from the view before.
    """

    thresholds: tuple[float, ...] = (1.0,)
    strength: str = "last_class"
    block: int = 1
    head: int = 1
    proposal: str = "attention"
    scales: int = 2
    from_source: bool = True

    def read(self) -> tuple:
        """What names the attention that is read: settings without effect are left out."""
        single = {"single_block": (self.block,), "single_head": (self.block, self.head)}
        return self.strength, *single.get(self.strength, ())


@dataclass(eq=False)
class RecordedScale:
    """One recorded scale: its view, where it lies in input pixels, logits, and all attention."""

    view: Tensor
    boxes: Tensor
    logits: Tensor
    blocks: list[QueryKey]
    token: int
    strengths: dict = field(default_factory=dict)  # those already computed


class Region(NamedTuple):
    """What the next scale will look at: the tensors of `model.ScaleOutput`, and the crop itself."""

    strength: Tensor
    proposal: Proposal
    crop: Tensor
    boxes: Tensor


def default_choice(lens: LoadedModel) -> ProposalSettings:
    """The controls as the model was trained."""
    model = lens.model
    return ProposalSettings(
        thresholds=model.thresholds or (1.0,),
        strength=model.strength,
        block=len(model.backbone.blocks),
        proposal=model.proposal,
        scales=model.num_scales,
        from_source=lens.view.size != model.image_size,
    )


def strength_names(lens: LoadedModel) -> list[str]:
    """The strengths that this backbone has: those of a class token need one."""
    has_token = count_class_tokens(lens.model.backbone) > 0
    return [name for name in STRENGTHS if has_token or not name.endswith("_class")] + list(SINGLE)


@torch.inference_mode()
def record(lens: LoadedModel, view: Tensor, boxes: Tensor, scale: int) -> RecordedScale:
    """Run one scale and keep its attention; further scales than trained look as the last one.

    Args:
        lens: the model.
        view: (1, 3, H, W) normalized.
        boxes: (1, 4) where it lies, in input pixels.
        scale: 0 for scale 1.
    """
    model = lens.model
    scale = min(scale, model.num_scales - 1)
    with record_attention(model.backbone) as blocks:
        logits, _ = model.look(view, scale)
    return RecordedScale(view, boxes, logits, blocks, scale if model.per_scale_token else 0)


def run_first_scale(lens: LoadedModel, photo: Photo) -> RecordedScale:
    """Scale 1: the whole view."""
    whole = torch.tensor([[0.0, 0.0, *lens.model.image_size]], device=photo.images.device)
    return record(lens, photo.images, whole, 0)


def strength_of(lens: LoadedModel, seen: RecordedScale, choice: ProposalSettings) -> Tensor:
    """Attention strength (1, h, w) as the controls choose it; each is computed once per look."""
    key = choice.read()
    if key not in seen.strengths:
        blocks, name = seen.blocks, choice.strength
        if name in SINGLE:
            blocks, name = [blocks[choice.block - 1]], _row_name(lens)
        if choice.strength == "single_head":
            blocks = [_one_head(blocks[0], choice.head - 1)]
        seen.strengths[key] = attention_strength(blocks, name, lens.model.grid, seen.token)
    return seen.strengths[key]


def _row_name(lens: LoadedModel) -> str:
    """The strength that reads a single block: the class token's row where there is one."""
    return "last_class" if count_class_tokens(lens.model.backbone) else "rollout_mean"


def _one_head(block: QueryKey, head: int) -> QueryKey:
    bias = block.bias
    if bias is not None and bias.ndim > 2 and bias.shape[-3] > 1:
        bias = bias[..., head : head + 1, :, :]
    query, key = (tensor[:, head : head + 1] for tensor in (block.query, block.key))
    return QueryKey(query, key, bias, block.scale)


@torch.inference_mode()
def choose(
    lens: LoadedModel, photo: Photo, seen: RecordedScale, choice: ProposalSettings, number: int = 0
) -> Region:
    """What a look proposes to the next one, from what was recorded: no forward pass.

    Args:
        lens: the model.
        photo: crops are cut from its source, if the controls say so.
        seen: the look that proposes.
        choice: the controls.
        number: 0 for the proposal of scale 1.
    """
    strength = strength_of(lens, seen, choice)
    threshold = choice.thresholds[min(number, len(choice.thresholds) - 1)]
    with seed_random_proposals(
        [number]
    ):  # the random proposal stays where it is while controls move
        proposal = propose(strength, threshold, choice.proposal)
    source = photo.source if choice.from_source else None
    crop, boxes = lens.model.crop_region(seen.view, source, seen.boxes, proposal.patch_boxes)
    return Region(strength, proposal, crop, boxes)


def follow(
    lens: LoadedModel, photo: Photo, seen: Sequence[RecordedScale], choice: ProposalSettings
) -> list[RecordedScale]:
    """All looks that the controls ask for; those whose crop is as before are not run again."""
    looks = [seen[0]]
    for number in range(choice.scales - 1):
        region = choose(lens, photo, looks[-1], choice, number)
        old = seen[number + 1] if number + 1 < len(seen) else None
        same = old is not None and torch.equal(old.view, region.crop)
        looks.append(old if same else record(lens, region.crop, region.boxes, number + 1))
    return looks


def photo_boxes(lens: LoadedModel, photo: Photo, boxes: Tensor) -> Tensor:
    """Boxes (B, 4) in input pixels, as boxes in pixels of the upright photo."""
    return lens.view.boxes_to_image(boxes.cpu(), photo.size, lens.model.image_size)


def measure(lens: LoadedModel, photo: Photo, region: Region) -> dict[str, float]:
    """The numbers of a region.

    Returns:
        ``top, left, bottom, right`` in pixels of the upright photo; ``area``, its share of the
        photo; ``iou`` with the annotated box, NaN without one; and, in patches of the view that it
        was proposed in, ``patches`` above the threshold, their number of ``components``, ``kept``.
    """
    boxes = photo_boxes(lens, photo, region.boxes)
    mask, component = region.proposal.mask, region.proposal.component
    iou = float(box_iou(boxes, photo.truth)[0])
    return {
        **dict(zip(BOX_COLUMNS, boxes[0].tolist(), strict=True)),
        "area": float(box_area(boxes)[0] / photo.size.prod()),
        "iou": torch.nan if photo.truth.isnan().any() else iou,
        "patches": int(mask.sum()),
        "components": int(label_components(mask).max()),  # of one image
        "kept": int(component.sum()),
    }


def threshold_curve(
    lens: LoadedModel,
    photo: Photo,
    seen: RecordedScale,
    choice: ProposalSettings,
    thresholds: Sequence[float],
) -> pd.DataFrame:
    """What any threshold of scale 1 does to this photo, from what was recorded.

    The photo is a set of equal images, each with its own threshold, for `localization` to score.

    Returns:
        One row per threshold: ``threshold, area`` (share of the photo), and ``iou`` if annotated.
    """
    count, strength = len(thresholds), strength_of(lens, seen, choice).cpu()
    table = pd.DataFrame(photo.truth.tolist() * count, columns=BOX_COLUMNS).assign(path=photo.path)
    sizes, maps = photo.size.repeat(count, 1), {"": strength.repeat(count, 1, 1)}
    copies = StrengthMaps(maps, table, lens.view, sizes, lens.model.image_size)
    boxes = regions(copies, "", torch.tensor(thresholds), choice.proposal)
    scores = score_regions(boxes, copies)[["area", "iou"]].dropna(axis=1)
    return pd.DataFrame({"threshold": thresholds}).join(scores)


def probability_curve(
    lens: LoadedModel,
    photo: Photo,
    seen: RecordedScale,
    choice: ProposalSettings,
    thresholds: Sequence[float],
) -> Iterator[float]:
    """Probability that scale 2 gives the true class, threshold by threshold of scale 1.

    Where the true class is unknown, that of the class which scale 1 predicts. One forward pass per
    different crop.
    """
    label = seen.logits[0].argmax() if photo.label is None else photo.label
    known = {}
    for threshold in thresholds:
        region = choose(lens, photo, seen, replace(choice, thresholds=(threshold,)))
        box = tuple(region.boxes[0].tolist())
        if box not in known:
            logits = record(lens, region.crop, region.boxes, 1).logits
            known[box] = float(logits[0].softmax(dim=0)[label])
        yield known[box]


def strength_per_block(lens: LoadedModel, seen: RecordedScale, choice: ProposalSettings) -> Tensor:
    """The strength (L, h, w) if the network ended after each block; single ones, block by block."""
    name = _row_name(lens) if choice.strength in SINGLE else choice.strength
    depths = range(1, len(seen.blocks) + 1)
    maps = [attention_strength(seen.blocks[:n], name, lens.model.grid, seen.token) for n in depths]
    return torch.cat(maps)
