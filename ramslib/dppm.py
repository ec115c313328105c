"""The dynamic patch proposal module (DPPM), and what it can be compared with.

RAMS-Trans, section 3.3: threshold the attention strength at eta times its mean, keep the largest
8-connected component of the patches above it, and take its bounding box. The region is amplified by
`boxes.crop_and_resize`.

A proposal is a function ``(strength, threshold, recorded) -> Proposal``, or to boxes alone;
``PROPOSALS`` maps names to the built-in ones. The alternatives to the DPPM are the controls of an
ablation: they see the same strength, so that ``random`` and ``center`` use exactly the area that
the DPPM uses. Boxes and masks are on the CPU: one copy of the mask is all that a GPU waits for.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ramslib import acceleration
from ramslib.attention import RecordedScale
from ramslib.boxes import full_image_boxes, grow_boxes
from ramslib.errors import InputError
from ramslib.extensions import reads, resolve

# 3 x 3 within an image, none across images
NEIGHBORS = np.pad(np.ones((1, 3, 3), dtype=bool), ((1, 1), (0, 0), (0, 0)))


class Proposal(NamedTuple):
    """The region that one scale proposes to the next.

    Attributes:
        mask: (B, h, w) bool, patches above the threshold.
        component: (B, h, w) bool, the patches that the box encloses.
        patch_boxes: (B, 4) in patches, bottom and right exclusive; (B, R, 4) for several regions,
            of which tables report the first.
    """

    mask: Tensor
    component: Tensor
    patch_boxes: Tensor


def patch_mask(strength: Tensor, threshold: float | Tensor) -> Tensor:
    """Patches whose strength exceeds ``threshold`` times the image's mean strength.

    Args:
        strength: (B, h, w) float.
        threshold: the paper's eta, one number or (B,).

    Returns:
        (B, h, w) bool. An image with a NaN or infinite strength has no patch.
    """
    mean = strength.mean(dim=(1, 2), keepdim=True)
    if isinstance(threshold, Tensor):
        threshold = threshold.reshape(-1, 1, 1)
    return strength > threshold * mean + (mean - mean)  # nothing exceeds NaN = inf - inf


def label_components(mask: Tensor) -> np.ndarray:
    """Number the 8-connected components of each mask, the whole batch in one call of scipy.

    Args:
        mask: (B, h, w) bool, some hundred patches per image; copied to the CPU.

    Returns:
        (B, h, w) int32: 0 is background; the components of the batch count from 1, image by image.
    """
    labels, _ = ndimage.label(mask.cpu().numpy(), NEIGHBORS)
    return labels


def largest_component(mask: Tensor) -> Tensor:
    """The largest 8-connected component of each mask; the first in reading order on a tie.

    Args:
        mask: (B, h, w) bool.

    Returns:
        (B, h, w) bool, on the CPU; an empty mask stays empty.
    """
    if torch.compiler.is_exporting():
        return acceleration.largest_component_tensor(mask)
    labels = label_components(mask)
    sizes = np.bincount(labels.ravel(), minlength=1)
    sizes[0] = 0
    largest = [image.flat[sizes[image].argmax()] for image in labels]  # the first of that size
    return torch.from_numpy((labels == np.reshape(largest, (-1, 1, 1))) & (labels > 0))


def bounding_boxes(mask: Tensor) -> Tensor:
    """Smallest box around the foreground of each mask; the whole grid where there is none.

    Args:
        mask: (B, h, w) bool.

    Returns:
        (B, 4) long, ``(top, left, bottom, right)`` in patches, bottom and right exclusive.
    """
    arrays, array = torch, mask
    if not torch.compiler.is_exporting():  # numpy's calls cost half of torch's
        arrays, array = np, mask.cpu().numpy()
    boxes = arrays.empty((array.shape[0], 4), dtype=arrays.int64)
    for side, occupied in enumerate((array.any(2) * 1, array.any(1) * 1)):
        boxes[:, side] = occupied.argmax(1)
        boxes[:, side + 2] = occupied.shape[1] - arrays.flip(occupied, (1,)).argmax(1)
    return torch.as_tensor(boxes)


@reads(blocks=0)
def attention_proposal(
    strength: Tensor, threshold: float | Tensor, recorded: RecordedScale | None = None
) -> Proposal:
    """The DPPM: the box around the largest component of strong patches.

    Constant, NaN or infinite strength, or a threshold that no patch passes, gives the whole image.

    Args:
        strength: (B, h, w) attention strength.
        threshold: the paper's eta, a multiple of the mean strength; one number or (B,).
        recorded: not read.
    """
    mask = patch_mask(strength, threshold).cpu()
    component = largest_component(mask)
    return Proposal(mask, component, bounding_boxes(component))


@reads(blocks=0)
def all_patches_proposal(strength, threshold, recorded=None) -> Proposal:
    """The box around all strong patches, connected or not: the DPPM without its component step."""
    mask = patch_mask(strength, threshold).cpu()
    return Proposal(mask, mask, bounding_boxes(mask))


@reads(blocks=0)
def whole_proposal(strength, threshold, recorded=None) -> Proposal:
    """The whole image, whatever the attention is."""
    mask = torch.ones(strength.shape, dtype=torch.bool)
    return Proposal(mask, mask, full_image_boxes(mask).long())


@reads(blocks=0)
def center_proposal(strength, threshold, recorded=None) -> Proposal:
    """The DPPM's box moved to the center of the image."""
    dppm = attention_proposal(strength, threshold)
    return _shift_boxes(dppm, _free_space(dppm) // 2)


@reads(blocks=0)
def random_proposal(strength, threshold, recorded=None) -> Proposal:
    """The DPPM's box moved to a random place of the image.

    Drawn from torch's global generator, or inside `seed_random_proposals` from those of the images.
    """
    dppm = attention_proposal(strength, threshold)
    space, generators = _free_space(dppm), _GENERATORS.get()
    if generators is None:
        place = torch.rand(space.shape)
    else:  # as many for each image as the scale has regions of it
        each = [torch.rand(len(space) // len(generators), 2, generator=g) for g in generators]
        place = torch.cat([torch.empty(0, 2), *each])
    return _shift_boxes(dppm, (place * (space + 1)).long())


_GENERATORS: ContextVar[list[torch.Generator] | None] = ContextVar("generators", default=None)


@contextmanager
def seed_random_proposals(rows: Iterable[int]) -> Iterator[None]:
    """Inside, random proposals for images of these rows are the same in any batch, on any device.

    Args:
        rows: of the images of a batch in the dataset's table.
    """
    token = _GENERATORS.set([torch.Generator().manual_seed(int(row)) for row in rows])
    try:
        yield
    finally:
        _GENERATORS.reset(token)


def keep_random_proposals(mask: Tensor) -> None:
    """Inside `seed_random_proposals`, continue with the images of a mask (B,) bool alone."""
    if generators := _GENERATORS.get():
        kept = zip(generators, mask.tolist(), strict=True)
        _GENERATORS.set([generator for generator, is_kept in kept if is_kept])


def _free_space(proposal: Proposal) -> Tensor:
    """Patches that each box can move down and to the right in all: (B, 2)."""
    boxes = proposal.patch_boxes
    return torch.tensor(proposal.mask.shape[1:]) - (boxes[:, 2:] - boxes[:, :2])


def _shift_boxes(proposal: Proposal, corner: Tensor) -> Proposal:
    """The proposal's box at another top left corner (B, 2), all its patches kept."""
    boxes = proposal.patch_boxes
    shifted = torch.cat([corner, corner + boxes[:, 2:] - boxes[:, :2]], dim=1)
    return Proposal(proposal.mask, inside_boxes(shifted, proposal.mask.shape[1:]), shifted)


def inside_boxes(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches whose center is in a box: (B, 4) -> (B, h, w) bool."""
    rows, columns = (torch.arange(side, device=boxes.device) + 0.5 for side in grid)
    top, left, bottom, right = boxes[:, :, None, None].unbind(dim=1)
    rows, columns = rows[:, None], columns[None]
    return (rows > top) & (rows < bottom) & (columns > left) & (columns < right)


PROPOSALS: dict[str, Callable[..., Proposal]] = {
    "attention": attention_proposal,
    "all_patches": all_patches_proposal,
    "random": random_proposal,
    "center": center_proposal,
    "whole": whole_proposal,
}


def propose(
    strength: Tensor,
    threshold: float | Tensor,
    proposal: str | Callable = "attention",
    recorded: RecordedScale | None = None,
    upsampling: int = 1,
    margin: float = 0.0,
    keep_aspect: bool = False,
) -> Proposal:
    """Propose a region for the next scale.

    Args:
        strength: (B, h, w) attention strength.
        threshold: the paper's eta, a multiple of the mean strength; one number or (B,).
        proposal: a key of ``PROPOSALS``, ``path/to/file.py:name``, or a function ``(strength,
            threshold, recorded)`` that gives a `Proposal` or boxes (B, 4) or (B, R, 4) in patches.
        recorded: what the scale left; read by proposals of your own.
        upsampling: factor by which the strength is interpolated first (bilinear), so that boxes
            need not end between two patches; masks are then of the finer grid.
        margin: added around each box, a share of its sides; see `boxes.grow_boxes`.
        keep_aspect: boxes grow to the shape of the image; likewise.

    Raises:
        InputError: unknown name, or a function that gives something else.
    """
    function = resolve(proposal, PROPOSALS, "proposal")
    name = getattr(function, "__name__", str(proposal))
    if recorded is None and getattr(function, "reads_blocks", None) != 0:
        raise InputError(
            f"proposal {name!r} may read the recorded scale, which is not available here; mark it "
            "with @ramslib.reads(blocks=0) if it reads the strength alone"
        )
    grid = tuple(strength.shape[1:])
    with torch.no_grad():
        if upsampling > 1:
            strength = upsample(strength, upsampling)
        found = function(strength, threshold, recorded)
    if function not in PROPOSALS.values():
        found = _check(found, strength, threshold, name)
    if upsampling > 1:
        found = found._replace(patch_boxes=found.patch_boxes / upsampling)
    if margin or keep_aspect:
        grown = grow_boxes(found.patch_boxes, grid, margin, keep_aspect)
        found = found._replace(patch_boxes=grown)
    return found


def upsample(strength: Tensor, factor: int) -> Tensor:
    """A strength (B, h, w) interpolated to (B, factor * h, factor * w), bilinear."""
    size = [factor * side for side in strength.shape[1:]]
    return F.interpolate(strength[:, None], size, mode="bilinear")[:, 0]


def _check(found, strength: Tensor, threshold: float | Tensor, name: str) -> Proposal:
    """A proposal of one's own, on the CPU; of boxes alone, the mask is the threshold's."""
    boxes = found.patch_boxes if isinstance(found, Proposal) else found
    count, *grid = strength.shape
    shape = tuple(boxes.shape) if isinstance(boxes, Tensor) else ()
    if shape not in ((count, 4), (count, *shape[1:2], 4)) or 0 in shape[1:]:
        raise InputError(
            f"proposal {name!r} gives {shape or type(boxes).__name__}; it must return a Proposal, "
            f"or boxes (B, 4) or (B, R, 4) in patches, here with B = {count}"
        )
    boxes = boxes.cpu()
    inside = (boxes >= 0) & (boxes <= torch.tensor(grid * 2))
    filled = boxes[..., 2:] > boxes[..., :2]
    if not (torch.compiler.is_exporting() or (inside.all() and filled.all())):
        raise InputError(
            f"proposal {name!r} gives a box that is empty or leaves the grid of {grid[0]} x "
            f"{grid[1]} patches; a box is (top, left, bottom, right), bottom and right exclusive"
        )
    if isinstance(found, Proposal):
        return Proposal(found.mask.cpu(), found.component.cpu(), boxes)
    first = boxes if boxes.ndim == 2 else boxes[:, 0]
    return Proposal(patch_mask(strength, threshold).cpu(), inside_boxes(first, grid), boxes)
