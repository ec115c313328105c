"""Attention of any timm ViT, recorded from outside, and the attention strength of each patch.

Fused attention never forms the N x N attention probabilities, and RAMS-Trans does not need all of
them at once. `record_attention` keeps query and key of each block, which the backward pass keeps
anyway; `attention_probabilities` forms those of one block. The forward pass, its logits and its
gradients stay bit-identical.

A strength is a function of a `RecordedScale` that gives one value per patch. RAMS-Trans, section
3.2, averages attention over heads, adds the identity for the residual connection, normalizes the
rows and multiplies the blocks (attention rollout, Abnar & Zuidema 2020; the paper's equations 7 to
9): ``g = G_L ... G_1`` with ``G_l = (I + mean_a A_l,a) / 2``. Only one weighted sum of g's rows is
ever used, so no matrix product is formed: ``u <- u G_l``, from the last block to the first.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ramslib import acceleration
from ramslib.errors import InputError
from ramslib.extensions import reads, resolve

LAST_BLOCKS = 3  # how many blocks the strengths of "last blocks" read


class QueryKey(NamedTuple):
    """What one block's attention compares.

    Attributes:
        query: (B, A, N, D), after normalization and rotary embedding.
        key: (B, A, N, D), expanded to all heads where the block groups its queries.
        bias: added to the logits, broadcastable to (B, A, N, N), or None.
        scale: factor of the inner product.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None
    scale: float


class RecordedScale(NamedTuple):
    """What the forward pass of one scale leaves to strengths and proposals.

    Attributes:
        blocks: recorded attention, first block first: of all blocks, or of as many last ones as the
            strength reads.
        grid: (h, w) patches; the last h * w tokens, row by row.
        class_index: which token of the sequence is the class token of this scale.
        image: (B, 3, H, W) normalized input of this scale.
        tokens: (B, h, w, D) patch tokens after the last block; None where nothing reads them.
    """

    blocks: Sequence[QueryKey]
    grid: tuple[int, int]
    class_index: int = 0
    image: Tensor | None = None
    tokens: Tensor | None = None


class record_attention(TorchFunctionMode):  # noqa: N801 (a verb: with record_attention(...))
    """Record query and key of every block while a backbone runs.

    Use as ``with record_attention(backbone) as blocks: backbone.forward_features(images)``;
    afterwards ``blocks`` holds L `QueryKey`, first block first, or only the ``last`` ones: outside
    of training, query and key of the others are then freed as soon as they are used. It catches
    torch's ``scaled_dot_product_attention`` in the current thread, so query and key already include
    normalization, rotary embedding and head grouping, with no code per model family. Attention
    whose query and key differ in length (attention pooling) is not a block and is ignored.

    Raises:
        RuntimeError: on exit, unless each block was seen exactly once (fused attention switched
            off, a block with two attentions, or a model replica in another thread).
    """

    def __init__(self, backbone: nn.Module, last: int | None = None):
        super().__init__()
        self.depth, self.seen = len(backbone.blocks), 0
        self.last = last or self.depth
        self.blocks: list[QueryKey] = []

    def __enter__(self) -> list[QueryKey]:
        super().__enter__()
        return self.blocks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Pass every call on, and keep what attention is given."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._keep(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is acceleration.compiled_block:
            for call in output[1]:
                self._keep(**call)
        return output

    def _keep(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
              scale=None, enable_gqa=False) -> None:  # fmt: skip
        """Append one attention call, with the arguments of torch's function."""
        query, key = query.detach(), key.detach()
        tokens = query.shape[-2]
        if tokens != key.shape[-2]:
            return
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        if is_causal:
            attn_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        bias = None if attn_mask is None else attn_mask.detach()
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, float("-inf"))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.seen += 1
        self.blocks.append(QueryKey(query, key, bias, scale))
        del self.blocks[: -self.last]

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0] is None and self.seen != self.depth:
            raise RuntimeError(
                f"recorded {self.seen} attention calls for {self.depth} blocks; "
                "is fused attention off, or does a block hold more than one attention?"
            )


def attention_probabilities(
    block: QueryKey, rows: slice = slice(None), out: Tensor | None = None
) -> Tensor:
    """Softmax attention probabilities of one block, in float32 whatever the recorded type.

    Args:
        block: the recorded query and key.
        rows: which query tokens; all by default.
        out: a contiguous (B, A, rows, N) float32 tensor to form them in, or None.

    Returns:
        (B, A, rows, N); each row sums to 1.
    """
    query = block.query[..., rows, :].float() * block.scale
    logits = torch.matmul(query, block.key.float().mT, out=out)
    if block.bias is not None:
        logits += block.bias if block.bias.shape[-2] == 1 else block.bias[..., rows, :]
    return torch.softmax(logits, dim=-1, out=out)


def multiply_rows(rows: Tensor, block: QueryKey) -> Tensor:
    """Row vectors times the probabilities of a block, head by head.

    Args:
        rows: (B, A, Q, N) float32, or (B, 1, Q, N) for rows that all heads share.
        block: the recorded query and key.

    Returns:
        (B, A, Q, N) ``rows @ probabilities``.
    """
    if acceleration.is_on():
        return acceleration.multiply_rows_in_cache(rows, block, attention_probabilities)
    return rows @ attention_probabilities(block)


def rollout_rows(blocks: Sequence[QueryKey], weights: Tensor) -> Tensor:
    """Weighted sum of the rows of the attention rollout, ``weights @ g``.

    Args:
        blocks: L recorded blocks, first block first.
        weights: (B, N) float32, one weight per row of g.

    Returns:
        (B, N) float32; sums to the sum of the weights.
    """
    for block in reversed(blocks):
        products = multiply_rows(weights[:, None, None], block)
        weights = (weights + products.mean(dim=1).squeeze(1)) / 2
    return weights


