"""One configuration: presets, types, names, ranges, and refusals in one line."""

import json
import math
from dataclasses import FrozenInstanceError, asdict

import pandas as pd
import pytest

from ramslib.config import PRESETS, Config, current_columns
from ramslib.errors import InputError


def refused(call, *args, **kwargs):
    """The message of the InputError that a call raises; always one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_a_file(name, tmp_path):
    config = Config.preset(name)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    assert Config.from_file(tmp_path / "config.json") == config


def test_presets_differ_where_paper_and_release_do():
    paper, released = Config.preset("paper"), Config.preset("released")
    assert (paper.loss, released.loss) == ("sum", "first")
    assert (paper.backbone, released.backbone) == ("vit_base_patch16_224", "vit_base_patch32_224")
    assert (paper.final_norm, released.final_norm) == (True, False)
    assert (paper.legacy_boxes, released.legacy_boxes) == (False, True)
    for config in (paper, released):
        assert config.image_size == 448 and config.highres_size is None and config.scales == 2
        assert config.strength == "rollout_mean" and config.threshold == 1.2
        assert config.learning_rate == 0.03 and config.weight_decay == 0
        assert config.momentum == 0.9 and config.warmup_steps == 500 and config.batch_size == 16
        assert config.clip_grad_norm == 1 and config.crop_fraction == pytest.approx(448 / 600)


def test_preset_with_changes():
    config = Config.preset("paper", scales=3, threshold=[1.2, 1.3])
    assert config.scales == 3 and config.thresholds() == (1.2, 1.3)
    assert f"choose one of {', '.join(PRESETS)}" in refused(Config.preset, "papr")


def test_a_configuration_cannot_be_edited():
    with pytest.raises(FrozenInstanceError):
        Config().scales = 3


@pytest.mark.parametrize(
    "scales, threshold, expected",
    [
        (1, 1.0, ()),
        (2, 1.2, (1.2,)),
        (4, 1.2, (1.2,) * 3),
        (2, (1.1, 1.3), (1.1,)),
        (3, (1, 2), (1, 2)),
    ],
)
def test_one_threshold_per_proposal(scales, threshold, expected):
    assert Config().replace(scales=scales, threshold=threshold).thresholds() == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, [(32, 48)] * 3),
        ({"region_size": "64"}, [(32, 48), (64, 64), (64, 64)]),
        ({"region_size": "64,96,128"}, [(32, 48), (64, 64), (96, 96)]),
        ({"region_size": (64, 96), "image_size": 16}, [(16, 16), (64, 64), (96, 96)]),
        ({"region_size": 64, "scales": 1}, [(32, 48)]),
    ],
)
def test_one_input_size_per_scale(given, expected):
    config = Config().replace(**{"image_size": (32, 48), "scales": 3} | given)
    assert list(config.input_sizes()) == expected


def test_models_that_look_once_settle_the_scales():
    assert Config().replace(model="transfg").scales == 1
    plain = Config().replace(model="vit")
    assert plain == Config().replace(scales=1) and plain.model == "rams", "one model, one key"
    assert Config().replace(model="vit", scales="1") == plain
    assert plain.replace(model="rams", scales=3).scales == 3
    transfg = Config().replace(model="transfg", patch_stride=12)
    assert Config().replace(**json.loads(json.dumps(asdict(transfg)))) == transfg
    for config, changes in [
        (Config(), {"model": "vit", "scales": 2}),
        (Config(), {"model": "transfg", "scales": 3}),
        (transfg, {"scales": 2}),
    ]:
        assert "single scale; leave 'scales' at 1" in refused(config.replace, **changes)
    assert "'patch_stride' needs one scale" in refused(Config().replace, patch_stride=8)
    assert "choose one of rams, transfg, vit" in refused(Config().replace, model="resnet")


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("epochs", "12", 12),
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", "1", 1.0),
        ("threshold", "1", 1.0),
        ("threshold", "1.2, 1.3", (1.2, 1.3)),
        ("threshold", "[1.2]", (1.2,)),
        ("loss", "last", "last"),
        ("loss", "1, 0.5", (1, 0.5)),
        ("loss", "[0, 1.5]", (0, 1.5)),
        ("image_size", "112", 112),
        ("image_size", "112,224", (112, 224)),
        ("highres_size", "none", None),
        ("highres_size", "None", None),
        ("highres_size", "336,448", (336, 448)),
        ("final_norm", "false", False),
        ("final_norm", "True", True),
        ("pretrained", "none", "none"),
        ("root", "12", "12"),
    ],
)
def test_text_from_a_command_line_is_read_as_the_fields_type(name, text, value):
    read = getattr(Config().replace(**{name: text}), name)
    assert read == value and type(read) is type(value)


def test_lists_from_json_become_tuples():
    config = Config().replace(image_size=[112, 224], scales=3, threshold=[1, 1.5])
    assert config.image_size == (112, 224) and config.threshold == (1, 1.5)
    assert hash(config) is not None


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs", 1.5),
        ("epochs", "1.5"),
        ("epochs", True),
        ("epochs", None),
        ("epochs", "many"),
        ("learning_rate", "fast"),
        ("learning_rate", math.nan),
        ("learning_rate", "NaN"),
        ("learning_rate", math.inf),
        ("learning_rate", "1e999"),
        ("threshold", "abc"),
        ("threshold", "nan"),
        ("threshold", "NaN"),
        ("threshold", "1.2,NaN"),
        ("threshold", ()),
        ("threshold", (1.2, "x")),
        ("threshold", (1.2, True)),
        ("threshold", (1.2, math.inf)),
        ("threshold", {"a": 1}),
        ("loss", 1),
        ("loss", "1"),
        ("loss", ""),
        ("loss", "1,x"),
        ("loss", (1.0, math.nan)),
        ("image_size", (112,)),
        ("image_size", (112, 112, 3)),
        ("image_size", (112, 112.0)),
        ("image_size", "112,abc"),
        ("image_size", 112.5),
        ("image_size", None),
        ("final_norm", 1),
        ("final_norm", "yes"),
        ("backbone", 3),
        ("data", None),
    ],
)
def test_value_of_the_wrong_kind(name, value):
    assert repr(name) in refused(Config().replace, **{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("scales", 0),
        ("scales", -1),
        ("epochs", 0),
        ("batch_size", 0),
        ("grad_accum_steps", 0),
        ("learning_rate", 0),
        ("learning_rate", -1.0),
        ("image_size", 0),
        ("image_size", (112, -112)),
        ("highres_size", 0),
        ("highres_size", (0, 336)),
        ("workers", -1),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("clip_grad_norm", -1.0),
        ("frozen_blocks", -1),
        ("patience", -1),
        ("seed", -1),
        ("crop_fraction", 0.0),
        ("crop_fraction", 1.1),
        ("validation_fraction", 0.9),
        ("label_smoothing", 1.0),
        ("ema_decay", 1.0),
        ("drop_path", 1.0),
        ("layer_decay", 0.0),
        ("class_token", "each"),
        ("loss", "mean"),
        ("loss", (1.0, -0.5)),
        ("loss", (0.0, 0.0, 1.0)),
        ("steps", -1),
        ("dropout", 1.0),
        ("amp", "fp8"),
        ("pos_embed_resize", "bicubic"),
    ],
)
def test_value_out_of_range(name, value):
    message = refused(Config().replace, **{name: value})
    assert repr(name) in message and str(value) in message


@pytest.mark.parametrize(
    "name, value", [("workers", 0), ("patience", 0), ("clip_grad_norm", 0), ("seed", 0)]
)
def test_zero_where_it_means_off(name, value):
    assert getattr(Config().replace(**{name: value}), name) == 0


def test_too_few_thresholds():
    message = refused(Config().replace, scales=4, threshold=(1.2, 1.3))
    assert "has 2 numbers for 3 proposals" in message
    message = refused(Config().replace, scales=3, loss=(1.0, 0.5))
    assert "'loss' has 2 numbers for 3 scales" in message


@pytest.mark.parametrize(
    "typo, nearest",
    [
        ("treshold", "threshold"),
        ("lr_rate", "learning_rate"),
        ("epoch", "epochs"),
        ("backbones", "backbone"),
    ],
)
def test_a_misspelt_setting_gets_the_nearest(typo, nearest):
    message = refused(Config().replace, **{typo: 1})
    assert message == f"unknown setting {typo!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "3",
        '{"treshold": 1.0}',
        '{"epochs": "x"}',
        '{"threshold": NaN}',
        b"\xff\xfe\x00",
    ],
)
def test_a_bad_file_is_named(text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(path) in refused(Config.from_file, path)


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "no.json") in refused(Config.from_file, tmp_path / "no.json")


@pytest.mark.parametrize("typo", ["EPOCHS", "Image_Size"])
def test_a_setting_in_capitals_gets_the_nearest(typo):
    assert repr(typo.lower()) in refused(Config().replace, **{typo: 1})


def test_no_far_fetched_suggestion_and_no_long_echo():
    assert "did you mean" not in refused(Config().replace, xyzzy=1)
    assert len(refused(Config().replace, epochs="9" * 20_000 + "x")) < 200


def test_settings_of_version_0_1_are_read(tmp_path):
    old = {"source_size": 448, "normalise": "imagenet", "position_resize": "zoom"}
    old |= {"released_boxes": True, "checkpointing": True, "accumulate": 2, "head_factor": 5.0}
    old |= {"clip_norm": 0.5, "proposal": "centre", "epochs": 4}
    (tmp_path / "config.json").write_text(json.dumps({"config": old}))
    config = Config.from_file(tmp_path / "config.json")
    assert (config.highres_size, config.normalization, config.pos_embed_resize) == (
        448,
        "imagenet",
        "zoom",
    )
    assert config.legacy_boxes and config.grad_checkpointing and config.grad_accum_steps == 2
    assert (config.head_lr_scale, config.clip_grad_norm) == (5.0, 0.5)
    assert (config.proposal, config.epochs) == ("center", 4)


def test_columns_of_version_0_1_are_read():
    old = pd.DataFrame(columns=["scale", "weights", "mean_class", "calibration_error", "log_loss"])
    new = ["output", "checkpoint", "mean_per_class_accuracy", "ece", "nll"]
    assert list(current_columns(old)) == new
    assert list(current_columns(pd.DataFrame(columns=["output", "scale"]))) == ["output", "scale"]
