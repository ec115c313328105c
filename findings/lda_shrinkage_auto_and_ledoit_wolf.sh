#!/usr/bin/env bash
# scikit-learn 1.9.1, LinearDiscriminantAnalysis(solver="lsqr"): shrinkage="auto" beside
# covariance_estimator=LedoitWolf() and a number as shrinkage.
#
# Expected: "auto" is the shrinkage of Ledoit and Wolf, so both give the same classifier;
# as without shrinkage, it does not depend on the units of the features.
# Seen: only while all features have one scale. "auto" standardizes the features of each class
# before it shrinks, and scales back; an estimator that is passed, and a number, shrink the features
# as they are, toward the mean of their variances, which a few large features decide.
# Test accuracy for 20 classes of 256 features, of which two are then made 200 times larger:
#   one scale: auto 0.990, LedoitWolf() 0.990, 0.5 0.980
#   two large: auto 0.990, LedoitWolf() 0.387, 0.5 0.147
#   two large, scaler: auto 0.990, LedoitWolf() 0.990, 0.5 0.983
# Why it matters here: features of transformers have a few dimensions that are far larger than the
# rest. A linear probe by discriminant analysis can lose most of its accuracy by an argument that
# seems only to spell out "auto"; a StandardScaler in front makes them alike again.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

CLASSES, IMAGES, WIDTH = 20, 15, 256
generator = np.random.default_rng(0)
means = generator.normal(scale=0.35, size=(CLASSES, WIDTH))
labels = np.tile(np.repeat(np.arange(CLASSES), IMAGES), 2)
features = means[labels] + generator.normal(size=(len(labels), WIDTH))
train, test = np.split(np.arange(len(labels)), 2)
KINDS = {
    "auto": {"shrinkage": "auto"},
    "LedoitWolf()": {"covariance_estimator": LedoitWolf()},
    "0.5": {"shrinkage": 0.5},
}


def accuracies(largest, *before):
    """Test accuracy of each kind of shrinkage where two features are ``largest`` times larger."""
    scaled = features * np.where(np.arange(WIDTH) < 2, largest, 1)
    found = {}
    for name, options in KINDS.items():
        model = make_pipeline(*before, LinearDiscriminantAnalysis(solver="lsqr", **options))
        model.fit(scaled[train], labels[train])
        found[name] = float(model.score(scaled[test], labels[test]))
    return found


one, two, mended = accuracies(1), accuracies(200), accuracies(200, StandardScaler())
for name, found in {"one scale": one, "two large": two, "two large, scaler": mended}.items():
    print(f"{name}:", ", ".join(f"{kind} {value:.3f}" for kind, value in found.items()))
assert min(one.values()) > 0.95 and min(mended.values()) > 0.95
assert two["auto"] > 0.95 and two["LedoitWolf()"] < 0.6 and two["0.5"] < 0.3
PYTHON
