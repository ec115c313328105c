"""The probe: features kept and reused, honest intervals, files of others left alone."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tiny import draw_photos, tiny_config

from ramslib.data.transforms import ImageTransform
from ramslib.errors import InputError
from ramslib.evaluation import iterate_batches, predict
from ramslib.experiments import probe as probing
from ramslib.experiments.probe import (
    READ,
    Outcome,
    evaluate_split,
    extract_features,
    probe,
    read_images,
    repeated_folds,
    summarize_splits,
)
from ramslib.model import build_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small configuration over photos of three classes, with a finer look at regions."""
    root = draw_photos(tmp_path_factory.mktemp("photos"), train=6, test=3)
    return tiny_config(root, region_size=48, seed=1)


@pytest.fixture(scope="module")
def table(config):
    """Its images."""
    return read_images(config)


def test_validation_images_train_and_images_come_by_path(table, config):
    assert table["split"].value_counts().to_dict() == {"train": 18, "test": 9}
    assert table["path"].is_monotonic_increasing
    some = read_images(config, 10)
    assert some.groupby(["split", "label"]).size().tolist() == [2] * 3 + [3] * 3
    assert set(some["path"]) < set(table["path"]) and some["path"].is_monotonic_increasing
    assert read_images(config, 1).groupby("split")["label"].nunique().tolist() == [3, 3]
    with pytest.raises(InputError, match="images is 0"):
        read_images(config, 0)


def test_features_are_those_of_the_model_and_kept(table, config, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "BATCH", 4)
    monkeypatch.setattr(probing, "CHUNK", 8)
    found = extract_features(config, table, tmp_path)
    monkeypatch.setattr(probing.evaluation, "iterate_batches", lambda *given: iter(()))
    again = extract_features(config, table, tmp_path)
    assert found.keys() == again.keys()
    assert all((found[name] == again[name]).all() for name in found)
    (folder,) = tmp_path.iterdir()
    chunks = sorted(folder.iterdir())
    assert [chunk.name[:7] for chunk in chunks] == ["0000000", "0000008", "0000016", "0000024"]
    monkeypatch.undo()

    with probing.temporary_seed(config.seed):
        model = build_model(config, 3).eval()
    transform = ImageTransform(config.highres_size, config.crop_fraction)
    regions = predict(model, table, transform).query("output == 'scale 2'")
    sides = regions[["top", "left", "bottom", "right"]].to_numpy()
    np.testing.assert_allclose(found["boxes 2"], sides, rtol=1e-4, atol=1e-3)
    (batch,) = iterate_batches(model, table, transform, 27)
    with torch.inference_mode():
        one, two = model.forward_scales(batch["pixels"])
    for output, name in ((one, "class 1"), (two, "class 2")):
        np.testing.assert_allclose(found[name], output.feature, atol=1e-4)
    np.testing.assert_allclose(found["strength 1"], one.strength, rtol=1e-3)
    assert found["tokens"].tolist() == [[5, 10]] * 27, "2 x 2 and 3 x 3 patches, a class token each"


def test_a_killed_extraction_goes_on_where_it_was(table, config, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "BATCH", 4)
    monkeypatch.setattr(probing, "CHUNK", 8)
    whole = extract_features(config, table, tmp_path / "whole")
    (folder,) = (tmp_path / "whole").iterdir()
    last = sorted(folder.iterdir())[2:]
    for chunk in last:
        chunk.unlink()
    started = []

    def counting(model, table, transform, batch_size, workers, rows):
        started.append(rows)
        return iterate_batches(model, table, transform, batch_size, workers, rows)

    monkeypatch.setattr(probing.evaluation, "iterate_batches", counting)
    rest = extract_features(config, table, tmp_path / "whole")
    assert started == [range(16, 27)]
    assert all((whole[name] == rest[name]).all() for name in whole)
    last[0].write_bytes(b"cut off")
    with pytest.raises(InputError, match="cannot be read .*; remove it"):
        extract_features(config, table, tmp_path / "whole")


@pytest.mark.slow
def test_features_have_the_key_of_what_decides_them(table, config, tmp_path):
    def key(table=table, **changes):
        extract_features(config.replace(**changes), table, tmp_path)
        return len(list(tmp_path.iterdir()))

    assert key() == 1
    assert key(epochs=9, learning_rate=1.0, augment="none", workers=0, test_fraction=0.3) == 1
    for number, change in enumerate(
        ({"threshold": 1.1}, {"crop_fraction": 1.0}, {"region_size": 32}, {"seed": 2}), start=2
    ):
        assert key(**change) == number
    assert key(table.iloc[1:].reset_index(drop=True)) == 6


