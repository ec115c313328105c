"""One frozen configuration for a run: every setting, its default, its limits and the reason.

Patch size and grid are not here: they are read from the backbone. Settings to start from are in
``presets.toml``. Where a setting takes a registered name it also takes one of your own, as
``path/to/file.py:name`` (`ramslib.extensions`).
"""

import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ramslib.errors import InputError, input_errors, nearest
from ramslib.extensions import is_reference, locate_sources

if TYPE_CHECKING:  # importing pandas takes a third of a second
    import pandas as pd

Pixels = int | tuple[int, int]  # one side, or (height, width)
SMALLEST = 1e-12  # of what must be above 0


def within(default: Any, low: float, high: float) -> Any:
    """A field with its default and the range [low, high] of its numbers."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run."""

    # data
    data: str = "diagnostic"  # a key of datasets.READERS, or a reader of your own
    root: str = "data/diagnostic"  # folder of that dataset
    image_size: Pixels = within(112, 1, 8192)  # input of scale 1
    # input of further scales: one side, or one per proposal; None: image_size
    region_size: int | tuple[int, ...] | None = within(None, 1, 8192)
    highres_size: Pixels | None = within(336, 1, 8192)  # crops are cut here; None: previous crop
    crop_fraction: float = within(0.875, 0.1, 1)  # random and center crop; the paper's is 448/600
    augment: str = "flip"  # none, flip, autoaugment, or a timm string such as rand-m9-mstd0.5
    normalization: Literal["backbone", "imagenet"] = "backbone"  # whose pixel mean and std
    validation_fraction: float = within(0.15, 0, 0.5)  # of train, per class
    test_fraction: float = within(0.2, 0.01, 0.9)  # of folders without a test split, per class
    lists: str = ""  # folder of split.csv, exclude.csv and groups.csv; by default root
    year: int = within(2017, 2017, 2021)  # of iNaturalist
    allow_missing: bool = False  # leave missing images out instead of refusing the dataset
    # loader processes per training process; None: one, or the cores where a GPU waits
    workers: int | None = within(None, 0, 512)

    # model
    model: str = "rams"  # rams, transfg, vit (stored as rams with one scale), or your own
    backbone: str = "vit_small_patch14_dinov2"  # any timm Vision Transformer
    pretrained: str = "auto"  # auto, hub, offline, none, or a file (ramslib.weights)
    pos_embed_resize: Literal["timm", "zoom"] = "timm"  # of a file's position grid; release: zoom
    final_norm: bool = True  # load the final LayerNorm; the release does not
    scales: int = within(2, 1, 16)  # 1 is a plain ViT
    strength: str = "last_class"  # see docs/results.md for others; release: rollout_mean
    threshold: float | tuple[float, ...] = within(1.0, -1e6, 1e6)  # eta, or one per proposal
    proposal: str = "attention"  # a key of dppm.PROPOSALS, or your own
    upsampling: int = within(1, 1, 16)  # of the strength before threshold and box
    margin: float = within(0.0, 0, 10)  # around the box, a share of its sides
    keep_aspect: bool = False  # the box grows to the shape of the image
    class_token: Literal["shared", "per_scale"] = "shared"  # paper: per_scale, slow when frozen
    legacy_boxes: bool = False  # shift boxes as the released code does
    align_corners: bool = False  # of the crop's resize; the release has True
    drop_path: float = within(0.0, 0, 0.99)  # stochastic depth, timm's
    dropout: float = within(0.0, 0, 0.99)  # of embeddings and MLPs, not attention; paper: 0.1
    patch_stride: int | None = within(None, 1, 8192)  # pixels; patches overlap (TransFG: 12)
    grad_checkpointing: bool = False  # compute blocks again in the backward pass: less memory

    # objective
    # sum over scales (paper's figure 2), first (release), last, one weight per scale (1,0.5), or
    # a loss of your own
    loss: str | tuple[float, ...] = within("sum", 0, 1e6)
    label_smoothing: float = within(0.0, 0, 0.99)
    contrastive_weight: float = within(1.0, 0, 1e6)  # TransFG: of its contrastive loss
    contrastive_margin: float = within(0.4, -1, 1)  # TransFG: largest cosine that costs nothing

    # optimization
    epochs: int = within(3, 1, 10**6)
    steps: int = within(0, 0, 10**9)  # number of steps whatever the epochs; 0: epochs decide
    batch_size: int = within(16, 1, 10**6)  # images per step over all processes
    sampling: Literal["stratified", "random"] = "stratified"  # order of an epoch; paper: random
    grad_accum_steps: int = within(1, 1, 10**6)  # micro-batches per step
    optimizer: str = "adamw"  # any timm optimizer name
    learning_rate: float = within(6e-5, SMALLEST, 1e3)  # 4e-5 learns less in three epochs
    weight_decay: float = within(0.05, 0, 100)
    momentum: float = within(0.9, 0, 0.9999)  # of SGD; AdamW keeps its own betas
    head_lr_scale: float = within(10.0, SMALLEST, 1e6)  # of the classifier, which starts at zero
    layer_decay: float = within(1.0, 0.01, 1)  # learning-rate factor per block, last to first
    warmup_steps: int = within(20, 0, 10**9)  # linear, then cosine to 0, by step
    clip_grad_norm: float = within(1.0, 0, 1e6)  # 0 switches clipping off
    frozen_blocks: int = within(8, 0, 1000)  # first ones that are not trained; patch embedding, too
    # of training and of the probe's features; auto: bf16 where the device computes with it
    amp: Literal["auto", "none", "bf16", "fp16"] = "auto"
    compile: bool = False  # the encoder's blocks by torch.compile, in training; a minute at first
    ema_decay: float = within(0.0, 0, 0.99999)  # 0 switches the moving average off
    patience: int = within(0, 0, 10**6)  # epochs without a better validation loss; 0: never stop
    seed: int = within(0, 0, 2**32 - 1)

    @classmethod
    def names(cls) -> list[str]:
        """Field names in order."""
        return [each.name for each in fields(cls)]

    @classmethod
    def preset(cls, name: str, **changes) -> "Config":
        """The settings of a preset, a key of `PRESETS`, with some changed."""
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls().replace(**PRESETS[name]).replace(**changes)

    @classmethod
    def from_file(cls, path: Path | str) -> "Config":
        """Read a configuration: a JSON object with some of the fields, or a run's config.json."""
        path = Path(path)
        with input_errors(f"{path}: not a JSON object of settings", "correct it"):
            if not isinstance(values := json.loads(path.read_text()), dict):
                raise InputError(f"found {type(values).__name__}")
            if isinstance(values.get("config"), dict):
                values = locate_sources(values["config"], path.parent)
            return cls().replace(**current_names(values))

    def replace(self, **changes) -> "Config":
        """A copy with some fields changed; strings are read as the field's type.

        Models of a single pass settle ``scales``. The plain Vision Transformer, ``vit``, is stored
        as ``rams`` with one scale: one model has one key, however it was asked for.

        Raises:
            InputError: an unknown name (the nearest one is named) or a value of the wrong kind.
        """
        read = {name: _read(name, value) for name, value in changes.items()}
        model = read.get("model", self.model)
        if model in SINGLE_PASS:
            if read.get("scales", 1) != 1:
                raise InputError(f"model {model!r} has a single scale; leave 'scales' at 1")
            read |= {"model": SINGLE_PASS[model], "scales": 1}
        config = replace(self, **read)
        _check_combinations(config)
        return config

    def thresholds(self) -> tuple[float, ...]:
        """One threshold per proposal: scales - 1 numbers."""
        count = self.scales - 1
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * count
        return given[:count]

    def loss_weights(self, scales: int) -> tuple[float, ...]:
        """Weight of each scale's cross entropy; a loss of your own counts them alike."""
        if isinstance(self.loss, tuple):
            return self.loss[:scales]
        chosen = {"first": [0], "last": [scales - 1]}.get(self.loss, range(scales))
        return tuple(float(scale in chosen) for scale in range(scales))

    def input_sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of the input of each scale."""
        first, sides = self.image_size, self.region_size
        first = (first, first) if isinstance(first, int) else first
        if not isinstance(sides, tuple):
            sides = (sides,) * (self.scales - 1)
        further = [first if side is None else (side, side) for side in sides]
        return (first, *further[: self.scales - 1])


def _read_toml(name: str) -> dict:
    return tomllib.loads(Path(__file__).with_name(name).read_text())


def _load_presets() -> dict[str, dict]:
    """The tables of presets.toml, each with those it is based on merged in."""
    presets: dict[str, dict] = {}
    for name, own in _read_toml("presets.toml").items():
        presets[name] = presets.get(own.pop("base", ""), {}) | own
    return presets


PRESETS = _load_presets()
RENAMED = _read_toml("renamed.toml")
SINGLE_PASS = {"transfg": "transfg", "vit": "rams"}  # name of a model: the name it is stored by
MODELS = ("rams", "transfg", "vit")
LOSSES = ("sum", "first", "last")


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their names and values of today, whatever version wrote them."""
    named = {RENAMED["settings"].get(name, name): value for name, value in values.items()}
    for name, renamed in RENAMED["values"].items():
        if isinstance(named.get(name), str):
            named[name] = renamed.get(named[name], named[name])
    return named


