"""The explorer as a page without code: ``python -m ramslib.explorer.app`` serves it by Voila."""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook


def write_page(folder: Path, data: str, root: Path | str, out: Path | str) -> Path:
    """A notebook with nothing but the explorer."""
    places = json.dumps([data, str(Path(root).absolute()), str(Path(out).absolute())])
    code = f"from ramslib.explorer import Explorer\nExplorer(*{places})"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    page = folder / "RAMS-Trans explorer.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata={"kernelspec": kernel}), page)
    return page


def main(arguments: list[str] | None = None) -> int:
    """Serve until it is interrupted or terminated; returns the server's exit code."""
    parser = argparse.ArgumentParser(prog="python -m ramslib.explorer.app", description=__doc__)
    parser.add_argument("--data", default="diagnostic", help="a reader's name")
    parser.add_argument("--root", default="data/diagnostic", help="folder of the data set")
    parser.add_argument("--out", default="runs", help="folder below which runs are found")
    parser.add_argument("voila", nargs="*", help="after --: Voila's own options")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ramslib-") as folder:
        page = write_page(Path(folder), options.data, options.root, options.out)
        with subprocess.Popen([sys.executable, "-m", "voila", page, *options.voila]) as server:
            for number in (signal.SIGTERM, signal.SIGINT):  # it must not outlive this process
                signal.signal(number, lambda *_: server.terminate())
            return server.wait()


if __name__ == "__main__":
    sys.exit(main())
