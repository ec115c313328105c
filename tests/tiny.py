"""A few small photos and a small model: what the tests of training work with."""

import copy
import functools
import json
import multiprocessing
import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file

from ramslib.config import Config
from ramslib.data.transforms import temporary_seed
from ramslib.model import build_model
from ramslib.runs.folder import lock_run
from ramslib.training.launch import command, overrides

ROOT = Path(__file__).parents[1]
COLORS = np.array([(220, 40, 40), (40, 200, 60), (50, 60, 230), (210, 200, 40), (30, 200, 210)])
TIMINGS = ("seconds", "images_per_second")


def draw_photos(root, classes=3, train=8, test=5, size=40):
    """Photos of noise with a colored patch that tells the class, as folders train and test."""
    noise = np.random.default_rng(0)
    for number in range(classes):
        for split, count in (("train", train), ("test", test)):
            folder = Path(root) / split / f"bird {number}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 255, (size, size + 8, 3), dtype=np.uint8)
                top, left = noise.integers(0, size // 2, 2)
                pixels[top : top + size // 2, left : left + size // 2] = COLORS[number]
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return Path(root)


def tiny_config(root, **changes):
    """A run of a second or two."""
    settings = {"data": "folder", "root": str(root), "backbone": "test_vit", "pretrained": "none"}
    settings |= {
        "image_size": 32,
        "highres_size": 48,
        "frozen_blocks": 3,
        "validation_fraction": 0.2,
    }
    settings |= {"batch_size": 6, "epochs": 3, "warmup_steps": 2, "learning_rate": 1e-3}
    settings |= {"workers": 0, "amp": "none"}  # float32 on every machine
    return Config().replace(**settings | changes)


def tiny_model(classes=5, seed=0, **changes):
    """A model in evaluation mode whose classifier and attention are far from uniform."""
    return copy.deepcopy(_tiny_model(classes, seed, **changes))


@functools.cache
def _tiny_model(classes, seed, **changes):
    with temporary_seed(seed), torch.no_grad():
        model = build_model(tiny_config(".", **changes), classes)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def start_training(config, run, processes=1):
    """Start the command that a shell takes, in a process group of its own; it prints to a file."""
    arguments = ["train", "--run", run, "--save-every", 0, *overrides(config)]
    with open(f"{run}.log", "w") as log:
        return subprocess.Popen(
            command(arguments, processes),
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def finish_training(config, run, processes=1):
    """Train in processes of their own to the end; returns the exit code and the output."""
    code = start_training(config, run, processes).wait(timeout=300)
    return code, Path(f"{run}.log").read_text()


@contextmanager
def held_elsewhere(run):
    """Another process trains in a folder; yields it."""
    context = multiprocessing.get_context("fork")
    holding = context.Event()
    other = context.Process(target=_hold, args=(Path(run), holding))
    other.start()
    try:
        assert holding.wait(20)
        yield other
    finally:
        other.kill()
        other.join()


def _hold(run, holding):
    with lock_run(run):
        holding.set()
        time.sleep(60)


def read_log(run):
    """Rows of a run's log without what depends on the clock."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def same_run(first, second):
    """Assert that two runs ended with the same weights, log, predictions and scores."""
    assert read_log(first) == read_log(second)
    for name in ("last.safetensors", "best.safetensors"):
        one, other = load_file(Path(first) / name), load_file(Path(second) / name)
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name
    for name in ("predictions_last.csv", "predictions_best.csv"):
        assert (Path(first) / name).read_bytes() == (Path(second) / name).read_bytes()
    one, other = (pd.read_csv(Path(run) / "results.csv") for run in (first, second))
    assert one.drop(columns="train_seconds").equals(other.drop(columns="train_seconds"))
