"""Using a run: its model, photos of one's own, exported programs."""

import resource
import shutil
import warnings
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import draw_photos, tiny_config

import ramslib
from ramslib.data.transforms import ImageTransform, open_image
from ramslib.errors import InputError
from ramslib.evaluation import predict as predict_table
from ramslib.model import build_model
from ramslib.runs.inference import (
    NamedOutputs,
    export_model,
    export_run,
    find_images,
    load,
    load_backbone,
    load_model,
    predict,
    save_pictures,
)
from ramslib.runs.results import read_predictions
from ramslib.training.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of photos and that of a run."""
    folder = tmp_path_factory.mktemp("inference")
    photos = draw_photos(folder / "photos")
    return photos, train(tiny_config(photos, epochs=1), folder / "run")


def test_a_loaded_model_brings_what_belongs_to_it(trained):
    photos, run = trained
    loaded = load_model(run)
    assert loaded.classes == ["bird 0", "bird 1", "bird 2"] and loaded.name == "run"
    assert loaded.transform.size == (48, 48) and not loaded.model.training
    assert loaded.table["path"].str.startswith(str(photos)).all()
    assert "best" in loaded.origin and loaded.key != load_model(run, "last").key
    inspector = ramslib.inspect(run).set_image(photos / "test" / "bird 0" / "0.png")
    assert inspector.classes == loaded.classes


def test_a_backbone_is_a_model_without_classes(tmp_path, monkeypatch):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(state, tmp_path / "test_vit.safetensors")
    monkeypatch.setattr("ramslib.runs.inference.cache_folder", lambda: tmp_path)
    loaded = load_backbone("test_vit", image_size=32, highres_size=64)
    assert loaded.classes == [] and loaded.table.empty and loaded.transform.size == (64, 64)
    assert loaded.model.settings.strength == "last_class" and loaded.origin


def test_models_go_to_the_gpu_where_there_is_one(trained, monkeypatch):
    places = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: places.append(place) or self)
    load(trained[1])
    assert places == [torch.device("cuda")]


def test_photos_are_predicted_as_in_the_test_of_the_run(trained):
    photos, run = trained
    expected = read_predictions(run)
    found = predict(run, [photos / "test"], batch_size=4)
    assert (found["error"] == "").all()
    assert len(found) == len(expected) == 15 * 4
    both = found.merge(expected, on=["path", "output"], suffixes=("", "_expected"))
    assert both["class_name"].tolist() == [f"bird {number}" for number in both["prediction"]]
    assert both["probability"].to_numpy() == pytest.approx(both["confidence"].to_numpy(), abs=1e-3)
    sides = ["top", "left", "bottom", "right"]
    for side in sides:
        np.testing.assert_allclose(both[side], both[f"{side}_expected"])


def test_files_folders_and_patterns_keep_their_order_each_once(trained, monkeypatch):
    photos, _ = trained
    monkeypatch.chdir(photos)
    found = find_images(["test/bird 1/3.png", "test/bird 1", "test/*/0.png", "**/bird 2/4.png"])
    names = [str(path) for path in found]
    assert names[0] == "test/bird 1/3.png" and len(names) == len(set(names)) == 5 + 2 + 2
    assert "train/bird 2/4.png" in names and "test/bird 0/0.png" in names
    assert len(find_images(["t*/bird 0"])) == 13, "a pattern may lead to folders"


def test_what_is_no_photo_is_left_out_of_folders_and_refused_by_name(trained, tmp_path):
    photos, run = trained
    for name in ("a.png", ".hidden.png", "__MACOSX/b.png", ".cache/c.png", "UPPER.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(photos / "test" / "bird 0" / "0.png", tmp_path / name)
    (tmp_path / "notes.txt").write_text("none")
    assert [path.name for path in find_images([tmp_path])] == ["UPPER.PNG", "a.png"]
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing.jpg", "*.gif"):
        with pytest.raises(InputError, match="no image there"):
            find_images([tmp_path / "a.png", tmp_path / name])
    with pytest.raises(InputError, match=r"notes.txt: not an image"):
        predict(run, [tmp_path / "notes.txt"])
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in find_images([tmp_path])] == ["UPPER.PNG", "a.png"]


def test_a_file_that_cannot_be_read_is_a_row_with_its_error(trained, tmp_path):
    photos, run = trained
    shutil.copytree(photos / "test" / "bird 0", tmp_path / "mine")
    damaged = tmp_path / "mine" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    found = predict(run, [tmp_path / "mine"])
    failed = found[found["error"] != ""]
    assert failed["path"].tolist() == [str(damaged)] and "truncated" in failed["error"].iloc[0]
    assert len(found) == 4 * 4 + 1 and found.loc[failed.index, "output"].isna().all()
    assert len(save_pictures(found, tmp_path / "pictures")) == 4


def test_pictures_of_one_name_in_two_folders_do_not_collide(trained, tmp_path):
    photos, run = trained
    paths = [photos / "test" / f"bird {number}" / "0.png" for number in range(3)]
    predictions = predict(run, paths)
    written = save_pictures(predictions, tmp_path / "pictures")
    assert sorted(path.relative_to(tmp_path / "pictures").as_posix() for path in written) == [
        f"bird {number}/0.png.png" for number in range(3)
    ]
    for path, picture in zip(paths, written, strict=True):
        photo, drawn = (np.asarray(Image.open(file).convert("RGB")) for file in (path, picture))
        assert photo.shape == drawn.shape and (photo != drawn).any(axis=-1).sum() > 20
    with pytest.raises(InputError, match="bird 0/0.png.png exists; choose another folder"):
        save_pictures(predictions, tmp_path / "pictures")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be written"):
        save_pictures(predictions, tmp_path / "file")
    assert len(save_pictures(predict(run, paths[:1]), tmp_path / "one")) == 1


def opinionated(**changes):
    """A model whose attention and boxes differ between images."""
    torch.manual_seed(0)
    model = build_model(tiny_config(".", image_size=(48, 64), **changes), 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def test_the_program_gives_boxes_and_logits_of_the_model_at_any_batch_size():
    model, size = opinionated(strength="rollout_mean"), (72, 96)
    program = export_model(model, size).module()
    for batch in (1, 3, 8):
        pixels = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
        with torch.no_grad():
            expected, found = NamedOutputs(model)(pixels), program(pixels)
        assert found.keys() == expected.keys() and len(found) == 2 * model.num_scales
        for name in expected:
            assert found[name].shape[0] == batch
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    assert len(expected["boxes_2"].unique(dim=0)) > 2, "boxes differ: the loop was needed"


def test_a_file_answers_like_the_run(trained, tmp_path):
    photos, run = trained
    path = export_run(run, tmp_path / "model.pt2")
    program = torch.export.load(path).module()
    files = sorted((photos / "test").rglob("*.png"))
    pixels = torch.stack([ImageTransform(48, 0.875)(open_image(file)) for file in files])
    with torch.no_grad():
        classes = program(pixels)["logits_2"].argmax(dim=1)
    table = pd.DataFrame({"path": list(map(str, files)), "label": 0})
    expected = predict_table(load(run), table, ImageTransform(48, 0.875)).query(
        "output == 'scale 2'"
    )
    assert classes.tolist() == expected["prediction"].tolist()


@pytest.mark.parametrize("name", ["model.pth", "model", "model.onnx", "missing/model.pt2"])
def test_a_file_that_cannot_be_exported_is_refused_before_the_work(trained, tmp_path, name):
    with pytest.raises(InputError, match="ends in .pt2, in a folder that exists"):
        export_run(trained[1] / "missing", tmp_path / name)


def test_exported_files_are_not_replaced_and_cause_no_warning(trained, tmp_path):
    _, run = trained
    (tmp_path / "mine.pt2").write_text("mine")
    with pytest.raises(InputError, match="mine.pt2: give a new file"):
        export_run(run, tmp_path / "mine.pt2")
    assert (tmp_path / "mine.pt2").read_text() == "mine"
    with warnings.catch_warnings(record=True) as caught:
        export_run(run, tmp_path / "model.pt2")
    assert not [w for w in caught if ".part" in str(w.message)]


@contextmanager
def largest_file(size):
    """No file may grow beyond a size: what a full disk does to a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_export_to_a_full_disk_leaves_nothing(trained, tmp_path):
    with largest_file(100_000), pytest.raises(InputError, match="model.pt2: cannot be written"):
        export_run(trained[1], tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
