"""Accelerated forms: equal to the plain ones; recomputed gradients bit-identical, and less kept."""

import copy
import mmap
import platform
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from ramslib import acceleration
from ramslib.acceleration import (
    RecomputeEntry,
    compile_blocks,
    is_on,
    plain_path,
    selective_checkpointing,
    trim_heap,
)
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.model import ProposalSettings, RAMSTrans
from ramslib.training.optimization import backward_scales
from ramslib.transfg import TransFG

FAMILIES = ["vit", "dinov2", "dinov3", "eva", "beit"]


# --- the plain path ----------------------------------------------------------------------------


def joint_step(model, images):
    """Outputs of all scales, and the gradients of their cross entropies together."""
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.classifier.weight, generator=generator)
    outputs = list(model.iterate_scales(images))
    labels = torch.tensor([0, 2, 1])
    sum(model.loss(output, labels) for output in outputs).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected):
    """Equal boxes; strengths, logits and gradients equal to rounding."""
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one.boxes, other.boxes)
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)
        if one.strength is not None:
            torch.testing.assert_close(one.strength, other.strength, atol=1e-6, rtol=1e-4)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 10
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5 * largest, rtol=1e-3)


@pytest.mark.parametrize("strength", ["rollout_mean", "rollout_class"])
def test_the_plain_path_of_rams_trans_gives_the_same(strength, family, backbone_of, images):
    if strength == "rollout_class" and family in ("siglip", "average", "registers_average"):
        return
    settings = ProposalSettings((1.0, 1.1), strength, scales=3)

    def step():
        model = RAMSTrans(backbone_of(family), 3, settings, per_scale_token=False)
        return joint_step(model, images(3))

    with plain_path():
        plain = step()
    assert_same_step(step(), plain)
    boxes = torch.cat([output.boxes for output in plain[0]])
    assert len(boxes.unique(dim=0)) > 1, "not the whole image each time"


@pytest.mark.parametrize("family", ["vit", "qk_norm", "clip", "dinov2_registers", "deit3", "eva"])
def test_the_plain_path_of_transfg_gives_the_same(family, backbone_of, images):
    with plain_path():
        plain = joint_step(TransFG(backbone_of(family), 3), images(3))
    assert_same_step(joint_step(TransFG(backbone_of(family), 3), images(3)), plain)


def test_the_plain_path_computes_what_is_in_the_equations(backbone_of, images, monkeypatch):
    settings, seen = ProposalSettings(strength="rollout_mean"), []
    model = RAMSTrans(backbone_of("vit"), 3, settings, per_scale_token=False)
    model.backbone.blocks[-1].mlp.register_forward_hook(
        lambda _, inputs, output: seen.append(output.shape[1])
    )
    model.forward_preprocessed(images())
    with pytest.raises(KeyError), plain_path():
        with plain_path():
            assert not is_on()
        with monkeypatch.context() as patch:
            patch.setattr(acceleration, "multiply_rows_in_cache", None)  # must not be called
            model.forward_preprocessed(images())
        raise KeyError
    assert is_on()
    model.forward_preprocessed(images())
    assert seen == [1, 1, 13, 13, 1, 1], "class token, or class token and 12 patches"


# --- compiled blocks ---------------------------------------------------------------------------


KINDS = [("vit", None), ("vit", torch.bfloat16), ("dinov3", None)]
KINDS += [
    pytest.param(family, None, marks=pytest.mark.slow)
    for family in ("dinov2_registers", "siglip", "beit", "relpos_mlp", "grouped_query")
]


def steps_of(model, amp=None):
    """Two training steps on different images, then an evaluation of a copy on fewer of them."""
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.classifier.weight, generator=generator)
    pixels, labels = torch.rand(3, 3, 24, 32, generator=generator), torch.tensor([0, 2, 1])
    weights, losses = [1.0] * model.num_scales, []
    torch.manual_seed(0)  # of dropout
    for step in range(2):
        given = model.train(), pixels.roll(step, 0), labels, weights
        losses.append(backward_scales(*given, amp=amp))
    with torch.inference_mode():
        boxes = copy.deepcopy(model).eval()(pixels[:2]).boxes
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": torch.stack(losses), "boxes": torch.stack(boxes)} | gradients


