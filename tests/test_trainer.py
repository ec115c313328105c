"""One step: micro-batches, the moving average, and the device that everything is on."""

import itertools
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny import draw_photos, same_run, tiny_config
from waits import THERE, CountWaits, Elsewhere

from ramslib import acceleration
from ramslib.distributed import Processes, deterministic, process_group
from ramslib.errors import InputError
from ramslib.runs.folder import read_metrics
from ramslib.training import optimization, trainer
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


def test_images_are_kept_only_where_they_are_read_again(make, monkeypatch):
    is_kept = lambda images, *_, **__: images.kept is not None  # noqa: E731
    monkeypatch.setattr("ramslib.distributed.load_batches", is_kept)
    found = [make(epochs=epochs).batches(range(1)) for epochs in (1, 2)]
    assert found == [False, sys.platform == "linux"]


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
    expected, found = whole.gradients(0, batches(1, 6)), parts.gradients(0, batches(3, 2))
    torch.testing.assert_close(found, expected)
    *_, norm, asked = expected
    assert len(expected) == 5 and asked == 0
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
    for step, stop in enumerate((True, False)):
        trainer.train_step(step, batches(1, 6), stop)
        assert trainer.stopping is stop


def is_next(numbers, wanted):
    """Whether the next number is the wanted one."""
    return next(numbers) == wanted


def test_a_run_is_compiled_stopped_and_resumed_without(photos, tmp_path, monkeypatch):
    """The backend only runs what was traced: results are equal to the last bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(photos, epochs=2, ema_decay=0.9), whole)
    compiled = []

    def compile_blocks(backbone):
        compiled.append(1)
        acceleration.compile_blocks(backbone, backend="aot_eager")

    monkeypatch.setattr(trainer, "compile_blocks", compile_blocks)
    parts.mkdir()
    for on, stop in ((True, 2), (False, 4), (True, None)):
        config = tiny_config(photos, epochs=2, ema_decay=0.9, compile=on)
        steps = itertools.count(1)
        asked = SimpleNamespace(is_set=partial(is_next, steps, stop))
        assert Trainer(config, parts, Processes()).fit(asked, 1e6) is (stop is None)
    same_run(whole, parts)
    assert len(compiled) == 2


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


@pytest.fixture
def move(monkeypatch):
    """Function (trainer) that moves it to a device of which `CountWaits` counts what waits for it.

    That device has neither autocast nor addresses, by which outputs to compute again are known.
    """
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(optimization, "selective_checkpointing", nullcontext)

    def move(trainer):
        for module in trainer.model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    moved = torch.nn.Parameter(Elsewhere(value.detach()), value.requires_grad)
                    module._parameters[name] = moved
            for name, value in module._buffers.items():
                module._buffers[name] = Elsewhere(value)
        trainer.processes = Processes(device=THERE)
        trainer.optimizer = optimization.create_optimizer(trainer.model, trainer.config)
        length = trainer.config.warmup_steps, trainer.total_steps
        trainer.schedule = optimization.create_schedule(trainer.optimizer, *length)

    return move


@pytest.mark.parametrize("changes", [{}, {"scales": 1}, {"scales": 3, "grad_accum_steps": 2}])
def test_a_step_waits_for_the_device_once_per_proposal_and_never_for_its_log(make, move, changes):
    steps, expected, trainer = range(3), make(**changes), make(**changes)
    micro_batches = trainer.config.grad_accum_steps
    for step in steps:
        expected.train_step(step, batches(micro_batches, 6 // micro_batches))
    with CountWaits() as waits:
        move(trainer)
        for step in steps:
            given = batches(micro_batches, 6 // micro_batches)
            waits.places.clear()
            trainer.train_step(step, given)
            assert len(read_metrics(trainer.run)) == step, "read one step later"
            assert len(waits.places) == micro_batches * (trainer.config.scales - 1), waits.places
        trainer.read_step()
    assert set(waits.places) <= {each for each in waits.places if each.startswith("dppm.py:")}
    columns = ["step", "loss", "grad_norm"]
    found, known = (read_metrics(each.run)[columns] for each in (trainer, expected))
    pd.testing.assert_frame_equal(found, known, rtol=1e-4)


def test_what_a_wait_is():
    there, flags = Elsewhere(torch.arange(3.0)), Elsewhere(torch.tensor([True, False, True]))
    for count, function in (
        (1, lambda: float(there.sum())),
        (1, lambda: bool(there.isfinite().all())),
        (1, there.cpu),
        (0, lambda: there.to("cpu", non_blocking=True)),
        (1, lambda: torch.ones(3).to(THERE)),
        (1, lambda: there.copy_(torch.ones(3))),
        (1, lambda: there[flags]),
        (0, lambda: (there + torch.full((), 0.5, device=THERE)).view(3, 1).mul_(2)),
    ):
        with CountWaits() as waits:
            function()
        assert len(waits.places) == count


def test_numbers_that_are_read_late_are_read_before_anything_is_saved(make):
    trainer = make()
    trainer.unread = 0, {}, lambda: torch.tensor([1.0, 1.0, float("nan"), 1.0, 0.0])
    with pytest.raises(InputError, match="losses are .*nan.* in epoch 1, step 1, on "):
        trainer._save(trainer.last)
    assert not trainer.last.exists()


def test_a_gpu_computes_the_same_bits_again_unless_an_operation_cannot(make):
    """Torch's switches, which exist without a GPU."""
    is_on, trainer = torch.are_deterministic_algorithms_enabled, make()
    backward, errors = trainer.backward, [RuntimeError("x has no deterministic implementation")]

    def fail_once(*args, **options):
        if errors:
            raise errors.pop()
        return backward(*args, **options)

    with deterministic(torch.device("cuda")):
        assert is_on() and not torch.utils.deterministic.fill_uninitialized_memory
        expected = trainer._micro_batch(next(batches(1, 6)))
        trainer.backward = fail_once
        with pytest.warns(UserWarning, match="will not be bit-identical: .*x has no"):
            losses = trainer._micro_batch(next(batches(1, 6)))
        assert losses.equal(expected) and not is_on()
    assert not is_on() and torch.utils.deterministic.fill_uninitialized_memory
    errors.append(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer._micro_batch(next(batches(1, 6)))
    with deterministic(torch.device("cpu")):
        assert not is_on()


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
