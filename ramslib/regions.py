"""Regions: from attention strength to a patch mask, its largest component, a box and a crop.

Pure functions on batches, on any device. A box is ``(top, left, bottom, right)`` with exclusive
bottom and right, in the unit that its name says. Source: RAMS-Trans, section 3.3 (the DPPM).
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

# 3 x 3 within an image, none across images
_NEIGHBORS = np.pad(np.ones((1, 3, 3), dtype=bool), ((1, 1), (0, 0), (0, 0)))


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
    labels, _ = ndimage.label(mask.cpu().numpy(), _NEIGHBORS)
    return labels


def largest_component(mask: Tensor) -> Tensor:
    """The largest 8-connected component of each mask; the first in reading order on a tie.

    Found on the CPU, over ten times as fast as by the tensor operations that exported programs use.

    Args:
        mask: (B, h, w) bool.

    Returns:
        (B, h, w) bool; an empty mask stays empty.
    """
    if torch.compiler.is_exporting():
        return _largest_component_tensor(mask)
    labels = label_components(mask)
    areas = np.bincount(labels.ravel(), minlength=1)
    areas[0] = 0
    largest = [image.flat[areas[image].argmax()] for image in labels]  # the first of that size
    component = (labels == np.reshape(largest, (-1, 1, 1))) & (labels > 0)
    return torch.from_numpy(component).to(mask.device)


def _largest_component_tensor(mask: Tensor) -> Tensor:
    """`largest_component` as tensor operations.

    Every foreground patch looks up the smallest label among its neighbors, passes it on to the
    patch it is named after, and takes that patch's label (hooking and pointer jumping), until
    nothing changes: six to eight rounds on random masks, a dozen on a spiral of 56 x 56 patches.
    """
    count, height, width = mask.shape
    size = height * width
    places = torch.arange(size, device=mask.device).reshape(height, width)
    labels = torch.where(mask, places, size)

    def differ(before: Tensor, labels: Tensor) -> Tensor:
        return (before != labels).any()

    def merge(before: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        lowest = -F.max_pool2d(-labels.float()[:, None], 3, stride=1, padding=1)[:, 0].long()
        lowest = torch.where(mask, lowest, size).flatten(1)
        hooked = F.pad(labels.flatten(1), (0, 1), value=size)
        hooked = hooked.scatter_reduce(1, labels.flatten(1), lowest, "amin")
        return labels.clone(), hooked.gather(1, lowest).reshape(mask.shape)

    _, labels = torch.while_loop(differ, merge, (torch.full_like(labels, -1), labels))
    labels = labels.flatten(1)
    areas = labels.new_zeros(count, size + 1).scatter_add_(1, labels, mask.flatten(1).long())
    largest = areas.argmax(dim=1, keepdim=True)  # the first: a label is its first patch's place
    return (labels == largest).reshape(mask.shape) & mask


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
    return torch.as_tensor(boxes, device=mask.device)


def full_image_boxes(images: Tensor) -> Tensor:
    """The box of each whole image: (B, ..., H, W) -> (B, 4) float32."""
    box = torch.tensor([0.0, 0.0, *images.shape[-2:]], device=images.device)
    return box.expand(images.shape[0], 4)


def rescale_boxes(boxes: Tensor, size: tuple[int, int], frame: Tensor) -> Tensor:
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

    Torch's interpolation image by image is up to twice as fast on a CPU as the operations on the
    batch that were tried. Antialiasing the crops that shrink made no difference (README).

    Args:
        images: (B, C, H, W) float; all finite where a program is exported.
        boxes: (B, 4) pixels, ``(top, left, bottom, right)``; rounded to whole ones, at least one.
        size: (height, width) of the result.
        align_corners: corner pixels of box and result coincide, as in the released code.

    Returns:
        (B, C, *size).
    """
    height, width = images.shape[2:]
    if torch.compiler.is_exporting():  # a program for any batch cannot walk through its images
        rows = _sample_weights(boxes[:, 0], boxes[:, 2], size[0], height, align_corners)
        columns = _sample_weights(boxes[:, 1], boxes[:, 3], size[1], width, align_corners)
        return (rows[:, None] @ images.float() @ columns[:, None].mT).to(images.dtype)
    crops = images.new_empty(len(images), images.shape[1], *size)
    for image, crop, box in zip(images, crops, boxes.tolist(), strict=True):
        top, left, bottom, right = map(round, box)
        cut = image[None, :, _whole_pixels(top, bottom, height), _whole_pixels(left, right, width)]
        # F.interpolate(mode="bilinear") with a place for the result
        torch.ops.aten.upsample_bilinear2d.out(cut, size, align_corners, out=crop[None])
    return crops


def _whole_pixels(first: int, last: int, limit: int) -> slice:
    """The part of a side of ``limit`` pixels that lies between two edges; at least one pixel."""
    start = min(max(first, 0), limit - 1)
    return slice(start, max(min(last, limit), start + 1))


def _sample_weights(
    first: Tensor, last: Tensor, count: int, limit: int, align_corners: bool
) -> Tensor:
    """How much of each pixel goes into each sample between two edges: (B,) -> (B, count, limit)."""
    start = first.round().clamp(0, limit - 1)[:, None]
    end = last.round().clamp(max=limit)[:, None].maximum(start + 1)
    steps, pixels = (torch.arange(n, device=start.device) for n in (count, limit))
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
    start = torch.maximum(first[..., :2], second[..., :2])
    end = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (end - start).clamp(min=0).prod(dim=-1)
    union = box_area(first) + box_area(second) - intersection
    return torch.where(union > 0, intersection / union, 0.0)
