"""The comparison of one process with two runs and reports a ratio."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[1] / "benchmarks" / "processes.py"


def test_it_compares_one_process_with_two(capfd):
    spec = importlib.util.spec_from_file_location("benchmark_of_processes", FILE)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    words = ["--preset", "tiny", "--repeats", "1", "--skip", "1", "epochs=1", "highres_size=none"]
    ratio = benchmark.main([*words, "image_size=32", "workers=0", "batch_size=32"])
    out = capfd.readouterr().out
    assert ratio > 0 and f"ratio {ratio:.3f}" in out and f"{ratio:.3f} times as fast" in out
