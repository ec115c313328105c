"""The notebooks command on tiny notebooks of its own: papermill, real kernels, no training."""

import json
import os
import re
import sys
import warnings

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ramslib.config import Config
from ramslib.errors import InputError
from ramslib.experiments import notebooks as notebooks_command
from ramslib.experiments import probe

PARAMETERS = 'data = "diagnostic"\nroot = "x"\nout = "y"\npreset = "tiny"\n'
WRITE = """
import sys
from pathlib import Path
row = [preset, root, sys.executable, Path.cwd().name, globals().get("epochs", 0)]
lines = ["preset,root,python,cwd,epochs", ",".join(map(str, row))]
(Path(out) / "results" / "{name}.csv").write_text("\\n".join(lines))
print("wrote", "{name}")
"""
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
SLIDER = "import ipywidgets\nslider = ipywidgets.IntSlider()\nslider"
CAPTURED_ERROR = """
import ipywidgets
box, slider = ipywidgets.Output(), ipywidgets.IntSlider()
@box.capture()
def divide(change):
    1 / 0
slider.observe(divide, "value")
display(box)
slider.value = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with photos/, notebooks/ and package/, all empty; no start-up files of a user."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for name in ("photos", "notebooks", "package"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(notebooks_command, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(notebooks_command, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(probe, "probe", write_probe)
    return tmp_path


def write_probe(config, out, images, with_rivals):
    """What a probe leaves for the notebooks command, with the number of its calls in it."""
    calls = len(list(out.glob("*")))
    out.mkdir(exist_ok=True)
    (out / f"call {calls}").touch()
    lines = ["9 images <of> 3 classes", f"frozen features: {calls} %, {images}, {with_rivals}"]
    (out / "probe.json").write_text(json.dumps({"lines": lines}))


def write_notebook(folder, name, *code, more="", last=WRITE):
    """Save a notebook: title, parameters, the given code cells, one that writes its table."""
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    tagged = new_code_cell(PARAMETERS + more, metadata={"tags": ["parameters"]})
    rest = [new_code_cell(source) for source in (*code, last.format(name=name))]
    cells = [new_markdown_cell(f"# {name}"), tagged, *rest]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


def run_all(folder, **changes):
    """Execute the notebooks in ``folder``."""
    arguments = {"data": "folder", "root": folder / "photos", "out": folder / "runs" / "a {b}"}
    return notebooks_command.run_notebooks(**(arguments | changes))


def test_executes_all_with_own_interpreter_and_reuses_what_did_not_change(
    folder, monkeypatch, capsys
):
    fake = folder / "jupyter" / "kernels" / "python3"
    fake.mkdir(parents=True)
    kernel = {"argv": ["/nonexistent", "{connection_file}"], "display_name": "", "language": ""}
    (fake / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    write_notebook(folder, "02_second", SLIDER)
    write_notebook(folder, "01_first", FIGURE, more="epochs = 1  # count\n")
    write_notebook(folder, "draft", "raise ValueError")

    path = run_all(folder, parameters={"epochs": "3"})
    out, printed = path.parent, capsys.readouterr().out
    table = pd.read_csv(path)
    assert list(table["notebook"]) == ["01_first", "02_second"]
    assert list(table["epochs"]) == [3, 0]
    assert set(table["python"]) == {sys.executable}
    assert set(table["root"]) == {str(folder / "photos")} and set(table["preset"]) == {"small"}
    assert set(table["cwd"]) == {"notebooks"}, "as in JupyterLab"
    assert str(path) in printed and "[2/2] 02_second" in printed and "01_first" in printed
    assert str(out / "index.html") in printed
    index = (out / "index.html").read_text()
    assert '<a href="01_first.html">01_first</a>' in index and 'href="results.csv"' in index

    figure, slider = ((out / f"{name}.html").read_text() for name in ("01_first", "02_second"))
    assert "data:image/png;base64," in figure and "Live widget" in slider
    for page in (figure, slider):
        assert "<script" not in page
        assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(["']?http""", page)

    times = {file: os.stat(file).st_mtime_ns for file in out.glob("0*")}
    run_all(folder, parameters={"epochs": 3})
    assert capsys.readouterr().out.count("reused") == 2
    assert times == {file: os.stat(file).st_mtime_ns for file in out.glob("0*")}

    write_notebook(folder, "02_second", SLIDER, "assert True")
    run_all(folder, parameters={"epochs": 3})
    assert re.findall(r"\] (\w+): reused", capsys.readouterr().out) == ["01_first"]


