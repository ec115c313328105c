"""One step: micro-batches, the moving average, and the device that everything is on."""

from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_config

from ramslib.distributed import Processes, process_group
from ramslib.model import build_model
from ramslib.training.learner import Learner


def make(device="cpu", **changes):
    """A learner of a tiny model; every learner starts from the same weights."""
    config = tiny_config(".", warmup_steps=0, **changes)
    torch.manual_seed(0)
    model, _ = build_model(config, 3)
    return Learner(model, config, 10, Processes(device=torch.device(device)))


def batches(count, size):
    """Micro-batches that hold the same images, however they are cut."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count * size, 3, 48, 48), generator=generator)
    labels = torch.arange(count * size) % 3
    for start in range(0, count * size, size):
        part = slice(start, start + size)
        yield {"pixels": pixels[part].byte(), "label": labels[part]}


def test_accumulated_micro_batches_are_one_batch():
    whole, parts = make(), make(grad_accum_steps=3)
    expected, norm, _ = whole.gradients(0, batches(1, 6), False)
    losses, other, _ = parts.gradients(0, batches(3, 2), False)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(other, norm)
    assert norm > whole.config.clip_grad_norm, "and it was clipped"
    found = [p.grad for p in whole.model.parameters() if p.grad is not None]
    joint = torch.cat([gradient.flatten() for gradient in found])
    assert joint.norm() == pytest.approx(whole.config.clip_grad_norm, rel=1e-4)
    for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-6)


def test_the_moving_average_follows_and_predicts():
    learner = make(ema_decay=0.75, learning_rate=0.01)
    expected = learner.model.classifier.weight.detach().clone()
    for step in range(3):
        learner.gradients(step, batches(1, 6), False)
        learner.update()
        expected = 0.75 * expected + 0.25 * learner.model.classifier.weight.detach()
    predictor = learner.predictor()
    torch.testing.assert_close(predictor.classifier.weight, expected)
    assert not torch.allclose(predictor.classifier.weight, learner.model.classifier.weight)
    assert not predictor.training
    assert make().predictor().classifier.weight.shape == expected.shape


def test_a_stop_is_passed_on():
    learner = make()
    assert learner.gradients(0, batches(1, 6), True)[2] is True
    assert learner.gradients(0, batches(1, 6), False)[2] is False


def test_everything_goes_to_the_device_that_the_process_has(monkeypatch):
    """Tensors of the meta device refuse to meet those of another one."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # knows no meta
    whole = [[0, 0, 32, 32]]  # where to cut, and other proposals, depend on values: there are none
    monkeypatch.setattr(torch.Tensor, "tolist", lambda boxes: whole * len(boxes))
    learner = make("meta", proposal="whole")
    losses = learner._micro_batch(next(batches(1, 6)))
    assert losses.device.type == "meta" and losses.shape == (2,)
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    assert all(parameter.grad.device.type == "meta" for parameter in trained)


@pytest.mark.parametrize("gpus, place", [(0, "cpu"), (1, "cpu"), (2, "cuda:1"), (4, "cuda:1")])
def test_a_gpu_for_each_process_or_none_at_all(monkeypatch, gpus, place):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with process_group() as processes:
        assert processes.device == torch.device(place)
    assert chosen == ([torch.device(place)] if place != "cpu" else [])
