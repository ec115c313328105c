"""Temperatures and the confidence that can be relied on: fitted on validation, stored, used."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import norm
from tiny import draw_photos, read_log, tiny_config, tiny_model

import ramslib
from ramslib.data.datasets import load_table
from ramslib.data.transforms import ImageTransform
from ramslib.evaluation import (
    choose_exit_threshold,
    early_exit,
    fit_calibration,
    fit_temperature,
    iterate_batches,
    output_names,
    predict,
    probabilities,
    reliable_confidence,
    temper,
)
from ramslib.runs.inference import load_model
from ramslib.runs.photos import predict as predict_photos
from ramslib.runs.results import read_calibration, read_predictions, read_results
from ramslib.training.trainer import train

TRANSFORM = ImageTransform(48, 0.875)
LATER = [
    "temperature",
    "unsure_below",
    "exit_above",
    "ece_calibrated",
    "calibrated",
]  # older runs lack these


def drawn(seed, true_temperature, count=400, classes=7):
    """Logits, and labels drawn from their softmax at a temperature."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(count, classes)) * 4
    shares = softmax(logits / true_temperature, axis=1)
    return logits, np.array([draw.choice(classes, p=row) for row in shares])


def surprise(logits, labels, temperature):
    """Minus the log of the posterior: labels of a softmax, and log T normal, 0 ± 0.35."""
    true = log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels]
    return -true.sum() - norm.logpdf(np.log(temperature), scale=0.35)


@pytest.mark.parametrize("count", [4, 400])
@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_most_probable_one(true_temperature, count):
    logits, labels = drawn(1, true_temperature, count)
    shares = torch.from_numpy(softmax(logits, axis=1))
    found = fit_temperature(shares, torch.from_numpy(labels))
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 3000))
    best = grid[np.argmin([surprise(logits, labels, each) for each in grid])]
    assert found == pytest.approx(best, rel=3e-3)
    if count == 400:
        assert found == pytest.approx(true_temperature, rel=0.2)


@pytest.mark.parametrize("right", [0, 3])
def test_three_images_say_little(right):
    """By themselves they would make all that follows certain, or as good as unknown."""
    shares = torch.tensor([[0.98, 0.01, 0.01]]).repeat(3, 1)
    labels = torch.tensor([0] * right + [1] * (3 - right))
    assert 0.5 < fit_temperature(shares, labels) < 2.5


