"""Do two processes train as fast as one process with two threads, at the same global batch?

    python benchmarks/processes.py            # minutes; on a machine that does nothing else
    python benchmarks/processes.py --repeats 5 epochs=2 batch_size=32

Each repeat trains both ways, one right after the other, in the order that the repeat before had
not, and compares the median images per second of their steps, without the first ones. What is
reported is the median of these ratios with its range.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ramslib.config import Config
from ramslib.data.datasets import preparation
from ramslib.runs.folder import read_metrics
from ramslib.training.launch import command, overrides

WAYS = {"1 process": 1, "2 processes": 2}
THREADS = 2  # in all


def images_per_second(config: Config, run: Path, processes: int, skip: int) -> float:
    """Median speed of the training steps after the first ``skip``."""
    words = command(["train", "--run", str(run), *overrides(config)], processes)
    threads = {"OMP_NUM_THREADS": str(THREADS // processes), "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(words, env=os.environ | threads, check=True, stdout=sys.stderr)
    steps = read_metrics(run).query("split == 'train' and step > @skip")
    return float(steps["images_per_second"].median())


def compare(config: Config, folder: Path, repeats: int, skip: int) -> list[float]:
    """The ratio of two processes to one, of each repeat."""
    ratios = []
    for repeat in range(repeats):
        ways = list(WAYS.items())[:: 1 if repeat % 2 else -1]
        speeds = {
            name: images_per_second(config, folder / f"{repeat} {name}", number, skip)
            for name, number in ways
        }
        ratios.append(speeds["2 processes"] / speeds["1 process"])
        told = ", ".join(f"{name} {speed:.2f} images/s" for name, speed in sorted(speeds.items()))
        print(f"repeat {repeat + 1}: {told}, ratio {ratios[-1]:.3f}", flush=True)
    return ratios


def main(arguments: list[str] | None = None) -> float:
    """Measure, print, and return the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", type=int, default=5, help="first steps that do not count")
    parser.add_argument("settings", nargs="*", metavar="name=value")
    options = parser.parse_args(arguments)
    settings = dict(text.split("=", 1) for text in options.settings)
    with tempfile.TemporaryDirectory() as folder:
        root = preparation("diagnostic").write_diagnostic_set(
            Path(folder, "data"), species=4, train_per_species=32, test_per_species=2
        )
        base = {"data": "diagnostic", "root": str(root), "epochs": 3, "validation_fraction": 0}
        config = Config.preset(options.preset, **base | settings)
        ratios = compare(config, Path(folder), options.repeats, options.skip)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {config.backbone} at {config.image_size} "
        f"pixels, global batch {config.batch_size}: 2 processes with 1 thread each are "
        f"{statistics.median(ratios):.3f} times as fast as 1 process with {THREADS} threads "
        f"(median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f})"
    )
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
