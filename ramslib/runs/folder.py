"""The folder of a run: what was asked for, what happened, and the model that came out.

runs/<name>/config.json           settings, key, versions, commit, data fingerprint, classes
runs/<name>/sources/              copies of the Python files that settings refer to
runs/<name>/table.csv             every image with label, split and box; paths are below the root
runs/<name>/metrics.jsonl         one row per step, and per epoch and output
runs/<name>/last.safetensors      state to resume from
runs/<name>/best.safetensors      state of the epoch with the lowest validation nll
runs/<name>/predictions_*.csv     one row per test image and output, of best and last
runs/<name>/README.md             the model card
runs/<name>/results.csv           scores with their standard errors; there when finished
"""

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from ramslib import __version__
from ramslib.config import RENAMED, Config, current_names
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.datasets import fingerprint
from ramslib.errors import InputError, one_line, shorten, write_atomically, write_table
from ramslib.extensions import (
    SETTINGS,
    SOURCES,
    is_reference,
    key_values,
    locate_sources,
    split_reference,
    store_sources,
)

# settings that say where things are or how fast they go, not what comes out
NON_RESULT_SETTINGS = ("root", "workers", "grad_checkpointing")
STARTING = {".lock", "output.log", "job.json", SOURCES}  # there before config.json is
# what a kill while writing leaves: our temporary files and those of safetensors
LEFTOVER = re.compile(
    r"\.(config\.json|job\.json|table\.csv|metrics\.jsonl|(last|best)\.safetensors|README\.md|"
    r"predictions_(last|best)\.csv|results\.csv|report\.html)\.\d+\.part|\.tmp[A-Za-z0-9]{6}"
)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems without locks


