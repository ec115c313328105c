"""The DPPM against the loops, its properties, and the controls that it is compared with."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ramslib.dppm import PROPOSALS, Proposal, propose, seed_random_proposals
from ramslib.errors import InputError
from ramslib.regions import bounding_boxes, box_area

GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12))
MAPS = GRIDS.flatmap(
    lambda grid: hnp.arrays(np.float32, grid, elements=st.integers(0, 255).map(float))
)


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


STRANGE = {
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
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("threshold", [1.0, 1.2, math.nan, math.inf])
def test_strange_strength_gives_the_whole_image(kind, threshold, name):
    strength = STRANGE[kind]
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


def test_centre_is_in_the_center():
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


def test_unknown_name():
    with pytest.raises(InputError, match="^unknown proposal 'atention'; choose one of attention, "):
        propose(random_strength(), 1.0, "atention")
