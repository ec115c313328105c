"""What a GPU gives: ``make bench-gpu``, meant for eight minutes on one CUDA GPU, no network.

Correctness first (the released codes' numbers, the CPU's numbers, bfloat16, resuming), then ratios
of times and memory, then, where photos are given, accuracies over seeds. All of it is kept as
``gpu.json`` and ``gpu.md`` in the folder ``--out``, after each part, so that a machine that is
taken away leaves what was measured. A part that fails is one line of that file; the others run.

A copy of the repository without datasets is enough, with torch, timm, pandas, scipy and
safetensors; ``--weights`` takes a file of weights, else they are random, which changes no time.
Where there is no GPU the same steps run at a tiny size, as a test of this script: figures then read
"not measured".
"""

import argparse
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import golden
from benchmarks.literal import LiteralRAMS
from benchmarks.step import build, plain, training_step, twice
from benchmarks.timing import is_met, machine, ratios, row
from ramslib.acceleration import compile_blocks
from ramslib.config import Config
from ramslib.data.datasets import preparation
from ramslib.distributed import Processes, deterministic
from ramslib.dppm import propose
from ramslib.errors import one_line
from ramslib.runs.folder import git_commit
from ramslib.runs.results import read_results
from ramslib.training.optimization import backward_scales, create_optimizer
from ramslib.training.trainer import Trainer, train

CUDA = {
    "large": ("vit_base_patch16_224", 448, 32),  # backbone, pixels, batch
    "small": ("vit_small_patch14_dinov2", 224, 64),
    "memory": ("vit_base_patch16_224", 448, 8),  # the literal implementation needs 20 GB
    "compared": ("vit_small_patch14_dinov2", 224, 4),
    "photos": ("vit_small_patch14_dinov2", (224, 448), 12, 8),  # pixels, epochs, frozen blocks
}
CPU = dict.fromkeys(CUDA, ("test_vit", 32, 2)) | {"photos": ("test_vit", (32,), 1, 3)}
BF16 = torch.bfloat16
UNMEASURED = dict.fromkeys(("ratio", "lowest", "highest", "measured", "against"))


def check(name: str, bound: str, value: float) -> dict:
    """A row of the checks."""
    return {"check": name, "bound": bound, "value": float(value), "met": is_met(value, bound)}


def difference(found: Tensor, expected: np.ndarray | Tensor) -> float:
    """Largest absolute difference."""
    return (found.detach().cpu().float() - torch.as_tensor(expected)).abs().max().item()


# ---------------------------------------------------------------- correctness


def released_numbers(options: SimpleNamespace) -> Iterator[dict]:
    """Strength, boxes, logits and five training steps of the sets in ``tests/golden``."""
    for name in golden.set_names():
        expected = golden.read_outputs(name)
        model = golden.build(name, expected).to(options.device)
        images, _ = model.preprocess(golden.pixels_of(expected).to(options.device))
        with torch.no_grad():
            outputs = list(model.iterate_scales(images))
        importance = relative_strength(outputs[0].strength)
        found = difference(importance, expected["importance_scale1"])
        yield check(f"{name}: strength of scale 1", "<= 1e-5", found)
        for number, output in enumerate(outputs, start=1):
            found = difference(output.logits, expected[f"logits_scale{number}"])
            yield check(f"{name}: logits of scale {number}", "<= 1e-4", found)
        wrong = 0
        for eta, boxes in zip(expected["thresholds"], expected["boxes_scale1"], strict=True):
            patches = propose(outputs[0].strength, float(eta)).patch_boxes
            _, places = model.crop_region(images, None, outputs[0].boxes, patches)
            wrong += int((places - torch.tensor([0, 0, 1, 1]) != torch.as_tensor(boxes)).sum())
        yield check(f"{name}: corners of boxes that differ, all thresholds", "<= 0", wrong)
        yield check(f"{name}: losses of five steps, relative", "<= 1e-3", five_steps(name, options))
        yield from half_precision(name, model, images, expected)


