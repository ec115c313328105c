"""Training: it learns, resumes bit-identical after kills, and processes do not change it."""

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import termios
import time
from collections import Counter
from contextlib import suppress
from functools import partial

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    ROOT,
    draw_photos,
    finish_training,
    held_elsewhere,
    read_log,
    same_run,
    start_training,
    tiny_config,
)

from ramslib import extensions
from ramslib.data.transforms import ImageDataset
from ramslib.errors import InputError
from ramslib.runs import folder
from ramslib.runs.inference import load
from ramslib.runs.photos import predict
from ramslib.runs.results import read_results
from ramslib.training import optimization
from ramslib.training.launch import command, overrides, progress_line
from ramslib.training.trainer import Trainer, train

KILLS = int(os.environ.get("RAMSLIB_KILLS", 3))
ONE = {"workers": 1, "augment": "rand-m9-mstd0.5", "ema_decay": 0.9, "drop_path": 0.1}
ONE |= {"dropout": 0.1, "region_size": 48, "keep_aspect": True}
TWO = {"workers": 1, "optimizer": "momentum", "grad_accum_steps": 2, "batch_size": 8, "epochs": 6}
TWO |= {"augment": "rand-m9-mstd0.5"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of three classes: 30 to train with, of which 6 validate, and 15 to test."""
    return draw_photos(tmp_path_factory.mktemp("photos"), train=10)


def test_a_photo_is_decoded_once_to_train_on_it(photos, tmp_path, monkeypatch):
    decoded, resize = Counter(), ImageDataset._resize

    def count_and_resize(images, row):
        decoded[images.paths[row]] += 1
        return resize(images, row)

    monkeypatch.setattr(ImageDataset, "_resize", count_and_resize)
    run = train(tiny_config(photos, epochs=4), tmp_path / "run")
    paths = folder.read_run(run)[2].groupby("split")["path"]
    assert [decoded[path] for path in paths.get_group("train")] == [1] * 24
    assert min(decoded[path] for path in paths.get_group("validation")) >= 4


def test_it_learns_what_the_photos_show(photos, tmp_path):
    config = tiny_config(photos, epochs=12, learning_rate=3e-3)
    train(config, tmp_path / "run")
    losses = [row["loss"] for row in read_log(tmp_path / "run") if row["split"] == "train"]
    assert len(losses) == 48 and sum(losses[-8:]) < 0.5 * sum(losses[:8])
    results = pd.read_csv(tmp_path / "run" / "results.csv")
    assert set(results["images"]) == {15} and set(results["split"]) == {"test"}
    assert results["top1"].min() > 60
    assert load(tmp_path / "run", "last").num_scales == 2


def test_steps_end_within_an_epoch_with_a_validation_and_the_schedule_at_its_end(photos, tmp_path):
    run = train(tiny_config(photos, scales=1, steps=6, warmup_steps=2), tmp_path / "run")
    log = read_log(run)
    assert [row["step"] for row in log if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [(r["step"], r["epoch"]) for r in log if r["split"] == "validation"] == [(4, 1), (6, 2)]
    rates = [row["learning_rate"] for row in log if row["split"] == "train"]
    cosine = [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx([0, 5e-4, *cosine])
    assert set(pd.read_csv(run / "results.csv")["epochs"]) == {2}


def test_a_finished_run_stays_and_another_configuration_is_refused(photos, tmp_path):
    config = tiny_config(photos, epochs=1)
    run = train(config, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    train(config.replace(workers=1), run)
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}
    with pytest.raises(InputError, match=r"another run \(learning_rate 0.001 there, 0.5 here\)"):
        train(config.replace(learning_rate=0.5), run)


def test_it_says_how_far_it_is(photos, tmp_path):
    assert progress_line(tmp_path) == "starting"
    run = train(tiny_config(photos, epochs=2), tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    speed = statistics.median(json.loads(line)["images_per_second"] for line in lines[:3])
    left = f"about {(8 - 3) * 6 / speed:.0f} s left"
    assert progress_line(run) == f"step 3 of 8, {speed:.3g} images/s, {left}"


def test_the_bar_shows_images_per_second_and_time_left_on_a_terminal(photos, tmp_path):
    """In files there is none."""
    words = ["train", "--run", tmp_path / "run", *overrides(tiny_config(photos, epochs=1))]
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    child = subprocess.Popen(command(words), stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    text = b""
    with suppress(OSError):  # the other side has closed
        while part := os.read(ours, 4096):
            text += part
    os.close(ours)
    assert child.wait(timeout=60) == 0
    assert re.search(rb"100%.*24/24 \[\d\d:\d\d<\d\d:\d\d, .+ images/s, loss=\d", text)


def test_early_stopping_keeps_the_best(photos, tmp_path):
    run = train(tiny_config(photos, epochs=40, patience=2), tmp_path / "run")
    rows = [row for row in read_log(run) if row.get("output") == "mean logits"]
    nll = [row["nll"] for row in rows]
    best = len(nll) - nll[::-1].index(min(nll))
    assert len(nll) == best + 2 < 40
    results = pd.read_csv(run / "results.csv")
    assert set(results["epochs"]) == {best + 2} and set(results["best_epoch"]) == {best}
    last, first = (pd.read_csv(run / f"predictions_{name}.csv") for name in ("last", "best"))
    assert not last.equals(first)


def test_equal_epochs_are_decided_for_the_later_one(photos, tmp_path):
    config = tiny_config(photos, epochs=3, learning_rate=1e-12)
    run = train(config, tmp_path / "run")
    rows = [row for row in read_log(run) if row.get("output") == "mean logits"]
    assert len({row["nll"] for row in rows}) == 1
    results = read_results(run)
    assert set(results["best_epoch"]) == {3}
    assert results["checkpoint"].tolist() == ["best"] * 4 + ["last"] * 4


def test_without_a_validation_split_the_last_epoch_counts(photos, tmp_path):
    run = train(tiny_config(photos, epochs=3, validation_fraction=0), tmp_path / "run")
    assert set(read_results(run)["best_epoch"]) == {3}
    assert "the last: no validation" in (run / "README.md").read_text()


@pytest.mark.parametrize("save_every", [-5, float("nan"), float("inf")])
def test_seconds_between_checkpoints_are_a_number(photos, tmp_path, save_every):
    with pytest.raises(InputError, match="save_every is .*; give seconds, 0 or more"):
        train(tiny_config(photos), tmp_path / "run", save_every)
    assert not (tmp_path / "run").exists()


def test_a_run_without_its_configuration_is_not_resumed_with_another(photos, tmp_path):
    run = train(tiny_config(photos, epochs=1), tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(InputError, match="holds files .* but no run's config.json"):
        train(tiny_config(photos, epochs=1, seed=5), run)
    other = train(tiny_config(photos, epochs=1, seed=5), tmp_path / "other")
    (other / "results.csv").unlink()
    shutil.copy(run / "last.safetensors", other)
    for use in (
        lambda: train(tiny_config(photos, epochs=1, seed=5), other),
        lambda: load(other, "last"),
    ):
        with pytest.raises(InputError, match="last.safetensors: a checkpoint of other settings"):
            use()


def test_a_finished_run_whose_checkpoint_is_lost_says_so(photos, tmp_path):
    config = tiny_config(photos, epochs=1)
    run = train(config, tmp_path / "run")
    (run / "best.safetensors").unlink()
    with pytest.raises(
        InputError, match="best.safetensors: .*restore the file, or train in another"
    ):
        train(config, run)


IDEAS = '''
import ramslib
import torch

@ramslib.reads(blocks=0)
def corner(strength, threshold, recorded):
    """The upper left quarter, whatever the strength."""
    rows, columns = strength.shape[-2:]
    return torch.tensor([[0, 0, rows // 2, columns // 2]]).expand(len(strength), 4)
'''


@pytest.mark.parametrize("processes", [1, 2])
def test_a_proposal_of_ones_own_is_trained_kept_and_used(photos, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(extensions, "TRUSTED", tmp_path / ".config" / "ramslib" / "trusted_sources")
    monkeypatch.setenv("HOME", str(tmp_path))
    ideas, run = tmp_path / "ideas.py", tmp_path / "run"
    ideas.write_text(IDEAS)
    config = tiny_config(photos, epochs=1, proposal=f"{ideas}:corner")
    code, output = finish_training(config, run, processes)
    assert code == 0, output
    ideas.unlink()
    found = predict(run, [photos / "test"]).query("output == 'scale 2'")
    assert found["top"].max() < 5 and found["bottom"].max() < 25
    ideas.write_text(IDEAS.replace("// 2", "// 1"))
    with pytest.raises(InputError, match="the source of 'proposal' differs: ideas.py was changed"):
        train(config, run)


@pytest.mark.parametrize(
    "changes",
    [
        {"validation_fraction": 0},
        {"scales": 1, "loss": "last"},
        {"region_size": 48, "keep_aspect": True, "margin": 0.1, "upsampling": 4},
    ],
)
def test_variants_run_to_the_end(photos, tmp_path, changes):
    run = train(tiny_config(photos, epochs=1, **changes), tmp_path / "run")
    results = pd.read_csv(run / "results.csv")
    assert set(results["best_epoch"]) == {1}
    assert len(results) == 2 * (1 if "scales" in changes else 4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_follows_the_full_one(photos, tmp_path, amp):
    for name in ("none", amp):
        train(tiny_config(photos, epochs=1, amp=name, learning_rate=1e-4), tmp_path / name)
    full, mixed = (
        [row["loss"] for row in read_log(tmp_path / name) if row["split"] == "train"]
        for name in ("none", amp)
    )
    assert mixed == pytest.approx(full, rel=0.01) and mixed != full


def test_automatic_precision_is_that_of_the_device_where_the_run_began(
    photos, tmp_path, monkeypatch
):
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    automatic = tiny_config(photos, epochs=2, amp="auto")
    unbroken = train(automatic, tmp_path / "auto")
    explicit = train(tiny_config(photos, epochs=2, amp="bf16"), tmp_path / "bf16")
    losses = [[row.get("loss") for row in read_log(run)] for run in (unbroken, explicit)]
    assert losses[0] == losses[1] and folder.read_metadata(unbroken)[1]["amp"] == "bf16"

    update = Trainer.update

    def break_off(trainer):
        if trainer.state.step == 3:
            raise KeyboardInterrupt
        update(trainer)

    monkeypatch.setattr(Trainer, "update", break_off)
    with pytest.raises(KeyboardInterrupt):
        train(automatic, tmp_path / "run", save_every=0)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    same_run(train(automatic, tmp_path / "run"), unbroken)
    elsewhere = train(automatic, tmp_path / "elsewhere")
    assert folder.read_metadata(elsewhere)[1]["amp"] == "none"
    cards = [(run / "README.md").read_text() for run in (unbroken, explicit, elsewhere)]
    assert ["bfloat16" in card for card in cards] == [True, True, False] and "float32" in cards[2]
    assert [row.get("loss") for row in read_log(elsewhere)] != losses[0]


def test_a_loss_that_is_no_number_names_epoch_step_and_images(photos, tmp_path, monkeypatch):
    backward, seen = optimization.backward_scales, []

    def plant(model, pixels, *options, **named):
        seen.append(len(pixels))
        damaged = pixels / (0.0 if len(seen) == 6 else 255.0)
        return backward(model, damaged, *options, **named)

    monkeypatch.setattr(optimization, "backward_scales", plant)
    with pytest.raises(InputError) as error:
        train(tiny_config(photos), tmp_path / "run")
    message = str(error.value)
    assert "epoch 2, step 6, on " in message and "\n" not in message
    assert message.count(".png") == 6
    assert len(read_log(tmp_path / "run")) == 5 + 4  # steps, and one validation per view
    state = load_file(tmp_path / "run" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_an_infinite_gradient_stops_before_it_reaches_the_weights(photos, tmp_path, monkeypatch):
    norm = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norm(*args) * float("inf"))
    with pytest.raises(InputError, match="gradient's norm inf in epoch 1, step 1, on "):
        train(tiny_config(photos), tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photo_stops_it_with_one_line(tmp_path, workers):
    photos = draw_photos(tmp_path / "photos")
    photo = photos / "train" / "bird 1" / "3.png"
    photo.write_bytes(photo.read_bytes()[:300])
    with pytest.raises(InputError) as error:
        train(tiny_config(photos, workers=workers), tmp_path / "run")
    message = str(error.value)
    assert str(photo) in message and "1 of 39 images" in message and "\n" not in message


def test_what_a_batch_cannot_be_is_refused(photos, tmp_path):
    with pytest.raises(InputError, match="batch_size 50 exceeds the 24 training images"):
        train(tiny_config(photos, batch_size=50), tmp_path / "run")
    with pytest.raises(InputError, match="batch_size 6 does not divide among 1 processes with 4"):
        train(tiny_config(photos, grad_accum_steps=4), tmp_path / "run")


def test_a_folder_in_use_is_refused(photos, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(folder, "lock_run", partial(folder.lock_run, patience=0.3))
    with held_elsewhere(run), pytest.raises(InputError, match="another process works there"):
        train(tiny_config(photos), run)


def _kill_at_random(child, run, draw, seconds):
    """Kill the process group: some time after its start, or while it writes a checkpoint."""
    while_writing = draw.random() < 0.5
    deadline = time.monotonic() + draw.uniform(0, seconds)
    while time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.005)
    caught = False
    while while_writing and not caught and child.poll() is None:
        caught = any(run.glob(".*.part")) or any(run.glob(".tmp*"))
    if child.poll() is not None:
        return None
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return "writing" if caught else "anywhere"


def _kill_and_resume(config, unbroken, run, processes, kills, seconds):
    """Train with kills, and assert that each run that came to the end is the unbroken one."""
    draw, killed = random.Random(kills), []
    while len(killed) < kills:
        child = start_training(config, run, processes)
        how = _kill_at_random(child, run, draw, seconds)
        if how:
            killed.append(how)
        else:
            assert child.wait() == 0
            same_run(unbroken, run)
            run = run.with_name(f"{run.name}-{len(killed)}")
    code, output = finish_training(config, run, processes)
    assert code == 0, output
    same_run(unbroken, run)
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == {".lock"}
    left = subprocess.run(["pgrep", "-f", run.parent], capture_output=True, text=True)
    assert left.stdout == "", "orphans of a killed engine"
    print(
        f"{processes} processes, killed and resumed: {killed.count('anywhere')} times at random, "
        f"{killed.count('writing')} while writing a checkpoint"
    )


def test_killed_at_random_it_resumes_to_the_bit(photos, tmp_path):
    config = tiny_config(photos, epochs=4 + 2 * KILLS, **ONE)
    started = time.monotonic()
    code, output = finish_training(config, tmp_path / "unbroken")
    assert code == 0, output
    seconds = time.monotonic() - started
    _kill_and_resume(config, tmp_path / "unbroken", tmp_path / "run", 1, KILLS * 2 // 3, seconds)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A training in one and in two processes, on numbers that two do not divide; and its time."""
    folder = tmp_path_factory.mktemp("two")
    config = tiny_config(draw_photos(folder / "photos", train=9, test=5), **TWO)
    train(config, folder / "one")
    started = time.monotonic()
    code, output = finish_training(config, folder / "two", 2)
    assert code == 0, output
    return config, folder / "one", folder / "two", time.monotonic() - started


def test_two_processes_killed_at_random_resume_to_the_bit(two_runs, tmp_path):
    config, _, two, seconds = two_runs
    _kill_and_resume(config, two, tmp_path / "run", 2, KILLS - KILLS * 2 // 3, seconds)


def test_a_rank_that_is_killed_is_started_again_by_torchs_launcher(two_runs, tmp_path):
    """Torch keeps its store: the new ranks must not find the addresses of the dead ones there."""
    config, _, two, _ = two_runs
    run = tmp_path / "run"
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    words = ["train", "--run", run, "--save-every", "0", *overrides(config)]
    command = [sys.executable, "-m", *launcher, "-m", "--", "ramslib", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    child = psutil.Popen(command, env=environment, **options)
    while not (run / "last.safetensors").exists():
        assert child.poll() is None
        time.sleep(0.05)
    ranks = [rank for rank in child.children() if "ramslib" in rank.cmdline()]
    assert len(ranks) == 2
    ranks[1].kill()
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0 and f"{run}: resumes after step" in output, output
    same_run(two, run)


def test_two_processes_follow_the_curve_of_one(two_runs):
    """Gradients are summed in another order: float32 rounding, and what a few steps make of it."""
    one, two = (pd.DataFrame(read_log(run)) for run in two_runs[1:3])
    pd.testing.assert_frame_equal(one, two, rtol=1e-4)
    assert not one.equals(two), "two processes were as one to the bit: did the second one work?"


def test_two_processes_predict_every_image_once_and_as_one_does(two_runs):
    one, two = (pd.read_csv(run / "predictions_last.csv") for run in two_runs[1:3])
    assert len(two) == 15 * 4 and not two.duplicated(["path", "output"]).any()
    pd.testing.assert_frame_equal(one, two, rtol=1e-3)


BAD = {
    "a batch that two processes cannot share": {"batch_size": 5},
    "a setting that only the model can check": {"frozen_blocks": 99},
    "a dataset that is not there": {"root": "missing"},
    "a proposal that does not import": {"proposal": "missing.py:mine"},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD.keys())
def test_what_two_processes_refuse_is_one_line_and_exit_code_2(photos, tmp_path, changes):
    code, output = finish_training(tiny_config(photos).replace(**changes), tmp_path / "run", 2)
    assert code == 2
    assert output.count("\n") == output.count("error: ") == 1, output
    assert not (tmp_path / "run" / "config.json").exists(), "other settings may follow"
