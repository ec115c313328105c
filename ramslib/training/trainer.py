"""The training loop: it reads aloud, and a killed run goes on where it was.

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
from torch import Tensor
from tqdm import tqdm

from ramslib.classifier import ImageClassifier
from ramslib.config import Config
from ramslib.data.datasets import load_table
from ramslib.data.transforms import ImageDataset, ImageTransform
from ramslib.distributed import (
    Processes,
    first_process_first,
    load_batches,
    process_group,
    stop_request,
)
from ramslib.errors import InputError
from ramslib.evaluation import predict, score
from ramslib.model import build_model
from ramslib.runs.checkpoint import TrainState
from ramslib.runs.results import write_results
from ramslib.runs.run import MetricsLogger, check_run, is_finished, lock_run, open_run
from ramslib.training.learner import Learner
from ramslib.training.sampling import (
    batch_keys,
    check_shares,
    micro_batches,
    steps_per_epoch,
    total_steps,
)


class Trainer:
    """A run in progress: its data, its learner and its log, from the checkpoint to the results.

    Every process makes one and calls `fit`; the first one writes the files.
    """

    def __init__(self, config: Config, run: Path, processes: Processes):
        self.config, self.run, self.processes = config, run, processes
        self.last, self.best = run / "last.safetensors", run / "best.safetensors"
        resuming = self.last.exists()
        check_shares(config, processes)
        self._read_data()
        self.learner = Learner(self._build_model(resuming), config, self.total_steps, processes)
        self.progress = self.learner.resume(self.last) if resuming else TrainState()
        self.journal = MetricsLogger(run, self.progress.step) if processes.is_first else None

    def _read_data(self) -> None:
        config = self.config
        table = load_table(config)
        parts = {name: part.reset_index(drop=True) for name, part in table.groupby("split")}
        if missing := {"train", "test"} - set(parts):
            what = " or ".join(sorted(missing))
            raise InputError(f"{config.root}: no image to {what} on; add some")
        self.table, self.train, self.test = table, parts["train"], parts["test"]
        self.labels = torch.tensor(self.train["label"].to_numpy())
        self.validation = parts.get("validation", table[:0])
        self.epoch_steps = steps_per_epoch(config, len(self.train))
        self.total_steps = total_steps(config, len(self.train))
        size = config.highres_size or config.image_size
        self.test_view = ImageTransform(size, config.crop_fraction)
        self.train_view = ImageTransform(
            size, config.crop_fraction, train=True, augment=config.augment
        )

    def _build_model(self, resuming: bool) -> ImageClassifier:
        """The model before its first step; a new run is described in its folder."""
        config = self.config.replace(pretrained="none") if resuming else self.config
        torch.manual_seed(config.seed)
        model = build_model(config, int(self.table["label"].max()) + 1)
        if self.processes.is_first:
            open_run(self.run, self.config, self.table, model.origin)
        else:  # on another machine, too, it must be there by now
            check_run(self.run, self.config)
        self._say(f"going on with {self.run}" if resuming else model.origin)
        return model

    def fit(self, stop: threading.Event, save_every: float) -> bool:
        """Train, evaluate and save each epoch, write the results; False if the event stopped it."""
        steps, stopping = range(self.progress.step, self.total_steps), False
        self.saved = time.monotonic()
        batches = self._batches(steps)
        with self._bar(steps) as bar:
            for step in steps:
                if stopping or self._out_of_patience():
                    break
                loss, stopping = self._step(step, batches, stop.is_set())
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(self.config.batch_size)
                done = self.progress.step
                if done % self.epoch_steps == 0 or done == self.total_steps:
                    self._end_epoch(ceil(done / self.epoch_steps))
                elif stopping or time.monotonic() - self.saved >= save_every:
                    self._save(self.last)
        if not stopping:
            self._finish()
        return not stopping

    def _batches(self, steps: range) -> Iterator[dict]:
        """The micro-batches of this process."""
        keys = micro_batches(self.config, self.labels, steps, self.processes)
        photos = ImageDataset(self.train, self.train_view, self.config.seed)
        return load_batches(photos, self.config.workers, batch_sampler=keys)

    def _bar(self, steps: range) -> tqdm:
        """Images per second and time left, on a terminal; nothing in files."""
        batch = self.config.batch_size
        place = {"initial": steps.start * batch, "total": self.total_steps * batch}
        disable = None if self.processes.is_first else True  # None: where there is no terminal
        return tqdm(**place, unit=" images", disable=disable)

    def _step(self, step: int, batches: Iterator[dict], stop: bool) -> tuple[float, bool]:
        """One step and its row of the log; returns the loss, and whether to stop."""
        started = time.perf_counter()
        losses, norm, stopping = self.learner.gradients(step, batches, stop)
        self._check_finite(losses, norm, step)
        self.learner.update()
        loss = sum(x * weight for x, weight in zip(losses, self.learner.weights, strict=True))
        row = {"step": step + 1, "epoch": step // self.epoch_steps + 1, "split": "train"}
        row |= {"loss": float(loss), "grad_norm": float(norm)}
        row |= {f"loss_{scale}": float(each) for scale, each in enumerate(losses, start=1)}
        row["learning_rate"] = self.learner.learning_rate()
        seconds = time.perf_counter() - started
        row["images_per_second"] = round(self.config.batch_size / seconds, 2)
        self.progress.step = step + 1
        self.progress.seconds += seconds
        self._log([row])
        return row["loss"], stopping

    def _check_finite(self, losses: Tensor, norm: Tensor, step: int) -> None:
        """Stop before the weights are corrupted; infinite gradients are usual to float16's scaler."""
        if losses.isfinite().all() and (norm.isfinite() or self.config.amp == "fp16"):
            return
        keys = batch_keys(self.config, self.labels, step)
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
        if top1 > self.progress.best_top1 or not len(scores):
            self.progress.best_top1, self.progress.best_epoch = top1, epoch
            self._save(self.best)
        self._save(self.last)

    def _validate(self, epoch: int) -> pd.DataFrame:
        if self.validation.empty:
            return self.validation
        scores = score(self._predict(self.validation))
        seconds = round(self.progress.seconds, 2)
        place = {"step": self.progress.step, "epoch": epoch, "split": "validation"}
        self._log([place | row | {"seconds": seconds} for row in scores.to_dict("records")])
        told = ", ".join(f"{row.output} {row.top1:.1f} %" for row in scores.itertuples())
        epochs = ceil(self.total_steps / self.epoch_steps)
        self._say(f"epoch {epoch} of {epochs}: validation {told}; {seconds:.0f} s")
        return scores

    def _predict(self, table: pd.DataFrame) -> pd.DataFrame:
        options = self.config.batch_size, self.config.workers, self.processes
        return predict(self.learner.predictor(), table, self.test_view, *options)

    def _out_of_patience(self) -> bool:
        epoch = self.progress.step // self.epoch_steps
        return 0 < self.config.patience <= epoch - self.progress.best_epoch

    def _finish(self) -> None:
        """Predict the test split with the last and the best weights, and write the results."""
        epochs, best_epoch = ceil(self.progress.step / self.epoch_steps), self.progress.best_epoch
        predictions = {"last": self._predict(self.test)}
        if best_epoch != epochs:
            self.learner.load_weights(self.best)
        best = self._predict(self.test) if best_epoch != epochs else predictions["last"]
        facts = {"epochs": epochs, "best_epoch": best_epoch, "processes": self.processes.world}
        facts["train_seconds"] = round(self.progress.seconds, 1)
        if self.processes.is_first:
            write_results(self.run, predictions | {"best": best}, facts)

    def _save(self, path: Path) -> None:
        if self.processes.is_first:
            self.learner.save(path, self.progress)
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
                held.enter_context(lock_run(run))
            trainer = Trainer(config, run, processes)
        if trainer.journal:
            held.callback(trainer.journal.close)
        finished = trainer.fit(stop, save_every)
    if not finished:
        step = f"step {trainer.progress.step} of {trainer.total_steps}"
        raise InputError(f"{run}: stopped as asked, at {step}; the same command goes on from there")
    return run
