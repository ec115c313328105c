"""Boxes: their geometry, and the pixels inside them.

Pure functions on batches, on any device. A box is ``(top, left, bottom, right)`` with exclusive
bottom and right, in the unit that its name says.
"""

import torch
from torch import Tensor

from ramslib import acceleration


def full_image_boxes(images: Tensor) -> Tensor:
    """The box of each whole image: (B, ..., H, W) -> (B, 4) float32, on the CPU."""
    return torch.tensor([0.0, 0.0, *images.shape[-2:]]).expand(images.shape[0], 4)


def rescale_boxes(boxes: Tensor, size: tuple[int, int], frame: Tensor) -> Tensor:
    """Boxes in one coordinate system, expressed in another.

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
    """Cut one box out of each image and resize it, bilinear (region amplification).

    Image by image, torch's interpolation is up to twice as fast on a CPU as operations on the
    batch. Antialiasing of crops that shrink made no difference (docs/results.md).

    Args:
        images: (B, C, H, W) float; all finite where a program is exported.
        boxes: (B, 4) pixels, ``(top, left, bottom, right)``; rounded to whole ones, at least one.
        size: (height, width) of the result.
        align_corners: corner pixels of box and result coincide, as in the released code.

    Returns:
        (B, C, *size).
    """
    if torch.compiler.is_exporting():  # a program for any batch size cannot loop over its images
        return acceleration.crop_and_resize_batch(images, boxes, size, align_corners)
    height, width = images.shape[2:]
    crops = images.new_empty(len(images), images.shape[1], *size)
    for image, crop, box in zip(images, crops, boxes.tolist(), strict=True):
        top, left, bottom, right = map(round, box)
        cut = image[None, :, _whole_pixels(top, bottom, height), _whole_pixels(left, right, width)]
        # F.interpolate(mode="bilinear"), written into its place
        torch.ops.aten.upsample_bilinear2d.out(cut, size, align_corners, out=crop[None])
    return crops


def _whole_pixels(first: int, last: int, limit: int) -> slice:
    """The part of a side of ``limit`` pixels that lies between two edges; at least one pixel."""
    start = min(max(first, 0), limit - 1)
    return slice(start, max(min(last, limit), start + 1))


def grow_boxes(
    boxes: Tensor, size: tuple[int, int], margin: float = 0.0, keep_aspect: bool = False
) -> Tensor:
    """Boxes with more around them, moved where they would leave their image.

    Args:
        boxes: (..., 4) in units in which the image measures ``size``.
        size: (height, width) of the image.
        margin: added on each side, a share of the box's own side.
        keep_aspect: the shorter side grows until the box has the shape of the image, so that its
            content is not distorted when it is resized to the size of an image.

    Returns:
        (..., 4) float32, inside the image.
    """
    limit = torch.tensor(size, device=boxes.device)
    extent = (boxes[..., 2:] - boxes[..., :2]) * (1 + 2 * margin)
    if keep_aspect:
        extent = (extent / limit).amax(dim=-1, keepdim=True) * limit
    extent = extent.minimum(limit)
    start = ((boxes[..., :2] + boxes[..., 2:] - extent) / 2).clamp(min=0).minimum(limit - extent)
    return torch.cat([start, start + extent], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of each box: (..., 4) -> (...); empty boxes have area 0."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes in pairs: (..., 4), (..., 4) -> (...).

    0 where both are empty, NaN where a box is unknown: NaN.
    """
    start = torch.maximum(first[..., :2], second[..., :2])
    end = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (end - start).clamp(min=0).prod(dim=-1)
    union = box_area(first) + box_area(second) - intersection
    return torch.where(union == 0, 0.0, intersection / union)
