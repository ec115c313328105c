"""The presets against the facts of the paper's protocol, and that each is ready to run."""

import pytest
import torch
from torch import nn

from ramslib.__main__ import _config, _parse
from ramslib.config import PRESETS, Config
from ramslib.data.datasets import READERS
from ramslib.data.transforms import ImageTransform
from ramslib.model import build_model
from ramslib.training.launch import overrides

FACTS = {  # data set: resized to, cropped to, augmentation
    "cub": (600, 448, "flip"),
    "cars": (600, 448, "flip"),
    "nabirds": (600, 448, "flip"),
    "dogs": (448, 224, "flip"),
    "inaturalist": (400, 304, "autoaugment"),
}


def test_there_is_a_preset_for_every_data_set_of_the_paper():
    assert {f"paper-{data}" for data in FACTS} == {n for n in PRESETS if n.startswith("paper-")}
    assert set(FACTS) <= set(READERS)


@pytest.fixture(params=FACTS)
def data(request):
    """Name of each data set in turn."""
    return request.param


@pytest.fixture
def preset(data):
    """The preset of each data set in turn."""
    return Config.preset(f"paper-{data}")


def test_sizes_and_augmentation(data, preset):
    resized, crop, augment = FACTS[data]
    assert (preset.data, preset.root) == (data, f"data/{data}")
    assert (preset.image_size, preset.highres_size, preset.augment) == (crop, None, augment)
    for chosen in ("none", augment):
        view = ImageTransform(preset.image_size, preset.crop_fraction, chosen)
        assert view.resized == (resized, resized) and view.size == (crop, crop)
    assert view.margins == ((resized - crop) // 2,) * 2
    assert preset.normalization == "imagenet"


def test_schedule(preset):
    assert (preset.optimizer, preset.momentum, preset.weight_decay) == ("momentum", 0.9, 0.0)
    assert (preset.learning_rate, preset.warmup_steps, preset.steps) == (0.03, 500, 10_000)
    assert (preset.batch_size, preset.grad_accum_steps, preset.clip_grad_norm) == (16, 1, 1.0)
    assert (preset.seed, preset.dropout, preset.head_lr_scale, preset.layer_decay) == (2, 0.1, 1, 1)
    assert (preset.frozen_blocks, preset.label_smoothing, preset.patience) == (0, 0, 0)
    assert preset.validation_fraction == 0, "all training images train"


def test_method(preset):
    paper = Config.preset("paper")
    for name in ("scales", "strength", "threshold", "proposal", "class_token", "loss"):
        assert getattr(preset, name) == getattr(paper, name)
    assert preset.backbone == "vit_base_patch16_224.orig_in21k" and preset.final_norm


@pytest.mark.slow
def test_it_builds_and_is_accepted_by_the_command_line(data, preset):
    options = _parse(["train", "--run", "x", "--preset", f"paper-{data}"])
    assert _config(options) == preset
    started = _parse(["train", "--run", "x", *overrides(preset)])
    assert _config(started) == preset
    with torch.device("meta"):
        model = build_model(preset.replace(pretrained="none"), 7)
    assert model.grid == (preset.image_size // 16,) * 2
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    dropped = {name for name in rates if ".mlp." in name or name == "backbone.pos_drop"}
    assert len(dropped) == 25 and len(rates) > 48
    assert all(rate == (0.1 if name in dropped else 0) for name, rate in rates.items())
