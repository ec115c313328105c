"""The notebooks, executed: all numbered ones in order into one folder, and the report of a run.

`run_notebooks` executes ``notebooks/[0-9][0-9]_*.ipynb`` by papermill and writes executed copies,
pages that open without kernel or network, one table of results and an index. It is strict where
papermill is not: an unknown parameter, a cell that did not complete, an error inside a widget and a
cell that never ends stop it, with one line. A notebook is not executed again while its cells, its
parameters, ramslib and the dataset's files (by name and time) stay the same.

`read_parameters` is the other side: a notebook's parameters, whoever set them.
"""

import ast
import base64
import hashlib
import html
import io
import json
import logging
import mimetypes
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import jinja2
import pandas as pd
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from ramslib.config import Config
from ramslib.errors import InputError, file_errors, nearest, plain_warnings, write_text, writing
from ramslib.experiments.comparison import describe, headlines
from ramslib.extensions import key_values
from ramslib.runs.folder import read_run
from ramslib.runs.results import method_name, read_predictions, read_results
from ramslib.training import forks

if TYPE_CHECKING:
    from nbformat import NotebookNode

PACKAGE = Path(__file__).resolve().parents[1]
CLONE = PACKAGE.parent
NOTEBOOKS = CLONE / "notebooks"
CELL_TIMEOUT = 14 * 24 * 3600  # seconds a cell may take: training on a cluster takes days
# Of the inputs of all scales: 1,000 photos of the default sizes, some minutes on two cores; of the
# synthetic dataset, which tells a person nothing about photos, a tenth
PROBED_PIXELS = 25_000_000
RECORD, OLD_RECORD = "notebooks.json", "road.json"  # the question that a folder answers
KINDS = (bool, int, (int, float), str, (list, tuple, dict), object)  # a value keeps its default's
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^):\s]+)\)")  # in Markdown, to a file
EQUATION = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)


class OwnInterpreter(AsyncKernelManager):
    """Starts kernels with this process's own interpreter, whatever kernelspecs are installed.

    They end without searching torch for garbage, which takes two seconds.
    """

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        """The command that starts a kernel."""
        own = ["--IPKernelApp.exec_lines=import atexit, gc; atexit.register(gc.freeze)"]
        own += ["--IPKernelApp.log_level=50"]  # else Ctrl-C prints what its sockets say of it
        return forks.stand_in(super().format_kernel_cmd([*(extra_arguments or []), *own]))

    def _transport_encryption_default(self) -> str:
        return "auto"  # without it every kernel warns on the terminal


def read_parameters(notebook: str, given: Mapping[str, object]) -> SimpleNamespace:
    """A notebook's parameters, whether a person, papermill or ``ramslib notebooks`` set them.

    The second cell of a notebook calls it::

        given = read_parameters("03_ablation_scales", globals())

    Text, as papermill's ``-p scales "[1, 2]"`` gives it, is read as the type that the cell of
    parameters declares. Relative paths start at the clone, whatever the working directory.

    Args:
        notebook: name of the file, without its ending.
        given: the parameters by name; other names are ignored.

    Returns:
        All declared parameters (``root``, ``out`` and ``run`` as absolute paths) and, where
        ``preset`` and ``out`` are declared, ``config``: the `Config` of ``preset``, ``data``,
        ``root`` and ``settings``; ``runs``: the folder of all runs; ``table``: the CSV file that
        the notebook writes, in a folder that exists.

    Raises:
        InputError: a value of another type, an unknown preset or setting, or an empty path.
    """
    plain_warnings()
    declared = declared_parameters(NOTEBOOKS / f"{notebook}.ipynb")
    values = {name: read_value(name, given.get(name, d), d) for name, d in declared.items()}
    for name in {"root", "out", "run"} & {name for name, value in values.items() if value}:
        values[name] = CLONE / Path(values[name]).expanduser()
    if "preset" in values:
        values["config"] = choose_config(values, CLONE)
        values["runs"] = runs_folder(values["out"])
        values["table"] = values["out"] / "results" / f"{notebook}.csv"
        values["table"].parent.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(**values)


