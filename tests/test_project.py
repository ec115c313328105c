"""The project's own shape: dependencies, import order, size of modules, notebooks, wording."""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "ramslib").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The way that data take. Nothing here needs, directly or through others, what stands after it.
ORDER = """
errors extensions config acceleration data distributed weights attention boxes dppm backbone
classifier transfg model evaluation localization plots inspector runs training experiments explorer
__main__
""".split()

# Of the whole package. The aim is 5,000 lines in 40 modules; what is added must earn its place.
LINES, FILES, NODES = 8_497, 46, 106_790
METHOD = "attention boxes dppm backbone classifier model".split()

CONDA_NAMES = {"torch": "pytorch", "playwright": "playwright-python"}
IMPORT_NAMES = {"PIL": "pillow", "IPython": "ipython", "sklearn": "scikit-learn"}
USED_AS_COMMANDS = {"ipython", "jupyterlab", "ipykernel", "nbval", "voila"}


def read_requirements(texts):
    """Name -> version range, as text in one order."""
    parsed = [Requirement(text) for text in texts]
    return {each.name: str(each.specifier) for each in parsed}


def read_pyproject():
    """The ``project`` table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imported_names(path):
    """Every module that a file imports, anywhere in it, with ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "ramslib" if node.level else ""
            parts = [part for part in (base, node.module) if part]
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def test_environment_names_what_pyproject_names():
    project = read_pyproject()
    texts = project["dependencies"] + project["optional-dependencies"]["test"]
    wanted = {CONDA_NAMES.get(k, k): v for k, v in read_requirements(texts).items()}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *packages, pip = environment["dependencies"]
    assert pip == {"pip": ["-e ."]}
    named = read_requirements(packages)
    assert named.pop("python") == project["requires-python"]
    assert named.pop("pip") == ""
    assert named == wanted


def test_every_dependency_has_a_range_and_is_what_the_library_imports():
    project = read_pyproject()
    named = read_requirements(project["dependencies"])
    for name, versions in named.items():
        assert ">=" in versions and "<" in versions and "==" not in versions, name
    imported = {name.split(".")[0] for path in MODULES for name in imported_names(path)}
    third_party = imported - set(sys.stdlib_module_names) - {"ramslib"}
    imported = {IMPORT_NAMES.get(name, name) for name in third_party}
    assert imported == set(named) - USED_AS_COMMANDS
    extras = project["optional-dependencies"]
    tested = read_requirements(extras["test"])
    for name, versions in read_requirements(extras["onnx"]).items():
        assert tested[name] == versions, "what an extra needs is installed where it is tested"
        assert name not in imported, "an extra is imported by name, with a message where missing"


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'__version__ = "(.+)"', (ROOT / "ramslib" / "__init__.py").read_text())[1]
    assert citation["version"] == version
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text()


def dotted(path):
    """The name by which a module is imported; a package has that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def needs(path, names):
    """The modules of ramslib that a module imports: the longest known name of each import."""
    for name in imported_names(path):
        parts = name.split(".")
        known = [".".join(parts[:end]) for end in range(len(parts), 1, -1)]
        yield from [name for name in known if name in names][:1]


def test_imports_go_one_way():
    names = {dotted(path) for path in MODULES}
    graph = {dotted(path): set(needs(path, names)) for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises at a circle
    place = {name: number for number, name in enumerate(ORDER)}
    room = {name: name.split(".")[1] for name in names - {"ramslib"}}
    assert set(room.values()) == set(ORDER), "every module and folder has its place"
    wrong = {(a, b) for a in room for b in graph[a] if place[room[b]] > place[room[a]]}
    assert wrong == set()
    assert graph["ramslib"] == set(), "importing the package imports no module"


@pytest.mark.slow
def test_importing_only_defines_names(tmp_path):
    modules = [dotted(path) for path in MODULES if not path.stem.startswith("__")]
    third_party = {name.split(".")[0] for path in MODULES for name in imported_names(path)}
    third_party -= {"ramslib"}
    code = f"""
import importlib, os, random, sys, threading, warnings
for name in {sorted(third_party)} + ["matplotlib.pyplot", "torch.distributed"]:
    importlib.import_module(name)
import matplotlib, numpy, torch
def state():
    return (sys.argv, sys.path, dict(os.environ), os.getcwd(), threading.active_count(),
            random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            matplotlib.get_backend(), dict(matplotlib.rcParams), warnings.filters[:])
before = state()
for name in {modules}:
    importlib.import_module(name)
