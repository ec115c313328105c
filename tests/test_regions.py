"""Masks, components, boxes and crops against the loops, scipy and torch's interpolation."""

import math

import numpy as np
import pytest
import reference
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from ramslib.regions import (
    bounding_boxes,
    box_area,
    box_iou,
    crop_and_resize,
    label_components,
    largest_component,
    patch_mask,
    rescale_boxes,
)

GRIDS = st.tuples(st.integers(1, 20), st.integers(1, 20))
MASKS = GRIDS.flatmap(lambda grid: hnp.arrays(bool, grid))
STRENGTHS = GRIDS.flatmap(
    lambda grid: hnp.arrays(np.float32, grid, elements=st.floats(0, 1, width=16))
)


# --- masks -------------------------------------------------------------------------------------


@given(STRENGTHS, st.floats(0, 3))
def test_mask_equals_the_loops(values, threshold):
    mean = float(values.astype(np.float64).mean())
    if (abs(values - threshold * mean) < 1e-5).any():  # within rounding of the threshold
        return
    mask = patch_mask(torch.from_numpy(values)[None], threshold)[0]
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask, reference.patch_mask(values, threshold))


def test_threshold_per_image():
    strength = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0))
    thresholds = [0.5, 1.0, 1.3, 9.0]
    mask = patch_mask(strength, torch.tensor(thresholds))
    for image, threshold in enumerate(thresholds):
        assert torch.equal(mask[image], patch_mask(strength[image, None], threshold)[0])
    assert mask.flatten(1).sum(1).tolist() == sorted(mask.flatten(1).sum(1).tolist(), reverse=True)
    assert mask[0].any() and not mask[3].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threshold", [1.2, 0.0, -1.0, torch.tensor([1.2, 1.2, 1.2])])
def test_an_image_that_is_not_finite_has_no_patch_and_spoils_no_other(poison, threshold):
    strength = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1))
    clean = patch_mask(strength, threshold)
    strength[1, 2, 3] = poison
    mask = patch_mask(strength, threshold)
    assert not mask[1].any()
    assert torch.equal(mask[[0, 2]], clean[[0, 2]]) and clean[0].any()


@pytest.mark.parametrize("threshold", [math.nan, math.inf, torch.tensor([math.nan])])
def test_a_threshold_that_nothing_passes(threshold):
    assert not patch_mask(torch.rand(1, 3, 3), threshold).any()


# --- components --------------------------------------------------------------------------------


def oracle(mask):
    """Largest component by scipy, first label on a tie."""
    labels, _ = scipy.ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return (labels == areas.argmax()) & mask


def spiral(size):
    """A one-patch-wide path that winds from the corner to the middle."""
    mask = np.zeros((size, size), dtype=bool)
    row = column = turns = 0
    step = (0, 1)
    mask[0, 0] = True
    while turns < 2:
        ahead = [(row + k * step[0], column + k * step[1]) for k in (1, 2)]
        inside = [0 <= r < size and 0 <= c < size for r, c in ahead]
        free = inside[0] and not mask[ahead[0]]
        if free and not (inside[1] and mask[ahead[1]]):
            row, column = ahead[0]
            mask[row, column], turns = True, 0
        else:
            step, turns = (step[1], -step[0]), turns + 1
    return mask


def comb(size):
    """Teeth joined by one row."""
    mask = np.zeros((size, size), dtype=bool)
    mask[:, ::2] = mask[-1] = True
    return mask


