"""Using a run: its model, and photos of one's own."""

import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import draw_photos, tiny_config

import ramslib
from ramslib.errors import InputError
from ramslib.runs.inference import (
    load,
    load_backbone,
    load_model,
)
from ramslib.runs.photos import find_images, predict, save_pictures
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
    assert both["probability"].to_numpy() == pytest.approx(both["calibrated"].to_numpy(), abs=1e-3)
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
