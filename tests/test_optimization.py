"""The optimization step: gradients of the joint loss, and who is trained how much."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import draw_photos, tiny_config

from ramslib import distributed
from ramslib.backbone import extend_class_tokens
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.extensions import per_scale
from ramslib.model import ProposalSettings, RAMSTrans, build_model
from ramslib.runs.folder import read_metrics
from ramslib.training import trainer
from ramslib.training.optimization import (
    FUSED,
    backward_scales,
    create_optimizer,
    create_schedule,
    freeze,
)


@pytest.fixture
def model_of(backbone_of):
    """Function (family, scales) -> model with an opinionated classifier."""

    def make(family, scales=3):
        backbone = backbone_of(family)
        extend_class_tokens(backbone, scales)
        model = RAMSTrans(backbone, 5, ProposalSettings((1.0,) * max(1, scales - 1), scales=scales))
        torch.manual_seed(0)
        torch.nn.init.normal_(model.classifier.weight)
        return model.train()

    return make


@pytest.fixture
def pixels():
    """Function (count, size) -> (B, 3, H, W) uint8 noise."""

    def make(count, size=(24, 32)):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)

    return make


def gradients(model):
    """Gradients by name; cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys() and len(found) > 30
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


LABELS = torch.tensor([0, 1, 2, 4])


def sum_of_cross_entropies(outputs, labels):
    return sum(F.cross_entropy(output.logits, labels) for output in outputs)


@per_scale
def staged_sum(outputs, labels):
    return F.cross_entropy(outputs[-1].logits, labels)


def ranking(outputs, labels, margin=0.05):
    """RA-CNN: each scale shall be more confident of the true class than the one before."""
    true = [output.logits.softmax(dim=1).gather(1, labels[:, None]) for output in outputs]
    pairs = zip(true, true[1:], strict=False)
    ranks = sum((a - b + margin).clamp(min=0).mean() for a, b in pairs)
    return sum_of_cross_entropies(outputs, labels) + ranks


@per_scale
def staged_ranking(outputs, labels):
    assert not any(output.logits.requires_grad for output in outputs[:-1])
    return ranking(outputs[-2:], labels) - sum_of_cross_entropies(outputs[-2:-1], labels)


def test_weights_of_the_losses():
    assert Config(loss="sum").loss_weights(3) == (1, 1, 1)
    assert Config(loss="first").loss_weights(3) == (1, 0, 0)
    assert Config(loss="last").loss_weights(3) == (0, 0, 1)
    assert Config(loss=(1.0, 0.5, 0.25)).loss_weights(2) == (1, 0.5)
    assert Config(loss="ideas.py:mine").loss_weights(2) == (1, 1)


@pytest.mark.parametrize("loss", ["sum", "first", "last", (1.0, 0.5, 0.0)])
@pytest.mark.parametrize("size", [(24, 32), (48, 64)])
def test_scale_by_scale_gradients_are_those_of_the_joint_loss(model_of, pixels, loss, size):
    model, weights, batch = model_of("dinov2"), Config(loss=loss).loss_weights(3), pixels(4, size)
    losses = backward_scales(model, batch, LABELS, weights, 0.1, factor=0.5)
    staged = gradients(model)
    each = [F.cross_entropy(s, LABELS, label_smoothing=0.1) for s in model(batch).logits]
    total = sum(weight * one for weight, one in zip(weights, each, strict=True))
    (0.5 * total).backward()
    torch.testing.assert_close(losses, torch.stack([total, *each]).detach())
    assert_same_gradients(staged, gradients(model))


@pytest.mark.parametrize("loss", [sum_of_cross_entropies, staged_sum])
def test_a_loss_of_ones_own_that_is_the_sum_gives_its_gradients(model_of, pixels, loss):
    model, batch = model_of("vit"), pixels(4)
    expected = backward_scales(model, batch, LABELS, [1.0] * 3, factor=2.0)
    gradient = gradients(model)
    torch.testing.assert_close(backward_scales(model, batch, LABELS, loss, factor=2.0), expected)
    assert_same_gradients(gradients(model), gradient)


