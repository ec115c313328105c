"""The same numbers as the released codes of RAMS-Trans and TransFG, from the same weights.

The numbers in ``golden/`` were returned once by the authors' implementations (commit c414ea9;
float32, CPU, dropout off): no code of theirs is here. Sizes are read from the arrays, and
``RAMSLIB_GOLDEN`` may name a folder with other sets, each of ``<set>_weights.npz`` (the layout of
Google's ViT checkpoints), ``<set>_outputs.npz`` and ``<set>_training.npz``, with the images
(B, H, W, 3) in the outputs or as ``<set>_images.png``, one below the other. Outputs of TransFG
(commit 9336fba), where there are some, lie in ``<set>_transfg_outputs.npz``; patches overlap by a
quarter unless ``overlap_stride`` there says otherwise. Where the outputs hold attention
probabilities of the first image, they are compared too.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from benchmarks.golden import (
    OWN,
    RELEASED,
    build,
    build_backbone,
    pixels_of,
    read_outputs,
    set_names,
)
from ramslib.attention import (
    RecordedScale,
    attention_probabilities,
    attention_strength,
    record_attention,
)
from ramslib.dppm import propose
from ramslib.training.optimization import backward_scales, create_optimizer
from ramslib.transfg import TransFG, contrastive_loss

FOLDER = Path(os.environ.get("RAMSLIB_GOLDEN", OWN))
SETS = set_names(FOLDER)
OWN_ONLY = pytest.mark.skipif(FOLDER != OWN, reason="holds for this set, not for any weights")


def test_there_are_sets():
    assert SETS


@pytest.fixture(scope="module", params=SETS)
def name(request):
    """Name of each set in turn."""
    return request.param


@pytest.fixture(scope="module")
def golden(name):
    """Arrays of the set's outputs, images included."""
    return read_outputs(name, FOLDER)


@pytest.fixture(scope="module")
def images(golden):
    """(B, 3, H, W) normalized as the release does."""
    values = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in values)
    return (pixels_of(golden) / 255 - mean) / std


@pytest.fixture(scope="module")
def model(name, golden):
    """The released configuration with the set's weights."""
    return build(name, golden, folder=FOLDER)


def test_positions_are_zoomed_alike_where_timm_cannot(name, golden, monkeypatch):
    wanted = build_backbone(name, golden, folder=FOLDER).pos_embed
    monkeypatch.setattr("benchmarks.golden.checkpoint_filter_fn", lambda state, model: state)
    torch.testing.assert_close(build_backbone(name, golden, folder=FOLDER).pos_embed, wanted)


@pytest.fixture(scope="module")
def outputs(model, images):
    """Both scales, at the released threshold."""
    with torch.no_grad():
        return list(model.iterate_scales(images))


def record(model, inputs):
    """Attention of all blocks for the input of one scale."""
    with torch.no_grad(), record_attention(model.backbone) as blocks:
        model.backbone.forward_features(inputs)
    return RecordedScale(blocks, model.grid)


@pytest.fixture(scope="module")
def second(model, outputs):
    """Attention of scale 2, which the model itself has no use for."""
    return record(model, outputs[1].input)


def released(boxes):
    """Our boxes, exclusive at the lower ends, as the release writes them: inclusive."""
    return (boxes - torch.tensor([0, 0, 1, 1])).long().numpy()


def difference(found, expected):
    """Largest absolute difference."""
    return np.abs(np.asarray(found) - expected).max()


def check_strength(strength, importance):
    """Equal after division by each image's maximum."""
    strength = strength.flatten(1)
    assert difference(strength / strength.amax(1, keepdim=True), importance) <= 1e-5


def test_strength_of_both_scales(outputs, second, golden):
    check_strength(outputs[0].strength, golden["importance_scale1"])
    check_strength(attention_strength(second, RELEASED.strength), golden["importance_scale2"])


def test_pixels_are_normalized_as_the_release_does(model, images, golden):
    given, high_res = model.preprocess(pixels_of(golden))
    torch.testing.assert_close(given, images)
    assert high_res is None


def test_attention_where_the_set_has_it(model, images, outputs, golden):
    recorded = record(model, images[:1])
    strength = attention_strength(recorded, RELEASED.strength)
    torch.testing.assert_close(strength, outputs[0].strength[:1])  # these are the blocks of scale 1
    for index, key in ((0, "first"), (-1, "last")):
        if f"attention_{key}_block_image0" in golden:
            found = attention_probabilities(recorded.blocks[index])[0]
            assert difference(found, golden[f"attention_{key}_block_image0"]) <= 1e-4


