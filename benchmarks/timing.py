"""Ratios of two times on a machine that is never quite quiet: measured in pairs, one by one."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch


def ratios(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of both functions, called in turn, in changing order, after one call that warms up.

    Returns:
        ``repeats`` seconds of the first and of the second; pairs were measured side by side.
    """
    seconds = {first: [], second: []}
    for repeat in range(-1, repeats):
        for function in (first, second)[:: 1 if repeat % 2 else -1]:
            started = time.perf_counter()
            function()
            taken = time.perf_counter() - started
            if repeat >= 0:
                seconds[function].append(taken)
    return seconds[first], seconds[second]


def row(figure: str, wanted: str, first: list[float], second: list[float]) -> dict:
    """A row of the table: the median ratio of pairs with its range, and both medians."""
    pairs = [one / other for one, other in zip(first, second, strict=True)]
    middle = statistics.median(pairs)
    return {
        "figure": figure,
        "must be": wanted,
        "ratio": middle,
        "lowest": min(pairs),
        "highest": max(pairs),
        "measured": statistics.median(first),
        "against": statistics.median(second),
        "met": is_met(middle, wanted),
    }


def is_met(ratio: float, wanted: str) -> str:
    """``yes`` or ``no``; nothing where nothing is asked."""
    if not wanted:
        return ""
    sign, bound = wanted.split()
    good = {"<=": ratio <= float(bound), "<": ratio < float(bound), ">=": ratio >= float(bound)}
    return "yes" if good[sign] else "no"


def machine() -> str:
    """One line: processor, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(names)} x {names[0]}" if names else platform.processor()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm"))
    return f"{processor}, {torch.get_num_threads()} threads, {libraries}"
