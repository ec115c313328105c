"""What all modules need, without torch: errors in one line, whole files, a request to stop."""

import difflib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:  # commands that only report an error need not wait for pandas
    import pandas as pd

Kinds = type[Exception] | tuple[type[Exception], ...]
MAX_LENGTH = 300  # characters of another library's message


class InputError(ValueError):
    """Bad input from a person or a file.

    The message is one line that says what is wrong, where, and what to do. The command line prints
    it and exits with code 2; notebooks show it as the last line of the traceback.
    """


def one_line(error: BaseException) -> str:
    """Any exception as one line.

    Messages of `InputError` and of the operating system speak for themselves; others are shortened
    to ``MAX_LENGTH`` characters and start with the name of their type.
    """
    text = " ".join(str(error).split())
    if isinstance(error, InputError | OSError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text[:MAX_LENGTH]}" if text else type(error).__name__


def plain_warnings() -> None:
    """Show a warning once, as one line that does not name the code."""
    shown: set[str] = set()

    def line(message: Warning | str, *_: object) -> str:
        new = {f"warning: {message}\n"} - shown
        shown.update(new)
        return "".join(new)

    warnings.formatwarning = line  # Python's own filter forgets what it showed at each change


def shorten(names: Sequence[object], count: int = 3) -> str:
    """The first names of a list and the number of the others: ``a, b, c and 5 more``."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(str, names[:count])) + more


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Ask for the nearest of the known names; where none is near, say something else."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary_path)``, flush it to the disk and move it to ``path`` in one step.

    A file that is replaced is found whole, old or new, whatever stops the writer. Everyone who may
    enter the folder may read the file.

    Raises:
        InputError: ``path`` is a symbolic link, the folder cannot be written or the disk is full; a
            file at ``path`` is intact.
    """
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link, which would be replaced; remove it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    remedy = "a file that was there is intact, make room or choose another folder, and try again"
    try:
        with writing(path, remedy):
            write(temporary)
            os.chmod(temporary, path.parent.stat().st_mode & 0o666)  # some are for the owner only
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, atomically; file names of any encoding are kept."""
    content = text.encode("utf-8", "surrogateescape")
    write_atomically(path, lambda part: part.write_bytes(content))


@contextmanager
def input_errors(
    what: str, remedy: str, kinds: Kinds = Exception, passed: Kinds = MemoryError
) -> Iterator[None]:
    """Turn errors into one line: what went wrong, why, and the remedy.

    Args:
        what: went wrong, and where.
        remedy: what to do.
        kinds: of errors.
        passed: kinds that are raised as they are.
    """
    try:
        yield
    except passed:
        raise
    except kinds as error:
        why = getattr(error, "strerror", None) or one_line(error)  # of the system, without the path
        raise InputError(f"{what} ({why}); {remedy}") from None


def writing(path: Path, remedy: str = "choose another folder") -> AbstractContextManager:
    """Name what cannot be written, where the system refuses it."""
    return input_errors(f"{path}: cannot be written", remedy, (OSError, SafetensorError))


def file_errors(
    path: Path | str, remedy: str = "download this file again"
) -> AbstractContextManager:
    """Name a file that cannot be read; readers of foreign files fail in any way they like."""
    return input_errors(f"{path}: cannot be read", remedy, passed=(InputError, MemoryError))


def write_table(table: "pd.DataFrame", path: Path, separator: str = ",") -> None:
    """Write a table as CSV, atomically; file names of any encoding are kept."""
    how = {"sep": separator, "index": False, "errors": "surrogateescape"}
    write_atomically(path, lambda part: table.to_csv(part, **how))


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, so that work stops where it can be resumed."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def count_cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1