def relative_strength(strength: Tensor) -> Tensor:
    """(B, h * w), divided by each image's maximum."""
    return (strength / strength.amax((1, 2), keepdim=True)).flatten(1)


def five_steps(name: str, options: SimpleNamespace) -> float:
    """Largest relative difference of the losses of five training steps."""
    expected, outputs = np.load(golden.OWN / f"{name}_training.npz"), golden.read_outputs(name)
    config = golden.RELEASED.replace(loss="sum", learning_rate=0.003)
    model = golden.build(name, outputs, config).to(options.device).train()
    pixels = golden.pixels_of(outputs).to(options.device)
    labels = torch.from_numpy(expected["labels"]).to(options.device)
    optimizer, losses = create_optimizer(model, config), []
    for _ in expected["sum_grad_norm"]:
        optimizer.zero_grad()
        weights = config.loss_weights(config.scales)
        losses.append(backward_scales(model, pixels, labels, weights)[1:].tolist())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
    wanted = expected["sum_losses_per_scale"]
    return float(np.abs(np.array(losses) / wanted - 1).max())


def half_precision(name: str, model: nn.Module, images: Tensor, expected: dict) -> Iterator[dict]:
    """How far bfloat16 is from the released numbers, on average."""
    with torch.no_grad(), torch.autocast(images.device.type, BF16):
        output = next(model.iterate_scales(images))
    strength = relative_strength(output.strength).cpu().numpy()
    found = np.abs(strength - expected["importance_scale1"]).mean()
    yield check(f"{name}: strength of scale 1 in bfloat16, mean", "<= 0.01", found)
    logits = output.logits.float().cpu().numpy()
    found = np.abs(logits - expected["logits_scale1"]).mean()
    yield check(f"{name}: logits of scale 1 in bfloat16, mean", "<= 0.05", found)


def same_as_cpu(options: SimpleNamespace) -> Iterator[dict]:
    """Logits, boxes and gradients of the device against those of the CPU, float32."""
    backbone, size, batch = options.sizes["compared"]
    torch.manual_seed(0)
    model, pixels = build(backbone, size, 2, "last_class"), torch.rand(batch, 3, size, size)
    nn.init.normal_(model.classifier.weight, std=0.1)
    found = {}
    for device in dict.fromkeys(("cpu", options.device)):
        model.to(device).eval()
        labels = torch.arange(batch, device=device)
        with torch.no_grad():
            outputs = model(pixels.to(device))
        backward_scales(model, pixels.to(device), labels, [1.0, 1.0])
        gradients = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        found[device] = outputs, torch.cat(gradients)
    (one, expected), (other, gradient) = found["cpu"], found[options.device]
    wrong = (one.boxes[1] != other.boxes[1]).any(dim=1).sum()
    yield check("boxes that differ from the CPU's", "<= 0", wrong)
    for number, logits in enumerate(other.logits):
        found = difference(logits, one.logits[number])
        yield check(f"logits of scale {number + 1} against the CPU's", "<= 1e-3", found)
    found = (gradient - expected).norm() / expected.norm()
    yield check("gradients against the CPU's, relative norm", "<= 1e-3", found)