def declared_parameters(path: Path) -> dict[str, object]:
    """Names and default values in a notebook's cell tagged ``parameters``."""
    cells = json.loads(_check_notebook(path).read_text("utf-8"))["cells"]
    chosen = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    nodes = [node for cell in chosen for node in ast.parse("".join(cell["source"])).body]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}


def read_notebook(path: Path) -> "NotebookNode":
    """A notebook's file."""
    import nbformat  # takes a second, which no kernel need wait for

    return nbformat.read(_check_notebook(path), 4)


def _check_notebook(path: Path) -> Path:
    """The path; the numbered notebooks and the report's are in a clone only."""
    if not path.is_file():
        raise InputError(f"{path}: no such notebook; run from a clone of the project")
    return path


def read_value(name: str, value: object, default: object) -> object:
    """A parameter's value as the kind of its default; text is read as a Python literal.

    Raises:
        InputError: it is of another kind.
    """
    if not isinstance(default, str):
        value = _read_literal(value)
    kind = next(kind for kind in KINDS if isinstance(default, kind))
    if isinstance(value, list) and isinstance(default, list):
        if not any(isinstance(item, str) for item in default):
            value = [_read_literal(item) for item in value]  # to YAML, 1e0 is text
    number_for_bool = isinstance(value, bool) != isinstance(default, bool)
    if not isinstance(value, kind) or number_for_bool or value == "" or value == [] != default:
        raise InputError(f"{name}={value!r}: give a value like {default!r}")
    return value


def _read_literal(value: object) -> object:
    """What text stands for in Python, if anything; other values as they are."""
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        return ast.literal_eval(value) if isinstance(value, str) else value
    return value


def choose_config(values: Mapping[str, object], folder: Path) -> Config:
    """The configuration of a notebook's parameters.

    Args:
        values: ``data``, ``root``, ``preset`` and, if any, ``settings``.
        folder: where relative paths in settings start.
    """
    changes = {"data": values["data"], "root": str(values["root"])} | values.get("settings", {})
    return Config.preset(values["preset"], **_locate(changes, folder))


def _locate(settings: Mapping[str, object], folder: Path) -> dict[str, object]:
    """Settings by absolute paths: ``lists``, a file, or something in a file (``ideas.py:mine``)."""
    located = dict(settings)
    for name, value in settings.items():
        path = str(folder / Path(value).expanduser()) if value and isinstance(value, str) else ""
        files = path, path.rpartition(":")[0]
        if path and (name == "lists" or any(map(os.path.isfile, files))):
            located[name] = path
    return located


def runs_folder(out: Path) -> Path:
    """The folder of all runs below ``out``: ``runs``, or ``cells`` where version 0.1 wrote them."""
    old = out / "cells"
    return old if old.is_dir() and not (out / "runs").is_dir() else out / "runs"


