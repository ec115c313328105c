"""Regions: from attention strength to a patch mask, its largest component, a box and a crop.

Pure functions on batches, on any device. A box is ``(top, left, bottom, right)`` with exclusive
bottom and right, in the unit that its name says. Source: RAMS-Trans, section 3.3 (the DPPM).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return (strength > threshold * mean) & mean.isfinite()


def label_components(mask: Tensor) -> Tensor:
    """Label the 8-connected components of each mask.

    Every foreground patch looks up the smallest label among its neighbours, passes it on to the
    patch it is named after, and takes that patch's label (hooking and pointer jumping), until
    nothing changes. Exact on any mask; six to eight rounds on random ones, a dozen on a spiral of
    56 x 56 patches.

    Args:
        mask: (B, h, w) bool.

    Returns:
        (B, h, w) long; a component's label is the flat index of its first patch in reading order,
        background is h * w.
    """
    height, width = mask.shape[1:]
    size = height * width
    index = torch.arange(size, device=mask.device).reshape(height, width)
    labels = torch.where(mask, index, size)
    before = torch.full_like(labels, -1)

    def differ(before: Tensor, labels: Tensor) -> Tensor:
        return (before != labels).any()

    def merge(before: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        lowest = -F.max_pool2d(-labels.float()[:, None], 3, stride=1, padding=1)[:, 0].long()
        lowest = torch.where(mask, lowest, size).flatten(1)
        hooked = F.pad(labels.flatten(1), (0, 1), value=size)
        hooked = hooked.scatter_reduce(1, labels.flatten(1), lowest, "amin")
        return labels.clone(), hooked.gather(1, lowest).reshape(mask.shape)

    if torch.compiler.is_exporting():  # an exported program keeps the loop
        return torch.while_loop(differ, merge, (before, labels))[1]
    while not torch.equal(before, labels):
        before, labels = merge(before, labels)
    return labels


def largest_component(mask: Tensor) -> Tensor:
    """The largest 8-connected component of each mask; the first in reading order on a tie.

    Args:
        mask: (B, h, w) bool.

    Returns:
        (B, h, w) bool; an empty mask stays empty.
    """
    size = mask.shape[1] * mask.shape[2]
    labels = label_components(mask).flatten(1)
    areas = torch.zeros(mask.shape[0], size + 1, dtype=torch.long, device=mask.device)
    areas.scatter_add_(1, labels, torch.ones_like(labels))
    areas[:, size] = 0
    largest = areas.max(dim=1, keepdim=True).indices
    return (labels == largest).reshape(mask.shape)


def bounding_boxes(mask: Tensor) -> Tensor:
    """Smallest box around the foreground of each mask; the whole grid where there is none.

    Args:
        mask: (B, h, w) bool.

    Returns:
        (B, 4) long, ``(top, left, bottom, right)`` in patches, bottom and right exclusive.
    """
    sides = []
    for occupied in (mask.any(dim=2), mask.any(dim=1)):
        first = occupied.byte().argmax(dim=1)
        last = occupied.shape[1] - occupied.flip(1).byte().argmax(dim=1)
        sides.append((first, last))
    (top, bottom), (left, right) = sides
    return torch.stack([top, left, bottom, right], dim=1)


def whole_box(images: Tensor) -> Tensor:
    """The box of a whole image: (..., H, W) -> (4,) float32."""
    return torch.tensor([0.0, 0.0, *images.shape[-2:]], device=images.device)


def map_boxes(boxes: Tensor, size: tuple[int, int], frame: Tensor) -> Tensor:
    """Boxes in one coordinate system, expressed in another that a frame places it in.

    From patches to pixels: ``size`` is the grid and ``frame`` the whole image. From the pixels of a
    crop to the pixels of the image: ``size`` is the crop's size and ``frame`` where it was cut.

    Args:
        boxes: (B, 4) in units in which the frame measures ``size``.
        size: (height, width) of the frame in the units of ``boxes``.
        frame: (B, 4) or (4,), the frame in the units of the result.

    Returns:
        (B, 4) float32.
    """
    origin, extent = frame[..., :2], frame[..., 2:] - frame[..., :2]
    factor = extent / torch.tensor(size, device=frame.device)
    return torch.cat([origin, origin], dim=-1) + boxes * torch.cat([factor, factor], dim=-1)


def crop_and_resize(
    images: Tensor, boxes: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """Cut one box out of each image and resize it, bilinear, in one batched operation.

    Equals ``F.interpolate(image[:, top:bottom, left:right], size, mode="bilinear")`` per image for
    boxes on whole pixels, to rounding: positions are counted from the box's corner, which is more
    exact than ``F.grid_sample`` on a large image. Boxes between pixels are allowed. Nothing outside
    a box is read.

    Args:
        images: (B, C, H, W) float of any precision; computed in float32.
        boxes: (B, 4) pixels, ``(top, left, bottom, right)``, at least one pixel high and wide.
        size: (height, width) of the result.
        align_corners: corner pixels of box and result coincide, as in the released code.

    Returns:
        (B, C, *size).
    """
    planes = images.float().flatten(0, 1)  # channels are images of their own
    sides = boxes.float().repeat_interleave(images.shape[1], dim=0)
    top, left, bottom, right = sides.unbind(dim=1)
    rows = _sample_positions(top, bottom, size[0], images.shape[2], align_corners)
    columns = _sample_positions(left, right, size[1], images.shape[3], align_corners)
    crops = _mix_rows(_mix_rows(planes, *rows).mT, *columns).mT
    return crops.unflatten(0, images.shape[:2]).to(images.dtype)


def _mix_rows(planes: Tensor, low: Tensor, high: Tensor, part: Tensor) -> Tensor:
    """Weighted means of two rows each: (P, H, W), indices and weights (P, count) -> (P, count, W).

    An embedding bag reads two rows and writes one; indexing twice and mixing takes thrice as long.
    """
    count, height, width = planes.shape
    first = torch.arange(count, device=planes.device)[:, None]
    if torch.compiler.is_exporting():  # ONNX would walk through the bags one by one
        return planes[first, low].lerp(planes[first, high], part[:, :, None])
    pairs = torch.stack([low, high], dim=2).add_(first[:, :, None] * height).flatten(0, 1)
    weights = torch.stack([1 - part, part], dim=2).flatten(0, 1)
    table = planes.reshape(-1, width)
    rows = F.embedding_bag(pairs, table, per_sample_weights=weights, mode="sum")
    return rows.unflatten(0, low.shape)


def _sample_positions(
    start: Tensor, end: Tensor, count: int, limit: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where to sample between two edges: lower pixel, upper pixel, fraction, each (B, count)."""
    steps = torch.arange(count, device=start.device, dtype=torch.float32)
    start, end = start[:, None], end[:, None]
    if align_corners:
        inside = steps * ((end - start - 1) / max(count - 1, 1))
    else:
        inside = (steps + 0.5) * ((end - start) / count) - 0.5
    first, last = start.floor(), (end.ceil() - 1).clamp(max=limit - 1)
    inside = inside.clamp(min=0).minimum(end - start - 1) + (start - first)
    whole = inside.floor()
    low, high = (torch.minimum(first + whole + step, last).clamp(min=0).long() for step in (0, 1))
    return low, high, inside - whole


def box_area(boxes: Tensor) -> Tensor:
    """Area of each box: (..., 4) -> (...); empty boxes have area 0."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes in pairs: (..., 4), (..., 4) -> (...); 0 for empty boxes."""
    overlap = torch.cat(
        [
            torch.maximum(first[..., :2], second[..., :2]),
            torch.minimum(first[..., 2:], second[..., 2:]),
        ],
        dim=-1,
    )
    intersection = box_area(overlap)
    union = box_area(first) + box_area(second) - intersection
    return torch.where(union > 0, intersection / union.clamp(min=1e-12), torch.zeros_like(union))
