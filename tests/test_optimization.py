"""The optimization step: gradients of the joint loss, and who is trained how much."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import draw_photos, tiny_config

from ramslib.backbone import extend_class_tokens
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.model import RAMSTrans, build_model
from ramslib.runs.run import read_metrics
from ramslib.training import learner, trainer
from ramslib.training.optimization import (
    backward_scales,
    create_optimizer,
    create_schedule,
    freeze,
    loss_weights,
)


@pytest.fixture
def model_of(backbone_of):
    """Function (family, scales) -> model with an opinionated classifier."""

    def make(family, scales=3):
        backbone = backbone_of(family)
        extend_class_tokens(backbone, scales)
        model = RAMSTrans(backbone, 5, scales, thresholds=(1.0,) * (scales - 1))
        torch.manual_seed(0)
        torch.nn.init.normal_(model.classifier.weight)
        return model.train()

    return make


def test_weights_of_the_losses():
    assert loss_weights("sum", 3) == [1, 1, 1]
    assert loss_weights("first", 3) == [1, 0, 0]
    assert loss_weights("last", 3) == [0, 0, 1]
    assert loss_weights((1.0, 0.5, 0.25), 2) == [1, 0.5]


@pytest.mark.parametrize("loss", ["sum", "first", "last", (1.0, 0.5, 0.0)])
@pytest.mark.parametrize("source", [False, True])
def test_scale_by_scale_gradients_are_those_of_the_joint_loss(model_of, images, loss, source):
    model, weights = model_of("dinov2"), loss_weights(loss, 3)
    batch, labels = images(4), torch.tensor([0, 1, 2, 4])
    large = images(4, (48, 64)) if source else None
    losses = backward_scales(model, batch, large, labels, weights, 0.1, factor=0.5)
    staged = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = model(batch, large)
    each = [F.cross_entropy(scale, labels, label_smoothing=0.1) for scale in output.logits]
    sum(0.5 * weight * one for weight, one in zip(weights, each, strict=True)).backward()
    torch.testing.assert_close(losses, torch.stack(each).detach())
    joint = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert staged.keys() == joint.keys() and len(joint) > 30
    for name in joint:
        torch.testing.assert_close(staged[name], joint[name], rtol=1e-4, atol=1e-6)


def test_only_one_scale_is_in_memory_at_a_time(model_of, images):
    """The second scale is asked for after the first one's gradients are there."""
    model, seen = model_of("vit", 2), []
    look = model.look
    model.look = lambda view, scale: seen.append(model.classifier.bias.grad) or look(view, scale)
    backward_scales(model, images(2), None, torch.tensor([0, 1]), [1.0, 1.0])
    assert seen[0] is None and seen[1] is not None


@pytest.mark.parametrize("strength", ["last_class", "rollout_mean"])
@pytest.mark.parametrize("loss", ["sum", "last"])
def test_checkpointing_changes_no_gradient(strength, loss):
    settings = {"backbone": "test_vit", "pretrained": "none", "image_size": 32, "drop_path": 0.1}
    settings |= {"highres_size": None, "strength": strength}
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    steps, count = [], []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        model, _ = build_model(Config(**settings, grad_checkpointing=grad_checkpointing), 5)
        torch.nn.init.normal_(model.classifier.weight)
        calls = []
        model.backbone.blocks[0].register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        labels, weights = torch.tensor([0, 1, 2, 4]), loss_weights(loss, 2)
        losses = backward_scales(model.train(), images, None, labels, weights)
        steps.append([losses, *(parameter.grad for parameter in model.parameters())])
        count.append(len(calls))
    assert count == [2, 2 + sum(map(int, loss_weights(loss, 2)))], "computed again where trained"
    for one, other in zip(*steps, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_gradients_are_shared_once_a_step(tmp_path, monkeypatch):
    shared = []
    monkeypatch.setattr(learner, "average_gradients", lambda *given: shared.append(given))
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
    with pytest.raises(InputError, match="frozen_blocks is 4, but the backbone has 3 blocks"):
        freeze(model, 4)


def test_class_tokens_of_frozen_blocks_learn_to_differ(model_of, images):
    """Equal tokens give equal features at every scale: one token, twice as a key."""
    model, batch, labels = model_of("dinov2", 2), images(2), torch.tensor([0, 1])
    freeze(model, 2)
    first, second = (model.look(batch, scale)[0] for scale in (0, 1))
    torch.testing.assert_close(first, second)
    optimizer = create_optimizer(model, Config(learning_rate=0.01))
    backward_scales(model, batch, None, labels, [1.0, 1.0])
    optimizer.step()
    first, second = (model.look(batch, scale)[0] for scale in (0, 1))
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


def test_an_unknown_optimizer_is_told(model_of):
    with pytest.raises(InputError, match="optimizer 'adamx' cannot be made"):
        create_optimizer(model_of("vit"), Config(optimizer="adamx"))