def test_a_joint_loss_couples_scales_and_a_staged_one_sees_earlier_scales_as_constants(
    model_of, pixels
):
    model, batch = model_of("vit"), pixels(4)
    losses = backward_scales(model, batch, LABELS, ranking)
    joint = gradients(model)
    outputs = list(model.forward_scales(batch))
    value = ranking(outputs, LABELS)
    value.backward()
    each = [F.cross_entropy(output.logits, LABELS) for output in outputs]
    torch.testing.assert_close(losses, torch.stack([value, *each]).detach())
    assert_same_gradients(joint, gradients(model))
    torch.testing.assert_close(backward_scales(model, batch, LABELS, staged_ranking), losses)
    staged = gradients(model)
    assert not torch.allclose(staged["classifier.weight"], joint["classifier.weight"], rtol=1e-3)


RETURNS = {
    "shape \\(4,\\)": lambda outputs, labels: outputs[0].logits.sum(dim=1),
    "shape \\(\\)": lambda outputs, labels: outputs[0].logits.detach().sum(),
    "float": lambda outputs, labels: 1.5,
    "NoneType": lambda outputs, labels: None,
}


@pytest.mark.parametrize("found", RETURNS)
@pytest.mark.parametrize("mark", [per_scale, lambda loss: loss])
def test_a_loss_that_returns_something_else_is_refused(model_of, pixels, found, mark):
    loss = mark(lambda outputs, labels: RETURNS[found](outputs, labels))
    with pytest.raises(InputError, match=f"returns {found}; it must return a scalar tensor"):
        backward_scales(model_of("vit", 2), pixels(4), LABELS, loss)


@pytest.mark.parametrize("loss", [[1.0, 1.0], staged_sum])
def test_only_one_scale_is_in_memory_at_a_time(model_of, pixels, loss):
    """The second scale runs after the first one's gradients are there."""
    model, seen = model_of("vit", 2), []
    run_scale = model.run_scale

    def run(*given):
        seen.append(model.classifier.bias.grad is not None)
        return run_scale(*given)

    model.run_scale = run
    backward_scales(model, pixels(4), LABELS, loss)
    assert seen == [False, True]
    model.zero_grad()
    backward_scales(model, pixels(4), LABELS, sum_of_cross_entropies)
    assert seen[2:] == [False, False]


@pytest.mark.parametrize("strength", ["last_class", "rollout_mean"])
@pytest.mark.parametrize("loss", ["sum", "last"])
def test_checkpointing_changes_no_gradient(pixels, strength, loss):
    settings = {"backbone": "test_vit", "pretrained": "none", "image_size": 32, "drop_path": 0.1}
    settings |= {"highres_size": None, "strength": strength}
    steps, count = [], []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(Config(**settings, grad_checkpointing=grad_checkpointing), 5)
        torch.nn.init.normal_(model.classifier.weight)
        calls = []
        model.backbone.blocks[0].register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        weights = Config(loss=loss).loss_weights(2)
        losses = backward_scales(model.train(), pixels(4, (32, 32)), LABELS, weights)
        steps.append([losses, *(parameter.grad for parameter in model.parameters())])
        count.append(len(calls))
    assert count == [2, 2 + sum(map(int, weights))], "computed again where trained"
    for one, other in zip(*steps, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_gradients_are_shared_once_a_step(tmp_path, monkeypatch):
    shared = []
    monkeypatch.setattr(distributed, "average_gradients", lambda *given: shared.append(given))
    config = tiny_config(draw_photos(tmp_path / "photos"), grad_accum_steps=3, epochs=1, scales=3)
    run = trainer.train(config, tmp_path / "run")
    assert len(shared) == (read_metrics(run)["split"] == "train").sum() > 1


def test_freezing_trains_the_upper_blocks_and_what_follows(model_of):
    model = model_of("dinov2", 1)
    freeze(model, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        n.startswith(("backbone.blocks.2.", "backbone.norm.", "classifier")) for n in trained
    )
    assert {
        "classifier.weight",
        "backbone.norm.weight",
        "backbone.blocks.2.attn.qkv.weight",
    } <= trained
    freeze(model := model_of("dinov2"), 0)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(
        InputError, match="frozen_blocks is 4, but the backbone has 3 blocks; use 3"
    ):
        freeze(model, 4)


def test_class_tokens_of_frozen_blocks_learn_to_differ(model_of, images, pixels):
    """Equal tokens give equal features at every scale: one token, twice as a key."""
    model, inputs = model_of("dinov2", 2), images(4)
    freeze(model, 2)
    first, second = (model.run_scale(inputs, scale)[0] for scale in (0, 1))
    torch.testing.assert_close(first, second)
    optimizer = create_optimizer(model, Config(learning_rate=0.01))
    backward_scales(model, pixels(4), LABELS, [1.0, 1.0])
    optimizer.step()
    first, second = (model.run_scale(inputs, scale)[0] for scale in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "dinov3", "eva02"])
