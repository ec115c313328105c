"""Many runs, trained by any number of workers: in one shell, in several, or on many machines.

The queue is an Optuna study in a database: by default a file, with nothing to start; at a URL such
as ``postgresql+psycopg://user@host/name`` the workers of many machines share it. A trial trains one
run, and it is done when the run's folder is finished, so all machines must see these folders. The
study records who works on what and what failed. A worker that dies stops its heartbeat; another one
takes its run over and resumes from the last checkpoint.
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Connection, create_engine, event, inspect, make_url
from sqlalchemy.exc import NoSuchModuleError

from ramslib.config import Config
from ramslib.data.datasets import fingerprint, load_table
from ramslib.errors import InputError, one_line, shorten
from ramslib.runs.folder import is_finished, lock_folder, run_key
from ramslib.runs.results import read_results
from ramslib.training import launch

Train = Callable[[Config, Path], object]
ATTEMPTS = 2  # after so many failures a run is reported
POLL = 2.0  # seconds between checks of the runs that others train
OPEN = (TrialState.WAITING, TrialState.RUNNING)
# What Optuna raises at the end of a trial that others took for dead while it was only slow.
ENDED_BY_OTHERS = (UpdateFinishedTrialError, ValueError, AssertionError)


def run_folder(config: Config, folder: Path | str) -> Path:
    """The folder of a configuration's run: below ``folder``, named by the key of all it depends on.

    The key covers settings and data, so that a finished run is never trained twice.
    """
    return Path(folder) / run_key(config, fingerprint(load_table(config)))


def train_all(
    configs: Iterable[Config],
    folder: Path | str,
    processes: int = 1,
    storage: str | None = None,
) -> list[Path]:
    """Train every configuration that has no finished run yet.

    Call it with the same configurations and folder from as many shells or machines as there are:
    each run is trained once.

    Args:
        configs: what to train; duplicates share a run.
        folder: of all runs.
        processes: training processes per run.
        storage: URL of the queue's database; by default a file in the folder.

    Returns:
        The folders of the runs in the order of the configurations; see `comparison.collect`.

    Raises:
        InputError: a run failed twice; all others are finished.
    """
    runs = {run_folder(config, folder): config for config in configs}
    finished = sum(map(is_finished, runs))
    print(f"{finished} of {len(runs)} runs in {folder} are finished")
    if finished < len(runs):
        train = partial(launch.train, processes=processes, show=lambda metrics: None)
        failed = run_worker(open_study(Path(folder), storage), runs, train)
        if failed:
            run, reason = next(iter(failed.items()))
            raise InputError(
                f"{len(failed)} of {len(runs)} runs failed, {run.name}: {reason}; the others are "
                "finished, and the same command tries again"
            )
    return list(runs)


def open_study(folder: Path, storage: str | None = None, heartbeat: int = 30) -> optuna.Study:
    """The queue of a folder's runs, made when missing; the study has the folder's name.

    Args:
        folder: of the runs.
        storage: URL of a database; by default ``sweep.db`` in the folder. SQLite serves the workers
            of one machine, and no network file system.
        heartbeat: seconds between a worker's signs of life; after three without one it is dead.

    Raises:
        InputError: no such database, no driver for it, a file that is no queue, or a folder that
            cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # `run_worker` reports failures
    with lock_folder(folder, patience=300), _quiet():  # one by one, when workers start together
        folder = folder.resolve()
        url = storage or f"sqlite:///{folder / 'sweep.db'}"
        options = {"heartbeat_interval": heartbeat, "grace_period": 3 * heartbeat}
        if sqlite := url.startswith("sqlite"):
            patient = {"timeout": 60, "isolation_level": None}
            options["engine_kwargs"] = {"connect_args": patient}
            _check_header(Path(make_url(url).database or ""))
        try:
            if sqlite:
                engine = create_engine(url)
                names = inspect(engine).get_table_names()
                engine.dispose()  # it would keep the file open
                if names and "studies" not in names:
                    raise InputError(f"it holds tables of another program, {shorten(names)}")
            database = RDBStorage(url, **options)
            if sqlite:
                event.listen(database.engine, "begin", _lock_the_file)
            return optuna.create_study(
                study_name=folder.name, storage=database, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # each database driver has its own; the URL may have a password
            remedy = "check its URL, or remove a damaged sweep.db"
            if isinstance(error, ImportError | NoSuchModuleError):
                remedy = "its driver: pip install 'ramslib[postgres]'"
            raise InputError(
                f"{folder}: the database of the queue cannot be used ({one_line(error)}); {remedy}"
            ) from None


def _check_header(path: Path) -> None:
    """Refuse a file that is no database, of which SQLite would delete what it takes for a journal.

    Raises:
        InputError: it is none.
    """
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):
                raise InputError(f"{path}: no database; remove it or give another file")


