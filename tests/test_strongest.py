"""The component of the greatest total strength against the loops, eager and as tensor operations."""

import numpy as np
import pytest
import reference
import torch

from ramslib.acceleration import largest_component_tensor
from ramslib.dppm import largest_component, propose


@pytest.mark.parametrize("seed", range(20))
def test_the_strongest_component_equals_the_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(3, 9, 7, generator=generator) ** 3
    proposal = propose(strength, 1.2, "strongest")
    tensors = largest_component_tensor(proposal.mask, strength)
    for values, mask, component, other in zip(
        strength, proposal.mask, proposal.component, tensors, strict=True
    ):
        found = reference.components(mask.numpy())
        best = max(found, key=lambda patches: sum(float(values[patch]) for patch in patches))
        expected = np.zeros(mask.shape, dtype=bool)
        for patch in best:
            expected[patch] = True
        np.testing.assert_array_equal(component, expected)
        np.testing.assert_array_equal(other, expected)


def test_a_strong_patch_wins_over_many_weak_ones_and_an_empty_mask_stays_empty():
    strength = torch.ones(1, 4, 6)
    strength[0, 0, :3], strength[0, 3, 5], strength[0, 2] = 3.0, 50.0, 0.1
    mask = strength > 2
    assert largest_component(mask).sum() == 3
    assert largest_component(mask, strength).nonzero().tolist() == [[0, 3, 5]]
    assert not largest_component(torch.zeros(1, 4, 6, dtype=torch.bool), strength).any()
