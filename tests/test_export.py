"""Exported files: they answer like the run, tell what they are, and are refused by name."""

import json
import re
import resource
import subprocess
import sys
import time
import urllib.request
import warnings
from contextlib import contextmanager, suppress

import onnx
import pandas as pd
import pytest
import torch
from tiny import ROOT, draw_photos, tiny_config

import ramslib
from ramslib.data.transforms import ImageTransform, open_image
from ramslib.errors import InputError
from ramslib.evaluation import predict as predict_table
from ramslib.model import build_model
from ramslib.runs import inference
from ramslib.runs.inference import (
    NamedOutputs,
    export_model,
    export_run,
    load,
    load_exported,
    load_model,
)
from ramslib.runs.photos import predict
from ramslib.training.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of photos and that of a run."""
    folder = tmp_path_factory.mktemp("export")
    photos = draw_photos(folder / "photos")
    return photos, train(tiny_config(photos, epochs=1), folder / "run")


@pytest.fixture(scope="module")
def exported(trained):
    """The run as an .onnx file, and what was said about it."""
    said, run = [], trained[1]
    return export_run(run, run.parent / "model.onnx", log=said.append), said


def opinionated(**changes):
    """A model whose attention and boxes differ between images."""
    torch.manual_seed(0)
    model = build_model(tiny_config(".", **{"image_size": (48, 64)} | changes), 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def noise(batch, size):
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)


# --- the program -------------------------------------------------------------------------------


def test_the_program_gives_boxes_and_logits_of_the_model_at_any_batch_size():
    model, size = opinionated(strength="rollout_mean"), (72, 96)
    program = export_model(model, size).module()
    for batch in (1, 3, 8):
        pixels = noise(batch, size)
        with torch.no_grad():
            expected, found = NamedOutputs(model)(pixels), program(pixels)
        assert found.keys() == expected.keys() and len(found) == 2 * model.num_scales
        for name in expected:
            assert found[name].shape[0] == batch
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    assert len(expected["boxes_2"].unique(dim=0)) > 2, "boxes differ: the loop was needed"


IDEAS = [
    {"image_size": (32, 48), "region_size": (48, 64), "margin": 0.1, "upsampling": 2},
    {"legacy_boxes": True, "align_corners": True, "highres_size": None, "proposal": "center"},
    {"model": "transfg", "scales": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", IDEAS, ids=lambda changes: next(iter(changes)))
def test_onnxruntime_gives_boxes_and_logits_of_the_model_at_any_batch_size(changes):
    model, size = opinionated(**changes), (72, 96)
    size = size if changes.get("highres_size", 72) else (48, 64)
    about = {"image_size": (48, 64), "classes": ["a", "\u00e9"], "temperatures": {}}
    content, run = inference._to_onnx(export_model(model, size), about)
    for batch in (1, 3, 8):
        with torch.no_grad():
            pixels = noise(batch, size)
            expected, found = NamedOutputs(model)(pixels), run(pixels)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    if model.num_scales > 1:
        assert len(expected["boxes_2"].unique(dim=0)) > 2
    assert inference.ExportedModel(content).about["classes"] == ["a", "\u00e9"]


# --- files -------------------------------------------------------------------------------------


def test_a_pt2_file_answers_like_the_run_and_tells_what_it_is(trained, tmp_path):
    photos, run = trained
    with warnings.catch_warnings(record=True) as caught:
        path, texts = export_run(run, tmp_path / "model.pt2", "last"), {"ramslib.json": ""}
    assert not [w for w in caught if ".part" in str(w.message)], "of the name of our own file"
    program = torch.export.load(path, extra_files=texts).module()
    about = json.loads(texts["ramslib.json"])
    assert about["classes"] == ["bird 0", "bird 1", "bird 2"] and about["key"].endswith("-last")
    files = sorted((photos / "test").rglob("*.png"))
    pixels = torch.stack([ImageTransform(48, 0.875)(open_image(file)) for file in files])
    with torch.no_grad():
        classes = program(pixels)["logits_2"].argmax(dim=1)
    table = pd.DataFrame({"path": list(map(str, files)), "label": 0})
    expected = predict_table(load(run, "last"), table, ImageTransform(48, 0.875))
    assert classes.tolist() == expected.query("output == 'scale 2'")["prediction"].tolist()


@pytest.mark.slow
def test_an_onnx_file_predicts_like_the_run_without_its_model(exported, trained, monkeypatch):
    photos, run = trained
    expected = predict(run, [photos], batch_size=4)
    monkeypatch.setattr("ramslib.runs.inference.build_model", None)  # must not be called
    monkeypatch.setattr("timm.create_model", None)
    found = ramslib.predict(exported[0], [photos], batch_size=5)
    assert len(found) == 39 * 4 and found["top"].nunique() > 1
    pd.testing.assert_frame_equal(found, expected, atol=1e-4, rtol=0)
    assert exported[1][0].startswith("compared with the run on 8 test photos: logits within")


@pytest.mark.slow
def test_an_onnx_file_tells_what_it_is(exported, trained):
    model = onnx.load(exported[0])
    onnx.checker.check_model(model)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}, "no operators of one runtime"
    size = model.graph.input[0].type.tensor_type.shape.dim
    assert size[0].dim_param and [side.dim_value for side in size[1:]] == [3, 48, 48]
    about = {each.key: json.loads(each.value) for each in model.metadata_props}
    loaded = load_model(trained[1])
    assert about["classes"] == loaded.classes and about["key"] == loaded.key
    assert about["output"] == "mean logits"
    assert about["resized"] == [55, 55] and about["image_size"] == [32, 32]
    assert about["mean"] == pytest.approx(loaded.model.mean.flatten().tolist())
    assert about["std"] == pytest.approx(loaded.model.std.flatten().tolist())
    assert load_exported(exported[0]).transform == loaded.transform


@pytest.mark.parametrize("name", ["model.pth", "model", "model.ONNX", "missing/model.pt2"])
def test_a_file_that_cannot_be_exported_is_refused_before_the_work(trained, tmp_path, name):
    with pytest.raises(InputError, match="ends in .pt2 or .onnx, in a folder that exists"):
        export_run(trained[1] / "missing", tmp_path / name)


@pytest.fixture
def quick(trained, monkeypatch):
    """Function (content=.., **differences): what is exported then, without tracing the run."""
    model = NamedOutputs(load(trained[1]))

    def set_program(content=b"content", **differences):
        def outputs(pixels):
            return {name: each + differences.get(name, 0) for name, each in model(pixels).items()}

        monkeypatch.setitem(inference.FORMATS, "pt2", lambda *_: (content, outputs))

    monkeypatch.setattr(inference, "export_model", lambda *_: None)
    set_program()
    return set_program


def test_exported_files_are_not_replaced(trained, quick, tmp_path):
    (tmp_path / "mine.pt2").write_text("mine")
    with pytest.raises(InputError, match="mine.pt2: give a new file"):
        export_run(trained[1], tmp_path / "mine.pt2")
    assert (tmp_path / "mine.pt2").read_text() == "mine"
    assert export_run(trained[1], tmp_path / "any name", kind="pt2").read_bytes() == b"content"


@contextmanager
def largest_file(size):
    """No file may grow beyond a size: what a full disk does to a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_export_to_a_full_disk_leaves_nothing(trained, quick, tmp_path):
    quick(bytes(200_000))
    with largest_file(100_000), pytest.raises(InputError, match="model.pt2: cannot be written"):
        export_run(trained[1], tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_differs_from_the_run_is_not_written(trained, quick, tmp_path):
    for name, difference in (("logits_2", 2e-4), ("boxes_2", 1.0), ("logits_1", torch.nan)):
        quick(**{name: difference})
        line = f"{name} of the program differs by .*, compared on 8 test photos"
        with pytest.raises(InputError, match=line):
            export_run(trained[1], tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
    quick(logits_2=5e-5)
    said = []
    export_run(trained[1], tmp_path / "model.pt2", log=said.append)
    assert said == ["compared with the run on 8 test photos: logits within 5e-05, equal boxes"]


def test_weights_of_8_bits_are_those_of_all_scales_and_their_accuracy_is_told(
    exported, trained, tmp_path, capfd
):
    """Dynamic quantization alone leaves out every layer that several scales use."""
    (photos, run), said, path = trained, [], tmp_path / "small.onnx"
    export_run(run, path, weights="int8", log=said.append)
    assert capfd.readouterr() == ("", ""), "onnxruntime logs advice"
    plain, small = onnx.load(exported[0]), onnx.load(path)
    model = load(run)
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    kinds = [node.op_type for node in small.graph.node]
    assert {node.domain for node in small.graph.node} == {""}, "ONNX's own operators alone"
    assert kinds.count("MatMulInteger") == layers * model.num_scales
    assert path.stat().st_size < 0.5 * exported[0].stat().st_size
    about = [{each.key: each.value for each in file.metadata_props} for file in (plain, small)]
    assert about[0] == about[1]
    found, before = predict(path, [photos / "test"]), predict(run, [photos / "test"])
    assert (found["probability"] - before["probability"]).abs().max() < 0.2
    table = load_model(run).table.query("split == 'test'")
    top1 = []
    for loaded in (load_exported(path), load_model(run)):
        rows = predict_table(loaded.model, table, loaded.transform).query("output == 'mean logits'")
        top1.append(f"{100 * (rows['rank'] == 0).mean():.1f} %")
    line = f"int8 on {len(table)} test photos: {top1[0]} correct, {top1[1]} before; the"
    assert said[1].startswith(line) and said[0].startswith("compared with the run on 8 test photos")


def test_weights_of_8_bits_are_refused_where_they_cannot_be_or_be_measured(trained, tmp_path):
    photos, run = trained
    for name, weights in (("a.pt2", "int8"), ("a.onnx", "int4")):
        with pytest.raises(InputError, match="give float32, or for an .onnx file int8"):
            export_run(run, tmp_path / name, weights=weights)
    elsewhere = photos.rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(
            InputError, match="its test photos, to measure int8 on, are not there; give"
        ):
            export_run(run, tmp_path / "a.onnx", weights="int8")
    finally:
        elsewhere.rename(photos)
    assert list(tmp_path.iterdir()) == []


def test_photos_that_moved_are_found_at_their_new_root(trained, quick, tmp_path):
    photos, run = trained
    elsewhere, said = photos.rename(tmp_path / "elsewhere"), []
    try:
        export_run(run, tmp_path / "one.pt2", root=elsewhere, log=said.append)
        export_run(run, tmp_path / "two.pt2", log=said.append)
    finally:
        elsewhere.rename(photos)
    assert "on 8 test photos" in said[0] and "on noise: the run's photos are not there" in said[1]


def test_random_proposals_are_refused(trained, tmp_path):
    run = train(tiny_config(trained[0], epochs=1, proposal="random"), tmp_path / "run")
    with pytest.raises(InputError, match="a file cannot hold random proposals; export a run with"):
        export_run(run, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


IDEA = """
import ramslib
import torch

@ramslib.reads(blocks=0)
def by_python(strength, threshold, recorded=None):
    side = 1 if float(strength.max()) > 3 else 2
    return torch.tensor([0, 0, side, side]).expand(len(strength), 4)
"""


@pytest.mark.slow
def test_what_a_format_cannot_hold_is_one_line(trained, tmp_path, monkeypatch, capfd):
    (tmp_path / "idea.py").write_text(IDEA)
    ideas = {"svd": {"strength": "token_pca"}, "own": {"proposal": f"{tmp_path}/idea.py:by_python"}}
    for name, idea in ideas.items():
        train(tiny_config(trained[0], epochs=1, **idea), tmp_path / name)
    capfd.readouterr()
    with pytest.raises(InputError) as refused:
        export_run(tmp_path / "svd", tmp_path / "model.onnx")
    line = "exported as onnx: aten._linalg_svd.default has no ONNX operator; if"
    assert line in str(refused.value)
    with pytest.raises(InputError, match="exported as pt2: .*; if code of your own"):
        export_run(tmp_path / "own", tmp_path / "model.pt2")
    monkeypatch.setattr(inference, "MAX_ONNX", 10_000)
    with pytest.raises(InputError, match="0.0 GB exceed what one .onnx file holds; export a .pt2"):
        export_run(trained[1], tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.glob("*.*")} == {"idea.py"}
    assert capfd.readouterr().err == "", "torch would print the whole graph"


@pytest.mark.parametrize("name", ["onnxscript", "onnxruntime"])
def test_the_extra_that_is_missing_is_named(trained, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        InputError, match=rf"{name} is not installed; pip install 'ramslib\[onnx\]'"
    ):
        export_run(trained[1], tmp_path / "model.onnx")


def test_files_that_ramslib_did_not_export_are_refused(trained, tmp_path):
    photos, run = trained
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", 1, [1])
    graph = onnx.helper.make_graph([node], "other", [value], [output])
    opset = [onnx.helper.make_opsetid("", 20)]
    other = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "model.pt2").write_bytes(b"PK")
    for name in ("other.onnx", "text.onnx", "missing.onnx", "model.pt2"):
        with pytest.raises(InputError, match=f"{name}: .*; give an .onnx file that"):
            predict(tmp_path / name, [photos])


@pytest.mark.slow
def test_properties_that_other_tools_add_do_no_harm(exported, tmp_path):
    model = onnx.load(exported[0])
    model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # its quantizer does
    onnx.save(model, tmp_path / "more.onnx")
    assert load_exported(tmp_path / "more.onnx").classes == load_exported(exported[0]).classes


# --- serving -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scales", [1, 2])
def test_the_example_of_the_documentation_serves(exported, trained, tmp_path, scales):
    (photos, run), file = trained, exported[0]
    if scales == 1:
        run = train(tiny_config(photos, epochs=1, scales=1), tmp_path / "run")
        file = export_run(run, tmp_path / "one.onnx")
    text = (ROOT / "docs" / "training.md").read_text()
    example = re.search(r"```python\n(import io.*?)```", text, re.S)[1]
    assert len(list(filter(None, example.splitlines()))) <= 23
    assert "birds.onnx" in example and "8000" in example
    port = 20_000 + time.time_ns() % 20_000
    example = example.replace("birds.onnx", str(file)).replace("8000", str(port))
    (tmp_path / "serve.py").write_text(example)
    server = subprocess.Popen([sys.executable, tmp_path / "serve.py"], stderr=subprocess.DEVNULL)
    try:
        for path in sorted((photos / "test").rglob("0.png")):
            found = post(f"http://localhost:{port}", path.read_bytes())
            row = predict(run, [path]).iloc[-1]
            assert found["class_name"] == row["class_name"]
            assert found["probability"] == pytest.approx(row["probability"], abs=2e-4)
    finally:
        server.kill()
        server.wait()


def post(address, data, seconds=60):
    """What a server answers, once it is up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(ConnectionError, urllib.error.URLError):
            with urllib.request.urlopen(address, data) as answer:
                return json.load(answer)
        time.sleep(0.2)
    raise TimeoutError(address)
