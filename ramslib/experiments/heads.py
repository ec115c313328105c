"""Linear heads on frozen features, every choice about them made by cross-validation.

`cross_fit` regularizes and calibrates a head without seeing more than the training images, and also
returns what it says about each of these when it was fitted without it, by which suspicious labels
are found; `stack` weights several heads.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import linalg, optimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

FOLDS = 5  # of cross-validation
SHRINKAGES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9)  # of the discriminant, in (0, 1]
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of logistic regression, its C

Array = np.ndarray


def discriminant_scores(features: Array, labels: Array, new: Array) -> Array:
    """Linear discriminant analysis, with the covariance within classes shrunk to a multiple of I.

    Each is scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr")``, but one decomposition
    serves all. With a single image per class they are the nearest mean.

    Args:
        features: (N, D), standardized.
        labels: (N,) 0 to K - 1, all of which occur.
        new: (n, D) likewise.

    Returns:
        Scores (R, n, K) of the new images, for each of `SHRINKAGES`.
    """
    counts = np.bincount(labels)
    means = np.eye(len(counts))[labels].T @ features / counts[:, None]
    _, deviations, axes = linalg.svd(features - means[labels], full_matrices=False)
    variances = deviations**2 / len(labels)
    average = variances.sum() / features.shape[1] or 1.0
    scores = []
    for shrinkage in SHRINKAGES:
        outside = 1 / (shrinkage * average)  # precision of the directions without any variance
        gain = 1 / ((1 - shrinkage) * variances + shrinkage * average) - outside
        weights = outside * means + means @ axes.T * gain @ axes
        bias = np.log(counts / len(labels)) - (means * weights).sum(axis=1) / 2
        scores.append(new @ weights.T + bias)
    return np.stack(scores)


def logistic_scores(features: Array, labels: Array, new: Array) -> Array:
    """Log probabilities by scikit-learn's logistic regression, for each of `INVERSE_PENALTIES`."""
    models = [LogisticRegression(C=each, max_iter=1000) for each in INVERSE_PENALTIES]
    if not len(new):  # which scikit-learn refuses
        return np.empty((len(models), 0, labels.max() + 1))
    return np.stack([model.fit(features, labels).predict_log_proba(new) for model in models])


# how a kind of head, fitted to features (N, D) and labels, scores new images: (R, n, K)
HEADS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "discriminant": discriminant_scores,
    "logistic": logistic_scores,
}


def _scores(head: str, old: Array, labels: Array, new: Array, classes: int) -> Array:
    """Log probabilities of new images for each regularization: (R, n, K).

    A class that was not seen is as likely as the least likely one.

    Args:
        head: a key of ``HEADS``.
        old: (N, D) features that are fitted.
        labels: theirs.
        new: (n, D).
        classes: K.
    """
    seen, index = np.unique(labels, return_inverse=True)
    mean, deviation = old.mean(axis=0), old.std(axis=0)
    deviation[deviation == 0] = 1
    found = np.zeros((1, len(new), len(seen)))
    if len(seen) > 1:
        found = HEADS[head]((old - mean) / deviation, index, (new - mean) / deviation)
    scores = np.repeat(found.min(axis=2, keepdims=True), classes, axis=2)
    scores[:, :, seen] = found
    return log_softmax(scores, axis=2)


def stack(scores: Sequence[Array], labels: Array) -> Array:
    """Weights of several log probabilities (N, K), whose weighted sum predicts the labels best.

    They are at least 0 and minimize the negative log-likelihood, which is convex in them. The
    weight of a single one calibrates it, as temperature scaling does (Guo et al., 2017).

    Returns:
        (S,) weights.
    """
    stacked, truth = np.stack(scores), np.eye(scores[0].shape[1])[labels]

    def loss(weights: Array) -> tuple[float, Array]:
        logs = log_softmax(np.tensordot(weights, stacked, 1), axis=1)
        slope = (np.exp(logs) - truth) / len(labels)
        return -(logs * truth).sum() / len(labels), (slope * stacked).sum(axis=(1, 2))

    start, bounds = np.full(len(scores), 0.5 / len(scores)), [(0, 10)] * len(scores)
    options = {"jac": True, "bounds": bounds, "method": "L-BFGS-B", "tol": 1e-7}
    return optimize.minimize(loss, start, **options).x


def combine(scores: Sequence[Array], weights: Sequence[float]) -> Array:
    """Log probabilities (N, K) of a weighted sum of log probabilities."""
    return log_softmax(np.tensordot(weights, np.stack(scores), 1), axis=1)


def draw_folds(labels: Array, groups: Array | None, seed: int) -> list[tuple[Array, Array]]:
    """Rows to fit and rows to predict, class by class; a group is never divided.

    As many as the largest class has images, at most `FOLDS`; none where that is one.
    """
    count = min(FOLDS, np.bincount(labels).max(initial=0))
    kind = StratifiedKFold
    if groups is not None:
        kind, count = StratifiedGroupKFold, min(count, len(np.unique(groups)))
    if count < 2:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
        return list(kind(count, shuffle=True, random_state=seed).split(labels, labels, groups))


def groups_of(table: pd.DataFrame) -> Array | None:
    """The group of each image, those without one alone; None where no image has one."""
    if "group" not in table or table["group"].isna().all():
        return None
    return table["group"].fillna(table["path"]).to_numpy()


class Fitted(NamedTuple):
    """Log probabilities of the fitted images by heads that did not see them, and of new images."""

    inside: Array
    outside: Array


def cross_fit(
    features: Array,
    labels: Array,
    groups: Array | None,
    new: Array,
    classes: int,
    head: str = "discriminant",
    seed: int = 0,
) -> Fitted:
    """Fit a head, regularized and calibrated as cross-validation finds best.

    Args:
        features: (N, D).
        labels: (N,) 0 to K - 1.
        groups: (N,) images of one group are never on both sides of a split; None: all are alone.
        new: (n, D) features to predict.
        classes: K.
        head: a key of ``HEADS``.
        seed: of the folds.
    """
    outside = _scores(head, features, labels, new, classes)
    inside = np.full((len(outside), len(labels), classes), -np.log(classes))
    for fit, out in draw_folds(labels, groups, seed):
        inside[:, out] = _scores(head, features[fit], labels[fit], features[out], classes)
    weights = [stack([each], labels) for each in inside]
    calibrated = [combine([each], weight) for each, weight in zip(inside, weights, strict=True)]
    best = np.argmax([each[np.arange(len(labels)), labels].mean() for each in calibrated])
    return Fitted(calibrated[best], combine([outside[best]], weights[best]))
