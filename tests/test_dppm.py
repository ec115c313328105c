"""The DPPM against the loops and scipy, its properties, and the controls it is compared with."""

import math

import numpy as np
import onnxruntime
import pytest
import reference
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from ramslib.attention import RecordedScale
from ramslib.boxes import box_area
from ramslib.dppm import (
    PROPOSALS,
    Proposal,
    attention_proposal,
    bounding_boxes,
    keep_random_proposals,
    label_components,
    largest_component,
    patch_mask,
    propose,
    seed_random_proposals,
)
from ramslib.errors import InputError
from ramslib.extensions import reads

GRIDS = st.tuples(st.integers(1, 20), st.integers(1, 20))
MASKS = GRIDS.flatmap(lambda grid: hnp.arrays(bool, grid))
STRENGTHS = GRIDS.flatmap(
    lambda grid: hnp.arrays(np.float32, grid, elements=st.floats(0, 1, width=16))
)
MAPS = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda grid: hnp.arrays(np.float32, grid, elements=st.integers(0, 255).map(float))
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
def test_an_image_that_is_not_finite_has_no_patch_and_changes_no_other(poison, threshold):
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


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(56, 56), (13, 17)])
def test_the_exported_program_finds_the_same_components(shape):
    rng = np.random.default_rng(4)
    masks = [rng.random(shape) < share for share in np.linspace(0, 1, 24)]
    masks += [np.rot90(mask, turned) for mask in HARD.values() for turned in range(4)]
    masks = torch.from_numpy(np.stack([mask for mask in masks if mask.shape == shape]))
    batch = {"mask": {0: torch.export.Dim("batch", min=1, max=4096)}}
    program = torch.export.export(Largest(), (masks[:2],), dynamic_shapes=batch)
    onnx = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(onnx)
    for part in (masks, masks[:1]):
        assert torch.equal(program.module()(part), largest_component(part))
        found = session.run(None, {session.get_inputs()[0].name: part.numpy()})[0]
        np.testing.assert_array_equal(found, largest_component(part))


def test_first_component_wins_a_tie():
    mask = torch.tensor([[[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 0, 1, 1]]], dtype=torch.bool)
    component = largest_component(mask)[0]
    assert component.nonzero().tolist() == [[1, 0], [2, 0]]


def test_no_images():
    none = torch.zeros(0, 3, 4, dtype=torch.bool)
    assert largest_component(none).shape == (0, 3, 4) and bounding_boxes(none).shape == (0, 4)
    for name in PROPOSALS:
        assert propose(torch.zeros(0, 3, 4), 1.0, name).patch_boxes.shape == (0, 4)


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


# --- proposals ---------------------------------------------------------------------------------


def random_strength(count=6, grid=(7, 9), seed=0):
    """Smooth maps with a few blobs."""
    noise = torch.rand(count, 1, *grid, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)[:, 0] ** 4


def whole(proposal, grid):
    """Whether every box is the whole grid."""
    return (proposal.patch_boxes == torch.tensor([0, 0, *grid])).all()


@given(MAPS, st.sampled_from([0.5, 1.0, 2.0]))  # exact in float32 on maps of small integers
def test_proposal_equals_the_loops(values, threshold):
    strength = torch.from_numpy(values)[None]
    mask, component, boxes = propose(strength, threshold)
    expected = reference.patch_mask(values, threshold)
    np.testing.assert_array_equal(mask[0], expected)
    np.testing.assert_array_equal(component[0], reference.largest_component(expected))
    assert tuple(boxes[0].tolist()) == reference.propose(values, threshold)


@given(MAPS, st.integers(-20, 20), st.sampled_from([0.5, 1.0, 1.25]))
def test_scaling_the_strength_changes_nothing(values, exponent, threshold):
    strength = torch.from_numpy(values)[None]
    scaled = propose(strength * 2.0**exponent, threshold)
    for one, other in zip(propose(strength, threshold), scaled, strict=True):
        assert torch.equal(one, other)


