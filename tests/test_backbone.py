"""Backbones of every family: sizes, class tokens, features, and refusals in one line."""

import copy
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from ramslib.acceleration import last_block_for_one_token, plain_path
from ramslib.backbone import (
    count_class_tokens,
    create_backbone,
    extend_class_tokens,
    image_size,
    normalization,
    patch_grid,
    set_dropout,
)
from ramslib.errors import InputError


def encode(backbone, images, index):
    """The feature of a class token, by the accelerated path."""
    with last_block_for_one_token(backbone, index):
        tokens = backbone.forward_features(images)
    return backbone.forward_head(tokens[:, index:], pre_logits=True)


def refused(call, *args, **kwargs):
    """The message of the InputError that a call raises; always one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- any family --------------------------------------------------------------------------------


def test_sizes_and_tokens_are_read_from_the_model(family, backbone_of, images):
    backbone = backbone_of(family)
    assert image_size(backbone) == (24, 32) and patch_grid(backbone) == (3, 4)
    tokens = backbone.forward_features(images())
    prefix = backbone.num_prefix_tokens
    assert tokens.shape == (2, prefix + 12, 32)
    without = family in ("siglip", "average", "registers_average")
    assert count_class_tokens(backbone) == (0 if without else 1)


def test_feature_of_one_class_token_is_timms_own(family, backbone_of, images):
    backbone = backbone_of(family)
    feature = encode(backbone, images(), 0)
    torch.testing.assert_close(feature, backbone(images()), atol=1e-5, rtol=1e-5)
    assert feature.shape == (2, 32)


def assert_same_gradients(found, expected):
    """Of two equal backbones, to rounding."""
    one, other = ([p.grad for p in model.parameters()] for model in (found, expected))
    largest = max(float(gradient.abs().max()) for gradient in other if gradient is not None)
    torch.testing.assert_close(one, other, atol=1e-6 * largest, rtol=1e-4)


def test_its_gradients_are_those_of_timms_own(family, backbone_of, images):
    expected, found = backbone_of(family), backbone_of(family)
    expected(images()).square().sum().backward()
    encode(found, images(), 0).square().sum().backward()
    assert_same_gradients(found, expected)


def tokens_seen(module):
    """How many tokens each call of a module is given."""
    seen = []
    module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    return seen


def test_the_last_block_works_for_the_class_token_alone(family, backbone_of, images):
    backbone = backbone_of(family)
    seen = [tokens_seen(part) for part in (backbone.blocks[-1].mlp, backbone.blocks[-1].attn.proj)]
    seen.append(tokens_seen(backbone.blocks[0].mlp))
    tokens = backbone.forward_features(images()).shape[1]
    encode(backbone, images(), 0)
    reads_many = family in ("distilled", "siglip", "average", "registers_average")
    last = tokens if reads_many else 1
    assert seen == [[tokens, last], [tokens, last], [tokens, tokens]]
    backbone.forward_features(images())  # nothing stays behind
    assert seen[0][-1] == seen[1][-1] == tokens


def test_the_plain_path_encodes_all_tokens(backbone_of, images):
    backbone = backbone_of("vit")
    seen = tokens_seen(backbone.blocks[-1].mlp)
    with plain_path():
        feature = encode(backbone, images(), 0)
    assert seen == [13] and torch.equal(feature, backbone(images()))


def test_checkpointed_blocks_are_left_alone_where_they_run_again(backbone_of, images):
    expected, found = backbone_of("dinov2").train(), backbone_of("dinov2").train()
    found.set_grad_checkpointing(True)
    for backbone in (expected, found):
        encode(backbone, images(), 0).square().sum().backward()
    assert_same_gradients(found, expected)
    seen = tokens_seen(found.blocks[-1].mlp)
    with torch.no_grad():
        encode(found, images(), 0)
    assert seen == [1]


def test_threads_that_share_a_backbone_read_their_own_token(backbone_of, images):
    backbone = backbone_of("vit")
    extend_class_tokens(backbone, 2)
    with torch.no_grad():
        backbone.cls_token[:, 1] += torch.linspace(-1, 1, 32)
    expected = [encode(backbone, images(), index) for index in (0, 1)]
    meet = threading.Barrier(2, timeout=20)
    backbone.blocks[0].register_forward_hook(lambda *call: (meet.wait(), call[2])[1])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda index: encode(backbone, images(), index), (0, 1)))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_one_class_token_changes_nothing(scalable_family, backbone_of, images):
    backbone, same = backbone_of(scalable_family), backbone_of(scalable_family)
    extend_class_tokens(same, 1)
    assert torch.equal(backbone(images()), same(images()))


# --- several class tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_copies_act_as_one_token_that_weighs_as_much(scalable_family, count, backbone_of, images):
    # S equal class tokens are S equal keys, that is one key whose logit is larger by log S. So the
    # unextended model with that bias must give the same tokens: registers, positions and rotary
    # embedding of the patches all stay where they were.
    plain, extended = backbone_of(scalable_family), backbone_of(scalable_family)
    extend_class_tokens(extended, count)
    tokens = extended.forward_features(images())
    bias = torch.zeros(1, 1, 1, plain.num_prefix_tokens + 12)
    bias[..., 0] = math.log(count)
    bias = bias.expand(1, 1, bias.shape[-1], -1)
    expected = plain.forward_features(images(), attn_mask=bias)
    assert tokens.shape[1] == expected.shape[1] + count - 1
    for index in range(count):
        torch.testing.assert_close(tokens[:, index], expected[:, 0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(tokens[:, count:], expected[:, 1:], atol=2e-5, rtol=1e-4)
    assert (tokens[:, 0] - plain.forward_features(images())[:, 0]).abs().max() > 1e-3


def test_layout_after_extension(scalable_family, backbone_of):
    plain, extended = backbone_of(scalable_family), backbone_of(scalable_family)
    extend_class_tokens(extended, 3)
    assert count_class_tokens(extended) == 3 and patch_grid(extended) == (3, 4)
    assert extended.num_prefix_tokens == plain.num_prefix_tokens + 2
    for one, other in zip(plain.modules(), extended.modules(), strict=True):
        if hasattr(one, "num_prefix_tokens"):
            assert other.num_prefix_tokens == one.num_prefix_tokens + 2
    old, new = plain.state_dict(), extended.state_dict()
    assert old.keys() == new.keys()
    grown = {name for name in old if old[name].shape != new[name].shape}
    assert grown <= {"cls_token", "pos_embed"}
    for name in old.keys() - grown:
        assert torch.equal(old[name], new[name])
    assert torch.equal(new["cls_token"], old["cls_token"].expand(1, 3, -1))
    if "pos_embed" in grown:
        assert torch.equal(new["pos_embed"][:, :3], old["pos_embed"][:, :1].expand(1, 3, -1))
        assert torch.equal(new["pos_embed"][:, 3:], old["pos_embed"][:, 1:])


def test_each_class_token_is_its_own_parameter_and_is_read_by_its_index(
    scalable_family, backbone_of, images
):
    backbone = backbone_of(scalable_family)
    extend_class_tokens(backbone, 3)
    before = backbone.forward_features(images())
    assert any(parameter is backbone.cls_token for parameter in backbone.parameters())
    with torch.no_grad():
        backbone.cls_token[:, 1] += torch.linspace(-1, 1, 32)
    after = backbone.forward_features(images())
    changes = [(after - before)[:, index].abs().mean() for index in range(3)]
    assert changes[1] > changes[0] and changes[1] > changes[2]
    for index in range(3):
        feature = encode(backbone, images(), index)
        torch.testing.assert_close(feature, after[:, index], atol=1e-5, rtol=1e-5)
    encode(backbone, images(), 1).square().sum().backward()
    assert (backbone.cls_token.grad.abs().sum(-1) > 0).all()  # all tokens meet in attention


def test_extended_weights_survive_saving(backbone_of, images):
    backbone, other = backbone_of("dinov3"), backbone_of("dinov3", seed=1)
    extend_class_tokens(backbone, 2)
    extend_class_tokens(other, 2)
    other.load_state_dict(copy.deepcopy(backbone.state_dict()))
    assert torch.equal(backbone(images()), other(images()))


@pytest.mark.parametrize("family", ["siglip", "average", "registers_average"])
def test_no_class_token_to_extend(family, backbone_of):
    message = refused(extend_class_tokens, backbone_of(family), 2)
    assert "has no class token to copy per scale; use class_token='shared'" in message


@pytest.mark.parametrize("family", ["beit", "beit_shared", "relpos", "relpos_mlp", "distilled"])
def test_positions_tied_to_one_class_token(family, backbone_of):
    backbone = backbone_of(family)
    before = copy.deepcopy(backbone.state_dict())
    message = refused(extend_class_tokens, backbone, 2)
    assert "ties positions to one class token; use class_token='shared'" in message
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_a_class_token_that_is_not_read(backbone_of):
    message = refused(extend_class_tokens, backbone_of("vit", global_pool="avg"), 2)
    assert "does not read its class token; build it with global_pool='token'" in message


# --- by name -----------------------------------------------------------------------------------


def test_create_by_name_with_a_rectangular_size():
    backbone = create_backbone("test_vit", (64, 96), class_tokens=2)
    assert backbone.origin == "test_vit: random initialization, no weights loaded."
    assert image_size(backbone) == (64, 96) and patch_grid(backbone) == (4, 6)
    image = torch.randn(1, 3, 64, 96)
    assert backbone.forward_features(image).shape == (1, 26, 64)
    assert encode(backbone, image, 1).shape == (1, 64)
    assert all(parameter.device.type == "cpu" for parameter in backbone.parameters())
    assert sum(parameter.numel() for parameter in backbone.parameters()) > 300_000


def test_one_token_is_timms_model():
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", 160)
    torch.manual_seed(0)
    expected = timm.create_model("test_vit", num_classes=0)
    image = torch.randn(1, 3, 160, 160)
    assert torch.equal(backbone.eval()(image), expected.eval()(image))


@pytest.mark.parametrize("name", ["test_vit2", "test_vit3", "test_vit_relpos"])
def test_models_without_a_class_token_pool_as_timm_built_them(name):
    backbone = create_backbone(name, 160)
    image = torch.randn(1, 3, 160, 160)
    assert torch.equal(encode(backbone.eval(), image, 0), backbone(image))


def test_average_pooled_families_with_a_class_token_read_it():
    backbone = create_backbone("eva02_tiny_patch14_224", (56, 28), class_tokens=2)
    assert backbone.global_pool == "token" and patch_grid(backbone) == (4, 2)
    image = torch.randn(1, 3, 56, 28)
    expected = backbone.eval().forward_features(image)[:, 1]
    torch.testing.assert_close(encode(backbone, image, 1), expected, atol=1e-5, rtol=1e-5)


def test_drop_path_reaches_the_blocks():
    backbone = create_backbone("test_vit", 32, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks]
    assert rates == pytest.approx([0, 0.06, 0.12, 0.18, 0.24, 0.3])


def test_weights_are_loaded_before_tokens_are_copied(tmp_path, backbone_of):
    saved = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    backbone = create_backbone(
        "test_vit", 32, class_tokens=2, pretrained=str(tmp_path / "weights.pth")
    )
    assert "weights.pth" in backbone.origin
    assert torch.equal(backbone.cls_token, saved.cls_token.expand(1, 2, -1))
    assert torch.equal(backbone.pos_embed[:, 2:], saved.pos_embed[:, 1:])


def test_normalization_is_the_pretrainings(backbone_of):
    backbone = create_backbone("test_vit", 32)
    config = timm.get_pretrained_cfg("test_vit")
    assert normalization(backbone) == (config.mean, config.std)
    assert normalization(backbone_of("vit")) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_unknown_name_gets_the_nearest():
    message = refused(create_backbone, "vit_smal_patch16_224", 224)
    assert message.startswith("timm has no model named 'vit_smal_patch16_224'; the nearest are ")
    assert "vit_small_patch16_224" in message


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11", "swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224"]
)
def test_no_vision_transformer(name):
    assert refused(create_backbone, name, 224).startswith(f"{name} is not a Vision Transformer")


@pytest.mark.parametrize(
    "size, remedy",
    [
        (100, "96 x 96"),
        ((64, 100), "64 x 96"),
        (7, "16 x 16"),
        (0, "16 x 16"),
        ((-16, 32), "16 x 32"),
    ],
)
def test_size_that_patches_do_not_tile(size, remedy):
    message = refused(create_backbone, "test_vit", size)
    assert "is not a multiple of the patch size 16 x 16 of test_vit" in message
    assert message.endswith(f"use {remedy}")


def test_several_tokens_for_a_model_without_any():
    message = refused(create_backbone, "test_vit2", 32, class_tokens=2)
    assert "has no class token to copy per scale" in message


def test_dropout_is_of_embeddings_and_mlps_in_every_family(family, backbone_of):
    backbone = backbone_of(family)
    if "relpos" in family:  # adds nothing to its patches, and drops nothing of them
        with pytest.raises(InputError, match="has no place for dropout; use dropout=0"):
            set_dropout(backbone, 0.25)
        return
    set_dropout(backbone, 0.25)
    rates = {name: m.p for name, m in backbone.named_modules() if isinstance(m, torch.nn.Dropout)}
    dropped = {name for name in rates if re.match(r"pos_drop|blocks\.\d\.mlp\.", name)}
    assert len(dropped) >= 4 and {rates[name] for name in dropped} == {0.25}
    assert {rates[name] for name in set(rates) - dropped} <= {0.0}
    set_dropout(backbone, 0.0)
    assert backbone.pos_drop.p == 0
