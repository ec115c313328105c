"""The recipes against the facts of the paper's protocol, and that each is ready to run."""

import pytest
import torch
from torch import nn

from ramslib.__main__ import _config, _parse
from ramslib.config import PRESETS, Config
from ramslib.data.datasets import READERS
from ramslib.data.transforms import ImageTransform
from ramslib.model import build_model
from ramslib.presets import _RECIPES
from ramslib.training.launch import overrides

FACTS = {  # data set: resized to, cropped to, augmentation
    "cub": (600, 448, "flip"),
    "cars": (600, 448, "flip"),
    "nabirds": (600, 448, "flip"),
    "dogs": (448, 224, "flip"),
    "inaturalist": (400, 304, "autoaugment"),
}


def test_there_is_a_recipe_for_every_data_set_of_the_paper():
    assert set(_RECIPES) == {f"paper-{data}" for data in FACTS} <= set(PRESETS)
    assert set(FACTS) <= set(READERS)


@pytest.fixture(params=FACTS)
def data(request):
    """Name of each data set in turn."""
    return request.param


@pytest.fixture
def recipe(data):
    """The recipe of each data set in turn."""
    return Config.preset(f"paper-{data}")


def test_sizes_and_augmentation(data, recipe):
    resized, crop, augment = FACTS[data]
    assert (recipe.data, recipe.root) == (data, f"data/{data}")
    assert (recipe.image_size, recipe.highres_size, recipe.augment) == (crop, None, augment)
    for train in (True, False):
        view = ImageTransform(recipe.image_size, recipe.crop_fraction, train, recipe.augment)
        assert view.resized == (resized, resized) and view.size == (crop, crop)
    assert view.margins == ((resized - crop) // 2,) * 2
    assert recipe.normalization == "imagenet"


def test_schedule(recipe):
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("momentum", 0.9, 0.0)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.steps) == (0.03, 500, 10_000)
    assert (recipe.batch_size, recipe.grad_accum_steps, recipe.clip_grad_norm) == (16, 1, 1.0)
    assert (recipe.seed, recipe.dropout, recipe.head_lr_scale, recipe.layer_decay) == (2, 0.1, 1, 1)
    assert (recipe.frozen_blocks, recipe.label_smoothing, recipe.patience) == (0, 0, 0)
    assert recipe.validation_fraction == 0, "all training images train"


def test_method(recipe):
    paper = Config.preset("paper")
    for name in ("scales", "strength", "threshold", "proposal", "class_token", "loss"):
        assert getattr(recipe, name) == getattr(paper, name)
    assert recipe.backbone == "vit_base_patch16_224.orig_in21k" and recipe.final_norm


def test_it_builds_and_is_accepted_by_the_command_line(data, recipe):
    options = _parse(["train", "--run", "x", "--preset", f"paper-{data}"])
    assert _config(options) == recipe
    started = _parse(["train", "--run", "x", *overrides(recipe)])
    assert _config(started) == recipe
    with torch.device("meta"):
        model, _ = build_model(recipe.replace(pretrained="none"), 7)
    assert model.grid == (recipe.image_size // 16,) * 2
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    dropped = {name for name in rates if ".mlp." in name or name == "backbone.pos_drop"}
    assert len(dropped) == 25 and len(rates) > 48
    assert all(rate == (0.1 if name in dropped else 0) for name, rate in rates.items())
