"""Boxes and crops against the loops, counted pixels and torch's interpolation."""

import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ramslib.boxes import (
    box_area,
    box_iou,
    crop_and_resize,
    full_image_boxes,
    grow_boxes,
    rescale_boxes,
)

# --- geometry ----------------------------------------------------------------------------------

COORDINATES = st.lists(st.integers(0, 30), min_size=4, max_size=4)


@given(COORDINATES, COORDINATES, st.integers(1, 40), st.integers(1, 40))
def test_rescaled_boxes_equal_the_loops(box, frame, height, width):
    rescaled = rescale_boxes(torch.tensor([box]), (height, width), torch.tensor([frame]))
    expected = reference.place(box, (height, width), frame)
    assert rescaled.dtype == torch.float32
    np.testing.assert_allclose(rescaled[0], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "grid, size", [((14, 14), (448, 448)), ((37, 29), (518, 406)), ((3, 4), (24, 32))]
)
def test_patch_boxes_are_whole_pixels(grid, size):
    rows, columns = (torch.arange(count + 1) for count in grid)
    boxes = torch.cartesian_prod(rows, columns).repeat(1, 2)
    rescaled = rescale_boxes(boxes, grid, torch.tensor([0.0, 0.0, *size]))
    steps = torch.tensor([size[0] // grid[0], size[1] // grid[1]] * 2)
    assert torch.equal(rescaled, (boxes * steps).float())


GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(GRIDS, st.data(), st.floats(0, 2), st.booleans())
def test_grown_boxes_hold_what_they_held_and_stay_inside(grid, data, margin, keep_aspect):
    starts = [data.draw(st.integers(0, side - 1)) for side in grid]
    ends = [data.draw(st.integers(a + 1, side)) for a, side in zip(starts, grid, strict=True)]
    box = torch.tensor([[*starts, *ends]])
    grown = grow_boxes(box, grid, margin, keep_aspect)[0].double().numpy()
    wanted = [(end - start) * (1 + 2 * margin) for start, end in zip(starts, ends, strict=True)]
    if keep_aspect:
        share = max(side / whole for side, whole in zip(wanted, grid, strict=True))
        wanted = [share * whole for whole in grid]
    for axis in range(2):
        side, whole = grown[axis + 2] - grown[axis], grid[axis]
        assert side == pytest.approx(min(wanted[axis], whole), rel=1e-5)
        assert grown[axis] <= starts[axis] + 1e-5 and grown[axis + 2] >= ends[axis] - 1e-5
        assert grown[axis] >= 0 and grown[axis + 2] <= whole + 1e-5
        middle = (starts[axis] + ends[axis]) / 2
        if side / 2 <= middle <= whole - side / 2:
            assert (grown[axis] + grown[axis + 2]) / 2 == pytest.approx(middle, abs=1e-4)


@given(COORDINATES, COORDINATES)
def test_area_and_overlap_equal_counted_pixels(first, second):
    grids = []
    for top, left, bottom, right in (first, second):
        pixels = np.zeros((30, 30), dtype=bool)
        pixels[top:bottom, left:right] = True
        grids.append(pixels)
    a, b = torch.tensor([first, second]).float()
    assert box_area(a) == grids[0].sum() and box_area(b) == grids[1].sum()
    union = (grids[0] | grids[1]).sum()
    expected = (grids[0] & grids[1]).sum() / union if union else 0
    assert box_iou(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert box_iou(a[None].long(), b[None].long()).shape == (1,)
    assert box_iou(a, torch.full((4,), torch.nan)).isnan(), "unknown, not 0"


# --- crops -------------------------------------------------------------------------------------


@st.composite
def crops(draw, largest=24):
    """Image size, one whole-pixel box per image, output size, alignment."""
    height, width = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        boxes.append(
            [top, left, draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))]
        )
    size = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return (height, width), boxes, size, draw(st.booleans()), draw(st.integers(0, 10**6))


@settings(max_examples=150)
@given(crops(), st.floats(-1, 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_weights_for_exported_programs_cut_the_same_crops(case, offset, dtype):
    (height, width), boxes, size, align_corners, seed = case
    images = torch.randn(
        len(boxes), 2, height, width, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)
    result = crop_and_resize(images, torch.tensor(boxes) + offset, size, align_corners)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_exporting", lambda: True)
        exported = crop_and_resize(images, torch.tensor(boxes) + offset, size, align_corners)
    tolerance = 0.05 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(exported, result, atol=tolerance, rtol=0)


@settings(max_examples=25)
@given(crops(largest=9))
def test_crops_equal_the_loops(case):
    (height, width), boxes, size, align_corners, seed = case
    images = torch.randn(
        len(boxes), 2, height, width, generator=torch.Generator().manual_seed(seed)
    )
    result = crop_and_resize(images, torch.tensor(boxes), size, align_corners)
    for image, box, crop in zip(images.numpy(), boxes, result, strict=True):
        expected = reference.crop_and_resize(image, box, size, align_corners)
        np.testing.assert_allclose(crop, expected, atol=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
def test_crops_are_bit_identical_to_torchs_interpolation(align_corners):
    images = torch.randn(2, 3, 600, 448, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[31, 0, 600, 416], [511, 383, 543, 448]])
    result = crop_and_resize(images, boxes, (448, 320), align_corners)
    for image, (top, left, bottom, right), crop in zip(images, boxes, result, strict=True):
        crops = image[None, :, top:bottom, left:right]
        expected = F.interpolate(crops, (448, 320), mode="bilinear", align_corners=align_corners)
        assert torch.equal(crop, expected[0])


@pytest.mark.parametrize(
    "box, pixels",
    [
        ([1.5, 2.5, 2.5, 3.5], [2, 2, 3, 4]),  # halves are rounded to even, and one pixel stays
        ([0.0, 0.1, 0.3, 0.4], [0, 0, 1, 1]),
        ([19.8, 27.7, 20.0, 28.0], [19, 27, 20, 28]),
        ([-3.0, -0.6, 30.0, 5.0], [0, 0, 20, 5]),
    ],
)
def test_a_box_has_at_least_one_pixel_and_lies_inside(box, pixels):
    images = torch.rand(1, 1, 20, 28, generator=torch.Generator().manual_seed(5))
    expected = crop_and_resize(images, torch.tensor([pixels]), (6, 7))
    assert torch.equal(crop_and_resize(images, torch.tensor([box]), (6, 7)), expected)


@pytest.mark.parametrize("error", [-0.4, -1e-5, 1e-5, 0.4])
def test_boxes_between_pixels_are_rounded(error):
    images = torch.rand(1, 1, 20, 28, generator=torch.Generator().manual_seed(4))
    for exact in ([[0.0, 0.0, 20.0, 28.0]], [[3.0, 5.0, 17.0, 12.0]]):
        moved = crop_and_resize(images, torch.tensor(exact) + error, (15, 31))
        assert torch.equal(moved, crop_and_resize(images, torch.tensor(exact), (15, 31)))


def test_crop_of_the_full_box_is_the_image_or_its_resize():
    images = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[0, 0, 20, 28]]).repeat(2, 1)
    for align_corners in (False, True):
        same = crop_and_resize(images, boxes, (20, 28), align_corners)
        torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
        resized = F.interpolate(images, (31, 9), mode="bilinear", align_corners=align_corners)
        result = crop_and_resize(images, boxes, (31, 9), align_corners)
        torch.testing.assert_close(result, resized, atol=1e-5, rtol=0)


@pytest.mark.parametrize("align_corners", [False, True])
def test_nothing_outside_a_box_is_read(align_corners):
    images = torch.full((1, 1, 12, 12), math.nan)  # 0 * NaN would show even without weight
    images[:, :, 3:7, 5:6] = 1.0
    crop = crop_and_resize(images, torch.tensor([[3, 5, 7, 6]]), (9, 9), align_corners)
    torch.testing.assert_close(crop, torch.ones(1, 1, 9, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_of_an_image_is_kept_and_positions_do_not_suffer(dtype):
    images = torch.rand(1, 3, 448, 448, generator=torch.Generator().manual_seed(2)).to(dtype)
    boxes = torch.tensor([[64, 96, 288, 416]])
    crop = crop_and_resize(images, boxes, (448, 448))
    assert crop.dtype == dtype
    exact = F.interpolate(images[:, :, 64:288, 96:416].double(), (448, 448), mode="bilinear")
    assert (crop.double() - exact).abs().max() <= torch.finfo(dtype).eps + 1e-4


def test_flipping_image_and_box_flips_the_crop():
    images = torch.rand(1, 2, 16, 20, generator=torch.Generator().manual_seed(3))
    crop = crop_and_resize(images, torch.tensor([[2, 3, 9, 17]]), (11, 13))
    flipped = crop_and_resize(images.flip(3), torch.tensor([[2, 3, 9, 17]]), (11, 13))
    torch.testing.assert_close(crop.flip(3), flipped, atol=1e-5, rtol=0)
    assert not torch.equal(crop, flipped)


def test_no_images():
    assert crop_and_resize(torch.zeros(0, 2, 3, 4), torch.zeros(0, 4), (5, 6)).shape == (0, 2, 5, 6)
    assert full_image_boxes(torch.zeros(0, 2, 3, 4)).shape == (0, 4)
