"""How fast the explorer answers and what it keeps: ``python -m benchmarks.explorer --root PHOTOS``.

Moves the threshold of scale 1 as a hand does and prints, per input size, the time that the kernel
takes per move (redraw and encode all panels, without the browser) and the resident memory after a
number of moves. Every 50 moves the slider rests until scale 2 and the curves have followed. Needs
the pre-trained weights (see ``ramslib.weights``) or a network.
"""

import argparse
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ramslib import Explorer
from ramslib.data.datasets import read_table
from ramslib.runs.inference import load_backbone

SIZES = ((112, 336), (224, 448))  # input and high resolution, pixels
REST = 50  # moves between two rests
MARKS = (100, 500, 1000)  # moves after which memory is read
CPUS = Path("/proc/cpuinfo")


def resident() -> float:
    """Resident memory of this process, MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def drag(explorer: Explorer, first: int, last: int) -> list[float]:
    """Move the slider from one move to another; returns the milliseconds of each move."""
    slider, times = explorer.controls.thresholds[0], []
    for move in range(first, last):
        start = time.perf_counter()
        slider.value = round(1.5 + 1.45 * math.sin(move / 9), 2)  # 0.05 to 2.95
        times.append(1000 * (time.perf_counter() - start))
        if move % REST == 0:
            explorer.worker.wait()
    explorer.worker.wait()
    return times


def measure(explorer: Explorer, timed: int, moves: int) -> dict[str, float]:
    """One row of the table."""
    times, done, row = [], 0, {}
    for mark in sorted({timed, *(m for m in MARKS if m <= moves)}):
        times += drag(explorer, done, mark)
        done = mark
        row |= {f"MiB after {mark:,}": resident()} if mark in MARKS else {}
    p50, p95, top = np.percentile(times[:timed], (50, 95, 100))
    return {"p50 (ms)": p50, "p95 (ms)": p95, "max (ms)": top} | row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="diagnostic", help="a reader's name")
    parser.add_argument("--root", default="data/diagnostic", help="folder of the data set")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2", help="timm's name")
    parser.add_argument("--timed", type=int, default=300, help="moves that are timed")
    parser.add_argument("--moves", type=int, default=1000, help="moves in all")
    options = parser.parse_args()
    table, rows = read_table(options.data, options.root), {}
    for sizes in SIZES:
        model = load_backbone(options.backbone, table, *sizes)
        explorer = Explorer(options.data, options.root, "runs/benchmark", model)
        rows["/".join(map(str, sizes))] = measure(explorer, options.timed, options.moves)
    print(pd.DataFrame(rows).T.round(1).to_string())
    cpu = CPUS.read_text().split("model name\t: ")[-1].split("\n")[0] if CPUS.exists() else ""
    versions = " ".join(f"{n} {version(n)}" for n in ("torch", "timm", "pillow", "ipywidgets"))
    print(f"{cpu or platform.machine()}, {torch.get_num_threads()} threads, {versions}")


if __name__ == "__main__":
    main()
