"""Attention strength against full rollout matrices built loop by loop."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ramslib.attention
from ramslib.attention import QueryKey, record_attention
from ramslib.errors import InputError
from ramslib.strength import LAST_BLOCKS, STRENGTHS, attention_strength, rollout_rows


def random_blocks(seed, batch=2, heads=3, tokens=9, depth=4, size=2.0, bias=None):
    """Recorded blocks whose attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shape = (depth, 2, batch, heads, tokens, 4)
    pairs = size * torch.randn(shape, generator=generator)
    return [QueryKey(query, key, bias, 0.5) for query, key in pairs]


def probabilities(blocks):
    """Per image, the (A, N, N) probabilities of each block, from the loops."""
    each = [
        reference.attention_probabilities(
            block.query.numpy(),
            block.key.numpy(),
            block.scale,
            None if block.bias is None else block.bias.numpy(),
        )
        for block in blocks
    ]
    return list(zip(*each, strict=True))


@pytest.mark.parametrize("bias_shape", [None, (1, 3, 9, 9), (2, 3, 9, 9), (9, 9), (2, 1, 1, 9)])
@pytest.mark.parametrize("class_index", [0, 2])
@pytest.mark.parametrize("name", STRENGTHS)
def test_strength_equals_the_full_matrices(name, class_index, bias_shape):
    bias = None if bias_shape is None else torch.randn(bias_shape)
    blocks = random_blocks(0, bias=bias)
    strength = attention_strength(blocks, name, (2, 3), class_index)
    expected = [
        reference.strength(image, name, (2, 3), class_index) for image in probabilities(blocks)
    ]
    assert strength.shape == (2, 2, 3) and strength.dtype == torch.float32
    np.testing.assert_allclose(strength, expected, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 12])
@pytest.mark.parametrize("name", STRENGTHS)
def test_any_depth(name, depth):
    blocks = random_blocks(1, depth=depth)
    expected = [reference.strength(image, name, (2, 4)) for image in probabilities(blocks)]
    np.testing.assert_allclose(attention_strength(blocks, name, (2, 4)), expected, atol=1e-6)


def test_strengths_differ_from_one_another():
    blocks = random_blocks(2)
    maps = [attention_strength(blocks, name, (2, 4)) for name in STRENGTHS]
    maps.append(attention_strength(blocks, "rollout_class", (2, 4), class_index=1))
    maps.append(attention_strength(blocks, "last_class", (2, 4), class_index=1))
    for i, one in enumerate(maps):
        for other in maps[:i]:
            assert (one - other).abs().max() > 1e-3


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 12), st.floats(0, 8))
def test_rows_of_the_rollout_sum_to_one(seed, depth, tokens, size):
    blocks = random_blocks(seed, depth=depth, tokens=tokens, size=size)
    rows = torch.eye(tokens).unsqueeze(1).expand(tokens, 2, tokens)  # every row of g in turn
    for weights in rows:
        result = rollout_rows(blocks, weights)
        assert (result >= 0).all()
        torch.testing.assert_close(result.sum(1), torch.ones(2))


def test_identity_attention_has_an_identity_rollout():
    query = 100 * torch.eye(6).repeat(1, 2, 1, 1)  # each token looks at itself alone
    blocks = [QueryKey(query, query, None, 1.0)] * 5
    weights = torch.rand(1, 6)
    torch.testing.assert_close(rollout_rows(blocks, weights), weights)
    uniform = attention_strength(blocks, "rollout_mean", (1, 5))
    torch.testing.assert_close(uniform, torch.full((1, 1, 5), 1 / 6))
    assert attention_strength(blocks, "rollout_class", (1, 5)).abs().max() == 0
    assert attention_strength(blocks, "last_class", (1, 5)).abs().max() == 0


def test_uniform_attention_gives_uniform_strength():
    zeros = torch.zeros(2, 3, 7, 4)
    blocks = [QueryKey(zeros, zeros, None, 0.5)] * 3
    for name in STRENGTHS:
        strength = attention_strength(blocks, name, (2, 3))
        torch.testing.assert_close(strength, strength[:1, :1, :1].expand(2, 2, 3))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.permutations(range(6)), st.sampled_from(sorted(STRENGTHS)))
