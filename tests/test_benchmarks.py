"""The benchmarks run, and what they compare with computes the same; nothing is timed here."""

import copy
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ROOT, draw_photos, tiny_config

from benchmarks import curves, figures, gpu, off_center
from benchmarks.__main__ import main
from benchmarks.literal import LiteralRAMS
from benchmarks.step import build, in_own_process, training_step
from benchmarks.timing import is_met, ratios, row
from ramslib.attention import STRENGTHS
from ramslib.data.datasets import preparation
from ramslib.data.readers import read_cub
from ramslib.data.transforms import open_image
from ramslib.errors import InputError
from ramslib.training.trainer import train

TINY = "--backbones test_vit test_vit --repeats 1 --threads 1 --size 32 --batches 1 2".split()


def opinionated(scales):
    torch.manual_seed(0)
    model = build("test_vit", 64, scales)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("scales", [2, 3])
def test_the_literal_implementation_computes_the_same(scales):
    model = opinionated(scales)
    literal = LiteralRAMS(copy.deepcopy(model.backbone), copy.deepcopy(model.classifier), scales)
    pixels = torch.rand(3, 3, 64, 64)
    output = model(pixels)
    assert len(output.boxes[1].unique(dim=0)) > 1, "scale 2 sees a part of the image"
    for one, other in zip(literal(model.preprocess(pixels)[0]), output.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_all_ways_to_train_take_the_same_step():
    model, pixels = opinionated(2).eval(), torch.rand(3, 3, 64, 64)
    normalized = model.preprocess(pixels)[0]
    literal = LiteralRAMS(copy.deepcopy(model.backbone), copy.deepcopy(model.classifier), 2)
    for each, way, images in ((model, "workbench", pixels), (literal, "literal", normalized)):
        before = each.classifier.weight.clone()
        training_step(each, way, images, 2)()
        assert not torch.equal(each.classifier.weight, before)
    theirs = dict(literal.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, atol=1e-5, rtol=1e-3)


def test_a_step_in_a_process_of_its_own():
    told = in_own_process("literal", backbone="test_vit", size=64, steps=1, threads=1)
    assert told["seconds"] > 0 and 1 < told["MB"] < 2000


def test_a_process_that_fails_tells_why():
    with pytest.raises(RuntimeError, match="invalid choice: 'imagined'"):
        in_own_process("imagined")


def test_the_table(tmp_path, capsys, monkeypatch):
    for module in (figures, curves):  # the processes themselves: above
        monkeypatch.setattr(module, "in_own_process", lambda *_, **__: {"seconds": 1.0, "MB": 2.0})
    short = partial(figures.images_per_second, each=1)
    monkeypatch.setattr(figures, "images_per_second", short)
    photos = draw_photos(tmp_path / "photos")
    run = train(tiny_config(photos, epochs=1), tmp_path / "run")
    table = main([*TINY, "--long", "--out", str(tmp_path), "--run", str(run)])
    kept = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    assert kept["figure"].tolist() == table["figure"].tolist()
    assert len(table) == (4 + 1 + 2) * len(STRENGTHS) + 4 + 2 + 4 + 2
    assert len(pd.read_csv(tmp_path / "curves.csv")) == 14
    assert (tmp_path / "curves.svg").read_text().count("number of") == 4
    assert (table["ratio"].notna() & (table["lowest"] <= table["highest"])).all()
    lines = capsys.readouterr().out.splitlines()
    assert "1 threads, torch" in kept["machine"][0] and f"{kept['machine'][0]} " in lines


def test_results_are_kept_and_compared_with_the_last_one(tmp_path, capsys, monkeypatch):
    def figures_of(*values):
        return {"inference": lambda options: [row("speed", "<= 1", list(values), [1.0, 1.0])]}

    found = []
    for number, values in enumerate([(1.0, 1.2), (1.1, 1.3), (2.0, 2.1)]):
        monkeypatch.setattr("benchmarks.__main__.FIGURES", figures_of(*values))
        monkeypatch.setattr("time.strftime", lambda _, number=number: f"2026010{number}")
        found.append(main(["--out", str(tmp_path), "--threads", "1"]).iloc[0])
    assert pd.isna(found[0]["before"]) and [each["change"] for each in found] == ["", "", "higher"]
    assert [each["before"] for each in found[1:]] == pytest.approx([1.1, 1.2])
    kept = [json.loads(path.read_text()) for path in sorted((tmp_path / "history").iterdir())]
    assert len(kept) == 3 and all(each["commit"] and each["machine"] for each in kept)
    assert kept[2]["rows"][0]["ratio"] == pytest.approx(2.05)
    lines = capsys.readouterr().out.splitlines()
    assert f"compared with {kept[0]['commit']}" in lines[3] and lines[-2].endswith("than 1.2000")
    assert lines[-1] == "inference: 0 s"
    monkeypatch.setattr("benchmarks.__main__.machine", lambda: "another one")
    assert pd.isna(main(["--out", str(tmp_path), "--threads", "1"])["before"][0])


def test_ratios_are_those_of_pairs():
    calls = []
    first, second = ratios(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert len(first) == len(second) == 3
    assert calls == list("abbaabba")
    told = row("x", "<= 1.5", [1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (told["ratio"], told["lowest"], told["highest"], told["met"]) == (2, 1, 3, "no")
    told = [is_met(1.0, wanted) for wanted in ("<= 1", "< 1", ">= 1", "")]
    assert told == ["yes", "no", "yes", ""]


LACKING = """
onnx onnxruntime onnxscript IPython ipykernel ipywidgets jupyter_client jupyterlab matplotlib
nbconvert nbformat optuna papermill psutil seaborn sklearn sqlalchemy tensorboard voila
""".split()
BLOCKED = f"""
import sys
sys.modules |= dict.fromkeys({LACKING})  # importing one raises ModuleNotFoundError
from benchmarks.gpu import main
main(sys.argv[1:])
"""


def test_the_gpu_script_runs_on_a_cpu_without_what_cuda_images_lack(tmp_path):
    photos = draw_photos(tmp_path / "photos")
    words = ["--device", "cpu", "--out", tmp_path / "out", "--photos", photos, "--data", "folder"]
    words += ["--seeds", "1", "--workers", "0", "--commit", "abc"]
    command = [sys.executable, "-c", BLOCKED, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert (report["errors"], report["commit"], report["card"]) == ([], "abc", "none")
    assert len(report["checks"]) == 13 and {each["met"] for each in report["checks"]} == {"yes"}
    assert {each["met"] for each in report["figures"]} == {"not measured"}
    assert {each["ratio"] for each in report["figures"]} == {None} and len(report["figures"]) == 14
    assert [each["model"] for each in report["evidence"]] == list(gpu.MODELS)
    assert {each["images"] for each in report["evidence"]} == {15}
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert table.count("| not measured | not measured |") == 14 and "two scales | 32 | 1 |" in table


def test_what_is_asked_of_a_gpu(monkeypatch):
    """Torch's counters of memory and of waits, here without a GPU."""
    calls, allocated = [], [5_000_000]
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 25_000_000)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", calls.append)
    on_gpu = SimpleNamespace(device="cuda", calls=2)
    assert gpu.peak_memory(lambda: calls.append("step"), on_gpu) == 20
    assert calls == ["synchronize", "reset_peak_memory_stats", "step", "synchronize"]
    calls.clear()
    gpu.waited(lambda: calls.append("step"), on_gpu)()
    assert calls == ["step", "step", "synchronize"]
    calls.clear()
    with gpu.count_waits("cuda") as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)
    assert calls == ["warn", "default"] and len(found) == 1
    assert found[0].startswith("test_benchmarks.py:")


def test_a_part_that_fails_is_a_line_and_the_others_run(tmp_path, monkeypatch):
    def broken(options):
        yield gpu.check("first", "<= 1", 2)
        raise RuntimeError("CUDA out of memory")

    for parts in ("FIGURES", "CHECKS"):
        monkeypatch.setattr(gpu, parts, (broken,) if parts == "CHECKS" else ())
    report = gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    assert report["errors"] == ["broken: RuntimeError: CUDA out of memory"]
    assert [each["met"] for each in report["checks"]] == ["no"] and report["evidence"] == []
    assert "Error: broken" in (tmp_path / "gpu.md").read_text()


def test_photos_on_larger_canvases_keep_their_objects(tmp_path, monkeypatch):
    monkeypatch.delenv(off_center.FOLDER, raising=False)
    with pytest.raises(InputError, match="name one in the variable OFF_CENTER"):
        off_center.read_cub(tmp_path)
    monkeypatch.setenv(off_center.FOLDER, str(tmp_path / "canvases"))
    counts = {"species": 2, "train_per_species": 3, "test_per_species": 2}
    root = preparation("diagnostic").write_diagnostic_set(tmp_path / "birds", **counts)
    photos, canvases = read_cub(root), off_center.read_cub(root)
    places = set()
    for photo, canvas in zip(photos.itertuples(), canvases.itertuples(), strict=True):
        assert (photo.label, photo.split) == (canvas.label, canvas.split)
        here, there = (open_image(each.path) for each in (photo, canvas))
        assert np.allclose(np.array(there.size) / here.size, off_center.LARGER, atol=0.01)
        boxes = [tuple(map(int, (r.left, r.top, r.right, r.bottom))) for r in (photo, canvas)]
        bird, moved = (
            np.asarray(i.crop(b), float) for i, b in zip((here, there), boxes, strict=True)
        )
        assert np.abs(bird - moved).mean() < 4, "the same pixels, but for JPEG"
        places.add((boxes[1][0] - boxes[0][0], boxes[1][1] - boxes[0][1]))
    assert len(places) == len(photos), "each at a place of its own"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "canvases").rglob("*.jpg")}
    off_center.read_cub(root)
    assert before == {path: path.stat().st_mtime_ns for path in before}, "written once"
