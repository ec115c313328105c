"""Attention strength: one value per patch, from the recorded attention of one scale.

RAMS-Trans, section 3.2: attention probabilities are averaged over heads, the identity is added for
the residual connection, rows are normalized and the blocks are multiplied (attention rollout, Abnar
& Zuidema 2020; the paper's equations 7-9): ``g = G_L ... G_1``, ``G_l = (I + mean_a A_l,a) / 2``.

Only one weighted sum of g's rows is ever used, so no matrix product is formed: ``u <- u G_l`` from
the last block to the first costs O(L N^2) time and, on a CPU, two MiB of memory.

The registry ``STRENGTHS`` maps a name to a function ``(blocks, class_index) -> (B, N)``:

- ``rollout_mean``: mean over all rows of the rollout (the released code);
- ``rollout_class``: the class token's row of the rollout;
- ``last_class``: the class token's row of the last block, heads averaged (no rollout).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ramslib.attention import QueryKey, attention_probabilities, multiply_rows
from ramslib.errors import InputError


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


def rollout_mean(blocks: Sequence[QueryKey], class_index: int = 0) -> Tensor:
    """Mean over all rows of the rollout, as the released code has it; ignores ``class_index``."""
    batch, _, tokens, _ = blocks[0].query.shape
    weights = torch.full((batch, tokens), 1 / tokens, device=blocks[0].query.device)
    return rollout_rows(blocks, weights)


def rollout_class(blocks: Sequence[QueryKey], class_index: int = 0) -> Tensor:
    """The row of class token ``class_index`` of the rollout.

    The last block contributes only that row, which is formed alone.
    """
    row = last_class(blocks, class_index)
    row[:, class_index] += 1
    return rollout_rows(blocks[:-1], row / 2)


def last_class(blocks: Sequence[QueryKey], class_index: int = 0) -> Tensor:
    """The row of class token ``class_index`` of the last block, averaged over heads."""
    row = attention_probabilities(blocks[-1], slice(class_index, class_index + 1))
    return row.mean(dim=1).squeeze(1)


STRENGTHS: dict[str, Callable[[Sequence[QueryKey], int], Tensor]] = {
    "rollout_mean": rollout_mean,
    "rollout_class": rollout_class,
    "last_class": last_class,
}

LAST_BLOCKS = {"last_class": 1}  # how many of the last blocks a strength reads; others read all


def attention_strength(
    blocks: Sequence[QueryKey], name: str, grid: tuple[int, int], class_index: int = 0
) -> Tensor:
    """Attention strength of every patch.

    Args:
        blocks: recorded attention of all blocks, or of as many last ones as ``LAST_BLOCKS`` says.
        name: a key of ``STRENGTHS``.
        grid: (h, w) patches; the tokens before the last h * w are prefix tokens and are dropped.
        class_index: which class token's row is read, 0 for scale 1.

    Returns:
        (B, h, w) float32. Only ratios matter: the threshold is a multiple of the mean.

    Raises:
        InputError: unknown name.
    """
    if name not in STRENGTHS:
        known = ", ".join(STRENGTHS)
        raise InputError(f"unknown attention strength {name!r}; choose one of {known}")
    height, width = grid
    with torch.no_grad(), torch.autocast(blocks[0].query.device.type, enabled=False):
        values = STRENGTHS[name](blocks, class_index)
    return values[:, -height * width :].unflatten(1, (height, width))
