"""What one of several processes needs, and what it must not leave behind."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ramslib import distributed
from ramslib.__main__ import _end_with_parent
from ramslib.distributed import (
    Processes,
    _begin,
    _leave_signals,
    choose_workers,
    first_process_first,
    load_batches,
    process_group,
    sum_over_processes,
)
from ramslib.errors import InputError, stop_request


class Numbers(Dataset):
    """Its items are their indices; one of them may be bad."""

    def __init__(self, bad=None):
        self.bad = bad

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.bad is RuntimeError:
            raise RuntimeError("its own")
        if index == self.bad:
            raise InputError(f"photo {index}: is bad, replace it")
        return {"index": index}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_leave_the_generator_alone(workers):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    batches = load_batches(Numbers(), workers, batch_size=7)
    assert [i for batch in batches for i in batch["index"].tolist()] == list(range(40))
    assert torch.rand(2).equal(expected)


def test_loaders_by_default(monkeypatch):
    monkeypatch.setattr(distributed, "count_cores", lambda: 24)
    assert choose_workers() == 1, "beside a CPU"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_workers() == 16
    for processes, share in (("4", 6), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert choose_workers() == share


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they import all for themselves")
def test_loaders_are_forks_where_pythons_default_is_another():
    """They share the file of kept images, inherit blocked signals, and start at once."""
    code = """
import multiprocessing, os
multiprocessing.set_start_method("forkserver")  # the default of Python 3.14
from ramslib.distributed import load_batches
class Parents:
    def __len__(self): return 4
    def __getitem__(self, row): return {"parent": os.getppid()}
found = [batch["parent"].tolist() for batch in load_batches(Parents(), 2, batch_size=2)]
print(found == [[os.getpid()] * 2] * 2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_photo_is_told_in_its_own_words(workers):
    with pytest.raises(InputError) as error:
        list(load_batches(Numbers(bad=13), workers, batch_size=4))
    assert str(error.value) == "photo 13: is bad, replace it"
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_does_not_interrupt_what_uses_the_batches():
    before = signal.getsignal(signal.SIGCHLD)
    batches = load_batches(Numbers(), 2, batch_size=1)
    next(batches)
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    for _ in range(1000):  # a signal's handler runs between two operations
        assert signal.getsignal(signal.SIGCHLD) == before
    with pytest.raises(InputError) as error:
        list(batches)
    assert "a loader process of 2 was killed" in str(error.value)
    assert "(workers=1)" in str(error.value) and "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_other_errors_of_a_worker_keep_their_type():
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker"):
        list(load_batches(Numbers(bad=RuntimeError), 1, batch_size=4))
    assert not multiprocessing.active_children()


def _load_and_exit():
    global kept
    kept = load_batches(Numbers(), 2, batch_size=1)
    next(kept)


def test_a_loader_that_someone_still_holds_does_not_keep_python_from_ending():
    child = multiprocessing.get_context("fork").Process(target=_load_and_exit)
    child.start()
    child.join(timeout=20)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()


def test_loaders_leave_a_stop_to_the_process_that_trains():
    """A stop goes to the whole group; sent by another process than the one that loads."""
    batches = load_batches(Numbers(), 2, batch_size=1)
    next(batches), next(batches)  # each of the two has made one: both are past their start
    workers = [child.pid for child in multiprocessing.active_children()]
    assert len(workers) == 2
    sender = os.fork()
    if sender == 0:
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        os._exit(0)
    os.waitpid(sender, 0)
    time.sleep(0.2)
    assert len(list(batches)) == 38


def test_a_stop_while_loaders_start_is_left_to_the_process_that_trains():
    def start_slowly(worker):
        time.sleep(0.5)
        _leave_signals(worker)

    loader = DataLoader(Numbers(), batch_size=1, num_workers=2, worker_init_fn=start_slowly)
    batches = _begin(loader)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == set(), "blocked for a moment only"
    workers = [child.pid for child in multiprocessing.active_children()]
    sender = os.fork()
    if sender == 0:
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        os._exit(0)
    os.waitpid(sender, 0)
    assert len(list(batches)) == 40
    assert not multiprocessing.active_children()


def test_a_process_ends_with_the_one_that_started_it():
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        parent = os.getpid()
        if os.fork() == 0:
            _end_with_parent(parent, every=0.02)
        os._exit(0)
    os.waitpid(middle, 0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 10)
    assert ready and os.read(read, 1) == b"", "the orphan let go of the pipe"
    os.close(read)


def test_signals_ask_for_a_stop_and_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with stop_request() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            assert stop.wait(5)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_elsewhere_than_in_the_main_thread_signals_are_left_alone():
    found = []

    def ask():
        with stop_request() as stop:
            found.append(stop.is_set())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [False]


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as processes:
        assert processes.is_first and processes.world == 1
        assert sum_over_processes(torch.ones(3), processes).tolist() == [1, 1, 1]
        with pytest.raises(InputError, match="mine"), first_process_first(processes):
            raise InputError("mine")
    assert not Processes(1, 2).is_first
    assert not torch.distributed.is_initialized()


def _fail_in_a_group(rank, store):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "RAMSLIB_STORE": store}
    with pytest.raises(InputError), process_group() as processes:
        with first_process_first(processes):
            raise InputError("mine")
    assert not torch.distributed.is_initialized()


def test_a_group_is_left_after_an_error(tmp_path):
    """Python, ending with gloo's threads still there, was aborted every fifth time."""
    start = multiprocessing.get_context("fork").Process
    ranks = [start(target=_fail_in_a_group, args=(n, str(tmp_path / "store"))) for n in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
