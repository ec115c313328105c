#!/usr/bin/env bash
# torchmetrics 1.9.0, MulticlassAccuracy(average="macro"), beside scikit-learn 1.9.1,
# balanced_accuracy_score.
#
# Expected: the mean of the classes' accuracies over the classes that have images, for any top_k.
# Seen: with top_k=1 a class without images counts as one with accuracy 0 as soon as any image is
# taken for it, and not at all otherwise. With top_k=2 and above it never counts. No warning.
# 500 images of 50 classes, of which 20 to 50 occur:
#   50 occur: scikit-learn 74.8 %, top-1 74.8 %, top-2 85.2 %
#   40 occur: scikit-learn 72.5 %, top-1 58.0 %, top-2 84.5 %
#   20 occur: scikit-learn 77.4 %, top-1 32.9 %, top-2 87.0 %
# Why it matters here: mean accuracy per class is the usual number of the Oxford flowers and of long
# tails. Small validation splits and parts of a test set lack classes: one stray guess costs as much
# as a whole class, and top-5 beside top-1 is another mean. Use scikit-learn where classes may lack.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchmetrics==1.9.0 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.classification import MulticlassAccuracy

CLASSES, IMAGES = 50, 500
torch.manual_seed(0)
found = {}
for present in (50, 40, 20):
    labels = torch.arange(IMAGES) % present
    logits = torch.randn(IMAGES, CLASSES)
    logits[torch.arange(IMAGES), labels] += 3
    top1, top2 = (MulticlassAccuracy(CLASSES, top_k=k, average="macro") for k in (1, 2))
    values = (
        balanced_accuracy_score(labels, logits.argmax(dim=1)),
        top1(logits, labels),
        top2(logits, labels),
    )
    sklearn, top1, top2 = (100 * float(value) for value in values)
    print(f"{present} occur: scikit-learn {sklearn:.1f} %, top-1 {top1:.1f} %, top-2 {top2:.1f} %")
    guessed = len(logits.argmax(dim=1).unique())
    assert abs(top1 - sklearn * present / guessed) < 0.01 and top2 > sklearn + 5, guessed
PYTHON