@given(MAPS, st.sampled_from([0.5, 1.0, 1.25]))
def test_flipping_the_strength_flips_the_box(values, threshold):
    areas = sorted(len(c) for c in reference.components(reference.patch_mask(values, threshold)))
    if areas[-2:-1] == areas[-1:]:
        return  # on a tie the first component wins, and flipping changes which is first
    height, width = values.shape
    strength = torch.from_numpy(values)[None]
    top, left, bottom, right = propose(strength, threshold).patch_boxes[0].tolist()
    flipped = propose(strength.flip(1, 2), threshold).patch_boxes[0].tolist()
    assert flipped == [height - bottom, width - right, height - top, width - left]


DEGENERATE = {
    "zero": torch.zeros(3, 5, 4),
    "constant": torch.full((3, 5, 4), 0.1),
    "negative": torch.full((3, 5, 4), -1.0),
    "nan": torch.full((3, 5, 4), math.nan),
    "infinite": torch.full((3, 5, 4), math.inf),
    "one nan": torch.rand(3, 5, 4).index_fill(2, torch.tensor([1]), math.nan),
    "one infinity": torch.rand(3, 5, 4).index_fill(1, torch.tensor([0]), math.inf),
    "both infinities": torch.stack([torch.full((3, 4), s * math.inf) for s in (1, -1, 1)], 1),
}


@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("threshold", [1.0, 1.2, math.nan, math.inf])
def test_degenerate_strength_gives_the_whole_image(kind, threshold, name):
    strength = DEGENERATE[kind]
    assert whole(propose(strength, threshold, name), strength.shape[1:])


@pytest.mark.parametrize("threshold", [math.nan, math.inf, 1e9])
def test_a_threshold_that_nothing_passes_gives_the_whole_image(threshold):
    proposal = propose(random_strength(), threshold)
    assert whole(proposal, (7, 9)) and not proposal.mask.any() and not proposal.component.any()


def test_thresholds_per_image():
    strength, thresholds = random_strength(), torch.tensor([0.1, 0.9, 1.0, 1.2, 2.0, math.nan])
    together = propose(strength, thresholds)
    for image, threshold in enumerate(thresholds.tolist()):
        alone = propose(strength[image, None], threshold)
        assert torch.equal(alone.patch_boxes[0], together.patch_boxes[image])


def test_one_strong_patch():
    strength = torch.ones(1, 14, 14)
    strength[0, 3, 4] = 5.0
    assert propose(strength, 1.2).patch_boxes.tolist() == [[3, 4, 4, 5]]


@pytest.mark.parametrize("name", PROPOSALS)
def test_every_proposal_returns_what_it_promises(name):
    strength = random_strength().requires_grad_()
    proposal = propose(strength, 1.1, name)
    assert isinstance(proposal, Proposal)
    assert proposal.mask.shape == proposal.component.shape == (6, 7, 9)
    assert proposal.mask.dtype == proposal.component.dtype == torch.bool
    assert proposal.patch_boxes.shape == (6, 4) and proposal.patch_boxes.dtype == torch.long
    assert torch.equal(bounding_boxes(proposal.component), proposal.patch_boxes)


@pytest.mark.parametrize("name", ["center", "random"])
def test_controls_have_the_shape_of_the_dppms_box(name):
    strength = random_strength(200)
    proposed, control = propose(strength, 1.3), propose(strength, 1.3, name)
    sides = [boxes[:, 2:] - boxes[:, :2] for boxes in (proposed[2], control[2])]
    assert torch.equal(*sides) and torch.equal(proposed.mask, control.mask)
    assert (control.patch_boxes[:, :2] >= 0).all()
    assert (control.patch_boxes[:, 2:] <= torch.tensor([7, 9])).all()
    assert torch.equal(control.component.sum((1, 2)), box_area(control.patch_boxes))
    assert box_area(proposed.patch_boxes).float().std() > 0


def test_center_is_in_the_center():
    boxes = propose(random_strength(), 1.3, "center").patch_boxes
    room = torch.tensor([7, 9]) - boxes[:, 2:] - boxes[:, :2]  # below minus above, right minus left
    assert ((room == 0) | (room == 1)).all()


