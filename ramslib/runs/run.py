"""The folder of a run: what was asked for, what happened, and the model that came out.

runs/<name>/config.json           configuration, versions, git commit, data fingerprint, classes
runs/<name>/table.csv             every image with its label, split and box
runs/<name>/metrics.jsonl         one row per step, and per epoch and scale
runs/<name>/last.safetensors      state to resume from
runs/<name>/best.safetensors      state of the best epoch by validation
runs/<name>/predictions_*.csv     one row per test image and scale, of the last and the best
runs/<name>/README.md             the model card
runs/<name>/results.csv           accuracies with their standard errors; there when finished
"""

import fcntl
import hashlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from ramslib import __version__
from ramslib.classifier import ImageClassifier
from ramslib.config import Config
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.datasets import fingerprint
from ramslib.errors import InputError, write_atomically, write_table
from ramslib.model import build_model
from ramslib.runs.checkpoint import load_module, read_checkpoint

# settings that say where things are or how fast they go, not what comes out
NON_RESULT_SETTINGS = ("root", "workers", "grad_checkpointing")


def run_key(config: Config, data_fingerprint: str) -> str:
    """A name for all that decides a run's result: ten hexadecimal digits."""
    values = {k: v for k, v in asdict(config).items() if k not in NON_RESULT_SETTINGS}
    text = json.dumps([values, data_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@contextmanager
def lock_run(run: Path, patience: float = 20.0) -> Iterator[None]:
    """Make a run's folder and hold it: one training at a time writes there.

    A killed training lets go at once, its orphans within a second.

    Raises:
        InputError: the folder cannot be written, or another training holds it all the time.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error}); choose another folder") from None
    with lock:
        deadline = time.monotonic() + patience
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise InputError(f"{run}: another training works there; wait for it, or stop it")
            time.sleep(0.1)
        for leftover in (*run.glob(".*.part"), *run.glob(".tmp*")):  # of a kill while writing
            leftover.unlink()
        yield


def _locked(lock) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked loader processes do not hold it
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def open_run(run: Path, config: Config, table: pd.DataFrame, weights: str) -> None:
    """Describe a new run in its folder, or check that it is of this configuration and data.

    Raises:
        InputError: the folder holds another run, or cannot be written.
    """
    found = fingerprint(table)
    if (run / "config.json").exists():
        check_run(run, config, found)
        return
    packages = ("torch", "torchvision", "timm", "numpy", "pandas", "pillow")
    description = {
        "config": asdict(config),
        "data_fingerprint": found,
        "classes": class_names(table),
        "weights": weights,
        "versions": {"ramslib": __version__} | {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "commit": _git_commit(),
    }
    write_table(table, run / "table.csv")
    text = json.dumps(description, indent=2)
    write_atomically(run / "config.json", lambda part: part.write_text(text))


def class_names(table: pd.DataFrame) -> list[str]:
    """Class names in the order of their labels."""
    return table.drop_duplicates("label").sort_values("label")["class_name"].tolist()


def check_run(run: Path, config: Config, data_fingerprint: str | None = None) -> None:
    """Check that a run was made with this configuration (and, where given, with these data).

    Raises:
        InputError: it was not; the message names what differs.
    """
    old, description, _ = read_run(run)
    changed = [
        f"{name} {getattr(old, name)!r} there, {getattr(config, name)!r} here"
        for name in Config.names()
        if name not in NON_RESULT_SETTINGS and getattr(old, name) != getattr(config, name)
    ]
    if data_fingerprint not in (None, description["data_fingerprint"]):
        changed.append("its data differ from those given")
    if changed:
        raise InputError(
            f"{run} holds another run ({'; '.join(changed[:3])}); choose another folder"
        )


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def read_run(run: Path | str) -> tuple[Config, dict, pd.DataFrame]:
    """Configuration, description (versions, fingerprint, classes) and table of a run.

    Raises:
        InputError: not the folder of a run, or a file in it was edited out of shape.
    """
    run = Path(run)
    try:
        description = json.loads((run / "config.json").read_text())
        config = Config().replace(**description["config"])
        if not {"data_fingerprint", "classes", "weights"} <= set(description):
            raise ValueError("config.json lacks data_fingerprint, classes or weights")
        table = _read_table(run / "table.csv")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{run}: not the folder of a run ({error})") from None
    return config, description, table


def _read_table(path: Path) -> pd.DataFrame:
    """A data set's table as written by `open_run`; a class may be called NA."""
    table = pd.read_csv(
        path,
        dtype={"path": str, "class_name": str, "split": str, "label": int},
        keep_default_na=False,
        na_values={side: [""] for side in BOX_COLUMNS},
        encoding_errors="surrogateescape",
    )
    return table[["path", "label", "class_name", "split", *BOX_COLUMNS]]


def is_finished(run: Path | str) -> bool:
    """Whether a run has its results."""
    return (Path(run) / "results.csv").exists()


def read_metrics(run: Path | str) -> pd.DataFrame:
    """All rows that a run has logged so far; a row cut short by a kill is left out."""
    return pd.DataFrame(_whole_rows(Path(run) / "metrics.jsonl"))


class MetricsLogger:
    """The log of a run that goes on at a step; rows after it are forgotten and logged again.

    Rows go to ``metrics.jsonl`` and, where TensorBoard is installed, to its files.
    """

    def __init__(self, run: Path, step: int):
        self.path = run / "metrics.jsonl"
        rows = [row for row in _whole_rows(self.path) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.path, lambda part: part.write_text(text))
        self.events = _new_events(run / "tensorboard")
        self._show(rows)

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
                f"{self.path}: cannot be written ({error}); the last checkpoint is intact, "
                "make room and run the same command again"
            ) from None
        self._show(rows)

    def close(self) -> None:
        """Let go of TensorBoard's files."""
        if self.events:
            self.events.close()

    def _show(self, rows: list[dict]) -> None:
        for row in rows if self.events else []:
            place = "/".join(filter(None, (row["split"], row.get("output"))))
            for name, value in row.items():
                if isinstance(value, float):
                    self.events.add_scalar(f"{place}/{name}", value, row["step"])
        if rows and self.events:
            self.events.flush()


def _new_events(folder: Path):
    """A TensorBoard writer on an empty folder: the journal writes it anew from its rows."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder))


def _whole_rows(path: Path) -> list[dict]:
    """Rows up to the first that a kill cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def load(run: Path | str, checkpoint: str = "best") -> ImageClassifier:
    """The trained model of a run, in evaluation mode.

    Args:
        run: a run's folder.
        checkpoint: ``best`` (by validation) or ``last``.

    Raises:
        InputError: no such run, or no clean_class_name checkpoint in it.
    """
    config, description, _ = read_run(run)
    checkpoint = read_checkpoint(Path(run) / f"{checkpoint}.safetensors")
    model = build_model(config.replace(pretrained="none"), len(description["classes"]))
    load_module(model, checkpoint, "ema" if config.ema_decay else "model")
    return model.eval()
