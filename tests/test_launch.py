"""Training in processes of its own: command lines, following, stopping, finding again."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed.run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT, draw_photos, tiny_config

import ramslib.training.launch
from ramslib.__main__ import _config, _parse
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.runs.folder import is_finished, lock_run, read_metrics
from ramslib.training.launch import (
    Job,
    available_processes,
    command,
    find_job,
    overrides,
    run_in_processes,
    start,
    train,
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Other tests may run beside: two threads of a tiny model wait for each other for minutes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


CHOICES = {
    "image_size": st.sampled_from([112, 448, (64, 96)]),
    "highres_size": st.sampled_from([None, 336, (64, 96)]),
    "root": st.text("abc 'ä\"=/.,$[]{}", min_size=1).filter(str.strip),
    "scales": st.integers(1, 4),
    "threshold": st.sampled_from([1.0, 1.25, (1.2, 1.3, 1.4)]),
    "loss": st.sampled_from(["sum", "last", (1.0, 0.5, 0.25, 0.0)]),
    "learning_rate": st.floats(1e-8, 1.0),
    "final_norm": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}


@given(st.fixed_dictionaries({}, optional=CHOICES))
@settings(max_examples=100, deadline=None)
def test_settings_survive_the_command_line(changes):
    config = Config().replace(**changes)
    options = _parse(["train", "--run", "x", *overrides(config)])
    assert _config(options) == config


def test_a_list_of_one_number_survives_the_command_line():
    config = Config().replace(threshold=(1.2,), scales=1, loss=(2.0,))
    options = _parse(["train", "--run", "x", *overrides(config)])
    assert _config(options) == config


def test_commands_can_be_pasted():
    assert command(["train", "--run", Path("a b")]) == [
        sys.executable,
        "-m",
        "ramslib",
        "train",
        "--run",
        "a b",
    ]
    several = command(["train", "--run", "x"], 2)
    assert several[1:] == ["-m", "ramslib", "train", "--run", "x", "--processes", "2"]


def test_processes_need_a_gpu_or_a_core_each(monkeypatch):
    monkeypatch.setattr(ramslib.training.launch, "count_cores", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert available_processes(4) == (
        2,
        "this machine has 2 cores: training in 2 processes over gloo, one core each",
    )
    assert available_processes(1)[0] == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert available_processes(2) == (1, "this machine has 1 GPU: training in one process")


def _in_session(session):
    """Processes of a session that are no zombies, and zombies among our children."""
    alive, zombies = [], []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if process.status() == psutil.STATUS_ZOMBIE:
                zombies += [process.pid] if process.ppid() == os.getpid() else []
            elif os.getsid(process.pid) == session:
                alive.append(process.pid)
    return alive, zombies


def _working_on(run):
    """Processes that name a run on their command line."""
    found = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True)
    return [Path("/proc", pid) for pid in found.stdout.split()]


def _listening(processes):
    """Local ports that these processes listen on."""
    held = set()
    for file in [file for process in processes for file in process.glob("fd/*")]:
        with suppress(FileNotFoundError):  # closed meanwhile
            held.add(os.readlink(file))
    rows = [
        line.split()
        for file in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(file).read_text().splitlines()[1:]
    ]
    return {
        row[1].rpartition(":")[2] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in held
    }


def _attach_elsewhere(run, answer):
    answer.put(find_job(run).process.pid)


def test_a_training_is_followed_interrupted_found_again_and_finished(tmp_path):
    config = tiny_config(draw_photos(tmp_path / "photos"), epochs=60, workers=1)
    run, pids = tmp_path / "run", []

    def interrupt(metrics):
        if len(metrics):
            pids.append(find_job(run).process.pid)
            answer = multiprocessing.Queue()
            other = multiprocessing.Process(target=_attach_elsewhere, args=(run, answer))
            other.start()
            assert answer.get(timeout=20) == pids[0], "found from another process"
            other.join()
            with pytest.raises(InputError, match="holds another run"):
                train(config.replace(seed=1), run)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, run, show=interrupt)
    log = (run / "output.log").read_text()
    assert "stopped as asked, at step" in log and "Traceback" not in log
    assert find_job(run) is None and not (run / "job.json").exists()
    stopped = len(read_metrics(run))
    assert 0 < stopped and (run / "last.safetensors").exists() and not is_finished(run)
    assert _in_session(pids[0]) == ([], []) and _working_on(run) == []

    train(config.replace(workers=0), run, show=lambda metrics: None)
    assert is_finished(run) and len(read_metrics(run)) > stopped
    assert read_metrics(run).query("split == 'train'")["step"].tolist() == list(range(1, 181))
    train(config, run, show=lambda metrics: pytest.fail("it is finished"))


def test_two_processes_stop_cleanly_and_leave_nothing(tmp_path):
    config = tiny_config(draw_photos(tmp_path / "photos"), epochs=200, workers=1)
    run = tmp_path / "run"
    job = start(run, ["train", "--run", run, *overrides(config)], 2)
    assert start(run, ["train"], 2).process.pid == job.process.pid, "it runs already"
    deadline = time.monotonic() + 120
    while read_metrics(run).empty and time.monotonic() < deadline:
        time.sleep(0.1)
    found = find_job(run)
    assert _listening(_working_on(run)), "two processes meet at a port"
    assert len(_working_on(run)) >= 3
    found.stop()
    assert not found.is_running() and find_job(run) is None
    assert "stopped as asked, at step" in job.output(200)
    time.sleep(0.5)
    assert _in_session(job.process.pid) == ([], [])
    assert _working_on(run) == []  # so they hold no port


def test_a_slow_picture_takes_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now, shown = [0.0], []

    def sleep(seconds):
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(ramslib.training.launch, "time", clock)
    monkeypatch.setattr(Job, "is_running", lambda job: now[0] < 600)
    monkeypatch.setattr(Job, "_end", lambda job: None)

    def show():
        shown.append(now[0])
        sleep(3.0)

    Job(tmp_path, SimpleNamespace(wait=sleep)).watch(show, every=4.0)
    assert len(shown) == 11, "at 0, 63, 126 .. 567 seconds and at the end"
    assert min(b - a for a, b in zip(shown, shown[1:-1], strict=False)) >= 63


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_a_process_that_is_killed_ends_the_others(tmp_path, victim):
    config = tiny_config(draw_photos(tmp_path / "photos"), epochs=500, workers=1)
    run = tmp_path / "run"
    job = start(run, ["train", "--run", run, *overrides(config)], 2)
    deadline = time.monotonic() + 120
    while read_metrics(run).empty and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = job.process.children()
    assert len(ranks) == 2
    (ranks[1] if victim == "rank" else job.process).kill()
    if victim == "rank":
        with pytest.raises(InputError, match="killed by signal 9 .* the same command resumes"):
            job.watch()
        assert job.output().count("error: ") == 1
    assert psutil.wait_procs(ranks, timeout=30)[1] == []
    job.stop()
    with lock_run(run, patience=0):
        pass


def test_processes_that_are_stopped_while_they_start_do_not_seem_killed(monkeypatch):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr("ramslib.training.launch.command", lambda arguments: sleep)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(InputError, match="^stopped as asked, before training began; the same"):
        run_in_processes(["train"], 2)


def test_a_folder_of_a_person_is_not_written_to(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match="holds files .README.md."):
        train(Config(), tmp_path)
    assert os.listdir(tmp_path) == ["README.md"]


def test_a_failure_is_reported_as_the_command_reported_it(tmp_path):
    with open(tmp_path / "output.log", "w") as log:
        log.write("$ an earlier command\nerror: of another time\n")
    job = start(tmp_path, ["train", "--run", tmp_path, "epoks=3"])
    with pytest.raises(InputError, match=r"^unknown setting 'epoks'; .*; see .*output.log$"):
        job.watch(every=0.1)
    assert find_job(tmp_path) is None


def test_a_job_file_of_the_past_is_no_job(tmp_path):
    for text in ("", "{", "[]", "{}", '{"pid": "x", "started": 1}', '{"pid": 1, "started": "0"}'):
        (tmp_path / "job.json").write_text(text)
        assert find_job(tmp_path) is None
    dead = subprocess.Popen([sys.executable, "-c", ""])
    text = json.dumps({"pid": dead.pid, "started": time.time()})
    dead.wait()
    (tmp_path / "job.json").write_text(text)
    assert find_job(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run: cannot be written"):
        start(tmp_path / "file" / "run", ["train"])


STARTER = """
import subprocess, time
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def test_a_job_whose_starter_takes_no_notice_is_stopped_at_once(tmp_path):
    """It stays a zombie, as that of a notebook whose kernel is idle."""
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    try:
        job = Job(tmp_path, psutil.Process(int(starter.stdout.readline())))
        started = time.monotonic()
        job.stop(patience=40)
        assert time.monotonic() - started < 20
        assert job.process.status() == psutil.STATUS_ZOMBIE
    finally:
        starter.kill()
        starter.wait()


def test_ports_are_read_as_they_are():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert f"{server.getsockname()[1]:04X}" in _listening([Path("/proc/self")])


def test_the_script_for_slurm_parses(tmp_path):
    """As bash runs it, with what Slurm would do replaced by printing it."""
    text = (ROOT / "docs" / "training.md").read_text()
    (script := tmp_path / "train.sh").write_text(text.split("```bash\n")[1].split("```")[0])
    for name, does in {
        "scontrol": "echo node1; echo node2",
        "srun": "printf '%s\\n' \"$@\"",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    printed = subprocess.run(["bash", "-eu", script], env=environment, capture_output=True)
    words = printed.stdout.decode().splitlines()
    assert words[:3] == ["python", "-m", "torch.distributed.run"]
    given = torch.distributed.run.parse_args(words[3:])
    assert (given.nnodes, given.rdzv_endpoint, given.rdzv_id) == ("2", "node1:29400", "7")
    assert given.module and given.training_script == "ramslib"
    options = _parse(given.training_script_args)
    assert _config(options) == Config.preset("paper-cub", root="FOLDER", workers=8)
