"""Recorded attention against timm's own unfused attention; strengths against full matrices."""

import copy

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from ramslib import acceleration
from ramslib.acceleration import plain_path
from ramslib.attention import (
    CLASS_STRENGTHS,
    STRENGTHS,
    QueryKey,
    RecordedScale,
    attention_probabilities,
    attention_strength,
    multiply_rows,
    record_attention,
    rollout_rows,
)
from ramslib.errors import InputError
from ramslib.inspector import single_block

# --- recording ---------------------------------------------------------------------------------


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
        inputs = images().requires_grad_()
        tokens = record(backbone, inputs)[1] if recorded else backbone.forward_features(inputs)
        tokens.square().mean().backward()
        gradients.append([inputs.grad, *(p.grad for p in backbone.parameters())])
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


def test_pooling_attention_is_ignored(backbone_of, images):
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


def test_autocast_records_bfloat16_and_the_softmax_is_float32(backbone_of, images):
    backbone = backbone_of("dinov2_registers")
    expected, _ = record(backbone, images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blocks, _ = record(backbone, images())
        with torch.autocast("cpu", enabled=False):
            probabilities = [attention_probabilities(block) for block in blocks]
    assert blocks[0].query.dtype == torch.bfloat16
    for block, recorded, half in zip(expected, probabilities, blocks, strict=True):
        assert recorded.dtype == torch.float32
        torch.testing.assert_close(recorded.sum(-1), torch.ones_like(recorded[..., 0]))
        exact = half._replace(query=half.query.double(), key=half.key.double())
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


# --- strengths ---------------------------------------------------------------------------------


ATTENTION = [name for name, strength in STRENGTHS.items() if not strength.reads_tokens]
BIASES = [None, (1, 3, 9, 9), (2, 3, 9, 9), (9, 9), (2, 1, 1, 9)]


def random_blocks(seed, batch=2, heads=3, tokens=9, depth=4, size=2.0, bias=None):
    """Recorded blocks whose attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shape = (depth, 2, batch, heads, tokens, 4)
    pairs = size * torch.randn(shape, generator=generator)
    return [QueryKey(query, key, bias, 0.5) for query, key in pairs]


def strength_of(blocks, strength, grid=(2, 4), class_index=0):
    """Strength of recorded blocks; the last patches of the grid are the last tokens."""
    return attention_strength(RecordedScale(blocks, grid, class_index), strength)


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


@pytest.mark.parametrize("bias_shape", BIASES)
@pytest.mark.parametrize("class_index", [0, 2])
@pytest.mark.parametrize("name", ATTENTION)
def test_strength_equals_the_full_matrices(name, class_index, bias_shape):
    bias = None if bias_shape is None else torch.randn(bias_shape)
    blocks = random_blocks(0, bias=bias)
    strength = strength_of(blocks, name, (2, 3), class_index)
    expected = [
        reference.strength(image, name, (2, 3), class_index) for image in probabilities(blocks)
    ]
    assert strength.shape == (2, 2, 3) and strength.dtype == torch.float32
    np.testing.assert_allclose(strength, expected, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 12])
@pytest.mark.parametrize("name", ATTENTION)
def test_any_depth(name, depth):
    blocks = random_blocks(1, depth=depth)
    expected = [reference.strength(image, name, (2, 4)) for image in probabilities(blocks)]
    np.testing.assert_allclose(strength_of(blocks, name), expected, atol=1e-6)


def test_strengths_differ_from_one_another():
    blocks = random_blocks(2)
    maps = [strength_of(blocks, name) for name in ATTENTION]
    maps.append(strength_of(blocks, "rollout_class", (2, 4), 1))
    maps.append(strength_of(blocks, "last_class", (2, 4), 1))
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
    uniform = strength_of(blocks, "rollout_mean", (1, 5))
    torch.testing.assert_close(uniform, torch.full((1, 1, 5), 1 / 6))
    assert strength_of(blocks, "rollout_class", (1, 5)).abs().max() == 0
    assert strength_of(blocks, "last_class", (1, 5)).abs().max() == 0


def test_uniform_attention_gives_uniform_strength():
    zeros = torch.zeros(2, 3, 7, 4)
    blocks = [QueryKey(zeros, zeros, None, 0.5)] * 3
    for name in ATTENTION:
        strength = strength_of(blocks, name, (2, 3))
        torch.testing.assert_close(strength, strength[:1, :1, :1].expand(2, 2, 3))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.permutations(range(6)), st.sampled_from(ATTENTION))
def test_permuting_patches_permutes_strength(seed, order, name):
    blocks = random_blocks(seed, tokens=8)  # two prefix tokens
    order = torch.tensor([0, 1, *(patch + 2 for patch in order)])
    permuted = [
        block._replace(query=block.query[:, :, order], key=block.key[:, :, order])
        for block in blocks
    ]
    strength = strength_of(blocks, name, (1, 6), 1).flatten(1)
    torch.testing.assert_close(
        strength_of(permuted, name, (1, 6), 1).flatten(1),
        strength[:, order[2:] - 2],
        atol=1e-6,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_each_image_is_on_its_own(name):
    blocks = random_blocks(3, batch=4)
    alone = [block._replace(query=block.query[2:3], key=block.key[2:3]) for block in blocks]
    together = strength_of(blocks, name)
    torch.testing.assert_close(strength_of(alone, name), together[2:3])


@pytest.mark.parametrize("name", ATTENTION)
def test_prefix_tokens_are_dropped_and_rows_come_first(name):
    blocks = random_blocks(4, tokens=14)
    wide = strength_of(blocks, name, (1, 12))
    grid = strength_of(blocks, name, (3, 4))
    assert torch.equal(grid[0, 1], wide[0, 0, 4:8])
    assert torch.equal(strength_of(blocks, name, (1, 9)), wide[:, :, 3:])


@pytest.mark.parametrize("name", ATTENTION)
def test_half_precision_records_give_float32_strength(name):
    blocks = random_blocks(5, size=1.0)
    half = [
        block._replace(query=block.query.bfloat16(), key=block.key.bfloat16()) for block in blocks
    ]
    exact = [block._replace(query=block.query.float(), key=block.key.float()) for block in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        strength = strength_of(half, name)
    assert strength.dtype == torch.float32
    assert torch.equal(strength, strength_of(exact, name))


@pytest.mark.parametrize("name", ATTENTION)
def test_a_real_backbone(name, family, backbone_of, images):
    backbone = backbone_of(family)
    if STRENGTHS[name] in CLASS_STRENGTHS and getattr(backbone, "cls_token", None) is None:
        return
    with record_attention(backbone) as blocks:
        backbone.forward_features(images())
    strength = strength_of(blocks, name, (3, 4))
    assert not strength.requires_grad
    for image, per_block in enumerate(
        probabilities([b._replace(query=b.query, key=b.key) for b in blocks])
    ):
        expected = reference.strength(per_block, name, (3, 4))
        np.testing.assert_allclose(strength[image], expected, atol=1e-6)


@pytest.mark.parametrize("cached", [1, 20, 70, 10**9])
@pytest.mark.parametrize("bias_shape", BIASES)
def test_any_number_of_rows_at_a_time(cached, bias_shape, monkeypatch):
    blocks = random_blocks(8, bias=None if bias_shape is None else torch.randn(bias_shape))
    expected = [
        reference.strength(image, "rollout_mean", (2, 4)) for image in probabilities(blocks)
    ]
    monkeypatch.setattr(acceleration, "CACHED", cached)
    found = strength_of(blocks, "rollout_mean")
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_strength_reads_no_more_blocks_than_it_says(name):
    blocks = random_blocks(9, depth=5)
    count = STRENGTHS[name].reads_blocks
    fewer = blocks[-(count or 5) :]
    expected = strength_of(blocks, name)
    assert torch.equal(strength_of(fewer, name), expected)
    assert count or not torch.allclose(strength_of(blocks[1:], name), expected)


def test_records_are_left_alone():
    blocks = random_blocks(6)
    before = [block.query.clone() for block in blocks]
    for name in ATTENTION:
        strength_of(blocks, name)
    assert all(torch.equal(b.query, old) for b, old in zip(blocks, before, strict=True))


def test_unknown_name():
    with pytest.raises(InputError, match="unknown strength 'rolout'; choose one of rollout_mean"):
        strength_of(random_blocks(7), "rolout")


@pytest.mark.parametrize("grid", [(3, 4), (2, 2), (1, 5), (6, 3)])
def test_token_contrast_equals_the_loops(grid):
    count = grid[0] * grid[1]
    blocks = random_blocks(14, tokens=count + 1)
    tokens = torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(0))
    recorded = RecordedScale(blocks, grid, tokens=tokens)
    found = attention_strength(recorded, "token_contrast")
    for image, maps in enumerate(probabilities(blocks)):
        weights = reference.strength(maps, "last_blocks_mean", grid)
        expected = reference.token_contrast(tokens[image].double().numpy(), weights)
        np.testing.assert_allclose(found[image], expected, atol=1e-5)


@pytest.mark.parametrize("grid", [(3, 4), (5, 5), (6, 3)])
def test_token_pca_is_the_first_component_without_the_border(grid):
    tokens = torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(1))
    tokens[:, 1:-1, 1:-1] += 3 * torch.eye(8)[0]  # inner patches are alike
    found = attention_strength(RecordedScale([], grid, 0, tokens, tokens), "token_pca")
    assert STRENGTHS["token_pca"].reads_blocks == 0
    for image in range(2):
        flat = tokens[image].flatten(0, 1).double().numpy()
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        centered = unit - unit.mean(axis=0)
        values = (centered @ np.linalg.eigh(centered.T @ centered)[1][:, -1]).reshape(grid)
        border = values.sum() - values[1:-1, 1:-1].sum()
        expected = np.maximum(-values if border > 0 else values, 0)
        np.testing.assert_allclose(found[image], expected, atol=1e-5)
        assert expected[1:-1, 1:-1].mean() > expected.mean() and (expected == 0).any()
    same = torch.ones(1, *grid, 8)
    flat = attention_strength(RecordedScale([], grid, 0, same, same), "token_pca")
    assert torch.equal(flat, torch.zeros(1, *grid))


# --- the plain path, single blocks, and strengths of one's own ---------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bias_shape", BIASES)
def test_rows_times_a_block_are_a_matrix_product(bias_shape, heads, rows):
    bias = None if bias_shape is None else torch.randn(bias_shape)
    (block,) = random_blocks(10, depth=1, bias=bias)
    weights = torch.rand(2, heads, rows, 9)
    full = torch.tensor(np.array(probabilities([block]))[:, 0])
    expected = weights.double() @ full
    torch.testing.assert_close(multiply_rows(weights, block).double(), expected, atol=1e-6, rtol=0)
    with plain_path():
        plain = multiply_rows(weights, block)
    torch.testing.assert_close(plain.double(), expected, atol=1e-6, rtol=0)


def test_the_plain_path_gives_the_same_strength(family, backbone_of, images):
    blocks, _ = record(backbone_of(family), images())
    for name in ATTENTION:
        with plain_path():
            plain = strength_of(blocks, name, (3, 4))
        torch.testing.assert_close(strength_of(blocks, name, (3, 4)), plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bias_shape", BIASES)
@pytest.mark.parametrize("number", [1, 4])
def test_the_strength_of_a_single_block_or_head_is_a_row_or_mean_of_it(number, bias_shape):
    blocks = random_blocks(11, bias=None if bias_shape is None else torch.randn(bias_shape))
    for image, maps in enumerate(probabilities(blocks)):
        matrices = maps[number - 1]
        row = strength_of(blocks, single_block(number), class_index=1)[image]
        np.testing.assert_allclose(row.flatten(), matrices.mean(axis=0)[1, 1:], atol=1e-6)
        rows = strength_of(blocks, single_block(number, class_token=False))[image]
        expected = (matrices.mean(axis=0).mean(axis=0) + 1 / 9) / 2  # with the identity
        np.testing.assert_allclose(rows.flatten(), expected[1:], atol=1e-6)
        for head in (1, 3):
            one = strength_of(blocks, single_block(number, head), class_index=1)[image]
            np.testing.assert_allclose(one.flatten(), matrices[head - 1, 1, 1:], atol=1e-6)
    assert single_block(number) is single_block(number), "a key of what is remembered"


def refused(*arguments):
    """The one line with which a strength is refused."""
    with pytest.raises(InputError) as caught:
        attention_strength(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_strength_of_ones_own_is_a_function_or_a_file(tmp_path):
    blocks = random_blocks(12)

    def norms(recorded):
        assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        norm = recorded.blocks[0].key.double().norm(dim=-1).mean(dim=1)
        return norm[:, 1:].unflatten(1, recorded.grid)

    with torch.autocast("cpu", torch.bfloat16):
        found = strength_of(blocks, norms)
    expected = np.linalg.norm(blocks[0].key.numpy().astype(float), axis=-1).mean(axis=1)[:, 1:]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.flatten(1), expected, rtol=1e-6)
    code = "def norms(recorded):\n    norm = recorded.blocks[0].key.norm(dim=-1).mean(dim=1)\n"
    code += "    return norm[:, 1:].unflatten(1, recorded.grid)\n"
    (tmp_path / "ideas.py").write_text(code)
    torch.testing.assert_close(strength_of(blocks, f"{tmp_path}/ideas.py:norms"), found)


def test_a_strength_may_read_image_and_tokens_alone():
    recorded = RecordedScale([], (3, 2), 0, torch.rand(4, 3, 18, 12), torch.rand(4, 3, 2, 8))
    brightness = attention_strength(recorded, lambda r: F.avg_pool2d(r.image, 6).sum(dim=1))
    torch.testing.assert_close(brightness, F.avg_pool2d(recorded.image, 6).sum(dim=1))
    norms = attention_strength(recorded, lambda r: r.tokens.norm(dim=-1))
    torch.testing.assert_close(norms, recorded.tokens.norm(dim=-1))


@pytest.mark.parametrize(
    "given, words",
    [
        (torch.zeros(2, 8), "(2, 8)"),
        (torch.zeros(2, 4, 2), "(2, 4, 2)"),
        (torch.zeros(1, 2, 4), "(1, 2, 4)"),
        (np.zeros((2, 2, 4)), "ndarray"),
        (None, "NoneType"),
    ],
)
def test_a_strength_of_another_shape_or_type_is_refused(given, words, tmp_path):
    recorded = RecordedScale(random_blocks(13), (2, 4))

    def mine(_):
        return given

    message = refused(recorded, mine)
    assert "strength 'mine'" in message and words in message and "(B, h, w) = (2, 2, 4)" in message


def test_a_strength_in_a_file_that_gives_another_shape_is_refused_by_name(tmp_path):
    (tmp_path / "ideas.py").write_text("def rows(recorded):\n    return recorded.blocks[0].key\n")
    recorded = RecordedScale(random_blocks(13), (2, 4))
    message = refused(recorded, f"{tmp_path}/ideas.py:rows")
    assert "strength 'rows'" in message and "(2, 3, 9, 4)" in message
    assert "ideas.py has no function 'row'" in refused(recorded, f"{tmp_path}/ideas.py:row")