assert [a == b for a, b in zip(before, state())] == [True] * len(before)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def code_lines(path):
    """Lines of a file that hold code: without docstrings, comments and blank lines."""
    text, documented = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and body and isinstance(body[0], ast.Expr):
            if isinstance(getattr(body[0].value, "value", None), str):
                documented.update(range(body[0].lineno, body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented
        for number, line in lines
    )


def syntax_nodes(path):
    """Nodes of a file's syntax tree: squeezing lines does not make them fewer."""
    return sum(1 for _ in ast.walk(ast.parse(path.read_text())))


def test_the_library_stays_thin():
    lines = {dotted(path): code_lines(path) for path in MODULES}
    assert sum(lines.values()) <= LINES and sum(map(bool, lines.values())) <= FILES
    assert sum(map(syntax_nodes, MODULES)) <= NODES, "lines are not squeezed to be fewer"
    assert sum(lines[f"ramslib.{name}"] for name in METHOD) <= 800
    assert max(len(path.read_text().splitlines()) for path in MODULES) <= 500
    prepared = sorted((ROOT / "data").rglob("*.py"))
    assert sum(map(code_lines, prepared)) <= 400, "what draws and downloads datasets"


class Node(dict):
    """A dictionary whose values are attributes, too."""

    __getattr__ = dict.__getitem__


def read_notebook(path):
    """A notebook as nbformat reads it, which takes seconds to import."""
    notebook = json.loads(path.read_text("utf-8"), object_hook=Node)
    for cell in notebook.cells:
        cell["source"] = "".join(cell.source)
    return notebook


NUMBERED = """
00_the_method 01_data_preparation 02_train_two_gpus 03_ablation_scales 04_ablation_threshold
05_attention_explorer 06_comparison 07_accuracy_per_second
""".split()


@pytest.mark.slow
def test_the_numbered_notebooks_lead_from_one_to_the_next():
    texts = {path.stem: read_notebook(path).cells[0].source for path in NOTEBOOKS}
    assert set(NUMBERED) <= set(texts)
    for before, after in zip(NUMBERED, NUMBERED[1:], strict=False):
        assert f"]({after}.ipynb)" in texts[before] and f"]({before}.ipynb)" in texts[after]
    for name in NUMBERED:
        assert "**Question:**" in texts[name] and "*Costs*" in texts[name]
        assert "](../docs/method.md)" in texts[name]


def test_links_and_pictures_of_notebooks_exist():
    for path in NOTEBOOKS:
        text = "".join(c.source for c in read_notebook(path).cells if c.cell_type == "markdown")
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
        missing = [link for link in links if not (path.parent / link).exists()]
        assert missing == [], path.name


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    """Each notebook in turn."""
    return read_notebook(request.param)


@pytest.fixture
def code_cells(notebook):
    """The code cells of each notebook in turn."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parse(cell):
    """The syntax tree of a cell; a file that it writes is its lines after the first."""
    magic, _, rest = cell.source.partition("\n")
    return ast.parse(rest if magic.startswith("%%writefile") else cell.source)


def test_notebook_file_is_small_clean_and_for_any_python(notebook, request):
    path = request.node.callspec.params["notebook"]
    assert path.stat().st_size <= 50 * 1024
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert not {"widgets", "papermill"} & set(notebook.metadata)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert json.loads(path.read_text())["nbformat"] == 4


def test_notebook_keeps_no_outputs(code_cells):
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells)


def test_notebook_code_is_short(code_cells, request):
    """Functions and classes belong in ramslib; 00, which teaches, may define some."""
    lengths = [len(cell.source.splitlines()) for cell in code_cells]
    nodes = [node for cell in code_cells for node in ast.walk(parse(cell))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    teaches = request.node.callspec.params["notebook"].stem == "00_the_method"
    assert max(lengths) <= 25 and sum(lengths) <= (200 if teaches else 120)
    assert not [node for node in nodes if isinstance(node, ast.ClassDef)]
    assert len(functions) <= (3 if teaches else 1)
    assert all(node.end_lineno - node.lineno < (12 if teaches else 6) for node in functions)


def test_notebook_parameters_are_one_cell_of_literals(code_cells, request):
    tagged = [cell for cell in code_cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {}
    for node in parse(tagged[0]).body:
        assert isinstance(node, ast.Assign) and node.lineno == node.end_lineno, "papermill's limit"
        values[node.targets[0].id] = ast.literal_eval(node.value)
    if request.node.callspec.params["notebook"].stem == "report":
        assert set(values) == {"run", "root"}
    else:
        assert {"data", "root", "out", "preset", "settings"} <= set(values)
        assert (values["preset"], values["settings"]) == ("small", {})


def test_notebook_ends_with_what_it_claims(code_cells):
    assert any(isinstance(node, ast.Assert) for node in ast.walk(parse(code_cells[-1])))


FORBIDDEN = {
    "package host": r"pypi[.]org|python[h]osted|pytorch[.]org/whl|huggingface[.]co/|anaconda[.]org",
    "path of one machine": r"(?<![\w.}])/(w[o]rk|t[m]p|r[o]ot|h[o]me|mnt|U[s]ers)/",
    "folder outside the project": r"[.][.]/sha[r]ed",
}


def test_no_package_host_and_no_path_of_one_machine():
    patterns = ("*.*", ".*ignore", "Makefile", ".ci/*", "*/*.py", "*/*.md", "*/*.ipynb")
    files = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    found = [
        f"{path.relative_to(ROOT)}: {kind}: {match[0]}"
        for path in sorted(files)
        if path.suffix not in {".png", ".jpg", ".svg"}
        for kind, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_make_lists_its_targets_and_never_deletes_results():
    make = (ROOT / "Makefile").read_text()
    for target in ("run", "check", "test", "lab", "bench", "format", "clean"):
        assert re.search(rf"^## make {target}\b", make, re.M) and re.search(
            rf"^{target}:", make, re.M
        )
    removed = re.findall(r"rm -rf (.+)", make)
    assert removed and not re.search(r"\b(runs|data|VENV)\b", " ".join(removed))
