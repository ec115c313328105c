"""The road from a folder of photos to a table: every numbered notebook, executed and kept.

``run_notebooks`` executes ``notebooks/[0-9][0-9]_*.ipynb`` in order by papermill and writes into one
folder: the executed notebooks, pages that open without kernel or network, one table of results.
It is strict where papermill is not: an unknown parameter, a cell that did not complete, an error
inside a widget and a cell that never ends stop it, with one line. A notebook is not executed again
while its cells, its parameters, ramslib and the data set's files (by name and time) stay the same.
"""

import ast
import hashlib
import io
import json
import shutil
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from ramslib.errors import InputError, write_atomically

PACKAGE = Path(__file__).resolve().parents[1]
CELL_TIMEOUT = 14 * 24 * 3600  # seconds a cell may take: training on a cluster takes days

# JupyterLab's page without what it loads from the network: require.js, widgets, MathJax, Mermaid.
PAGE = """{% extends "lab/index.html.j2" %}
{% block html_head_js %}{% endblock %}{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}{% block html_head_js_mermaidjs %}{% endblock %}
{% block data_widget_view %}<em>Live widget: open the notebook in JupyterLab.</em>{% endblock %}
{% block footer %}</html>{% endblock %}"""


class OwnInterpreter(AsyncKernelManager):
    """Starts kernels with this process's own interpreter, whatever kernelspecs are installed.

    They end without looking through torch for garbage, which takes two seconds.
    """

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        """The command that starts a kernel."""
        line = "import atexit, gc; atexit.register(gc.freeze)"
        return super().format_kernel_cmd(
            [*(extra_arguments or []), f"--IPKernelApp.exec_lines={line}"]
        )

    def _transport_encryption_default(self) -> str:
        return "auto"  # without it every kernel warns on the terminal


class StatusLine(io.TextIOBase):
    """To papermill a text file; to a person one line: time taken and what was printed last."""

    def __init__(self, label: str):
        self.label, self.live = label, sys.stdout.isatty()
        self.start, self.next = time.monotonic(), 0.0

    def write(self, text: str) -> None:
        """Show the last line of ``text``: at once on a terminal, every 10 s elsewhere."""
        if text.strip() and (self.live or time.monotonic() >= self.next):
            self.next = time.monotonic() + 10
            self.show(text.strip().splitlines()[-1], end="" if self.live else "\n")

    def show(self, text: str, end: str = "\n") -> None:
        """Replace this notebook's line on a terminal, else add one."""
        seconds = int(time.monotonic() - self.start)
        line = f"{self.label}  {seconds // 60}:{seconds % 60:02d}  {text}"
        if self.live:
            line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
        print(line, end=end, flush=True)


def run_notebooks(
    data: str,
    root: str | Path,
    out: str | Path,
    preset: str = "small",
    parameters: dict | None = None,
    notebooks: Path = PACKAGE.parent / "notebooks",
) -> Path:
    """Execute all numbered notebooks, collect their tables, print them and where to look.

    Args:
        data: which reader: ``diagnostic``, ``cub``, ``folder``, ...
        root: folder of the data set.
        out: folder for all that is made; it keeps to one data, root, preset and parameters.
        preset: settings to start from, a key of ``config.PRESETS``; ``small`` takes minutes on two
            cores, ``paper`` is the size of the paper.
        parameters: further notebook parameters; each goes to the notebooks that declare it; text
            is read as the type that is declared.
        notebooks: folder of the notebooks; each writes ``results/<its name>.csv`` below ``out``.

    Returns:
        Path of ``results.csv``: the rows of all tables, with a column ``notebook``.

    Raises:
        InputError: unknown parameter, ``out`` answers another question, or a notebook failed; then
            the message is the notebook's own InputError or names its executed copy.
    """
    root, out = Path(root).absolute(), Path(out).absolute()
    paths = sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise InputError(f"{notebooks}: no numbered notebooks here; run from a clone")
    common = {"data": data, "root": str(root), "out": str(out), "preset": preset}
    chosen = choose_parameters(paths, common, parameters or {})
    question = {k: v for path in paths for k, v in chosen[path].items() if k != "out"}
    check_folder(out, question)
    for number, path in enumerate(paths, start=1):
        status = StatusLine(f"[{number}/{len(paths)}] {path.stem}")
        if is_finished(path, chosen[path]):
            status.show("reused, nothing changed")
            continue
        status.write("started")
        execute(path, chosen[path], status)
        _write_text(out / "notebooks.json", json.dumps(question, indent=1))
        status.show("done")
    return report(out, [path.stem for path in paths])


