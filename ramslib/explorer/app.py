"""The explorer as a page without code: ``python -m ramslib app`` serves it by Voila."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from ramslib.runs.folder import read_run


def write_page(
    folder: Path, data: str, root: Path | str, out: Path | str, run: Path | str | None = None
) -> Path:
    """A notebook with nothing but the explorer."""
    places = [data, *(str(Path(path).absolute()) for path in (root, out, run) if path)]
    code = f"from ramslib.explorer import Explorer\nExplorer(*{json.dumps(places)})"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    page = folder / "RAMS-Trans explorer.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata={"kernelspec": kernel}), page)
    return page


def serve(
    data: str,
    root: Path | str,
    out: Path | str,
    run: Path | str | None = None,
    voila: Sequence[str] = (),
) -> int:
    """Serve the page until it is interrupted or terminated; returns the server's exit code.

    Args:
        data: a reader's name.
        root: folder of the data set.
        out: folder below which runs are found.
        run: the model to look through first.
        voila: Voila's own options.

    Raises:
        InputError: ``run`` is not the folder of a run.
    """
    if run:
        read_run(run)
    with tempfile.TemporaryDirectory(prefix="ramslib-") as folder:
        page = write_page(Path(folder), data, root, out, run)
        with subprocess.Popen([sys.executable, "-m", "voila", page, *voila]) as server:
            for number in (signal.SIGTERM, signal.SIGINT):  # it must not outlive this process
                signal.signal(number, lambda *_: server.terminate())
            return server.wait()
