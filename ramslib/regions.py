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
    """Cut one box out of each image and resize it, bilinear.

    Torch's interpolation image by image is twice as fast on a CPU as any operation on the batch
    that was tried. Antialiasing crops that shrink changed no accuracy (README), so it is left out.

    Args:
        images: (B, C, H, W).
        boxes: (B, 4) pixels, ``(top, left, bottom, right)``, at least one pixel high and wide;
            those between pixels are rounded.
        size: (height, width) of the result.
        align_corners: corner pixels of box and result coincide, as in the released code.

    Returns:
        (B, C, *size).
    """
    boxes = boxes.round().long()
    if torch.compiler.is_exporting():  # a program for any batch cannot walk through its images
        rows = _sample_weights(boxes[:, 0], boxes[:, 2], size[0], images.shape[2], align_corners)
        columns = _sample_weights(boxes[:, 1], boxes[:, 3], size[1], images.shape[3], align_corners)
        return rows[:, None] @ images @ columns[:, None].mT
    crops = [
        F.interpolate(
            image[:, :, top:bottom, left:right],
            size,
            mode="bilinear",
            align_corners=align_corners,
        )
        for image, (top, left, bottom, right) in zip(images.split(1), boxes.tolist(), strict=True)
    ]
    return torch.cat(crops)


def _sample_weights(
    start: Tensor, end: Tensor, count: int, limit: int, align_corners: bool
) -> Tensor:
    """How much of each pixel goes into each sample between two edges: (B,) -> (B, count, limit)."""
    steps, pixels = (torch.arange(n, device=start.device) for n in (count, limit))
    start, end = start[:, None], end[:, None]
    if align_corners:
        inside = steps * ((end - start - 1) / max(count - 1, 1))
    else:
        inside = (steps + 0.5) * ((end - start) / count) - 0.5
    places = start + inside.clamp(min=0).minimum(end - start - 1)
    return (1 - (pixels - places[:, :, None]).abs()).clamp(min=0)


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
