"""Recorded attention against timm's own unfused attention, and the recorder's manners."""

import copy

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from ramslib.attention import QueryKey, attention_probabilities, record_attention


def unfused_probabilities(backbone, images):
    """What timm itself computes: fused attention off, softmax caught on its way to dropout."""
    backbone, caught = copy.deepcopy(backbone), []
    for block in backbone.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        backbone.forward_features(images)
    return caught


def record(backbone, images):
    """Recorded blocks and the final tokens."""
    with record_attention(backbone) as blocks:
        tokens = backbone.forward_features(images)
    return blocks, tokens


def test_probabilities_equal_timms_unfused_attention(family, backbone_of, images):
    backbone = backbone_of(family)
    blocks, _ = record(backbone, images())
    expected = unfused_probabilities(backbone, images())
    assert len(blocks) == len(expected) == 3
    for block, probabilities in zip(blocks, expected, strict=True):
        assert probabilities.std() > 0.01  # uniform attention would prove nothing
        torch.testing.assert_close(
            attention_probabilities(block), probabilities, atol=2e-6, rtol=1e-5
        )


def test_recording_changes_no_output(family, backbone_of, images):
    backbone = backbone_of(family)
    plain = backbone(images())
    with record_attention(backbone):
        recorded = backbone(images())
    assert torch.equal(plain, recorded)


def test_recording_changes_no_gradient(family, backbone_of, images):
    gradients = []
    for recorded in (False, True):
        torch.manual_seed(0)
        backbone = backbone_of(family, proj_drop_rate=0.1).train()
        view = images().requires_grad_()
        tokens = record(backbone, view)[1] if recorded else backbone.forward_features(view)
        tokens.square().mean().backward()
        gradients.append([view.grad, *(p.grad for p in backbone.parameters())])
    for plain, with_recording in zip(*gradients, strict=True):
        assert plain is with_recording is None or torch.equal(plain, with_recording)


def test_records_are_detached_and_hold_all_tokens(family, backbone_of, images):
    backbone = backbone_of(family)
    blocks, tokens = record(backbone, images())
    for block in blocks:
        assert block.query.shape == block.key.shape == (2, 2, tokens.shape[1], 16)
        assert not block.query.requires_grad and not block.key.requires_grad
        assert block.bias is None or not block.bias.requires_grad


def random_block(seed, bias=None, scale=0.7):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 3, 7, 4, generator=generator)
    return QueryKey(3 * query, key, bias, scale)


@pytest.mark.parametrize("bias_shape", [None, (1, 3, 7, 7), (2, 3, 7, 7), (7, 7), (2, 1, 1, 7)])
def test_probabilities_equal_the_loops(bias_shape):
    bias = None if bias_shape is None else torch.randn(bias_shape)
    block = random_block(0, bias)
    expected = reference.attention_probabilities(
        block.query.numpy(), block.key.numpy(), 0.7, None if bias is None else bias.numpy()
    )
    probabilities = attention_probabilities(block)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    rows = attention_probabilities(block, slice(2, 4))
    np.testing.assert_allclose(rows, expected[:, :, 2:4], atol=1e-6)


def test_probabilities_of_huge_logits_are_finite_and_leave_the_record_alone():
    block = random_block(1, torch.full((1, 1, 7, 7), 50.0), scale=1e4)
    before = [tensor.clone() for tensor in block[:3]]
    probabilities = attention_probabilities(block)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 7))
    assert all(torch.equal(old, new) for old, new in zip(before, block[:3], strict=True))


