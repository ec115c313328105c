"""Every kind of timm ViT with a patch grid: its recorded attention is right, or it is refused.

A kind is a class, its types of modules and the flags that change the sequence of tokens. `KINDS`
has the smallest model of each; the slow tests group all names of timm and compare.
"""

import importlib
import inspect
import warnings
from contextlib import suppress

import pytest
import timm
import torch

from ramslib.attention import attention_probabilities, record_attention
from ramslib.backbone import create_backbone, image_size, patch_grid
from ramslib.errors import InputError

KINDS = """
aimv2_large_patch14_224 beit3_base_patch16_224 beit_base_patch16_224 deit3_small_patch16_224
deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 eva02_base_patch14_224
eva02_base_patch16_clip_224 eva02_enormous_patch14_clip_224 eva02_tiny_patch14_224
eva_giant_patch14_224 eva_giant_patch14_clip_224 flexivit_small test_vit test_vit2 test_vit3
test_vit4 test_vit_relpos vit_base_mci_224 vit_base_patch14_reg1_tipsv2
vit_base_patch16_clip_quickgelu_224 vit_base_patch16_gap_224 vit_base_patch16_radio_v3
vit_base_patch16_reg4_gap_256 vit_base_patch16_rpn_224 vit_base_patch16_siglip_224
vit_base_patch16_xp_224 vit_base_patch32_siglip_256 vit_base_patch32_siglip_gap_256
vit_betwixt_patch16_rope_reg4_gap_256 vit_giant_patch14_dinov2 vit_giant_patch14_reg1_tipsv2
vit_giant_patch14_reg4_dinov2 vit_giant_patch16_lingbot vit_huge_patch16_radio_v3
vit_intern300m_patch14_448 vit_little_patch16_reg4_gap_256 vit_medium_patch16_gap_240
vit_medium_patch16_rope_reg1_gap_256 vit_mediumd_patch16_rope_reg1_gap_256
vit_pe_core_gigantic_patch14_448 vit_pe_core_tiny_patch16_384 vit_pe_lang_gigantic_patch14_448
vit_pe_spatial_tiny_patch16_512 vit_pwee_patch16_reg1_gap_256 vit_relpos_base_patch16_clsgap_224
vit_relpos_medium_patch16_cls_224 vit_relpos_small_patch16_rpn_224 vit_small_patch14_dinov2
vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3 vit_small_patch16_lingbot
vit_small_patch16_rope_224 vit_small_patch16_rope_ape_224 vit_small_patch16_rope_mixed_224
vit_small_patch16_rope_mixed_ape_224 vit_small_plus_patch16_dinov3
vit_small_plus_patch16_dinov3_qkvb vit_small_r26_s32_224 vit_small_resnet50d_s16_224
vit_so150m2_patch16_reg1_gap_256 vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_map_256
vit_so400m_patch16_radio_v4 vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224
vit_wee_patch16_reg1_gap_256 vitamin_small_224
""".split()
LARGE = ["vit_base_patch16_sapiens2", "vitamin_xlarge_256"]  # sizes that cannot be chosen
REFUSED = {  # and a word of the reason
    "cait_xxs24_224": "recorded 0",
    "convit_tiny": "recorded 0",
    "deepseek_vit_412m_enc": "does not support",
    "qwen3_vit_88m_enc": "does not support",
    "samvit_base_patch16": "not every block",
    "samvit_base_patch16_224": "not every block",
    "vit_dpwee_patch16_reg1_gap_256": "recorded",
    "vit_dwee_patch16_reg1_gap_256": "recorded",
    "vit_small_patch16_18x2_224": "recorded",
}
create = timm.create_model


@pytest.fixture(autouse=True)
def three_narrow_blocks(monkeypatch):
    """timm builds three blocks of a tiny width where these can be chosen."""

    def small(name, **options):
        for sizes in ({"depth": 3, "embed_dim": 192, "num_heads": 3}, {"depth": 3}):
            with suppress(TypeError, AssertionError, RuntimeError, ValueError):
                return create(name, **sizes, **options)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", small)


