"""Any timm Vision Transformer as the encoder that all scales share.

Sizes, patch grids and token layouts are read from the model, never repeated. RAMS-Trans puts one
class token per scale into the sequence; `create_backbone` gives an unmodified timm model its class
tokens through the parameters that it has anyway, so every timm feature keeps working.
"""

import difflib
import math
from collections.abc import Sequence

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from ramslib.attention import record_attention
from ramslib.errors import InputError, one_line
from ramslib.weights import load_pretrained


def create_backbone(
    name: str,
    image_size: int | tuple[int, int],
    class_tokens: int = 1,
    further_sizes: Sequence[tuple[int, int]] = (),
    patch_stride: int | None = None,
    pretrained: str = "none",
    drop_path: float = 0.0,
    dropout: float = 0.0,
    **weight_options,
) -> nn.Module:
    """Build a timm Vision Transformer without classifier.

    Args:
        name: timm architecture name, such as ``vit_base_patch16_224``.
        image_size: pixels, one number or (height, width); multiples of the patch size.
        class_tokens: class tokens in the sequence, each starting from the pretrained one and its
            position. 1 leaves the model as timm builds it.
        further_sizes: other sizes of images that it will be given, none larger than ``image_size``;
            positions are resampled to each of them in every forward pass.
        patch_stride: pixels from one patch to the next, see `overlap_patches`; None: they tile.
        pretrained: where weights come from, see `ramslib.weights`.
        drop_path: stochastic depth rate of the last block, growing linearly from the first.
        dropout: see `set_dropout`.
        **weight_options: passed to `load_pretrained` (``pos_embed_resize``, ``final_norm``).

    Returns:
        The model; its ``origin`` is one sentence about the weights in it.

    Raises:
        InputError: unknown name, no Vision Transformer whose attention can be recorded, an image
            size that the patches do not tile, a stride that does not fit, or weights that cannot be
            had.
    """
    backbone = _build(name, (_pair(image_size), *further_sizes), drop_path)
    set_dropout(backbone, dropout)
    if patch_stride is not None:
        overlap_patches(backbone, patch_stride)
    backbone.origin = load_pretrained(backbone, name, pretrained, **weight_options)
    if class_tokens > 1:
        extend_class_tokens(backbone, class_tokens)
    return backbone


def _build(name: str, sizes: Sequence[tuple[int, int]], drop_path: float) -> nn.Module:
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), cutoff=0.0))
        raise InputError(f"timm has no model named {name!r}; the nearest are {near}")
    options = {"num_classes": 0, "drop_path_rate": drop_path}
    with torch.device("meta"):  # shows the architecture without the cost of its weights
        sketch = _create(name, options)
    embed = getattr(sketch, "patch_embed", None)
    if not (hasattr(sketch, "blocks") and hasattr(embed, "grid_size")):
        raise InputError(
            f"{name} is not a Vision Transformer with one grid of patches; choose another"
        )
    for size in sizes:
        _check_size(name, size, embed.feat_ratio(as_scalar=False))
    options["img_size"] = sizes[0]
    if len(set(sizes)) > 1:
        options["dynamic_img_size"] = True
    if count_class_tokens(sketch):
        options["global_pool"] = "token"
    with torch.device("meta"):
        sketch = _create(name, options).eval()
        for size in dict.fromkeys(sizes):
            _check_attention(name, sketch, size)
    return _create(name, options)


def _check_size(name: str, image_size: tuple[int, int], patch: tuple[int, int]) -> None:
    sides = list(zip(image_size, patch, strict=True))
    if any(side < step or side % step for side, step in sides):
        nearest = " x ".join(str(max(step, round(side / step) * step)) for side, step in sides)
        raise InputError(
            f"image size {image_size[0]} x {image_size[1]} is not a multiple of the patch size "
            f"{patch[0]} x {patch[1]} of {name}; use {nearest}"
        )


def _check_attention(name: str, sketch: nn.Module, size: tuple[int, int]) -> None:
    """Encode an image on the meta device, which costs no arithmetic, and refuse what is unusual.

    Raises:
        InputError: windowed attention, two attentions per block, attention that is not torch's,
            tokens that are no sequence, or a model without `forward_head`.
    """
    patches = math.prod(sketch.patch_embed.dynamic_feat_size(size))
    count = getattr(sketch, "num_prefix_tokens", 0) + patches
    image = torch.zeros(1, 3, *size, device="meta")
    try:
        with torch.no_grad(), record_attention(sketch) as blocks:
            tokens = sketch.forward_features(image)
            feature = sketch.forward_head(tokens, pre_logits=True)
    except Exception as error:  # foreign models raise many kinds
        reason = f"{name} does not work here: {one_line(error)}"
        raise InputError(f"choose another backbone, {reason}") from None
    shapes = {tuple(tokens.shape[:2]), *(block.query.mT.shape[::3] for block in blocks)}
    if shapes != {(1, count)} or feature.shape != (1, sketch.num_features):
        reason = f"not every block of {name} attends to all {count} tokens"
        raise InputError(f"choose another backbone, {reason}")


