"""One training step in a process of its own: its time, and its peak of resident memory.

    python -m benchmarks.step workbench --backbone vit_base_patch16_224 --size 448 --scales 2

prints ``{"seconds": .., "MB": ..}``: the fastest of the steps after the first one, and the peak
above the loaded model, as the operating system (Linux) tells it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.literal import LiteralRAMS
from ramslib.backbone import create_backbone
from ramslib.model import ProposalSettings, RAMSTrans
from ramslib.training.optimization import backward_scales

CLASSES = 200
WAYS = ("workbench", "plain", "plain together", "literal")


def build(backbone: str, size: int, scales: int, strength: str = "rollout_mean") -> RAMSTrans:
    """The workbench's model with random weights."""
    encoder = create_backbone(backbone, size, class_tokens=scales)
    return RAMSTrans(
        encoder, CLASSES, ProposalSettings((1.0,) * (scales - 1), strength, scales=scales)
    )


def plain(backbone: str, size: int) -> nn.Module:
    """The same backbone as timm builds it, fused attention and one class token."""
    return timm.create_model(backbone, img_size=size, num_classes=CLASSES)


def training_step(
    model: nn.Module, way: str, images: Tensor, scales: int, amp: torch.dtype | None = None
) -> Callable[[], None]:
    """A function that takes one step of momentum SGD on the sum of the scales' losses.

    ``images`` are pixels in [0, 1] for the workbench, which normalizes them, and normalized images
    for the other ways. ``amp`` is the autocast type of the forward passes, None for float32.
    """
    labels = torch.arange(len(images), device=images.device) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    def forward() -> Tensor | list[Tensor]:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            return model(images)

    def step() -> None:
        model.train()
        if way == "workbench":
            backward_scales(model, images, labels, [1.0] * scales, amp=amp)
        elif way == "plain":
            for _ in range(scales):
                loss(forward()).backward()
        elif way == "plain together":
            sum(loss(forward()) for _ in range(scales)).backward()
        else:
            sum(map(loss, forward())).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def twice(model: nn.Module, images: Tensor) -> None:
    """Two forward passes."""
    model(images)
    model(images)


def memory(what: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024 / 1e6


def measure(options: argparse.Namespace) -> dict:
    """Build the model, take the steps, and return time and memory."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.way.startswith("plain"):
        model = plain(options.backbone, options.size)
    else:
        model = build(options.backbone, options.size, options.scales, options.strength)
        model.backbone.set_grad_checkpointing(options.grad_checkpointing)
    if options.way == "literal":
        model = LiteralRAMS(model.backbone, model.classifier, options.scales)
    images = torch.rand(options.batch, 3, options.size, options.size)
    step = training_step(model, options.way, images, options.scales)
    before, seconds = memory("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(options.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds[1:] or seconds), "MB": memory("VmHWM") - before}


def in_own_process(way: str, **options) -> dict:
    """`measure` in a fresh process; options as on the command line."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.step", way, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line says and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--strength", default="rollout_mean")
    parser.add_argument("--grad_checkpointing", type=int, default=0)
    for name, default in {"size": 448, "scales": 2, "batch": 2, "steps": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