def small_size(name, rows=3, columns=4):
    """Pixels of a few patches."""
    with torch.device("meta"):
        height, width = timm.create_model(name).patch_embed.feat_ratio(as_scalar=False)
    return rows * height, columns * width


def build_kind(name):
    """In float64; logits of attention have a standard deviation of about 1.5."""
    torch.manual_seed(0)
    backbone = create_backbone(name, small_size(name)).double().eval()
    modules = [each for each in backbone.blocks.modules() if hasattr(each, "fused_attn")]
    for module in modules:
        for key in ("qkv", "q_proj", "k_proj", "in_proj"):
            if getattr(module, key, None) is not None:
                weight = getattr(module, key).weight
                torch.nn.init.normal_(weight, std=(1.5 / weight.shape[1]) ** 0.5)
    return backbone, modules


@pytest.mark.parametrize("name", KINDS + [pytest.param(n, marks=pytest.mark.slow) for n in LARGE])
@torch.no_grad()
def test_recorded_attention_is_the_softmax_of_unfused_attention(name):
    backbone, modules = build_kind(name)
    image, formed = torch.randn(1, 3, *image_size(backbone), dtype=torch.float64), []
    with record_attention(backbone) as blocks:
        fused = backbone.forward_features(image)
    for module in modules:
        module.fused_attn = False
        module.attn_drop.register_forward_pre_hook(lambda _, inputs: formed.append(inputs[0]))
    plain = backbone.forward_features(image)
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-6)
    height, width = patch_grid(backbone)
    for block, expected in zip(blocks, formed, strict=True):
        found = attention_probabilities(block)
        assert found.shape[-1] == backbone.num_prefix_tokens + height * width
        assert (found - expected).abs().max() <= 1e-6
        assert expected.std() > 0.1 / expected.shape[-1]  # not uniform


@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_is_refused_when_it_is_built(name):
    with pytest.raises(InputError) as caught:
        create_backbone(name, small_size(name, 4, 4) if "convit" not in name else 224)
    message = str(caught.value)
    assert "\n" not in message and name in message and REFUSED[name] in message
    assert message.startswith("choose another backbone")


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
def test_hybrids_take_multiples_of_what_their_stem_makes_of_a_patch(name):
    assert patch_grid(create_backbone(name, (96, 64))) == (3, 2)
    with pytest.raises(InputError, match="multiple of the patch size 32 x 32 .* use 128 x 128"):
        create_backbone(name, 112)
    with pytest.raises(InputError, match="leave patch_stride at none"):
        create_backbone(name, 96, patch_stride=16)


def kind(model):
    """What must be the same in two models for one to stand for the other."""
    attention = getattr(model.blocks[0], "attn", None)
    rope = getattr(model, "rope", None)
    flags = ("global_pool", "no_embed_class", "num_prefix_tokens", "dynamic_img_size")
    parts = ("pos_embed", "cls_token", "reg_token", "dist_token")
    return (
        type(model),
        frozenset(map(type, model.modules())),
        *(str(getattr(model, flag, None)) for flag in flags),
        *(getattr(model, part, None) is not None for part in parts),
        *(getattr(attention, part, None) is not None for part in ("qkv", "q_bias")),
        getattr(attention, "rotate_half", None),
        getattr(rope, "feat_shape", None) is not None,
    )


def names_with_a_grid():
    """Names in the modules of timm that mention blocks and patches: others take long to build."""
    for module in timm.list_modules():
        source = inspect.getsource(importlib.import_module(f"timm.models.{module}"))
        if "patch_embed" in source and "self.blocks" in source:
            yield from timm.list_models(module=module)


@pytest.mark.slow
def test_every_kind_of_timm_is_here():
    missing, known = {}, KINDS + LARGE + list(REFUSED)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = {kind(timm.create_model(name, num_classes=0)) for name in known}
        for name in names_with_a_grid():
            model = timm.create_model(name, num_classes=0)
            if hasattr(getattr(model, "patch_embed", None), "grid_size") and hasattr(
                model, "blocks"
            ):
                missing.setdefault(kind(model), []).append(name)
    assert [names for key, names in missing.items() if key not in seen] == []
