"""Time and memory of a training step against the number of patches and of scales."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.step import in_own_process

WAYS = ("workbench", "literal")


def measure(options: SimpleNamespace) -> pd.DataFrame:
    """``way, size, scales, patches, seconds, MB``, each from a process of its own, batch 1."""
    points = [(size, 2) for size in options.sizes] + [(options.size, n) for n in (1, 3, 4)]
    rows = []
    for size, scales in points:
        for way in WAYS:
            given = {"backbone": options.backbones[0], "size": size, "scales": scales}
            told = in_own_process(way, **given, batch=1, threads=options.threads)
            patches = (size // options.patch) ** 2
            rows.append({"way": way, "patches": patches, **given, **told})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, options: SimpleNamespace, path: Path) -> None:
    """Four panels: seconds and MB, against patches and against scales."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    for row, (name, unit) in zip(axes, {"seconds": "s", "MB": "MB"}.items(), strict=True):
        for axis, along in zip(row, ("patches", "scales"), strict=True):
            fixed = table["scales"] == 2 if along == "patches" else table["size"] == options.size
            for way, part in table[fixed].groupby("way", sort=False):
                part = part.sort_values(along)
                axis.plot(part[along], part[name], marker="o", label=way)
            axis.set(xlabel=f"number of {along}", ylabel=f"training step ({unit})", ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
