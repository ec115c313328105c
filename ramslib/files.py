"""Files that a reader finds whole or not at all, whatever stops the writer."""

import os
from contextlib import suppress
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError

from ramslib.errors import InputError


def write_atomically(path: Path, write) -> None:
    """Call ``write(temporary_path)``, flush it to the disk and move it to ``path`` in one step.

    Whoever may enter the folder may read the file.

    Raises:
        InputError: the folder cannot be written or the disk is full; what stood at ``path`` stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.chmod(temporary, path.parent.stat().st_mode & 0o666)  # safetensors' are for the owner
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"{path}: cannot be written ({error}); what was there is intact, "
            "make room or choose another folder and run the same command again"
        ) from None


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, atomically; file names of any encoding are kept."""
    write_atomically(path, lambda part: table.to_csv(part, index=False, errors="surrogateescape"))
