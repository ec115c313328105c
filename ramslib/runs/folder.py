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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from ramslib import __version__, extensions
from ramslib.config import RENAMED, Config, current_columns, current_names
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.datasets import fingerprint
from ramslib.errors import (
    InputError,
    file_errors,
    input_errors,
    one_line,
    shorten,
    write_table,
    write_text,
    writing,
)

# settings that say where things are or how fast they go, not what comes out
NON_RESULT_SETTINGS = ("root", "lists", "year", "workers", "grad_checkpointing", "compile")
STARTING = {".lock", "output.log", "job.json", extensions.SOURCES}  # there before config.json is
# what a kill while writing leaves: our temporary files and those of safetensors
LEFTOVER = re.compile(r"\.\w+\.(jsonl?|csv|safetensors|md|html)\.\d+\.part|\.tmp[A-Za-z0-9]{6}")
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems without locks
TABLE = {"path": str, "label": int, "class_name": str, "split": str}
TABLE |= dict.fromkeys(BOX_COLUMNS, float)
DESCRIBED = {"config": dict, "data_fingerprint": str, "classes": list, "weights": str}


def run_key(config: Config, data_fingerprint: str) -> str:
    """A name for all that decides a run's result: ten hexadecimal digits."""
    text = json.dumps([_result_settings(config), data_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def changed_settings(old: Config, new: Config) -> list[str]:
    """Names of the settings that differ; files of one's own by their content, wherever they are."""
    there, here = _result_settings(old), _result_settings(new)
    return [name for name in here if there[name] != here[name]]


def _result_settings(config: Config) -> dict:
    values = extensions.key_values(asdict(config))
    return {name: value for name, value in values.items() if name not in NON_RESULT_SETTINGS}


def check_folder(run: Path) -> None:
    """Check that a training may write into a folder: it is missing, empty or a run's.

    Raises:
        InputError: no folder is named, or it holds a person's files.
    """
    if not run.parts:  # an unset variable of a shell, or "."
        raise InputError("the folder of the run has no name; give one, such as runs/first")
    with writing(run):
        names = set(os.listdir(run)) if os.path.lexists(run) else set()
    if "config.json" in names:
        read_metadata(run)
    elif others := sorted(name for name in names - STARTING if not LEFTOVER.fullmatch(name)):
        raise InputError(
            f"{run}: holds files ({shorten(others)}) but no run's config.json; "
            "choose a new or an empty folder"
        )


@contextmanager
def lock_run(run: Path, patience: float = 20.0) -> Iterator[None]:
    """Make a run's folder and hold it, so that one training at a time writes there.

    Raises:
        InputError: the folder is not a run's, cannot be written, or another training holds it.
    """
    check_folder(run)
    is_new = not run.exists()
    with lock_folder(run, patience):
        for entry in os.scandir(run):
            if LEFTOVER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry)
        try:
            yield
        finally:
            if is_new and set(os.listdir(run)) <= {".lock", extensions.SOURCES}:  # refused
                shutil.rmtree(run, ignore_errors=True)


@contextmanager
def lock_folder(folder: Path, patience: float = 20.0) -> Iterator[None]:
    """Make a folder and hold its ``.lock``; a killed process releases it at once.

    Processes that are forked meanwhile, such as a loader's, do not hold it.

    Args:
        folder: what to lock.
        patience: seconds to wait for another process.

    Raises:
        InputError: the folder cannot be written, or is held all the time.
    """
    lock, busy = FileLock(folder / ".lock"), f"{folder}: another process works there"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{busy}; waiting up to {patience:.0f} s")
            with suppress(Timeout):
                lock.acquire(timeout=patience)
            if not lock.is_locked:
                raise InputError(f"{busy}; wait for it, or stop it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    try:
        yield
    finally:
        lock.release()


def init_run(
    run: Path, config: Config, table: pd.DataFrame, origin: str, amp: str = "none"
) -> None:
    """Describe a new run in its folder, or check that it is of this configuration and data.

    Where the data moved, the run notes their new place.

    Args:
        run: the folder.
        config: what is trained.
        table: its data set.
        origin: one sentence about the weights before training.
        amp: what it computes in, where its configuration leaves that to the device.

    Raises:
        InputError: the folder holds another run, or cannot be written.
    """
    found, root = fingerprint(table), os.path.abspath(config.root)
    if is_new := not (run / "config.json").exists():
        metadata = {"config": extensions.store_sources(asdict(config), run)}
        metadata |= _describe(config, table, found, origin) | {"amp": amp}
    else:
        check_run(run, config)
        _, metadata = read_metadata(run)
        if found != metadata["data_fingerprint"]:
            raise InputError(f"{run}: its data differ: {_data_difference(run, table, root)}")
        metadata["config"]["root"] = config.root
    if is_new or metadata.get("root") != root or not (run / "table.csv").exists():
        write_text(run / "config.json", json.dumps(metadata | {"root": root}, indent=2))
        write_table(shorten_paths(table[list(TABLE)], root), run / "table.csv")


def _data_difference(run: Path, table: pd.DataFrame, root: str) -> str:
    """How the images of a run differ from those of a table, and what to do."""
    old, new = (set(shorten_paths(each, root)["path"]) for each in (read_run(run, root)[2], table))
    found = {f"{len(old - new):,} of {len(old):,} images are missing": old - new}
    found[f"{len(new - old):,} images are new"] = new - old
    texts = [f"{text}, first: {min(images)}" for text, images in found.items() if images]
    remedy = "bring them back as they were, or choose another folder"
    return f"{'; '.join(texts) or 'labels, splits or files of its images changed'}; {remedy}"


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
        "commit": git_commit(),
    }


def git_commit() -> str:
    """The commit of this code, ``-dirty`` where it was changed; ``unknown`` outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    options = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL, "text": True}
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, **options).strip()
    return "unknown"


def shorten_paths(table: pd.DataFrame, root: Path | str) -> pd.DataFrame:
    """A table whose paths are relative to a root; those that are not below it stay as they are."""
    given, absolute = (os.path.join(start, "") for start in (str(root), os.path.abspath(root)))
    return table.assign(path=table["path"].str.removeprefix(given).str.removeprefix(absolute))


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
    copies = extensions.locate_sources(extensions.store_sources(asdict(config), run), run)
    return config.replace(**{name: copies[name] for name in extensions.SETTINGS})


def check_run(run: Path, config: Config) -> None:
    """Check that a run was made with this configuration.

    Raises:
        InputError: it was not; the message names what differs.
    """
    old, _ = read_metadata(run)
    if changed := [_difference(name, old, config) for name in changed_settings(old, config)]:
        raise InputError(f"{run} holds another run ({shorten(changed)}); choose another folder")


def _difference(name: str, old: Config, new: Config) -> str:
    there, here = getattr(old, name), getattr(new, name)
    own = extensions.is_reference(there) and extensions.is_reference(here)
    if own and there.rpartition(":")[2] == here.rpartition(":")[2]:
        file = extensions.split_reference(here)[0].name
        return f"the source of {name!r} differs: {file} was changed since"
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
    config, metadata = read_metadata(Path(run))
    table = read_csv(Path(run) / "table.csv", TABLE, "restore it, or train again")
    stored = metadata.get("root", config.root)
    return config, metadata, locate_images(table[list(TABLE)], stored, root)


def read_csv(
    path: Path, kinds: dict[str, type], remedy: str, added: Mapping[str, object] = {}
) -> pd.DataFrame:
    """A table of a run, whatever version wrote it, with at least these columns.

    Args:
        path: the file.
        kinds: types of the columns.
        remedy: what to do where it cannot be read.
        added: values of columns that older versions did not write, or functions of the table.

    Raises:
        InputError: it is missing or damaged.
    """
    texts = {name: kind for name, kind in kinds.items() if kind is str}  # a class may be called NA
    missing = {name: [""] for name in (*BOX_COLUMNS, *added)}
    how = {"dtype": texts, "keep_default_na": False, "na_values": missing}
    with file_errors(path, remedy):
        table = current_columns(pd.read_csv(path, encoding_errors="surrogateescape", **how))
        lacking = {name: added[name] for name in added if name not in table}
        return table.assign(**lacking).astype(kinds)


def read_metadata(run: Path) -> tuple[Config, dict]:
    """Configuration and metadata of a run.

    Raises:
        InputError: not the folder of a run, or its config.json was edited.
    """
    with input_errors(f"{run}: not the folder of a run", "give one that training made"):
        metadata = json.loads((run / "config.json").read_text())
        wrong = [k for k, kind in DESCRIBED.items() if not isinstance(metadata.get(k), kind)]
        if wrong or not all(isinstance(name, str) for name in metadata["classes"]):
            raise ValueError(f"config.json lacks {shorten(wrong or ['names of classes'])}")
        values = current_names(extensions.locate_sources(metadata["config"], run))
        config = Config().replace(**values)
    key = run_key(config, metadata["data_fingerprint"])
    same_version = metadata.get("versions", {}).get("ramslib") == __version__
    if same_version and metadata.get("key", key) != key:  # other versions have other settings
        raise InputError(
            f"{run}: the settings in config.json were edited since the run was made; restore "
            "them, or train these settings in another folder"
        )
    return config, metadata


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
    with file_errors(path, "remove it"):
        lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            sound = isinstance(row["step"], int) and isinstance(row["split"], str)
        except (ValueError, TypeError, LookupError, RecursionError):
            sound = False
        if sound:
            rows.append({RENAMED["columns"].get(name, name): row[name] for name in row})
        elif number < len(lines):
            raise InputError(f"{path}:{number}: not a row of a run's log; remove this line")
    return rows


class MetricsLogger:
    """The log of a run that resumes at a step; rows after it are dropped and logged again.

    Rows go to ``metrics.jsonl`` and, as curves, to TensorBoard's files. Curves are optional: an
    error ends them, never the training.
    """

    def __init__(self, run: Path, step: int):
        self.path, folder = run / "metrics.jsonl", run / "tensorboard"
        rows = [row for row in _read_rows(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(folder, ignore_errors=True)  # all rows are written anew
        self.curves: Path | None = folder / f"events.out.tfevents.{time.time():.0f}"
        self._draw(rows)

    def write(self, rows: list[dict]) -> None:
        """Add rows.

        Raises:
            InputError: the disk is full or the folder is gone.
        """
        remedy = "the last checkpoint is intact, make room and run the same command again"
        with writing(self.path, remedy), open(self.path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._draw(rows)

    def _draw(self, rows: list[dict]) -> None:
        try:
            if self.curves:
                _append_curves(self.curves, rows)
        except Exception as error:
            warnings.warn(f"{self.curves}: no more curves ({one_line(error)})", stacklevel=3)
            self.curves = None


def _append_curves(path: Path, rows: list[dict]) -> None:
    """Add the numbers of rows to a file of TensorBoard, each under its split, output and name.

    Torch's own writer has a thread, whose errors nobody can catch.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    path.parent.mkdir(exist_ok=True)
    events = [] if path.exists() else [Event(file_version="brain.Event:2")]
    for row in rows:
        place = "/".join(filter(None, (row["split"], row.get("output"))))
        numbers = [(name, value) for name, value in row.items() if isinstance(value, float)]
        values = [Summary.Value(tag=f"{place}/{k}", simple_value=v) for k, v in numbers]
        now = time.time()
        events.append(Event(wall_time=now, step=row["step"], summary=Summary(value=values)))
    with open(path, "ab") as file:
        for event in events:
            RecordWriter(file).write(event.SerializeToString())
