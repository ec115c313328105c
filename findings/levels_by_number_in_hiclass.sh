#!/usr/bin/env bash
# HiClass 5.0.8, hiclass.metrics.precision, recall and f1.
#
# Expected: of labels per level (order, family, species), each prediction is compared with the label of
# its level.
# Seen: the labels of a row are compared as sets, without their level. With numbers from 0 on each
# level, the usual labels of a data set, a species 3 counts as right because family 3 is. No warning.
# Guesses at random, 1000 images, labels as numbers and as names of the same classes:
#   4 orders, 8 families, 16 species: f1 of numbers 0.273, of names 0.144
#   10 orders, 10 families, 10 species: f1 of numbers 0.270, of names 0.102
#   the three right numbers, each at a wrong level: f1 of numbers 1.000, of names 0.000
# Why it matters here: hierarchical f1 is how a wrong species of the right family is told from a gross
# mistake. By number it is too high, most for the weakest models. Give names with their level:
# "family 3".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  hiclass==5.0.8 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from hiclass.metrics import f1

LEVELS = ("order", "family", "species")
generator = np.random.default_rng(0)


def named(rows):
    """Numbers per level as names."""
    return np.array([[f"{level} {number}" for level, number in zip(LEVELS, row)] for row in rows])


def scores(truth, guess):
    """f1 of numbers and of names."""
    return f1(truth, guess), f1(named(truth), named(guess))


def at_random(*classes):
    """Scores of guesses at random."""
    return scores(*(generator.integers(classes, size=(1000, len(classes))) for _ in range(2)))


found = {
    "4 orders, 8 families, 16 species": at_random(4, 8, 16),
    "10 orders, 10 families, 10 species": at_random(10, 10, 10),
    "the three right numbers, each at a wrong level": scores(
        np.array([[0, 1, 2], [3, 5, 4]]), np.array([[1, 2, 0], [4, 3, 5]])
    ),
}
for name, (numbers, names) in found.items():
    print(f"{name}: f1 of numbers {numbers:.3f}, of names {names:.3f}")
    assert numbers > names + 0.1
assert found["the three right numbers, each at a wrong level"] == (1, 0)
PYTHON
