"""RAMS-Trans word for word: what an implementation costs that follows the paper's equations.

Attention probabilities of all blocks and heads are kept, the rollout multiplies N x N matrices,
image by image, and the graphs of all scales stay until one backward pass. Same function as
`ramslib.model.RAMSTrans` with strength ``rollout_mean`` (a test compares them), nothing shared.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn


class LiteralRAMS(nn.Module):
    """Two scales or more over a timm Vision Transformer with one class token per scale."""

    def __init__(self, backbone: nn.Module, classifier: nn.Linear, scales: int = 2, eta: float = 1):
        super().__init__()
        self.backbone, self.classifier = backbone, classifier
        self.scales, self.eta = scales, eta
        self.maps: list[Tensor] = []
        for block in backbone.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda *call: self.maps.append(call[2]))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits (B, K) of every scale of images (B, 3, H, W)."""
        logits = []
        for scale in range(self.scales):
            self.maps.clear()
            tokens = self.backbone.forward_features(images)
            logits.append(self.classifier(tokens[:, scale]))
            if scale < self.scales - 1:
                maps = [[block[image] for block in self.maps] for image in range(len(images))]
                images = torch.stack(list(map(self.look_closer, images, maps)))
        return logits

    def look_closer(self, image: Tensor, maps: list[Tensor]) -> Tensor:
        """The next scale's view of one image (3, H, W), from its L maps (A, N, N)."""
        rollout = identity = torch.eye(maps[0].shape[-1], device=image.device)
        for each in maps:
            mixed = each.mean(dim=0) + identity
            rollout = (mixed / mixed.sum(dim=-1, keepdim=True)) @ rollout
        (height, width), size = self.backbone.patch_embed.grid_size, image.shape[1:]
        strength = rollout.mean(dim=0)[-height * width :].reshape(height, width).detach()
        rows, columns = largest_component((strength > self.eta * strength.mean()).cpu().numpy())
        tall, wide = size[0] // height, size[1] // width
        top, bottom = rows.start * tall, rows.stop * tall
        left, right = columns.start * wide, columns.stop * wide
        crop = image[None, :, top:bottom, left:right]
        return F.interpolate(crop, size, mode="bilinear")[0].detach()


def largest_component(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the largest 8-connected component of a mask (h, w), else of all."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if count == 0:
        return tuple(slice(0, side) for side in mask.shape)
    areas = np.bincount(labels.ravel())[1:]
    return ndimage.find_objects(labels)[areas.argmax()]
