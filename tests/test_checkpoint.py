"""Checkpoints: whole or not at all, exact, and nothing in them is executed."""

import json
import math
import os
import pickle
import resource
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from ramslib.errors import InputError, write_atomically, write_table
from ramslib.runs.checkpoint import (
    TrainState,
    load_module,
    read_checkpoint,
    restore,
    save_checkpoint,
)


def tiny_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))


def train_some(model, optimizer, steps, ema=None):
    for step in steps:
        batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
        if ema:
            ema.update(model)


# numbers per parameter (adabelief, nadamlegacy), per group (lamb), several kinds of tensors
@pytest.mark.parametrize("name", "adamw sgd momentum lamb adabelief nadamlegacy adafactor".split())
def test_a_restored_training_goes_on_to_the_bit(name, tmp_path):
    options = {"opt": name, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.05}
    unbroken, first, second = tiny_model(), tiny_model(), tiny_model()
    train_some(unbroken, create_optimizer_v2(unbroken, **options), range(6))
    optimizer, ema = create_optimizer_v2(first, **options), ModelEmaV3(first, 0.9)
    train_some(first, optimizer, range(3), ema)
    save_checkpoint(tmp_path / "last.safetensors", TrainState(3), first, optimizer, ema.module)
    checkpoint = read_checkpoint(tmp_path / "last.safetensors")
    optimizer, other = create_optimizer_v2(second, **options), ModelEmaV3(second, 0.5)
    restore(checkpoint, second, optimizer, other.module)
    train_some(second, optimizer, range(3, 6))
    for expected, found in zip(unbroken.parameters(), second.parameters(), strict=True):
        assert expected.equal(found)
    for expected, found in zip(ema.parameters(), other.parameters(), strict=True):
        assert expected.equal(found)


def test_progress_comes_back(tmp_path):
    scaler = {"scale": 65536.0, "growth_interval": 2000}
    for best in (0.25, math.inf):
        progress = TrainState(7, 12.5, best, 3, scaler, "0123456789")
        save_checkpoint(tmp_path / "a.safetensors", progress, tiny_model())
        assert read_checkpoint(tmp_path / "a.safetensors").progress == progress


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, TrainState(key="0123456789"), tiny_model())
    for key in ("", "0123456789"):
        read_checkpoint(path, key)
    with pytest.raises(InputError, match="a.safetensors: a checkpoint of other settings or data"):
        read_checkpoint(path, "9876543210")


def test_progress_of_version_0_1_is_read(tmp_path):
    old = {"step": 7, "seconds": 12.5, "best_top1": 81.25, "best_epoch": 3, "scaler": {}}
    save_file({"model.a": torch.zeros(1)}, tmp_path / "a", {"progress": json.dumps(old)})
    found = read_checkpoint(tmp_path / "a", "0123456789").progress
    assert found == TrainState(7, 12.5, math.inf, 3)


def test_an_optimizer_that_no_checkpoint_can_hold_is_refused(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    train_some(model, torch.optim.SGD(model.parameters()), range(1))  # leaves a gradient
    optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    with pytest.raises(InputError, match="keeps a list as .*choose another optimizer"):
        save_checkpoint(tmp_path / "a.safetensors", TrainState(), model, optimizer)


def test_another_model_or_optimizer_is_refused(tmp_path):
    model = tiny_model()
    optimizer = create_optimizer_v2(model, "lamb", weight_decay=0.05)
    train_some(model, optimizer, range(1))
    save_checkpoint(tmp_path / "a.safetensors", TrainState(), model, optimizer)
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="a.safetensors: does not fit .* model .*size mismatch"):
        load_module(nn.Sequential(nn.Linear(5, 8)), checkpoint, "model")
    with pytest.raises(InputError, match="a.safetensors: does not fit .* model .*Missing key"):
        load_module(tiny_model(), checkpoint, "ema")
    head = create_optimizer_v2(model[2], "lamb")
    assert len(head.param_groups) == 1 < len(optimizer.param_groups)
    with pytest.raises(InputError, match="a.safetensors: does not fit the optimizer"):
        restore(checkpoint, tiny_model(), head)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def damaged_files(folder):
    """Name -> a file that is no checkpoint."""
    save_checkpoint(folder / "sound.safetensors", TrainState(), tiny_model())
    sound = (folder / "sound.safetensors").read_bytes()
    made = {f"cut{length}": sound[:length] for length in (0, 1, 7, 8, 100, len(sound) - 1)}
    made |= {"longer": sound + b"0", "header": b"\xff" * 8 + sound[8:]}
    made |= {"pickle": pickle.dumps(Payload(folder / "executed"))}
    made |= {"text": b"no checkpoint", "zeros": bytes(1000)}
    made |= {"broken": bytes(byte ^ 0xFF for byte in sound[:50]) + sound[50:]}
    for name, content in made.items():
        (folder / name).write_bytes(content)
    torch.save({"model": Payload(folder / "executed")}, folder / "torch")
    (folder / "folder").mkdir()
    some = {"model.weight": torch.zeros(2)}
    save_file(some, folder / "foreign")
    for number, progress in enumerate(
        ("", "[]", '{"step": "x"}', '{"step": -1}', '{"stop": 1}', "[" * 99999)
    ):
        save_file(some, folder / f"progress{number}", {"progress": progress})
    return sorted(path for path in folder.iterdir() if path.name != "sound.safetensors")


def test_damaged_and_crafted_files_are_refused_and_never_executed(tmp_path):
    files = damaged_files(tmp_path)
    assert len(files) == 21
    for path in [*files, tmp_path / "missing"]:
        with pytest.raises(InputError) as error:
            read_checkpoint(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@contextmanager
def largest_file(size):
    """No file may grow beyond a size: what a full disk does to a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path, model = tmp_path / "last.safetensors", nn.Linear(100, 100)
    save_checkpoint(path, TrainState(1), model)
    before = path.read_bytes()
    with largest_file(10_000), pytest.raises(InputError, match="last.* intact, make room"):
        save_checkpoint(path, TrainState(2), model)
    with largest_file(10), pytest.raises(InputError, match="table.csv: cannot be written"):
        write_table(pd.DataFrame({"path": ["a" * 100]}), tmp_path / "table.csv")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(InputError, match="cannot be written"):
            save_checkpoint(folder / "last.safetensors", TrainState(), tiny_model())


def test_whoever_fails_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda part: part.write_text("first"))

    def fail(part):
        part.write_text("half")
        assert path.read_text() == "first"
        raise OSError("no more")

    with pytest.raises(InputError, match="no more"):
        write_atomically(path, fail)
    assert path.read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_files_can_be_read_by_those_who_may_enter_the_folder(tmp_path):
    for mode, expected in ((0o755, 0o644), (0o700, 0o600)):
        tmp_path.chmod(mode)
        save_checkpoint(tmp_path / "a.safetensors", TrainState(), tiny_model())
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == expected
    assert load_file(tmp_path / "a.safetensors").keys() >= {"model.0.weight"}


def test_names_of_any_encoding_are_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    write_table(pd.DataFrame({"path": [name]}), tmp_path / "table.csv")
    assert b"caf\xe9.jpg" in (tmp_path / "table.csv").read_bytes()
