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
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from ramslib.attention import attention_probabilities, record_attention
from ramslib.backbone import extend_class_tokens, overlap_patches
from ramslib.config import Config
from ramslib.dppm import propose
from ramslib.model import IMAGENET, RAMSTrans
from ramslib.strength import attention_strength
from ramslib.training.optimization import backward_scales, create_optimizer, loss_weights
from ramslib.transfg import TransFG, contrastive_loss
from ramslib.weights.sources import load_pretrained

OWN = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("RAMSLIB_GOLDEN", OWN))
SETS = sorted(path.name.removesuffix("_weights.npz") for path in FOLDER.glob("*_weights.npz"))
RELEASED = Config.preset("released")
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
    arrays = dict(np.load(FOLDER / f"{name}_outputs.npz"))
    if "images" not in arrays:
        pixels = np.array(Image.open(FOLDER / f"{name}_images.png"))
        arrays["images"] = pixels.reshape(len(arrays["logits_scale1"]), -1, *pixels.shape[1:])
    return arrays


@pytest.fixture(scope="module")
def images(golden):
    """(B, 3, H, W) normalized as the release does."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in IMAGENET)
    pixels = torch.from_numpy(golden["images"]).permute(0, 3, 1, 2)
    return (pixels / 255 - mean) / std


def build_backbone(name, golden, config=RELEASED):
    """A set's weights as a configuration loads them; sizes come from their shapes."""
    path = FOLDER / f"{name}_weights.npz"
    shapes = {key: array.shape for key, array in np.load(path).items()}
    block = "Transformer/encoderblock_0/"
    rows, columns, _, width = shapes["embedding/kernel"]
    hidden = shapes[f"{block}MlpBlock_3/Dense_0/kernel"][1]
    backbone = VisionTransformer(
        img_size=golden["images"].shape[1:3],
        patch_size=(rows, columns),
        embed_dim=width,
        depth=sum(key.endswith("LayerNorm_0/scale") for key in shapes),
        num_heads=shapes[f"{block}MultiHeadDotProductAttention_1/query/kernel"][1],
        mlp_ratio=hidden / width,
        num_classes=0,
    )
    if config.patch_stride:
        overlap_patches(backbone, config.patch_stride)
    load_pretrained(
        backbone,
        name,
        str(path),
        pos_embed_resize=config.pos_embed_resize,
        final_norm=config.final_norm,
    )
    return backbone


def build(name, golden, config=RELEASED):
    """The model that a configuration makes of a set's weights."""
    backbone = build_backbone(name, golden, config)
    extend_class_tokens(backbone, config.scales)
    head = torch.from_numpy(golden["head_weight"])
    model = RAMSTrans(
        backbone,
        len(head),
        config.scales,
        config.thresholds(),
        config.strength,
        config.proposal,
        legacy_boxes=config.legacy_boxes,
        align_corners=config.align_corners,
    )
    model.classifier.weight.data.copy_(head)
    return model.eval()


@pytest.fixture(scope="module")
def model(name, golden):
    """The released configuration with the set's weights."""
    return build(name, golden)


@pytest.fixture(scope="module")
def looks(model, images):
    """Both scales, at the released threshold."""
    with torch.no_grad():
        return list(model.scales(images))


def recorded(model, view):
    """Attention of one view."""
    with torch.no_grad(), record_attention(model.backbone) as blocks:
        model.backbone.forward_features(view)
    return blocks


@pytest.fixture(scope="module")
def second_blocks(model, looks):
    """Attention of scale 2, which the model itself has no use for."""
    return recorded(model, looks[1].view)


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


def test_strength_of_both_scales(model, looks, second_blocks, golden):
    check_strength(looks[0].strength, golden["importance_scale1"])
    second = attention_strength(second_blocks, RELEASED.strength, model.grid)
    check_strength(second, golden["importance_scale2"])