def run_key(config: Config, data_fingerprint: str) -> str:
    """A name for all that decides a run's result: ten hexadecimal digits."""
    text = json.dumps([_result_settings(config), data_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _result_settings(config: Config) -> dict:
    values = key_values(asdict(config))
    return {name: value for name, value in values.items() if name not in NON_RESULT_SETTINGS}


def check_folder(run: Path) -> None:
    """Check that a training may write into a folder: it is missing, empty or a run's.

    Raises:
        InputError: no folder is named, or it holds a person's files.
    """
    if not run.parts:  # an unset variable of a shell, or "."
        raise InputError("the folder of the run has no name; give one, such as runs/first")
    try:
        names = set(os.listdir(run)) if os.path.lexists(run) else set()
    except OSError as error:
        raise InputError(
            f"{run}: cannot be written to ({one_line(error)}); choose another folder"
        ) from None
    if "config.json" in names:
        read_metadata(run)
    elif others := sorted(name for name in names - STARTING if not LEFTOVER.fullmatch(name)):
        raise InputError(
            f"{run}: holds files ({shorten(others)}) but no run's config.json; "
            "choose a new or an empty folder"
        )


@contextmanager
def lock_run(
    run: Path, patience: float = 20.0, log: Callable[[str], object] = print
) -> Iterator[None]:
    """Make a run's folder and hold it, so that one training at a time writes there.

    Raises:
        InputError: the folder is not a run's, cannot be written, or another training holds it.
    """
    check_folder(run)
    with lock_folder(run, patience, log):
        for file in filter(lambda file: LEFTOVER.fullmatch(file.name), run.iterdir()):
            if file.is_file() and not file.is_symlink():
                file.unlink()
        yield


@contextmanager
def lock_folder(
    folder: Path, patience: float = 20.0, log: Callable[[str], object] = print
) -> Iterator[None]:
    """Make a folder and hold its ``.lock``; a killed process releases it at once.

    Processes that are forked meanwhile, such as a loader's, do not hold it.

    Args:
        folder: what to lock.
        patience: seconds to wait for another process.
        log: called when there is something to wait for.

    Raises:
        InputError: the folder cannot be written, or is held all the time.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"{folder}: another process works there; waiting up to {patience:.0f} s")
            lock.acquire(timeout=patience)
    except Timeout:
        raise InputError(
            f"{folder}: another process works there; wait for it, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(
                f"{folder}: cannot be written ({one_line(error)}); choose another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


def init_run(run: Path, config: Config, table: pd.DataFrame, origin: str) -> None:
    """Describe a new run in its folder, or check that it is of this configuration and data.

    Where the data moved, the run notes their new place.

    Args:
        run: the folder.
        config: what is trained.
        table: its data set.
        origin: one sentence about the weights before training.

    Raises:
        InputError: the folder holds another run, or cannot be written.
    """
    found, root = fingerprint(table), os.path.abspath(config.root)
    if is_new := not (run / "config.json").exists():
        metadata = {"config": store_sources(asdict(config), run)}
        metadata |= _describe(config, table, found, origin)
    else:
        check_run(run, config, found)
        _, metadata = read_metadata(run)
        metadata["config"]["root"] = config.root
    if is_new or metadata.get("root") != root or not (run / "table.csv").exists():
        text = json.dumps(metadata | {"root": root}, indent=2)
        write_atomically(run / "config.json", lambda part: part.write_text(text))
        write_table(shorten_paths(table, root), run / "table.csv")


def _describe(config: Config, table: pd.DataFrame, data: str, origin: str) -> dict:
    packages = ("torch", "torchvision", "timm", "numpy", "pandas", "pillow")
    return {
        "key": run_key(config, data),
        "data_fingerprint": data,
        "classes": table.drop_duplicates("label").sort_values("label")["class_name"].tolist(),
        "weights": origin,
        "versions": {"ramslib": __version__} | {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "commit": _git_commit(),
    }


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def shorten_paths(table: pd.DataFrame, root: Path | str) -> pd.DataFrame:
    """A table whose paths are relative to a root; those that are not below it stay as they are."""
    starts = [os.path.join(start, "") for start in (str(root), os.path.abspath(root))]
    paths = [
        next((path.removeprefix(start) for start in starts if path.startswith(start)), path)
        for path in table["path"]
    ]
    return table.assign(path=paths)


def locate_images(
    table: pd.DataFrame, stored: Path | str, root: Path | str | None = None
) -> pd.DataFrame:
    """A table of a run with full paths.

    Args:
        table: paths relative to the root, or as version 0.1 wrote them, most of them absolute.
        stored: the root when it was written.
        root: the root now, where that is another.
    """
    base = stored if root is None else os.path.abspath(Path(root).expanduser())
    paths = [os.path.join(base, path) for path in shorten_paths(table, stored)["path"]]
    return table.assign(path=paths)


def keep_sources(config: Config, run: Path) -> Config:
    """Copy the files that settings refer to into a run, and refer to the copies.

    Raises:
        InputError: the folder holds another run.
    """
    if (run / "config.json").exists():
        check_run(run, config)
    copies = locate_sources(store_sources(asdict(config), run), run)
    return config.replace(**{name: copies[name] for name in SETTINGS})


def check_run(run: Path, config: Config, data_fingerprint: str | None = None) -> None:
    """Check that a run was made with this configuration (and, where given, with these data).

    Raises:
        InputError: it was not; the message names what differs.
    """
    old, metadata = read_metadata(run)
    there, here = _result_settings(old), _result_settings(config)
    changed = [_difference(name, old, config) for name in here if there[name] != here[name]]
    if data_fingerprint not in (None, metadata["data_fingerprint"]):
        changed.append("its data differ from those given")
    if changed:
        raise InputError(f"{run} holds another run ({shorten(changed)}); choose another folder")


def _difference(name: str, old: Config, new: Config) -> str:
    there, here = getattr(old, name), getattr(new, name)
    if is_reference(there) and is_reference(here):
        (_, function), (path, other) = split_reference(there), split_reference(here)
        if function == other:
            return f"the source of {name!r} differs: {path.name} was changed since"
    return f"{name} {there!r} there, {here!r} here"


def read_run(run: Path | str, root: Path | str | None = None) -> tuple[Config, dict, pd.DataFrame]:
    """Configuration, metadata (versions, fingerprint, classes) and table of a run.

    Settings that refer to a file of one's own refer to the run's copy of it. Paths of images are
    absolute.

    Args:
        run: its folder.
        root: where the images are now, if they moved.

    Raises:
        InputError: not the folder of a run, or a file in it was edited out of shape.
    """
    run = Path(run)
    config, metadata = read_metadata(run)
    try:
        table = pd.read_csv(
            run / "table.csv",
            dtype={"path": str, "class_name": str, "split": str, "label": int},
            keep_default_na=False,  # a class may be called NA
            na_values={side: [""] for side in BOX_COLUMNS},
            encoding_errors="surrogateescape",
        )
        table = table[["path", "label", "class_name", "split", *BOX_COLUMNS]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{run}/table.csv: cannot be read ({one_line(error)}); restore it, or train again"
        ) from None
    stored = metadata.get("root", config.root)
    return config, metadata, locate_images(table, stored, root)


def read_metadata(run: Path) -> tuple[Config, dict]:
    """Configuration and metadata of a run."""
    try:
        metadata = json.loads((run / "config.json").read_text())
        if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict):
            raise ValueError("config.json has no settings under 'config'")
        kinds = {"data_fingerprint": str, "classes": list, "weights": str}
        wrong = [name for name in kinds if not isinstance(metadata.get(name), kinds[name])]
        if wrong or not all(isinstance(name, str) for name in metadata["classes"]):
            raise ValueError(f"config.json lacks {shorten(wrong or ['names of classes'])}")
        values = current_names(locate_sources(metadata["config"], run))
        config = Config().replace(**values)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{run}: not the folder of a run ({one_line(error)}); give one that training made"
        ) from None
    _check_key(run, config, metadata)
    return config, metadata


def _check_key(run: Path, config: Config, metadata: dict) -> None:
    """Check that settings were not edited since; another version may name another key."""
    same_version = metadata.get("versions", {}).get("ramslib") == __version__
    key = run_key(config, metadata["data_fingerprint"])
    if same_version and metadata.get("key", key) != key:
        raise InputError(
            f"{run}: the settings in config.json were edited since the run was made; restore "
            "them, or train these settings in another folder"
        )


def is_finished(run: Path | str) -> bool:
    """Whether a run has its results."""
    return (Path(run) / "results.csv").exists()


def read_metrics(run: Path | str) -> pd.DataFrame:
    """All rows that a run has logged so far; a row cut short by a kill is left out.

    Raises:
        InputError: another row is damaged.
    """
    return pd.DataFrame(_read_rows(Path(run) / "metrics.jsonl"))


def validation_nll(run: Path, epoch: int) -> float:
    """What decided on the checkpoint of an epoch: nll of the last output; infinite if unknown."""
    rows = [row for row in _read_rows(run / "metrics.jsonl") if row["split"] == "validation"]
    found = [row["nll"] for row in rows if row.get("epoch") == epoch and "nll" in row]
    return found[-1] if found else math.inf


def _read_rows(path: Path) -> list[dict]:
    """Rows of a log, by their names of today; the last one may have been cut short by a kill."""
    try:
        lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); remove it") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            known = {"step": row["step"] + 0, "split": row["split"] + ""}
        except (ValueError, TypeError, LookupError, RecursionError):
            if number == len(lines):
                break
            raise InputError(
                f"{path}:{number}: not a row of a run's log; remove this line"
            ) from None
        rows.append(known | {RENAMED["columns"].get(name, name): row[name] for name in row})
    return rows


class MetricsLogger:
    """The log of a run that resumes at a step; rows after it are dropped and logged again.

    Rows go to ``metrics.jsonl`` and, as curves, to TensorBoard's files.
    """

    def __init__(self, run: Path, step: int):
        self.path = run / "metrics.jsonl"
        rows = [row for row in _read_rows(self.path) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.path, lambda part: part.write_text(text))
        self.curves = Curves(run / "tensorboard")
        self.curves.write(rows)

    def write(self, rows: list[dict]) -> None:
        """Add rows.

        Raises:
            InputError: the disk is full or the folder is gone.
        """
        try:
            with open(self.path, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({one_line(error)}); the last checkpoint is "
                "intact, make room and run the same command again"
            ) from None
        self.curves.write(rows)

    def close(self) -> None:
        """Close TensorBoard's file."""
        self.curves.close()


class Curves:
    """Numbers of a log for TensorBoard: optional, so an error ends the curves, never the training.

    Torch's writer writes in a thread of its own, whose errors nobody can catch.
    """

    def __init__(self, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)  # the log writes all its rows anew
        self.file = None
        with self._errors_end_it(folder):
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter

            self.event, self.summary = event_pb2.Event, summary_pb2.Summary
            folder.mkdir()
            self.file = open(folder / f"events.out.tfevents.{time.time():.0f}", "wb")  # noqa: SIM115
            self.records = RecordWriter(self.file)
            self._add(file_version="brain.Event:2")

    def write(self, rows: list[dict]) -> None:
        """Add the numbers of rows, each under its split, output and name."""
        with self._errors_end_it(Path(self.file.name) if self.file else None):
            for row in rows if self.file else []:
                place = "/".join(filter(None, (row["split"], row.get("output"))))
                numbers = {name: value for name, value in row.items() if isinstance(value, float)}
                tags = [{"tag": f"{place}/{k}", "simple_value": v} for k, v in numbers.items()]
                self._add(step=row["step"], summary=self.summary(value=tags))
            if self.file:
                self.file.flush()

    def _add(self, **fields) -> None:
        self.records.write(self.event(wall_time=time.time(), **fields).SerializeToString())

    @contextmanager
    def _errors_end_it(self, place: Path | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            warnings.warn(f"{place}: no curves for TensorBoard ({one_line(error)})", stacklevel=4)
            self.close()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            if self.file:
                self.file.close()
        self.file = None
