"""The road driver on tiny notebooks of its own: papermill, real kernels, no training."""

import json
import os
import re
import sys

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ramslib.errors import InputError
from ramslib.experiments import notebooks as notebooks_command

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
    monkeypatch.setattr(road, "PACKAGE", tmp_path / "package")
    return tmp_path


def write_notebook(folder, name, *code, more="", last=WRITE):
    """Save a notebook: title, parameters, the given code cells, one that writes its table."""
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    tagged = new_code_cell(PARAMETERS + more, metadata={"tags": ["parameters"]})
    rest = [new_code_cell(source) for source in (*code, last.format(name=name))]
    cells = [new_markdown_cell(f"# {name}"), tagged, *rest]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


def walk(folder, **changes):
    """Walk the road in ``folder``."""
    arguments = {"data": "folder", "root": folder / "photos", "out": folder / "runs" / "a {b}"}
    return notebooks_command.run_notebooks(
        **(arguments | {"notebooks": folder / "notebooks"} | changes)
    )


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

    path = walk(folder, parameters={"epochs": "3"})
    out, printed = path.parent, capsys.readouterr().out
    table = pd.read_csv(path)
    assert list(table["notebook"]) == ["01_first", "02_second"]
    assert list(table["epochs"]) == [3, 0]
    assert set(table["python"]) == {sys.executable}
    assert set(table["root"]) == {str(folder / "photos")} and set(table["preset"]) == {"small"}
    assert set(table["cwd"]) == {"notebooks"}, "as in JupyterLab"
    assert str(path) in printed and "[2/2] 02_second" in printed and "01_first" in printed

    figure, slider = ((out / f"{name}.html").read_text() for name in ("01_first", "02_second"))
    assert "data:image/png;base64," in figure and "Live widget" in slider
    for page in (figure, slider):
        assert "<script" not in page
        assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(["']?http""", page)

    times = {file: os.stat(file).st_mtime_ns for file in out.glob("0*")}
    walk(folder, parameters={"epochs": 3})
    assert capsys.readouterr().out.count("reused") == 2
    assert times == {file: os.stat(file).st_mtime_ns for file in out.glob("0*")}

    write_notebook(folder, "02_second", SLIDER, "assert True")
    walk(folder, parameters={"epochs": 3})
    assert re.findall(r"\] (\w+) .*reused", capsys.readouterr().out) == ["01_first"]


def test_executes_again_after_a_change_of_data_or_code_or_a_lost_page(folder, capsys):
    write_notebook(folder, "01_first", 'open(root + "/made.txt", "w").close()')
    out = walk(folder).parent

    def is_reused():
        capsys.readouterr()
        walk(folder)
        return "reused" in capsys.readouterr().out

    assert is_reused(), "what the notebook itself adds to the data set is no change"
    (folder / "photos" / "new.jpg").touch()
    assert not is_reused() and is_reused()
    (folder / "package" / "model.py").touch()
    assert not is_reused()
    (out / "01_first.html").unlink()
    assert not is_reused()
    (out / "01_first.ipynb").write_text('{"cells": [')
    assert not is_reused()


@pytest.mark.parametrize(
    ("code", "told"),
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
def test_a_notebook_that_fails_is_one_line_that_names_its_copy(folder, monkeypatch, code, told):
    monkeypatch.setattr(road, "CELL_TIMEOUT", 15)
    if "sleep" in code:
        monkeypatch.setattr(road, "CELL_TIMEOUT", 3)
    write_notebook(folder, "01_bad", code)
    with pytest.raises(InputError) as caught:
        walk(folder)
    copy = folder / "runs" / "a {b}" / "01_bad.ipynb"
    assert told in str(caught.value) and str(copy) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert nbformat.read(copy, 4).cells
    assert not notebooks_command.is_finished(
        folder / "notebooks" / "01_bad.ipynb", {"out": str(copy.parent)}
    )


def test_a_notebooks_own_input_error_is_passed_on(folder):
    told = "images.txt:3: no such image; remove the line"
    raised = f"class InputError(ValueError): ...\nraise InputError({told!r})"
    write_notebook(folder, "01_bad", raised)
    with pytest.raises(InputError) as caught:
        walk(folder)
    assert str(caught.value) == told


def test_a_notebook_that_writes_no_table_fails(folder):
    write_notebook(folder, "01_silent", last="")
    with pytest.raises(InputError, match=r"01_silent: it wrote no .*01_silent\.csv"):
        walk(folder)


def test_bad_requests_are_refused_before_anything_runs(folder):
    with pytest.raises(InputError, match="no numbered notebooks"):
        walk(folder)
    write_notebook(folder, "01_first", more="epochs = 1\n")
    with pytest.raises(InputError, match="unknown parameter epoch; there are data, epochs, out"):
        walk(folder, parameters={"epoch": 3})
    with pytest.raises(InputError, match="epochs=three: give a value like 1"):
        walk(folder, parameters={"epochs": "three"})
    (folder / "file").touch()
    with pytest.raises(InputError, match="cannot make it"):
        walk(folder, out=folder / "file")
    bare = new_notebook(cells=[new_code_cell("data = 1", metadata={"tags": ["parameters"]})])
    bare.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": ""}
    nbformat.write(bare, folder / "notebooks" / "02_bare.ipynb")
    with pytest.raises(InputError, match=r"02_bare\.ipynb.* lacks out, preset, root"):
        walk(folder)
    assert not (folder / "runs").exists()


def test_results_of_another_question_are_not_overwritten(folder):
    write_notebook(folder, "01_first", more="sizes = (1, 2)\n")
    with pytest.raises(InputError):
        walk(folder, parameters={"sizes": "x"})
    walk(folder, parameters={"sizes": "(3, 4)"})
    walk(folder, parameters={"sizes": (3, 4)})
    with pytest.raises(InputError, match=r"holds results of preset=small, not paper"):
        walk(folder, preset="paper", parameters={"sizes": (3, 4)})
    with pytest.raises(InputError, match=r"holds results of root=.*photos, not .*other"):
        walk(folder, root=folder / "other", parameters={"sizes": (3, 4)})
    with pytest.raises(InputError, match="holds results of sizes="):
        walk(folder)


def test_status_line_on_a_terminal_and_in_a_log(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    line = notebooks_command.StatusLine("[1/5] 01_first")
    line.write("epoch 1\repoch 2 " + 100 * "x")
    shown = "[1/5] 01_first  0:00  epoch 2 " + 100 * "x"
    assert capsys.readouterr().out == "\r\x1b[K" + shown[:39]

    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    line = notebooks_command.StatusLine("[1/5] 01_first")
    for text in ("\n", "one\ntwo\n", "three\n"):
        line.write(text)
    line.show("done")
    assert capsys.readouterr().out == "[1/5] 01_first  0:00  two\n[1/5] 01_first  0:00  done\n"
