#!/usr/bin/env bash
# timm 1.0.31, checkpoint_filter_fn of timm/models/naflexvit.py, which turns the weights of a Vision
# Transformer into those of a NaFlexVit (use_naflex=True: any input size and aspect).
#
# Expected: the function returns other weights and leaves those that it is given as they are.
# Seen: the first conversion is right. But it adds the class token's position embedding to the class
# token of the weights that it was given, in place. A second model from the same weights gets it
# twice and answers otherwise; and where the weights are those of a living model (state_dict() shares
# them), that model changes as well. No warning.
# Distance of the logits from those of the ViT at first, as a share of their norm:
#   weights from a file: first model 0.000000, second model 0.309
#   a living model: NaFlexVit 0.000000, the ViT itself 0.000000, then 0.309
# Why it matters here: who makes one model per input size in a loop, from weights that were read
# once, compares different models and calls it the effect of the size; who converts a model to
# compare the two has damaged the one it came from, also in a checkpoint saved afterwards. Give the
# function a copy: {name: value.clone() for name, value in weights.items()}.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check timm==1.0.31 torch==2.14.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import timm
import torch
from timm.models.naflexvit import checkpoint_filter_fn

torch.manual_seed(0)
KIND = {"model_name": "vit_tiny_patch16_224", "depth": 2, "num_classes": 8}
vit = timm.create_model(**KIND).eval()
for tensor in (vit.cls_token, vit.pos_embed, vit.head.weight):
    torch.nn.init.normal_(tensor, std=0.2)
images = torch.randn(8, 3, 224, 224)


@torch.no_grad()
def apart(model):
    """Distance of a model's logits from those of the ViT at first, a share of their norm."""
    return float((model(images) - first).norm() / first.norm())


def converted(weights):
    """A NaFlexVit with a ViT's weights."""
    model = timm.create_model(**KIND, use_naflex=True).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    return model


with torch.no_grad():
    first = vit(images)
weights = {name: value.clone() for name, value in vit.state_dict().items()}
once, twice = apart(converted(weights)), apart(converted(weights))
print(f"weights from a file: first model {once:.6f}, second model {twice:.3f}")
before = apart(vit)
from_living = apart(converted(vit.state_dict()))
after = apart(vit)
print(f"a living model: NaFlexVit {from_living:.6f}, the ViT itself {before:.6f}, then {after:.3f}")
assert max(once, before, from_living) < 1e-5 and min(twice, after) > 0.05
PYTHON