class StopAfter(threading.Event):
    """A request to stop that comes after a number of steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def is_set(self) -> bool:
        """Asked once per step."""
        self.left -= 1
        return self.left <= 0


def resume(options: SimpleNamespace) -> Iterator[dict]:
    """A training that is stopped and resumed ends with the weights of one that is not."""
    processes = Processes(device=torch.device(options.device))
    for amp in ("none", "bf16"):
        states = []
        for stops in ([], [3]):
            run = options.work / f"run-{amp}-{len(stops)}"
            run.mkdir()
            for steps in [*stops, 10**6]:
                trainer = Trainer(synthetic_config(options, amp=amp), run, processes)
                trainer.fit(StopAfter(steps), save_every=1e6)
            states.append(load_file(run / "last.safetensors"))
        wrong = sum(not states[0][name].equal(states[1][name]) for name in states[0])
        yield check(f"resumed training, amp={amp}: tensors that differ", "<= 0", wrong)


def synthetic_config(options: SimpleNamespace, **changes) -> Config:
    """A short training on drawn birds, made once."""
    backbone, size, _ = options.sizes["small"]
    root = options.work / "birds"
    if not root.exists():
        write = preparation("diagnostic").write_diagnostic_set
        counts = {"species": 4, "train_per_species": 16, "test_per_species": 2}
        write(root, **counts, image_size=(2 * size, 2 * size))
    settings = {"root": str(root), "backbone": backbone, "pretrained": "none", "epochs": 2}
    settings |= {"image_size": size, "highres_size": 2 * size, "batch_size": 8, "workers": 1}
    return Config().replace(**settings | {"frozen_blocks": 0, "ema_decay": 0.9} | changes)


# ---------------------------------------------------------------- figures


def forward(options: SimpleNamespace) -> Iterator[dict]:
    """Two scales against two plain forward passes, bfloat16."""
    for case, wanted in (("large", "<= 1.08"), ("small", "<= 1.15")):
        backbone, size, batch = options.sizes[case]
        for strength in ("last_class", "rollout_mean"):
            model = build(backbone, size, 2, strength).to(options.device).eval()
            other = plain(backbone, size).to(options.device).eval()
            images = torch.randn(batch, 3, size, size, device=options.device)
            with torch.inference_mode(), torch.autocast(options.device, BF16):
                both = partial(model.forward_preprocessed, images), partial(twice, other, images)
                times = ratios(*(waited(each, options) for each in both), options.repeats)
            what = f"two scales, {strength} / two forwards; {backbone}, {size} px, batch {batch}"
            yield row(what, wanted, *times)


def two_and_plain(options: SimpleNamespace, case: str) -> tuple:
    """A model of two scales, a plain one, images for them, and all that in words."""
    backbone, size, batch = options.sizes[case]
    model = build(backbone, size, 2, "last_class").to(options.device)
    other = plain(backbone, size).to(options.device)
    images = torch.rand(batch, 3, size, size, device=options.device)
    return model, other, images, f"{backbone}, {size} px, batch {batch}"


def waited(function: Callable, options: SimpleNamespace) -> Callable[[], None]:
    """A function called a few times, and what the device has yet to do waited for."""

    def call() -> None:
        for _ in range(options.calls):
            function()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return call


def training(options: SimpleNamespace) -> Iterator[dict]:
    """One step of two scales against two plain passes, forward and backward, and one update."""
    for case, wanted in (("large", "<= 1.08"), ("small", "<= 1.15")):
        model, other, images, what = two_and_plain(options, case)
        ours = training_step(model, "workbench", images, 2, BF16)
        both = ours, training_step(other, "plain", images, 2, BF16)
        times = ratios(*(waited(each, options) for each in both), options.repeats)
        yield row(f"training step, last_class / two plain; {what}", wanted, *times)
        both = partial(strictly, ours, options), ours
        times = ratios(*(waited(each, options) for each in both), options.repeats)
        yield row(f"the same, deterministic / not; {what}", "", *times)


def strictly(function: Callable, options: SimpleNamespace) -> None:
    """Call a function as trainings do, with deterministic algorithms."""
    with deterministic(torch.device(options.device)):
        function()


def compiled(options: SimpleNamespace) -> Iterator[dict]:
    """Forward passes and training steps where the blocks of both models are compiled."""
    backend = "inductor" if options.device == "cuda" else "eager"
    for case, wanted in (("small", "<= 1.15"), ("large", "<= 1.08")):
        model, other, images, what = two_and_plain(options, case)
        for each in (model.backbone, other):
            compile_blocks(each, backend=backend)
        steps = training_step(model, "workbench", images, 2, BF16)
        steps = steps, training_step(other, "plain", images, 2, BF16)
        times = ratios(*(waited(each, options) for each in steps), options.repeats)
        yield row(f"training step, last_class / two plain, compiled; {what}", wanted, *times)
        with torch.inference_mode(), torch.autocast(options.device, BF16):
            both = model.eval().forward_preprocessed, partial(twice, other.eval())
            both = (partial(each, images) for each in both)
            times = ratios(*(waited(each, options) for each in both), options.repeats)
        yield row(f"two scales, last_class / two forwards, compiled; {what}", wanted, *times)


def memory(options: SimpleNamespace) -> Iterator[dict]:
    """Peak memory of a training step above the model's, against the literal implementation's."""
    backbone, size, batch = options.sizes["memory"]
    images, peaks = torch.rand(batch, 3, size, size, device=options.device), []
    for way in ("workbench", "literal"):
        model = build(backbone, size, 2).to(options.device)
        if way == "literal":
            model = LiteralRAMS(model.backbone, model.classifier).to(options.device)
        step = training_step(model, way, images, 2, BF16)
        step()
        peaks.append(peak_memory(step, options))
        del model, step
    what = f"peak memory of a step (MB) / literal; {backbone}, {size} px, batch {batch}"
    yield row(what, "<= 0.36", *([peak] for peak in peaks))


def peak_memory(function: Callable, options: SimpleNamespace) -> float:
    """MB that a function takes at its most, above what was there."""
    if options.device != "cuda":
        function()
        return 1.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def waits(options: SimpleNamespace) -> Iterator[dict]:
    """How often a step of the trainer waits for the device: copies to it and from it."""
    run, steps = options.work / "waits", 5
    run.mkdir()
    config = synthetic_config(options, amp="bf16", epochs=10**4)
    trainer = Trainer(config, run, Processes(device=torch.device(options.device)))
    batches = trainer.batches(range(10**4))
    for step in range(3):
        trainer.train_step(step, batches)
    with count_waits(options.device) as found:
        for step in range(3, 3 + steps):
            trainer.train_step(step, batches)
    batches.close()
    options.notes |= {"waits in steps": dict(pd.Series(found, dtype=str).value_counts())}
    yield row(
        "waits for the device in a training step of two scales", "<= 2", [len(found) / steps], [1.0]
    )


@contextmanager
def count_waits(device: str) -> Iterator[list[str]]:
    """Inside, the place of each call that waits for the GPU is noted, as ``file:line``."""
    places = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "synchroniz" in str(each.message)]
    places += [f"{Path(each.filename).name}:{each.lineno}" for each in found]


# ---------------------------------------------------------------- evidence


MODELS = {
    "plain ViT": {"scales": 1, "highres_size": None},
    "plain ViT, center crop": {"scales": 1, "highres_size": None, "crop_fraction": 0.75},
    "two scales": {},
}


def photos(options: SimpleNamespace) -> Iterator[dict]:
    """Test accuracy of a plain ViT, of one that sees the center, and of two scales, per seed."""
    backbone, sizes, epochs, frozen = options.sizes["photos"]
    base = {"data": options.data, "root": options.photos, "backbone": backbone, "epochs": epochs}
    base |= {
        "frozen_blocks": frozen,
        "pretrained": options.weights or "none",
        "amp": "bf16",
        "workers": options.workers,
    }
    for seed, size, name in product(range(options.seeds), sizes, MODELS):
        if not options.photos or time.monotonic() > options.deadline:
            return
        place = {"image_size": size, "highres_size": 2 * size, "seed": seed}
        config = Config().replace(**base | place | MODELS[name])
        results = read_results(train(config, options.work / f"{name} {size} {seed}"))
        read = results.query("checkpoint == 'last'").iloc[-1]  # the last output
        found = {"model": name, "pixels": size, "seed": seed, "images": int(read["images"])}
        yield found | {"top1": float(read["top1"]), "seconds": float(read["train_seconds"])}


# ---------------------------------------------------------------- the report


CHECKS = (released_numbers, same_as_cpu, resume)
FIGURES = (forward, training, memory, waits, compiled)


def measure(options: SimpleNamespace) -> dict:
    """Everything, kept after each part."""
    started, report = time.monotonic(), describe(options)
    for kind, parts in (("checks", CHECKS), ("figures", FIGURES), ("evidence", (photos,))):
        report[kind] = []
        for part in parts:
            try:
                for found in part(options):
                    if kind == "figures" and options.device == "cpu":
                        found |= UNMEASURED | {"met": "not measured"}
                    report[kind].append(found)
                    print(kind, found, flush=True)
            except Exception as error:  # the device may be lent for minutes: the others still run
                report["errors"].append(f"{part.__name__}: {one_line(error)}")
                print("error:", report["errors"][-1], flush=True)
            if options.device == "cuda":
                torch.cuda.empty_cache()
            report["seconds"] = round(time.monotonic() - started)
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "gpu.json").write_text(json.dumps(report, indent=2, default=str))
            (options.out / "gpu.md").write_text(as_markdown(report))
    return report


def describe(options: SimpleNamespace) -> dict:
    """Where and with what it was measured."""
    card = torch.cuda.get_device_name() if options.device == "cuda" else "none"
    versions = {n: version(n) for n in ("torch", "timm", "numpy", "pandas", "scipy")}
    versions |= {"cuda": torch.version.cuda}
    place = {"commit": options.commit or git_commit(), "card": card, "machine": machine()}
    return place | {"versions": versions, "notes": options.notes, "errors": []}


def as_markdown(report: dict) -> str:
    """The report as tables."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"Card: {report['card']}. {report['machine']}. {versions}. Commit {report['commit']}."]
    lines += [f"Error: {error}" for error in report["errors"]]
    lines += ["", "| figure | goal | measured | met |", "|---|---|---|---|"]
    for each in report.get("figures", []):
        told = "not measured"
        if each["ratio"] is not None:
            told = f"{each['ratio']:.3f} [{each['lowest']:.3f}, {each['highest']:.3f}]"
        lines.append(f"| {each['figure']} | {each['must be']} | {told} | {each['met']} |")
    lines += ["", "| check | bound | found | met |", "|---|---|---|---|"]
    for each in report["checks"]:
        lines.append(f"| {each['check']} | {each['bound']} | {each['value']:.2g} | {each['met']} |")
    if report.get("evidence"):
        lines += ["", "| model | pixels | seeds | top-1 (%) | seconds |", "|---|---|---|---|---|"]
        for (name, pixels), rows in pd.DataFrame(report["evidence"]).groupby(["model", "pixels"]):
            top1, seconds = rows["top1"], rows["seconds"].median()
            told = f"{top1.mean():.1f} [{top1.min():.1f}, {top1.max():.1f}]"
            lines.append(f"| {name} | {pixels} | {len(rows)} | {told} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict:
    """Measure, write the files, and return the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--photos", help="folder of a dataset, for accuracies")
    parser.add_argument("--data", default="cub", help="the dataset's reader")
    parser.add_argument("--seeds", type=int, default=5, help="trainings per model and size")
    parser.add_argument("--weights", help="file of weights for the photos' backbone")
    parser.add_argument("--workers", type=int, default=8, help="loader processes for the photos")
    parser.add_argument("--minutes", type=float, default=7.5, help="no training starts after them")
    parser.add_argument("--commit", help="of this tree, where it is no clone")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.sizes, options.notes = CUDA if on_gpu else CPU, {}
    options.repeats, options.calls = (11, 3) if on_gpu else (1, 1)
    options.deadline = time.monotonic() + 60 * options.minutes
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once, at its first
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        return measure(options)


if __name__ == "__main__":
    report = main()
    print(as_markdown(report))
    raise SystemExit(bool(report["errors"]) or any(c["met"] == "no" for c in report["checks"]))
