"""Every notebook, executed by papermill as `make run` does it, with the settings named tiny."""

import pandas as pd
import pytest

from ramslib.data.diagnostic import write_diagnostic_set
from ramslib.experiments.road import run_road


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a whole road over a small data set in the CUB layout."""
    folder = tmp_path_factory.mktemp("road")
    root = write_diagnostic_set(
        folder / "data",
        species=3,
        train_per_species=12,
        test_per_species=4,
        image_size=(120, 160),
    )
    methods = {"methods": ["plain ViT", "TransFG", "RAMS-Trans"]}
    ablations = {"ablations": {"threshold": [1.2]}, "trained": [1.2]}  # one cell for both
    run_road("cub", root, folder / "out", "tiny", methods | ablations)
    return folder / "out"


def test_one_table_holds_the_results_of_every_notebook(out):
    results = pd.read_csv(out / "results.csv")
    assert results["notebook"].nunique() == 6
    trained = results[results["notebook"] == "02_train_two_gpus"]
    assert list(trained["scale"]) == ["scale 1", "scale 2", "mean softmax", "mean logits"]
    assert (trained["images"] == 12).all()


def test_notebooks_share_the_run_that_they_have_in_common(out):
    cells = [cell for cell in (out / "cells").iterdir() if (cell / "results.csv").exists()]
    # two scales, one scale, TransFG, the faster ones for as long as the slowest, another threshold
    assert 4 <= len(cells) <= 7


@pytest.mark.parametrize("number", range(1, 7))
def test_every_page_has_its_figures_inside(out, number):
    (page,) = out.glob(f"{number:02d}_*.html")
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "<script src=" not in text
