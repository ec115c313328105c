"""The rows of the table. Each function yields rows of `timing.row`, measured side by side."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.step import build, in_own_process, plain, training_step, twice
from benchmarks.timing import ratios, row
from ramslib.attention import RecordedScale, attention_strength, record_attention
from ramslib.boxes import full_image_boxes
from ramslib.config import Config
from ramslib.data.transforms import ImageDataset, ImageTransform
from ramslib.distributed import load_batches
from ramslib.dppm import propose
from ramslib.errors import count_cores
from ramslib.evaluation import (
    choose_exit_threshold,
    early_exit,
    predict,
    predict_early_exit,
    score,
)
from ramslib.model import RAMSTrans
from ramslib.runs.folder import read_run
from ramslib.runs.inference import load


def inference(options: SimpleNamespace) -> Iterator[dict]:
    """Two scales against two plain forward passes."""
    for backbone, wanted in zip(options.backbones, ("<= 1.08", "<= 1.05"), strict=True):
        model, other = build(backbone, options.size, 2).eval(), plain(backbone, options.size).eval()
        for batch in options.batches:
            images = torch.randn(batch, 3, options.size, options.size)
            for strength in options.strengths:
                model.settings = replace(model.settings, strength=strength)
                both = partial(model.forward_preprocessed, images), partial(twice, other, images)
                with torch.inference_mode():
                    times = ratios(*both, options.repeats)
                what = f"two scales, {strength} / two forwards; {backbone}, batch {batch}"
                yield row(what, wanted, *times)


def training(options: SimpleNamespace) -> Iterator[dict]:
    """One step of two scales against two plain forward and backward passes and one update."""
    images = torch.rand(2, 3, options.size, options.size)
    backbone = options.backbones[0]
    for strength in options.strengths:
        model, other = build(backbone, options.size, 2, strength), plain(backbone, options.size)
        steps = [
            training_step(model, "workbench", images, 2),
            training_step(other, "plain", images, 2),
        ]
        what = f"training step, {strength} / two plain passes; {backbone}, batch 2"
        yield row(what, "<= 1.06", *ratios(*steps, options.repeats))


def memory(options: SimpleNamespace) -> Iterator[dict]:
    """Peak memory of a training step against the literal implementation, and its time."""
    sizes = {"backbone": options.backbones[0], "size": options.size, "threads": options.threads}
    ours, literal = (in_own_process(way, **sizes) for way in ("workbench", "literal"))
    yield row("peak memory of a step (MB) / literal", "<= 0.36", [ours["MB"]], [literal["MB"]])
    yield row("time of a step / literal", "", [ours["seconds"]], [literal["seconds"]])
    less = in_own_process("workbench", grad_checkpointing=1, **sizes)
    yield row("peak memory (MB), grad_checkpointing / without", "", [less["MB"]], [ours["MB"]])
    yield row("time, grad_checkpointing / without", "", [less["seconds"]], [ours["seconds"]])


def proposal(options: SimpleNamespace) -> Iterator[dict]:
    """Mask, component, box and crop of given strengths against one forward pass."""
    backbone = options.backbones[1]
    model, other = build(backbone, options.size, 2).eval(), plain(backbone, options.size).eval()
    for batch in options.batches:
        images = torch.randn(batch, 3, options.size, options.size)
        boxes = full_image_boxes(images)
        strength = smooth_noise(batch, *model.grid)

        both = partial(dppm, model, images, boxes, strength), partial(other, images)
        with torch.inference_mode():
            times = ratios(*both, 4 * options.repeats)
        yield row(f"DPPM / one forward; {backbone}, batch {batch}", "< 0.005", *times)


def growth(options: SimpleNamespace) -> Iterator[dict]:
    """Strength alone against one forward pass, at two sizes."""
    for size in (options.size, 2 * options.size):
        other = plain(options.backbones[0], size).eval()
        images, (height, width) = torch.randn(1, 3, size, size), other.patch_embed.grid_size
        with torch.inference_mode(), record_attention(other) as blocks:
            tokens = other.forward_features(images)
        patches = tokens[:, -height * width :].unflatten(1, (height, width))
        recorded = RecordedScale(blocks, (height, width), tokens=patches)
        for name in options.strengths:
            both = partial(attention_strength, recorded, name), partial(other, images)
            with torch.inference_mode():
                times = ratios(*both, options.repeats)
            yield row(f"strength {name} / one forward; {height} x {width} patches", "", *times)


def exits(options: SimpleNamespace) -> Iterator[dict]:
    """Images per second with early exit on a trained run, its threshold from validation."""
    if options.run is None:
        return
    config, _, table = read_run(options.run)
    transform = ImageTransform(config.highres_size or config.image_size, config.crop_fraction)
    model = load(options.run)
    parts = {name: part.reset_index(drop=True) for name, part in table.groupby("split")}
    threshold = choose_exit_threshold(predict(model, parts["validation"], transform), 0.5)
    full = score(predict(model, parts["test"], transform))["top1"].iloc[-1]  # of the last output
    found = predict_early_exit(model, parts["test"], transform, threshold)
    loaded = load_batches(ImageDataset(parts["test"], transform), 0, batch_size=16)
    batches = [batch["pixels"] for batch in loaded]
    both = (
        partial(over, batches, model),
        partial(over, batches, partial(early_exit, model, threshold=threshold)),
    )
    with torch.inference_mode():
        all_scales, stopping = ratios(*both, options.repeats)
    rate, top1 = (found["scales"] == 1).mean(), score(found)["top1"].item()
    note = f"threshold {threshold:.3f}, {100 * rate:.0f} % exit, {len(found)} images"
    yield row(f"images/s, early exit / all scales; {note}", ">= 1.6", all_scales, stopping)
    yield row(f"points lost of {full:.1f}", "<= 0.5", [full - top1], [1.0])


def loader(options: SimpleNamespace) -> Iterator[dict]:
    """Photos of 500 x 375 as JPEG: one loader process, and one per core against decoding alone."""
    folder = Path(options.out) / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    noise = smooth_noise(32 * 3, 375, 500).unflatten(0, (32, 3)).clamp(-3, 3).add(3).mul(42)
    for number, pixels in enumerate(noise.byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
    paths = [str(folder / f"{number % 32}.jpg") for number in range(11788)]
    table, count = pd.DataFrame({"path": paths, "label": 0}), 64 * options.repeats
    batches = load_batches(ImageDataset(table, ImageTransform(options.size)), 1, batch_size=16)
    next(batches)  # the worker has started
    started = time.perf_counter()
    for _ in range(count // 16):
        next(batches)
    seconds = (time.perf_counter() - started) / count
    worker = multiprocessing.active_children()[-1].pid
    told = Path(f"/proc/{worker}/smaps_rollup").read_text()  # what it does not share with us
    private = int(told.split("Private_Dirty:")[1].split()[0]) * 1024 / 1e6
    batches.close()
    other = plain(options.backbones[1], options.size).eval()
    images = torch.randn(1, 3, options.size, options.size)
    with torch.inference_mode():
        forward, _ = ratios(partial(other, images), int, options.repeats)
    what = f"loading / forward, seconds per image; {options.backbones[1]}"
    yield row(what, "", [seconds] * len(forward), forward)
    yield row("a loader's own memory on 11,788 images (MB) / 300 MB", "<= 1", [private], [300.0])
    cores, size = min(16, count_cores()), Config().highres_size
    transform, rates = ImageTransform(size, augment="flip"), []
    for _ in range(options.repeats):
        photos = [ImageDataset(table, transform, keep=keep) for keep in (True, False)]
        rates.append([images_per_second(each, cores) for each in (*photos, Decoded(paths))])
    later, first, alone = map(list, zip(*rates, strict=True))
    what = f"images/s loaded at {size} px / decoded alone; {cores} processes"
    yield row(f"{what}; first epoch", "", first, alone)
    yield row(f"{what}; later epochs", ">= 0.9", later, alone)


class Decoded(Dataset):
    """Photos that are decoded and left."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        Image.open(self.paths[index]).convert("RGB")
        return {"index": index}


