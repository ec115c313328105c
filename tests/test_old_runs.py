"""Runs of version 0.1 are read, predict, and resume bit-identically."""

import json
import threading

import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import draw_photos, same_run, tiny_config

from ramslib.config import Config
from ramslib.data.datasets import load_table
from ramslib.distributed import Processes
from ramslib.errors import InputError
from ramslib.experiments.comparison import collect
from ramslib.runs.folder import check_run, lock_run, read_metrics, read_run
from ramslib.runs.inference import load
from ramslib.runs.photos import predict
from ramslib.runs.results import read_predictions, read_results
from ramslib.training.trainer import Trainer, train

# what version 0.1 called it, by the name of today; settings that are not here it did not have
SETTINGS = """
data root image_size crop_fraction augment validation_fraction workers model backbone pretrained
final_norm scales strength threshold proposal class_token align_corners drop_path dropout
patch_stride loss label_smoothing contrastive_weight contrastive_margin epochs steps batch_size
sampling optimizer learning_rate weight_decay momentum layer_decay warmup_steps frozen_blocks amp
ema_decay patience seed
""".split()
SETTINGS = {name: name for name in SETTINGS} | {
    "highres_size": "source_size",
    "normalization": "normalise",
    "pos_embed_resize": "position_resize",
    "legacy_boxes": "released_boxes",
    "grad_checkpointing": "checkpointing",
    "grad_accum_steps": "accumulate",
    "head_lr_scale": "head_factor",
    "clip_grad_norm": "clip_norm",
}
LATER = ["temperature", "unsure_below", "exit_above", "ece_calibrated", "calibrated"]  # since 0.2
COLUMNS = {
    "output": "scale",
    "checkpoint": "weights",
    "mean_per_class_accuracy": "mean_class",
    "ece": "calibration_error",
    "nll": "log_loss",
}


def as_version_0_1(run):
    """Rewrite the files of a run as version 0.1 wrote them."""
    config, metadata, table = read_run(run)
    values = {SETTINGS[k]: v for k, v in metadata["config"].items() if k in SETTINGS}
    values["proposal"] = "centre" if values["proposal"] == "center" else values["proposal"]
    kept = "data_fingerprint classes weights versions python machine commit".split()
    metadata = {"config": values, **{name: metadata[name] for name in kept}}
    metadata["versions"]["ramslib"] = "0.1.0"
    (run / "config.json").write_text(json.dumps(metadata, indent=2))
    table.to_csv(run / "table.csv", index=False)  # absolute paths
    for file in [*run.glob("predictions_*.csv"), *run.glob("results.csv")]:
        old = pd.read_csv(file).rename(columns=COLUMNS).drop(columns=LATER, errors="ignore")
        if "path" in old:
            old["path"] = config.root + "/" + old["path"]
        old.to_csv(file, index=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in run.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            progress = json.loads(opened.metadata()["progress"])
        del progress["best_nll"], progress["key"]
        progress["best_top1"] = 50.0
        save_file(load_file(file), file, {"progress": json.dumps(progress)})
    return run


class StopAfter(threading.Event):
    """Asks for a stop after some steps."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def is_set(self):
        self.left -= 1
        return self.left < 0


def train_some(config, run, steps):
    """Train until a stop."""
    with lock_run(run):
        trainer = Trainer(config, run, Processes())
        assert not trainer.fit(StopAfter(steps), save_every=1e9)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of three classes."""
    return draw_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """Configuration and folder of a run, and the same run as version 0.1 left it."""
    config = tiny_config(photos, epochs=2, proposal="center", grad_accum_steps=2)
    folder = tmp_path_factory.mktemp("runs")
    return config, train(config, folder / "new"), as_version_0_1(train(config, folder / "old"))


def test_a_finished_run_of_version_0_1_is_read(finished, photos):
    config, new, old = finished
    check_run(old, config)
    assert read_run(old)[0] == config == Config.from_file(old / "config.json")
    pd.testing.assert_frame_equal(read_run(old)[2], read_run(new)[2])
    for checkpoint in ("best", "last"):
        found, expected = (read_predictions(run, checkpoint) for run in (old, new))
        assert found.pop("calibrated").equals(found["confidence"])
        pd.testing.assert_frame_equal(found, expected.drop(columns="calibrated"))
        weights = [load(run, checkpoint).state_dict() for run in (old, new)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    left_out = ["train_seconds", *LATER[:-1]]
    found, expected = (read_results(run).drop(columns=left_out) for run in (old, new))
    pd.testing.assert_frame_equal(found, expected)
    assert read_metrics(old).columns.tolist() == read_metrics(new).columns.tolist()
    found, expected = (predict(run, [photos / "test"]) for run in (old, new))
    left_out = ["probability", "unsure"]  # version 0.1 fitted no temperature
    pd.testing.assert_frame_equal(found.drop(columns=left_out), expected.drop(columns=left_out))
    assert len(collect([old])) == 4
    assert train(config, old) == old


def test_an_unfinished_run_of_version_0_1_resumes_bit_identically(finished, photos, tmp_path):
    config = finished[0].replace(epochs=4)
    unbroken = train(config, tmp_path / "unbroken")
    train_some(config, tmp_path / "old", steps=6)  # within the second of four epochs
    run = as_version_0_1(tmp_path / "old")
    with pytest.raises(InputError, match="another run .*seed"):
        train(config.replace(seed=1), run)
    train(config, run)
    same_run(unbroken, run)


def test_data_that_moved_between_stop_and_resume(finished, photos, tmp_path):
    config = finished[0]
    places = [tmp_path / "before", tmp_path / "after"]
    draw_photos(places[0])
    train_some(config.replace(root=str(places[0])), tmp_path / "run", steps=3)
    train_some(config.replace(root=str(places[0])), tmp_path / "old", steps=3)
    as_version_0_1(tmp_path / "old")
    places[0].rename(places[1])
    here = config.replace(root=str(places[1]))
    for run in (tmp_path / "run", tmp_path / "old"):
        train(here, run)
        table, predictions = read_run(run)[2], read_predictions(run)
        assert set(predictions["path"]) == set(table["path"][table["split"] == "test"])
        assert set(table["path"]) == set(load_table(here)["path"])
        assert not (run / "predictions_best.csv").read_text().count(str(tmp_path))
