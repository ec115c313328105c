"""Parts of the explorer's page, each alone."""

import gc
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ramslib.explorer.page import app_command
from ramslib.explorer.panels import BackgroundWorker, Panel, probability_bars
from ramslib.explorer.tabs import draw_curve


@pytest.mark.parametrize("is_done", [True, False])
def test_a_worker_is_not_kept_by_its_work(is_done):
    """Else each explorer that a notebook shows stays in memory, with its model."""
    worker, started = BackgroundWorker(threading.RLock(), print, delay=0), threading.Event()

    def work():
        started.set()
        yield lambda: None

    worker(work())
    assert started.wait(10)
    worker.wait()
    if not is_done:
        worker.delay = 60
        worker(work())
        worker.cancel()
        worker.wait()
    gone = weakref.ref(worker)
    del worker
    gc.collect()
    assert gone() is None


def test_the_worker_does_the_newest_work_and_reports_errors():
    done, errors, threads = [], [], threading.active_count()
    worker = BackgroundWorker(threading.RLock(), errors.append, delay=0.05)

    def work(name):
        assert torch.is_inference_mode_enabled()
        yield lambda: done.append(name)
        time.sleep(0.05)
        yield lambda: done.append(name + " again")

    for name in "abc":
        worker(work(name))
    worker.wait()
    assert done == ["c", "c again"]
    worker(work("d"))
    while "d" not in done:
        time.sleep(0.005)
    worker(work("e"))
    worker.wait()
    assert done[2:] == ["d", "e", "e again"], "abandoned between two steps"

    def fail():
        yield lambda: 1 / 0

    worker(fail())
    worker.wait()
    assert [type(error) for error in errors] == [ZeroDivisionError]
    assert threading.active_count() == threads, "a thread ends with its work"


@pytest.mark.slow
@pytest.mark.parametrize("step", ["time.sleep(600)", "x = torch.rand(500, 500) @ x"])
def test_work_in_the_background_does_not_keep_the_process_alive(step):
    code = f"""
import threading, time, torch
from ramslib.explorer.panels import BackgroundWorker
worker, started = BackgroundWorker(threading.RLock(), print, 0), threading.Event()
def work():
    x = torch.rand(500, 500)
    while True:
        started.set()
        {step}
        yield lambda: None
worker(work())
started.wait()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == 0


def test_a_panel_draws_only_what_has_changed():
    panel, drawn = Panel("a <title>"), []
    assert "&lt;title&gt;" in panel.title.value

    def draw():
        drawn.append(1)
        return Image.new("RGB", (8, 8)), "text"

    panel.show(1, draw)
    panel.outdated()
    assert "computing" in panel.note.value
    panel.show(1, draw)
    assert "text" in panel.note.value and drawn == [1]
    panel.show(2, draw)
    assert drawn == [1, 1]


def test_bars_escape_class_names():
    table = pd.DataFrame({"scale 1": [0.25]}, index=["<b>"])
    assert "&lt;b&gt;" in probability_bars(table) and "0.250" in probability_bars(table)


def test_a_drawn_figure_leaves_no_objects_behind():
    curve = pd.DataFrame({"threshold": [0.0, 4.0], "area": [1.0, 0.0]})
    draw_curve(curve)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(3):
        draw_curve(curve)
    assert len(gc.get_objects()) - before < 300 and gc.isenabled(), "a figure has 1,000 and more"


def marker(panel):
    """Where a chart's marker is: share of the image's width."""
    return float(re.search(r"left: ([\d.]+)%", panel.marker.value)[1]) / 100


def test_the_marker_is_at_its_threshold():
    curve = pd.DataFrame({"threshold": [0.0, 4.0], "area": [1.0, 0.0]})
    panel, plain = Panel("", "png"), np.asarray(draw_curve(curve)[0])
    for value in (0, 1.5, 4):
        panel.mark(value)
        changed = plain != np.asarray(draw_curve(curve, mark=value)[0])
        columns = np.nonzero(changed.any(axis=(0, 2)))[0]
        assert abs(columns.mean() / changed.shape[1] - marker(panel)) < 0.003


def test_the_app_ends_idle_kernels_and_takes_large_uploads():
    command = " ".join(app_command(["--no-browser"]))
    assert "cull_idle_timeout=" in command and "cull_interval=" in command
    size = int(re.search(r"websocket_max_message_size': (\d+)", command)[1])
    assert size >= 100 * 2**20 and command.endswith("--no-browser")
    command = " ".join(app_command(["--MappingKernelManager.cull_interval", "5"]))
    assert command.count("cull_interval") == 1, "Voila refuses an option that is given twice"