def test_random_covers_every_place_and_follows_the_seed():
    strength = torch.zeros(3000, 4, 5)
    strength[:, 0, 0] = 1.0
    torch.manual_seed(3)
    boxes = propose(strength, 1.0, "random").patch_boxes
    places, counts = boxes.unique(dim=0, return_counts=True)
    assert len(places) == 20 and counts.min() > 90  # 150 expected, standard deviation 12
    torch.manual_seed(3)
    assert torch.equal(propose(strength, 1.0, "random").patch_boxes, boxes)
    assert not torch.equal(propose(strength, 1.0, "random").patch_boxes, boxes)


def test_random_places_by_row_are_the_same_in_any_batch():
    strength = random_strength(9)
    with seed_random_proposals(range(9)):
        first = [propose(strength, 1.3, "random").patch_boxes for _ in range(2)]  # two scales
    for rows in (range(4), range(4, 9), [8, 0, 3]):
        with seed_random_proposals(rows):
            for expected in first:
                found = propose(strength[list(rows)], 1.3, "random").patch_boxes
                assert torch.equal(found, expected[list(rows)])
    assert not torch.equal(*first)


def test_random_places_by_row_cover_the_image_and_end_with_the_block():
    strength = torch.zeros(3000, 4, 5)
    strength[:, 0, 0] = 1.0
    state = torch.get_rng_state()
    with seed_random_proposals(range(3000)):
        boxes = propose(strength, 1.0, "random").patch_boxes
    assert torch.equal(torch.get_rng_state(), state)
    places, counts = boxes.unique(dim=0, return_counts=True)
    assert len(places) == 20 and counts.min() > 90
    propose(strength, 1.0, "random")
    assert not torch.equal(torch.get_rng_state(), state), "the global generator again"


def test_all_patches_encloses_every_component():
    strength = torch.zeros(1, 6, 8)
    strength[0, 1, 1] = strength[0, 5, 6] = strength[0, 5, 7] = 1.0
    assert propose(strength, 1.0).patch_boxes.tolist() == [[5, 6, 6, 8]]
    assert propose(strength, 1.0, "all_patches").patch_boxes.tolist() == [[1, 1, 6, 8]]


def test_no_proposal_but_random_draws_numbers():
    for name in set(PROPOSALS) - {"random"}:
        state = torch.get_rng_state()
        propose(random_strength(), 1.1, name)
        assert torch.equal(torch.get_rng_state(), state)


def test_upsampled_boxes_end_between_patches():
    strength = torch.zeros(1, 6, 6)
    strength[0, 2:4, 1:3] = 1.0
    assert propose(strength, 1.0).patch_boxes.tolist() == [[2, 1, 4, 3]]
    fine = propose(strength, 3.0, upsampling=4)
    values = reference.resize(strength.double().numpy(), (24, 24))[0]
    mask = reference.patch_mask(values, 3.0)
    np.testing.assert_array_equal(fine.mask[0], mask)
    box = reference.bounding_box(mask)
    assert fine.patch_boxes[0].tolist() == [side / 4 for side in box]
    assert any(side % 4 for side in box)


# --- proposals of one's own --------------------------------------------------------------------