def class_row(block: QueryKey, class_index: int = 0) -> Tensor:
    """The row of a class token in one block, averaged over heads: (B, N)."""
    row = attention_probabilities(block, slice(class_index, class_index + 1))
    return row.mean(dim=1).squeeze(1)


def on_grid(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values of all tokens as a map of the patches: (B, N) -> (B, h, w)."""
    return values[:, -grid[0] * grid[1] :].unflatten(1, grid)


@reads(blocks=None)
def rollout_mean(recorded: RecordedScale) -> Tensor:
    """Mean over all rows of the rollout, as in the released code."""
    batch, _, tokens, _ = recorded.blocks[0].query.shape
    weights = torch.full((batch, tokens), 1 / tokens, device=recorded.blocks[0].query.device)
    return on_grid(rollout_rows(recorded.blocks, weights), recorded.grid)


@reads(blocks=None)
def rollout_class(recorded: RecordedScale) -> Tensor:
    """The class token's row of the rollout; of the last block only that row is formed."""
    row = class_row(recorded.blocks[-1], recorded.class_index)
    row[:, recorded.class_index] += 1
    return on_grid(rollout_rows(recorded.blocks[:-1], row / 2), recorded.grid)


@reads(blocks=1)
def last_class(recorded: RecordedScale) -> Tensor:
    """The class token's row of the last block, averaged over heads (no rollout)."""
    return on_grid(class_row(recorded.blocks[-1], recorded.class_index), recorded.grid)


@reads(blocks=LAST_BLOCKS)
def last_blocks_mean(recorded: RecordedScale) -> Tensor:
    """The class token's rows of the last blocks, averaged over blocks and heads."""
    rows = [class_row(block, recorded.class_index) for block in recorded.blocks[-LAST_BLOCKS:]]
    return on_grid(torch.stack(rows).mean(dim=0), recorded.grid)


@reads(blocks=LAST_BLOCKS, tokens=True)
def token_contrast(recorded: RecordedScale) -> Tensor:
    """How much more a patch token is like the attended object than like the image's border.

    Cosine to the mean of the tokens weighted by `last_blocks_mean`, minus cosine to the mean of the
    border's tokens, from 0 for the least patch.
    """
    tokens, weights = F.normalize(recorded.tokens.float(), dim=-1), last_blocks_mean(recorded)
    attended = (tokens * weights[..., None]).sum(dim=(1, 2))
    cosines = [
        F.cosine_similarity(tokens, mean[:, None, None], dim=-1)
        for mean in (attended, border_sum(tokens))
    ]
    contrast = cosines[0] - cosines[1]
    return contrast - contrast.amin(dim=(1, 2), keepdim=True)


def border_sum(values: Tensor) -> Tensor:
    """Sum over the patches at the border of a map: (B, h, w, ...) -> (B, ...)."""
    return values.sum(dim=(1, 2)) - values[:, 1:-1, 1:-1].sum(dim=(1, 2))


def principal_components(tokens: Tensor, count: int = 1) -> Tensor:
    """Each token's value on the first principal components: (B, n, D) -> (B, n, count).

    Their signs are arbitrary; an image with a token that is not finite has NaN.
    """
    centered = tokens.float() - tokens.float().mean(dim=1, keepdim=True)
    left, sizes, _ = torch.linalg.svd(centered.nan_to_num(), full_matrices=False)
    return (left * sizes[:, None])[..., :count] + 0 * centered.sum(dim=(1, 2), keepdim=True)


@reads(blocks=0, tokens=True)
def token_pca(recorded: RecordedScale) -> Tensor:
    """The first principal component of an image's unit patch tokens, where it is positive.

    Of its two signs the one that is negative on average over the image's border (Oquab et al.,
    "DINOv2", 2023, tell foreground from background by that component).
    """
    tokens = F.normalize(recorded.tokens.float(), dim=-1).flatten(1, 2)
    values = principal_components(tokens).unflatten(1, recorded.grid)[..., 0]
    is_inside_out = (border_sum(values) > 0)[:, None, None]
    return torch.where(is_inside_out, -values, values).clamp(min=0)


STRENGTHS: dict[str, Callable[[RecordedScale], Tensor]] = {
    "rollout_mean": rollout_mean,
    "rollout_class": rollout_class,
    "last_class": last_class,
    "last_blocks_mean": last_blocks_mean,
    "token_contrast": token_contrast,
    "token_pca": token_pca,
}
CLASS_STRENGTHS = (rollout_class, last_class, last_blocks_mean, token_contrast)


def attention_strength(recorded: RecordedScale, strength: str | Callable = "last_class") -> Tensor:
    """Attention strength of every patch.

    Args:
        recorded: one scale.
        strength: a key of ``STRENGTHS``, ``path/to/file.py:name``, or a function of a recorded
            scale.

    Returns:
        (B, h, w) float32. Only ratios matter: the threshold is a multiple of the mean.

    Raises:
        InputError: unknown name, or a function that gives another shape.
    """
    function = resolve(strength, STRENGTHS, "strength")
    given = recorded.blocks[-1].query if recorded.blocks else recorded.image
    with torch.no_grad(), torch.autocast(given.device.type, enabled=False):
        values = function(recorded)
    wanted = (given.shape[0], *recorded.grid)
    if not isinstance(values, Tensor) or values.shape != wanted:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"strength {getattr(function, '__name__', strength)!r} gives {found}; it must return "
            f"a tensor of shape (B, h, w) = {wanted}"
        )
    return values.float()