def compiled_and_not(model, backend, amp=None):
    """`steps_of` a copy whose blocks are compiled, and of the model."""
    other = copy.deepcopy(model)
    compile_blocks(other.backbone, backend=backend)
    assert list(other.state_dict()) == list(model.state_dict())
    torch.compiler.reset()
    counters.clear()
    return steps_of(other, amp), steps_of(model, amp)


@pytest.mark.slow
@pytest.mark.parametrize("family, amp", KINDS)
def test_compiled_blocks_give_the_same_bits_and_are_compiled_once(family, amp, backbone_of):
    settings = ProposalSettings((1.0, 1.1), "rollout_mean", scales=3)
    model = RAMSTrans(backbone_of(family), 3, settings, per_scale_token=False)
    found, expected = compiled_and_not(model, "aot_eager", amp)
    assert len(expected) > 10 and all(found[name].equal(expected[name]) for name in expected)
    assert len(expected["boxes"].flatten(0, 1).unique(dim=0)) > 1, "not the whole image each time"
    assert counters["stats"]["unique_graphs"] == 2, "training and evaluation, for all blocks"


@pytest.mark.slow
def test_compiled_blocks_of_transfg_and_computed_again(backbone_of):
    found, expected = compiled_and_not(TransFG(backbone_of("vit"), 3), "aot_eager")
    assert all(found[name].equal(expected[name]) for name in expected)
    model = RAMSTrans(backbone_of("vit"), 3, per_scale_token=False)
    model.backbone.set_grad_checkpointing(True)
    found, expected = compiled_and_not(model, "aot_eager")
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_compiled_code_gives_the_same_to_rounding(backbone_of):
    settings = ProposalSettings(strength="rollout_mean")
    model = RAMSTrans(backbone_of("vit"), 3, settings, per_scale_token=False)
    found, expected = compiled_and_not(model, "inductor")
    assert found["boxes"].equal(expected["boxes"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert any(not found[name].equal(expected[name]) for name in expected), "it was compiled"


def test_what_cannot_be_compiled_is_one_line(backbone_of, images):
    def broken(graph, inputs):
        raise OSError("no compiler\nhere")

    backbone = backbone_of("vit")
    compile_blocks(backbone, backend=broken)
    with pytest.raises(InputError, match="no compiler here.*use compile=false") as error:
        backbone.forward_features(images())
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="use drop_path=0"):
        Config().replace(compile=True, drop_path=0.1)


# --- selective checkpointing -------------------------------------------------------------------


def gradients(model, images, amp=None):
    """Of a loss that depends on every output, without random numbers left over."""
    torch.manual_seed(3)
    with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        tokens = model.forward_features(images)
    model.zero_grad()
    tokens.float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_bit_identical(family, amp, backbone_of, images):
    model = backbone_of(family).train()
    expected = gradients(model, images(3), amp)
    with selective_checkpointing():
        found = gradients(model, images(3), amp)
    assert found.keys() == expected.keys() and len(found) > 10
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_backward_pass_may_run_outside(backbone_of, images):
    model = backbone_of("vit")
    with selective_checkpointing():
        inside = model.forward_features(images(2)).square().sum()
    outside = model.forward_features(images(2)).square().sum()
    found = torch.autograd.grad(inside, list(model.blocks.parameters()))
    expected = torch.autograd.grad(outside, list(model.blocks.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_between_the_two_is_respected(inplace, backbone_of, images):
    model = backbone_of("vit").train()
    for block in model.blocks:
        block.mlp.drop1 = nn.Dropout(0.3, inplace=inplace)
    expected = gradients(model, images(3))
    with selective_checkpointing():
        found = gradients(model, images(3))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("changed", ["input", "kept"])
def test_a_change_in_place_is_refused(changed):
    weight = torch.ones(3, 3, requires_grad=True)
    with selective_checkpointing():
        values = weight * 2
        output = F.linear(F.gelu(values) if changed == "input" else values, weight)
        values.add_(1)
    with pytest.raises(InputError, match="your code changed a tensor that the gradient needs"):
        output.sum().backward()


def test_another_view_of_an_output_is_not_taken_for_it():
    weight = torch.randn(4, 4, requires_grad=True)
    other = torch.randn(4, 4, requires_grad=True)

    def loss():
        output = F.gelu(weight)
        return (output.detach().view(torch.int32) * other).sum() + output.T.mul(other).sum()

    with selective_checkpointing():
        found = torch.autograd.grad(loss(), other)
    assert torch.equal(found[0], torch.autograd.grad(loss(), other)[0])


def kept_bytes(model, images):
    """What the graph of a forward pass holds, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        model.forward_features(images).sum()
    return sum(held.values())


def test_outputs_of_norms_and_gelus_are_not_kept(backbone_of, images, monkeypatch):
    model, left_out, outputs = backbone_of("vit"), [], []
    before = kept_bytes(model, images(4))
    for block in model.blocks:
        for part in (block.norm1, block.norm2, block.mlp.act):
            part.register_forward_hook(lambda *call: outputs.append(weakref.ref(call[2])))
    pack = selective_checkpointing._pack

    def count(self, tensor):
        kept = pack(self, tensor)
        left_out.append(tensor.nbytes if isinstance(kept, RecomputeEntry) else 0)
        return kept

    monkeypatch.setattr(selective_checkpointing, "_pack", count)
    with selective_checkpointing():
        loss = model.forward_features(images(4)).sum()
    assert sum(map(bool, left_out)) == len(outputs) == 3 * len(model.blocks)
    assert sum(left_out) > 0.3 * before
    assert all(output() is None for output in outputs)
    loss.backward()


def test_nothing_is_remembered_that_is_gone(backbone_of, images):
    model = backbone_of("vit").train()
    model.set_grad_checkpointing(True)
    with selective_checkpointing() as mode:
        model.forward_features(images(2))
        assert not mode.alive


def test_frozen_blocks_leave_nothing_behind(backbone_of, images):
    model, seen = backbone_of("vit").requires_grad_(False), []
    with selective_checkpointing() as mode:
        model.blocks[0].norm1.register_forward_hook(lambda *call: seen.append(len(mode.alive)))
        model.forward_features(images(2))
    assert seen == [0]


def test_the_heap_is_trimmed_whenever_that_many_bytes_were_kept(backbone_of, images, monkeypatch):
    model, trims = backbone_of("vit"), []
    monkeypatch.setattr(acceleration, "trim_heap", lambda: trims.append(1))
    with selective_checkpointing() as mode:
        model.forward_features(images(4))
    kept = mode.kept
    assert trims == [] and 10_000 < kept < acceleration.TRIMMED
    monkeypatch.setattr(acceleration, "TRIMMED", kept // 5)
    with selective_checkpointing() as mode:
        model.forward_features(images(4))
    assert 3 <= len(trims) <= 5 and mode.kept < kept // 5
    with torch.device("meta"):  # other devices have allocators of their own
        weight = torch.ones(1000, 1000, requires_grad=True)
    with selective_checkpointing() as mode:
        (weight * weight).sum()
    assert mode.kept == 0


def resident():
    """Megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE / 1e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_trimming_returns_holes_between_what_is_kept():
    del [torch.zeros(16 * 2**18) for _ in range(2)][:]  # from now on, 1 MiB comes from the heap
    tensors = [torch.ones(2**18) for _ in range(200)]
    kept = tensors[::2]
    del tensors
    before = resident()
    trim_heap()
    assert before - resident() > 80
    assert all(tensor.eq(1).all() for tensor in kept)


def test_trimming_is_left_out_on_other_systems(monkeypatch):
    monkeypatch.setattr(acceleration.sys, "platform", "win32")
    monkeypatch.setattr(acceleration.ctypes, "CDLL", None)  # must not be asked
    trim_heap()