def _lock_the_file(connection: Connection) -> None:
    """Begin a transaction by locking, before a trial's state is read.

    SQLite has no ``SELECT FOR UPDATE``: two workers would see a trial waiting and both take it.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _quiet() -> warnings.catch_warnings:
    """Heartbeats have been experimental since 2021."""
    return warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning)


def run_worker(study: optuna.Study, runs: Mapping[Path, Config], train: Train) -> dict[Path, str]:
    """Take trials from the queue and train them, until none of ours is left.

    Args:
        study: from `open_study`; what others put into it is trained as well, while ours wait.
        runs: configurations, by the folder of their run.
        train: called as ``train(config, run)``; it finishes the run or raises.

    Returns:
        The runs that failed `ATTEMPTS` times from now on: the folder of each, and why.
    """
    begin = len(study.get_trials(deepcopy=False))
    train_next = partial(run_trial, study, runs, train)
    reported: list[Path] = []
    while True:
        with _quiet():
            fail_stale_trials(study)
        trials = _trials_by_run(study)
        failed = {run: _failures(trials[run.name], begin) for run in runs if not is_finished(run)}
        left = [run for run, reasons in failed.items() if len(reasons) < ATTEMPTS]
        if not left:
            return {run: reasons[-1] for run, reasons in failed.items()}
        for run in left:
            if not any(trial.state in OPEN for trial in trials[run.name]):
                changed = launch.overrides(runs[run])
                facts = {"run": run.name, "config": asdict(runs[run]), "changed": changed}
                study.enqueue_trial({}, user_attrs=facts)
        if study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            with suppress(*ENDED_BY_OTHERS):
                study.optimize(train_next, n_trials=1, catch=(Exception,))
            continue
        if left != reported:
            names = shorten([run.name for run in left])
            print(f"waiting for other workers: {names}; killed ones are replaced after 2 to 3 min")
            reported = left
        time.sleep(POLL)


def run_trial(
    study: optuna.Study, runs: Mapping[Path, Config], train: Train, trial: Trial
) -> float:
    """Train the run of one trial.

    Returns:
        Accuracy of the last output of the best checkpoint, the trial's value in a dashboard.
    """
    if (name := trial.user_attrs.get("run")) is None:
        raise optuna.TrialPruned  # another worker was faster: the queue is empty
    study._storage.record_heartbeat(trial._trial_id)  # a trial without one is never stale
    known = {run.name: (run, config) for run, config in runs.items()}
    elsewhere = next(iter(runs)).with_name(Path(name).name)
    run, config = known.get(name) or (elsewhere, Config().replace(**trial.user_attrs["config"]))
    running = [t for t in _trials_by_run(study)[name] if t.state == TrialState.RUNNING]
    if is_finished(run) or min(t.number for t in running) < trial.number:
        raise optuna.TrialPruned  # two workers put it into the queue at the same moment
    print(f"{run}: training ({sum(map(is_finished, runs))} of {len(runs)} runs are finished)")
    try:
        train(config, run)
    except Exception as error:
        trial.set_user_attr("error", one_line(error))
        print(f"{run}: failed: {one_line(error)}")
        raise
    return float(read_results(run).query("checkpoint == 'best'")["top1"].iloc[-1])


def _trials_by_run(study: optuna.Study) -> dict[str, list[FrozenTrial]]:
    trials = defaultdict(list)
    for trial in study.get_trials(deepcopy=False):
        trials[trial.user_attrs.get("run")].append(trial)
    return trials


def _failures(trials: list[FrozenTrial], begin: int) -> list[str]:
    """Why a run failed, each time since trial ``begin``."""
    failed = [t for t in trials if t.state == TrialState.FAIL and t.number >= begin]
    return [trial.user_attrs.get("error", "its worker died") for trial in failed]