def run_notebooks(
    data: str,
    root: str | Path,
    out: str | Path,
    preset: str = "small",
    parameters: Mapping[str, object] | None = None,
) -> Path:
    """Execute all numbered notebooks, collect their tables, print what came out and where it is.

    Each writes ``results/<its name>.csv`` below ``out``.

    Args:
        data: a reader: ``diagnostic``, ``cub``, ``folder``, ...
        root: folder of the dataset.
        out: folder for all that is made; it keeps to one data, root, preset and parameters.
        preset: settings to start from, a key of ``config.PRESETS``; ``small`` takes minutes on two
            cores, ``paper`` is the size of the paper.
        parameters: further notebook parameters, each for the notebooks that declare it, and
            settings of `Config` for all of them.

    Returns:
        Path of ``results.csv``: the rows of all tables, with a column ``notebook``.

    Raises:
        InputError: unknown parameter, ``out`` answers another question, or a notebook failed; then
            the message is the notebook's own InputError or names its executed copy.
    """
    out = Path(out).absolute()
    common = _locate({"data": data}, Path.cwd()) | {"root": str(Path(root).absolute())}
    common |= {"out": str(out), "preset": preset}
    paths = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    chosen = choose_parameters(paths, common, parameters or {})
    question = {k: v for path in paths for k, v in chosen[path].items() if k != "out"}
    finished, package = read_record(out, question), _hash_package()
    probed = _probe(out, question, finished, package)
    print(*probed, sep="\n", flush=True)
    ordered = sorted(paths, key=lambda path: path.stem.startswith("00"))
    for number, path in enumerate(ordered, start=1):  # 00, last, shows the model that 02 trains
        label = f"[{number}/{len(paths)}] {path.stem}"
        page, table = out / f"{path.stem}.html", out / f"results/{path.stem}.csv"
        cells = [(cell.cell_type, cell.source) for cell in read_notebook(path).cells]
        inputs = partial(fingerprint, cells, chosen[path], package)
        made = page.exists() and table.exists() and (out / path.name).exists()
        if made and finished.get(path.stem) == inputs():
            print(f"{label}: reused, nothing changed")
            continue
        print(label, flush=True)
        notebook = execute(path, chosen[path], out / path.name)
        if not table.exists():
            raise InputError(f"{path.stem}: it wrote no {table}; add that to its last cell")
        write_page(notebook, page, path.stem)
        finished[path.stem] = inputs()  # now, for the notebook may have made the dataset
        write_text(out / RECORD, json.dumps(question | {"finished": finished}, indent=1))
    return summarize_notebooks(out, [path.stem for path in paths], question, probed)


def _probe(out: Path, question: dict, finished: dict[str, str], package: str) -> list[str]:
    """Probe the dataset in ``out/probe`` where something changed; returns the lines of `probe`."""
    from ramslib.experiments import probe  # slow, and every kernel imports this module

    inputs, record = partial(fingerprint, [], question, package), out / "probe" / probe.RECORD
    if finished.get("probe") != inputs() or not record.exists():
        config, drawn = choose_config(question, Path.cwd()), question["data"] == "diagnostic"
        pixels = sum(height * width for height, width in config.input_sizes())
        images = PROBED_PIXELS // (pixels * (10 if drawn else 1)) + 1
        probe.probe(config, record.parent, images=images, with_rivals=not drawn)
        finished["probe"] = inputs()
        write_text(out / RECORD, json.dumps(question | {"finished": finished}, indent=1))
    return json.loads(record.read_text("utf-8"))["lines"]


def choose_parameters(
    paths: list[Path], common: dict[str, object], given: Mapping[str, object]
) -> dict[Path, dict]:
    """Parameters of each notebook.

    Names that no notebook declares are settings of `Config`, which all notebooks get.

    Raises:
        InputError: no notebooks, an unknown name, a value of another kind, or settings that do not
            fit together.
    """
    if not paths:
        raise InputError("no numbered notebooks; run from a clone of the project")
    declared = {path: declared_parameters(path) for path in paths}
    known = {n: default for parameters in declared.values() for n, default in parameters.items()}
    accepted = [*known, *(Config.names() if "settings" in known else ())]
    for name in sorted(set(given) - set(accepted)):
        hint = nearest(name.lower(), accepted, f"notebooks take {', '.join(known)}")
        raise InputError(f"unknown parameter or setting {name!r}; {hint}")
    values = common | {n: read_value(n, v, known[n]) for n, v in given.items() if n in known}
    settings = values.get("settings", {}) | {n: v for n, v in given.items() if n not in known}
    if settings:
        values["settings"] = _locate(settings, Path.cwd())
    choose_config(values, Path.cwd())  # what no notebook could use is refused before the first one
    values = json.loads(json.dumps(values))  # papermill passes tuples in dictionaries as text
    return {path: {n: values[n] for n in values if n in declared[path]} for path in paths}


