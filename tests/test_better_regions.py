"""Strengths of the last blocks and of patch tokens against loops; boxes finer than the patches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ramslib.attention import LAST_BLOCKS, attention_probabilities, attention_strength
from ramslib.dppm import propose
from ramslib.model import ProposalSettings, RAMSTrans


@pytest.fixture
def recorded(backbone_of, images):
    """Two images at scale 1 of a small model, everything recorded."""
    model = RAMSTrans(backbone_of("dinov2_registers"), 5, per_scale_token=False).eval()
    with torch.no_grad():
        return model.run_scale(images(2), 0, blocks=None, tokens=True)[2]


def test_mean_of_the_last_blocks_equals_the_loops(recorded):
    rows = [
        attention_probabilities(block)[:, :, recorded.class_index].mean(dim=1)
        for block in recorded.blocks[-LAST_BLOCKS:]
    ]
    expected = sum(rows)[:, -12:].reshape(2, 3, 4) / len(rows)
    torch.testing.assert_close(attention_strength(recorded, "last_blocks_mean"), expected)


def test_token_contrast_equals_the_loops(recorded):
    strength = attention_strength(recorded, "token_contrast")
    weights = attention_strength(recorded, "last_blocks_mean").double().numpy()
    for image, tokens in enumerate(recorded.tokens.double().numpy()):
        unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
        attended, border = np.zeros(unit.shape[-1]), np.zeros(unit.shape[-1])
        for y in range(3):
            for x in range(4):
                attended += weights[image, y, x] * unit[y, x]
                if y in (0, 2) or x in (0, 3):
                    border += unit[y, x]
        values = np.array(
            [
                [
                    unit[y, x] @ attended / np.linalg.norm(attended)
                    - unit[y, x] @ border / np.linalg.norm(border)
                    for x in range(4)
                ]
                for y in range(3)
            ]
        )
        np.testing.assert_allclose(strength[image], values - values.min(), atol=1e-5)


def test_upsampled_boxes_end_between_patches():
    strength = torch.zeros(1, 6, 6)
    strength[0, 2:4, 1:3] = 1.0
    plain = propose(strength, 1.0).patch_boxes
    fine = propose(strength, 3.0, upsampling=4)
    assert plain.tolist() == [[2, 1, 4, 3]]
    expected = F.interpolate(strength[None], (24, 24), mode="bilinear")[0]
    mask = expected > 3.0 * expected.mean()
    assert torch.equal(fine.mask, mask)
    rows, columns = mask[0].any(dim=1).nonzero(), mask[0].any(dim=0).nonzero()
    box = [rows.min() / 4, columns.min() / 4, (rows.max() + 1) / 4, (columns.max() + 1) / 4]
    assert fine.patch_boxes[0].tolist() == pytest.approx([float(side) for side in box])
    assert (fine.patch_boxes % 1 != 0).any()


def test_a_model_crops_finer_boxes(backbone_of):
    pixels = torch.rand(2, 3, 72, 96, generator=torch.Generator().manual_seed(0))
    settings = ProposalSettings((1.0,), "token_contrast", upsampling=4)
    model = RAMSTrans(backbone_of("dinov2"), 5, settings, per_scale_token=False).eval()
    with torch.no_grad():
        output = model(pixels)
    in_patches = output.boxes[1] / 8
    torch.testing.assert_close(in_patches, output.proposals[0].patch_boxes.float())
    assert (4 * in_patches == (4 * in_patches).round()).all()
