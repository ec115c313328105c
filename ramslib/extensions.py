"""Ideas of your own: wherever a setting takes a registered name, it takes ``path/to/file.py:name``.

A proposal, strength, loss, data reader or model is a plain function or class in a Python file. Its
file is copied into the run that uses it and is part of the run's key, so that a changed idea is a
new run, and prediction, export and explorer use the code that was trained.

Code that came with somebody else's run is never executed by reading that run: a stored copy is
imported only if it was stored on this machine by you, or after `trust`.
"""

import hashlib
import importlib.util
import inspect
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ramslib.errors import InputError, file_errors, nearest, one_line

ARGUMENTS = {  # what the function of each setting that takes a reference is called with
    "data": ("root",),
    "model": ("config", "num_classes"),
    "strength": ("recorded",),
    "proposal": ("strength", "threshold", "recorded"),
    "loss": ("outputs", "labels"),
}
SETTINGS = tuple(ARGUMENTS)
PREFIX = "ramslib_source_"  # of the names of modules that were imported by their path
SOURCES = "sources"  # the folder of a run that holds the copies
TRUSTED = Path("~/.config/ramslib/trusted_sources").expanduser()  # SHA-256 of code, one per line


def per_scale(loss: Callable) -> Callable:
    """Mark a loss that can be taken scale by scale; used as a decorator.

    It is called after every scale with the outputs so far, of which only the last one carries a
    graph, and its value is back-propagated before the next scale runs: the memory of one scale.
    """
    loss.per_scale = True
    return loss


def reads(blocks: int | None = None, tokens: bool = False) -> Callable:
    """Say how little a strength or proposal reads, so that no more is recorded; a decorator.

    Args:
        blocks: the number of last blocks whose attention it reads; None reads all of them.
        tokens: whether it reads the patch tokens.

    A function without this decorator is given all blocks and the tokens.
    """

    def mark(function: Callable) -> Callable:
        function.reads_blocks, function.reads_tokens = blocks, tokens
        return function

    return mark


def is_reference(name: object) -> bool:
    """Whether a setting's value has the form ``path/to/file.py:name``."""
    return isinstance(name, str) and ".py:" in name


def split_reference(reference: str) -> tuple[Path, str]:
    """The absolute path of the file, and the name in it."""
    path, _, name = reference.rpartition(":")
    return Path(path).expanduser().absolute(), name


def resolve(name: str | Callable, registry: Mapping[str, Any], kind: str) -> Any:
    """What a name stands for.

    Args:
        name: a key of the registry or a reference, ``path/to/file.py:name``; a function stands for
            itself.
        registry: the built-in choices.
        kind: the name of the setting, for messages.

    Raises:
        InputError: an unknown name, a file that does not import or lacks the name, or a function
            that takes other arguments.
    """
    if callable(name):
        return name
    if name in registry:
        return registry[name]
    if not is_reference(name):
        raise InputError(
            f"unknown {kind} {name!r}; choose one of {', '.join(registry)}, or give your own as "
            "path/to/file.py:name"
        )
    path, attribute = split_reference(name)
    module = load_source(path)
    if not callable(found := getattr(module, attribute, None)):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        hint = nearest(attribute, known, "define it there")
        raise InputError(f"{kind} {name!r}: {path.name} has no function {attribute!r}; {hint}")
    try:
        inspect.signature(found).bind(*ARGUMENTS[kind])
    except (TypeError, ValueError) as error:
        takes = ", ".join(ARGUMENTS[kind])
        raise InputError(f"{kind} {name!r}: {error}; define {attribute}({takes})") from None
    return found


def load_source(path: Path) -> ModuleType:
    """Import a Python file by its path; a file that did not change is imported once.

    Raises:
        InputError: no such file, an error while it is imported, or a run's stored copy that is not
            trusted, see `trust`.
    """
    code = digest(path)
    if _is_stored(path) and code not in _trusted():
        raise InputError(
            f"{path}: this run brings code of its own, written elsewhere; read that file, then "
            f"allow it with: ramslib trust {path.parents[1]}"
        )
    name = f"{PREFIX}{code[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a person's code may raise
        del sys.modules[name]
        raise InputError(f"{_cause(error, path)}; correct it") from error
    return module


def loaded_files() -> set[str]:
    """Files that `load_source` imported."""
    return {module.__file__ for name, module in sys.modules.items() if name.startswith(PREFIX)}


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with file_errors(path, "check the path"):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _cause(error: Exception, path: Path) -> str:
    """Where in a person's file an error comes from, and what it is."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [1])[-1]
    return f"{path}:{line}: {one_line(error)}"


def key_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the file of each reference replaced by its digest: equal wherever it lies."""
    result = dict(values)
    for setting, (path, name) in _references(values).items():
        result[setting] = f"{digest(path)}:{name}"
    return result


def store_sources(values: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Copy the files that settings refer to into a run's folder.

    Returns:
        The settings, with references to the copies, relative to the run; see `locate_sources`.
    """
    result = dict(values)
    for setting, (path, name) in _references(values).items():
        code = digest(path)
        copy = Path(SOURCES, f"{code[:8]}-{path.name.removeprefix(f'{code[:8]}-')}")
        (run / SOURCES).mkdir(parents=True, exist_ok=True)
        if not (run / copy).exists():
            shutil.copyfile(path, run / copy)
        _remember(code)
        result[setting] = f"{copy}:{name}"
    return result


def locate_sources(values: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Settings as `store_sources` gave them, with references to the copies where they are now."""
    stored = {s: v for s, v in values.items() if s in SETTINGS and is_reference(v)}
    return {**values, **{s: f"{run.absolute() / v}" for s, v in stored.items()}}


def trust(run: Path | str) -> list[Path]:
    """Allow the code that a run brings to be executed on this machine; returns its files."""
    files = sorted((Path(run) / SOURCES).glob("*.py"))
    for file in files:
        _remember(digest(file))
    return files


def _references(values: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    found = {name: values[name] for name in SETTINGS if is_reference(values.get(name))}
    return {name: split_reference(reference) for name, reference in found.items()}


def _is_stored(path: Path) -> bool:
    return path.parent.name == SOURCES and (path.parents[1] / "config.json").exists()


def _trusted() -> set[str]:
    return set(TRUSTED.read_text().split()) if TRUSTED.exists() else set()


def _remember(code: str) -> None:
    if code not in _trusted():
        TRUSTED.parent.mkdir(parents=True, exist_ok=True)
        with open(TRUSTED, "a") as file:
            file.write(f"{code}\n")
