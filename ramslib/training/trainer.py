"""The training loop; a killed run resumes where it was.

Everything random is a function of (seed, step) or (seed, epoch, image), never of a process, a
worker or the past, and the schedule is a function of the step. So a checkpoint needs no generator
state, a resumed run gives bit-identical weights, and any number of processes sees the same images.
"""

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from math import ceil
from pathlib import Path

import pandas as pd
import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from ramslib import distributed
from ramslib.acceleration import choose_amp, compile_blocks
from ramslib.classifier import ImageClassifier
from ramslib.config import Config, check_shares
from ramslib.data.datasets import load_table
from ramslib.data.health import check_readable
from ramslib.data.transforms import ImageDataset, ImageTransform
from ramslib.distributed import Processes
from ramslib.errors import InputError, stop_request
from ramslib.evaluation import fit_calibration, predict, score
from ramslib.model import build_model
from ramslib.runs import checkpoint, folder
from ramslib.runs.results import write_results
from ramslib.training import optimization


class Trainer:
    """A run in progress: data, model, optimizer and log, from the checkpoint to the results.

    Every process makes one and calls `fit`; the first one writes the files.

    Args:
        config: what to train.
        run: a folder that this training holds, see `folder.lock_run`.
        processes: those that train together.
    """

    def __init__(self, config: Config, run: Path, processes: Processes):
        check_shares(config, processes.world)
        self.run, self.processes = run, processes
        self.last, self.best = run / "last.safetensors", run / "best.safetensors"
        self.config = folder.keep_sources(config, run)
        self.loading = config.batch_size, config.workers, processes  # of images to predict
        self.unread: tuple | None = None  # a step whose numbers may still be on the device
        self.loss, self.asked, self.stopping = math.nan, False, False  # of the last step read
        self._read_data()
        self._build()
        self.logger = folder.MetricsLogger(run, self.state.step) if processes.is_first else None

    def _read_data(self) -> None:
        config, table = self.config, load_table(self.config)
        parts = {name: part.reset_index(drop=True) for name, part in table.groupby("split")}
        if missing := {"train", "test"} - set(parts):
            raise InputError(f"{config.root}: no {' or '.join(sorted(missing))} images; add some")
        if self.processes.is_first and not self.last.exists():
            check_readable(table)
        self.table, self.train, self.test = table, parts["train"], parts["test"]
        self.labels = torch.tensor(self.train["label"].to_numpy())
        self.validation = parts.get("validation", table[:0])
        self.epoch_steps = optimization.steps_per_epoch(config, len(self.train))
        self.total_steps = optimization.total_steps(config, len(self.train))
        self.epochs = ceil(self.total_steps / self.epoch_steps)
        size = config.highres_size or config.image_size
        self.transform = ImageTransform(size, config.crop_fraction)
        self.train_transform = ImageTransform(size, config.crop_fraction, config.augment)

    def _build(self) -> None:
        """Model, optimizer, schedule and their state; then a new run is described in its folder."""
        config, resuming = self.config, self.last.exists()
        torch.manual_seed(config.seed)
        initial = config.replace(pretrained="none") if resuming else config
        self.model = build_model(initial, int(self.table["label"].max()) + 1)
        optimization.freeze(self.model, config.frozen_blocks)
        self.model.to(self.processes.device)
        if config.compile:
            compile_blocks(self.model.backbone)
        self.optimizer = optimization.create_optimizer(self.model, config)
        length = config.warmup_steps, self.total_steps
        self.schedule = optimization.create_schedule(self.optimizer, *length)
        self.ema = ModelEmaV3(self.model, config.ema_decay) if config.ema_decay else None
        self.averaged = self.ema.module if self.ema else None
        if self.processes.is_first:
            amp = choose_amp(config.amp, self.processes.device)
            folder.init_run(self.run, config, self.table, self.model.origin, amp)
        _, metadata = folder.read_metadata(self.run)
        self.state = checkpoint.TrainState(key=metadata.get("key", ""))
        # a run is resumed as it began, also on another machine
        self.amp = config.amp if config.amp != "auto" else metadata.get("amp", "none")
        self.backward = optimization.choose_backward(self.model, config.replace(amp=self.amp))
        device = self.processes.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.amp == "fp16")
        if resuming:
            self._resume()
        step = f"{self.run}: resumes after step {self.state.step} of {self.total_steps}"
        self._say(step if resuming else self.model.origin)
        if config.amp == "auto" and self.amp == "bf16":
            self._say("bfloat16, which this device computes with (amp=none: float32)")
        if torch.cuda.is_available() and device == "cpu":
            self._say(f"more processes than GPUs ({torch.cuda.device_count()}): training on CPUs")

    def _resume(self) -> None:
        stored = checkpoint.read_checkpoint(self.last, self.state.key)
        checkpoint.restore(stored, self.model, self.optimizer, self.averaged)
        self.state = stored.progress
        self.scaler.load_state_dict(self.state.scaler)
        if self.state.best_epoch and math.isinf(self.state.best_nll):  # of version 0.1
            self.state.best_nll = folder.validation_nll(self.run, self.state.best_epoch)

    def fit(self, stop: threading.Event, save_every: float) -> bool:
        """Train, evaluate and save each epoch, write the results; False if the event stopped it."""
        steps = range(self.state.step, self.total_steps)
        self.saved = time.monotonic()
        batches = self.batches(steps)
        with self._bar(steps) as bar, distributed.deterministic(self.processes.device):
            for step in steps:
                if self.stopping or self._out_of_patience():
                    break
                self.train_step(step, batches, stop.is_set())
                bar.set_postfix(loss=f"{self.loss:.3f}", refresh=False)
                bar.update(self.config.batch_size)
                done = step + 1
                if done % self.epoch_steps == 0 or done == self.total_steps:
                    self._end_epoch(ceil(done / self.epoch_steps))
                elif self.stopping or time.monotonic() - self.saved >= save_every:
                    self._save(self.last)
        if not self.stopping:
            self._finish()
        return not self.stopping

    def batches(self, steps: range) -> Iterator[dict]:
        """The micro-batches of this process."""
        keys = optimization.micro_batches(self.config, self.labels, steps, self.processes)
        # elsewhere loader processes share no file, and in one epoch each image is read once
        keep = sys.platform == "linux" and self.total_steps > self.epoch_steps
        images = ImageDataset(self.train, self.train_transform, self.config.seed, keep)
        return distributed.load_batches(images, self.config.workers, batch_sampler=keys)

    def _bar(self, steps: range) -> tqdm:
        """Images per second and time left, on a terminal; nothing in files."""
        batch = self.config.batch_size
        place = {"initial": steps.start * batch, "total": self.total_steps * batch}
        disable = None if self.processes.is_first else True  # None: where there is no terminal
        return tqdm(**place, unit=" images", disable=disable)

    def train_step(self, step: int, batches: Iterator[dict], stop: bool = False) -> None:
        """One optimizer step.

        Its numbers are read when a GPU has been given the next step, so that it never waits; before
        anything is saved they are read in any case. ``stopping`` says then whether to stop.
        """
        started = time.perf_counter()
        numbers = self.gradients(step, batches, stop)
        self.update()
        self.read_step()
        group = self.optimizer.param_groups[0]
        seconds = time.perf_counter() - started
        row = {"learning_rate": group["lr"] / group["lr_scale"]}
        row["images_per_second"] = round(self.config.batch_size / seconds, 2)
        self.state.step = step + 1
        self.state.seconds += seconds
        self.unread = step, row, distributed.copy_later(numbers)
        if self.processes.device.type == "cpu":  # which has computed them by now
            self.read_step()
        self.stopping = self.asked

    def read_step(self) -> None:
        """Log the numbers of the last step, if that was not done yet.

        Raises:
            InputError: they are not finite.
        """
        if self.unread is None:
            return
        (step, timing, read), self.unread = self.unread, None
        *losses, norm, asked = read().tolist()
        self._check_finite(losses, norm, step)
        self.loss, self.asked = losses[0], bool(asked)
        row = {"step": step + 1, "epoch": step // self.epoch_steps + 1, "split": "train"}
        row |= {"loss": losses[0], "grad_norm": norm}
        row |= {f"loss_{scale}": each for scale, each in enumerate(losses[1:], start=1)}
        self._log([row | timing])

    def gradients(self, step: int, batches: Iterator[dict], stop: bool = False) -> Tensor:
        """Back-propagate a step's micro-batches: gradients are averaged, unscaled and clipped.

        Args:
            step: its number, from 0; decides the learning rate and what is random.
            batches: of this process, ``grad_accum_steps`` of them are taken.
            stop: whether this process was asked to stop.

        Returns:
            (S + 3,) the loss and that of each scale, the gradient's norm before clipping, and the
            number of processes that were asked to stop; on the device.
        """
        config, processes = self.config, self.processes
        torch.manual_seed(optimization.step_seed(config, step, processes))
        self.model.train()
        self.schedule.step_update(step)
        losses = sum(self._micro_batch(next(batches)) for _ in range(config.grad_accum_steps))
        asked = torch.full((1,), float(stop), device=losses.device)
        shared = distributed.sum_over_processes(torch.cat([losses, asked]), processes)
        distributed.average_gradients(self.model.parameters(), processes)
        self.scaler.unscale_(self.optimizer)
        limit = config.clip_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return torch.cat([shared[:-1] / processes.world, norm[None], shared[-1:]])

    def _micro_batch(self, batch: dict) -> Tensor:
        """Back-propagate one micro-batch; returns its share of the step's losses."""
        device = self.processes.device
        pixels, labels = (batch[k].to(device, non_blocking=True) for k in ("pixels", "label"))
        share = torch.full((), 1 / self.config.grad_accum_steps, device=device)
        back_propagate = partial(self.backward, pixels, labels, factor=self.scaler.scale(share))
        try:
            return back_propagate() * share
        except RuntimeError as error:
            distributed.allow_nondeterministic(error)
            self.optimizer.zero_grad()  # the first micro-batch of all has met it
            return back_propagate() * share

    def update(self) -> None:
        """Apply the gradients and clear them."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def _check_finite(self, losses: list[float], norm: float, step: int) -> None:
        """Stop before corrupted weights are saved; float16's scaler expects infinite gradients."""
        if all(map(math.isfinite, losses)) and (math.isfinite(norm) or self.amp == "fp16"):
            return
        keys = optimization.batch_keys(self.config, self.labels, step)
        names = ", ".join(Path(self.train["path"][index]).name for _, index in keys)
        when = f"in epoch {step // self.epoch_steps + 1}, step {step + 1}, on {names}"
        raise InputError(
            f"{self.run}: the losses are {losses} and the gradient's norm {norm:.3g} "
            f"{when}; lower learning_rate or look at these images"
        )

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate on the validation split; save the last and, when it is no worse, the best."""
        self.read_step()
        nll = self._validate(epoch)
        if nll <= self.state.best_nll:  # infinite without a validation split
            self.state.best_nll, self.state.best_epoch = nll, epoch
            self._save(self.best)
        self._save(self.last)

    def _validate(self, epoch: int) -> float:
        """Log the scores of the validation split; returns the nll of the last output."""
        if self.validation.empty:
            return math.inf
        scores = score(self._predict(self.validation)).drop(columns="ece_calibrated")
        seconds = round(self.state.seconds, 2)
        place = {"step": self.state.step, "epoch": epoch, "split": "validation"}
        self._log([place | row | {"seconds": seconds} for row in scores.to_dict("records")])
        nll = float(scores["nll"].iloc[-1])
        top1 = ", ".join(f"{row.output} {row.top1:.1f} %" for row in scores.itertuples())
        when = f"epoch {epoch} of {self.epochs}"
        self._say(f"{when}: validation {top1}; nll {nll:.3f}, {seconds:.0f} s")
        return nll

    def eval_model(self) -> ImageClassifier:
        """The model that predicts: the moving average where there is one; in evaluation mode."""
        return (self.averaged or self.model).eval()

    def _predict(self, table: pd.DataFrame) -> pd.DataFrame:
        return predict(self.eval_model(), table, self.transform, *self.loading)

    def _out_of_patience(self) -> bool:
        epoch = self.state.step // self.epoch_steps
        return 0 < self.config.patience <= epoch - self.state.best_epoch

    def _finish(self) -> None:
        """Predict the test split with the best and the last checkpoint, and write the results."""
        epochs, best_epoch = ceil(self.state.step / self.epoch_steps), self.state.best_epoch
        if self.validation.empty:
            self._say("no validation split: temperatures are 1, probabilities not calibrated")
        last = best = self._calibrate_and_test()
        if best_epoch != epochs:
            stored = checkpoint.read_checkpoint(self.best, self.state.key)
            checkpoint.restore(stored, self.model, ema=self.averaged)
            best = self._calibrate_and_test()
        columns = {"epochs": epochs, "best_epoch": best_epoch, "processes": self.processes.world}
        columns["train_seconds"] = round(self.state.seconds, 1)
        if self.processes.is_first:
            write_results(self.run, {"best": best, "last": last}, columns)

    def _calibrate_and_test(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Calibration on the validation split, and predictions of the test split with it."""
        given = self.eval_model(), self.validation, self.transform, *self.loading
        calibration = fit_calibration(*given)
        temperatures = calibration.set_index("output")["temperature"].to_dict()
        self.eval_model().temperatures = temperatures
        return calibration, self._predict(self.test)

    def _save(self, path: Path) -> None:
        self.read_step()
        if self.processes.is_first:
            self.state.scaler = self.scaler.state_dict()
            checkpoint.save_checkpoint(path, self.state, self.model, self.optimizer, self.averaged)
            self.saved = time.monotonic()

    def _log(self, rows: list[dict]) -> None:
        if self.logger:
            self.logger.write(rows)

    def _say(self, text: str) -> None:
        if self.processes.is_first:
            tqdm.write(text)


def train(config: Config, run: Path | str, save_every: float = 300.0) -> Path:
    """Train a configuration into a run's folder; a killed run resumes, a finished one is kept.

    Call it in one process, or in each of several, see `launch.run_in_processes`. SIGTERM and Ctrl-C
    stop it after the current step with a checkpoint.

    Args:
        config: what to train.
        run: the folder, made when missing.
        save_every: seconds between checkpoints within an epoch: the most that a kill costs.

    Returns:
        The folder.

    Raises:
        InputError: bad input, a folder that holds another run or other files, or a loss that is
            not finite.
    """
    run = Path(run)
    with (
        distributed.process_group() as processes,
        stop_request() as stop,
        ExitStack() as held,
    ):
        with distributed.first_process_first(processes):
            if not 0 <= save_every < math.inf:
                raise InputError(f"save_every is {save_every}; give seconds, 0 or more")
            folder.check_folder(run)
            if folder.is_finished(run):
                folder.check_run(run, config)
                checkpoint.check_exists(run / "best.safetensors", run / "last.safetensors")
                return run
            if processes.is_first:
                held.enter_context(folder.lock_run(run))
            trainer = Trainer(config, run, processes)
        finished = trainer.fit(stop, save_every)
    if not finished:
        kind = InputError if processes.is_first else distributed.OtherProcessFailed
        step = f"step {trainer.state.step} of {trainer.total_steps}"
        raise kind(f"{run}: stopped as asked, at {step}; the same command resumes there")
    return run
