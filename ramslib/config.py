"""One frozen configuration for a run: every choice, its default, and the reason.

Patch size and grid are not here: they are read from the backbone. Named settings to start from are
in `ramslib.presets`.
"""

import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ramslib.errors import InputError
from ramslib.presets import PRESETS


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run."""

    # data
    data: str = "diagnostic"  # a key of readers.READERS
    root: str = "data/diagnostic"  # folder of that data set
    image_size: int | tuple[int, int] = 112  # input pixels of every scale; (height, width) allowed
    highres_size: int | tuple[int, int] | None = 336  # crops are cut here; None: the previous crop
    crop_fraction: float = 0.875  # training crop and test center crop; the paper's is 448/600
    augment: str = "flip"  # none, flip, autoaugment, or a timm string such as rand-m9-mstd0.5
    normalization: str = (
        "backbone"  # pixel mean and std of the backbone's pre-training, or imagenet
    )
    validation_fraction: float = 0.15  # of train, per class; the test split chooses nothing
    workers: int = 1  # loader processes per training process

    # model
    model: str = "rams"  # rams, transfg, or vit, which is stored as rams with one scale
    backbone: str = "vit_small_patch14_dinov2"  # any timm Vision Transformer
    pretrained: str = "auto"  # auto, hub, offline, none, or a file (ramslib.weights.sources)
    pos_embed_resize: str = "timm"  # how a file's position grid is resized: timm or zoom (released)
    final_norm: bool = True  # load the final LayerNorm; the released code does not
    scales: int = 2  # 1 is a plain ViT
    strength: str = "last_class"  # finds real birds best (README); released: rollout_mean
    threshold: float | tuple[float, ...] = 1.0  # eta, one number or one per proposal
    proposal: str = "attention"  # a key of dppm.PROPOSALS
    class_token: str = "shared"  # or per_scale (paper), which is slow: back through frozen blocks
    legacy_boxes: bool = False  # shift boxes as the released code does
    align_corners: bool = False  # of the crop's resize; the released code has True
    drop_path: float = 0.0  # stochastic depth, timm's
    dropout: float = 0.0  # of embeddings and MLPs, never of attention; the paper's is 0.1
    patch_stride: int | None = None  # pixels; below the patch size patches overlap (TransFG: 12)
    grad_checkpointing: bool = (
        False  # compute blocks again in the backward pass: slower, less memory
    )

    # objective
    # sum over scales (paper's figure 2), first (released), last, or one weight per scale: 1,0.5
    loss: str | tuple[float, ...] = "sum"
    label_smoothing: float = 0.0
    contrastive_weight: float = 1.0  # TransFG: of its contrastive loss
    contrastive_margin: float = 0.4  # TransFG: cosine below which two classes are far enough apart

    # optimization
    epochs: int = 3
    steps: int = 0  # train for so many, whatever the epochs; 0: epochs decide
    batch_size: int = 16  # images per step over all processes
    sampling: str = "stratified"  # every class evenly over an epoch (README); or random (paper)
    grad_accum_steps: int = 1  # micro-batches per step
    optimizer: str = "adamw"  # any timm optimizer name
    learning_rate: float = 6e-5  # at 4e-5, three epochs of the diagnostic set taught less
    weight_decay: float = 0.05
    momentum: float = 0.9  # of SGD; AdamW keeps its own betas
    head_lr_scale: float = 10.0  # learning-rate factor of the classifier, which starts from nothing
    layer_decay: float = 1.0  # learning-rate factor per block, from the last to the first
    warmup_steps: int = 20  # linear, then cosine to 0, by step
    clip_grad_norm: float = 1.0  # 0 switches clipping off
    frozen_blocks: int = 8  # first blocks (with the patch embedding) that are not trained
    amp: str = "none"  # none, bf16 or fp16
    ema_decay: float = 0.0  # 0 switches the moving average off
    patience: int = 0  # epochs without a better validation accuracy before stopping; 0: never
    seed: int = 0

    @classmethod
    def names(cls) -> list[str]:
        """Field names in order."""
        return [field.name for field in fields(cls)]

    @classmethod
    def preset(cls, name: str, **changes) -> "Config":
        """A named starting point, a key of `ramslib.presets.PRESETS`."""
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls().replace(**PRESETS[name]).replace(**changes)

    @classmethod
    def from_file(cls, path: Path | str) -> "Config":
        """Read a configuration: a JSON object with some of the fields, or a run's config.json."""
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: not a clean_class_name JSON configuration ({error})"
            ) from None
        if isinstance(values, dict) and isinstance(values.get("config"), dict):
            values = values["config"]
        if not isinstance(values, dict):
            raise InputError(f"{path}: a configuration is a JSON object of names and values")
        try:
            return cls().replace(**values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def replace(self, **changes) -> "Config":
        """A copy with some fields changed; strings are read as the field's type.

        A model that looks once settles ``scales``. The plain Vision Transformer, ``vit``, is stored
        as ``rams`` with one scale: one model has one key, however it was asked for.

        Raises:
            InputError: an unknown name (the nearest one is named) or a value of the wrong kind.
        """
        read = {name: _read(name, value) for name, value in changes.items()}
        model = read.get("model", self.model)
        if model in _LOOK_ONCE:
            if read.get("scales", 1) != 1:
                raise InputError(f"model {model!r} looks once; leave 'scales' at 1")
            read |= {"model": _LOOK_ONCE[model], "scales": 1}
        config = replace(self, **read)
        _check(config)
        return config

    def thresholds(self) -> tuple[float, ...]:
        """One threshold per proposal: scales - 1 numbers."""
        count = self.scales - 1
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * count
        return given[:count]


_LOOK_ONCE = {"transfg": "transfg", "vit": "rams"}  # as asked for: as stored
_CHOICES = {
    "model": ("rams", "transfg", "vit"),  # the keys of model.MODELS, and a word for one of them
    "class_token": ("per_scale", "shared"),
    "loss": ("sum", "first", "last"),
    "sampling": ("stratified", "random"),
    "amp": ("none", "bf16", "fp16"),
    "pos_embed_resize": ("timm", "zoom"),
    "normalization": ("backbone", "imagenet"),
}
_POSITIVE = ("image_size", "highres_size", "scales", "epochs", "batch_size", "grad_accum_steps")
_POSITIVE += ("learning_rate", "head_lr_scale", "patch_stride")
_NOT_NEGATIVE = ("workers", "weight_decay", "momentum", "warmup_steps", "clip_grad_norm")
_NOT_NEGATIVE += ("frozen_blocks", "patience", "seed", "steps", "contrastive_weight")
_LARGEST = {"image_size": 8192, "highres_size": 8192, "scales": 16, "workers": 512}
_LARGEST |= {"seed": 2**32 - 1}
_FRACTIONS = {
    "crop_fraction": (0.1, 1.0),
    "validation_fraction": (0.0, 0.5),
    "label_smoothing": (0.0, 0.99),
    "ema_decay": (0.0, 0.99999),
    "drop_path": (0.0, 0.99),
    "dropout": (0.0, 0.99),
    "layer_decay": (0.01, 1.0),
    "contrastive_margin": (-1.0, 1.0),
}


def _read(name: str, value):
    """One value as the type of the field it is for."""
    hints = typing.get_type_hints(Config)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown setting {name!r}; did you mean {near!r}?")
    hint = hints[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, str) and (str not in kinds or kinds[1:] and not value[:1].isalpha()):
        value = _parse(name, value)  # of a field that takes numbers, or names and numbers
    if isinstance(value, list):
        value = tuple(value)
    if type(value) is int and float in kinds and int not in kinds:  # a bool is no number
        value = float(value)
    bases = tuple(typing.get_origin(kind) or kind for kind in kinds)
    wrong_bool = isinstance(value, bool) and bool not in bases
    endless = isinstance(value, float) and not math.isfinite(value)
    if wrong_bool or endless or not isinstance(value, bases):
        expected = " or ".join(getattr(base, "__name__", str(base)) for base in bases)
        raise InputError(f"setting {name!r} takes {expected}, not {value!r}")
    if isinstance(value, tuple):
        kind = int if name.endswith("size") else float
        _check_items(name, value, kind)
        value = tuple(map(kind, value))
    return value


def _parse(name: str, text: str):
    """A value typed on a command line: JSON, or numbers with commas."""
    words = {"none": "null", "true": "true", "false": "false"}
    try:
        listed = "," in text and not text.startswith("[")
        return json.loads(words.get(text.lower(), f"[{text}]" if listed else text))
    except (ValueError, RecursionError):
        shown = text if len(text) < 50 else text[:50] + ".."
        raise InputError(f"setting {name!r} cannot read {shown!r}") from None


def _check_items(name: str, values: tuple, kind: type) -> None:
    plain = all(isinstance(v, (int, kind)) and not isinstance(v, bool) for v in values)
    numbers = plain and all(math.isfinite(v) for v in values)
    if not numbers or not values or (kind is int and len(values) != 2):
        what = "(height, width)" if kind is int else "a list of numbers"
        raise InputError(f"setting {name!r} takes {what}, not {values!r}")


def _check(config: Config) -> None:
    """Ranges and choices that no single type can say."""
    for name, allowed in _CHOICES.items():
        value = getattr(config, name)
        if isinstance(value, str) and value not in allowed:
            raise InputError(f"setting {name!r} is {value!r}; choose one of {', '.join(allowed)}")
    for name in _POSITIVE + _NOT_NEGATIVE:
        value = getattr(config, name)
        lowest = min(value) if isinstance(value, tuple) else value
        if lowest is not None and (lowest < 0 or lowest == 0 and name in _POSITIVE):
            floor = "above 0" if name in _POSITIVE else "0 or more"
            raise InputError(f"setting {name!r} must be {floor}, not {value}")
    for name, largest in _LARGEST.items():
        value = getattr(config, name)
        highest = max(value) if isinstance(value, tuple) else value
        if highest is not None and highest > largest:
            raise InputError(f"setting {name!r} must be at most {largest}")
    for name, (low, high) in _FRACTIONS.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise InputError(f"setting {name!r} must lie in [{low}, {high}], not {value}")
    _check_count(config, "threshold", config.scales - 1, "proposals", "scale after the first")
    _check_count(config, "loss", config.scales, "scales", "output")
    if isinstance(config.loss, tuple):
        weights = config.loss[: config.scales]
        if min(weights) < 0 or max(weights) == 0:
            raise InputError(
                f"setting 'loss' is {config.loss}; weights are 0 or more, one of them above 0"
            )
    if config.patch_stride is not None and config.scales > 1:
        raise InputError("a region is cut out by patches that tile; 'patch_stride' needs one scale")


def _check_count(config: Config, name: str, count: int, what: str, each: str) -> None:
    """A list of numbers has enough of them; more are left unread, so that ``scales`` can vary."""
    given = getattr(config, name)
    if isinstance(given, tuple) and len(given) < count:
        raise InputError(
            f"setting {name!r} has {len(given)} numbers for {count} {what}; give one per {each}"
        )