def images_per_second(dataset: Dataset, workers: int, each: int = 24) -> float:
    """How many images arrive once all loaders are at work, over ``each`` batches of a loader.

    They are those of the first batches, in which the loaders begin, again and again.
    """
    begin, count = max(1, each // 6) * workers, each * workers
    rows = [row % (16 * begin) for row in range(16 * (begin + count + 2 * workers))]
    batches = load_batches(dataset, workers, batch_size=16, sampler=rows)
    for _ in range(begin):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - started
    batches.close()
    return 16 * count / seconds


def smooth_noise(batch: int, height: int, width: int) -> Tensor:
    """(B, h, w) of normal noise, each value a mean of three by three: connected, as attention."""
    noise = torch.randn(batch, 1, height, width, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(3 * noise, 3, 1, 1)[:, 0]


def dppm(model: RAMSTrans, images: Tensor, boxes: Tensor, strength: Tensor) -> None:
    """All that is between the strength of one scale and the input of the next."""
    model.crop_region(images, None, boxes, propose(strength, 1.0).patch_boxes)


def over(batches: list, function: Callable) -> None:
    """Call a function with each batch."""
    for batch in batches:
        function(batch)


FIGURES = {
    function.__name__: function
    for function in (
        inference,
        training,
        memory,
        proposal,
        growth,
        exits,
        loader,
    )
}
