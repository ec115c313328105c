"""Every notebook, executed by papermill as `make run` does it, with the preset tiny."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from ramslib.data.datasets import preparation
from ramslib.experiments.notebooks import check_executed, run_notebooks
from ramslib.explorer.page import _write_kernel_spec
from ramslib.training.forks import forking

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small dataset in the CUB layout."""
    return preparation("diagnostic").write_diagnostic_set(
        tmp_path_factory.mktemp("data") / "birds",
        species=3,
        train_per_species=12,
        test_per_species=4,
        image_size=(120, 160),
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory, root):
    """The folder of all notebooks over that dataset."""
    folder = tmp_path_factory.mktemp("notebooks") / "out"
    methods = {"methods": ["plain ViT", "TransFG", "RAMS-Trans"]}
    ablations = {"ablations": {"threshold": [1.2]}, "trained": [1.2]}  # one run for both
    with forking():
        run_notebooks("cub", root, folder, "tiny", methods | ablations | {"visible_steps": 2})
    return folder


def call(command, folder):
    """Run a command in a folder, outside of this test run."""
    outside = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(command, env=outside, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def finished_runs(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/results.csv")}


def test_one_table_holds_the_results_of_every_notebook(out):
    results = pd.read_csv(out / "results.csv")
    assert results["notebook"].nunique() == 8
    trained = results[results["notebook"] == "02_train_two_gpus"]
    assert list(trained["output"]) == ["scale 1", "scale 2", "mean softmax", "mean logits"]
    assert (trained["images"] == 12).all()
    with_accuracy = results[results["top1"].notna() & results["output"].notna()]
    assert with_accuracy["checkpoint"].isin(["best", "last"]).all()


def test_notebooks_share_the_run_that_they_have_in_common(out):
    # two scales, one scale, TransFG, the faster ones for as long as the slowest, another threshold;
    # two short ones of notebook 0
    assert 6 <= len(finished_runs(out)) <= 9


def test_an_idea_in_a_cell_is_trained_and_kept_with_its_run(out):
    (copy,) = out.glob("runs/*/sources/*-ideas.py")
    assert copy.read_text() == (out / "ideas.py").read_text()
    results = pd.read_csv(out / "results" / "00_the_method.csv")
    assert set(results["proposal"]) == {"DPPM", "my idea"}
    shown = nbformat.read(out / "00_the_method.ipynb", 4)
    assert any("the run of notebook 2" in str(cell.get("outputs")) for cell in shown.cells)


@pytest.mark.parametrize("number", range(8))
def test_every_page_has_its_figures_inside(out, number):
    (page,) = out.glob(f"{number:02d}_*.html")
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert '"image/png"' in page.with_suffix(".ipynb").read_text(), "figures are shown"
    assert "<script src=" not in text and "$$" not in text
    if number == 0:
        assert text.count("data:image/svg+xml") > 10, "the drawing and the equations"
        assert 'href="01_data_preparation.html"' in text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("03_ablation_scales", ["-p", "scales", "[1,2]", "-p", "seeds", "[0]"]),
        ("04_ablation_threshold", ["-p", "thresholds", "[0.8, 1e0]"]),
        ("04_ablation_threshold", ["-y", "thresholds: [0.8, 1e0]\nsettings: {seed: 0}"]),
    ],
    ids=["scales", "thresholds", "yaml"],
)
def test_plain_papermill_reads_parameters_in_any_folder(out, root, tmp_path, name, options):
    before = finished_runs(out)
    common = {"data": "cub", "root": root, "out": out, "preset": "tiny"}
    common = [part for pair in common.items() for part in ("-p", *pair)]
    copy = tmp_path / "copy.ipynb"
    papermill = ["papermill", NOTEBOOKS / f"{name}.ipynb", copy, "-k", "python3"]
    call([*papermill, *common, *options], tmp_path)
    check_executed(nbformat.read(copy, 4))
    assert finished_runs(out) == before, "no new run was needed"
    assert list(tmp_path.iterdir()) == [copy], "results are below out"


def test_every_cell_runs_again_over_what_is_there(out, tmp_path, monkeypatch):
    """nbval executes the executed copies, cell by cell, as a person's second Run All does.

    Kernels are forks: to import everything once more in each takes most of the time.
    """
    before = finished_runs(out)
    options = ["--nbval-lax", "--nbval-cell-timeout=600", "-qq", "--override-ini=addopts="]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    monkeypatch.setenv("JUPYTER_PATH", "")
    with forking():
        _write_kernel_spec(tmp_path)
        call(["pytest", *options, *sorted(out.glob("0*.ipynb"))], tmp_path)
    assert finished_runs(out) == before
