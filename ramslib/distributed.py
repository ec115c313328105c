"""What one of several training processes needs: its place, its device, sums over all of them.

Processes are started by ``torch.distributed.run`` (see `ramslib.training.launch`), which sets the
environment that `process_group` reads; without it there is one process. Gradients are averaged once
per step rather than by wrapping the model: each scale back-propagates on its own, the model stays
the plain module that checkpoints and notebooks know, and there is exactly one synchronization.
"""

import gc
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ramslib.errors import InputError


class Processes(NamedTuple):
    """This process among all training processes.

    Attributes:
        rank: 0 to world - 1; rank 0 writes files.
        world: how many processes train together.
        device: where this one computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Processes]:
    """Join the processes that were started together; NCCL with a GPU each, else gloo.

    The group is left without aborting: everything that refers to it should be gone by then.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= local_world:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Processes(rank, world, device)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, so that work ends where it can be taken up again."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def first_process_first(processes: Processes) -> Iterator[None]:
    """Let rank 0 through before the others: it downloads or writes what they then find.

    Raises:
        InputError: in every process, when any of them met one.
    """
    failure = None
    if not processes.is_first:
        dist.barrier()
    try:
        yield
    except InputError as error:
        failure = error
    if processes.world > 1 and processes.is_first:
        dist.barrier()
    failed = sum_over_processes(
        torch.tensor([float(failure is not None)], device=processes.device), processes
    )
    if failure or failed:
        raise failure or InputError("another training process could not start; see its message")


def sum_over_processes(values: Tensor, processes: Processes) -> Tensor:
    """Sum a tensor over all processes, in place; every process gets the sum."""
    if processes.world > 1:
        dist.all_reduce(values)
    return values


def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Replace each gradient by its mean over the processes: one flat all-reduce."""
    if processes.world == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes.world
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def load_batches(dataset: Dataset, workers: int, **options) -> Iterator[dict]:
    """Batches of a data set, in order.

    Args:
        dataset: of dictionaries.
        workers: loader processes; they leave signals to the process that they load for.
        **options: of torch's DataLoader.

    Raises:
        InputError: as the data set told it, from a loader process too.
    """
    options |= {"num_workers": workers, "worker_init_fn": _leave_signals}
    options |= {"pin_memory": torch.cuda.is_available()}
    options |= {"generator": torch.Generator()}  # else it draws a number from the global one
    try:
        yield from DataLoader(dataset, **options)
    except InputError as error:  # torch wraps that of a worker into its traceback
        told = str(error).strip().split(f"{InputError.__name__}: ")[-1]
        traceback.clear_frames(error.__traceback__)  # lets go of the loader, which ends its workers
        raise InputError(told) from None


def _leave_signals(worker: int) -> None:
    """Leave a stop of all processes to the one that trains: it ends its loaders when it is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