def read_record(out: Path, question: dict) -> dict[str, str]:
    """What a folder holds already: the `fingerprint` of each executed notebook, by its name.

    Raises:
        InputError: the folder cannot be made, or holds the results of another question or files
            of somebody else.
    """
    records = [out / name for name in (RECORD, OLD_RECORD) if (out / name).exists()]
    ours = ("results.csv", "index.html", "[0-9][0-9]_*.ipynb", "[0-9][0-9]_*.html")
    foreign = [path for name in ours for path in out.glob(name)]
    if foreign and not records:
        raise InputError(f"{foreign[0]}: made by somebody else; choose another folder")
    with writing(out):
        (out / "results").mkdir(parents=True, exist_ok=True)
    old, finished = {}, {}
    for record in records[:1]:
        with file_errors(record, "remove it"):
            old = dict(json.loads(record.read_text("utf-8")))
            finished = dict(old.pop("finished", {}))
    for key in old | question if records else ():
        if json.dumps(old.get(key)) != json.dumps(question.get(key)):
            difference = f"{key}={old.get(key)}, not {question.get(key)}"
            raise InputError(f"{out}: holds results of {difference}; choose another folder")
    return finished


def _hash_package() -> str:
    """Hash of ramslib's own code and settings."""
    files = sorted(file for kind in ("py", "toml") for file in PACKAGE.rglob(f"*.{kind}"))
    return _hash([file.read_text("utf-8") for file in files])


def fingerprint(cells: list, parameters: dict, package: str) -> str:
    """Hash of what the outputs of a notebook's cells depend on: code, parameters and dataset."""
    settings = parameters.get("settings", {})
    folders = {parameters["root"], settings.get("lists") or parameters["root"]}
    files = sorted(file for folder in folders for file in Path(folder).rglob("*"))
    data = [(str(file), file.lstat().st_mtime_ns) for file in files]
    return _hash([package, cells, parameters, key_values(parameters | settings), data])


def execute(path: Path, parameters: dict, copy: Path | None = None) -> "NotebookNode":
    """Execute a notebook in its folder and check it.

    Args:
        path: the notebook.
        parameters: for its cell of parameters.
        copy: where papermill writes the executed copy, also of a notebook that fails.

    Raises:
        InputError: a cell failed; the notebook's own InputError, or the error and the copy.
    """
    import papermill  # like nbformat

    try:
        notebook = papermill.execute_notebook(
            read_notebook(path),
            copy and str(copy).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
            parameters=parameters,
            kernel_name="python3",
            kernel_manager_class=OwnInterpreter,
            execution_timeout=CELL_TIMEOUT,
            progress_bar=sys.stderr.isatty(),
            cwd=path.parent,
        )
        check_executed(notebook)
    except Exception as error:
        if getattr(error, "ename", "") == InputError.__name__:
            raise InputError(error.evalue) from error
        cause = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
        first_line = cause.strip(": \n").partition("\n")[0]
        see = f"; see the executed copy {copy}" if copy else ""
        raise InputError(f"{path.stem}: {first_line}{see}") from error
    return notebook


def check_executed(notebook: "NotebookNode") -> None:
    """Raise RuntimeError for a cell that did not run to its end or an error that a widget holds.

    After a timeout or the death of the kernel papermill calls all cells completed; those that did
    not run have no number.
    """
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and cell.source.strip():
            failed = [output for output in cell.outputs if output.output_type == "error"]
            status = cell.metadata.get("papermill", {}).get("status")
            if status != "completed" or cell.execution_count is None or failed:
                raise RuntimeError(f"cell {number} did not complete")
    for widgets in notebook.metadata.get("widgets", {}).values():
        for model in widgets["state"].values():
            for output in model["state"].get("outputs", []):
                if output["output_type"] == "error":
                    raise RuntimeError(f"in a widget, {output['ename']}: {output['evalue']}")


def write_page(notebook: "NotebookNode", path: Path, title: str, **options: object) -> None:
    """Write an executed notebook as a page that needs no network; ``options`` are nbconvert's."""
    from nbconvert import HTMLExporter  # like nbformat

    quiet = logging.Logger("pages", logging.ERROR)  # not a warning for each figure without a text
    options |= {"raw_template": _template("page"), "embed_images": True, "log": quiet}
    notebook = deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(partial(_link, path.parent), EQUATION.sub(_draw, cell.source))
    page, _ = HTMLExporter(**options).from_notebook_node(notebook, {"metadata": {"name": title}})
    write_text(path, page)


