"""What the explorer looks through and at: a model of any origin, and a photo made ready for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from ramslib.backbone import count_class_tokens
from ramslib.config import Config
from ramslib.data.annotations import image_size
from ramslib.data.transforms import ImageTransform, open_image, prepare
from ramslib.errors import InputError
from ramslib.model import RAMSTrans, build_model
from ramslib.runs.folder import is_finished, read_run, run_key
from ramslib.runs.inference import load
from ramslib.weights import cache_folder

DISPLAY = 900  # pixels; the longer side of the copy of a photo that is kept to show


@dataclass(frozen=True)
class LoadedModel:
    """A model to look through.

    Attributes:
        name: what a person calls it.
        model: in evaluation mode, on its device.
        view: the deterministic view of the test.
        classes: K names; empty for a backbone without a trained classifier.
        table: the images of its data set; empty where there is none.
        origin: one sentence about its weights.
        key: names all that decides what it sees.
    """

    name: str
    model: RAMSTrans
    view: ImageTransform
    classes: list[str]
    table: pd.DataFrame
    origin: str
    key: str


class Photo(NamedTuple):
    """A photo, ready for one lens.

    Attributes:
        path: where it came from.
        picture: upright, at most ``DISPLAY`` pixels, to show.
        size: (1, 2) height and width of the upright image.
        pixels: (3, Hs, Ws) uint8, the view of scale 1 at the highest resolution at hand.
        images: (1, 3, H, W) the normalized input.
        source: (1, 3, Hs, Ws) normalized, or None where it is the input.
        label: true class, or None.
        truth: (1, 4) annotated box in pixels of the upright image, NaN where unknown.
    """

    path: str
    picture: Image.Image
    size: Tensor
    pixels: Tensor
    images: Tensor
    source: Tensor | None
    label: int | None
    truth: Tensor


def find_runs(folder: Path | str) -> list[Path]:
    """Finished runs anywhere below a folder, newest first."""
    found = {path.parent for path in Path(folder).rglob("config.json")}
    runs = [run for run in found if is_finished(run) and (run / "best.safetensors").exists()]
    return sorted(runs, key=lambda run: (run / "results.csv").stat().st_mtime, reverse=True)


def describe_run(run: Path, folder: Path | str) -> str:
    """One line that tells a finished run from others: where it lies and what it is.

    Raises:
        InputError: a file of the run is damaged, or the explorer does not know its model.
    """
    config, _, _ = _read_run(run)
    try:
        results = pd.read_csv(run / "results.csv").query("split == 'test' and checkpoint == 'last'")
        best = results.loc[results["top1"].idxmax()]
        score = f"{best['top1']:.1f} % at {best['scale']}"
    except (OSError, ValueError, LookupError, TypeError, NameError) as error:
        raise InputError(f"{run}: results.csv is damaged ({error}); train it again") from None
    scales = f"{config.scales} scale{'s' if config.scales > 1 else ''}"
    name = run.relative_to(folder) if run.is_relative_to(folder) else run
    return f"{name} ({scales}, {config.strength}, {score}, seed {config.seed})"


def _read_run(run: Path | str) -> tuple[Config, dict, pd.DataFrame]:
    """`read_run` of a run whose model chooses regions by its attention."""
    config, description, table = read_run(run)
    if config.model != "rams":
        raise InputError(f"{run}: the explorer shows RAMS-Trans and plain ViT, not {config.model}")
    return config, description, table


def open_run(run: Path | str, checkpoint: str = "best") -> LoadedModel:
    """Look through the model of a finished run.

    Raises:
        InputError: no such run, its checkpoint cannot be read, or its model is another method's.
    """
    config, description, table = _read_run(run)
    view = ImageTransform(config.highres_size or config.image_size, config.crop_fraction)
    origin = f"{run}, {checkpoint} weights"
    model = load(run, checkpoint).to(_device())
    key = f"{run_key(config, description['data_fingerprint'])}-{checkpoint}"
    return LoadedModel(Path(run).name, model, view, description["classes"], table, origin, key)


def open_backbone(name: str, table: pd.DataFrame, image_size=224, highres_size=448) -> LoadedModel:
    """Look through a pre-trained backbone alone: attention needs no training, classes do.

    Raises:
        InputError: see `create_backbone`.
    """
    sizes = {"image_size": image_size, "highres_size": highres_size}
    config = Config().replace(backbone=name, class_token="shared", strength="rollout_mean", **sizes)
    stored = cache_folder() / f"{name}.safetensors"
    pretrained = str(stored) if stored.exists() else "auto"
    classes = int(table["label"].max()) + 1 if len(table) else 1  # never read, but scored
    model = build_model(config.replace(pretrained=pretrained), classes)
    if count_class_tokens(model.backbone):
        model.strength = "last_class"
    view = ImageTransform(highres_size, config.crop_fraction)
    model = model.eval().to(_device())
    return LoadedModel(name, model, view, [], table, model.origin, run_key(config, model.origin))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_photo(lens: LoadedModel, path: Path | str, label: int | None = None, truth=None) -> Photo:
    """Read a photo for a lens.

    Args:
        lens: its view and sizes are used.
        path: an image file.
        label: the true class, if known.
        truth: annotated box in pixels of the upright image, if known.

    Raises:
        InputError: not a clean_class_name image, or one without a patch's worth of pixels.
    """
    model, view = lens.model, lens.view
    image, size = open_image(path, 2 * max(view.resized)), image_size(path)
    patch = [side // count for side, count in zip(model.image_size, model.grid, strict=True)]
    if size[0] < patch[0] or size[1] < patch[1]:
        raise InputError(
            f"{path}: {size[0]} x {size[1]} pixels are less than one patch ({patch[0]} x "
            f"{patch[1]}); choose a larger photo"
        )
    pixels = view(image)
    device = next(model.parameters()).device
    images, source = prepare(pixels[None].to(device), model.image_size, *model.mean_std)
    image.thumbnail((DISPLAY, DISPLAY))
    box = torch.full((1, 4), torch.nan) if truth is None else torch.as_tensor([list(truth)])
    return Photo(
        str(path), image, torch.tensor([size]), pixels, images, source, label, box.double()
    )