class Attend(nn.Module):
    """A 'backbone' of one block that calls torch's attention with the arguments of a test."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.blocks, self.args, self.kwargs = nn.ModuleList([nn.Identity()]), args, kwargs

    def forward(self, query, key):
        """Attention probabilities, read out by the identity as value."""
        value = torch.eye(query.shape[-2]).expand(*query.shape[:-2], -1, -1)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, *self.args, **self.kwargs
        )


ADDED = torch.linspace(-2, 2, 49).reshape(7, 7)
ALLOWED = torch.ones(7, 7, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "model",
    [
        Attend(),
        Attend(scale=0.1),
        Attend(ADDED),
        Attend(attn_mask=ADDED),
        Attend(attn_mask=ALLOWED),
        Attend(attn_mask=ALLOWED.expand(2, 3, 7, 7), scale=2.0),
        Attend(is_causal=True),
        Attend(None, 0.0, True),
    ],
    ids="plain scale position float_mask mask mask_scale causal causal_position".split(),
)
def test_every_way_to_call_attention_is_understood(model):
    block = random_block(2)
    with record_attention(model) as blocks:
        output = model(block.query, block.key)
    torch.testing.assert_close(attention_probabilities(blocks[0]), output)


def test_grouped_heads_are_expanded():
    block = random_block(3)
    few = block.key[:, :1]
    with record_attention(Attend()) as blocks:
        value = torch.eye(7).expand(2, 1, 7, 7)
        output = nn.functional.scaled_dot_product_attention(
            block.query, few, value, enable_gqa=True
        )
    torch.testing.assert_close(attention_probabilities(blocks[0]), output)


def test_pooling_attention_is_passed_over(backbone_of, images):
    backbone = backbone_of("siglip")
    with record_attention(backbone) as blocks:
        backbone(images())  # the pooling head attends with a latent query
    assert len(blocks) == 3


def test_fused_attention_off_is_an_error(backbone_of, images):
    backbone = backbone_of("vit")
    backbone.blocks[1].attn.fused_attn = False
    with pytest.raises(RuntimeError, match="recorded 2 attention calls for 3 blocks; is fused"):
        record(backbone, images())


@pytest.mark.parametrize("last", [1, 2, 3, 9])
def test_only_the_last_blocks_are_kept_where_no_more_are_asked_for(last, backbone_of, images):
    backbone = backbone_of("dinov3")
    expected, _ = record(backbone, images())
    with record_attention(backbone, last) as blocks:
        backbone.forward_features(images())
    assert len(blocks) == min(last, 3)
    for one, other in zip(blocks, expected[-last:], strict=True):
        assert torch.equal(one.query, other.query) and torch.equal(one.key, other.key)
    backbone.blocks[1].attn.fused_attn = False
    with pytest.raises(RuntimeError, match="recorded 2 attention calls for 3 blocks"):
        with record_attention(backbone, last):
            backbone.forward_features(images())


def test_a_block_seen_twice_is_an_error(backbone_of, images):
    backbone = backbone_of("vit")
    with pytest.raises(RuntimeError, match="recorded 6 attention calls for 3 blocks"):
        with record_attention(backbone):
            backbone(images())
            backbone(images())


def test_an_exception_passes_through_and_recording_stops(backbone_of, images):
    backbone = backbone_of("vit")
    with pytest.raises(KeyError, match="mine"):
        with record_attention(backbone) as blocks:
            raise KeyError("mine")
    assert not _get_current_function_mode_stack()
    backbone(images())
    assert blocks == []


def test_recording_stops_after_the_block(backbone_of, images):
    backbone = backbone_of("vit")
    blocks, _ = record(backbone, images())
    backbone(images())
    assert len(blocks) == 3 and not _get_current_function_mode_stack()


def test_two_recordings_nest(backbone_of, images):
    backbone = backbone_of("dinov3")
    with record_attention(backbone) as outer:
        inner, _ = record(backbone, images())
    for one, other in zip(outer, inner, strict=True):
        assert torch.equal(one.query, other.query) and torch.equal(one.key, other.key)


def test_autocast_records_bfloat16_and_softens_in_float32(backbone_of, images):
    backbone = backbone_of("dinov2_registers")
    expected, _ = record(backbone, images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blocks, _ = record(backbone, images())
        with torch.autocast("cpu", enabled=False):
            probabilities = [attention_probabilities(block) for block in blocks]
    assert blocks[0].query.dtype == torch.bfloat16
    for block, recorded, given in zip(expected, probabilities, blocks, strict=True):
        assert recorded.dtype == torch.float32
        torch.testing.assert_close(recorded.sum(-1), torch.ones_like(recorded[..., 0]))
        exact = given._replace(query=given.query.double(), key=given.key.double())
        loops = reference.attention_probabilities(exact.query.numpy(), exact.key.numpy(), 0.25)
        np.testing.assert_allclose(recorded, loops, atol=1e-6)
        torch.testing.assert_close(recorded, attention_probabilities(block), atol=0.1, rtol=0)


def test_gradient_checkpointing_records_each_block_once(backbone_of, images):
    backbone = backbone_of("vit").train()
    expected, plain = record(backbone, images())
    plain.square().mean().backward()
    gradients = [p.grad.clone() for p in backbone.parameters() if p.grad is not None]
    backbone.zero_grad()
    backbone.set_grad_checkpointing()
    blocks, tokens = record(backbone, images())
    tokens.square().mean().backward()
    assert len(blocks) == 3
    for one, other in zip(blocks, expected, strict=True):
        assert torch.equal(one.query, other.query) and torch.equal(one.key, other.key)
    for one, other in zip(
        gradients, (p.grad for p in backbone.parameters() if p.grad is not None), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_inference_mode(backbone_of, images):
    backbone = backbone_of("eva02")
    expected, _ = record(backbone, images())
    with torch.inference_mode():
        blocks, _ = record(backbone, images())
        probabilities = [attention_probabilities(block) for block in blocks]
    for block, recorded in zip(expected, probabilities, strict=True):
        assert torch.equal(attention_probabilities(block), recorded)