def refused(*arguments):
    """The one line with which a proposal is refused."""
    with pytest.raises(InputError) as caught:
        propose(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


RECORDED = RecordedScale([], (7, 9))


def test_a_proposal_of_ones_own_may_give_boxes_of_any_number_and_type():
    strength = random_strength()
    given = torch.tensor([[0, 0, 7, 9], [1.5, 2, 3, 4.25]]).expand(6, 2, 4)
    one = propose(strength, 1.1, lambda *_: given[:, 1], RECORDED)
    several = propose(strength, 1.1, lambda *_: given, RECORDED)
    assert torch.equal(one.patch_boxes, given[:, 1]) and torch.equal(several.patch_boxes, given)
    assert torch.equal(one.mask, patch_mask(strength, 1.1)) and torch.equal(one.mask, several.mask)
    assert one.component[0].nonzero().tolist() == [[2, 2], [2, 3]], "patches whose middle is inside"
    assert several.component.all(), "of several boxes, the first"
    whole = torch.tensor([[0, 0, 7, 9]] * 6)
    assert propose(strength, 1.1, lambda *_: whole, RECORDED).patch_boxes.dtype == torch.long


def test_a_proposal_of_ones_own_is_given_what_the_scale_left(tmp_path):
    seen = []

    def mine(strength, threshold, recorded):
        seen.append((strength, threshold, recorded, torch.is_grad_enabled()))
        return attention_proposal(strength, threshold)

    strength = random_strength().requires_grad_()
    found = propose(strength, 1.3, mine, RECORDED)
    assert all(map(torch.equal, found, propose(strength, 1.3)))
    assert seen == [(strength, 1.3, RECORDED, False)]
    code = "def whole(strength, threshold, recorded):\n    height, width = recorded.grid\n"
    code += "    return strength.new_tensor([[0, 0, height, width]]).expand(len(strength), 4)\n"
    (tmp_path / "ideas.py").write_text(code)
    assert whole(propose(strength, 1.3, f"{tmp_path}/ideas.py:whole", RECORDED), (7, 9))


def test_a_proposal_that_reads_the_strength_alone_says_so():
    def mine(strength, threshold, recorded):
        return attention_proposal(strength, threshold)

    assert "'mine'" in (message := refused(random_strength(), 1.0, mine))
    assert "@ramslib.reads(blocks=0)" in message
    assert propose(random_strength(), 1.0, reads(blocks=0)(mine)).patch_boxes.shape == (6, 4)


WRONG = "(B, 4) or (B, R, 4)"
OUTSIDE = "empty or leaves the grid of 7 x 9 patches"


@pytest.mark.parametrize(
    "given, words",
    [
        (None, ["NoneType", WRONG]),
        ([[0, 0, 1, 1]] * 6, ["list", WRONG]),
        (np.zeros((6, 4)), ["ndarray", WRONG]),
        (torch.zeros(6), ["(6,)", WRONG]),
        (torch.zeros(5, 4), ["(5, 4)", WRONG, "B = 6"]),
        (torch.zeros(6, 5), ["(6, 5)", WRONG]),
        (torch.zeros(6, 0, 4), ["(6, 0, 4)", WRONG]),
        (torch.zeros(6, 4, 4, 4), ["(6, 4, 4, 4)", WRONG]),
        (torch.tensor([[0, 0, 7, 10]] * 6), [OUTSIDE]),
        (torch.tensor([[-1, 0, 7, 9]] * 6), [OUTSIDE]),
        (torch.tensor([[2, 0, 2, 9]] * 6), [OUTSIDE]),
        (torch.tensor([[0, 5, 7, 3]] * 6), [OUTSIDE]),
        (torch.tensor([[0, 0, math.nan, 3]] * 6), [OUTSIDE]),
        (torch.tensor([[[0, 0, 7, 9], [0, 0, 8, 9]]] * 6), [OUTSIDE]),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_no_box_is_is_refused_in_one_line(given, words, packed):
    def mine(strength, threshold, recorded):
        found = attention_proposal(strength, threshold)
        return found._replace(patch_boxes=given) if packed else given

    message = refused(random_strength(), 1.0, mine, RECORDED)
    assert all(word in message for word in ["proposal 'mine'", *words])


def test_random_places_of_several_regions_are_those_of_their_image():
    strength = random_strength(6)  # of three images, two regions each
    torch.manual_seed(0)
    with seed_random_proposals(range(3)):
        first = propose(strength[::2], 1.3, "random").patch_boxes
        together = propose(strength, 1.3, "random").patch_boxes
    kept = torch.tensor([True, False, True])
    with seed_random_proposals(range(3)):
        assert torch.equal(propose(strength[::2], 1.3, "random").patch_boxes, first)
        keep_random_proposals(kept)
        rows = kept.repeat_interleave(2)
        alone = propose(strength[rows], 1.3, "random").patch_boxes
        assert torch.equal(alone, together[rows])
        keep_random_proposals(torch.tensor([False, False]))
        assert propose(strength[:0], 1.3, "random").patch_boxes.shape == (0, 4)


def test_unknown_name():
    message = refused(random_strength(), 1.0, "atention")
    assert "unknown proposal 'atention'" in message and "attention, " in message
