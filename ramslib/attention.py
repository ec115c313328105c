"""Look inside any timm ViT from outside: query and key of every block, fused attention on.

Fused attention never forms the N x N attention probabilities, and the recurrence of RAMS-Trans does
not need them all at once. So this module keeps query and key of each block (which the backward
pass keeps anyway) and forms the probabilities of one block when they are asked for. The forward
pass, its logits and its gradients are unchanged to the bit.
"""

import math
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CACHED = 2**19  # probabilities formed at a time on a CPU: two MiB


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


class record_attention(TorchFunctionMode):  # noqa: N801 (reads as a verb: with record_attention(...))
    """Record query and key of every block while a backbone runs.

    Use as ``with record_attention(backbone) as blocks: backbone.forward_features(images)``;
    afterwards ``blocks`` holds L `QueryKey`, first block first, or only the ``last`` ones: outside
    of training, query and key of the others are then freed as soon as they are used. It catches
    torch's ``scaled_dot_product_attention`` in the current thread, so query and key already include
    normalization, rotary embedding and head grouping, with no code per model family. Attention
    whose query and key differ in length (attention pooling) is not a block and is passed over.

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
        """Pass every call on, keeping what attention was given."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._keep(*args, **kwargs)
        return func(*args, **kwargs)

    def _keep(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Append one attention call, given what torch's function is given."""
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
        (B, A, Q, N) ``rows @ probabilities``. Of these, a CPU forms only as many at a time as stay
        in its cores' own caches, always in the same place, which takes half the time; other devices
        form those of one image.
    """
    if torch.compiler.is_exporting():  # an exported program takes batches of any size
        return rows @ attention_probabilities(block)
    batch, heads, tokens, _ = block.query.shape
    rows = rows.expand(batch, heads, -1, tokens)
    products = rows.new_zeros(rows.shape)
    group, count = (2, max(1, CACHED // 2 // tokens)) if rows.is_cpu else (heads, tokens)
    room = rows.new_empty(group * count * tokens)
    for image, first in product(range(batch), range(0, heads, group)):
        place = image, slice(first, first + group)
        part = _part(block, place)
        for chunk in (slice(start, start + count) for start in range(0, tokens, count)):
            weights = rows[place][..., chunk]
            shape = len(weights), weights.shape[-1], tokens
            formed = attention_probabilities(part, chunk, room[: math.prod(shape)].view(shape))
            products[place].baddbmm_(weights, formed)
    return products


def _part(block: QueryKey, place: tuple[int, slice]) -> QueryKey:
    """Some heads of one image, without a dimension for images."""
    bias = block.bias
    if bias is not None:
        bias = bias.expand(*block.query.shape[:3], block.key.shape[2])[place]
    return block._replace(query=block.query[place], key=block.key[place], bias=bias)