def test_permuting_patches_permutes_strength(seed, order, name):
    blocks = random_blocks(seed, tokens=8)  # two prefix tokens
    order = torch.tensor([0, 1, *(patch + 2 for patch in order)])
    permuted = [
        block._replace(query=block.query[:, :, order], key=block.key[:, :, order])
        for block in blocks
    ]
    strength = attention_strength(blocks, name, (1, 6), 1).flatten(1)
    torch.testing.assert_close(
        attention_strength(permuted, name, (1, 6), 1).flatten(1),
        strength[:, order[2:] - 2],
        atol=1e-6,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_image_is_on_its_own(name):
    blocks = random_blocks(3, batch=4)
    alone = [block._replace(query=block.query[2:3], key=block.key[2:3]) for block in blocks]
    together = attention_strength(blocks, name, (2, 4))
    torch.testing.assert_close(attention_strength(alone, name, (2, 4)), together[2:3])


@pytest.mark.parametrize("name", STRENGTHS)
def test_prefix_tokens_are_dropped_and_rows_come_first(name):
    blocks = random_blocks(4, tokens=14)
    wide = attention_strength(blocks, name, (1, 12))
    grid = attention_strength(blocks, name, (3, 4))
    assert torch.equal(grid[0, 1], wide[0, 0, 4:8])
    assert torch.equal(attention_strength(blocks, name, (1, 9)), wide[:, :, 3:])


@pytest.mark.parametrize("name", STRENGTHS)
def test_half_precision_records_give_float32_strength(name):
    blocks = random_blocks(5, size=1.0)
    half = [
        block._replace(query=block.query.bfloat16(), key=block.key.bfloat16()) for block in blocks
    ]
    exact = [block._replace(query=block.query.float(), key=block.key.float()) for block in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        strength = attention_strength(half, name, (2, 4))
    assert strength.dtype == torch.float32
    assert torch.equal(strength, attention_strength(exact, name, (2, 4)))


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_real_backbone(name, family, backbone_of, images):
    backbone = backbone_of(family)
    if name.endswith("_class") and getattr(backbone, "cls_token", None) is None:
        return
    with record_attention(backbone) as blocks:
        backbone.forward_features(images())
    strength = attention_strength(blocks, name, (3, 4))
    assert not strength.requires_grad
    for image, per_block in enumerate(
        probabilities([b._replace(query=b.query, key=b.key) for b in blocks])
    ):
        expected = reference.strength(per_block, name, (3, 4))
        np.testing.assert_allclose(strength[image], expected, atol=1e-6)


@pytest.mark.parametrize("cached", [1, 20, 70, 10**9])
@pytest.mark.parametrize("bias_shape", [None, (1, 3, 9, 9), (2, 3, 9, 9), (9, 9), (2, 1, 1, 9)])
def test_any_number_of_rows_at_a_time(cached, bias_shape, monkeypatch):
    blocks = random_blocks(8, bias=None if bias_shape is None else torch.randn(bias_shape))
    expected = [
        reference.strength(image, "rollout_mean", (2, 4)) for image in probabilities(blocks)
    ]
    monkeypatch.setattr(ramslib.attention, "CACHED", cached)
    found = attention_strength(blocks, "rollout_mean", (2, 4))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_strength_reads_no_more_blocks_than_it_says(name):
    blocks = random_blocks(9, depth=5)
    fewer = blocks[-LAST_BLOCKS.get(name, 5) :]
    expected = attention_strength(blocks, name, (2, 4))
    assert torch.equal(attention_strength(fewer, name, (2, 4)), expected)
    assert name in LAST_BLOCKS or not torch.allclose(
        attention_strength(blocks[1:], name, (2, 4)), expected
    )


def test_records_are_left_alone():
    blocks = random_blocks(6)
    before = [block.query.clone() for block in blocks]
    for name in STRENGTHS:
        attention_strength(blocks, name, (2, 4))
    assert all(torch.equal(b.query, old) for b, old in zip(blocks, before, strict=True))


def test_unknown_name():
    with pytest.raises(InputError, match="^unknown attention strength 'rolout'; choose one of "):
        attention_strength(random_blocks(7), "rolout", (2, 4))
