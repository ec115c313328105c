"""The queue of cells: each once, by any number of workers, whatever happens to one of them."""

import contextlib
import multiprocessing
import os
import queue
import signal
import time
from collections import Counter

import pandas as pd
import pytest
from optuna.trial import TrialState
from tiny import draw_photos

import ramslib.experiments.ablation
from ramslib.__main__ import main
from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.experiments.sweep import open_study, work
from ramslib.training.trainer import train

FORK = multiprocessing.get_context("fork")


def pretend(config, run, seconds=0.05):
    """Stands for a training: notes that it began, takes its time, and leaves results."""
    run.mkdir(exist_ok=True)
    with open(run.parent / "begun.txt", "a") as file:
        file.write(f"{run.name} {os.getpid()}\n")
    time.sleep(seconds)
    pd.DataFrame({"checkpoint": ["last"], "top1": [50.0]}).to_csv(run / "results.csv", index=False)


def pretend_together(config, run):
    """Stands for trainings that last until another worker has begun with one, too."""
    pretend(config, run)
    wait_for(lambda: len({worker for _, worker in begun(run.parent)}) > 1)


def never_ends(config, run):
    """Stands for a training that its worker does not survive."""
    pretend(config, run, seconds=600)


def cells_in(folder, count):
    """Cells by the folder of their run."""
    return {folder / f"cell{seed}": Config(seed=seed) for seed in range(count)}


def start_worker(folder, cells, how=pretend, heartbeat=30):
    """A worker in a process of its own."""
    worker = FORK.Process(target=_work, args=(folder, cells, how, heartbeat))
    worker.start()
    return worker


def _work(folder, cells, how, heartbeat):
    work(open_study(folder, heartbeat=heartbeat), cells, how, poll=0.05)


def _take_all(folder, together, taken):
    """Take trials without training them, until none waits."""
    study = open_study(folder)
    together.wait()
    while study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
        taken.put(study.ask().user_attrs.get("cell"))


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


def test_workers_that_start_together_train_each_cell_once(tmp_path):
    cells = cells_in(tmp_path, 8)
    workers = [start_worker(tmp_path, cells, pretend_together) for _ in range(3)]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert Counter(name for name, _ in begun(tmp_path)) == Counter(run.name for run in cells)
    assert len({worker for _, worker in begun(tmp_path)}) > 1
    done = [t for t in open_study(tmp_path).trials if t.state == TrialState.COMPLETE]
    assert len(done) == 8 and {trial.value for trial in done} == {50.0}


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_is_taken_by_one_worker(tmp_path):
    study, together, taken = open_study(tmp_path), FORK.Barrier(4), FORK.Queue()
    for cell in range(20):
        study.enqueue_trial({}, user_attrs={"cell": cell})
    workers = [FORK.Process(target=_take_all, args=(tmp_path, together, taken)) for _ in range(4)]
    for worker in workers:
        worker.start()
    took = []
    while any(worker.is_alive() for worker in workers) or not taken.empty():
        with contextlib.suppress(queue.Empty):
            took.append(taken.get(timeout=0.1))
    assert sorted(cell for cell in took if cell is not None) == list(range(20))


def test_a_worker_that_was_only_slow_goes_on(tmp_path):
    cells, study = cells_in(tmp_path, 2), open_study(tmp_path)

    def slowly(config, run):
        pretend(config, run)
        running = study.get_trials(states=[TrialState.RUNNING])
        study.tell(running[0].number, state=TrialState.FAIL)  # as another worker would

    assert work(study, cells, slowly) == {}
    assert Counter(name for name, _ in begun(tmp_path)) == {"cell0": 1, "cell1": 1}


def test_the_cell_of_a_killed_worker_is_trained_by_another(tmp_path):
    cells = cells_in(tmp_path, 2)
    doomed = start_worker(tmp_path, cells, never_ends, heartbeat=1)
    wait_for(lambda: begun(tmp_path))
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join()
    said = []
    assert work(open_study(tmp_path, heartbeat=1), cells, pretend, say=said.append, poll=0.1) == {}
    assert Counter(name for name, _ in begun(tmp_path)) == {"cell0": 2, "cell1": 1}
    states = Counter(trial.state.name for trial in open_study(tmp_path).trials)
    assert states == {"COMPLETE": 2, "FAIL": 1}


def test_a_cell_that_fails_is_tried_again_and_then_reported(tmp_path):
    cells, tried, said = cells_in(tmp_path, 3), Counter(), []

    def fail(config, run):
        tried[run.name] += 1
        if run.name == "cell1" or tried[run.name] == 1:
            raise InputError(f"{run.name} is cursed")
        pretend(config, run)

    study = open_study(tmp_path)
    assert work(study, cells, fail, say=said.append) == {tmp_path / "cell1": "cell1 is cursed"}
    assert tried == {"cell0": 2, "cell1": 2, "cell2": 2}
    assert sum("failed: cell1 is cursed" in line for line in said) == 2
    assert [t.user_attrs["error"] for t in study.trials if t.state == TrialState.FAIL][-1:]
    assert work(study, cells, pretend, say=said.append) == {}, "asked again, it tries again"


def test_an_interrupt_gives_the_cell_back_at_once(tmp_path):
    def interrupt(config, run):
        raise KeyboardInterrupt

    cells = cells_in(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        work(open_study(tmp_path), cells, interrupt)
    started = [trial.state for trial in open_study(tmp_path).trials]
    assert started == [TrialState.FAIL]
    assert work(open_study(tmp_path), cells, pretend) == {}


def test_cells_of_another_grid_wait_in_the_same_queue(tmp_path):
    first, second = cells_in(tmp_path, 1), {tmp_path / "other": Config(scales=3, threshold=(1, 2))}
    seen = []

    def interrupt(config, run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(open_study(tmp_path), second, interrupt)
    study = open_study(tmp_path)
    study.enqueue_trial({}, user_attrs=study.trials[0].user_attrs)

    def note(config, run):
        seen.append((run, config))
        pretend(config, run)

    assert work(study, first, note) == {}
    assert dict(seen) == first | second


def test_a_database_that_cannot_be_used_is_told(tmp_path):
    for address in ("nowhere", "sqlite:////proc/x/y.db", "nodatabase://x", "mysql://x:word@y/z"):
        with pytest.raises(InputError, match="database cannot be used") as error:
            open_study(tmp_path / "cells", address)
        assert "\n" not in str(error.value) and "word@" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        open_study(tmp_path / "file")


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings run here, which saves the start of a process each."""
    monkeypatch.setattr(
        ramslib.experiments.ablation,
        "train_in_processes",
        lambda config, run, processes, show: train(config, run),
    )


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
    assert "0 of 4 cells" in out and "(3 of 4 cells are finished)" in out
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
    assert "error: 1 of 2 cells failed, " in line and "batch_size 100 exceeds" in line
    assert captured.out.count("failed: batch_size 100") == 2
    assert (tmp_path / "sweep" / "sweep.db").exists()
    assert len(list((tmp_path / "sweep").glob("*/results.csv"))) == 1