def test_layer_decay_sees_the_blocks(model_of, family):
    model = model_of(family, 2)
    config = Config(learning_rate=0.1, layer_decay=0.5, weight_decay=0.05, head_lr_scale=3.0)
    optimizer = create_optimizer(model, config)
    create_schedule(optimizer, 0, 10).step_update(0)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates["classifier.weight"] == rates["classifier.bias"] == pytest.approx(0.3)
    assert rates["backbone.norm.weight"] == rates["backbone.blocks.2.attn.proj.weight"]
    for block in range(3):
        assert rates[f"backbone.blocks.{block}.attn.proj.weight"] == pytest.approx(
            0.1 / 2 ** (3 - block)
        )
    assert rates["backbone.cls_token"] == pytest.approx(0.1 / 16)
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(0.1 / 16)
    assert len(rates) == len(names)


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_tokens_norms_and_biases_do_not_decay(model_of, layer_decay):
    model = model_of("vit", 2)
    optimizer = create_optimizer(model, Config(weight_decay=0.05, layer_decay=layer_decay))
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name in (
        "backbone.cls_token",
        "backbone.pos_embed",
        "classifier.bias",
        "backbone.norm.weight",
    ):
        assert decays[name] == 0, name
    assert decays["classifier.weight"] == decays["backbone.blocks.0.mlp.fc1.weight"] == 0.05


@pytest.mark.parametrize("warmup, total", [(5, 20), (0, 10), (500, 10), (1, 1), (3, 7)])
def test_the_schedule_warms_up_and_follows_a_cosine(warmup, total):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    schedule, rates = create_schedule(optimizer, warmup, total), []
    for step in range(total):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    warmup = min(warmup, total // 2)
    expected = [0.4 * step / warmup for step in range(warmup)]
    expected += [
        0.2 * (1 + math.cos(math.pi * step / (total - warmup))) for step in range(total - warmup)
    ]
    assert rates == pytest.approx(expected)
    schedule.step_update(0)
    assert optimizer.param_groups[0]["lr"] == rates[0], "a function of the step alone"


def test_a_training_of_one_step_needs_no_warning(caplog):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    for warmup, total in ((0, 1), (500, 2), (1, 2)):
        create_schedule(optimizer, warmup, total)
    assert caplog.text == ""


def test_muon_trains_matrices_of_the_blocks_and_adamw_the_rest(model_of, pixels):
    model = model_of("vit", 2)
    optimizer = create_optimizer(model, Config(optimizer="muon"))
    backward_scales(model, pixels(4), LABELS, [1.0, 1.0])
    optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    chosen = {names[p]: state["use_muon"] for p, state in optimizer.state.items()}
    by_muon = {name for name in chosen if chosen[name]}
    assert by_muon == {
        "backbone.patch_embed.proj.weight",
        *(name for name in chosen if ".blocks." in name and model.get_parameter(name).ndim == 2),
    }


def test_an_unknown_optimizer_is_refused(model_of):
    with pytest.raises(InputError, match="optimizer 'adamx' cannot be made.*; choose"):
        create_optimizer(model_of("vit"), Config(optimizer="adamx"))


@pytest.mark.parametrize("name", FUSED)
def test_optimizers_of_torch_have_one_kernel_on_a_gpu(model_of, monkeypatch, name):
    """The kernels exist on CPUs as well, where they are not used: they round differently."""
    model, config = model_of("vit"), Config(optimizer=name)
    assert {group.get("fused") for group in create_optimizer(model, config).param_groups} == {None}
    monkeypatch.setattr(type(model.classifier.weight), "is_cuda", True)
    assert all(group["fused"] for group in create_optimizer(model, config).param_groups)
    assert create_optimizer(model, Config(optimizer="lion")).param_groups
