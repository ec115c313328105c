"""The first notebook's cells, on a small dataset in every layout that has a reader."""

import json
from pathlib import Path

import layouts
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat

from ramslib.backbone import create_backbone
from ramslib.data import datasets

NOTEBOOK = Path(__file__).parents[1] / "notebooks/01_data_preparation.ipynb"
CELLS = [
    "".join(cell["source"])
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


def write_flowers(root):
    sets = {"trnid": np.arange(1, 103), "valid": np.arange(103, 205), "tstid": np.arange(205, 307)}
    savemat(root / "imagelabels.mat", {"labels": np.tile(np.arange(1, 103), 3)})
    savemat(root / "setid.mat", sets)
    for number in range(1, 307):
        layouts.write(root / f"jpg/image_{number:05d}.jpg")


def write_pets(root):
    lines = "Bombay_{0} 2 1 1\nAbyssinian_{0} 1 1 1\n"
    layouts.write(root / "annotations/trainval.txt", lines.format(1) + lines.format(2))
    layouts.write(root / "annotations/test.txt", lines.format(3))
    for name in ("Bombay", "Abyssinian"):
        for number in (1, 2, 3):
            layouts.write(root / f"images/{name}_{number}.jpg")


def write_cub_with_parts(root):
    layouts.write_cub(root)
    layouts.write(root / "parts/parts.txt", "1 back\n2 left wing\n")
    layouts.write(root / "parts/part_locs.txt", "1 1 2.0 4.0 1\n2 1 3.0 5.0 1\n2 2 0.0 0.0 0\n")


def write_csv(root):
    layouts.write_folder(root, photos=8)
    rows = [f"photos/photo{index}.png,{('crow', 'wren')[index % 2]}" for index in range(8)]
    layouts.write(root / "labels.csv", "\n".join(["path,class", *rows]))


def write_coco(root):
    layouts.write_folder(root, images=8)
    images = [{"id": n, "file_name": f"photo{n}.png"} for n in range(8)]
    objects = [{"image_id": n, "category_id": n % 2, "bbox": [1, 1, 4, 3]} for n in range(8)]
    categories = [{"id": 0, "name": "crow"}, {"id": 1, "name": "wren"}]
    content = {"images": images, "annotations": objects, "categories": categories}
    layouts.write(root / "birds.json", json.dumps(content))


WRITERS = {
    "diagnostic": lambda root: datasets.preparation("diagnostic").write_diagnostic_set(
        root, species=2, train_per_species=3, test_per_species=1, image_size=(64, 80)
    ),
    "folder": lambda root: layouts.write_folder(root, crow=4, wren=4),
    "csv": write_csv,
    "coco": write_coco,
    "cub": write_cub_with_parts,
    "cars": layouts.write_cars,
    "dogs": layouts.write_dogs,
    "nabirds": layouts.write_nabirds,
    "inaturalist": layouts.write_inaturalist,
    "aircraft": layouts.write_aircraft,
    "flowers": write_flowers,
    "pets": write_pets,
}


@pytest.mark.parametrize("data", datasets.READERS)
def test_every_data_set_is_shown(tmp_path, data):
    root = tmp_path / "data"
    if data != "diagnostic":
        root.mkdir()
    WRITERS[data](root)
    for path in root.rglob("*.jpg"):
        if not path.stat().st_size:  # the readers' own tests decode nothing
            Image.new("RGB", (1000, 500), "green").save(path)
    parameters, *cells = CELLS
    variables = {}
    exec(parameters, variables)
    weights = tmp_path / "test_vit.safetensors"
    save_file(create_backbone("test_vit", 64).state_dict(), weights)
    variables |= {"data": data, "root": str(root), "out": str(tmp_path), "preset": "tiny"}
    variables |= {"settings": {"pretrained": str(weights), "workers": 0}, "checked": 40}
    for cell in cells:
        exec(cell, variables)
    axes = {ax.get_xlabel() for number in plt.get_fignums() for ax in plt.figure(number).axes}
    plt.close("all")
    written = pd.read_csv(tmp_path / "results/01_data_preparation.csv")
    assert written["images"].sum() == len(variables["table"]) > 0
    has_boxes = data in ("coco", "diagnostic", "cub", "cars", "dogs", "nabirds", "aircraft")
    assert bool(len(variables["boxes"])) == has_boxes == ("center, x" in axes)
    assert bool(len(variables["parts"])) == (data in ("diagnostic", "cub"))
    held, labels = variables["held"], variables["table"].set_index("path")["label"]
    assert len(held) == min(len(labels), 40) and held["label"].tolist() == [*labels[held["path"]]]