def _create(name: str, options: dict) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=False, **options)
    except TypeError as error:
        if "dynamic_img_size" in options:
            message = f"{name} takes images of one size; leave region_size at none"
            raise InputError(message) from None
        raise InputError(f"{name} is not a Vision Transformer that fits here: {error}") from None


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def image_size(backbone: nn.Module) -> tuple[int, int]:
    """(H, W) pixels that the backbone was built for."""
    return _pair(backbone.patch_embed.img_size)


def patch_grid(backbone: nn.Module) -> tuple[int, int]:
    """(h, w) patches of that image."""
    return tuple(backbone.patch_embed.grid_size)


def normalization(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel that the pretrained backbone expects, for pixels in [0, 1]."""
    config = timm.data.resolve_model_data_config(backbone)
    return tuple(config["mean"]), tuple(config["std"])


def count_class_tokens(backbone: nn.Module) -> int:
    """How many class tokens lead the sequence; 0 if it starts with a register or a patch."""
    token = getattr(backbone, "cls_token", None)
    return 0 if token is None else token.shape[1]


def extend_class_tokens(backbone: nn.Module, count: int) -> None:
    """Give a freshly built timm model ``count`` class tokens in place of its one.

    Each starts as a copy of the pretrained token with the same position row, as in the released
    code. The sequence becomes ``[class 1 .. class S, registers, patches]``.

    Raises:
        InputError: the model has no class token, does not read it, has a second special token, or
            positions that are tied to the sequence length (relative position bias).
    """
    name = type(backbone).__name__
    if not count_class_tokens(backbone):
        raise InputError(f"{name} has no class token to copy per scale; use class_token='shared'")
    if backbone.global_pool != "token":
        raise InputError(f"{name} does not read its class token; build it with global_pool='token'")
    if has_relative_positions(backbone) or hasattr(backbone, "dist_token"):
        raise InputError(f"{name} ties positions to one class token; use class_token='shared'")
    added, position = count - 1, getattr(backbone, "pos_embed", None)
    with torch.no_grad():
        backbone.cls_token = nn.Parameter(backbone.cls_token.repeat(1, count, 1))
        if position is not None and not getattr(backbone, "no_embed_class", False):
            first = position[:, :1].repeat(1, added, 1)
            backbone.pos_embed = nn.Parameter(torch.cat([first, position], dim=1))
    for module in backbone.modules():
        if hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens += added


def set_dropout(backbone: nn.Module, rate: float) -> None:
    """Set the dropout rate of the embedded tokens and of the MLPs, as in Google's ViT.

    timm's ``proj_drop_rate`` would drop the attention's output as well.

    Raises:
        InputError: a rate above 0 for a model that has not these places.
    """
    blocks = [getattr(block, "mlp", None) for block in backbone.blocks]
    places = [getattr(backbone, "pos_drop", None), *blocks]
    if rate and None in places:
        raise InputError(f"{type(backbone).__name__} has no place for dropout; use dropout=0")
    for place in filter(None, places):
        for module in place.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate


def has_relative_positions(backbone: nn.Module) -> bool:
    """Whether attention adds a bias per pair of tokens, tied to the sequence as it was built."""
    names = [name for name, _ in (*backbone.named_modules(), *backbone.named_parameters())]
    return any("rel_pos" in name or "relative_position" in name for name in names)


def overlap_patches(backbone: nn.Module, stride: int) -> None:
    """Let the patches of a freshly built timm model overlap, as TransFG does.

    The convolution that embeds patches takes a smaller step, and the grid and the positions follow:
    ``(side - patch) // stride + 1`` patches per side. Pixels beyond the last patch are not seen.

    Raises:
        InputError: a stride that is larger than a patch, or positions that are no grid of rows.
    """
    embed, name = backbone.patch_embed, type(backbone).__name__
    positions, projection = getattr(backbone, "pos_embed", None), getattr(embed, "proj", None)
    rotary = getattr(backbone, "rope", None) is not None
    tied = positions is None or rotary or has_relative_positions(backbone)
    if tied or hasattr(embed, "backbone") or not isinstance(projection, nn.Conv2d):
        raise InputError(f"{name} ties positions to patches that tile; leave patch_stride at none")
    if not 1 <= stride <= min(embed.patch_size):
        raise InputError(
            f"patch_stride is {stride}; choose 1 to {min(embed.patch_size)}, the patch of {name}"
        )
    sides = zip(embed.img_size, embed.patch_size, strict=True)
    old, new = embed.grid_size, tuple((side - patch) // stride + 1 for side, patch in sides)
    projection.stride = (stride, stride)
    embed.grid_size, embed.num_patches = new, new[0] * new[1]
    prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    resized = resample_abs_pos_embed(positions, new, old, num_prefix_tokens=prefix)
    backbone.pos_embed = nn.Parameter(resized.detach())
