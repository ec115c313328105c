#!/usr/bin/env bash
# torchmetrics 1.9.0, MetricCollection (torchmetrics/collections.py, _merge_compute_groups).
#
# Expected: a metric has the same value within a collection as alone, in any order of the images.
# Seen: after the first update the collection takes metrics whose states happen to be equal for one
# metric, and from then on updates only one of them. If no image of the first batch is right in
# top-5 only, top-1 and top-5 have equal counts: top-5 is then top-1, to the end and after a reset.
# No warning.
# Mean accuracy per class of 1280 images in batches of 16:
#   alone: top-1 79.8 %, top-5 92.7 %
#   class by class: top-1 79.8 %, top-5 79.8 %
#   reset, then shuffled: top-1 79.8 %, top-5 79.8 %
#   compute_groups=False: top-1 79.8 %, top-5 92.7 %
#   one metric after the first batch of 19 of 200 shuffles
# Why it matters here: top-1 and top-5 side by side are the usual table for fine-grained classes.
# Folders are read class by class, so the first batch is one class and may well be an easy one; the
# better the model and the smaller the batch, the likelier. A metric with ignore_index becomes the
# one without it in the same way, if its label is not in the first batch. Set compute_groups=False.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchmetrics==1.9.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

CLASSES, IMAGES, BATCH = 20, 1280, 16
torch.manual_seed(0)
labels = torch.arange(CLASSES).repeat_interleave(IMAGES // CLASSES)
logits = torch.randn(IMAGES, CLASSES)
logits[torch.arange(IMAGES), labels] += torch.linspace(6, 1, IMAGES)  # the first class is easy


def metrics():
    """Top-1 and top-5 accuracy, each the mean over the classes."""
    return {f"top-{k}": MulticlassAccuracy(CLASSES, top_k=k, average="macro") for k in (1, 5)}


def evaluate(collection, order):
    """Percent of each metric of a collection that sees the images in an order."""
    collection.reset()
    for batch in order.split(BATCH):
        collection.update(logits[batch], labels[batch])
    return {name: 100 * float(value) for name, value in collection.compute().items()}


def is_one_metric():
    """Whether a collection takes top-1 and top-5 for one after the first batch of a shuffle."""
    collection, batch = MetricCollection(metrics()), torch.randperm(IMAGES)[:BATCH]
    collection.update(logits[batch], labels[batch])
    return len(collection.compute_groups) == 1


in_order, collection = torch.arange(IMAGES), MetricCollection(metrics())
separate = MetricCollection(metrics(), compute_groups=False)
seen = {
    "alone": {name: 100 * float(metric(logits, labels)) for name, metric in metrics().items()},
    "class by class": evaluate(collection, in_order),
    "reset, then shuffled": evaluate(collection, torch.randperm(IMAGES)),
    "compute_groups=False": evaluate(separate, in_order),
}
for how, values in seen.items():
    print(f"{how}:", ", ".join(f"{name} {value:.1f} %" for name, value in values.items()))
merged = sum(is_one_metric() for _ in range(200))
print(f"one metric after the first batch of {merged} of 200 shuffles")
top1, top5 = seen["alone"].values()
assert top5 > top1 + 10 and 5 < merged < 60
for how in ("class by class", "reset, then shuffled"):
    assert seen[how]["top-1"] == seen[how]["top-5"] and abs(seen[how]["top-1"] - top1) < 0.01
assert abs(seen["compute_groups=False"]["top-5"] - top5) < 0.01
PYTHON
