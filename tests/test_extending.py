"""docs/extending.md: each of its files runs as written: built, trained, resumed, predicted."""

import os
import re
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import draw_photos, finish_training, read_log, same_run, start_training, tiny_config

import ramslib
from ramslib import extensions
from ramslib.data.datasets import load_table
from ramslib.data.transforms import ImageTransform, open_image
from ramslib.extensions import resolve
from ramslib.training.optimization import backward_scales
from ramslib.training.trainer import train

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`(\w+\.py)`\n\n```python\n(.+?)```$", PAGE, re.S | re.M))
SETTINGS = {  # each file of the page: the setting that it is for
    "with_context": "proposal",
    "component": "strength",
    "ranking": "loss",
    "focus": "loss",
    "from_csv": "data",
    "center_zoom": "model",
}


@pytest.fixture
def ideas(tmp_path, monkeypatch):
    """Function name -> reference to the page's file of that name; nothing is trusted yet."""
    monkeypatch.setattr(extensions, "TRUSTED", tmp_path / "trusted")
    folder = tmp_path / "ideas"
    folder.mkdir()
    for name, code in FILES.items():
        (folder / name).write_text(code)
    return lambda name: f"{folder / name}.py:{name}"


@pytest.fixture
def config(tmp_path):
    """A configuration of a second over a folder of photos that also has a list.csv."""
    root = draw_photos(tmp_path / "photos")
    paths = sorted(root.rglob("*.png"))
    columns = [[p.relative_to(root), p.parent.name, p.parent.parent.name] for p in paths]
    table = pd.DataFrame(columns, columns=["file", "species", "part"])
    table.to_csv(root / "list.csv", index=False)
    return tiny_config(root, epochs=1)


def batch(config, count=4):
    """Pixels and labels of the first training images."""
    table = load_table(config)
    rows = table[table["split"] == "train"].iloc[:: max(1, len(table) // (2 * count))][:count]
    transform = ImageTransform(config.highres_size, config.crop_fraction)
    pixels = torch.stack([transform(open_image(path)) for path in rows["path"]])
    return pixels, torch.tensor(rows["label"].to_numpy())


def test_the_page_has_a_file_for_every_setting():
    assert {Path(name).stem for name in FILES} == set(SETTINGS)
    assert set(SETTINGS.values()) == set(extensions.SETTINGS)
    assert max(len(code.splitlines()) for code in FILES.values()) <= 40, "one screen"


@pytest.mark.parametrize("name", ["with_context", "component", "center_zoom"])
def test_a_model_with_it_runs_and_learns(ideas, config, name):
    config = config.replace(**{SETTINGS[name]: ideas(name)})
    model = ramslib.build_model(config, 3).train()
    pixels, labels = batch(config)
    losses = backward_scales(model, pixels, labels, [1.0] * model.num_scales)
    assert losses.isfinite().all()
    assert model.classifier.weight.grad.abs().sum() > 0
    output = model.eval()(pixels)
    assert [logits.shape for logits in output.logits] == [(4, 3)] * 2
    assert len(output.boxes[1]) == (8 if name == "with_context" else 4)


def test_several_regions_are_the_box_and_its_surroundings(ideas):
    propose = resolve(ideas("with_context"), {}, "proposal")
    strength = torch.zeros(1, 4, 6)
    strength[0, 0, 2] = 1
    assert propose(strength, 1.0, None).tolist() == [[[0, 2, 1, 3], [0, 1, 2, 4]]]


def test_the_principal_component_finds_the_object(ideas):
    tokens = 0.1 * torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    tokens[:, 1:3, 2:4] += torch.randn(16, generator=torch.Generator().manual_seed(1))
    recorded = ramslib.RecordedScale([], (4, 5), image=torch.zeros(2, 3, 8, 10), tokens=tokens)
    values = resolve(ideas("component"), {}, "strength")(recorded)
    assert values.shape == (2, 4, 5)
    assert (values[:, 1:3, 2:4].amin(dim=(1, 2)) > values.mean(dim=(1, 2))).all()


@pytest.mark.parametrize("name", ["ranking", "focus"])
def test_a_loss_is_at_first_the_cross_entropy_and_has_a_gradient(ideas, config, name):
    loss = resolve(ideas(name), {}, "loss")
    is_joint = not getattr(loss, "per_scale", False)
    assert is_joint == (name == "ranking")
    model = ramslib.build_model(config, 3).train()
    pixels, labels = batch(config)
    losses = backward_scales(model, pixels, labels, loss)
    log = torch.tensor(3.0).log()  # the classifier starts at zero: every class has a third
    expected = 2 * log + 0.05 if is_joint else log + (2 - 1 / 3) * log
    assert torch.allclose(losses[0], expected, atol=1e-4)
    assert torch.allclose(losses[1:], log.expand(2), atol=1e-4)
    assert model.classifier.weight.grad.abs().sum() > 0


def test_the_reader_reads_what_the_folder_reader_reads(ideas, config):
    mine = load_table(config.replace(data=ideas("from_csv")))
    folder = load_table(config)
    columns = ["path", "label", "class_name"]
    both = [t.sort_values("path", ignore_index=True)[columns] for t in (mine, folder)]
    pd.testing.assert_frame_equal(*both)
    assert (mine["split"].value_counts() == folder["split"].value_counts()).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_with_it_trains_predicts_and_keeps_a_copy(ideas, config, tmp_path, name):
    run = train(config.replace(**{SETTINGS[name]: ideas(name)}), tmp_path / "run")
    source = tmp_path / "ideas" / f"{name}.py"
    (copy,) = (run / "sources").iterdir()
    assert copy.read_text() == source.read_text()
    card = (run / "README.md").read_text()
    assert name in card and str(tmp_path) not in card, "named without the folder"
    source.unlink()  # the run needs its copy alone
    image = next(Path(config.root).rglob("*.png"))
    predictions = ramslib.predict(run, [image])
    assert list(predictions["output"]) == ["scale 1", "scale 2", "mean softmax", "mean logits"]


@pytest.mark.slow
def test_all_of_it_in_two_processes_resumes_bit_identically_after_a_kill(ideas, config, tmp_path):
    names = ("from_csv", "with_context", "component", "ranking")
    config = config.replace(**{SETTINGS[name]: ideas(name) for name in names}, epochs=3)
    code, printed = finish_training(config, tmp_path / "whole", processes=2)
    assert code == 0, printed
    killed = tmp_path / "killed"
    process = start_training(config, killed, processes=2)
    while not (killed / "last.safetensors").exists():
        assert process.poll() is None, Path(f"{killed}.log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps = len(read_log(killed))
    code, printed = finish_training(config, killed, processes=2)
    assert code == 0, printed
    assert len(read_log(killed)) > steps, "killed before it was finished"
    same_run(tmp_path / "whole", killed)
