#!/usr/bin/env bash
# OpenVINO 2026.4.1, openvino.convert_model of torchvision 0.29.1, torchvision.ops.roi_align.
#
# Expected: a converted model pools the same features from a box as the one it was made from.
# Seen: with sampling_ratio=-1, torchvision's default, which means as many samples as the box needs,
# every region is zero. OpenVINO takes the number as it is; it says the same by 0, which torchvision
# understands as well. No error, no warning.
# A map of ones, three boxes; mean of the pooled features of torchvision and of OpenVINO:
#   default: 1.00 and 0.00
#   sampling_ratio=-1, aligned=True: 1.00 and 0.00
#   sampling_ratio=0: 1.00 and 1.00
#   sampling_ratio=2: 1.00 and 1.00
# Why it matters here: a head that classifies pooled regions beside the whole image goes on with the
# whole image alone: it answers, nearly as well as before, and the gain of the regions is lost where
# the model is used. Export with sampling_ratio=0, and compare outputs before and after.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchvision==0.29.1 openvino==2026.4.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import openvino
import torch
from torch import nn
from torchvision.ops import roi_align


class Pool(nn.Module):
    """Features of boxes."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, features, boxes):
        return roi_align(features, boxes, output_size=7, **self.options)


features = torch.ones(1, 3, 32, 32)
boxes = torch.tensor([[0, 2.3, 3.1, 20.7, 28.2], [0, 4, 4, 10, 10], [0, 2, 2, 30, 30]])
kinds = {
    "default": {},
    "sampling_ratio=-1, aligned=True": {"sampling_ratio": -1, "aligned": True},
    "sampling_ratio=0": {"sampling_ratio": 0},
    "sampling_ratio=2": {"sampling_ratio": 2},
}
found = {}
for name, options in kinds.items():
    model = Pool(**options).eval()
    converted = openvino.convert_model(model, example_input=(features, boxes))
    compiled = openvino.compile_model(converted, "CPU")
    pooled = compiled([features.numpy(), boxes.numpy()])[0]
    found[name] = float(model(features, boxes).mean()), float(abs(pooled).mean())
    print("{}: {:.2f} and {:.2f}".format(name, *found[name]))
for name, (own, others) in found.items():
    assert abs(own - 1) < 1e-5
    assert others == 0 if kinds[name].get("sampling_ratio", -1) < 0 else abs(others - 1) < 1e-5
PYTHON
