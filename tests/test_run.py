"""The folder of a run: described once, checked ever after, one writer at a time."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import draw_photos, held_elsewhere, tiny_config

import ramslib
from ramslib import extensions
from ramslib.config import Config
from ramslib.data.datasets import fingerprint, read_table
from ramslib.errors import InputError
from ramslib.model import build_model
from ramslib.runs.checkpoint import TrainState, save_checkpoint
from ramslib.runs.folder import (
    MetricsLogger,
    check_folder,
    check_run,
    init_run,
    is_finished,
    keep_sources,
    lock_folder,
    lock_run,
    read_metrics,
    read_run,
    run_key,
)
from ramslib.runs.inference import load
from ramslib.runs.results import UNCALIBRATED, read_predictions, read_results, write_results


@pytest.fixture(autouse=True)
def own_trust(tmp_path, monkeypatch):
    """Sources of tests are trusted in a file of the test."""
    monkeypatch.setattr(extensions, "TRUSTED", tmp_path / "trusted" / "sources")


@pytest.fixture
def made(tmp_path):
    """Configuration, table and folder of a run with an untrained checkpoint."""
    config = tiny_config(
        draw_photos(tmp_path / "photos"), threshold=(1.2, 1.3), image_size=(32, 48)
    )
    table = read_table(config.data, config.root, 0.2)
    run = tmp_path / "run"
    run.mkdir()
    init_run(run, config, table, "random weights")
    torch.manual_seed(3)
    save_checkpoint(run / "last.safetensors", TrainState(5), build_model(config, 3))
    return config, table, run


def test_a_run_is_read_as_it_was_described(made):
    config, table, run = made
    found, description, read = read_run(run)
    assert found == config
    assert description["classes"] == ["bird 0", "bird 1", "bird 2"]
    assert description["data_fingerprint"] == fingerprint(table)
    assert description["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"ramslib", "timm"} <= set(description["versions"]) and description["commit"]
    pd.testing.assert_frame_equal(read, table.drop(columns="group"), check_dtype=False)
    assert pd.read_csv(run / "table.csv")["path"].str.startswith("train/bird 0/").any()
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
    init_run(tmp_path / "run", config, table, "random weights")
    _, description, read = read_run(tmp_path / "run")
    assert description["classes"] == sorted(names)
    assert read["path"].tolist() == table["path"].tolist()
    assert read["class_name"].tolist() == table["class_name"].tolist()
    predictions = table.loc[table["split"] == "test", ["path", "label"]]
    predictions = predictions.assign(output="scale 1", rank=0, prediction=0)
    predictions = predictions.assign(confidence=0.5, calibrated=0.5, true_probability=0.5)
    columns = {"epochs": 1, "best_epoch": 1, "train_seconds": 2.0, "processes": 1}
    calibration = pd.DataFrame([{"output": "scale 1"} | UNCALIBRATED])
    outcome = calibration.drop(columns="ece_calibrated"), predictions
    write_results(tmp_path / "run", {"best": outcome}, columns)
    assert is_finished(tmp_path / "run") and len(read_results(tmp_path / "run")) == 1
    found = read_predictions(tmp_path / "run")
    assert found["path"].tolist() == predictions["path"].tolist()
    assert b'"007" to "null"' in (tmp_path / "run" / "README.md").read_bytes()


def test_only_what_decides_the_result_names_and_checks_a_run(made):
    config, table, run = made
    same = config.replace(workers=3, root="elsewhere")
    check_run(run, same)
    assert run_key(same, "data") == run_key(config, "data")
    for changes in ({"seed": 5}, {"threshold": 1.2}, {"optimizer": "sgd"}):
        other = config.replace(**changes)
        assert run_key(other, "data") != run_key(config, "data") != run_key(config, "other data")
        with pytest.raises(InputError, match=f"another run \\({next(iter(changes))} .* there, "):
            init_run(run, other, table, "")
    differ = {f"1 of {len(table)} images are missing, first: .*bird": table[1:]}
    differ["labels, splits or files of its images changed"] = table.assign(split="test")
    differ["1 images are new, first: new.png"] = pd.concat(
        [table, table[:1].assign(path=f"{config.root}/new.png")]
    )
    for what, changed in differ.items():
        with pytest.raises(InputError, match=f"its data differ: {what}"):
            init_run(run, config, changed, "")


def edited(config, classes='["a"]'):
    return f'{{"config": {config}, "data_fingerprint": "0", "weights": "", "classes": {classes}}}'


EDITS = {
    "{": "Expecting",
    "[]": "no attribute",
    "{}": "config",
    '{"config": 3}': "lacks config",
    edited('{"epoks": 3}'): "did you mean 'epochs'",
    edited('{"epochs": "many"}'): "epochs",
    edited('{"epochs": -1}'): "epochs",
    edited('{"seed": NaN}'): "seed",
    '{"config": {}}': "lacks data_fingerprint",
    '{"config": {}, "data_fingerprint": "0"}': "classes",
    edited("{}", '"bird"'): "classes",
    edited("{}", "3"): "classes",
    edited("{}", "[1, 2]"): "classes",
    "\udcff": "codec",
    "[" * 99999: "recursion",
}


@pytest.mark.slow
@pytest.mark.parametrize("text", EDITS, ids=[text[:40] for text in EDITS])
def test_a_configuration_edited_out_of_shape_is_one_line(made, text):
    config, _, run = made
    (run / "config.json").write_text(text, errors="surrogateescape")
    for use in (read_run, lambda run: check_run(run, config), load, check_folder):
        with pytest.raises(InputError, match=EDITS[text]) as error:
            use(run)
        assert str(error.value).startswith(f"{run}: not the folder of a run")
        assert "\n" not in str(error.value)


def test_settings_that_were_edited_are_noticed(made):
    _, _, run = made
    metadata = json.loads((run / "config.json").read_text())
    metadata["config"] |= {"seed": 5}
    (run / "config.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="settings in config.json were edited.*; restore"):
        read_run(run)
    metadata["config"] |= {"seed": 0, "root": "elsewhere", "workers": 3}
    (run / "config.json").write_text(json.dumps(metadata))
    assert read_run(run)[0].workers == 3


def test_a_table_edited_out_of_shape_is_named(made):
    _, _, run = made
    for text in ("", "a,b\n1,2\n", 'path,label\n"x', "path,label,class_name,split\nx,y,z,train\n"):
        (run / "table.csv").write_text(text)
        with pytest.raises(InputError, match="table.csv: cannot be read"):
            read_run(run)


def test_data_may_move(made, tmp_path):
    config, table, run = made
    shutil.move(config.root, tmp_path / "elsewhere")
    moved = table["path"].str.replace("/photos/", "/elsewhere/")
    assert read_run(run, tmp_path / "elsewhere")[2]["path"].tolist() == moved.tolist()
    here = config.replace(root=str(tmp_path / "elsewhere"))
    init_run(run, here, read_table(here.data, here.root, 0.2), "")
    found, _, read = read_run(run)
    assert found == here and read["path"].tolist() == moved.tolist()


def test_a_root_that_is_relative_is_found_from_other_folders(tmp_path, monkeypatch):
    draw_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    config, run = tiny_config("photos"), tmp_path / "run"
    run.mkdir()
    table = read_table(config.data, config.root, 0.2)
    init_run(run, config, table, "")
    monkeypatch.chdir(run)
    assert all(map(os.path.exists, read_run(run)[2]["path"]))


def write_source(path, name="mine", value=1):
    """A file with a proposal; its path as a setting takes it."""
    path.write_text(f"import ramslib\n\ndef {name}(strength, threshold, recorded):\n    {value}\n")
    return f"{path}:{name}"


def test_sources_are_kept_and_a_changed_one_is_another_run(made, tmp_path):
    config, table, _ = made
    run, ideas = tmp_path / "other", tmp_path / "ideas.py"
    config = config.replace(proposal=write_source(ideas))
    kept = keep_sources(config, run)
    init_run(run, kept, table, "")
    assert read_run(run)[0] == kept != config
    copy, name = kept.proposal.split(":")
    assert Path(copy).parent == run / "sources" and name == "mine"
    assert run_key(kept, "data") == run_key(config, "data")
    check_run(run, config)
    before = run_key(config, "data")
    write_source(ideas, value=2)
    assert run_key(config, "data") != before
    for use in (check_run, lambda run, config: keep_sources(config, run)):
        with pytest.raises(InputError, match="source of 'proposal' differs: ideas.py was changed"):
            use(run, config)
    assert len(list((run / "sources").iterdir())) == 1
    with pytest.raises(InputError, match=r"another run \(proposal .*:mine' there, .*:yours' here"):
        check_run(run, config.replace(proposal=write_source(ideas, "yours")))
    shutil.move(run, tmp_path / "moved")
    ideas.unlink()
    assert Path(read_run(tmp_path / "moved")[0].proposal.split(":")[0]).exists()


def test_loading_gives_the_model_that_was_saved(made):
    config, _, run = made
    model = ramslib.load(run, "last")
    assert not model.training and model.image_size == (32, 48)
    expected = load_file(run / "last.safetensors")
    for name, tensor in model.state_dict().items():
        assert tensor.equal(expected[f"model.{name}"])
    with pytest.raises(InputError, match="best.safetensors: no such checkpoint; train"):
        load(run)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ramslib.lode


def test_a_checkpoint_that_is_lost_from_a_finished_run_has_one_way_out(made):
    _, _, run = made
    (run / "results.csv").write_text("")
    with pytest.raises(InputError, match="finished: restore the file, or train in another folder"):
        load(run)


ROWS = ["[1]", "3", "{}", '{"step": 1}', '{"step": "a", "split": "train"}', "\0\1", "\udcff"]
ROWS += ['{"step": 1, "split": 3}', "[" * 99999]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_row_that_no_kill_cuts_short_is_named(tmp_path, row):
    lines = ['{"step": 1, "split": "train"}', row, '{"step": 2, "split": "train"}', ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), errors="surrogateescape")
    for use in (read_metrics, lambda run: MetricsLogger(run, 2)):
        with pytest.raises(InputError, match="metrics.jsonl:2: not a row"):
            use(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:2]), errors="surrogateescape")
    assert len(read_metrics(tmp_path)) == 1, "a kill may have cut the last row"


def test_the_log_drops_what_came_after_and_what_was_cut(tmp_path):
    rows = [{"step": step, "split": "train", "loss": step / 3} for step in range(1, 6)]
    logger = MetricsLogger(tmp_path, 0)
    logger.write(rows[:2])
    logger.write(rows[2:])
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
        logger.write(rows)


def test_tensorboard_gets_the_rows_of_the_log_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = [{"step": step, "split": "train", "loss": step / 2} for step in range(1, 5)]
    MetricsLogger(tmp_path, 0).write(rows)
    logger = MetricsLogger(tmp_path, 2)
    logger.write(rows[2:])
    logger.write([{"step": 4, "split": "validation", "output": "scale 1", "top1": 50.0}])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (row["step"], row["loss"]) for row in rows
    ]
    assert len(events.Tags()["scalars"]) == 2


def test_a_full_disk_ends_the_curves_and_not_the_training(tmp_path, recwarn):
    logger = MetricsLogger(tmp_path, 0)
    rows = [{"step": step, "split": "train", "loss": 1.0} for step in (1, 2)]
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").symlink_to("/dev")
    logger.curves = tmp_path / "tensorboard" / "full"
    logger.write(rows)
    logger.write(rows)
    assert len(recwarn) == 1
    assert "tensorboard/full: no more curves ([Errno 28]" in str(recwarn[0].message)
    assert len(read_metrics(tmp_path)) == 4
    MetricsLogger(tmp_path, 9)  # a link is not removed
    assert os.path.exists("/dev/full")


def test_one_training_at_a_time_holds_a_folder(tmp_path, capsys):
    run = tmp_path / "deep" / "run"
    with held_elsewhere(run) as other:
        with pytest.raises(InputError, match="run: another process works there; wait"):
            with lock_run(run, patience=0.2):
                pass
        assert capsys.readouterr().out.count("waiting up to 0 s") == 1
        (run / ".last.safetensors.1.part").touch()
        threading.Timer(0.3, other.kill).start()
        started = time.monotonic()
        with lock_run(run, patience=20):
            assert time.monotonic() - started < 5
            assert not list(run.glob(".*.part"))


def test_a_training_that_is_refused_leaves_no_folder_but_a_persons(tmp_path):
    def refuse(run, name=None):
        with pytest.raises(InputError, match="refused"), lock_run(run):
            if name:
                (run / name).touch()
            raise InputError("refused")

    (old := tmp_path / "old").mkdir()
    refuse(tmp_path / "new"), refuse(tmp_path / "begun", "config.json"), refuse(old)
    refuse(tmp_path / "noted", "notes.txt")
    assert sorted(os.listdir(tmp_path)) == ["begun", "noted", "old"]


def _hold_with_a_forked_process(folder, pids):
    with lock_folder(folder):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        pids.put(child.pid)
        time.sleep(60)


def test_a_killed_process_releases_a_folder_at_once_though_its_forks_live_on(tmp_path):
    """As loader processes do, for seconds."""
    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    holder = context.Process(target=_hold_with_a_forked_process, args=(tmp_path, pids))
    holder.start()
    orphan = pids.get(timeout=20)
    try:
        with pytest.raises(InputError, match="another process"), lock_folder(tmp_path, 0):
            pass
        holder.kill()
        holder.join()
        os.kill(orphan, 0)
        with lock_folder(tmp_path, 0):
            pass
    finally:
        os.kill(orphan, 9)


OWN_FILES = [
    "README.md",
    "table.csv",
    "metrics.jsonl",
    "best.safetensors",
    "predictions_last.csv",
    ".tmpdir/a",
    ".notes.1.part",
    "tensorboard/events",
]


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_folder_of_a_person_is_refused_untouched(made, tmp_path, name):
    config, _, _ = made
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(InputError, match="mine: holds files .* choose a new or an empty folder"):
        with lock_run(tmp_path / "mine"):
            pass
    assert mine.read_text() == "mine"
    assert os.listdir(tmp_path / "mine") == [name.split("/")[0]]


def test_only_temporary_files_of_our_own_are_removed(made):
    _, _, run = made
    removed = [".last.safetensors.123.part", ".results.csv.1.part", ".tmpAb3dE9"]
    kept = [".tmpdir", ".tmpfile", ".notes.1.part", "a.part", ".last.safetensors.x.part"]
    for name in (*removed, *kept):
        (run / name).touch()
    (run / ".tmpAbcdef").mkdir()
    (run / ".last.safetensors.9.part").symlink_to("nowhere")
    with lock_run(run):
        names = set(os.listdir(run))
    assert names.isdisjoint(removed)
    assert names >= {*kept, ".tmpAbcdef", ".last.safetensors.9.part"}


def test_what_a_kill_left_before_the_first_file_is_no_persons_folder(tmp_path):
    for name in (".lock", "output.log", "job.json", ".config.json.1.part"):
        (tmp_path / name).touch()
    (tmp_path / "sources").mkdir()
    check_folder(tmp_path)


@pytest.mark.parametrize("path", ["", ".", "./"])
def test_a_folder_without_a_name_is_refused(path):
    with pytest.raises(InputError, match="has no name; give one"):
        check_folder(Path(path))


def test_links_are_not_replaced(made):
    _, _, run = made
    (run / "metrics.jsonl").symlink_to(run / "not mounted")
    with pytest.raises(InputError, match="metrics.jsonl: .*link"):
        MetricsLogger(run, 0)
    assert (run / "metrics.jsonl").is_symlink()


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), lock_run(tmp_path / "file" / "run"):
        pass
    with pytest.raises(InputError, match="not the folder of a run"):
        read_run(tmp_path)
