"""Measure, print the table, and keep it with its plot: see ``--help``."""

import argparse
from pathlib import Path

import pandas as pd
import torch

from benchmarks import curves
from benchmarks.figures import FIGURES
from benchmarks.timing import machine


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks", description="Ratios, measured side by side.")
    parser.add_argument("--out", default="runs/bench", help="folder for table.csv and curves.svg")
    parser.add_argument("--run", help="a trained run, for early exit")
    parser.add_argument("--only", nargs="+", choices=[*FIGURES, "curves"], default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    backbones = ["vit_base_patch16_224", "vit_base_patch32_224"]
    parser.add_argument("--backbones", nargs=2, default=backbones)
    parser.add_argument("--patch", type=int, default=16, help="of the first backbone, pixels")
    parser.add_argument("--size", type=int, default=448, help="pixels")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 336, 448, 560])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Measure what is asked for; returns the table, which ``--out`` then holds as table.csv."""
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    out, chosen = Path(options.out), options.only or [*FIGURES, "curves"]
    out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    rows = []
    for name in [name for name in FIGURES if name in chosen]:
        for row in FIGURES[name](options):
            rows.append(row | {"machine": machine()})
            told = f"{row['ratio']:9.4f} [{row['lowest']:.4f}, {row['highest']:.4f}]"
            print(f"{told} {row['must be']:8} {row['met']:4} {row['figure']}", flush=True)
            pd.DataFrame(rows).to_csv(out / "table.csv", index=False)
    if "curves" in chosen:
        table = curves.measure(options)
        table.to_csv(out / "curves.csv", index=False)
        curves.draw(table, options, out / "curves.svg")
        print(table.to_string(index=False))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