def test_the_probe_comes_first_and_again_only_after_a_change(folder, capsys):
    write_notebook(folder, "01_first")
    out = run_all(folder).parent
    first, number, *rest, last = capsys.readouterr().out.splitlines()
    assert first == "9 images <of> 3 classes" and number == "frozen features: 0 %, 997, True"
    assert rest[0] == "[1/1] 01_first" and rest.count(number) == 1 and "index.html" in last
    assert "9 images &lt;of&gt; 3 classes" in (out / "index.html").read_text()
    run_all(folder)
    assert number in capsys.readouterr().out, "reused"
    (folder / "photos" / "new.jpg").touch()
    run_all(folder)
    assert "frozen features: 2 %, 997, True" in capsys.readouterr().out
    run_all(folder, data="diagnostic", out=folder / "drawn")
    assert "frozen features: 0 %, 100, False" in capsys.readouterr().out


def test_executes_again_after_a_change_of_data_or_code_or_a_lost_page(folder, capsys):
    write_notebook(folder, "01_first", 'open(root + "/made.txt", "w").close()')
    out = run_all(folder).parent

    def is_reused():
        capsys.readouterr()
        run_all(folder)
        return "reused" in capsys.readouterr().out

    assert is_reused(), "what the notebook itself adds to the data set is no change"
    (folder / "photos" / "new.jpg").touch()
    assert not is_reused() and is_reused()
    (folder / "package" / "model.py").touch()
    assert not is_reused()
    (out / "01_first.html").unlink()
    assert not is_reused()
    for name in ("notebooks.json", "results.csv", "index.html", "01_first.ipynb", "01_first.html"):
        (out / name).unlink()
    assert not is_reused()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('first\\nsecond')", "01_bad: ValueError: first;"),
        ("assert 1 == 2", "01_bad: AssertionError;"),
        ("import sys\nsys.exit(0)", "did not complete"),
        ("import os\nos.kill(os.getpid(), 9)", "Kernel died"),
        ("import time\ntime.sleep(60)", "timed out"),
        (CAPTURED_ERROR, "in a widget, ZeroDivisionError: division by zero"),
    ],
    ids=["raise", "assert", "exit", "dead", "timeout", "widget"],
)
def test_a_notebook_that_fails_is_one_line_that_names_its_copy(folder, monkeypatch, code, reason):
    monkeypatch.setattr(notebooks_command, "CELL_TIMEOUT", 15)
    if "sleep" in code:
        monkeypatch.setattr(notebooks_command, "CELL_TIMEOUT", 3)
    write_notebook(folder, "01_bad", code)
    with pytest.raises(InputError) as caught:
        run_all(folder)
    copy = folder / "runs" / "a {b}" / "01_bad.ipynb"
    assert reason in str(caught.value) and str(copy) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "01_bad" not in json.loads((copy.parent / "notebooks.json").read_text())["finished"]
    with pytest.raises(RuntimeError):
        notebooks_command.check_executed(nbformat.read(copy, 4))


def test_a_notebooks_own_input_error_is_passed_on(folder):
    message = "images.txt:3: no such image; remove the line"
    raised = f"class InputError(ValueError): ...\nraise InputError({message!r})"
    write_notebook(folder, "01_bad", raised)
    with pytest.raises(InputError) as caught:
        run_all(folder)
    assert str(caught.value) == message


def test_a_notebook_that_writes_no_table_fails(folder):
    write_notebook(folder, "01_silent", last="")
    with pytest.raises(InputError, match=r"01_silent: it wrote no .*01_silent\.csv"):
        run_all(folder)


