"""Every notebook, executed by papermill as `make run` does it, with the settings named tiny."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from ramslib.data.datasets import preparation
from ramslib.experiments.notebooks import run_notebooks


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of all notebooks over a small dataset in the CUB layout."""
    folder = tmp_path_factory.mktemp("notebooks")
    root = preparation("diagnostic").write_diagnostic_set(
        folder / "data",
        species=3,
        train_per_species=12,
        test_per_species=4,
        image_size=(120, 160),
    )
    methods = {"methods": ["plain ViT", "TransFG", "RAMS-Trans"]}
    ablations = {"ablations": {"threshold": [1.2]}, "trained": [1.2]}  # one run for both
    run_notebooks("cub", root, folder / "out", "tiny", methods | ablations)
    return folder / "out"


def test_one_table_holds_the_results_of_every_notebook(out):
    results = pd.read_csv(out / "results.csv")
    assert results["notebook"].nunique() == 6
    trained = results[results["notebook"] == "02_train_two_gpus"]
    assert list(trained["output"]) == ["scale 1", "scale 2", "mean softmax", "mean logits"]
    assert (trained["images"] == 12).all()


def test_notebooks_share_the_run_that_they_have_in_common(out):
    runs = [run for run in (out / "runs").iterdir() if (run / "results.csv").exists()]
    # two scales, one scale, TransFG, the faster ones for as long as the slowest, another threshold
    assert 4 <= len(runs) <= 7


@pytest.mark.parametrize("number", range(1, 7))
def test_every_page_has_its_figures_inside(out, number):
    (page,) = out.glob(f"{number:02d}_*.html")
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "<script src=" not in text


def test_every_cell_runs_again_over_what_is_there(out):
    """nbval executes the executed copies, cell by cell, as a person's second Run All does."""
    results = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/results.csv")}
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600", "-qq"]
    options += ["--override-ini=addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *sorted(out.glob("0*.ipynb"))]
    outside = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(command, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert results == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/results.csv")}
