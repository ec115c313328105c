#!/usr/bin/env bash
# torch 2.14.1 (torch.utils.flop_counter), torchinfo 1.8.0 and thop 0.1.1 on the ViT-B/16 of
# torchvision 0.29.1 and of timm 1.0.31, one image, on a CPU.
#
# Expected: 17.6 billion multiply-adds at 224 pixels and 78.5 at 448, as counted by hand; the same
# from every counter, for both libraries, in training mode and in eval.
# Seen: no counter gives these numbers. torchinfo counts a linear layer once per image instead of
# once per token: a hundredth of the true number. FlopCounterMode and thop leave out the products of
# fused attention, 4 % at 224 pixels and 14 % at 448, and, for torchvision's model in eval without
# gradients, all of nn.MultiheadAttention, another third. No warning.
# Billions of multiply-adds (by hand, FlopCounterMode train and eval, torchinfo, thop):
#   224 px, torchvision: 17.6, 16.8, 11.3, 0.17, 11.3
#   224 px, timm: 17.6, 16.8, 16.8, 0.20, 16.8
#   448 px, torchvision: 78.5, 67.1, 44.9, 0.52, 45.0
#   448 px, timm: 78.5, 67.1, 67.1, 0.55, 67.1
# Why it matters here: methods with several looks at an image are compared by accuracy per
# operation. What is left out grows with the number of tokens, so a look at 448 pixels seems cheaper
# beside looks at 224 than it is; and a table that mixes libraries, modes or counters compares
# nothing. Count by hand, or measure time.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchvision==0.29.1 timm==1.0.31 torchinfo==1.8.0 thop==0.1.1.post2209072238
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import thop
import timm
import torch
import torchinfo
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

PATCH, BLOCKS, WIDTH, CLASSES = 16, 12, 768, 1000


def by_hand(tokens):
    """Multiply-adds of patch embedding, projections, MLP, attention and classifier."""
    block = 12 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH
    return BLOCKS * block + (tokens - 1) * 3 * PATCH**2 * WIDTH + CLASSES * WIDTH


@torch.no_grad()
def flop_counter(model, image, is_training):
    model.train(is_training)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2


def counts(model, pixels):
    """Billions of multiply-adds of one image by each counter."""
    image = torch.randn(1, 3, pixels, pixels)
    found = {
        "by hand": by_hand((pixels // PATCH) ** 2 + 1),
        "FlopCounterMode train": flop_counter(model, image, True),
        "eval": flop_counter(model, image, False),
        "torchinfo": torchinfo.summary(model, input_data=image, verbose=0).total_mult_adds,
        "thop": thop.profile(model, (image,), verbose=False)[0],
    }
    return {name: value / 1e9 for name, value in found.items()}


print("by hand, FlopCounterMode train and eval, torchinfo, thop")
for pixels, missing in ((224, 0.04), (448, 0.145)):
    models = {
        "torchvision": VisionTransformer(pixels, PATCH, BLOCKS, 12, WIDTH, 4 * WIDTH),
        "timm": timm.create_model("vit_base_patch16_224", img_size=pixels),
    }
    for library, model in models.items():
        found = counts(model, pixels)
        values = (f"{value:.{1 if value > 1 else 2}f}" for value in found.values())
        print(f"{pixels} px, {library}:", ", ".join(values))
        shares = {name: value / found["by hand"] for name, value in found.items()}
        assert abs(shares["FlopCounterMode train"] - (1 - missing)) < 0.01
        in_eval = 1 - missing if library == "timm" else (1 - missing) * 0.67
        assert abs(shares["eval"] - in_eval) < 0.01 and abs(shares["thop"] - in_eval) < 0.01
        assert shares["torchinfo"] < 0.012
PYTHON