def test_a_model_without_regions_has_features_too(table, config, tmp_path):
    for model in ("vit", "transfg"):
        changes = {"model": model, "scales": 1, "region_size": None}
        found = extract_features(config.replace(**changes), table, tmp_path)
        assert found["class 1"].shape[0] == 27 and found["tokens"].tolist() == [[5]] * 27


def draw_features(classes=4, each=30, noise=(1.0, 0.8), seed=0):
    """A table with a test split, and a look per entry of ``noise``."""
    random = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes), each)
    split = np.where(np.arange(len(labels)) % 3 == 0, "test", "train")
    paths = [f"{number}.png" for number in range(len(labels))]
    looks = [
        np.eye(classes)[labels] + s * random.normal(size=(len(labels), classes)) for s in noise
    ]
    return pd.DataFrame({"path": paths, "label": labels, "split": split}), looks


def test_everything_is_chosen_on_the_training_images():
    table, looks = draw_features()
    train, test = (np.flatnonzero(table["split"] == name) for name in ("train", "test"))
    outcome = evaluate_split(table, looks, {"rival": looks[0]}, train, test)
    wrong = table.copy()
    wrong.loc[test, "label"] = 0
    other = evaluate_split(wrong, looks, {"rival": looks[0]}, train, test)
    same = ["path", "output", "prediction", "confidence"]
    assert outcome.predictions[same].equals(other.predictions[same])
    assert (outcome.weights == other.weights).all()
    assert outcome.exit_threshold == other.exit_threshold

    def of(name, column="confidence"):
        return outcome.predictions.query("output == @name")[column].to_numpy()

    assert (of("rival") == of("scale 1")).all()
    sure = of("scale 1") > outcome.exit_threshold
    assert outcome.exit_rate == sure.mean()
    np.testing.assert_array_equal(of("early exit"), np.where(sure, of("scale 1"), of(READ)))
    surest = np.maximum(of("scale 1"), of("scale 2"))
    np.testing.assert_allclose(of("most confident"), surest)
    held = outcome.held.query("output in ('scale 1', 'early exit')")
    one, early = (held[held["output"] == name]["rank"] == 0 for name in ("scale 1", "early exit"))
    assert early.mean() >= one.mean()


def test_one_scale_is_read_alone():
    table, looks = draw_features()
    train, test = (np.flatnonzero(table["split"] == name) for name in ("train", "test"))
    outcome = evaluate_split(table, looks[:1], {}, train, test)
    assert outcome.predictions["output"].unique().tolist() == ["scale 1"]
    assert outcome.weights.tolist() == [1] and outcome.exit_threshold == 1


def test_groups_are_kept_apart_in_cross_validation():
    table, _ = draw_features()
    table["group"] = [f"burst {number // 8}" if number < 80 else None for number in range(120)]
    folds = repeated_folds(table)
    assert len(folds) == 15
    for fit, out in folds:
        assert not set(table["group"][fit].dropna()) & set(table["group"][out].dropna())
    whole = [table["group"][out].isna().sum() for _, out in folds]
    assert min(whole) > 0, "images without a group are divided"
    plain, without = repeated_folds(table.drop(columns="group")), table.assign(group=np.nan)
    pairs = zip(plain, repeated_folds(without), strict=True)
    assert all((one[1] == other[1]).all() for one, other in pairs)


def outcome_of(correct, train=20):
    """An outcome of given right (1) and wrong (0) answers per output."""
    predictions = [
        pd.DataFrame(
            {"path": [f"{n}.png" for n in range(len(right))], "label": 0, "output": name}
        ).assign(rank=1 - np.array(right), confidence=0.5, calibrated=0.5, true_probability=0.5)
        for name, right in correct.items()
    ]
    held = [table.iloc[:1].loc[[0] * train] for table in predictions]
    return Outcome(pd.concat(predictions), pd.concat(held), np.ones(2), 1.0, 0.0)


