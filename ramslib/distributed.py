"""What one of several training processes needs: its rank, its device, sums over all of them.

Processes are started by `ramslib.training.launch`, or by ``torch.distributed.run``, on several
machines or to be restarted after a failure; the environment that they set is read by
`process_group`, and without it there is one process. Gradients are averaged once per step rather
than by wrapping the model: each scale back-propagates on its own, the model stays the plain module
that checkpoints and notebooks know, and there is exactly one synchronization.
"""

import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, Dataset

from ramslib.errors import InputError, count_cores, one_line


class OtherProcessFailed(InputError):
    """Another training process failed and reports why; this one has nothing to add."""


class Processes(NamedTuple):
    """This process among all training processes.

    Attributes:
        rank: 0 to world - 1; rank 0 writes files.
        world: number of processes that train together.
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

    The group is left after an error, too: gloo's threads, if they still run when Python ends, now
    and then abort it. Everything that refers to the group should be gone by then.
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
    backend = "nccl" if device.type == "cuda" else "gloo"
    file = os.environ.get("RAMSLIB_STORE")  # needs no port
    store, *_ = next(rendezvous(f"file://{file}" if file else "env://", rank, world))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)  # else dead ranks' addresses are found
    dist.init_process_group(backend, store=store, world_size=world, rank=rank)
    try:
        yield Processes(rank, world, device)
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def first_process_first(processes: Processes) -> Iterator[None]:
    """Let rank 0 through before the others: it downloads or writes what they then find.

    Raises:
        InputError: in every process, when any of them met one.
    """
    failure = None
    if not processes.is_first:
        _check_all(True, processes)
    try:
        yield
    except InputError as error:
        failure = error
    try:
        if processes.is_first:
            _check_all(failure is None, processes)
        _check_all(failure is None, processes)
    except OtherProcessFailed as error:
        raise failure or error from None


def _check_all(well: bool, processes: Processes) -> None:
    """Wait for all processes.

    Raises:
        OtherProcessFailed: one of them, or this one, is not well.
    """
    failed = torch.tensor([float(not well)], device=processes.device)
    if sum_over_processes(failed, processes):
        raise OtherProcessFailed("another training process could not start; see its message")


def sum_over_processes(values: Tensor, processes: Processes) -> Tensor:
    """Sum a tensor over all processes, in place; every process gets the sum.

    Raises:
        OtherProcessFailed: another process is gone.
    """
    if processes.world > 1:
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            reason = f"another training process is gone ({one_line(error)})"
            raise OtherProcessFailed(reason) from None
    return values


def copy_later(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; the function that is returned waits for it and gives it.

    What a GPU is given in between, it begins without waiting for anyone.
    """
    copy = values.to("cpu", non_blocking=True)  # pinned memory
    copied = torch.cuda.Event() if values.is_cuda else None
    if copied:
        copied.record()

    def read() -> Tensor:
        if copied:
            copied.synchronize()
        return copy

    return read


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside, a GPU computes the same bits from the same numbers, as a CPU does anyway.

    Torch raises RuntimeError for an operation that cannot, see `allow_nondeterministic`.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # that is for those who debug
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def allow_nondeterministic(error: RuntimeError) -> None:
    """Leave `deterministic` after an operation that has no such form; other errors are raised."""
    if "determinis" not in str(error) or not torch.are_deterministic_algorithms_enabled():
        raise error
    warnings.warn(
        f"if this training is resumed, it will not be bit-identical: {one_line(error)}",
        stacklevel=2,
    )
    torch.use_deterministic_algorithms(False)


def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Replace each gradient by its mean over the processes: one flat all-reduce."""
    if processes.world == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = sum_over_processes(flat, processes).div_(processes.world)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def choose_workers() -> int:
    """Loader processes of each training process: one, or its share of the cores beside a GPU.

    A CPU that trains takes longer for an image than a loader; a GPU waits for several loaders.
    """
    share = count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, share)) if torch.cuda.is_available() else 1


def load_batches(dataset: Dataset, workers: int | None, **options) -> Iterator[dict]:
    """Batches of a dataset, in order.

    Args:
        dataset: of dictionaries.
        workers: loader processes, None for `choose_workers`; they leave signals to the process that
            they load for.
        **options: of torch's DataLoader.

    Raises:
        InputError: as the dataset raised it, from a loader process too; or one of these was killed.
    """
    workers = choose_workers() if workers is None else workers
    options |= {"num_workers": workers, "worker_init_fn": _leave_signals}
    if workers and sys.platform == "linux":
        options |= {"multiprocessing_context": "fork"}  # Python 3.14 has another default
    options |= {"pin_memory": torch.cuda.is_available()}
    options |= {"generator": torch.Generator()}  # else it draws a number from the global one
    try:
        yield from _begin(DataLoader(dataset, **options))
    except InputError as error:  # torch wraps that of a worker into its traceback
        message = str(error).strip().split(f"{InputError.__name__}: ")[-1]
        traceback.clear_frames(error.__traceback__)  # releases the loader, which ends its workers
        raise InputError(message) from None
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)
        if "DataLoader worker (pid" not in str(error):
            raise
        raise InputError(
            f"a loader process of {workers} was killed, as the system does when memory runs out; "
            f"free memory, or take fewer (workers={workers // 2}), and try again"
        ) from None


def _begin(loader: DataLoader) -> Iterator[dict]:
    """Begin to load; a stop cannot kill a worker before it has got to `_leave_signals`.

    Torch's handler would raise the death of a worker in the midst of what uses the batches; without
    it, waiting for the next batch does.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)  # starts the workers, which inherit what is blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)


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
