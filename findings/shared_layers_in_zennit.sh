#!/usr/bin/env bash
# Zennit 0.5.1, relevance propagation (zennit/core.py, BasicHook) of a layer that is used twice.
#
# Expected: the relevance of the inputs does not depend on whether an encoder that sees two of them is
# one module or two copies with the same weights. For ReLU layers without bias and the epsilon rule
# it is gradient times input.
# Seen: each module remembers one input, the last. Relevance that goes back through the first use is
# computed with the activations of the second: the relevance of the first input is wrong in every
# place, that of the second is right. No error, no warning.
# An encoder of an image and of a crop, then a classifier of both features; distance to gradient
# times input, a share of its norm:
#   two copies: image 0.000, crop 0.000
#   one module: image 2.405, crop 0.000
# Why it matters here: the scales of RAMS-Trans share one encoder, so a heat map of the whole image by
# Zennit is drawn from what the encoder saw in the crop. Give the first scale a deep copy.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  zennit==0.5.1 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from copy import deepcopy

import torch
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon
from zennit.types import Linear


class TwoLooks(nn.Module):
    """Logits of an image and its crop, (B, 2, pixels), by one encoder or by two equal ones."""

    def __init__(self, is_shared):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.ReLU()
        self.first = nn.Sequential(*layers)
        self.second = self.first if is_shared else deepcopy(self.first)
        self.classifier = nn.Linear(32, 5, bias=False)

    def forward(self, looks):
        features = self.first(looks[:, 0]), self.second(looks[:, 1])
        return self.classifier(torch.cat(features, dim=1))


torch.manual_seed(1)
looks = torch.randn(8, 2, 64)
target = torch.eye(5)[torch.zeros(8, dtype=torch.long)]
found = {}
for name, is_shared in (("two copies", False), ("one module", True)):
    model, given = TwoLooks(is_shared), looks.clone().requires_grad_()
    logits = model(given)[:, 0]
    true = looks * torch.autograd.grad(logits.sum(), given)[0]
    with Gradient(model, LayerMapComposite([(Linear, Epsilon(1e-6))])) as attributor:
        _, relevance = attributor(looks, target * logits.detach()[:, None])
    apart = (relevance - true).norm(dim=(0, 2)) / true.norm(dim=(0, 2))
    found[name] = apart.tolist()
    print("{}: image {:.3f}, crop {:.3f}".format(name, *found[name]))
assert max(found["two copies"]) < 0.01 and found["one module"][1] < 0.01
assert found["one module"][0] > 0.5
PYTHON