def test_attention_where_the_set_has_it(model, images, looks, golden):
    blocks = recorded(model, images[:1])
    strength = attention_strength(blocks, RELEASED.strength, model.grid)
    torch.testing.assert_close(strength, looks[0].strength[:1])  # these are the blocks of scale 1
    for index, key in ((0, "first"), (-1, "last")):
        if f"attention_{key}_block_image0" in golden:
            found = attention_probabilities(blocks[index])[0]
            assert difference(found, golden[f"attention_{key}_block_image0"]) <= 1e-4


def test_boxes_at_every_threshold(model, images, looks, golden):
    assert len(golden["thresholds"]) == len(golden["boxes_scale1"]) > 0
    for threshold, expected in zip(golden["thresholds"], golden["boxes_scale1"], strict=True):
        patches = propose(looks[0].strength, float(threshold)).patch_boxes
        _, boxes = model.crop_region(images, None, looks[0].boxes, patches)
        np.testing.assert_array_equal(released(boxes), expected)


@OWN_ONLY
def test_half_precision_stays_close(model, images, golden):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        look = next(model.scales(images))
    strength = (look.strength / look.strength.amax((1, 2), keepdim=True)).flatten(1)
    assert strength.dtype == torch.float32
    assert np.abs(strength.numpy() - golden["importance_scale1"]).mean() <= 0.01
    assert np.abs(look.logits.float().numpy() - golden["logits_scale1"]).mean() <= 0.05


def test_crop_of_scale_two(looks, golden):
    assert difference(looks[1].view[:, :, ::8, ::8], golden["crop_scale2_every8"]) <= 1e-4


def test_logits_of_both_scales(looks, golden):
    assert difference(looks[0].logits, golden["logits_scale1"]) <= 1e-4
    assert difference(looks[1].logits, golden["logits_scale2"]) <= 1e-4


def test_scale_three(model, looks, second_blocks, golden):
    strength = attention_strength(second_blocks, RELEASED.strength, model.grid)
    patches = propose(strength, 1.3).patch_boxes
    view = looks[1].view
    inside = looks[0].boxes  # boxes of the set are measured in the crop of scale 2
    crop, boxes = model.crop_region(view, None, inside, patches)
    np.testing.assert_array_equal(released(boxes), golden["boxes_scale2_threshold1.3"])
    assert difference(crop[:, :, ::8, ::8], golden["crop_scale3_every8"]) <= 1e-4


@pytest.mark.parametrize("loss, key", [("first", "global"), ("sum", "sum")])
def test_five_steps_of_training(loss, key, name, golden, images):
    expected = np.load(FOLDER / f"{name}_training.npz")
    labels = torch.from_numpy(expected["labels"])
    config = RELEASED.replace(loss=loss, learning_rate=0.003)
    model = build(name, golden, config).train()
    optimizer = create_optimizer(model, config)
    losses, norms = [], []
    for _ in expected[f"{key}_grad_norm"]:
        optimizer.zero_grad()
        weights = loss_weights(config.loss, config.scales)
        losses.append(backward_scales(model, images, None, labels, weights).tolist())
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
        output = build(name, golden, RELEASED.replace(**option))(images)
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
    model = TransFG(build_backbone(name, golden, config), len(golden["head_weight"])).eval()
    model.classifier.weight.data.copy_(torch.from_numpy(golden["head_weight"]))
    labels = torch.from_numpy(expected["labels"])
    with torch.no_grad():
        parts, (look,) = model.look(images), model.scales(images)
    np.testing.assert_array_equal(parts.patches, expected[f"{kind}_part_index"])
    assert difference(look.logits, expected[f"{kind}_logits"]) <= 1e-4
    assert difference(look.feature, expected[f"{kind}_class_token"]) <= 1e-4
    contrastive = contrastive_loss(look.feature, labels)
    assert difference(contrastive, expected[f"{kind}_contrastive_loss"]) <= 1e-5
    assert difference(model.loss(look, labels), expected[f"{kind}_total_loss"]) <= 1e-4
