"""Checkpoints that survive a kill at any moment.

A checkpoint is one safetensors file: tensors (``model.*``, ``ema.*``, ``optimizer.*``) and the
scalars of the run as JSON in its header. It is written beside its final name and moved there in one
step, so a reader finds the old one or the new one, never half of one. Nothing is pickled.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ramslib.errors import InputError, input_errors, write_atomically

NUMBER = "=number"  # ends the name of a tensor that stands for a plain number


@dataclass
class TrainState:
    """How far a run is: the scalars of its checkpoints."""

    step: int = 0
    seconds: float = 0.0  # of training steps, without evaluation
    best_nll: float = math.inf  # of the last output on the validation split
    best_epoch: int = 0
    scaler: dict = field(default_factory=dict)  # of float16 loss scaling
    key: str = ""  # of settings and data; version 0.1 wrote none


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]
    progress: TrainState
    path: Path


def save_checkpoint(
    path: Path,
    progress: TrainState,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
) -> None:
    """Write model, and what training needs to resume, atomically to one file."""
    tensors = _named("model", model.state_dict())
    if ema is not None:
        tensors |= _named("ema", ema.state_dict())
    if optimizer is not None:
        for owner, slots in _optimizer_slots(optimizer.state_dict()):
            tensors |= _named(f"optimizer.{owner}", slots)
    metadata = {"progress": json.dumps(asdict(progress))}
    write_atomically(path, lambda part: save_file(tensors, part, metadata))


def _optimizer_slots(state: dict) -> Iterator[tuple[str, dict]]:
    """What an optimizer keeps per parameter, and the steps that some of timm's keep per group."""
    yield from state["state"].items()
    for number, group in enumerate(state["param_groups"]):
        yield f"group{number}", {key: group[key] for key in group if key == "step"}


def _named(prefix: str, values: dict) -> dict[str, Tensor]:
    """Values by full name; plain numbers become tensors, named so that they can come back."""
    named = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            named[f"{prefix}.{name}"] = value.detach().cpu().contiguous()
        elif isinstance(value, int | float):
            kind = torch.float64 if isinstance(value, float) else None
            named[f"{prefix}.{name}{NUMBER}"] = torch.tensor(value, dtype=kind)
        elif value is not None:
            raise InputError(
                f"this optimizer keeps a {type(value).__name__} as {name!r}, which no checkpoint "
                "can hold; choose another optimizer"
            )
    return named


def check_exists(*paths: Path) -> None:
    """Raise InputError for a checkpoint that is missing."""
    for path in paths:
        if not path.is_file():
            finished = (path.parent / "results.csv").exists()
            lost = "this run is finished: restore the file, or train in another folder"
            raise InputError(f"{path}: no such checkpoint; {lost if finished else 'train the run'}")


def read_checkpoint(path: Path, key: str = "") -> Checkpoint:
    """Read a checkpoint written by `save_checkpoint`.

    Args:
        path: the file.
        key: of the run that it should belong to, see `folder.run_key`.

    Raises:
        InputError: the file is missing, damaged, not a checkpoint of this library, or of a run with
            other settings or data.
    """
    check_exists(path)
    what, remedy = "not a checkpoint of this library, or damaged", "remove it to start again"
    with input_errors(f"{path}: {what}", f"{remedy}, or give another run"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            values = json.loads((file.metadata() or {})["progress"])
        values.pop("best_top1", None)  # what version 0.1 chose by
        progress = TrainState(**values)
        if min(progress.step, progress.best_epoch, progress.seconds) < 0:
            raise ValueError("its progress is negative")
    if key and progress.key not in ("", key):
        raise InputError(
            f"{path}: a checkpoint of other settings or data than config.json beside it; restore "
            "the files of one run, or choose another folder"
        )
    return Checkpoint(tensors, progress, path)


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
) -> None:
    """Put a checkpoint's tensors back where they came from.

    Raises:
        InputError: they are those of another model or optimizer.
    """
    load_module(model, checkpoint, "model")
    if ema is not None:
        load_module(ema, checkpoint, "ema")
    if optimizer is not None:
        what = f"{checkpoint.path}: does not fit the optimizer"
        with input_errors(what, "choose another folder"):
            optimizer.load_state_dict(_optimizer_state(optimizer, checkpoint))


def _optimizer_state(optimizer: Optimizer, checkpoint: Checkpoint) -> dict:
    state: dict[int, dict] = {}
    groups = optimizer.state_dict()["param_groups"]
    for name, tensor in _under("optimizer", checkpoint.tensors).items():
        owner, slot = name.split(".", 1)
        value = tensor.item() if slot.endswith(NUMBER) else tensor
        group = owner.startswith("group")
        slots = groups[int(owner[5:])] if group else state.setdefault(int(owner), {})
        slots[slot.removesuffix(NUMBER)] = value
    return {"state": state, "param_groups": groups}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def load_module(module: nn.Module, checkpoint: Checkpoint, part: str) -> None:
    """Load one part of a checkpoint, ``model`` or ``ema``, strictly.

    Raises:
        InputError: the checkpoint was made by a model of another shape.
    """
    remedy = "restore the files of one run, or choose another folder"
    with input_errors(f"{checkpoint.path}: does not fit the configured model", remedy):
        module.load_state_dict(_under(part, checkpoint.tensors))
