"""The released codes' numbers, and the models that should give them again, on any device.

``tests/test_golden.py`` says what the files of a set hold and how close each number must come.
"""

from inspect import signature
from math import isqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ramslib.backbone import extend_class_tokens, overlap_patches
from ramslib.config import Config
from ramslib.model import ProposalSettings, RAMSTrans, configured_mean_std
from ramslib.weights import load_pretrained

OWN = Path(__file__).parents[1] / "tests" / "golden"
RELEASED = Config.preset("released")


def set_names(folder: Path = OWN) -> list[str]:
    """The sets in a folder."""
    return sorted(path.name.removesuffix("_weights.npz") for path in folder.glob("*_weights.npz"))


def read_outputs(name: str, folder: Path = OWN) -> dict[str, np.ndarray]:
    """Arrays of a set's outputs, images (B, H, W, 3) included."""
    arrays = dict(np.load(folder / f"{name}_outputs.npz"))
    if "images" not in arrays:
        pixels = np.array(Image.open(folder / f"{name}_images.png"))
        arrays["images"] = pixels.reshape(len(arrays["logits_scale1"]), -1, *pixels.shape[1:])
    return arrays


def pixels_of(outputs: dict[str, np.ndarray]) -> Tensor:
    """(B, 3, H, W) uint8."""
    return torch.from_numpy(outputs["images"]).permute(0, 3, 1, 2)


def build_backbone(
    name: str, outputs: dict[str, np.ndarray], config: Config = RELEASED, folder: Path = OWN
) -> nn.Module:
    """A set's weights as a configuration loads them; sizes come from their shapes."""
    path = folder / f"{name}_weights.npz"
    shapes = {key: array.shape for key, array in np.load(path).items()}
    block = "Transformer/encoderblock_0/"
    rows, columns, _, width = shapes["embedding/kernel"]
    hidden = shapes[f"{block}MlpBlock_3/Dense_0/kernel"][1]
    backbone = VisionTransformer(
        img_size=outputs["images"].shape[1:3],
        patch_size=(rows, columns),
        embed_dim=width,
        depth=sum(key.endswith("LayerNorm_0/scale") for key in shapes),
        num_heads=shapes[f"{block}MultiHeadDotProductAttention_1/query/kernel"][1],
        mlp_ratio=hidden / width,
        num_classes=0,
    )
    if config.patch_stride:
        overlap_patches(backbone, config.patch_stride)
    is_zoomed = config.pos_embed_resize == "zoom"
    aligns = "align_corners" in signature(checkpoint_filter_fn).parameters  # timm from 1.0.31
    resize = "timm" if is_zoomed and not aligns else config.pos_embed_resize
    load_pretrained(backbone, name, str(path), resize, config.final_norm)
    if is_zoomed and not aligns:
        _zoom_positions(backbone, np.load(path)["Transformer/posembed_input/pos_embedding"])
    return backbone


def _zoom_positions(backbone: nn.Module, stored: np.ndarray) -> None:
    """Positions resampled linearly with aligned corners, as newer versions of timm do it."""
    first, rest = torch.from_numpy(stored).split([1, stored.shape[1] - 1], dim=1)
    side = isqrt(rest.shape[1])
    grid = rest.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    size = backbone.patch_embed.grid_size
    grid = F.interpolate(grid, size, mode="bilinear", align_corners=True)
    positions = torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)
    backbone.pos_embed.data.copy_(positions)


def build(
    name: str, outputs: dict[str, np.ndarray], config: Config = RELEASED, folder: Path = OWN
) -> RAMSTrans:
    """The model that a configuration makes of a set's weights, in evaluation mode."""
    backbone = build_backbone(name, outputs, config, folder)
    extend_class_tokens(backbone, config.scales)
    head = torch.from_numpy(outputs["head_weight"])
    model = RAMSTrans(
        backbone,
        len(head),
        ProposalSettings(config.thresholds(), config.strength, config.proposal, config.scales),
        legacy_boxes=config.legacy_boxes,
        align_corners=config.align_corners,
        mean_std=configured_mean_std(config),
    )
    model.classifier.weight.data.copy_(head)
    return model.eval()
