"""Training in processes of its own: started, watched, stopped and found again from a notebook.

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
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil

from ramslib.config import Config
from ramslib.errors import InputError, count_cores, stop_request, write_text, writing
from ramslib.runs.folder import check_folder, check_run, is_finished, read_metrics, read_run
from ramslib.training import forks

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # where processes of one machine meet


def available_processes(wanted: int) -> tuple[int, str]:
    """How many training processes this machine can run, and one sentence that says why.

    A process needs a GPU of its own where there are any, else a core of its own.
    """
    import torch  # slow: the command that starts training processes does without

    gpus, cores = torch.cuda.device_count(), count_cores()
    places, what = (gpus, "GPU") if gpus else (cores, "core")
    number = max(1, min(wanted, places))
    found = f"this machine has {places} {what}{'s' if places > 1 else ''}"
    backend = "nccl" if gpus else "gloo"
    if number == 1:
        return 1, f"{found}: training in one process"
    return number, f"{found}: training in {number} processes over {backend}, one {what} each"


def overrides(config: Config) -> list[str]:
    """The settings that differ from the defaults, as ``name=value`` for a command line."""
    default = Config()
    changed = [name for name in Config.names() if getattr(config, name) != getattr(default, name)]
    return [f"{name}={_as_text(getattr(config, name))}" for name in changed]


def _as_text(value) -> str:
    if isinstance(value, tuple):
        return json.dumps(value)  # brackets distinguish a list of one number from a number
    return "none" if value is None else str(value)


def command(arguments: Sequence[str], processes: int = 1) -> list[str]:
    """The command that runs ``python -m ramslib ARGUMENTS`` in one or several processes."""
    several = ["--processes", str(processes)] if processes > 1 else []
    return [sys.executable, "-m", "ramslib", *map(str, arguments), *several]


def run_in_processes(arguments: Sequence[str], processes: int, grace: float = 30.0) -> int:
    """Run ``python -m ramslib ARGUMENTS`` in processes that train together on this machine.

    SIGTERM and Ctrl-C stop all of them at a checkpoint. When one of them fails, the others end.

    Args:
        arguments: command and options of the command line.
        processes: their number.
        grace: seconds for the others to end after a failure.

    Returns:
        The exit code of the first process that failed, or 0.

    Raises:
        InputError: the system killed one of them.
    """
    if processes < 1:
        raise InputError(f"processes is {processes}; give 1 or more")
    environment = {"OMP_NUM_THREADS": str(max(1, count_cores() // processes))} | os.environ
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    environment.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    with tempfile.TemporaryDirectory(prefix="ramslib-") as folder, stop_request() as stop:
        environment["RAMSLIB_STORE"] = f"{folder}/store"
        ranks = []
        for rank in map(str, range(processes)):
            place = {"RANK": rank, "LOCAL_RANK": rank}
            started = forks.stand_in(command(arguments))
            ranks.append(subprocess.Popen(started, env=environment | place))
        code, asked, failed = 0, False, float("inf")
        while None in (codes := [rank.poll() for rank in ranks]):
            code = code or next(filter(None, codes), 0)
            failed = min(failed, time.monotonic()) if code else failed
            if time.monotonic() > failed + grace:
                _signal(ranks, signal.SIGKILL)
            elif (code or stop.is_set()) and not asked:
                asked = True
                _signal(ranks, signal.SIGTERM)
            time.sleep(0.05)
        code = code or next(filter(None, codes), 0)
    if code < 0:
        why = f"a training process was killed by signal {-code} (memory may have run out)"
        if stop.is_set() and -code == signal.SIGTERM:  # before it listened to that
            why = "stopped as asked, before training began"
        raise InputError(f"{why}; the same command resumes from the last checkpoint")
    return code


def _signal(ranks: Sequence[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)  # does nothing where it has ended


class Job:
    """A process group that works on a folder, started here or found running there.

    Attributes:
        folder: where it works; its output is in ``output.log`` there.
        process: the leader of the group.
    """

    def __init__(self, folder: Path, process: psutil.Process | psutil.Popen):
        self.folder, self.process = folder, process

    def is_running(self) -> bool:
        """Whether the leader of the group is alive."""
        with suppress(psutil.NoSuchProcess):
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        return False

    def output(self, lines: int = 20) -> str:
        """The last lines that the job printed."""
        log = self.folder / "output.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def watch(self, show: Callable[[], None] = lambda: None, every: float = 4.0) -> None:
        """Call ``show`` until the job ends; an interrupt or error here stops it at a checkpoint.

        Args:
            show: takes a twentieth of the time at most, since it shares the cores with the job.
            every: seconds between two calls, at least.

        Raises:
            InputError: the job failed; the message is the last error that it printed.
        """
        try:
            while self.is_running():
                started = time.monotonic()
                show()
                pause = 20 * (time.monotonic() - started)
                with suppress(psutil.TimeoutExpired):
                    self.process.wait(max(every, pause))
        except BaseException:
            self.stop()
            raise
        show()
        code, message = self._end(), self._error()
        if message or code:
            message = message or f"the training ended with exit code {code}"
            raise InputError(f"{message}; see {self.folder}/output.log")

    def _error(self) -> str:
        """The error that the command last started here printed; empty when there is none."""
        lines = self.output(200).splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        lines = lines[starts[-1] :] if starts else lines
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[0] if errors else ""

    def stop(self, patience: float = 60.0) -> None:
        """Ask the job to save and end; kill it when it does not within the patience."""
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError):
                if self.is_running():
                    os.killpg(self.process.pid, number)
            deadline = time.monotonic() + wait
            while self.is_running() and time.monotonic() < deadline:  # psutil waits for zombies
                time.sleep(0.1)
        self._end()

    def _end(self) -> int | None:
        """Forget the job; returns its exit code where it was started by this process."""
        (self.folder / "job.json").unlink(missing_ok=True)
        with suppress(psutil.Error):
            return self.process.wait(timeout=1)
        return None


def start(folder: Path | str, arguments: Sequence[str], processes: int = 1) -> Job:
    """Start ``python -m ramslib ARGUMENTS`` on a run's folder, or find what runs there already.

    Args:
        folder: where the job works.
        arguments: command and options of the command line.
        processes: how many train together.

    Raises:
        InputError: the folder holds other files, or cannot be written.
    """
    folder = Path(folder)
    running = find_job(folder)
    if running is not None:
        return running
    check_folder(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "output.log", "a")  # noqa: SIM115
    parts = command(arguments, processes)
    with log:
        log.write(f"$ {shlex.join(parts)}\n")
        log.flush()
        child = psutil.Popen(
            forks.stand_in(parts),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    facts = {"pid": child.pid, "started": child.create_time()}
    write_text(folder / "job.json", json.dumps(facts))
    return Job(folder, child)


def find_job(folder: Path | str) -> Job | None:
    """The job that runs on a folder, whoever started it; None when there is none."""
    try:
        found = json.loads((Path(folder) / "job.json").read_text())
        job = Job(Path(folder), psutil.Process(int(found["pid"])))
        started = job.process.create_time()  # a later process may have the number of a dead one
        return job if job.is_running() and abs(started - float(found["started"])) < 1 else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def progress_line(run: Path | str) -> str:
    """Steps made, images per second and time left of a run, in one line."""
    from ramslib.training.optimization import total_steps  # imports torch

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


def train(
    config: Config,
    run: Path | str,
    processes: int = 1,
    show: Callable[[pd.DataFrame], object] | None = None,
) -> Path:
    """Train a run in processes of its own and watch it; a finished run is left as it is.

    Args:
        config: what to train.
        run: the run's folder; a run that was stopped or killed resumes.
        processes: how many.
        show: called with the run's metrics every few seconds, for a twentieth of the time at most;
            by default the progress is printed.

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
        job.watch(lambda: show(read_metrics(run)) if show else print(progress_line(run)))
    return run
