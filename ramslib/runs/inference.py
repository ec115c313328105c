"""Use a trained run: load its model, classify photos, export it as one file for other programs."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ramslib.backbone import count_class_tokens
from ramslib.classifier import ImageClassifier
from ramslib.config import Config
from ramslib.data.annotations import BOX_COLUMNS, TABLE_COLUMNS
from ramslib.data.datasets import HIDDEN, PHOTO_SUFFIXES
from ramslib.data.transforms import ImageTransform, open_image
from ramslib.errors import InputError, write_atomically, writing
from ramslib.evaluation import predict as predict_table
from ramslib.inspector import Inspector
from ramslib.model import RAMSTrans, build_model
from ramslib.runs.checkpoint import load_module, read_checkpoint
from ramslib.runs.folder import read_run, run_key
from ramslib.weights import cache_folder


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that belongs to it.

    Attributes:
        name: of the run or the backbone.
        model: in evaluation mode, on its device.
        transform: the deterministic one of the test.
        classes: K names; empty for a backbone without a trained classifier.
        table: the images of its dataset; empty where there is none.
        origin: one sentence about its weights.
        key: names all that decides what it computes.
    """

    name: str
    model: ImageClassifier
    transform: ImageTransform
    classes: list[str]
    table: pd.DataFrame
    origin: str
    key: str


def load(run: Path | str, checkpoint: str = "best") -> ImageClassifier:
    """The trained model of a run, in evaluation mode, on a GPU where there is one.

    Args:
        run: a run's folder.
        checkpoint: ``best`` (by validation) or ``last``.

    Raises:
        InputError: no such run, or no sound checkpoint in it.
    """
    return load_model(run, checkpoint).model


def inspect(run: Path | str, checkpoint: str = "best") -> Inspector:
    """An inspector of a run's model, see `inspector`.

    Args:
        run: a run's folder.
        checkpoint: ``best`` or ``last``.

    Raises:
        InputError: no such run, or one whose model is no RAMS-Trans.
    """
    loaded = load_model(run, checkpoint)
    if not isinstance(loaded.model, RAMSTrans):
        raise InputError(f"{run}: only RAMS-Trans and plain ViT can be inspected; give such a run")
    return Inspector(loaded.model, loaded.transform, loaded.classes)


def load_model(
    run: Path | str, checkpoint: str = "best", root: Path | str | None = None
) -> LoadedModel:
    """The trained model of a run with its transform, classes and images.

    Args:
        run: a run's folder.
        checkpoint: ``best`` (by validation) or ``last``.
        root: where the images are now, if they moved.

    Raises:
        InputError: no such run, or no sound checkpoint in it.
    """
    config, metadata, table = read_run(run, root)
    path = Path(run) / f"{checkpoint}.safetensors"
    stored = read_checkpoint(path, metadata.get("key", ""))
    model = build_model(config.replace(pretrained="none"), len(metadata["classes"]))
    load_module(model, stored, "ema" if config.ema_decay else "model")
    transform = ImageTransform(config.highres_size or config.image_size, config.crop_fraction)
    key = f"{run_key(config, metadata['data_fingerprint'])}-{checkpoint}"
    origin = f"{run}, {checkpoint} checkpoint"
    model = model.eval().to(_device())
    return LoadedModel(Path(run).name, model, transform, metadata["classes"], table, origin, key)


def load_backbone(
    name: str, table: pd.DataFrame | None = None, image_size: int = 224, highres_size: int = 448
) -> LoadedModel:
    """A pre-trained backbone alone: its attention needs no training, classes do.

    Args:
        name: of timm.
        table: images to look at, if there is a dataset.
        image_size: pixels of the input.
        highres_size: pixels that crops are cut from.

    Raises:
        InputError: see `create_backbone`.
    """
    table = pd.DataFrame(columns=TABLE_COLUMNS) if table is None else table
    sizes = {"image_size": image_size, "highres_size": highres_size}
    config = Config().replace(backbone=name, strength="rollout_mean", **sizes)
    stored = cache_folder() / f"{name}.safetensors"
    pretrained = str(stored) if stored.exists() else "auto"
    classes = int(table["label"].max()) + 1 if len(table) else 1  # never read, but scored
    model = build_model(config.replace(pretrained=pretrained), classes)
    if count_class_tokens(model.backbone):
        model.settings = replace(model.settings, strength="last_class")
    transform = ImageTransform(highres_size, config.crop_fraction)
    model, key = model.eval().to(_device()), run_key(config, model.origin)
    return LoadedModel(name, model, transform, [], table, model.origin, key)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files named by files, folders (searched deeply) or patterns, in order, each once.

    Raises:
        InputError: a path that leads to no image.
    """
    found: list[Path] = []
    for path in paths:
        exists = os.path.lexists(path)
        named = [Path(path)] if exists else sorted(map(Path, glob(str(path), recursive=True)))
        inside = [file for one in named for file in (_photos(one) if one.is_dir() else [one])]
        if not inside:
            raise InputError(f"{path}: no image there; give image files, folders or patterns")
        found += inside
    return list(dict.fromkeys(found))


def _photos(folder: Path) -> list[Path]:
    """All photos below a folder, sorted, without hidden ones."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in PHOTO_SUFFIXES
        and file.is_file()
        and not any(part.startswith(HIDDEN) for part in file.relative_to(folder).parts)
    ]


