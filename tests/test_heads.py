"""Linear heads: against scikit-learn, properties of calibration, and that nothing leaks."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ramslib.experiments import heads
from ramslib.experiments.heads import (
    HEADS,
    combine,
    cross_fit,
    discriminant_scores,
    draw_folds,
    logistic_scores,
    stack,
)
from ramslib.experiments.probe import evaluate_split


def draw(classes=3, each=20, size=6, spread=1.0, seed=0):
    """Features (N, D) around a mean per class, and labels; correlated, of unequal scale."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    mixing = random.normal(size=(size, size))
    noise = random.normal(size=(len(labels), size)) @ mixing * spread
    return random.normal(size=(classes, size))[labels] * 2 + noise, labels


@pytest.mark.parametrize("size", [6, 100])
@pytest.mark.parametrize("classes", [2, 5])
def test_discriminants_are_those_of_scikit_learn(size, classes, monkeypatch):
    """With more and with fewer directions than images."""
    features, labels = draw(classes, size=size)
    features, labels = features[:-7], labels[:-7]  # classes of unequal size
    monkeypatch.setattr(heads, "SHRINKAGES", (0.1, 0.5, 1.0))
    scores = discriminant_scores(features, labels, features)
    for shrinkage, found in zip(heads.SHRINKAGES, scores, strict=True):
        known = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, labels)
        expected = known.decision_function(features)
        found = found[:, 1] - found[:, 0] if classes == 2 else found
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_discriminants_of_single_images_are_the_nearest_mean():
    features, labels = draw(4, each=1, size=8)
    new = features[[2, 0, 3]] + 0.01
    nearest = discriminant_scores(features, labels, new).argmax(axis=2)
    assert (nearest == [2, 0, 3]).all() and len(nearest) == 6


def test_logistic_regression_is_that_of_scikit_learn_on_standardized_features():
    features, labels = draw(3)
    fitted = cross_fit(features, labels, None, features, 3, "logistic")
    scaled = StandardScaler().fit_transform(features)
    models = [LogisticRegression(C=c, max_iter=1000).fit(scaled, labels) for c in (0.001, 0.1, 1)]
    expected = models[1].predict_log_proba(scaled)
    found = logistic_scores(scaled, labels, scaled)
    np.testing.assert_allclose(found[heads.INVERSE_PENALTIES.index(0.1)], expected)
    chosen = fitted.outside.argmax(axis=1)
    assert any((chosen == model.predict(scaled)).all() for model in models)


@pytest.mark.parametrize("head", HEADS)
def test_there_may_be_no_new_images(head):
    features, labels = draw(3)
    found = cross_fit(features, labels, None, features[:0], 3, head)
    expected = cross_fit(features, labels, None, features, 3, head)
    assert found.outside.shape == (0, 3) and (found.inside == expected.inside).all()


def loss(logs, labels):
    return -logs[np.arange(len(labels)), labels].mean()


def test_stacking_finds_the_minimum_of_the_loss():
    random = np.random.default_rng(0)
    labels = random.integers(3, size=200)
    signal = np.eye(3)[labels]
    good, bad = (log_softmax(random.normal(size=(200, 3)) + s * signal, 1) for s in (2, 1))
    weights = stack([good, bad], labels)
    found, grid = loss(combine([good, bad], weights), labels), np.linspace(0, 3, 31)
    least = min(loss(combine([good, bad], (a, b)), labels) for a in grid for b in grid)
    assert found <= least + 1e-6 and weights[0] > weights[1] > 0
    overconfident = log_softmax(20 * good, 1)
    assert stack([overconfident], labels)[0] < 0.2
    noise = log_softmax(random.normal(size=(200, 3)) * 3, 1)
    assert stack([good, noise], labels)[1] < 0.1 < stack([good, noise], labels)[0]


