"""TransFG: a Vision Transformer whose last block sees only the patches that its heads select.

He et al., "TransFG: A Transformer Architecture for Fine-grained Recognition", AAAI 2022; a baseline
for RAMS-Trans in the same training and evaluation. The attention of all blocks but the last is
multiplied, head by head; each head selects the patch that its class token attends to most. The
class token and these patches go through the last block, and a contrastive loss keeps class tokens
of different classes apart. Patches may overlap (`backbone.overlap_patches`).

Only the class token's row of the product is read, so a row vector per head runs from the last
matrix to the first and no matrix product is formed, as in `attention.rollout_rows`.

Added to the paper, which knows one class token only: register tokens go through the last block too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramslib.acceleration import last_block_for_one_token
from ramslib.attention import QueryKey, attention_probabilities, multiply_rows, record_attention
from ramslib.backbone import count_class_tokens, has_relative_positions
from ramslib.boxes import full_image_boxes
from ramslib.classifier import ImageClassifier, ScaleOutput, Scales
from ramslib.errors import InputError


class Parts(NamedTuple):
    """What TransFG computes for a batch of images.

    Attributes:
        logits: (B, K).
        feature: (B, D) the class token after the final norm: what is classified.
        patches: (B, A) long, the patch that each head selected, row by row; heads may agree.
    """

    logits: Tensor
    feature: Tensor
    patches: Tensor


class TransFG(ImageClassifier):
    """Part selection over any timm Vision Transformer with a class token and absolute positions.

    Args:
        backbone: from `create_backbone`, with one class token; ``patch_stride`` makes its patches
            overlap. Input size and patch grid are read from it.
        num_classes: K.
        contrastive_weight: of the contrastive loss beside the cross entropy.
        contrastive_margin: see `contrastive_loss`.
        mean_std: see `ImageClassifier`.

    Raises:
        InputError: a backbone whose last block needs all tokens.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        contrastive_weight: float = 1.0,
        contrastive_margin: float = 0.4,
        mean_std: tuple | None = None,
    ):
        _check_backbone(backbone)
        super().__init__(backbone, num_classes, mean_std)
        self.contrastive_weight = contrastive_weight
        self.contrastive_margin = contrastive_margin

    def iterate_scales(self, images: Tensor, high_res: Tensor | None = None) -> Scales:
        """The single scale, the whole image; ``high_res`` is not read."""
        self.check_size(images)
        parts = self.run_parts(images)
        boxes = full_image_boxes(images)
        yield ScaleOutput(parts.logits, images, boxes, feature=parts.feature)

    def run_parts(self, images: Tensor) -> Parts:
        """Encode images (B, 3, H, W), select patches before the last block, and classify.

        The tokens are exchanged by a hook, so the forward pass is timm's own.
        """
        selected = []

        def keep_parts(block: nn.Module, inputs: tuple) -> tuple:
            selected.append(select_parts(blocks, self.grid))
            return gather_tokens(inputs[0], selected[0], self.grid), *inputs[1:]

        hook = self.backbone.blocks[-1].register_forward_pre_hook(keep_parts)
        record, accelerate = record_attention(self.backbone), last_block_for_one_token
        with hook, record as blocks, accelerate(self.backbone, 0):
            tokens = self.backbone.forward_features(images)
        feature = self.backbone.forward_head(tokens, pre_logits=True)
        return Parts(self.classifier(feature), feature, selected[0])

    def loss(self, output: ScaleOutput, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy plus the contrastive loss of the batch.

        That batch is a micro-batch of one process: with ``grad_accum_steps`` or several processes,
        pairs are formed within each and the losses are averaged.
        """
        contrastive = contrastive_loss(output.feature, labels, self.contrastive_margin)
        return super().loss(output, labels, label_smoothing) + self.contrastive_weight * contrastive


def _check_backbone(backbone: nn.Module) -> None:
    name, advice = type(backbone).__name__, "choose a plain ViT with a class token for TransFG"
    if count_class_tokens(backbone) != 1:
        tokens = count_class_tokens(backbone) or "no"
        raise InputError(f"{name} has {tokens} class token(s), not one; {advice}")
    if backbone.global_pool != "token":
        raise InputError(f"{name} does not read its class token; build it with global_pool='token'")
    if has_relative_positions(backbone) or getattr(backbone, "rope", None) is not None:
        raise InputError(f"attention of {name} needs every patch in its place; {advice}")
    if len(backbone.blocks) < 2:
        raise InputError(f"{name} has one block, and none before it to select patches; {advice}")


@torch.no_grad()
def select_parts(blocks: Sequence[QueryKey], grid: tuple[int, int]) -> Tensor:
    """The patch that each head's class token attends to most through all blocks.

    Args:
        blocks: recorded attention of the blocks before the last, first block first.
        grid: (h, w) patches: the last h * w tokens.

    Returns:
        (B, A) long, in [0, h * w): argmax of the class token's row of ``A_(L-1) ... A_1``, raw
        probabilities per head without identity; the first one on a tie.
    """
    with torch.autocast(blocks[0].query.device.type, enabled=False):
        rows = attention_probabilities(blocks[-1], slice(0, 1))
        for block in reversed(blocks[:-1]):
            rows = multiply_rows(rows, block)
    return rows[:, :, 0, -grid[0] * grid[1] :].argmax(dim=-1)


def gather_tokens(tokens: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Prefix tokens and the chosen patch tokens: (B, N, D), (B, A) -> (B, prefix + A, D)."""
    count = grid[0] * grid[1]
    index = patches[..., None].expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :-count], tokens[:, -count:].gather(1, index)], dim=1)


def contrastive_loss(features: Tensor, labels: Tensor, margin: float = 0.4) -> Tensor:
    """Cosines of equal labels drawn to 1, of different labels pushed below a margin.

    Args:
        features: (B, D).
        labels: (B,).
        margin: cosine above which a pair of different labels costs something.

    Returns:
        Scalar: the sum over all ordered pairs, each image with itself included, divided by B^2.
    """
    features = F.normalize(features.float(), dim=1)
    cosine = features @ features.T
    same = labels[:, None] == labels
    return torch.where(same, 1 - cosine, (cosine - margin).clamp(min=0)).mean()
