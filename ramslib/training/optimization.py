"""The optimization step: which images it sees, the losses and their gradients, who applies them.

Which images a step sees is a function of seed and step, never of the number of processes, so a run
resumes in the middle of an epoch without any saved generator, and two processes see the same
batches as one. Optimizers, weight-decay rules and layer-wise decay are timm's.

`backward_scales` back-propagates each scale before the next one runs, which gives the gradients of
the joint loss at the memory of one scale, because no gradient flows through a crop. A loss that
couples scales takes the graphs of all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from ramslib.acceleration import detached, selective_checkpointing
from ramslib.classifier import ImageClassifier, ScaleOutput
from ramslib.config import Config
from ramslib.distributed import Processes
from ramslib.errors import InputError, input_errors
from ramslib.extensions import is_reference, resolve

FUSED = ("adam", "adamw", "momentum", "sgd")  # torch's own, of one kernel on a GPU
AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def steps_per_epoch(config: Config, images: int) -> int:
    """Full batches in one epoch; the images left over wait for another epoch.

    Raises:
        InputError: fewer images than one batch holds.
    """
    if images < config.batch_size:
        raise InputError(
            f"batch_size {config.batch_size} exceeds the {images} training images; "
            f"use batch_size={max(1, images // 2)} or less"
        )
    return images // config.batch_size


def total_steps(config: Config, images: int) -> int:
    """Steps of the whole training: ``steps`` where given, else those of all epochs."""
    return config.steps or config.epochs * steps_per_epoch(config, images)


@lru_cache(maxsize=1)  # the steps of an epoch share it
def epoch_order(config: Config, labels: Tensor, epoch: int) -> Tensor:
    """The order of an epoch's images, drawn from (seed, epoch).

    ``stratified`` places each class's images at equal distances, from a random start, so that a
    batch has about its share of every class (exactly, where classes are equal and divide it). At
    random, the counts of 8 classes in 16 images vary by two thirds of their mean, and a classifier
    that starts at zero follows these counts: noise for the encoder (docs/results.md).

    Args:
        config: its ``sampling`` is ``stratified`` or ``random``.
        labels: (N,) classes of the images; never changed in place.
        epoch: from 0.

    Returns:
        (N,) a permutation.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(labels), generator=generator)
    if config.sampling == "random":
        return order
    shuffled = labels[order]
    counts = shuffled.bincount()
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)  # of an image among those of its class
    rank[shuffled.argsort(stable=True)] = torch.arange(len(order)) - first.repeat_interleave(counts)
    start = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    return order[((rank + start[shuffled]) / counts[shuffled]).argsort(stable=True)]


def batch_keys(config: Config, labels: Tensor, step: int) -> list[tuple[int, int]]:
    """The (epoch, index) keys of one step's images over all processes."""
    epoch, number = divmod(step, steps_per_epoch(config, len(labels)))
    batch = slice(number * config.batch_size, (number + 1) * config.batch_size)
    return [(epoch, index) for index in epoch_order(config, labels, epoch)[batch].tolist()]


def micro_batches(
    config: Config, labels: Tensor, steps: range, processes: Processes
) -> Iterator[list[tuple[int, int]]]:
    """The keys of every micro-batch of this process, in order."""
    share = config.batch_size // config.grad_accum_steps
    for step in steps:
        keys = batch_keys(config, labels, step)
        for start in range(0, config.batch_size, share):
            yield keys[start : start + share][processes.rank :: processes.world]


def step_seed(config: Config, step: int, processes: Processes) -> int:
    """Seed of one step's dropout in this process."""
    return config.seed * 1_000_003 + step * processes.world + processes.rank


Loss = Callable[[list[ScaleOutput], Tensor], Tensor]  # outputs of scales, labels (B,) -> scalar


def choose_backward(model: ImageClassifier, config: Config) -> Callable[..., Tensor]:
    """`backward_scales` of a model, with the loss that is configured.

    Raises:
        InputError: a file of one's own that does not give the loss.
    """
    options = {"label_smoothing": config.label_smoothing, "amp": AMP_TYPES[config.amp]}
    loss = config.loss_weights(model.num_scales)
    if is_reference(config.loss):
        loss = resolve(config.loss, {}, "loss")
    return partial(backward_scales, model, loss=loss, **options)


