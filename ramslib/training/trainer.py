"""The training loop: one step reads aloud, and a killed run goes on where it was.

Everything random is a function of (seed, step) or (seed, epoch, image), never of a process, a
worker or the past, and the schedule is a function of the step. So a checkpoint needs no generator
state, a resumed run gives the same weights to the bit, and any number of processes sees the same
pictures.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from math import ceil
from pathlib import Path

import pandas as pd
import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from ramslib.config import Config
from ramslib.data.datasets import load_table
from ramslib.data.transforms import ImageDataset, View, prepare
from ramslib.errors import InputError
from ramslib.evaluation import predict, score
from ramslib.model import build_model
from ramslib.processes import (
    Processes,
    average_gradients,
    first_process_first,
    load_batches,
    process_group,
    stop_request,
    sum_over_processes,
)
from ramslib.runs.checkpoint import Progress, read_checkpoint, restore, save_checkpoint
from ramslib.runs.results import write_results
from ramslib.runs.run import Journal, check_run, claimed, is_finished, open_run
from ramslib.training.optimisation import (
    AMP_TYPES,
    backward_scales,
    create_optimizer,
    create_schedule,
    freeze,
    loss_weights,
)
from ramslib.training.sampling import (
    batch_keys,
    check_shares,
    micro_batches,
    step_seed,
    steps_per_epoch,
)


class Trainer:
    """A run in progress: model, data and optimizer, from the last checkpoint to the results.

    Every process makes one and calls `fit`; the first one writes the files.
    """

    def __init__(self, config: Config, run: Path, processes: Processes):
        self.config, self.run, self.processes = config, run, processes
        self.resuming = (run / "last.safetensors").exists()
        self._read_data()
        self._build_model()
        self.progress = self._resume() if self.resuming else Progress()
        self.journal = Journal(run, self.progress.step) if processes.is_first else None

    def _read_data(self) -> None:
        config = self.config
        check_shares(config, self.processes)
        table = load_table(config.data, config.root, config.validation_fraction, config.seed)
        parts = {name: part.reset_index(drop=True) for name, part in table.groupby("split")}
        if missing := {"train", "test"} - set(parts):
            what = " or ".join(sorted(missing))
            raise InputError(f"{config.root}: no image to {what} on; add some")
        self.table, self.train, self.test = table, parts["train"], parts["test"]
        self.validation = parts.get("validation", table[:0])
        self.epoch_steps = steps_per_epoch(config, len(self.train))
        self.total_steps = config.steps or self.epoch_steps * config.epochs
        size = config.source_size or config.image_size
        self.test_view = View(size, config.crop_fraction)
        self.train_view = View(size, config.crop_fraction, train=True, augment=config.augment)

    def _build_model(self) -> None:
        config, device = self.config, self.processes.device
        torch.manual_seed(config.seed)
        pretrained = "none" if self.resuming else config.pretrained
        classes = int(self.table["label"].max()) + 1
        model, origin = build_model(config.replace(pretrained=pretrained), classes)
        if self.processes.is_first:
            open_run(self.run, config, self.table, origin)
        else:  # on another machine, too, it must be there by now
            check_run(self.run, config)
        self._say(f"going on with {self.run}" if self.resuming else origin)
        freeze(model, config.frozen_blocks)
        self.model = model.to(device)
        self.optimizer = create_optimizer(model, config)
        self.schedule = create_schedule(self.optimizer, config.warmup_steps, self.total_steps)
        self.weights = loss_weights(config.loss, config.scales)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ema = ModelEmaV3(model, config.ema_decay) if config.ema_decay else None
        self.averaged = self.ema.module if self.ema else None

    def _resume(self) -> Progress:
        checkpoint = read_checkpoint(self.run / "last.safetensors")
        restore(checkpoint, self.model, self.optimizer, self.averaged)
        self.scaler.load_state_dict(checkpoint.progress.scaler)
        return checkpoint.progress

    def fit(self, stop: threading.Event, save_every: float) -> bool:
        """Train, evaluate and save each epoch, write the results; False if the event stopped it."""
        self.stop, self.stopping, self.save_every = stop, False, save_every
        self.saved = time.monotonic()
        steps = range(self.progress.step, self.total_steps)
        keys = micro_batches(self.config, len(self.train), steps, self.processes)
        photos = ImageDataset(self.train, self.train_view, self.config.seed)
        batches = load_batches(photos, self.config.workers, batch_sampler=keys)
        disable = None if self.processes.is_first else True  # None: on terminals, not in files
        place = {"initial": steps.start, "total": self.total_steps}
        with tqdm(**place, unit="step", disable=disable) as bar:
            for step in steps:
                if self.stopping or self._out_of_patience():
                    break
                self._step(step, batches, bar)
        if not self.stopping:
            self._finish()
        return not self.stopping

    def _step(self, step: int, batches: Iterator[dict], bar: tqdm) -> None:
        """One step, what it logs, and what is due after it."""
        started = time.perf_counter()
        row = self._train_step(step, batches)
        seconds = time.perf_counter() - started
        rate = self.config.batch_size / seconds
        self.progress.step = step + 1
        self.progress.seconds += seconds
        self._log([row | {"images_per_second": round(rate, 2)}])
        bar.set_postfix(loss=f"{row['loss']:.3f}", images_s=f"{rate:.1f}", refresh=False)
        bar.update()
        if self.progress.step % self.epoch_steps == 0 or self.progress.step == self.total_steps:
            self._end_epoch(ceil(self.progress.step / self.epoch_steps))
        elif self.stopping or time.monotonic() - self.saved >= self.save_every:
            self._save("last")

    def _train_step(self, step: int, batches: Iterator[dict]) -> dict:
        """One optimizer step over all micro-batches and processes; returns its row of the log."""
        config = self.config
        torch.manual_seed(step_seed(config, step, self.processes))
        self.model.train()
        self.schedule.step_update(step)
        losses = sum(self._micro_batch(next(batches)) for _ in range(config.accumulate))
        stop = torch.tensor([float(self.stop.is_set())], device=losses.device)
        shared = sum_over_processes(torch.cat([losses, stop]), self.processes)
        losses, self.stopping = shared[:-1] / self.processes.world, bool(shared[-1])
        norm = self._clip_gradients()
        self._check_finite(losses, norm, step)
        self._update()
        row = {"step": step + 1, "epoch": step // self.epoch_steps + 1, "split": "train"}
        total = sum(loss * weight for loss, weight in zip(losses, self.weights, strict=True))
        row |= {"loss": float(total), "grad_norm": float(norm)}
        row |= {f"loss_{scale + 1}": float(loss) for scale, loss in enumerate(losses)}
        group = self.optimizer.param_groups[0]
        return row | {"learning_rate": group["lr"] / group["lr_scale"]}

    def _micro_batch(self, batch: dict) -> Tensor:
        config, device = self.config, self.processes.device
        pixels = batch["source"].to(device, non_blocking=True)
        images, source = prepare(pixels, self.model.image_size, *self.model.mean_std)
        share = torch.tensor(1 / config.accumulate, device=device)
        labels, amp = batch["label"].to(device), AMP_TYPES[config.amp]
        given = images, source, labels, self.weights, config.label_smoothing, amp
        losses = backward_scales(self.model, *given, factor=self.scaler.scale(share))
        return losses * share

    def _clip_gradients(self) -> Tensor:
        """Average the gradients over processes and clip them; returns their norm before that."""
        average_gradients(self.model.parameters(), self.processes)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def _check_finite(self, losses: Tensor, norm: Tensor, step: int) -> None:
        """Stop before the weights are spoilt; infinite gradients are usual to float16's scaler."""
        if losses.isfinite().all() and (norm.isfinite() or self.config.amp == "fp16"):
            return
        keys = batch_keys(self.config, len(self.train), step)
        names = ", ".join(Path(self.train["path"][index]).name for _, index in keys)
        when = f"in epoch {step // self.epoch_steps + 1}, step {step + 1}, on {names}"
        raise InputError(
            f"{self.run}: the losses are {losses.tolist()} and the gradient's norm {norm:.3g} "
            f"{when}; lower learning_rate or look at these images"
        )

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate on the validation split; save the last and, when it is better, the best."""
        scores = self._validate(epoch)
        top1 = float(scores["top1"].iloc[-1]) if len(scores) else 0.0
        is_best = top1 > self.progress.best_top1 or not len(scores)
        if is_best:
            self.progress.best_top1, self.progress.best_epoch = top1, epoch
            self._save("best")
        self._save("last")

    def _validate(self, epoch: int) -> pd.DataFrame:
        if self.validation.empty:
            return self.validation
        scores = score(self._predict(self.validation))
        seconds = round(self.progress.seconds, 2)
        place = {"step": self.progress.step, "epoch": epoch, "split": "validation"}
        self._log([place | row | {"seconds": seconds} for row in scores.to_dict("records")])
        told = ", ".join(f"{row.scale} {row.top1:.1f} %" for row in scores.itertuples())
        epochs = ceil(self.total_steps / self.epoch_steps)
        self._say(f"epoch {epoch} of {epochs}: validation {told}; {seconds:.0f} s")
        return scores

    def _predict(self, table: pd.DataFrame) -> pd.DataFrame:
        model, config = (self.averaged or self.model).eval(), self.config
        options = config.batch_size, config.workers, self.processes
        return predict(model, table, self.test_view, *options)

    def _out_of_patience(self) -> bool:
        epoch = self.progress.step // self.epoch_steps
        return 0 < self.config.patience <= epoch - self.progress.best_epoch

    def _finish(self) -> None:
        """Predict the test split with the last and the best weights, and write the results."""
        epochs, best_epoch = ceil(self.progress.step / self.epoch_steps), self.progress.best_epoch
        predictions = {"last": self._predict(self.test)}
        if best_epoch != epochs:
            restore(read_checkpoint(self.run / "best.safetensors"), self.model, ema=self.averaged)
        best = self._predict(self.test) if best_epoch != epochs else predictions["last"]
        facts = {"epochs": epochs, "best_epoch": best_epoch, "processes": self.processes.world}
        facts["train_seconds"] = round(self.progress.seconds, 1)
        if self.processes.is_first:
            write_results(self.run, predictions | {"best": best}, facts)

    def _save(self, which: str) -> None:
        if self.processes.is_first:
            self.progress.scaler = self.scaler.state_dict()
            path = self.run / f"{which}.safetensors"
            save_checkpoint(path, self.progress, self.model, self.optimizer, self.averaged)
            self.saved = time.monotonic()

    def _log(self, rows: list[dict]) -> None:
        if self.journal:
            self.journal.write(rows)

    def _say(self, text: str) -> None:
        if self.processes.is_first:
            tqdm.write(text)


def train(config: Config, run: Path | str, save_every: float = 300.0) -> Path:
    """Train a configuration into a run's folder; a killed run goes on, a finished one stays.

    Call it in one process, or in each of several started by ``torch.distributed.run``. SIGTERM and
    Ctrl-C stop it after the current step with a checkpoint.

    Args:
        config: what to train.
        run: the folder, made when missing.
        save_every: seconds between checkpoints within an epoch: what a kill costs at most.

    Returns:
        The folder.

    Raises:
        InputError: bad input, a folder that holds another run, or a loss that is not finite.
    """
    run = Path(run)
    if is_finished(run):
        check_run(run, config)
        return run
    with process_group() as processes, stop_request() as stop, ExitStack() as held:
        with first_process_first(processes):
            if processes.is_first:
                held.enter_context(claimed(run))
            trainer = Trainer(config, run, processes)
        if trainer.journal:
            held.callback(trainer.journal.close)
        finished = trainer.fit(stop, save_every)
    if not finished:
        step = f"step {trainer.progress.step} of {trainer.total_steps}"
        raise InputError(f"{run}: stopped as asked, at {step}; the same command goes on from there")
    return run