def test_intervals_of_one_split_are_over_its_images():
    right = {"scale 1": [1] * 50 + [0] * 50, READ: [1] * 70 + [0] * 30}
    found = summarize_splits([outcome_of(right)], READ)
    assert found["top1"].tolist() == [50, 70] and found["images"].tolist() == [100, 100]
    p, z = 0.7, stats.norm.ppf(0.975)  # Wilson's formula
    middle = (p + z**2 / 200) / (1 + z**2 / 100)
    reach = z * np.sqrt(p * (1 - p) / 100 + z**2 / 40000) / (1 + z**2 / 100)
    assert found.loc[READ, "low"] == pytest.approx(100 * (middle - reach))
    assert found.loc[READ, "high"] == pytest.approx(100 * (middle + reach))
    gain = found.loc["scale 1", ["gain", "gain_low", "gain_high"]].tolist()
    assert gain[0] == pytest.approx(20) and 10 < gain[1] < 20 < gain[2] < 30
    assert found.loc[READ, "gain"] == 0


def test_intervals_of_many_splits_are_paired_and_widened():
    shares = [(5, 7), (6, 8), (4, 6), (5, 8)]
    splits = [
        outcome_of({name: [1] * k + [0] * (10 - k) for name, k in (("scale 1", a), (READ, b))})
        for a, b in shares
    ]
    found = summarize_splits(splits, READ)
    first, second = 10.0 * np.array(shares).T
    widened = stats.t.ppf(0.975, 3) * np.sqrt(1 / 4 + 10 / 20)
    gains = second - first
    for value, column in ((gains.mean(), "gain"), (first.mean(), "top1")):
        assert found.loc["scale 1", column] == pytest.approx(value)
    low = gains.mean() - widened * gains.std(ddof=1)
    assert found.loc["scale 1", "gain_low"] == pytest.approx(low)
    low = first.mean() - widened * first.std(ddof=1)
    wilson = stats.binomtest(5, 10).proportion_ci(method="wilson").low
    assert found.loc["scale 1", "low"] == pytest.approx(max(0, min(low, 100 * wilson)))
    same = [outcome_of({"scale 1": [1] * 10, READ: [1] * 10})] * 4
    assert summarize_splits(same, READ)["low"].max() < 80, "ten right answers are not certain"


@pytest.mark.slow
def test_the_probe_writes_what_it_says_and_reuses_features(config, tmp_path, monkeypatch):
    lines = probe(config, tmp_path / "out")
    assert len(lines) == 8 and lines[0].startswith("27 images of 3 classes, 9 of them to test on")
    results = pd.read_csv(tmp_path / "out" / "probe.csv")
    assert set(results["evaluation"]) == {"split", "cross-validation"}
    folds = results[results["evaluation"] == "cross-validation"].set_index("output")
    assert folds["splits"].unique().tolist() == [15] and folds["images"].unique().tolist() == [27]
    number = "{top1:.1f} % [{low:.1f}, {high:.1f}]".format(**folds.loc[READ])
    assert number in lines[1]
    assert folds.loc["whole image at 64 px", "tokens"] == 17 >= folds.loc[READ, "tokens"] == 15
    assert 5 <= folds.loc["early exit", "tokens"] <= 15
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert record["lines"] == lines[:-1] and record["settings"]["region_size"] == 48
    held = pd.read_csv(tmp_path / "out" / "out_of_sample.csv")
    assert list(held.columns)[:3] == ["path", "label", "prediction"] and len(held) == 18
    assert (
        held["path"].str.startswith("train/").all() and held["true_probability"].between(0, 1).all()
    )
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv").query("split > 0")
    assert predictions.groupby(["output", "path"]).size().unique().tolist() == [3]
    monkeypatch.setattr(probing.evaluation, "iterate_batches", lambda *given: iter(()))
    assert probe(config, tmp_path / "out") == lines


@pytest.mark.slow
def test_one_scale_has_the_center_crop_as_its_rival(config, tmp_path):
    plain = config.replace(model="vit", region_size=None)
    lines = probe(plain, tmp_path / "out", head="logistic")
    assert len(lines) == 4 and lines[2].startswith("75 % center crop at 32 px")
    assert len(probe(plain, tmp_path / "out", with_rivals=False)) == 3


def test_files_of_others_are_left_alone(config, tmp_path):
    for name in ("probe.json", "probe.csv", "notes.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(InputError, match=f"holds files .{name}. but no probe"):
            probe(config, tmp_path / name)
        assert [file.name for file in (tmp_path / name).iterdir()] == [name]
    with pytest.raises(InputError, match="notes.txt: cannot be written"):
        probe(config, tmp_path / "notes.txt" / "notes.txt")
    with pytest.raises(InputError, match="unknown head 'tree'"):
        probe(config, tmp_path / "new", head="tree")
    assert not (tmp_path / "new").exists()
