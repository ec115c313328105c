"""The command line: bad input is one line on stderr, exit code 2, and nothing is lost."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ROOT, draw_photos, tiny_config

from ramslib.__main__ import main
from ramslib.config import Config
from ramslib.training.launch import overrides
from ramslib.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Photos, a finished run and one that was cut short, in one folder."""
    folder = tmp_path_factory.mktemp("world")
    photos = draw_photos(folder / "photos")
    config = tiny_config(photos, epochs=1)
    train(config, folder / "run")
    shutil.copytree(folder / "run", folder / "cut")
    (folder / "cut" / "results.csv").unlink()
    return folder


def settings_of(world, **changes):
    """The finished run's settings, as words of a command."""
    return overrides(tiny_config(world / "photos", epochs=1, **changes))


def fingerprint(folder):
    """Hash of every file below a folder, but locks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def refused(world, capsys):
    """Function (words) -> the one line that the command answers, having changed nothing."""

    def run(*words):
        before = fingerprint(world)
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith(("usage:", "  "))]
        assert code == 2, (words, out, err)
        assert len(lines) == 1 and "error: " in lines[0], (words, err)
        assert "Traceback" not in err and "--debug shows" not in err, (words, err)
        after = fingerprint(world)
        assert {path: after.get(path) for path in before} == before, words
        return lines[0]

    return run


WRONG = {
    "data": ["cup", ""],
    "image_size": ["0", "-32", "33", "32.5", "big", "32,", "32,32,32", "[]", "none", "true", "1e9"],
    "highres_size": ["0", "-1", "x", "48,0", "{}", "99999999"],
    "crop_fraction": ["0", "1.5", "-1", "nan", "inf", "half"],
    "augment": ["", "Flip", "rand-x", "autoaugmented"],
    "normalization": ["imagenet21k", ""],
    "validation_fraction": ["-0.1", "0.6", "nan", "all"],
    "test_fraction": ["0", "0.95", "nan", "all"],
    "allow_missing": ["maybe", "2"],
    "upsampling": ["0", "-1", "x"],
    "workers": ["-1", "1.5", "many", "100000"],
    "backbone": [
        "",
        "resnet18",
        "vit_smal_patch14_dinov2",
        "swin_tiny_patch4_window7_224",
        "cait_s24_224",
    ],
    "region_size": ["0", "x"],
    "margin": ["-1", "x"],
    "keep_aspect": ["maybe", "2"],
    "lists": ["nowhere"],
    "year": ["2016", "x"],
    "model": ["", "resnet", "TransFG"],
    "patch_stride": ["0", "-8", "8", "1.5", "x"],
    "pretrained": ["", "nowhere.safetensors", "of-line"],
    "pos_embed_resize": ["bilinear"],
    "final_norm": ["perhaps", "1", "none"],
    "scales": ["0", "-1", "1.5", "two", "1000", "none"],
    "strength": ["rollout", "", "last"],
    "threshold": ["nan", "inf", "high", "1,nan", "[[1]]", "none", "{}", "true"],
    "proposal": ["dppm", ""],
    "class_token": ["per-scale"],
    "legacy_boxes": ["maybe"],
    "align_corners": ["2"],
    "drop_path": ["1", "-0.1", "x"],
    "dropout": ["1", "-0.1", "x"],
    "grad_checkpointing": ["maybe", "2"],
    "steps": ["-1", "1.5", "x"],
    "loss": ["mean", ""],
    "contrastive_weight": ["-1", "nan", "x"],
    "contrastive_margin": ["-1.1", "1.5", "x"],
    "label_smoothing": ["1", "-1", "nan"],
    "epochs": ["0", "-3", "1.5", "ten", "none", "[3]"],
    "batch_size": ["0", "-4", "1000", "4.5", "x"],
    "grad_accum_steps": ["0", "4", "x"],
    "optimizer": ["adamx", "", "sdg"],
    "learning_rate": ["0", "-1", "nan", "inf", "fast", "none"],
    "head_lr_scale": ["0", "-1", "inf", "x"],
    "weight_decay": ["-1", "nan", "x"],
    "momentum": ["-1", "x"],
    "layer_decay": ["0", "1.1", "x"],
    "warmup_steps": ["-1", "1.5", "x"],
    "clip_grad_norm": ["-1", "nan", "x"],
    "frozen_blocks": ["-1", "7", "x"],
    "sampling": ["even", "1", "none"],
    "amp": ["fp8", "float16", ""],
    "compile": ["maybe", "1"],
    "ema_decay": ["1", "-1", "x"],
    "patience": ["-1", "0.5", "x"],
    "seed": ["-1", "1.5", "x", str(2**70), "9" * 5000],
}


@pytest.mark.slow
def test_every_setting_refuses_what_it_cannot_be(world, refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert set(WRONG) | {"root"} == set(Config.names())
    base = settings_of(world)
    for name, values in WRONG.items():
        for value in values:
            line = refused("train", "--run", world / "new", *base, f"{name}={value}")
            told = (name, name.replace("_", " "), value, value.partition("_")[0])
            assert any(word in line.lower() for word in told), line


@pytest.mark.slow
def test_a_typo_is_answered_with_the_nearest_name(world, refused):
    for name in Config.names():
        typo = name[:-1] + "xe"
        line = refused("train", "--run", world / "new", f"{typo}=1")
        assert f"unknown setting {typo!r}; " in line
        assert "did you mean " in line or len(name) < 5
    assert "did you mean 'epochs'" in refused("data", "epoks=1")
    assert "did you mean 'epochs'" in refused("describe-data", "EPOCHS=1")


COMMANDS = [
    "",
    "trian --run x",
    "train",
    "train --run",
    "train --run x --bogus",
    "train --run x --epochs 3",
    "train --run x epochs",
    "train --run x =3",
    "train --run x --preset",
    "train --run x --preset papers",
    "train --run x --preset paper --config c",
    "train --run x --config missing.json",
    "train --run x --config .",
    "train --run x --save-every soon",
    "train epochs=3",
    "describe-data epochs",
    "data --run x",
    "train --run x --preset tiny --config c",
    "train --run x --processes two",
    "predict",
    "predict a.png",
    "predict --run missing a.png",
    "predict --run x",
    "export",
    "export --run missing --out x.pt2",
    "export --run . --out x.onnx",
    "sweep",
    "sweep --out",
    "sweep --out x data=folder root=missing",
    "sweep --out x seed",
    "sweep --out x seed=0 seed=x",
    "sweep --out x seed=x seed=0",
    "sweep --out x seed=0 sed=1",
    "sweep --out x --processes two",
    "sweep --out x --preset papers",
    "sweep --out x --config missing.json",
    "sweep --out x --storage",
    "report",
    "report missing",
    "report .",
    "report --run x",
    "notebooks --bogus",
    "road preset",
    "trust",
    "trust missing",
    "--bogus",
    "-x train",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_out_of_shape(world, refused, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(*command.split())
    assert list(tmp_path.iterdir()) == []


def test_configuration_files_out_of_shape(world, refused, tmp_path):
    path = tmp_path / "config.json"
    texts = ["", "{", "[]", "3", '"x"', "null", '{"epoks": 3}', '{"epochs": "x"}', '{"config": []}']
    texts += ['{"epochs": [1, 2]}', '{"threshold": {}}', '{"config": {"epoks": 1}}', "[" * 99999]
    texts += ["\udcff", '{"image_size": [32, "x"]}', '{"seed": 1e400}', '{"amp": null}']
    for text in texts:
        path.write_text(text, errors="surrogateescape")
        assert str(path) in refused("train", "--run", world / "new", "--config", path)


@pytest.mark.slow
def test_data_out_of_shape(world, refused, tmp_path):
    def make(name, change):
        shutil.copytree(world / "photos", tmp_path / name)
        change(tmp_path / name)

    one = Path("train", "bird 0", "1.png")
    make("no test", lambda root: shutil.rmtree(root / "test"))
    make("one class", lambda root: [shutil.rmtree(path) for path in root.glob("*/bird [12]")])
    make("empty class", lambda root: [p.unlink() for p in (root / "train" / "bird 1").iterdir()])
    make("cut photo", lambda root: (root / one).write_bytes((root / one).read_bytes()[:200]))
    make("text photo", lambda root: (root / one).write_text("none"))
    make("empty photo", lambda root: (root / one).write_bytes(b""))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    base = settings_of(world)
    for name in (*(path.name for path in tmp_path.iterdir()), "missing"):
        words = [*base, f"root={tmp_path / name}"]
        assert name in refused("train", "--run", world / f"run {name}", *words, "workers=1")
    for data in ("cub", "cars", "dogs", "nabirds", "aircraft", "flowers", "pets", "inaturalist"):
        assert "photos" in refused("data", f"data={data}", f"root={world / 'photos'}")
        assert "missing" in refused("data", f"data={data}", f"root={tmp_path / 'missing'}")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.mark.slow
def test_weights_and_checkpoints_that_are_none(world, refused, tmp_path):
    planted, folder = Payload(tmp_path / "executed"), tmp_path / "files"
    folder.mkdir()
    sound = (world / "cut" / "last.safetensors").read_bytes()
    for name, content in {
        "pickle": pickle.dumps(planted),
        "empty": b"",
        "text": b"none",
        "cut": sound[:5000],
        "turned": sound[::-1],
    }.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        (folder / f"{name}.pth").write_bytes(content)
        (folder / f"{name}.npz").write_bytes(content)
    torch.save({"model": planted}, folder / "planted.pth")
    np.savez(folder / "objects.npz", cls=np.array([planted], dtype=object))
    with zipfile.ZipFile(folder / "outside.npz", "w") as archive:
        archive.write(folder / "objects.npz", "../../executed")
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3)}, folder / "foreign.safetensors")
    base = settings_of(world)
    files = sorted(folder.iterdir())
    assert len(files) == 19
    for path in files:
        line = refused("train", "--run", world / "new", *base, f"pretrained={path}")
        assert path.name in line
    for path in files:
        if path.suffix == ".safetensors":
            shutil.copy(path, world / "cut" / "last.safetensors")
            assert "last.safetensors" in refused("train", "--run", world / "cut", *base)
            shutil.copy(path, world / "cut" / "best.safetensors")
            assert "best.safetensors" in refused(
                "predict", "--run", world / "cut", world / "photos"
            )
    (world / "cut" / "last.safetensors").write_bytes(sound)
    (world / "cut" / "best.safetensors").unlink()
    assert "best.safetensors" in refused("predict", "--run", world / "cut", world / "photos")
    assert not (tmp_path / "executed").exists()


def test_folders_that_hold_something_else(world, refused):
    base = settings_of(world)
    for run in ("run", "cut"):
        line = refused("train", "--run", world / run, *base, "seed=3")
        assert "seed 0 there, 3 here" in line
    assert "choose another" in refused("train", "--run", world / "run" / "config.json", *base)
    other = world / "other photos"
    draw_photos(other, test=6)
    assert "data differ" in refused("train", "--run", world / "cut", *base, f"root={other}")
    shutil.rmtree(other)
    assert "not the folder of a run" in refused("predict", "--run", world / "photos", "x.png")


DAMAGED = {
    "config.json": ["", "{", "[]", "3", "{}", '{"config": {}}', '{"config": 3}', "[" * 99999],
    "table.csv": ["", "path\n", "path,label,class_name,split\na,b,c,d\n", "\0", '"'],
}
DAMAGED_RESULTS = {
    "results.csv": ["", "scale\n", "scale,weights\n1,2\n", '"'],
    "predictions_best.csv": ["", "path\n", "path,scale,rank\na,b,c\n", '"', "\0"],
}


def test_runs_with_damaged_files(world, refused, tmp_path):
    for name, texts in (DAMAGED | DAMAGED_RESULTS).items():
        for number, text in enumerate(texts):
            run = shutil.copytree(world / "run", tmp_path / f"{name} {number}")
            (run / name).write_text(text)
            assert f"{name} {number}" in refused("report", run)
            if name in DAMAGED:
                assert f"{name} {number}" in refused("predict", "--run", run, world / "photos")
            assert not (run / "report.html").exists()


def test_predictions_replace_nothing(world, refused, tmp_path, capsys):
    photo = world / "photos" / "test" / "bird 0" / "0.png"
    out, pictures = tmp_path / "out.csv", tmp_path / "pictures"
    words = ["predict", "--run", str(world / "run"), str(photo)]
    assert main([*words, "--out", str(out), "--pictures", str(pictures)]) == 0
    before = fingerprint(tmp_path)
    assert len(before) == 2 and len(pd.read_csv(out)) == 4
    assert "out.csv exists" in refused(*words, "--out", out)
    assert "0.png.png exists" in refused(*words, "--pictures", pictures)
    assert "folder does not" in refused(*words, "--out", tmp_path / "missing" / "out.csv")
    assert fingerprint(tmp_path) == before
    assert main(words) == 0
    assert "bird" in capsys.readouterr().out


EMPTY = [
    ["train", "--run", "", "epochs=1"],
    ["train", "--run", "x", "--config", ""],
    ["train", "--run", "x", "root="],
    ["predict", "--run", "", "a.png"],
    ["predict", "--run", "x", ""],
    ["predict", "--run", "x", "--out", "", "a.png"],
    ["sweep", "--out", ""],
    ["report", ""],
    ["notebooks", "--root", ""],
    ["app", "--out", ""],
]


def test_a_sweep_replaces_no_table_of_somebody_else(refused, tmp_path):
    (tmp_path / "results.csv").write_text("my own")
    line = refused("sweep", "--out", tmp_path, "data=folder", f"root={tmp_path}")
    assert str(tmp_path / "results.csv") in line and "another folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


@pytest.mark.parametrize("words", EMPTY, ids=" ".join)
def test_an_empty_path_is_refused(words, refused, tmp_path, monkeypatch):
    """An unset variable of the shell would name the current folder."""
    monkeypatch.chdir(tmp_path)
    line = refused(*words)
    assert "empty" in line or "root=" in line
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_expanded_wherever_a_path_is_given(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (
        ["report", "~/missing"],
        ["predict", "--run", "~/missing", "a.png"],
        ["train", "--run", "x", "--config", "~/missing"],
        ["describe-data", "data=folder", "root=~/missing"],
        ["export", "--run", "~/missing", "--out", "~/x.pt2"],
    ):
        assert str(tmp_path / "missing") in refused(*words)


def test_one_bad_image_among_many_is_reported_and_the_others_are_classified(
    world, tmp_path, capsys
):
    shutil.copytree(world / "photos" / "test", tmp_path / "photos")
    bad = tmp_path / "photos" / "bird 0" / "0.png"
    bad.write_text("no image")
    words = ["predict", "--run", world / "run", tmp_path / "photos", "--out", tmp_path / "out.csv"]
    assert main([str(word) for word in words]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "1 image" in line and "'error'" in line
    table = pd.read_csv(tmp_path / "out.csv")
    failed = table[table["error"].notna()]
    assert failed["path"].tolist() == [str(bad)] and str(bad) in failed["error"].iloc[0]
    assert table["path"].nunique() == 15 and len(table) == 14 * 4 + 1
    assert main([str(word) for word in words[:-2]]) == 1
    shown, errors = capsys.readouterr()
    assert str(bad) not in shown and "error" not in shown and shown.count("\n") == 14 * 4 + 1
    assert errors.splitlines()[0].startswith(f"error: {bad}: ") and errors.count("\n") == 2


def test_the_program_and_the_module_behave_alike():
    """Both end quickly, write warnings as one line, and need no torch to complain."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["ramslib"].partition(":")
    script = f"import sys; from {module} import {function}; {function}()"
    for start in (["-c", script], ["-m", "ramslib"]):
        command = [sys.executable, *start, "describe-data", "EPOCHS=1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and "did you mean 'epochs'" in done.stderr


def test_help_is_fast():
    code = """
import sys
from ramslib.__main__ import main
try:
    main(["--help"])
except SystemExit:
    pass
print({"torch", "pandas", "numpy", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n") and done.stderr == ""
    assert "describe-data" in done.stdout and "road" not in done.stdout


def test_debug_shows_the_traceback_wherever_it_stands(world):
    for words in (["--debug", "describe-data", "epoks=1"], ["data", "epoks=1", "--debug"]):
        with pytest.raises(ValueError, match="did you mean 'epochs'"):
            main(words)


def test_an_unexpected_error_is_one_line_that_says_where(world, capsys, monkeypatch):
    def fail(*args):
        raise KeyError("some\nthing")

    monkeypatch.setattr("ramslib.data.datasets.load_table", fail)
    assert main(["data"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: KeyError: ") and line.count("\n") == 1
    assert "test_main.py:" in line and "--debug" in line


def test_an_error_in_a_file_of_ones_own_names_its_line(world, tmp_path, capsys):
    file = tmp_path / "ideas.py"
    file.write_text("import torch\n\n\ndef birds(root):\n    return torch.zeros(3).view(7)\n")
    assert main(["describe-data", f"data={file}:birds"]) == 2
    assert "RuntimeError: " in (line := capsys.readouterr().err) and "(ideas.py:5; " in line


@pytest.mark.slow
def test_settings_may_stand_anywhere(world, capsys):
    words = ["train", *settings_of(world)[:3], "--run", world / "again", *settings_of(world)[3:]]
    assert main([str(word) for word in words]) == 0
    again = json.loads((world / "again" / "config.json").read_text())
    assert again["config"] == json.loads((world / "run" / "config.json").read_text())["config"]
    one, other = (load_file(world / name / "last.safetensors") for name in ("run", "again"))
    assert all(one[key].equal(other[key]) for key in one)
    words = ["train", "--run", world / "third", "--config", world / "run" / "config.json"]
    assert main([str(word) for word in words]) == 0
    assert main(["data", *settings_of(world)]) == 0
    assert "train" in capsys.readouterr().out


def test_the_model_card_tells_what_it_is(world):
    card = (world / "run" / "README.md").read_text()
    results = pd.read_csv(world / "run" / "results.csv")
    row = results.iloc[0]
    assert f"{row['top1']:.1f} ± {row['standard_error']:.1f}" in card
    for word in (
        "test_vit",
        "random initialization",
        "folder, 18 train, 6 validation, 15 test",
        "3 classes",
        "ramslib.load(",
        "predict --run",
        "seed 0",
        "torch",
    ):
        assert word in card, word
    assert max(map(len, card.splitlines())) < 400
