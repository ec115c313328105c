#!/usr/bin/env bash
# torchvision 0.29.1, torchvision.ops.MultiScaleRoIAlign (ops/poolers.py, _infer_scale), the pooling
# of FasterRCNN, MaskRCNN and KeypointRCNN.
#
# Expected: a region is pooled from where its box lies. The module is given the size of the images
# and of the feature map, so it knows the scale.
# Seen: it rounds the scale to a power of two. For patches of 16 pixels that is right; for patches of
# 14 it takes 1/16, so every region is read an eighth too small and too near to the top left corner;
# for 12 or 20 pixels it is off by a quarter. No warning; the documentation mentions a
# heuristic only for the choice of the level.
# A map that holds each patch's own position; box from 50 % to 90 % of the width, center at 70 %:
#   patches of 16, 448 px: center at 70 %, roi_align with the true scale 70 %
#   patches of 14, 224 px: center at 61 %, roi_align with the true scale 70 %
#   patches of 14, 518 px: center at 61 %, roi_align with the true scale 70 %
#   patches of 12, 384 px: center at 53 %, roi_align with the true scale 70 %
# Why it matters here: DINOv2 and the large CLIP encoders have patches of 14. A detector or a head for
# region proposals on their features learns from wrong places, most of all toward the bottom right,
# and only its accuracy tells. Call torchvision.ops.roi_align with spatial_scale=1 / 14.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align


def centers(patch, pixels):
    """Mean position (in percent) that each function reads from a box around 70 % of the width."""
    grid = pixels // patch
    positions = (torch.arange(grid) / grid).expand(1, 1, grid, grid).contiguous()
    boxes = [pixels * torch.tensor([[0.5, 0.5, 0.9, 0.9]])]
    inferred = MultiScaleRoIAlign(["map"], output_size=7, sampling_ratio=2)
    seen = inferred({"map": positions}, boxes, [(pixels, pixels)])
    true = roi_align(positions, boxes, output_size=7, spatial_scale=1 / patch, sampling_ratio=2)
    return 100 * float(seen.mean()), 100 * float(true.mean())


found = {case: centers(*case) for case in ((16, 448), (14, 224), (14, 518), (12, 384))}
for (patch, pixels), (seen, true) in found.items():
    print(f"patches of {patch}, {pixels} px: center at {seen:.0f} %,", end=" ")
    print(f"roi_align with the true scale {true:.0f} %")
for (patch, _), (seen, true) in found.items():
    assert abs(true - 70) < 0.1 and abs(seen - 70 * patch / 16) < 0.1
PYTHON
