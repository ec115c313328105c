#!/usr/bin/env bash
# torchmetrics 1.9.0, MulticlassCalibrationError and MulticlassAUROC, updated batch by batch.
#
# Expected: neither metric of the same outputs depends on how they are cut into batches; logits are
# always put through softmax, or never.
# Seen: each batch is judged by itself. One that holds a value below 0 or above 1 is taken for logits
# and put through softmax; one that does not is taken for probabilities as it is, although its rows
# do not sum to 1. Cosine similarities are mostly in [0, 1], so both numbers of one model depend on
# the batch size:
#   7 of 2048 images have a negative cosine, none has one above 1
#   batches of 1, 64, 256, 2048
#   calibration error of cosines: 20.7 %, 31.3 %, 56.3 %, 77.9 %
#   calibration error of their softmax: 77.9 %, 77.9 %, 77.9 %, 77.9 %
#   AUROC of cosines: 93.3 %, 80.3 %, 75.1 %, 98.7 %
#   AUROC of their softmax: 98.7 %, 98.7 %, 98.7 %, 98.7 %
# Why it matters here: classifiers by cosine similarity to class prototypes are usual for fine-grained
# classes, whose features are alike and seldom point away from each other. Give these metrics
# probabilities: softmax first, with the classifier's own scale.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchmetrics==1.9.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import normalize
from torchmetrics.classification import MulticlassAUROC, MulticlassCalibrationError

CLASSES, IMAGES = 50, 2048
torch.manual_seed(0)
labels = torch.randint(CLASSES, (IMAGES,))
prototypes = normalize(torch.randn(CLASSES, 64) + 1.5)
features = normalize(prototypes[labels] + 0.17 * torch.randn(IMAGES, 64))
cosines = features @ prototypes.T


def percent(metric, outputs, batch_size):
    """A metric of outputs that come in batches of a size."""
    metric.reset()
    for batch, truth in zip(outputs.split(batch_size), labels.split(batch_size), strict=True):
        metric.update(batch, truth)
    return 100 * float(metric.compute())


negative = int((cosines < 0).any(dim=1).sum())
print(f"{negative} of {IMAGES} images have a negative cosine, none has one above 1")
assert float(cosines.max()) < 1 and 0 < negative < IMAGES / 50
sizes = [1, 64, 256, IMAGES]
print("batches of", ", ".join(map(str, sizes)))
metrics = {
    "calibration error": MulticlassCalibrationError(num_classes=CLASSES, n_bins=15),
    "AUROC": MulticlassAUROC(num_classes=CLASSES),
}
seen = {}
for name, metric in metrics.items():
    for kind, outputs in {"cosines": cosines, "their softmax": cosines.softmax(dim=1)}.items():
        seen[name, kind] = [percent(metric, outputs, size) for size in sizes]
        print(f"{name} of {kind}:", ", ".join(f"{value:.1f} %" for value in seen[name, kind]))
for name in metrics:
    softmaxed, given = seen[name, "their softmax"], seen[name, "cosines"]
    assert max(softmaxed) - min(softmaxed) < 0.1 and abs(given[-1] - softmaxed[-1]) < 0.1
    assert max(given) - min(given) > 20
PYTHON