def test_bad_requests_are_refused_before_anything_runs(folder, monkeypatch):
    monkeypatch.setattr(notebooks_command, "execute", None)
    with pytest.raises(InputError, match="no numbered notebooks"):
        run_all(folder)
    write_notebook(folder, "01_first", more="processes = 2\nsettings = {}\nhalves = [0.5]\n")
    for name, value, *facts in (
        ("processs", "3", "'processs'", "'processes'"),
        ("EPOCHS", "3", "'EPOCHS'", "'epochs'"),
        ("xyzzy", "3", "'xyzzy'", "processes"),
        ("processes", "many", "processes='many'", "2"),
        ("processes", "True", "processes=True", "2"),
        ("processes", "2.5", "processes=2.5", "2"),
        ("processes", "[2]", "processes=[2]", "2"),
        ("halves", "0.5", "halves=0.5", "[0.5]"),
        ("halves", "[[[", "halves='[[['"),
        ("data", 3, "data=3", "'diagnostic'"),
        ("batch_size", "0", "'batch_size'"),
        ("settings", "{'epoks': 3}", "'epoks'", "'epochs'"),
    ):
        with pytest.raises(InputError) as caught:
            run_all(folder, parameters={name: value})
        assert all(fact in str(caught.value) for fact in facts), caught.value
    with pytest.raises(InputError, match="unknown preset 'papers'"):
        run_all(folder, preset="papers")
    assert not (folder / "runs").exists()


def test_a_folder_of_somebody_else_or_with_a_damaged_record_is_left_alone(folder, monkeypatch):
    monkeypatch.setattr(notebooks_command, "execute", None)
    write_notebook(folder, "01_first")
    (folder / "file").touch()
    with pytest.raises(InputError, match="file: cannot be written"):
        run_all(folder, out=folder / "file")
    (folder / "mine").mkdir()
    (folder / "mine" / "results.csv").write_text("my own")
    with pytest.raises(InputError, match="results.csv: made by somebody else"):
        run_all(folder, out=folder / "mine")
    (folder / "mine" / "results.csv").unlink()
    for text in ("", "{", "[1]", "3", '{"finished": 3}', "\udcff"):
        (folder / "mine" / "notebooks.json").write_text(text, errors="surrogateescape")
        with pytest.raises(InputError, match="notebooks.json: cannot be read .*; remove it"):
            run_all(folder, out=folder / "mine")


def test_results_of_another_question_are_not_overwritten(folder):
    write_notebook(folder, "01_first", more="sizes = (1, 2)\nsettings = {}\n")
    out = run_all(folder, parameters={"sizes": "(3, 4)"}).parent
    run_all(folder, parameters={"sizes": (3, 4)})
    (out / "notebooks.json").rename(out / "road.json")  # as version 0.1 called it
    for changes, facts in (
        ({"preset": "paper"}, ["preset=small", "paper"]),
        ({"root": folder / "other"}, ["root=", "photos", "other"]),
        ({"parameters": {}}, ["sizes="]),
        ({"parameters": {"sizes": (3, 4), "epochs": "7"}}, ["settings=None", "epochs"]),
    ):
        with pytest.raises(InputError, match="holds results of") as caught:
            run_all(folder, **{"parameters": {"sizes": (3, 4)}} | changes)
        assert all(fact in str(caught.value) for fact in facts)


def test_settings_reach_every_notebook_as_the_configuration(folder, monkeypatch):
    """Also one that names a file, relative to the shell's folder."""
    monkeypatch.chdir(folder)
    (folder / "ideas.py").write_text("def mine(strength, threshold, recorded): ...\n")
    shown = "import json\nfrom ramslib.config import Config\nprint(json.dumps(settings))"
    write_notebook(folder, "01_first", shown, more="settings = {}\n")
    write_notebook(folder, "02_second")
    given = {"batch_size": "5", "proposal": "ideas.py:mine", "settings": "{'image_size': (32, 48)}"}
    given |= {"lists": "mine"}
    (folder / "mine").mkdir()
    out = run_all(folder, parameters=given).parent
    (cell,) = [c for c in nbformat.read(out / "01_first.ipynb", 4).cells if c.source == shown]
    settings = json.loads(cell.outputs[0].text)
    expected = {"batch_size": "5", "proposal": f"{folder}/ideas.py:mine", "image_size": [32, 48]}
    expected |= {"lists": f"{folder}/mine"}
    assert settings == expected
    record = (out / "notebooks.json").read_text()
    (folder / "ideas.py").write_text("def mine(strength, threshold, recorded): return strength\n")
    run_all(folder, parameters=given)
    assert record != (out / "notebooks.json").read_text(), "a changed idea is executed again"
    record = (out / "notebooks.json").read_text()
    (folder / "mine" / "groups.csv").write_text("path,group\n")
    run_all(folder, parameters=given)
    assert record != (out / "notebooks.json").read_text(), "so is a changed list"


