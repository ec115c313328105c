"""Using a run on photos of one's own."""

import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny import draw_photos, tiny_config

from ramslib.errors import InputError
from ramslib.runs.prediction import find_images, predict_paths, save_pictures
from ramslib.training.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of photos and that of a run."""
    folder = tmp_path_factory.mktemp("prediction")
    photos = draw_photos(folder / "photos")
    return photos, train(tiny_config(photos, epochs=1), folder / "run")


def test_photos_are_predicted_as_in_the_test_of_the_run(trained):
    photos, run = trained
    expected = pd.read_csv(run / "predictions_best.csv")
    found = predict_paths(run, [photos / "test"], batch_size=4)
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
        predict_paths(run, [tmp_path / "a.png", tmp_path / "notes.txt"])


def test_pictures_of_one_name_in_two_folders_do_not_collide(trained, tmp_path):
    photos, run = trained
    paths = [photos / "test" / f"bird {number}" / "0.png" for number in range(3)]
    predictions = predict_paths(run, paths)
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
    with pytest.raises(InputError, match="file: cannot be made"):
        save_pictures(predictions, tmp_path / "file")
    assert len(save_pictures(predict_paths(run, paths[:1]), tmp_path / "one")) == 1
