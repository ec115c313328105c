"""What the tests of the explorer look at: small photos, and a finished run with random weights."""

import torch
from tiny import draw_photos, tiny_config

from ramslib.data.datasets import read_table
from ramslib.data.transforms import ImageTransform, temporary_seed
from ramslib.evaluation import fit_calibration, predict
from ramslib.model import build_model
from ramslib.runs.checkpoint import TrainState, save_checkpoint
from ramslib.runs.folder import init_run
from ramslib.runs.results import write_results


def shake(model, seed=0):
    """Random weights, large enough that attention is far from uniform and classes differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_run(root, run, **changes):
    """Photos below ``root`` and a run that looks finished; returns its folder."""
    sizes = {"image_size": 64, "highres_size": 96, "validation_fraction": 0.25}
    token = {} if changes.get("model") == "transfg" else {"class_token": "per_scale"}
    changes = sizes | token | changes
    config = tiny_config(root if root.exists() else draw_photos(root, size=90), **changes)
    table = read_table(config.data, config.root, config.validation_fraction)
    run.mkdir(parents=True)
    init_run(run, config, table, "random weights")
    with temporary_seed(0):  # the same weights whatever ran before
        model = shake(build_model(config, 3))
    for name in ("best", "last"):
        save_checkpoint(run / f"{name}.safetensors", TrainState(), model)
    test = table[table["split"] == "test"].reset_index(drop=True)
    transform = ImageTransform(config.highres_size, config.crop_fraction)
    outcome = fit_calibration(model, test[:0], transform), predict(model, test, transform)
    columns = {"epochs": 3, "best_epoch": 2, "processes": 1, "train_seconds": 1.0}
    write_results(run, {"best": outcome, "last": outcome}, columns)
    return run
