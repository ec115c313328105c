"""Measure, print the table, keep it and compare it with the last one: see ``--help``."""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch

from benchmarks import curves
from benchmarks.figures import FIGURES
from benchmarks.timing import machine
from ramslib.attention import STRENGTHS
from ramslib.runs.folder import git_commit

SHORT = {
    "only": ["inference", "training", "memory", "proposal", "exits", "loader"],
    "strengths": ["last_class", "rollout_mean"],  # the default, and the paper's
    "batches": [1],
    "repeats": 3,
}
LONG = {"only": [*FIGURES, "curves"], "strengths": [*STRENGTHS], "batches": [1, 2, 8], "repeats": 5}


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks", description="Ratios, measured side by side.")
    parser.add_argument(
        "--out", default="runs/bench", help="folder of the tables and their history"
    )
    parser.add_argument("--run", help="a trained run, for early exit")
    parser.add_argument("--long", action="store_true", help="everything, up to an hour")
    parser.add_argument("--only", nargs="+", choices=LONG["only"])
    parser.add_argument("--strengths", nargs="+", choices=LONG["strengths"])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=2)
    backbones = ["vit_base_patch16_224", "vit_base_patch32_224"]
    parser.add_argument("--backbones", nargs=2, default=backbones)
    parser.add_argument("--patch", type=int, default=16, help="of the first backbone, pixels")
    parser.add_argument("--size", type=int, default=448, help="pixels")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 336, 448, 560])
    parser.add_argument("--batches", type=int, nargs="+")
    options = parser.parse_args(arguments)
    for name, value in (LONG if options.long else SHORT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def last_result(history: Path, place: str) -> dict:
    """The newest result of a machine in a folder, or one without rows."""
    for path in sorted(history.glob("*.json"), reverse=True):
        result = json.loads(path.read_text())
        if result["machine"] == place:
            return result
    return {"commit": "", "rows": []}


def compare(row: dict, before: dict[str, dict]) -> dict:
    """A row with the ratio of the last time and what became of it, where there was one.

    ``change`` says "higher" or "lower" where the ranges have nothing in common.
    """
    if row["figure"] not in before:
        return row | {"before": float("nan"), "change": ""}
    old = before[row["figure"]]
    change = "higher" if row["lowest"] > old["highest"] else ""
    change = "lower" if row["highest"] < old["lowest"] else change
    return row | {"before": old["ratio"], "change": change}


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Measure what is asked for; returns the table, which ``--out`` then holds as table.csv."""
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    out, started = Path(options.out), time.strftime("%Y%m%d-%H%M%S")
    result = {"commit": git_commit(), "machine": machine(), "started": started, "rows": []}
    history = out / "history"
    history.mkdir(parents=True, exist_ok=True)
    last = last_result(history, result["machine"])
    before = {row["figure"]: row for row in last["rows"]}
    file = history / f"{started}-{result['commit']}.json"
    print(result["machine"], f"compared with {last['commit']}" if before else "", flush=True)
    for name in [name for name in FIGURES if name in options.only]:
        begin = time.monotonic()
        for measured in FIGURES[name](options):
            row = compare(measured, before)
            result["rows"].append(row)
            told = f"{row['ratio']:9.4f} [{row['lowest']:.4f}, {row['highest']:.4f}]"
            change = f"{row['change']} than {row['before']:.4f}" if row["change"] else ""
            print(f"{told} {row['must be']:8} {row['met']:4} {row['figure']} {change}", flush=True)
            file.write_text(json.dumps(result, indent=1))
            table = pd.DataFrame(result["rows"]).assign(machine=result["machine"])
            table.to_csv(out / "table.csv", index=False)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    if "curves" in options.only:
        points = curves.measure(options)
        points.to_csv(out / "curves.csv", index=False)
        curves.draw(points, options, out / "curves.svg")
        print(points.to_string(index=False))
    return pd.DataFrame(result["rows"])


if __name__ == "__main__":
    main()