def test_tempered_probabilities_are_those_of_divided_logits():
    logits = np.random.default_rng(3).normal(size=(50, 9)) * 10
    shares = torch.from_numpy(softmax(logits, axis=1)).float()
    assert temper(shares, 1.0) is shares
    for temperature in (0.3, 2.5):
        expected = softmax(logits / temperature, axis=1)
        np.testing.assert_allclose(temper(shares, temperature), expected, atol=1e-6)
    certain = torch.tensor([[1.0, 0.0, 0.0]])
    assert temper(certain, 5.0).sum() == pytest.approx(1) and temper(certain, 5.0)[0, 0] > 0.999


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.4, 0.93, 0.97]), st.booleans()), max_size=30))
@settings(max_examples=60)
def test_the_reliable_confidence_is_the_smallest_that_keeps_95_percent_right(images):
    """Of the images that were seen and 50 more, right as often as their confidences say."""
    confidence = torch.tensor([each for each, _ in images], dtype=torch.float64)
    found = reliable_confidence(confidence, torch.tensor([right for _, right in images]).bool())
    reliable = []
    for threshold in {each for each, _ in images}:
        accepted = [right for each, right in images if each >= threshold]
        promised = np.mean([each for each, _ in images if each >= threshold])
        if sum(accepted) + 50 * promised >= 0.95 * (len(accepted) + 50):
            reliable.append(threshold)
    if not images:
        assert np.isnan(found)
    else:
        assert found == min(reliable, default=1.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of photos, the configuration and the folder of a run."""
    folder = tmp_path_factory.mktemp("calibration")
    config = tiny_config(draw_photos(folder / "photos", train=12), validation_fraction=0.5)
    return config, train(config, folder / "run")


def logits_of(loaded, split):
    """(S, N, K) float64 logits of a split, and its labels."""
    table = loaded.table[loaded.table["split"] == split].reset_index(drop=True)
    with torch.no_grad():
        batches = [
            torch.stack(loaded.model(batch["pixels"]).logits)
            for batch in iterate_batches(loaded.model, table, loaded.transform)
        ]
    return torch.cat(batches, dim=1).double().numpy(), table["label"].to_numpy()


def shares_of(logits):
    """Probabilities by output, in numpy."""
    single = softmax(logits, axis=-1)
    fused = [single.mean(axis=0), softmax(logits.mean(axis=0), axis=-1)]
    return dict(zip(output_names(len(logits)), [*single, *fused], strict=True))


def ece(confidence, correct):
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((confidence - correct)[bins == k].sum()) for k in set(bins)]
    return 100 * sum(gaps) / len(confidence)


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_a_run_keeps_temperatures_that_its_validation_split_gives(trained, checkpoint):
    config, run = trained
    results = read_results(run).query("checkpoint == @checkpoint").set_index("output")
    loaded = load_model(run, checkpoint)
    assert loaded.model.temperatures == results["temperature"].to_dict()
    assert loaded.unsure_below == results["unsure_below"].to_dict()
    validation = loaded.table[loaded.table["split"] == "validation"].reset_index(drop=True)
    wanted = choose_exit_threshold(predict(loaded.model, validation, loaded.transform))
    assert loaded.exit_above == pytest.approx(wanted, abs=1e-5)
    assert results["exit_above"].notna().tolist() == [True, False, False, False]
    logits, labels = logits_of(loaded, "validation")
    assert len(labels) == 18
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 3000))
    for name, shares in shares_of(logits).items():
        smallest = min(surprise(np.log(shares), labels, each) for each in grid)
        stored = results["temperature"][name]
        assert surprise(np.log(shares), labels, stored) <= smallest + 1e-4
    predictions = read_predictions(run, checkpoint).groupby("output")
    logits, labels = logits_of(loaded, "test")
    for name, shares in shares_of(logits).items():
        rows, stored = predictions.get_group(name), results.loc[name]
        calibrated = softmax(np.log(shares) / stored["temperature"], axis=1).max(axis=1)
        correct = shares.argmax(axis=1) == labels
        np.testing.assert_allclose(rows["confidence"], shares.max(axis=1), atol=1e-5)
        np.testing.assert_allclose(rows["calibrated"], calibrated, atol=1e-5)
        assert stored["ece"] == pytest.approx(ece(shares.max(axis=1), correct), abs=1e-3)
        assert stored["ece_calibrated"] == pytest.approx(ece(calibrated, correct), abs=1e-3)
    assert (results["temperature"] - 1).abs().max() > 0.01, "something was fitted"
    assert "ece calibrated" in (run / "README.md").read_text()


def test_the_log_of_a_run_is_as_it_was(trained):
    rows = [row for row in read_log(trained[1]) if row["split"] == "validation"]
    assert len(rows) == 3 * 4 and not any("calibrat" in json.dumps(row) for row in rows)


def test_photos_get_calibrated_probabilities(trained):
    config, run = trained
    table = load_table(config)
    stored = read_predictions(run)
    found = predict_photos(run, table.query("split == 'test'")["path"].tolist())
    both = found.merge(stored, on=["path", "output"])
    np.testing.assert_allclose(both["probability"], both["calibrated"], atol=1e-4)
    assert (both["probability"] - both["confidence"]).abs().max() > 0.005


def test_what_is_shown_is_calibrated(trained):
    config, run = trained
    path = load_table(config).query("split == 'test'")["path"].iloc[3]
    inspector = ramslib.inspect(run).set_image(path)
    shown = inspector.probabilities(inspector.outputs())
    rows = read_predictions(run).query("path == @path").set_index("output")
    assert set(shown) == {"scale 1", "scale 2", "mean logits"}
    for name, values in shown.items():
        assert float(values.max()) == pytest.approx(rows["calibrated"][name], abs=1e-4)


def test_early_exit_compares_and_gives_calibrated_confidences(trained):
    config, run = trained
    loaded = load_model(run)
    table = load_table(config).query("split == 'test'").reset_index(drop=True)
    loaded.model.temperatures = {"scale 1": 0.5, "mean logits": 3.0}
    wanted = predict(loaded.model, table, loaded.transform).groupby("output")
    first = wanted.get_group("scale 1")["calibrated"].to_numpy()
    fused = wanted.get_group("mean logits")["calibrated"].to_numpy()
    threshold = np.sort(first)[6:8].mean()
    found, exits = [], []
    for batch in iterate_batches(loaded.model, table, loaded.transform, 4):
        shares, confident = early_exit(loaded.model, batch["pixels"], threshold)
        found += shares.amax(dim=1).tolist()
        exits += confident.tolist()
    assert exits == (first > threshold).tolist() and 0 < sum(exits) < 15
    np.testing.assert_allclose(found, np.where(exits, first, fused), atol=1e-5)


def test_without_a_validation_split_nothing_is_fitted_and_this_is_said(trained, tmp_path, capsys):
    config = trained[0].replace(validation_fraction=0, epochs=1)
    run = train(config, tmp_path / "run")
    assert "no validation split: temperatures are 1" in capsys.readouterr().out
    results = read_results(run)
    assert results["temperature"].eq(1).all() and results["unsure_below"].isna().all()
    assert results["exit_above"].isna().all() and np.isnan(load_model(run).exit_above)
    np.testing.assert_allclose(results["ece_calibrated"], results["ece"])
    assert load_model(run).unsure_below == {}
    model = tiny_model()
    fitted = fit_calibration(model, load_table(config)[:0], TRANSFORM)
    assert fitted["output"].tolist() == output_names(2) and fitted["temperature"].eq(1).all()


@pytest.mark.slow
def test_an_unfinished_run_and_one_of_an_older_version_have_a_temperature_of_1(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    for file in run.glob("*.csv"):
        table = pd.read_csv(file)
        table.drop(columns=LATER, errors="ignore").to_csv(file, index=False)
    assert read_results(run)["temperature"].eq(1).all()
    assert set(load_model(run).model.temperatures.values()) == {1.0}
    predictions = read_predictions(run)
    assert predictions["calibrated"].equals(predictions["confidence"])
    (run / "results.csv").unlink()
    assert read_calibration(run, "best").empty and load_model(run).model.temperatures == {}


def test_probabilities_use_the_temperature_of_their_output():
    logits = [torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.3, 0.1, 3.0]])]
    temperatures = {"scale 2": 2.0, "mean logits": 0.5}
    model = SimpleNamespace(temperatures=temperatures, scale_weights=(1.0, 3.0))
    found = probabilities(logits, model)
    first, second = (each[0].numpy() for each in logits)
    expected = softmax(first), softmax(second / 2), softmax((first + 3 * second) / 2)
    for values, wanted in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(values, wanted, rtol=1e-5)
