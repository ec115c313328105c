"""The folder of a run: described once, checked ever after, one writer at a time."""

import json
import os
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import draw_photos, held_elsewhere, tiny_config

import ramslib
from ramslib.config import Config
from ramslib.data.datasets import fingerprint, read_table
from ramslib.errors import InputError
from ramslib.model import build_model
from ramslib.runs.checkpoint import TrainState, save_checkpoint
from ramslib.runs.results import write_results
from ramslib.runs.run import (
    MetricsLogger,
    check_run,
    is_finished,
    load,
    lock_run,
    open_run,
    read_metrics,
    read_run,
    run_key,
)


@pytest.fixture
def made(tmp_path):
    """Configuration, table and folder of a run with an untrained checkpoint."""
    config = tiny_config(
        draw_photos(tmp_path / "photos"), threshold=(1.2, 1.3), image_size=(32, 48)
    )
    table = read_table(config.data, config.root, 0.2)
    run = tmp_path / "run"
    run.mkdir()
    open_run(run, config, table, "random weights")
    torch.manual_seed(3)
    save_checkpoint(run / "last.safetensors", TrainState(5), build_model(config, 3)[0])
    return config, table, run


def test_a_run_is_read_as_it_was_described(made):
    config, table, run = made
    found, description, read = read_run(run)
    assert found == config
    assert description["classes"] == ["bird 0", "bird 1", "bird 2"]
    assert description["data_fingerprint"] == fingerprint(table)
    assert description["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"ramslib", "timm"} <= set(description["versions"]) and description["commit"]
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    assert read[["top", "left", "bottom", "right"]].dtypes.eq(float).all()
    assert not is_finished(run)


def test_the_configuration_of_a_run_can_be_used_again(made):
    config, _, run = made
    assert Config.from_file(run / "config.json") == config


@pytest.mark.filterwarnings("ignore")
def test_odd_names_survive(tmp_path):
    names = ["NA", "null", "007", 'a, "b"', "nan", os.fsdecode(b"caf\xe9")]
    for name in names:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            photo = tmp_path / "photos" / name / f"{number} {name}.png"
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photo)
    config = tiny_config(tmp_path / "photos")
    table = read_table("folder", config.root, 0)
    (tmp_path / "run").mkdir()
    open_run(tmp_path / "run", config, table, "random weights")
    _, description, read = read_run(tmp_path / "run")
    assert description["classes"] == sorted(names)
    assert read["path"].tolist() == table["path"].tolist()
    assert read["class_name"].tolist() == table["class_name"].tolist()
    predictions = pd.DataFrame(
        {"path": table["path"], "label": table["label"], "output": "scale 1"}
    )
    predictions = predictions.assign(rank=0, confidence=0.5, true_probability=0.5)
    facts = {"epochs": 1, "best_epoch": 1, "train_seconds": 2.0, "processes": 1}
    write_results(tmp_path / "run", {"last": predictions}, facts)
    assert is_finished(tmp_path / "run")
    assert b'"007" to "null"' in (tmp_path / "run" / "README.md").read_bytes()


def test_only_what_decides_the_result_names_and_checks_a_run(made):
    config, table, run = made
    same = config.replace(workers=3, root="elsewhere")
    check_run(run, same, fingerprint(table))
    assert run_key(same, "data") == run_key(config, "data")
    for changes in ({"seed": 5}, {"threshold": 1.2}, {"optimizer": "sgd"}):
        other = config.replace(**changes)
        assert run_key(other, "data") != run_key(config, "data") != run_key(config, "other data")
        with pytest.raises(InputError, match=f"another run \\({next(iter(changes))} .* there, "):
            open_run(run, other, table, "")
    with pytest.raises(InputError, match="its data differ"):
        open_run(run, config, table[1:], "")


EDITS = {
    "{": "Expecting",
    "[]": "not the folder",
    "{}": "config",
    '{"config": 3}': "not the folder",
    '{"config": {"epoks": 3}}': "did you mean 'epochs'",
    '{"config": {"epochs": "many"}}': "epochs",
    '{"config": {"epochs": -1}}': "must be above 0",
    '{"config": {"seed": NaN}}': "seed",
    '{"config": {}}': "lacks data_fingerprint",
    '{"config": {}, "data_fingerprint": "0"}': "classes",
    "\udcff": "codec",
    "[" * 99999: "recursion",
}


def test_a_configuration_edited_out_of_shape_is_told_in_one_line(made):
    config, _, run = made
    for text, reason in EDITS.items():
        (run / "config.json").write_text(text, errors="surrogateescape")
        for use in (read_run, lambda run: check_run(run, config), load):
            with pytest.raises(InputError, match=reason) as error:
                use(run)
            assert str(error.value).startswith(f"{run}: not the folder of a run")


def test_a_table_edited_out_of_shape_is_told(made):
    _, _, run = made
    for text in ("", "a,b\n1,2\n", 'path,label\n"x', "path,label,class_name,split\nx,y,z,train\n"):
        (run / "table.csv").write_text(text)
        with pytest.raises(InputError, match="not the folder of a run"):
            read_run(run)


def test_loading_gives_the_model_that_was_saved(made):
    config, _, run = made
    model = ramslib.load(run, "last")
    assert not model.training and model.image_size == (32, 48)
    expected = load_file(run / "last.safetensors")
    for name, tensor in model.state_dict().items():
        assert tensor.equal(expected[f"model.{name}"])
    with pytest.raises(
        InputError, match="best.safetensors: no such checkpoint; train the run first"
    ):
        load(run)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ramslib.lode


def test_the_journal_forgets_what_came_after_and_what_was_cut(tmp_path):
    rows = [{"step": step, "split": "train", "loss": step / 3} for step in range(1, 6)]
    journal = MetricsLogger(tmp_path, 0)
    journal.write(rows[:2])
    journal.write(rows[2:])
    pd.testing.assert_frame_equal(read_metrics(tmp_path), pd.DataFrame(rows))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "spl')
    assert len(read_metrics(tmp_path)) == 5
    MetricsLogger(tmp_path, 3).write(rows[3:4])
    text = "".join(json.dumps(row) + "\n" for row in rows[:4])
    assert (tmp_path / "metrics.jsonl").read_text() == text
    MetricsLogger(tmp_path, 0)
    assert read_metrics(tmp_path).empty
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="metrics.jsonl: cannot be written"):
        journal.write(rows)


def test_tensorboard_gets_the_rows_of_the_log_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = [{"step": step, "split": "train", "loss": step / 2} for step in range(1, 5)]
    MetricsLogger(tmp_path, 0).write(rows)
    journal = MetricsLogger(tmp_path, 2)
    journal.write(rows[2:])
    journal.write([{"step": 4, "split": "validation", "output": "scale 1", "top1": 50.0}])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (row["step"], row["loss"]) for row in rows
    ]
    assert len(events.Tags()["scalars"]) == 2


def test_one_training_at_a_time_holds_a_folder(tmp_path):
    run = tmp_path / "deep" / "run"
    with held_elsewhere(run) as other:
        with pytest.raises(InputError, match="run: another training works there; wait"):
            with lock_run(run, patience=0.2):
                pass
        (run / ".last.safetensors.1.part").touch()
        threading.Timer(0.3, other.kill).start()
        started = time.monotonic()
        with lock_run(run, patience=20):
            assert time.monotonic() - started < 5
            assert not list(run.glob(".*.part"))


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), lock_run(tmp_path / "file" / "run"):
        pass
    with pytest.raises(InputError, match="not the folder of a run"):
        read_run(tmp_path)
