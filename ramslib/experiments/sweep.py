"""Cells that any number of workers train: in one shell, in several, or on many machines.

The queue is an Optuna study in a database: by default a file, with nothing to start; at an address
such as ``postgresql+psycopg://user@host/name`` the workers of many machines share it. A cell is a
trial, and it is done when the folder of its run is, so all machines must see these folders. The
study says who works on what and what failed. A worker that dies stops its heartbeat; another one
takes its cell and goes on from the last checkpoint.
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import optuna
import pandas as pd
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Connection, event

from ramslib.config import Config
from ramslib.errors import InputError, one_line
from ramslib.runs.run import is_finished, lock_run

Train = Callable[[Config, Path], object]
Say = Callable[[str], object]
OPEN = (TrialState.WAITING, TrialState.RUNNING)
# What Optuna raises at the end of a trial that others took for dead while it was only slow.
ENDED_BY_OTHERS = (UpdateFinishedTrialError, ValueError, AssertionError)


def open_study(folder: Path, storage: str | None = None, heartbeat: int = 30) -> optuna.Study:
    """The queue of a folder's cells, made when missing; the study has the folder's name.

    Args:
        folder: where the runs of the cells lie.
        storage: address of a database; by default ``sweep.db`` in the folder. SQLite serves the
            workers of one machine, and no network file system.
        heartbeat: seconds between a worker's signs of life; after three without one it is dead.

    Raises:
        InputError: no such database, no driver for it, or the folder cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # failures are told by `work`
    with lock_run(folder, patience=300), _quiet():  # one by one, when workers start together
        folder = folder.resolve()
        address = storage or f"sqlite:///{folder / 'sweep.db'}"
        sqlite = address.startswith("sqlite")
        patient = {"connect_args": {"timeout": 60, "isolation_level": None}} if sqlite else {}
        try:
            database = RDBStorage(
                address, patient, heartbeat_interval=heartbeat, grace_period=3 * heartbeat
            )
            if sqlite:
                event.listen(database.engine, "begin", _lock_the_file)
            return optuna.create_study(
                study_name=folder.name, storage=database, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # each database driver has its own
            raise InputError(
                f"{folder}: its queue's database cannot be used ({one_line(error)}); "
                "check the address"
            ) from None  # without the address, which may hold a password


def _lock_the_file(connection: Connection) -> None:
    """Begin a transaction by locking, before a trial's state is read.

    SQLite has no ``SELECT FOR UPDATE``: two workers would see a trial waiting and both take it.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _quiet() -> warnings.catch_warnings:
    """Heartbeats have been experimental since 2021."""
    return warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning)


def work(
    study: optuna.Study,
    cells: Mapping[Path, Config],
    train: Train,
    attempts: int = 2,
    say: Say = print,
    poll: float = 2.0,
) -> dict[Path, str]:
    """Take cells from the queue and train them, until none of ours is left.

    Args:
        study: from `open_study`; what others put into it is trained as well, while ours wait.
        cells: configurations, by the folder of their run.
        train: called as ``train(config, run)``; it finishes the run or raises.
        attempts: how often a cell may fail from now on.
        say: told what happens.
        poll: seconds between looks at the cells that others train.

    Returns:
        The cells that failed too often: the folder of each, and why.
    """
    begin, take = len(study.get_trials(deepcopy=False)), partial(_take, study, cells, train, say)
    while True:
        with _quiet():
            fail_stale_trials(study)
        trials = _by_cell(study)
        failed = {run: _failures(trials[run.name], begin) for run in cells if not is_finished(run)}
        left = [run for run, reasons in failed.items() if len(reasons) < attempts]
        if not left:
            return {run: reasons[-1] for run, reasons in failed.items()}
        for run in left:
            if not any(trial.state in OPEN for trial in trials[run.name]):
                _enqueue(study, run, cells[run])
        if study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            with suppress(*ENDED_BY_OTHERS):
                study.optimize(take, n_trials=1, catch=(Exception,))
        else:
            time.sleep(poll)


def _enqueue(study: optuna.Study, run: Path, config: Config) -> None:
    values = asdict(config)
    changed = {k: v for k, v in values.items() if v != getattr(Config(), k)}
    study.enqueue_trial({}, user_attrs={"cell": run.name, "config": values, "changed": changed})


def _take(
    study: optuna.Study, cells: Mapping[Path, Config], train: Train, say: Say, trial: Trial
) -> float:
    """Train the cell of one trial; the accuracy of its last view is what the dashboard shows."""
    if (name := trial.user_attrs.get("cell")) is None:
        raise optuna.TrialPruned  # another worker was faster: the queue is empty
    known = {run.name: (run, config) for run, config in cells.items()}
    elsewhere = next(iter(cells)).with_name(Path(name).name)
    run, config = known.get(name) or (elsewhere, Config().replace(**trial.user_attrs["config"]))
    running = [t for t in _by_cell(study)[name] if t.state == TrialState.RUNNING]
    if is_finished(run) or min(t.number for t in running) < trial.number:
        raise optuna.TrialPruned  # two workers put it into the queue at the same moment
    say(f"{run}: training ({sum(map(is_finished, cells))} of {len(cells)} cells are finished)")
    try:
        train(config, run)
    except Exception as error:
        trial.set_user_attr("error", one_line(error))
        say(f"{run}: failed: {one_line(error)}")
        raise
    return float(pd.read_csv(run / "results.csv").query("checkpoint == 'last'")["top1"].iloc[-1])


def _by_cell(study: optuna.Study) -> dict[str, list[FrozenTrial]]:
    trials = defaultdict(list)
    for trial in study.get_trials(deepcopy=False):
        trials[trial.user_attrs.get("cell")].append(trial)
    return trials


def _failures(trials: list[FrozenTrial], begin: int) -> list[str]:
    """Why a cell failed, each time since trial ``begin``."""
    failed = [t for t in trials if t.state == TrialState.FAIL and t.number >= begin]
    return [trial.user_attrs.get("error", "its worker died") for trial in failed]