def snake(size):
    """Rows joined alternately at their right and left ends."""
    mask = np.zeros((size, size), dtype=bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


HARD = {
    "spiral": spiral(56),
    "snake": snake(56),
    "comb": comb(56),
    "fishbone": comb(56) & ~np.eye(56, dtype=bool),
    "checkerboard": np.indices((56, 56)).sum(0) % 2 == 0,  # one component: diagonals touch
    "dots": (np.indices((56, 56)) % 2 == 0).all(0),  # 784 components of one patch
    "columns": np.indices((56, 56))[1] % 2 == 0,  # 28 components of equal size
    "frame": np.pad(np.zeros((54, 54), dtype=bool), 1, constant_values=True),
    "full": np.ones((56, 56), dtype=bool),
    "empty": np.zeros((56, 56), dtype=bool),
    "percolating": np.random.default_rng(0).random((56, 56)) < 0.41,
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("turned", range(4))
def test_hard_masks(name, turned):
    mask = np.rot90(HARD[name], turned)
    component = largest_component(torch.from_numpy(mask.copy())[None])[0]
    np.testing.assert_array_equal(component, oracle(mask))
    np.testing.assert_array_equal(component, reference.largest_component(mask))


def test_the_shapes_are_what_they_are_called():
    assert [len(reference.components(HARD[name])) for name in ("spiral", "snake", "comb")] == [
        1
    ] * 3
    assert HARD["spiral"].sum() > 1500


@settings(max_examples=200)
@given(MASKS)
def test_components_equal_scipy_and_the_loops(mask):
    labels = torch.from_numpy(label_components(torch.from_numpy(mask)[None])[0])
    expected, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    assert (labels[~torch.from_numpy(mask)] == 0).all() and len(labels.unique()) <= count + 1
    for component in range(1, count + 1):
        label = labels.flatten()[np.flatnonzero(expected == component)[0]]
        np.testing.assert_array_equal(labels == label, expected == component)
    largest = largest_component(torch.from_numpy(mask)[None])[0]
    np.testing.assert_array_equal(largest, oracle(mask))
    np.testing.assert_array_equal(largest, reference.largest_component(mask))


def test_a_batch_equals_its_images():
    rng = np.random.default_rng(2)
    masks = np.stack([rng.random((13, 17)) < share for share in np.linspace(0, 1, 24)])
    together = largest_component(torch.from_numpy(masks))
    for mask, component in zip(masks, together, strict=True):
        np.testing.assert_array_equal(component, reference.largest_component(mask))


class Largest(nn.Module):
    """`largest_component` as a program to export."""

    def forward(self, mask):
        return largest_component(mask)


@pytest.mark.parametrize("shape", [(56, 56), (13, 17)])
def test_the_exported_program_finds_the_same_components(shape):
    rng = np.random.default_rng(4)
    masks = [rng.random(shape) < share for share in np.linspace(0, 1, 24)]
    masks += [np.rot90(mask, turned) for mask in HARD.values() for turned in range(4)]
    masks = torch.from_numpy(np.stack([mask for mask in masks if mask.shape == shape]))
    batch = {"mask": {0: torch.export.Dim("batch", min=1, max=4096)}}
    program = torch.export.export(Largest(), (masks[:2],), dynamic_shapes=batch).module()
    for part in (masks, masks[:1]):
        assert torch.equal(program(part), largest_component(part))


def test_first_component_wins_a_tie():
    mask = torch.tensor([[[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 0, 1, 1]]], dtype=torch.bool)
    component = largest_component(mask)[0]
    assert component.nonzero().tolist() == [[1, 0], [2, 0]]


def test_no_images():
    none = torch.zeros(0, 3, 4, dtype=torch.bool)
    assert largest_component(none).shape == (0, 3, 4) and bounding_boxes(none).shape == (0, 4)
    assert crop_and_resize(torch.zeros(0, 2, 3, 4), torch.zeros(0, 4), (5, 6)).shape == (0, 2, 5, 6)


# --- boxes -------------------------------------------------------------------------------------


@given(MASKS)
def test_boxes_equal_the_loops(mask):
    box = bounding_boxes(torch.from_numpy(mask)[None])[0]
    assert box.dtype == torch.long
    assert tuple(box.tolist()) == reference.bounding_box(mask)


@given(MASKS)
def test_flipping_a_mask_flips_its_box(mask):
    height, width = mask.shape
    mask = torch.from_numpy(mask)[None]
    top, left, bottom, right = bounding_boxes(mask)[0].tolist()
    flipped = [height - bottom, width - right, height - top, width - left]
    assert bounding_boxes(mask.flip(1, 2))[0].tolist() == flipped


def test_box_of_one_patch():
    mask = torch.zeros(2, 14, 10, dtype=torch.bool)
    mask[0, 3, 4] = mask[1, 13, 9] = True
    assert bounding_boxes(mask).tolist() == [[3, 4, 4, 5], [13, 9, 14, 10]]


COORDINATES = st.lists(st.integers(0, 30), min_size=4, max_size=4)


@given(COORDINATES, COORDINATES, st.integers(1, 40), st.integers(1, 40))
def test_mapped_boxes_equal_the_loops(box, frame, height, width):
    mapped = rescale_boxes(torch.tensor([box]), (height, width), torch.tensor([frame]))
    expected = reference.place(box, (height, width), frame)
    assert mapped.dtype == torch.float32
    np.testing.assert_allclose(mapped[0], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "grid, size", [((14, 14), (448, 448)), ((37, 29), (518, 406)), ((3, 4), (24, 32))]
)
def test_patch_boxes_map_to_whole_pixels(grid, size):
    rows, columns = (torch.arange(count + 1) for count in grid)
    boxes = torch.cartesian_prod(rows, columns).repeat(1, 2)
    mapped = rescale_boxes(boxes, grid, torch.tensor([0.0, 0.0, *size]))
    steps = torch.tensor([size[0] // grid[0], size[1] // grid[1]] * 2)
    assert torch.equal(mapped, (boxes * steps).float())


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
def test_crops_are_torchs_interpolation_to_the_bit(align_corners):
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