def choose_parameters(paths: list[Path], common: dict, extra: dict) -> dict[Path, dict]:
    """Parameters of each notebook; one that no notebook declares is an InputError."""
    declared = {path: papermill.inspect_notebook(nbformat.read(path, 4)) for path in paths}
    for path, known in declared.items():
        if missing := ", ".join(sorted(set(common) - set(known))):
            raise InputError(f"{path}: its parameters cell lacks {missing}; add it there")
    known = set().union(*declared.values())
    if unknown := ", ".join(sorted(set(extra) - known)):
        raise InputError(f"unknown parameter {unknown}; there are {', '.join(sorted(known))}")
    chosen = {path: dict(common) for path in paths}
    for path, known in declared.items():
        for name in [name for name in extra if name in known]:
            chosen[path][name] = read_value(name, extra[name], known[name]["default"])
    return chosen


def read_value(name: str, value: object, default: str) -> object:
    """A parameter's value; text becomes a Python literal unless the declared default is text."""
    if not isinstance(value, str) or isinstance(ast.literal_eval(default), str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise InputError(f"{name}={value}: give a value like {default}") from None


def check_folder(out: Path, question: dict) -> None:
    """Raise InputError if ``out`` cannot be made or holds another question's answer."""
    try:
        (out / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot make it ({error.strerror}); choose another") from error
    record = out / "notebooks.json"
    old = json.loads(record.read_text("utf-8")) if record.exists() else question
    for key in old | question:
        if json.dumps(old.get(key)) != json.dumps(question.get(key)):
            difference = f"{key}={old.get(key)}, not {question.get(key)}"
            raise InputError(f"{out}: holds results of {difference}; choose another folder")


def fingerprint(path: Path, parameters: dict) -> dict[str, str]:
    """Hashes of what the outputs of a notebook depend on: code (with parameters) and data set."""
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(path, 4).cells]
    code = [file.read_text("utf-8") for file in sorted(PACKAGE.rglob("*.py"))]
    data = sorted((str(f), f.lstat().st_mtime_ns) for f in Path(parameters["root"]).rglob("*"))
    return {"code": _hash([cells, parameters, code]), "data": _hash(data)}


def is_finished(path: Path, parameters: dict) -> bool:
    """Whether the executed copy answers these inputs and what was written with it still exists."""
    out = Path(parameters["out"])
    copy, page, table = out / path.name, out / f"{path.stem}.html", out / f"results/{path.stem}.csv"
    if not (copy.exists() and page.exists() and table.exists()):
        return False
    try:
        metadata = json.loads(copy.read_text("utf-8"))["metadata"]
    except ValueError:  # killed while papermill wrote it
        return False
    return metadata.get("fingerprint") == fingerprint(path, parameters)


def execute(path: Path, parameters: dict, status: StatusLine) -> None:
    """Execute one notebook, check it, and write its executed copy and its page."""
    copy = Path(parameters["out"]) / path.name
    before = fingerprint(path, parameters)
    try:
        notebook = papermill.execute_notebook(
            nbformat.read(path, 4),
            str(copy).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
            parameters=parameters,
            kernel_name="python3",
            kernel_manager_class=OwnInterpreter,
            execution_timeout=CELL_TIMEOUT,
            progress_bar=False,
            stdout_file=status,
            stderr_file=status,  # progress probability_bars
            cwd=path.parent,
        )
        check_executed(notebook, copy.parent / f"results/{path.stem}.csv")
    except Exception as error:
        status.show("failed")
        if getattr(error, "ename", "") == InputError.__name__:
            raise InputError(error.evalue) from error
        cause = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
        first_line = cause.strip(": \n").partition("\n")[0]
        raise InputError(f"{path.stem}: {first_line}; see the executed copy {copy}") from error
    after = fingerprint(path, parameters)  # a notebook may make the data set
    notebook.metadata["fingerprint"] = before | {"data": after["data"]}
    exporter = HTMLExporter(raw_template=PAGE, embed_images=True)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    _write_text(copy.with_suffix(".html"), page)
    _write_text(copy, nbformat.writes(notebook))


def check_executed(notebook: NotebookNode, table: Path) -> None:
    """Raise RuntimeError for an unfinished cell, an error that a widget holds, or no table."""
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and cell.metadata.papermill.status != "completed":
            raise RuntimeError(f"cell {number} did not complete: {cell.metadata.papermill.status}")
    for widgets in notebook.metadata.get("widgets", {}).values():
        for model in widgets["state"].values():
            for output in model["state"].get("outputs", []):
                if output["output_type"] == "error":
                    raise RuntimeError(f"in a widget, {output['ename']}: {output['evalue']}")
    if not table.exists():
        raise RuntimeError(f"it wrote no {table}")


def report(out: Path, names: list[str]) -> Path:
    """Write ``results.csv``, print the tables and where to look."""
    tables = {name: pd.read_csv(out / f"results/{name}.csv") for name in names}
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(index=False, max_rows=30)}")
    merged = pd.concat(tables, names=["notebook"]).reset_index("notebook")
    _write_text(out / "results.csv", merged.to_csv(index=False))
    print(f"\nresults in one table: {out / 'results.csv'}")
    print(f"pages with all figures: {out / names[0]}.html and its neighbors")
    return out / "results.csv"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
