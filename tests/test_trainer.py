"""One step: micro-batches, the moving average, and the device that everything is on."""

from contextlib import nullcontext

import pytest
import torch
from tiny import draw_photos, tiny_config

from ramslib.distributed import Processes, process_group
from ramslib.errors import InputError
from ramslib.runs.folder import read_metrics
from ramslib.training.trainer import Trainer, train

LOSSES = """
import torch.nn.functional as F
import ramslib

def joint(outputs, labels):
    return sum(F.cross_entropy(output.logits, labels) for output in outputs)

@ramslib.per_scale
def staged(outputs, labels):
    return F.cross_entropy(outputs[-1].logits, labels)

def number(outputs, labels):
    return 1.0

def infinite(outputs, labels):
    return outputs[0].logits.sum() * float("inf")
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of three classes."""
    return draw_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def make(photos, tmp_path):
    """Function (device, **settings) -> trainer; every one starts from the same weights."""

    def make(device="cpu", **changes):
        config = tiny_config(photos, warmup_steps=0, **changes)
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run.mkdir()
        return Trainer(config, run, Processes(device=torch.device(device)))

    return make


def batches(count, size):
    """Micro-batches that hold the same images, however they are cut."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count * size, 3, 48, 48), generator=generator)
    labels = torch.arange(count * size) % 3
    for start in range(0, count * size, size):
        part = slice(start, start + size)
        yield {"pixels": pixels[part].byte(), "label": labels[part]}


def test_accumulated_micro_batches_are_one_batch(make):
    whole, parts = make(), make(grad_accum_steps=3)
    expected, norm, _ = whole.gradients(0, batches(1, 6))
    losses, other, _ = parts.gradients(0, batches(3, 2))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(other, norm)
    assert norm > whole.config.clip_grad_norm, "and it was clipped"
    found = [p.grad for p in whole.model.parameters() if p.grad is not None]
    joint = torch.cat([gradient.flatten() for gradient in found])
    assert joint.norm() == pytest.approx(whole.config.clip_grad_norm, rel=1e-4)
    for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-6)


def test_the_moving_average_follows_and_predicts(make):
    trainer = make(ema_decay=0.75, learning_rate=0.01)
    expected = trainer.model.classifier.weight.detach().clone()
    for step in range(3):
        trainer.train_step(step, batches(1, 6))
        expected = 0.75 * expected + 0.25 * trainer.model.classifier.weight.detach()
    model = trainer.eval_model()
    torch.testing.assert_close(model.classifier.weight, expected)
    assert not torch.allclose(model.classifier.weight, trainer.model.classifier.weight)
    assert not model.training
    assert make().eval_model().classifier.weight.shape == expected.shape


def test_a_stop_is_passed_on(make):
    trainer = make()
    assert trainer.train_step(0, batches(1, 6), True)[1] is True
    assert trainer.train_step(1, batches(1, 6), False)[1] is False


@pytest.mark.parametrize("name", ["joint", "staged"])
def test_a_loss_of_ones_own_trains_as_the_built_in_one(photos, tmp_path, name):
    (tmp_path / "losses.py").write_text(LOSSES)
    runs = []
    for loss in ("sum", f"{tmp_path}/losses.py:{name}"):
        config = tiny_config(photos, epochs=1, loss=loss)
        runs.append(train(config, tmp_path / f"run{len(runs)}"))
    columns = ["loss", "loss_1", "loss_2", "nll"]
    expected, found = (read_metrics(run)[columns].dropna(how="all") for run in runs)
    torch.testing.assert_close(
        *(torch.tensor(t.to_numpy()) for t in (found, expected)),
        rtol=1e-4,
        atol=1e-4,
        equal_nan=True,
    )


@pytest.mark.parametrize("name, why", [("number", "returns float"), ("infinite", "losses are")])
def test_a_loss_of_ones_own_that_cannot_train_is_one_line(photos, tmp_path, name, why):
    (tmp_path / "losses.py").write_text(LOSSES)
    with pytest.raises(InputError, match=why) as error:
        train(tiny_config(photos, loss=f"{tmp_path}/losses.py:{name}"), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_everything_goes_to_the_device_that_the_process_has(make, monkeypatch):
    """Tensors of the meta device refuse to meet those of another one."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # knows no meta
    whole = [[0, 0, 32, 32]]  # where to cut, and other proposals, depend on values: there are none
    monkeypatch.setattr(torch.Tensor, "tolist", lambda boxes: whole * len(boxes))
    trainer = make("meta", proposal="whole")
    losses = trainer._micro_batch(next(batches(1, 6)))
    assert losses.device.type == "meta" and losses.shape == (3,)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
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
