"""How fast the explorer answers and what it keeps: ``python -m benchmarks.explorer --root PHOTOS``.

Moves the threshold of scale 1 as a hand does and prints, per input size, the time that the kernel
takes per move (redraw and encode all panels, without the browser) and the resident memory after a
number of moves. Every 50 moves the slider rests until scale 2 and the curves have followed; after
the moves that are timed, image and strength change then, too. ``--commit`` does the same with an
older commit, in turns, in processes of their own. Needs the pre-trained weights (see
``ramslib.weights``) or a network.
"""

import argparse
import math
import os
import platform
import subprocess
import sys
import tempfile
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
MARKS = (100, 500, 1000, 5500)  # moves after which memory is read
STRENGTHS = ("rollout_mean", "last_class", "token_pca")
CPUS = Path("/proc/cpuinfo")


def resident() -> float:
    """Resident memory of this process, MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def drag(explorer: Explorer, first: int, last: int, timed: int) -> list[float]:
    """Move the slider from one move to another; returns the milliseconds of each move."""
    slider, times = explorer.controls.thresholds[0], []
    for move in range(first, last):
        start = time.perf_counter()
        slider.value = round(1.5 + 1.45 * math.sin(move / 9), 2)  # 0.05 to 2.95
        times.append(1000 * (time.perf_counter() - start))
        if move % REST == 0:
            if move > timed:
                turn = move // REST
                explorer.browser.list.index = turn % len(explorer.browser.list.options)
                explorer.controls.strength.value = STRENGTHS[turn % len(STRENGTHS)]
            explorer.worker.wait()
    explorer.worker.wait()
    return times


def measure(explorer: Explorer, timed: int, moves: int) -> dict[str, float]:
    """One row of the table."""
    times, done, row = [], 0, {}
    for mark in sorted({timed, *(m for m in MARKS if m <= moves)}):
        times += drag(explorer, done, mark, timed)
        done = mark
        row |= {f"MiB after {mark:,}": resident()} if mark in MARKS else {}
    p50, p95, top = np.percentile(times[:timed], (50, 95, 100))
    return {"p50 (ms)": p50, "p95 (ms)": p95, "max (ms)": top} | row


def compare(commit: str, repeats: int, words: list[str]) -> None:
    """Run this benchmark and that of an older commit in turns; print what each prints."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        subprocess.run(["git", "worktree", "add", "--detach", old, commit], cwd=root, check=True)
        (old / "data").mkdir(exist_ok=True)
        (old / "data" / "weights").symlink_to(root / "data" / "weights")
        ways = [(commit, old), ("this one", root)]
        for repeat in range(repeats):
            for name, place in ways[:: 1 if repeat % 2 else -1]:
                print(f"repeat {repeat + 1}, {name}:", flush=True)
                command = [sys.executable, "-m", "benchmarks.explorer", *words]
                environment = os.environ | {"PYTHONPATH": str(place)}
                subprocess.run(command, cwd=place, env=environment, check=True)
        subprocess.run(["git", "worktree", "remove", "--force", old], cwd=root, check=True)


def main() -> None:
    """Print the table, or those of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="diagnostic", help="a reader's name")
    parser.add_argument("--root", default="data/diagnostic", help="folder of the data set")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2", help="timm's name")
    parser.add_argument("--timed", type=int, default=300, help="moves that are timed")
    parser.add_argument("--moves", type=int, default=1000, help="moves in all")
    parser.add_argument("--commit", help="an older one, to compare with")
    parser.add_argument("--repeats", type=int, default=3, help="of a comparison")
    options = parser.parse_args()
    if options.commit:
        given = {"data": options.data, "root": Path(options.root).absolute()}
        given |= {name: getattr(options, name) for name in ("backbone", "timed", "moves")}
        words = [f"--{name}={value}" for name, value in given.items()]
        return compare(options.commit, options.repeats, words)
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
