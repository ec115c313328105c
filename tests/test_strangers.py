"""A folder full of somebody else's files, named as ours are: no command changes a byte of them."""

import pytest
from layouts import write
from tiny import draw_photos, tiny_config

from ramslib.__main__ import main
from ramslib.training.launch import overrides
from ramslib.training.trainer import train

NAMES = """
config.json table.csv metrics.jsonl README.md results.csv last.safetensors best.safetensors
job.json predictions_last.csv predictions_best.csv report.html index.html notebooks.json
road.json sweep.db output.log split.csv exclude.csv groups.csv labels.csv probe.json probe.csv
predictions.csv model.pt2 out_of_sample.csv page.html model.onnx 01_data_preparation.html
01_data_preparation.ipynb .lock results/01_data_preparation.csv tensorboard/events.out.tfevents.1
sources/ideas.py runs/table.csv features/0000000.safetensors .results.csv.12.part .tmpAbC123
.sweep.db.lock sweep.db-journal CUB_200_2011.tgz CUB_200_2011.tgz.part CUB_200_2011.tgz.wrong
seen/0.png.png train/bird_0/0.png.png
""".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Photos and a finished run."""
    folder = tmp_path_factory.mktemp("world")
    train(tiny_config(draw_photos(folder / "photos"), epochs=1), folder / "run")
    return folder


@pytest.fixture
def place(tmp_path):
    """Photos of somebody in class folders, among files of every name that is ours."""
    draw_photos(tmp_path / "drawn", test=0)
    (tmp_path / "drawn" / "train").rename(tmp_path / "place")
    for name in NAMES:
        write(tmp_path / "place" / name, f"{name} is mine\n")
    (tmp_path / "place" / "link.csv").symlink_to(write(tmp_path / "kept.csv", "mine, too\n"))
    return tmp_path / "place"


def content(folder):
    """What lies in a folder and beside it: every path, with the bytes of files."""
    paths = [folder.parent / "kept.csv", *folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else path.is_dir() for path in paths}


WRITES = {
    "train": "train --run PLACE SETTINGS",
    "train from": "train --run NEW SETTINGS root=PLACE",
    "probe": "probe --out PLACE SETTINGS",
    "sweep": "sweep --out PLACE SETTINGS seed=0 seed=1",
    "notebooks": "notebooks --out PLACE --data folder --root PHOTOS --preset tiny",
    "report": "report PLACE",
    "export": "export --run RUN --out PLACE/model.pt2",
    "export onnx": "export --run RUN --out PLACE/model.onnx",
    "export page": "export-page --run RUN --out PLACE/page.html PHOTOS/test",
    "predict table": "predict --run RUN --out PLACE/results.csv PHOTOS/test",
    "predict link": "predict --run RUN --out PLACE/link.csv PHOTOS/test",
    "predict pictures": "predict --run RUN --pictures PLACE/seen PHOTOS/test/bird_0",
    "contact sheet": "predict --run RUN --contact-sheet PLACE/page.html PHOTOS/test",
    "sort": "predict --run RUN --sort-into PLACE PHOTOS/test",
    "sort below": "predict --run RUN --sort-into PLACE/new PLACE",
    "pictures inside": "predict --run RUN --pictures PLACE PLACE",
    "pictures below": "predict --run RUN --pictures PLACE/seen/new PLACE",
    "pictures of a pattern": "predict --run RUN --pictures PLACE/new PLACE/*/*.png",
    "describe": "describe-data data=folder root=PLACE --fix",
    "describe csv": "describe-data data=csv root=PLACE --fix",
    "describe table": "describe-data data=folder root=PHOTOS --out PLACE/results.csv",
    "describe lists": "describe-data data=folder root=PHOTOS lists=PLACE --fix",
    "download": "describe-data data=cub root=PLACE --download",
}


# What refuses a folder first, taken out: other files there are as safe.
FIRST = {"sweep": "results.csv", "describe": "split.csv", "describe csv": "labels.csv"}
FIRST |= {"notebooks": "results.csv index.html notebooks.json road.json"}
FIRST |= {"probe": "probe.json", "describe lists": "split.csv", "train": "config.json README.md"}
CASES = [(name, "") for name in WRITES] + list(FIRST.items())


@pytest.mark.parametrize("name,without", CASES, ids=[" without ".join(c).strip() for c in CASES])
def test_nothing_of_a_stranger_changes(world, place, capsys, name, without):
    command = WRITES[name]
    for file in without.split():
        (place / file).unlink()
    settings = overrides(tiny_config(world / "photos", epochs=1))
    words = {"SETTINGS": settings, "NEW": [place.parent / "new"]}
    replaced = []
    for word in command.split():
        for name, path in (("PLACE", place), ("RUN", world / "run"), ("PHOTOS", world / "photos")):
            word = word.replace(name, str(path))
        replaced += words.get(word, [word.replace("bird_0", "bird 0")])
    before = content(place)
    assert main(list(map(str, replaced))) == 2
    assert content(place) == before
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(place) in error