def _link(folder: Path, match: re.Match) -> str:
    """A link of a notebook as it is right in a page in another folder; pictures are embedded."""
    is_picture, text, target = match.groups()
    file = NOTEBOOKS / target
    if is_picture:
        return _picture(file.read_bytes(), mimetypes.guess_type(file)[0], text)
    is_page = re.fullmatch(r"\d\d_\w+\.ipynb", target)
    return f"[{text}]({file.stem + '.html' if is_page else os.path.relpath(file, folder)})"


def _draw(match: re.Match) -> str:
    """An equation as a picture, drawn by matplotlib: MathJax would need a network.

    What matplotlib cannot draw remains as it is.
    """
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    displayed, inline = match.groups()
    equation, file = displayed or inline, io.BytesIO()
    font = FontProperties(size=12 if displayed else 10.5)
    try:
        with rc_context({"mathtext.fontset": "cm"}):
            depth = math_to_image(f"${equation}$", file, font, dpi=72, format="svg")
    except ValueError:
        return match[0]
    style = "display: block; margin: 1em auto" if displayed else f"vertical-align: -{depth}pt"
    return _picture(file.getvalue(), "image/svg+xml", equation, style)


def _picture(content: bytes, kind: str, text: str, style: str = "") -> str:
    data = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img alt="{html.escape(text)}" src="{data}" style="{style}"/>'


def write_report(run: Path | str, root: Path | str | None = None) -> Path:
    """Write a finished run as one page, ``report.html`` in its folder.

    Args:
        run: its folder.
        root: where its images are now, if they moved.

    Raises:
        InputError: no run there, one that is not finished, or a damaged file.
    """
    run, root = Path(run), root and str(Path(root).absolute())
    config, _, _ = read_run(run, root)
    read_results(run)
    read_predictions(run)
    notebook = execute(NOTEBOOKS / "report.ipynb", {"run": str(run.absolute()), "root": root})
    hidden = {f"exclude_{part}": True for part in ("input", "input_prompt", "output_prompt")}
    data = config.data.rpartition("/")[2]  # of a reader of one's own, without the folder
    title = f"{run.resolve().name}: {method_name(config)} on {data}"
    write_page(notebook, run / "report.html", title, **hidden)
    return run / "report.html"


def summarize_notebooks(out: Path, names: list[str], question: dict, probed: list[str]) -> Path:
    """Write ``results.csv`` and ``index.html``; print what came out and where to read on."""
    how = {"encoding_errors": "surrogateescape"}
    tables = {name: pd.read_csv(out / f"results/{name}.csv", **how) for name in names}
    merged = pd.concat(tables, names=["notebook"]).reset_index("notebook")
    write_text(out / "results.csv", merged.to_csv(index=False))
    titles = {name: read_notebook(out / f"{name}.ipynb").cells[0].source for name in names}
    lines, base = headlines(tables.values(), count=5), choose_config(question, Path.cwd())
    runs = sorted(file.parent for file in runs_folder(out).glob("*/results.csv"))
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(_template("index"))
        .render(
            question,
            headlines=lines,
            probed=probed,
            titles={name: title.splitlines()[0].strip("# ") for name, title in titles.items()},
            runs=[(str(run.relative_to(out)), describe(read_run(run)[0], base)) for run in runs],
            reports=[str(run.relative_to(out)) for run in runs if (run / "report.html").exists()],
        )
    )
    write_text(out / "index.html", page)
    places = f"results: {out / 'results.csv'}", f"pages: {out / 'index.html'}"
    print(*probed[1:2], *lines, *places, sep="\n")
    return out / "results.csv"


def _template(name: str) -> str:
    return Path(__file__).with_name(f"{name}.html.j2").read_text("utf-8")


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
