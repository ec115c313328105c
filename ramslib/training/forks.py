"""Kernels and trainings that start at once: forks of a process that has imported everything.

Importing torch, timm and the rest takes seconds, and memory that forks share. Inside of `forking` a
small stand-in is started for each process: it asks the fork server for a fork, passes signals on to
it, and ends as it ends; if the stand-in is killed, so is the fork. Linux only: elsewhere, and where
no server runs, `stand_in` leaves a command as it is, which imports for itself.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

ADDRESS = "RAMSLIB_FORKS"  # environment variable: the socket of the fork server
IMPORTED = ("ramslib.training.trainer", "ramslib.explorer.page", "ramslib.experiments.notebooks")
IMPORTED += ("ipykernel.kernelapp", "matplotlib_inline.backend_inline")
IMPORTED += ("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer")
STAND_IN = """
import contextlib, ctypes, json, os, signal, socket, sys
address, *command = sys.argv[1:]
if "RANK" in os.environ:  # one of several processes that train ends with the one that started it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
line = socket.socket(socket.AF_UNIX)
try:
    line.connect(address)
    socket.send_fds(line, [b"+"], [1, 2])
    line.sendall(json.dumps([command, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    answers = line.makefile()
    pid = int(answers.readline())
except (OSError, ValueError):  # the server has ended, or cannot fork
    os.execv(sys.executable, [sys.executable, "-m", *command])

def pass_on(number, _):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

signal.signal(signal.SIGTERM, pass_on)
signal.signal(signal.SIGINT, pass_on)
code = answers.readline()
if not code:
    os.kill(os.getpid(), signal.SIGKILL)  # as the fork was
os._exit(int(code))
"""


def stand_in(command: Sequence[str]) -> list[str]:
    """What runs a command ``python .. -m MODULE ARGUMENTS``: a stand-in where a server forks."""
    if not (address := os.environ.get(ADDRESS)):
        return list(command)
    module = command[command.index("-m") + 1 :]
    return [sys.executable, "-I", "-S", "-c", STAND_IN, address, *module]  # starts in 20 ms


@contextmanager
def listening() -> Iterator[socket.socket | None]:
    """The socket at which stand-ins ask for forks, here and in processes that are started here."""
    if sys.platform != "linux":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="ramslib-") as folder:
        with socket.socket(socket.AF_UNIX) as line:
            address = os.path.join(folder, "forks")
            with suppress(OSError):  # its path may be too long for a socket, or the disk full
                line.bind(address)
                line.listen()
                os.environ[ADDRESS] = address
            try:
                yield line if os.environ.get(ADDRESS) == address else None
            finally:
                os.environ.pop(ADDRESS, None)


@contextmanager
def forking() -> Iterator[None]:
    """Inside, what stand-ins run are forks of a server that is started now."""
    with listening() as line:
        if line is None:
            yield
            return
        code = f"from ramslib.training import forks; forks.serve({line.fileno()}, {os.getpid()})"
        started = [sys.executable, "-c", code]
        server = subprocess.Popen(started, pass_fds=[line.fileno()], start_new_session=True)
        line.close()  # or callers would wait for a server that has ended
        try:
            yield
        finally:
            server.kill()
            server.wait()


def serve(listening: int, parent: int) -> None:
    """Fork for callers at a socket until the process that started this one has ended."""
    fork_for_callers(socket.socket(fileno=listening), lambda: os.getppid() == parent)
    os._exit(0)  # without waiting for forks: trainings go on, kernels see it


def fork_for_callers(line: socket.socket, goes_on: Callable[[], bool]) -> None:
    """Fork a process for each stand-in that calls."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or collecting garbage would touch, and copy, what is shared
    line.settimeout(0.5)
    while goes_on():
        multiprocessing.active_children()  # forgets those that have ended
        with suppress(OSError), line.accept()[0] as caller:
            caller.settimeout(None)
            multiprocessing.get_context("fork").Process(target=_be, args=(caller, line)).start()


def _be(caller: socket.socket, line: socket.socket) -> None:
    """Be the process that a stand-in stands for."""
    line.close()
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        module, arguments = _take_over(caller)
    except (OSError, ValueError):  # the stand-in is gone, or goes on without a fork
        return
    threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
    code = 0
    try:
        _run(module, arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    caller.sendall(f"{code}\n".encode())


def _take_over(caller: socket.socket) -> tuple[str, list[str]]:
    """Take a stand-in's streams, folder and environment; returns its module and arguments."""
    _, streams, *_ = socket.recv_fds(caller, 1, 2)
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    (module, *arguments), folder, environment = json.loads(caller.makefile().readline())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    caller.sendall(f"{os.getpid()}\n".encode())
    return module, arguments


def _end_with(caller: socket.socket) -> None:
    caller.recv(1)  # returns when the stand-in is gone
    os.kill(os.getpid(), signal.SIGKILL)


def _run(module: str, arguments: list[str]) -> None:
    """Run a module's program."""
    sys.argv = [module, *arguments]
    if module == "ipykernel_launcher":
        arguments += [f"--IPKernelApp.parent_handle={os.getppid()}"]  # it ends with the server
        arguments += ["--IPKernelApp.matplotlib=inline"]  # pyplot, imported already, has chosen
        return importlib.import_module("ipykernel.kernelapp").launch_new_instance(argv=arguments)
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # torch read it at its import
    with suppress(ValueError, RuntimeError):  # nonsense, which is ignored there, too
        importlib.import_module("torch").set_num_threads(int(threads))
    return importlib.import_module("ramslib.__main__").run()