def current_columns(table: "pd.DataFrame") -> "pd.DataFrame":
    """A table of results, predictions or metrics with its columns' names of today."""
    old = {name: new for name, new in RENAMED["columns"].items() if new not in table}
    return table.rename(columns=old)


_HINTS = typing.get_type_hints(Config)
_RANGES = {each.name: each.metadata.get("range") for each in fields(Config)}


def _read(name: str, value: Any) -> Any:
    """One value as the type of the field it is for, within its limits."""
    if name not in _HINTS:
        hint = nearest(name.lower(), _HINTS, "docs/training.md lists all settings")
        raise InputError(f"unknown setting {name!r}; {hint}")
    hint = _HINTS[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    named = str in kinds or typing.get_origin(hint) is Literal
    if isinstance(value, str) and (not named or kinds[1:] and not value[:1].isalpha()):
        value = value if is_reference(value) else _parse(name, value)
    for kind in kinds:
        with suppress(ValueError):
            value = _convert(value, kind)
            break
    else:
        expected = " or ".join(map(_describe, kinds))
        raise InputError(f"setting {name!r} takes {expected}, not {_show(value)}")
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers if _RANGES[name] and not isinstance(value, str | None) else ():
        low, high = _RANGES[name]
        if not low <= number <= high:
            bounds = f"above 0 and at most {high:g}" if low == SMALLEST else f"{low:g} to {high:g}"
            raise InputError(f"setting {name!r} takes numbers {bounds}, not {_show(value)}")
    return value


def _parse(name: str, text: str) -> Any:
    """A value typed on a command line: JSON, or numbers with commas."""
    words = {"none": "null", "true": "true", "false": "false"}
    try:
        listed = "," in text and not text.startswith("[")
        return json.loads(words.get(text.lower(), f"[{text}]" if listed else text))
    except (ValueError, RecursionError):
        raise InputError(f"setting {name!r} cannot read {_show(text)}; correct it") from None


def _convert(value: Any, kind: Any) -> Any:
    """A value as a type of a field: lists become tuples, and whole numbers floats.

    Raises:
        ValueError: it is not of this type; bool is no number, and NaN and infinity are none.
    """
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list | tuple) and value:
        if items[-1] is ... or len(value) == len(items):
            return tuple(_convert(item, items[0]) for item in value)
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind is not float and type(value) is kind or origin is Literal and value in items:
        return value
    raise ValueError(kind)