def predict(
    run: Path | str, paths: Sequence[str | Path], checkpoint: str = "best", batch_size: int = 16
) -> pd.DataFrame:
    """Classify images with a trained run.

    Args:
        run: its folder.
        paths: image files, folders or patterns.
        checkpoint: ``best`` or ``last``.
        batch_size: images per forward pass.

    Returns:
        One row per image and output: ``path, output, class_name, probability``, per scale its
        region as ``top, left, bottom, right`` in pixels of the upright image, and ``error``: why a
        file could not be read, which then has a single row.

    Raises:
        InputError: no run there, no image there, or none that can be read.
    """
    loaded = load_model(run, checkpoint)
    files = pd.DataFrame({"path": [str(file) for file in find_images(paths)], "label": 0})
    errors = {}
    try:
        predictions = predict_table(loaded.model, files, loaded.transform, batch_size)
    except InputError:
        errors = {path: error for path in files["path"] if (error := _reading_error(path))}
        if len(errors) in (0, len(files)):  # the model is at fault, or nothing is left
            raise
        sound = files[~files["path"].isin(errors)].reset_index(drop=True)
        predictions = predict_table(loaded.model, sound, loaded.transform, batch_size)
    names = np.array(loaded.classes, dtype=object)[predictions["prediction"]]
    table = predictions[["path", "output"]].assign(class_name=names)
    table["probability"] = predictions["confidence"].round(4)
    table[BOX_COLUMNS] = predictions[BOX_COLUMNS]
    failed = pd.DataFrame({"path": errors.keys(), "error": errors.values()})
    return pd.concat([table.assign(error=""), failed], ignore_index=True)


def _reading_error(path: str) -> str:
    try:
        open_image(path)
    except InputError as error:
        return str(error)
    return ""


def save_pictures(predictions: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Draw the regions of scale 2 and further ones into copies of the images.

    A copy lies below the folder as its image lies below the folder that holds all images.

    Args:
        predictions: from `predict`.
        folder: made when missing; existing files are never replaced.

    Returns:
        The new files, PNG.

    Raises:
        InputError: a picture of that name exists, or the folder cannot be written.
    """
    from ramslib.plots.drawing import draw_box, output_color  # matplotlib: only pictures need it

    readable = predictions[predictions["error"] == ""]
    targets = picture_paths(readable["path"].unique(), folder)
    for path, rows in readable.groupby("path", sort=False):
        picture = open_image(path)
        for row in rows.dropna(subset=BOX_COLUMNS).iloc[1:].itertuples():
            box = row.top, row.left, row.bottom, row.right
            picture = draw_box(picture, box, output_color(row.output))
        with writing(Path(folder)):
            targets[path].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(targets[path], lambda part, picture=picture: picture.save(part, "PNG"))
    return list(targets.values())


def picture_paths(paths: Sequence[str], folder: Path | str) -> dict[str, Path]:
    """Where the picture of each image goes: images of one name in two folders do not collide.

    Raises:
        InputError: one of them exists.
    """
    full = {path: os.path.abspath(path) for path in paths}
    base = os.path.commonpath([os.path.dirname(path) for path in full.values()])
    targets = {path: Path(folder, os.path.relpath(full[path], base) + ".png") for path in paths}
    for target in targets.values():
        if os.path.lexists(target):
            raise InputError(f"{target} exists; choose another folder for the pictures")
    return targets


class NamedOutputs(nn.Module):
    """The part of a model that is exported: from pixels to named tensors."""

    def __init__(self, model: ImageClassifier):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Run all scales.

        Args:
            pixels: (B, 3, Hs, Ws) uint8 RGB, transformed as for the test (`ImageTransform`).

        Returns:
            ``logits_1`` .. ``logits_S`` (B, K) and ``boxes_1`` .. ``boxes_S`` (B, 4), the region
            of each scale in pixels of the model's input.
        """
        output = self.model(pixels)
        named = {f"logits_{scale + 1}": logits for scale, logits in enumerate(output.logits)}
        return named | {f"boxes_{scale + 1}": boxes for scale, boxes in enumerate(output.boxes)}


def export_model(
    model: ImageClassifier, highres_size: tuple[int, int]
) -> torch.export.ExportedProgram:
    """Trace a model for batches of any size.

    Args:
        model: in evaluation mode, on the CPU.
        highres_size: (Hs, Ws) of the pixels that the program will take.
    """
    pixels = torch.zeros(2, 3, *highres_size, dtype=torch.uint8)
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1, max=4096)}}
    with torch.no_grad():
        return torch.export.export(NamedOutputs(model).eval(), (pixels,), dynamic_shapes=shapes)


def export_run(run: Path | str, path: Path | str, checkpoint: str = "best") -> Path:
    """Write the model of a run as one program: all scales, from pixels to logits and boxes.

    The file needs neither ramslib nor timm: it is torch.export's, read by torch alone, for CPUs.
    The batch size is free; search for the largest component and cropping are inside.

    Args:
        run: the run's folder.
        path: the new file, ``.pt2``.
        checkpoint: ``best`` or ``last``.

    Raises:
        InputError: no such run, a file that exists or cannot be written, or another ending.
    """
    path = Path(path)
    if path.suffix != ".pt2" or os.path.lexists(path) or not path.parent.is_dir():
        raise InputError(f"{path}: give a new file that ends in .pt2, in a folder that exists")
    loaded, content = load_model(run, checkpoint), io.BytesIO()
    program = export_model(loaded.model.cpu(), loaded.transform.size)
    torch.export.save(program, content)  # torch's own writer of files aborts on a full disk
    write_atomically(path, lambda part: part.write_bytes(content.getbuffer()))
    return path
