"""Which images each step sees: a function of seed and step, never of the number of processes.

So a run resumes in the middle of an epoch without any saved generator, and two processes see the
same batches as one.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ramslib.config import Config
from ramslib.distributed import Processes
from ramslib.errors import InputError


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
    batch has about its share of every class (exactly, where classes are equal and divide it). By
    chance the counts of 8 classes in 16 images vary by two thirds of their mean; a classifier that
    starts from nothing seems to chase these counts, and what reaches the encoder is noise (README).

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


def check_shares(config: Config, processes: Processes) -> None:
    """Check that a batch divides among processes and micro-batches.

    Raises:
        InputError: it does not.
    """
    shares = processes.world * config.grad_accum_steps
    if config.batch_size % shares:
        raise InputError(
            f"batch_size {config.batch_size} does not divide among {processes.world} processes "
            f"with {config.grad_accum_steps} micro-batches each; use a multiple of {shares}"
        )


def step_seed(config: Config, step: int, processes: Processes) -> int:
    """Seed of one step's dropout in this process."""
    return config.seed * 1_000_003 + step * processes.world + processes.rank
