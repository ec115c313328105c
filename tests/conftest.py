"""Shared fixtures: tiny, freshly randomized backbones of every family of timm that is supported."""

import functools
import pkgutil

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

# Modules of trainings, processes, exports, kernels and browsers: `make check` leaves them out.
SLOW = """
test_backbone_kinds test_benchmarks test_browser test_calibration test_data_notebook test_export
test_forks test_golden test_launch test_notebooks test_notebooks_command test_old_runs test_photos
test_processes_benchmark test_report test_strangers test_sweep test_trainer test_training
test_validation
""".split()


def pytest_ignore_collect(collection_path, config):
    """Do not even import the slow modules where they are left out."""
    left_out = config.option.markexpr == "not slow"
    return True if left_out and collection_path.stem in SLOW else None


def pytest_collection_modifyitems(items):
    """Mark all tests of the slow modules; they come first, so that both cores end together."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.stem not in SLOW)


SIZE = {"img_size": (24, 32), "patch_size": 8, "num_classes": 0}
VIT = SIZE | {"embed_dim": 32, "depth": 3, "num_heads": 2}
TOKEN = VIT | {"global_pool": "token"}
ROTARY = TOKEN | {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
LAYER_SCALE = {"init_values": 0.5}

VisionTransformer, Distilled, Eva, Beit, RelPos = (  # timm is imported where one is built
    f"timm.models.{name}"
    for name in (
        "vision_transformer:VisionTransformer",
        "deit:VisionTransformerDistilled",
        "eva:Eva",
        "beit:Beit",
        "vision_transformer_relpos:VisionTransformerRelPos",
    )
)
FAMILIES = {
    "vit": (VisionTransformer, TOKEN),
    "qk_norm": (VisionTransformer, TOKEN | {"qk_norm": True}),
    "clip": (VisionTransformer, TOKEN | {"pre_norm": True}),
    "dinov2": (VisionTransformer, TOKEN | LAYER_SCALE),
    "dinov2_registers": (
        VisionTransformer,
        TOKEN | LAYER_SCALE | {"reg_tokens": 4, "no_embed_class": True},
    ),
    "deit3": (VisionTransformer, TOKEN | LAYER_SCALE | {"no_embed_class": True}),
    "distilled": (Distilled, VIT),
    "siglip": (VisionTransformer, VIT | {"class_token": False, "global_pool": "map"}),
    "average": (VisionTransformer, VIT | {"class_token": False, "global_pool": "avg"}),
    "registers_average": (
        VisionTransformer,
        VIT | {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    ),
    "eva": (Eva, TOKEN | {"use_abs_pos_emb": True}),
    "eva02": (Eva, ROTARY | {"use_abs_pos_emb": True, "swiglu_mlp": True}),
    "eva_split": (Eva, ROTARY | {"qkv_fused": False}),
    "dinov3": (Eva, ROTARY | {"rope_type": "dinov3", "num_reg_tokens": 4, "no_embed_class": True}),
    "rotary_mixed": (Eva, ROTARY | {"rope_type": "mixed", "attn_type": "rope"}),
    "grouped_query": (
        Eva,
        ROTARY | {"attn_type": "rope", "qkv_fused": False, "qk_norm": True, "num_kv_heads": 1},
    ),
    "beit": (Beit, TOKEN | {"use_abs_pos_emb": False, "use_rel_pos_bias": True}),
    "beit_shared": (Beit, TOKEN | {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}),
    "relpos": (RelPos, TOKEN | {"class_token": True, "rel_pos_type": "bias"}),
    "relpos_mlp": (RelPos, TOKEN | {"class_token": True}),
}
ABSOLUTE = ["vit", "qk_norm", "clip", "dinov2", "dinov2_registers", "deit3", "eva"]
ROTARIES = ["eva02", "eva_split", "dinov3", "rotary_mixed", "grouped_query"]


def build(family: str, seed: int = 0, **changes):
    """A backbone of a family with weights large enough that attention is far from uniform."""
    import torch  # not by the process that hands out tests: seconds

    kind, options = FAMILIES[family]
    kind = pkgutil.resolve_name(kind)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        backbone = kind(**options | changes).eval()
        for parameter in backbone.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(spread * torch.randn_like(parameter))
    return backbone


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Of tiny tensors, threads only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request):
    """Name of each supported family in turn."""
    return request.param


@pytest.fixture(params=ABSOLUTE + ROTARIES)
def scalable_family(request):
    """Name of each family that can hold several class tokens."""
    return request.param


@pytest.fixture
def backbone_of():
    """Function (family, seed=0, **changed options) -> tiny backbone in eval mode."""
    return build


@pytest.fixture
def images():
    """Function (count=2, size=(24, 32), seed=0) -> (B, 3, H, W) of normal noise."""
    return functools.partial(_noise, channels=3)


def _noise(count=2, size=(24, 32), seed=0, channels=3):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, *size, generator=generator)
