"""One optimizer step: the micro-batches of all processes, their gradients, and the update."""

from collections.abc import Iterator
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from ramslib.classifier import ImageClassifier
from ramslib.config import Config
from ramslib.distributed import Processes, average_gradients, sum_over_processes
from ramslib.runs.checkpoint import TrainState, read_checkpoint, restore, save_checkpoint
from ramslib.training.optimization import (
    AMP_TYPES,
    backward_scales,
    create_optimizer,
    create_schedule,
    freeze,
    loss_weights,
)
from ramslib.training.sampling import step_seed


class Learner:
    """A model and all that changes it: optimizer, schedule, loss scaling, moving average.

    A step is `gradients`, then `update`; between the two the caller may refuse what came out.
    """

    def __init__(self, model: ImageClassifier, config: Config, steps: int, processes: Processes):
        self.config, self.processes = config, processes
        freeze(model, config.frozen_blocks)
        self.model = model.to(processes.device)
        self.optimizer = create_optimizer(model, config)
        self.schedule = create_schedule(self.optimizer, config.warmup_steps, steps)
        self.weights = loss_weights(config.loss, config.scales)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.amp == "fp16")
        self.ema = ModelEmaV3(model, config.ema_decay) if config.ema_decay else None
        self.averaged = self.ema.module if self.ema else None

    def gradients(
        self, step: int, batches: Iterator[dict], stop: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """Look at the step's micro-batches; the gradients are averaged, unscaled and clipped.

        Args:
            step: its number, from 0; decides the learning rate and what is random.
            batches: of this process, ``grad_accum_steps`` of them are taken.
            stop: whether this process was asked to stop.

        Returns:
            (S,) mean loss of each scale, the gradient's norm before clipping, and whether any
            process was asked to stop.
        """
        torch.manual_seed(step_seed(self.config, step, self.processes))
        self.model.train()
        self.schedule.step_update(step)
        losses = sum(self._micro_batch(next(batches)) for _ in range(self.config.grad_accum_steps))
        asked = torch.tensor([float(stop)], device=losses.device)
        shared = sum_over_processes(torch.cat([losses, asked]), self.processes)
        average_gradients(self.model.parameters(), self.processes)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return shared[:-1] / self.processes.world, norm, bool(shared[-1])

    def _micro_batch(self, batch: dict) -> Tensor:
        """Back-propagate one micro-batch; returns its share of the step's losses."""
        config, device = self.config, self.processes.device
        pixels = batch["pixels"].to(device, non_blocking=True)
        share = torch.tensor(1 / config.grad_accum_steps, device=device)
        labels, amp = batch["label"].to(device), AMP_TYPES[config.amp]
        given = pixels, labels, self.weights, config.label_smoothing, amp
        losses = backward_scales(self.model, *given, factor=self.scaler.scale(share))
        return losses * share

    def update(self) -> None:
        """Apply the gradients and forget them."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def learning_rate(self) -> float:
        """That of a parameter without a factor of its own."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group["lr_scale"]

    def predictor(self) -> ImageClassifier:
        """The model that predicts: the moving average where there is one; in evaluation mode."""
        return (self.averaged or self.model).eval()

    def save(self, path: Path, progress: TrainState) -> None:
        """Write a checkpoint to go on from."""
        progress.scaler = self.scaler.state_dict()
        save_checkpoint(path, progress, self.model, self.optimizer, self.averaged)

    def resume(self, path: Path) -> TrainState:
        """Go on from a checkpoint; returns where it stood."""
        checkpoint = read_checkpoint(path)
        restore(checkpoint, self.model, self.optimizer, self.averaged)
        self.scaler.load_state_dict(checkpoint.progress.scaler)
        return checkpoint.progress

    def load_weights(self, path: Path) -> None:
        """Take the weights of a checkpoint, to predict with them."""
        restore(read_checkpoint(path), self.model, ema=self.averaged)