def test_boxes_at_every_threshold(model, images, outputs, golden):
    assert len(golden["thresholds"]) == len(golden["boxes_scale1"]) > 0
    for threshold, expected in zip(golden["thresholds"], golden["boxes_scale1"], strict=True):
        patches = propose(outputs[0].strength, float(threshold)).patch_boxes
        _, boxes = model.crop_region(images, None, outputs[0].boxes, patches)
        np.testing.assert_array_equal(released(boxes), expected)


@OWN_ONLY
def test_half_precision_stays_close(model, images, golden):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = next(model.iterate_scales(images))
    strength = (output.strength / output.strength.amax((1, 2), keepdim=True)).flatten(1)
    assert strength.dtype == torch.float32
    assert np.abs(strength.numpy() - golden["importance_scale1"]).mean() <= 0.01
    assert np.abs(output.logits.float().numpy() - golden["logits_scale1"]).mean() <= 0.05


def test_crop_of_scale_two(outputs, golden):
    assert difference(outputs[1].input[:, :, ::8, ::8], golden["crop_scale2_every8"]) <= 1e-4


def test_logits_of_both_scales(outputs, golden):
    assert difference(outputs[0].logits, golden["logits_scale1"]) <= 1e-4
    assert difference(outputs[1].logits, golden["logits_scale2"]) <= 1e-4


def test_scale_three(model, outputs, second, golden):
    patches = propose(attention_strength(second, RELEASED.strength), 1.3).patch_boxes
    frame = outputs[0].boxes  # boxes of the set are measured in the crop of scale 2
    crop, boxes = model.crop_region(outputs[1].input, None, frame, patches)
    np.testing.assert_array_equal(released(boxes), golden["boxes_scale2_threshold1.3"])
    assert difference(crop[:, :, ::8, ::8], golden["crop_scale3_every8"]) <= 1e-4


@pytest.mark.parametrize("loss, key", [("first", "global"), ("sum", "sum")])
def test_five_steps_of_training(loss, key, name, golden):
    expected = np.load(FOLDER / f"{name}_training.npz")
    pixels, labels = pixels_of(golden), torch.from_numpy(expected["labels"])
    config = RELEASED.replace(loss=loss, learning_rate=0.003)
    model = build(name, golden, config, FOLDER).train()
    optimizer = create_optimizer(model, config)
    losses, norms = [], []
    for _ in expected[f"{key}_grad_norm"]:
        optimizer.zero_grad()
        weights = config.loss_weights(config.scales)
        losses.append(backward_scales(model, pixels, labels, weights)[1:].tolist())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        norms.append(norm.item())
        optimizer.step()
    np.testing.assert_allclose(losses, expected[f"{key}_losses_per_scale"], rtol=1e-3)
    np.testing.assert_allclose(norms, expected[f"{key}_grad_norm"], rtol=1e-3)


@OWN_ONLY
@pytest.mark.parametrize(
    "option",
    [
        {"pos_embed_resize": "timm"},
        {"final_norm": True},
        {"legacy_boxes": False},
        {"align_corners": False},
        {"threshold": 1.0},
        {"strength": "rollout_class"},
        {"strength": "last_class"},
        {"proposal": "whole"},
    ],
    ids=str,
)
def test_every_deviation_of_the_release_is_one_option(option, name, golden, images):
    with torch.no_grad():
        other = build(name, golden, RELEASED.replace(**option), FOLDER)
        output = other.forward_preprocessed(images)
    assert difference(output.logits[1], golden["logits_scale2"]) > 2e-4


@pytest.mark.parametrize("kind", ["non_overlap", "overlap"])
def test_transfg(kind, name, golden, images):
    path = FOLDER / f"{name}_transfg_outputs.npz"
    if not path.exists():
        pytest.skip("this set has no outputs of TransFG")
    expected = np.load(path)
    patch = len(np.load(FOLDER / f"{name}_weights.npz")["embedding/kernel"])
    stride = patch if kind == "non_overlap" else int(expected.get("overlap_stride", patch * 3 // 4))
    config = RELEASED.replace(model="transfg", final_norm=True, patch_stride=stride)
    model = TransFG(build_backbone(name, golden, config, FOLDER), len(golden["head_weight"])).eval()
    model.classifier.weight.data.copy_(torch.from_numpy(golden["head_weight"]))
    labels = torch.from_numpy(expected["labels"])
    with torch.no_grad():
        parts, (output,) = model.run_parts(images), model.iterate_scales(images)
    np.testing.assert_array_equal(parts.patches, expected[f"{kind}_part_index"])
    assert difference(output.logits, expected[f"{kind}_logits"]) <= 1e-4
    assert difference(output.feature, expected[f"{kind}_class_token"]) <= 1e-4
    contrastive = contrastive_loss(output.feature, labels)
    assert difference(contrastive, expected[f"{kind}_contrastive_loss"]) <= 1e-5
    assert difference(model.loss(output, labels), expected[f"{kind}_total_loss"]) <= 1e-4