def test_a_notebook_reads_its_parameters_whoever_gave_them(folder, monkeypatch):
    monkeypatch.setattr(notebooks_command, "CLONE", folder)
    more = "scales = [1, 2]\nshare = 0.5\nquick = False\nsettings = {}\n"
    write_notebook(folder, "01_first", more=more)
    given = {"data": "cub", "root": "data/cub", "out": "runs/x", "preset": "tiny", "other": 3}
    given |= {"scales": "[1, 3]", "share": "1", "quick": "True", "settings": "{'lists': 'mine'}"}
    read = notebooks_command.read_parameters("01_first", given)
    assert (read.scales, read.share, read.quick) == ([1, 3], 1, True)
    assert read.root == folder / "data" / "cub" and read.out == folder / "runs" / "x"
    places = {"root": str(read.root), "lists": f"{folder}/mine"}
    assert read.config == Config.preset("tiny", data="cub", **places)
    assert read.table == read.out / "results" / "01_first.csv" and read.table.parent.is_dir()
    assert read.runs == read.out / "runs" and not hasattr(read, "other")
    (read.out / "cells").mkdir()
    again = notebooks_command.read_parameters("01_first", given)
    assert again.runs == read.out / "cells", "runs of version 0.1 are found"
    for wrong in (
        {"root": ""},
        {"preset": "none"},
        {"scales": "two"},
        {"settings": {"x": 1}},
        {"scales": []},
    ):
        with pytest.raises(InputError):
            notebooks_command.read_parameters("01_first", given | wrong)
    with pytest.raises(InputError, match="no such notebook"):
        notebooks_command.read_parameters("02_second", given)


def test_a_notebook_shows_a_warning_once_and_without_the_code(folder, monkeypatch):
    monkeypatch.setattr(notebooks_command, "CLONE", folder)
    write_notebook(folder, "01_first")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    given = {"data": "cub", "root": "data/cub", "out": "x", "preset": "tiny"}
    notebooks_command.read_parameters("01_first", given)
    texts = [warnings.formatwarning("text", UserWarning, "ideas.py", line) for line in range(3)]
    assert texts == ["warning: text\n", "", ""]


def test_links_pictures_and_equations_are_right_in_a_page_elsewhere(tmp_path):
    text = (
        "See [next](01_data_preparation.ipynb), [method](../docs/method.md#x), [web](https://x.y)"
    )
    text += "\n\n![the method](../docs/method.svg)\n\n$$a = \\frac{1}{2} b_i$$\n\nInline $x > y$, "
    text += "$\\nosuchcommand$"
    notebook = new_notebook(cells=[new_markdown_cell(text)])
    notebooks_command.write_page(notebook, tmp_path / "page.html", "page")
    page = (tmp_path / "page.html").read_text()
    assert 'href="01_data_preparation.html"' in page and 'href="https://x.y"' in page
    (link,) = re.findall(r'href="([^"]+method\.md)#x"', page)
    assert (tmp_path / link).resolve() == notebooks_command.CLONE / "docs" / "method.md"
    pictures = re.findall(r'<img alt="([^"]*)"[^>]* src="data:image/svg\+xml;base64,', page)
    assert pictures == ["the method", "a = \\frac{1}{2} b_i", "x &gt; y"]
    assert "$\\nosuchcommand$" in page
    assert notebook.cells[0].source == text, "the executed copy stays as it is"
