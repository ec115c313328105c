#!/usr/bin/env bash
# timm 1.0.31 and transformers 5.24.0 with torch 2.14.1: position embeddings at another resolution.
#
# Expected: a DINOv2 checkpoint of 518 pixels (37 x 37 patches), which both libraries publish, has
# the same position embeddings in both at 224 pixels (16 x 16), to rounding.
# Seen: equal at 518 pixels. At 224 pixels they are 24 % apart in norm for the weights of DINOv2
# ViT-S/14, and 5 % for the smooth sine-cosine embeddings below. Both resample bicubically; timm with
# antialiasing, transformers without, which lets fine patterns of the large grid through as coarse
# ones. Neither warns; with `antialias=False` timm's function gives those of transformers.
# Why it matters here: "the same frozen backbone" is not the same in papers that use one library or
# the other below the checkpoint's own resolution, and attention maps that are compared across them
# differ for this reason alone. A table of features should name the library.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 timm==1.0.31 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed
from transformers import Dinov2Config, Dinov2Model

WIDTH, SIDE = 384, 37
patches = build_sincos2d_pos_embed([SIDE, SIDE], WIDTH, temperature=100.0)
stored = torch.cat([torch.zeros(1, WIDTH), patches]).unsqueeze(0)  # class token first
config = Dinov2Config(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=6, image_size=518)
embeddings = Dinov2Model(config).embeddings
with torch.no_grad():
    embeddings.position_embeddings.copy_(stored)


def apart(pixels, antialias):
    """Distance of the two libraries' patch embeddings, a share of their norm."""
    grid = pixels // 14
    with torch.no_grad():
        tokens = torch.zeros(1, 1 + grid * grid, WIDTH)
        theirs = embeddings.interpolate_pos_encoding(tokens, pixels, pixels)[:, 1:]
        timm = resample_abs_pos_embed(stored, [grid, grid], num_prefix_tokens=1, antialias=antialias)
    return float((theirs - timm[:, 1:]).norm() / timm[:, 1:].norm())


own, lower, plain = apart(518, True), apart(224, True), apart(224, False)
print(f"518 px: {own:.6f}; 224 px: {lower:.3f}; 224 px, timm without antialiasing: {plain:.6f}")
assert own < 1e-6 and plain < 1e-5 and 0.03 < lower < 0.1
PYTHON
