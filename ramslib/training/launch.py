"""Training in processes of their own: started, followed, stopped and found again from a notebook.

A notebook kernel must not fork after it has used torch, and a training must survive the kernel. So
training runs in a process group of its own, by the command that `command` gives and that a shell
takes as well; what it does is read from the files of its run.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch

from ramslib.config import Config
from ramslib.errors import InputError, write_atomically
from ramslib.runs.run import check_run, is_finished, read_metrics, read_run
from ramslib.training.sampling import total_steps


def available_processes(wanted: int) -> tuple[int, str]:
    """How many training processes this machine can run, and one sentence that says why.

    A process needs a GPU of its own where there are any, else a core of its own.
    """
    gpus, cores = torch.cuda.device_count(), _cores()
    places, what = (gpus, "GPU") if gpus else (cores, "core")
    number = max(1, min(wanted, places))
    found = f"this machine has {places} {what}{'s' if places > 1 else ''}"
    backend = "nccl" if gpus else "gloo"
    if number == 1:
        return 1, f"{found}: training in one process"
    return number, f"{found}: training in {number} processes over {backend}, one {what} each"


def _cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def overrides(config: Config) -> list[str]:
    """The settings that differ from the defaults, as ``name=value`` for a command line."""
    default = Config()
    changed = [name for name in Config.names() if getattr(config, name) != getattr(default, name)]
    return [f"{name}={_as_text(getattr(config, name))}" for name in changed]


def _as_text(value) -> str:
    if isinstance(value, tuple):
        return json.dumps(value)  # brackets tell a list of one number from a number
    return "none" if value is None else str(value)


def command(arguments: Sequence[str], processes: int = 1) -> list[str]:
    """The command that runs ``python -m ramslib ARGUMENTS`` in one or several processes."""
    module = ["ramslib", *map(str, arguments)]
    if processes == 1:
        return [sys.executable, "-m", *module]
    engine = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *engine, "-m", "--", *module]  # -- keeps our --run from the engine


_CHILDREN: dict[int, subprocess.Popen] = {}  # started by this process, which must reap them


class Job:
    """A process group that works on a folder, started here or found running there.

    Attributes:
        folder: where it works; its output is in ``output.log`` there.
        pid: its process group.
    """

    def __init__(self, folder: Path, pid: int):
        self.folder, self.pid = folder, pid

    def is_running(self) -> bool:
        """Whether the leader of the group is alive."""
        child = _CHILDREN.get(self.pid)
        return child.poll() is None if child else _is_alive(self.pid)

    def output(self, lines: int = 20) -> str:
        """The last lines that the job printed."""
        log = self.folder / "output.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def follow(self, show: Callable[[], None] = lambda: None, every: float = 4.0) -> None:
        """Call ``show`` until the job ends; an interrupt or error here stops it at a checkpoint.

        Args:
            show: takes a twentieth of the time at most, since it shares the cores with the job.
            every: seconds between two calls, at least.

        Raises:
            InputError: the job failed; the message is the last error that it printed.
        """
        try:
            due = 0.0
            while self.is_running():
                started = time.monotonic()
                if started >= due:
                    show()
                    now = time.monotonic()
                    due = now + max(every, 20 * (now - started))
                time.sleep(min(every, 0.25))
        except BaseException:
            self.stop()
            raise
        show()
        (self.folder / "job.json").unlink(missing_ok=True)
        child, told = _CHILDREN.pop(self.pid, None), self._error()
        if told or (child and child.returncode):
            told = told or f"it ended with exit code {child.returncode}"
            raise InputError(f"{told}; see {self.folder}/output.log")

    def _error(self) -> str:
        """What the command last started here complained about; empty when it did not."""
        lines = self.output(200).splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        lines = lines[starts[-1] :] if starts else lines
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return told[0] if told else ""

    def stop(self, patience: float = 60.0) -> None:
        """Ask the job to save and end; end it the hard way when it does not within the patience."""
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError):
                if self.is_running():
                    os.killpg(self.pid, number)
            deadline = time.monotonic() + wait
            while self.is_running() and time.monotonic() < deadline:
                time.sleep(0.1)
        _CHILDREN.pop(self.pid, None)
        (self.folder / "job.json").unlink(missing_ok=True)


def start(folder: Path | str, arguments: Sequence[str], processes: int = 1) -> Job:
    """Start ``python -m ramslib ARGUMENTS`` on a folder, or find the one that runs there already.

    Args:
        folder: where the job works.
        arguments: command and options of the command line.
        processes: how many train together.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    running = find_job(folder)
    if running is not None:
        return running
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "output.log", "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}); choose another folder") from None
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // processes))} | os.environ
    environment["PYTHONUNBUFFERED"] = "1"
    if processes > 1 and not torch.cuda.device_count():
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    parts = command(arguments, processes)
    with log:
        log.write(f"$ {shlex.join(parts)}\n")
        log.flush()
        child = subprocess.Popen(
            parts,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    text = json.dumps({"pid": child.pid, "started": _start_time(child.pid)})
    write_atomically(folder / "job.json", lambda part: part.write_text(text))
    _CHILDREN[child.pid] = child
    return Job(folder, child.pid)


def find_job(folder: Path | str) -> Job | None:
    """The job that runs on a folder, whoever started it; None when there is none."""
    try:
        found = json.loads((Path(folder) / "job.json").read_text())
        pid, started = int(found["pid"]), found["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not _is_alive(pid) or _start_time(pid) != started:
        return None
    return Job(Path(folder), pid)


def _is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return _stat(pid)[:1] not in ([], ["Z"])


def _start_time(pid: int) -> str:
    """When a process started, in system ticks: tells it from a later one of the same number."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def _stat(pid: int) -> list[str]:
    """State and what follows it, from /proc; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def progress_line(run: Path | str) -> str:
    """Steps made, images per second and time left of a run, in one line."""
    metrics = read_metrics(run)
    if metrics.empty:
        return "starting"
    config, _, table = read_run(run)
    total = total_steps(config, int((table["split"] == "train").sum()))
    steps = metrics[metrics["split"] == "train"]
    step, speed = int(steps["step"].iloc[-1]), steps["images_per_second"].tail(50).median()
    left = (total - step) * config.batch_size / speed
    time_left = f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left"
    return f"step {step} of {total}, {speed:.3g} images/s, {time_left}"


def train_in_processes(
    config: Config,
    run: Path | str,
    processes: int = 1,
    show: Callable[[pd.DataFrame], None] = print,
) -> Path:
    """Train a run in processes of its own and follow it; a finished run is left as it is.

    Args:
        config: what to train.
        run: the run's folder; a run that was stopped or killed goes on.
        processes: how many.
        show: called with the run's metrics every few seconds, for a twentieth of the time at most.

    Returns:
        The folder.

    Raises:
        InputError: the training failed, or the folder holds another run.
    """
    run = Path(run)
    if (run / "config.json").exists():
        check_run(run, config)
    if not is_finished(run):
        job = start(run, ["train", "--run", str(run), *overrides(config)], processes)
        job.follow(lambda: show(read_metrics(run)))
    return run
