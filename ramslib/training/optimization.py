"""The optimization step: losses of all scales, their gradients, and who applies them.

Optimizers, weight-decay rules and layer-wise decay are timm's. What is ours is `backward_scales`:
each scale is back-propagated before the next one runs, which gives the gradients of the joint loss
at the memory of one scale, because no gradient flows through a crop.
"""

from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from ramslib.acceleration import selective_checkpointing
from ramslib.classifier import ImageClassifier
from ramslib.config import Config
from ramslib.errors import InputError

AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def loss_weights(loss: str | Sequence[float], scales: int) -> list[float]:
    """Weight of each scale's cross entropy.

    Args:
        loss: ``sum`` (paper), ``first`` (release), ``last``, or the weights, coarse to fine; those
            beyond the last scale are left unread.
        scales: how many.
    """
    if not isinstance(loss, str):
        return list(loss[:scales])
    chosen = {"sum": range(scales), "first": [0], "last": [scales - 1]}[loss]
    return [float(scale in chosen) for scale in range(scales)]


def backward_scales(
    model: ImageClassifier,
    pixels: Tensor,
    labels: Tensor,
    weights: list[float],
    label_smoothing: float = 0.0,
    amp: torch.dtype | None = None,
    factor: float | Tensor = 1.0,
) -> Tensor:
    """Look at each scale and back-propagate its loss before the next one runs.

    Crops carry no gradient, so the accumulated gradients are those of the weighted sum of losses.

    Args:
        model: in training mode.
        pixels: (B, 3, Hs, Ws), see `ImageClassifier.forward`.
        labels: (B,).
        weights: of each scale's loss; a scale of weight 0 is looked at without gradient.
        label_smoothing: of the cross entropy.
        amp: autocast type, None for float32.
        factor: multiplies the losses before the backward pass (micro-batch share, loss scale).

    Returns:
        (S,) the scales' losses, detached.
    """
    outputs = model.forward_scales(pixels)
    losses = []
    for weight in weights:
        with torch.set_grad_enabled(weight > 0):
            autocast = torch.autocast(pixels.device.type, amp, enabled=amp is not None)
            with autocast, selective_checkpointing():
                output = next(outputs)
            loss = model.loss(output, labels, label_smoothing)
            if weight > 0:
                (loss * weight * factor).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def freeze(model: ImageClassifier, blocks: int) -> None:
    """Stop training the first blocks, and all that comes before but one class token per scale.

    Those start as copies of one token and, in a sequence, stay copies until a gradient tells them
    apart: it runs back through the frozen blocks. A shared token is frozen, and it ends there.

    Raises:
        InputError: more blocks than the backbone has.
    """
    depth = len(model.backbone.blocks)
    if not 0 <= blocks <= depth:
        raise InputError(f"frozen_blocks is {blocks}, but the backbone has {depth} blocks")
    if blocks == 0:
        return
    model.requires_grad_(False)
    model.backbone.blocks[blocks:].requires_grad_(True)
    model.classifier.requires_grad_(True)
    if model.per_scale_token:
        model.backbone.cls_token.requires_grad_(True)
    for name in ("norm", "fc_norm", "attn_pool"):
        after = getattr(model.backbone, name, None)
        if after is not None:
            after.requires_grad_(True)


def create_optimizer(model: ImageClassifier, config: Config) -> torch.optim.Optimizer:
    """timm's optimizer of that name, with its rules for weight decay and layer-wise decay.

    The classifier starts from nothing, so it learns ``head_lr_scale`` times faster.

    Raises:
        InputError: a name that timm does not know.
    """
    try:
        return create_optimizer_v2(
            parameter_groups(model, config),
            config.optimizer,
            lr=config.learning_rate,
            momentum=config.momentum,
        )
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"optimizer {config.optimizer!r} cannot be made: {error}") from None


def parameter_groups(model: ImageClassifier, config: Config) -> list[dict]:
    """timm's parameter groups by layer and weight decay, those of the classifier apart."""
    decay, skipped = config.weight_decay, model.no_weight_decay()
    groups = param_groups_layer_decay(model, decay, skipped, layer_decay=config.layer_decay)
    head = {id(parameter) for parameter in model.classifier.parameters()}
    apart = []
    for group in groups:
        parameters = group["params"]
        group["params"] = [p for p in parameters if id(p) not in head]
        new = [p for p in parameters if id(p) in head]
        apart.append(group | {"params": new, "lr_scale": group["lr_scale"] * config.head_lr_scale})
    return [group for group in groups + apart if group["params"]]


def create_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> CosineLRScheduler:
    """The learning rate of each step: linear warm-up from 0, then cosine to 0.

    A warm-up longer than half of the training is cut there.
    """
    warmup = min(warmup_steps, total_steps // 2)
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