def backward_scales(
    model: ImageClassifier,
    pixels: Tensor,
    labels: Tensor,
    loss: Sequence[float] | Loss,
    label_smoothing: float = 0.0,
    amp: torch.dtype | None = None,
    factor: float | Tensor = 1.0,
) -> Tensor:
    """Back-propagate the loss of each scale before the next one runs.

    Crops carry no gradient, so the accumulated gradients are those of the sum over scales. A
    function that is not marked by `extensions.per_scale` is called once, after all scales, whose
    memory it takes.

    Args:
        model: in training mode.
        pixels: (B, 3, Hs, Ws), see `ImageClassifier.forward`.
        labels: (B,).
        loss: weight of each scale's own loss, where a scale of weight 0 runs without gradient; or a
            function; marked, it is called after each scale with the outputs so far, the earlier
            ones detached.
        label_smoothing: of the cross entropy.
        amp: autocast type, None for float32.
        factor: multiplies the loss before the backward pass (micro-batch share, loss scale).

    Returns:
        (1 + S,) the loss; and each scale's own, with a function its cross entropy. Detached.
    """
    outputs, earlier, rows = _run_scales(model, pixels, amp), [], []
    if callable(loss) and not getattr(loss, "per_scale", False):
        together = list(outputs)
        total = _call_loss(loss, together, labels)
        (total * factor).backward()
        each = [_cross_entropy(output, labels, label_smoothing) for output in together]
        return torch.stack([total.detach(), *each])
    for weight in [1.0] * model.num_scales if callable(loss) else loss:
        with torch.set_grad_enabled(weight > 0):
            output = next(outputs)
            if callable(loss):
                own = _cross_entropy(output, labels, label_smoothing)
                total = _call_loss(loss, [*earlier, output], labels)
                earlier.append(ScaleOutput(*map(detached, output)))
            else:
                own = model.loss(output, labels, label_smoothing)
                total = own * weight
            if weight > 0:
                (total * factor).backward()
        rows.append(torch.stack([total.detach(), own.detach()]))
    totals, each = torch.stack(rows).unbind(dim=1)
    return torch.cat([totals.sum()[None], each])


def _run_scales(
    model: ImageClassifier, pixels: Tensor, amp: torch.dtype | None
) -> Iterator[ScaleOutput]:
    """The outputs of a model's scales, logits in float32; only its forward pass is autocast."""
    scales = model.forward_scales(pixels)
    for _ in range(model.num_scales):
        autocast = torch.autocast(pixels.device.type, amp, enabled=amp is not None)
        with autocast, selective_checkpointing():
            output = next(scales)
        yield output._replace(logits=output.logits.float())


def _cross_entropy(output: ScaleOutput, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(output.logits.detach(), labels, label_smoothing=label_smoothing)


def _call_loss(loss: Loss, outputs: list[ScaleOutput], labels: Tensor) -> Tensor:
    """The value of a loss of one's own.

    Raises:
        InputError: it is no scalar, or nothing can be learned from it.
    """
    value = loss(outputs, labels)
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"loss {getattr(loss, '__name__', loss)!r} returns {found}; it must return a scalar "
            "tensor that has a gradient, as functions of the logits and features have"
        )
    return value


def freeze(model: ImageClassifier, blocks: int) -> None:
    """Stop training the first blocks, and all that comes before but one class token per scale.

    Those start as copies of one token and, in a sequence, stay equal until a gradient, which runs
    back through the frozen blocks, separates them. A shared token is frozen.

    Raises:
        InputError: more blocks than the backbone has.
    """
    depth = len(model.backbone.blocks)
    if not 0 <= blocks <= depth:
        raise InputError(
            f"frozen_blocks is {blocks}, but the backbone has {depth} blocks; use {depth} or less"
        )
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

    The classifier starts at zero, so it learns ``head_lr_scale`` times faster. Optimizers for
    matrices (muon) leave it, tokens, norms and biases to AdamW.

    Raises:
        InputError: a name that timm does not know.
    """
    options = {"lr": config.learning_rate, "momentum": config.momentum}
    if config.optimizer in FUSED and model.classifier.weight.is_cuda:
        options["fused"] = True
    remedy = "choose one of timm.optim.list_optimizers(), such as adamw or sgd"
    with input_errors(f"optimizer {config.optimizer!r} cannot be made", remedy):
        return create_optimizer_v2(parameter_groups(model, config), config.optimizer, **options)


def parameter_groups(model: ImageClassifier, config: Config) -> list[dict]:
    """timm's parameter groups by layer and weight decay, those of the classifier apart."""
    decay, skipped = config.weight_decay, model.no_weight_decay()
    groups = param_groups_layer_decay(model, decay, skipped, layer_decay=config.layer_decay)
    head = {id(parameter) for parameter in model.classifier.parameters()}
    apart = []
    for group in groups:
        parameters = group["params"]
        group["params"] = [p for p in parameters if id(p) not in head]
        own = {"params": [p for p in parameters if id(p) in head], "use_fallback": True}
        apart.append(group | own | {"lr_scale": group["lr_scale"] * config.head_lr_scale})
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
        t_initial=max(2, total_steps - warmup),  # timm warns of a cosine of one step
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
