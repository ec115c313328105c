"""Exported programs: the whole model, any batch size, the same boxes and logits."""

import pandas as pd
import pytest
import torch
from tiny import draw_photos, tiny_config

from ramslib.data.transforms import ImageTransform, open_image
from ramslib.errors import InputError
from ramslib.evaluation import predict
from ramslib.model import build_model
from ramslib.runs.export import Pixels, export_model, export_run
from ramslib.runs.run import load
from ramslib.training.trainer import train


def opinionated(**changes):
    """A model whose attention and boxes differ between images."""
    torch.manual_seed(0)
    model, _ = build_model(tiny_config(".", image_size=(48, 64), **changes), 5)
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
            expected, found = Pixels(model)(pixels), program(pixels)
        assert found.keys() == expected.keys() and len(found) == 2 * model.num_scales
        for name in expected:
            assert found[name].shape[0] == batch
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    assert len(expected["boxes_2"].unique(dim=0)) > 2, "boxes differ: the loop was needed"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of photos and of a run."""
    folder = tmp_path_factory.mktemp("export")
    photos = draw_photos(folder / "photos")
    return photos, train(tiny_config(photos, epochs=1), folder / "run")


def test_a_file_answers_like_the_run(trained, tmp_path):
    photos, run = trained
    path = export_run(run, tmp_path / "model.pt2")
    program = torch.export.load(path).module()
    files = sorted((photos / "test").rglob("*.png"))
    pixels = torch.stack([ImageTransform(48, 0.875)(open_image(file)) for file in files])
    with torch.no_grad():
        classes = program(pixels)["logits_2"].argmax(dim=1)
    table = pd.DataFrame({"path": list(map(str, files)), "label": 0})
    expected = predict(load(run), table, ImageTransform(48, 0.875)).query("output == 'scale 2'")
    assert classes.tolist() == expected["prediction"].tolist()


def test_files_are_not_replaced(trained, tmp_path):
    _, run = trained
    for name in ("model.pth", "model", "model.onnx"):
        with pytest.raises(InputError, match="ends in .pt2"):
            export_run(run, tmp_path / name)
    (tmp_path / "model.pt2").write_text("mine")
    with pytest.raises(InputError, match="model.pt2: give a new file"):
        export_run(run, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "mine"