@pytest.mark.parametrize("head", HEADS)
def test_images_are_predicted_by_heads_that_did_not_see_them(head):
    """Labels drawn at random are fitted, but not predicted."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(60, 200)), np.repeat([0, 1], 30)
    fitted = cross_fit(features, labels, None, features, 2, head)
    assert (fitted.outside.argmax(axis=1) == labels).mean() == 1
    assert (fitted.inside.argmax(axis=1) == labels).mean() < 0.7
    assert loss(fitted.inside, labels) < np.log(2) + 0.05, "calibrated: nothing is known"
    np.testing.assert_allclose(np.exp(fitted.inside).sum(axis=1), 1)


def test_groups_stay_together_and_close_the_leak():
    """Pairs of equal images with a random label: alone they seem predictable."""
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(size=(40, 100)), 2, axis=0)
    labels, groups = np.repeat(random.permutation([0, 1] * 20), 2), np.repeat(np.arange(40), 2)
    alone = cross_fit(features, labels, None, features[:0], 2).inside
    together = cross_fit(features, labels, groups, features[:0], 2).inside
    assert (alone.argmax(axis=1) == labels).mean() > 0.8
    assert (together.argmax(axis=1) == labels).mean() < 0.7
    for fit, out in draw_folds(labels, groups, seed=0):
        assert not set(groups[fit]) & set(groups[out])


def test_every_image_is_held_out_once_whatever_the_classes_have():
    labels = np.array([0] * 9 + [1] * 2 + [2])
    rows = np.concatenate([out for _, out in draw_folds(labels, None, seed=0)])
    assert sorted(rows) == list(range(12))
    assert draw_folds(np.arange(4), None, seed=0) == []
    assert len(draw_folds(np.repeat([0, 1], 3), np.array([7] * 3 + [8] * 3), seed=0)) == 2


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("counts", [(2, 2), (1, 1, 1), (1, 5, 3), (2, 30)])
def test_classes_of_few_images_give_probabilities(head, counts):
    features, _ = draw(1, each=sum(counts))
    labels = np.repeat(np.arange(len(counts)), counts)
    features[:, 0] += 30 * labels
    fitted = cross_fit(features, labels, None, features[:3], len(counts) + 1, head)
    for logs in fitted:
        assert np.isfinite(logs).all()
        np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1)
    assert fitted.inside.shape == (sum(counts), len(counts) + 1)


def test_a_wrong_label_stands_out():
    features, labels = draw(3, each=20, spread=0.2)
    labels[5] = 2
    inside = cross_fit(features, labels, None, features[:0], 3).inside
    assert inside[np.arange(60), labels].argmin() == 5
    again = cross_fit(features.astype(np.float32), labels, None, features[:0], 3).inside
    np.testing.assert_allclose(np.exp(again), np.exp(inside), atol=1e-4)


def test_what_is_said_of_an_image_comes_from_heads_without_it():
    features, labels = draw(each=12, spread=0.3)
    changed = labels.copy()
    changed[[3, 20]] = [2, 0]
    table = pd.DataFrame({"path": [f"{row}.jpg" for row in range(36)], "label": changed})
    rows = np.arange(36)
    held = evaluate_split(table, [features], {}, rows, rows[:0]).held
    inside = np.exp(cross_fit(features, changed, None, features[:0], 3).inside)
    assert held["path"].tolist() == table["path"].tolist()
    assert held["prediction"][[3, 20]].tolist() == labels[[3, 20]].tolist()
    np.testing.assert_allclose(held["confidence"], inside.max(axis=1))
    np.testing.assert_allclose(held["true_probability"], inside[range(36), changed])
    copies = np.repeat(features[::2], 2, axis=0) + np.random.default_rng(0).normal(size=(36, 1))
    grouped = table.assign(label=np.random.default_rng(1).integers(3, size=18).repeat(2))
    pairs = grouped.assign(group=np.arange(18).repeat(2).astype(str))
    found = [evaluate_split(t, [copies], {}, rows, rows[:0]).held for t in (grouped, pairs)]
    right = [(each["prediction"] == each["label"]).mean() for each in found]
    assert right[1] < right[0], "copies of one group do not tell each other's label"


def test_constant_features_do_no_harm():
    features, labels = draw(3)
    more = np.concatenate([features, np.ones((60, 2))], axis=1)
    one, other = (cross_fit(x, labels, None, x, 3).inside for x in (features, more))
    assert (one.argmax(axis=1) == other.argmax(axis=1)).all()
