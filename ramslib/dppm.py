"""The dynamic patch proposal module (DPPM), and what it can be compared with.

RAMS-Trans, section 3.3: threshold the attention strength at eta times its mean, keep the largest
8-connected component, take its bounding box. The region is amplified by `regions.crop_and_resize`.

A proposal is a function ``(strength, threshold) -> Proposal``; ``PROPOSALS`` maps names to them,
and a new strategy is one more entry there. The alternatives are the controls of an ablation: they
see the same strength, so that ``random`` and ``center`` spend exactly the area the DPPM spends.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from ramslib.errors import InputError
from ramslib.regions import bounding_boxes, full_image_boxes, largest_component, patch_mask


class Proposal(NamedTuple):
    """The region that one scale proposes to the next.

    Attributes:
        mask: (B, h, w) bool, patches above the threshold.
        component: (B, h, w) bool, the patches that the box encloses.
        patch_boxes: (B, 4) long, in patches, bottom and right exclusive.
    """

    mask: Tensor
    component: Tensor
    patch_boxes: Tensor


def attention_proposal(strength: Tensor, threshold: float | Tensor) -> Proposal:
    """The DPPM: the box around the largest component of strong patches.

    Constant, NaN or infinite strength, or a threshold that no patch passes, gives the whole image.

    Args:
        strength: (B, h, w) attention strength.
        threshold: the paper's eta, a multiple of the mean strength; one number or (B,).
    """
    mask = patch_mask(strength, threshold)
    component = largest_component(mask)
    return Proposal(mask, component, bounding_boxes(component))


def all_patches_proposal(strength: Tensor, threshold: float | Tensor) -> Proposal:
    """The box around all strong patches, connected or not: the DPPM without its component step."""
    mask = patch_mask(strength, threshold)
    return Proposal(mask, mask, bounding_boxes(mask))


def whole_proposal(strength: Tensor, threshold: float | Tensor) -> Proposal:
    """The whole image, whatever the attention says."""
    mask = torch.ones_like(strength, dtype=torch.bool)
    return Proposal(mask, mask, full_image_boxes(mask).long())


def center_proposal(strength: Tensor, threshold: float | Tensor) -> Proposal:
    """The DPPM's box moved to the center of the image."""
    dppm = attention_proposal(strength, threshold)
    room = _free_space(dppm, strength)
    return _moved(dppm, strength, room // 2)


def random_proposal(strength: Tensor, threshold: float | Tensor) -> Proposal:
    """The DPPM's box moved to a random place of the image.

    Drawn from torch's global generator, or inside `seed_random_proposals` from those of the images.
    """
    dppm = attention_proposal(strength, threshold)
    room, generators = _free_space(dppm, strength), _GENERATORS.get()
    if generators is None:
        place = torch.rand(room.shape, device=room.device)
    else:
        drawn = [torch.rand(2, generator=generator) for generator in generators]
        place = torch.stack(drawn).to(room.device)
    return _moved(dppm, strength, (place * (room + 1)).long())


_GENERATORS: ContextVar[list[torch.Generator] | None] = ContextVar("generators", default=None)


@contextmanager
def seed_random_proposals(rows: Iterable[int]) -> Iterator[None]:
    """Inside, random proposals for images of these rows are the same in any batch, on any device.

    Args:
        rows: of the images of a batch in the data set's table.
    """
    seeded = [torch.Generator().manual_seed(int(row)) for row in rows]
    token = _GENERATORS.set(seeded)
    try:
        yield
    finally:
        _GENERATORS.reset(token)


def _free_space(proposal: Proposal, strength: Tensor) -> Tensor:
    """Free patches above-or-below and left-or-right of each box: (B, 2)."""
    boxes = proposal.patch_boxes
    return torch.tensor(strength.shape[1:], device=boxes.device) - (boxes[:, 2:] - boxes[:, :2])


def _moved(proposal: Proposal, strength: Tensor, corner: Tensor) -> Proposal:
    """The proposal's box at another top left corner (B, 2), all its patches kept."""
    boxes = proposal.patch_boxes
    moved = torch.cat([corner, corner + boxes[:, 2:] - boxes[:, :2]], dim=1)
    rows = torch.arange(strength.shape[1], device=boxes.device)[None, :, None]
    columns = torch.arange(strength.shape[2], device=boxes.device)[None, None, :]
    top, left, bottom, right = moved[:, :, None, None].unbind(dim=1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return Proposal(proposal.mask, inside, moved)


PROPOSALS: dict[str, Callable[[Tensor, float | Tensor], Proposal]] = {
    "attention": attention_proposal,
    "all_patches": all_patches_proposal,
    "random": random_proposal,
    "center": center_proposal,
    "whole": whole_proposal,
}


def propose(strength: Tensor, threshold: float | Tensor, name: str = "attention") -> Proposal:
    """Propose a region by name.

    Raises:
        InputError: unknown name.
    """
    if name not in PROPOSALS:
        raise InputError(f"unknown proposal {name!r}; choose one of {', '.join(PROPOSALS)}")
    with torch.no_grad():
        return PROPOSALS[name](strength, threshold)