def _describe(kind: Any) -> str:
    """A type in words."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of numbers" if ... in typing.get_args(kind) else "(height, width)"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(kind, "none")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}.. ({len(text):,} characters)"


def _check_combinations(config: Config) -> None:
    """Choices and combinations that no single type can express."""
    for name, known in (("model", MODELS), ("loss", LOSSES)):
        value = getattr(config, name)
        if isinstance(value, str) and value not in known and not is_reference(value):
            raise InputError(
                f"setting {name!r} is {_show(value)}; choose one of {', '.join(known)}, or give "
                "your own as path/to/file.py:name"
            )
    _check_count("threshold", config.threshold, config.scales - 1, "proposals")
    _check_count("region_size", config.region_size, config.scales - 1, "proposals")
    _check_count("loss", config.loss, config.scales, "scales")
    if isinstance(config.loss, tuple) and max(config.loss[: config.scales]) == 0:
        raise InputError(f"setting 'loss' is {config.loss}; one of the weights must be above 0")
    if config.compile and config.drop_path:
        raise InputError("'compile' makes blocks of one kind share code; use drop_path=0 with it")
    if config.patch_stride is not None and config.scales > 1:
        raise InputError("regions are cut along patches that tile; 'patch_stride' needs one scale")


def check_shares(config: Config, processes: int) -> None:
    """Check that a batch divides among processes and micro-batches.

    Raises:
        InputError: it does not.
    """
    shares = processes * config.grad_accum_steps
    if config.batch_size % shares:
        raise InputError(
            f"batch_size {config.batch_size} does not divide among {processes} processes "
            f"with {config.grad_accum_steps} micro-batches each; use a multiple of {shares}"
        )


def _check_count(name: str, given: Any, count: int, what: str) -> None:
    """A list of numbers has enough of them; more are not read, so that ``scales`` can vary."""
    if isinstance(given, tuple) and len(given) < count:
        raise InputError(
            f"setting {name!r} has {len(given)} numbers for {count} {what}; give one for each"
        )
