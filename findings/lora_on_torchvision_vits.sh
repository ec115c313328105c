#!/usr/bin/env bash
# peft 0.21.2, LoraConfig(target_modules="all-linear"), on a ViT of torchvision 0.29.1.
#
# Expected: every linear layer but the classifier gets an adapter, as in timm's Vision Transformers,
# and all adapters learn.
# Seen: those of attention do not. Query, key and value have none, as their weights are no linear
# layer in nn.MultiheadAttention; out_proj has one, which is never used, as its parent reads the
# weights without calling it. It counts as trainable but gets no gradient; outputs do not depend on
# it until merge_and_unload, which writes it into the weights. No warning. (A docstring inside peft
# says not to target out_proj; to name "self_attention" works.)
# Adapters of 4 blocks, those that get a gradient, and how far merging moves the outputs, a share of
# their norm; adapters with random weights:
#   timm, all-linear: 16 adapters, 16 learn, merged 0.000
#   torchvision, all-linear: 12 adapters, 8 learn, merged 0.292
#   torchvision, self_attention and mlp: 16 adapters, 16 learn, merged 0.000
# Why it matters here: who compares LoRA with full training, or the encoders of two libraries, has
# trained a model whose attention stayed frozen. Look for parameters without a gradient after a step.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchvision==0.29.1 timm==1.0.31 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import timm
import torch
from peft import LoraConfig, get_peft_model
from torchvision.models import VisionTransformer

torch.manual_seed(0)
images = torch.randn(4, 3, 32, 32)


def torchvisions():
    return VisionTransformer(32, 8, 4, 2, 32, 128, num_classes=5), "heads"


def timms():
    kind = {"img_size": 32, "patch_size": 8, "depth": 4, "num_heads": 2, "embed_dim": 32}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **kind), "head"


def adapters(build, targets):
    """Number of adapters, of those that get a gradient, and how far merging moves the outputs."""
    vit, head = build()
    for weight in (parameter for parameter in vit.parameters() if parameter.ndim == 2):
        torch.nn.init.xavier_normal_(weight)
    config = {"target_modules": targets, "modules_to_save": [head], "init_lora_weights": False}
    model = get_peft_model(vit, LoraConfig(**config)).eval()
    outputs = model(images)
    outputs.square().sum().backward()
    lora = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert all(weight.requires_grad for weight in lora)
    with torch.no_grad():
        moved = float((model.merge_and_unload()(images) - outputs).norm() / outputs.norm())
    return len(lora), sum(weight.grad is not None for weight in lora), moved


found = {
    "timm, all-linear": adapters(timms, "all-linear"),
    "torchvision, all-linear": adapters(torchvisions, "all-linear"),
    "torchvision, self_attention and mlp": adapters(
        torchvisions, ["self_attention", "mlp.0", "mlp.3"]
    ),
}
for name, (total, learn, moved) in found.items():
    print(f"{name}: {total} adapters, {learn} learn, merged {moved:.3f}")
total, learn, moved = found.pop("torchvision, all-linear")
assert (total, learn) == (12, 8) and moved > 0.05
for total, learn, moved in found.values():
    assert total == learn == 16 and moved < 1e-3
PYTHON
