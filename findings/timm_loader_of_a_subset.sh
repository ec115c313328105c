#!/usr/bin/env bash
# timm 1.0.31, create_loader of a torch.utils.data.Subset (timm/data/loader.py, fast_collate).
#
# Expected: batches hold the subset's images; as with any loader, or as timm's own transform makes
# them, or there is an error.
# Seen: create_loader sets its transform as an attribute of the data set. A Subset, which
# random_split makes, does not look at it; it gives the tensors of the user's transform, and the
# prefetcher, on by default, stores them as bytes. Pixels in [0, 1] become 0, but for pure white; of
# normalized ones the fraction is lost, and -1 becomes 255. No error, no warning.
# Photos of noise; share of pixels that are as the transform gave them, the loader's own normalization
# undone, and number of different values of a channel:
#   to [0, 1]: 0 % as given, 256 values become 2
#   normalized: 0 % as given, 256 values become 5
#   to [0, 1], use_prefetcher=False: 100 % as given, 256 values become 256
# Why it matters here: random_split is the usual way to a validation split. Normalized images keep
# their outlines in five gray values, so training goes on and ends somewhat worse, as if the model were;
# and a validation split of black images chooses the checkpoint by chance. Use PyTorch's DataLoader.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  timm==1.0.31 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from torch.utils.data import random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (3, 64, 64)
Path("birds", "wren").mkdir(parents=True)
generator = np.random.default_rng(0)
for number in range(8):
    pixels = generator.integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"birds/wren/{number}.png")
to_unit = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
normalized = v2.Compose([to_unit, v2.Normalize(MEAN, STD)])


def compared(transform, **options):
    """Share of pixels that are as given, and numbers of values of a channel, given and loaded."""
    photos, _ = random_split(ImageFolder("birds", transform), [8, 0])
    given = torch.stack([image for image, _ in photos])
    options |= {"num_workers": 0, "persistent_workers": False, "device": torch.device("cpu")}
    ((loaded, _),) = create_loader(photos, SIZE, 8, mean=MEAN, std=STD, **options)
    if options.get("use_prefetcher", True):  # it normalizes bytes
        loaded = v2.functional.normalize(loaded, [0, 0, 0], [1 / std for std in STD])
        loaded = v2.functional.normalize(loaded, [-mean for mean in MEAN], [1, 1, 1])
        loaded = loaded if transform is to_unit else v2.functional.normalize(loaded, MEAN, STD)
    equal = torch.isclose(given, loaded, atol=1e-4).float().mean()
    return float(equal), len(given[:, 0].unique()), len(loaded[:, 0].unique())


found = {
    "to [0, 1]": compared(to_unit),
    "normalized": compared(normalized),
    "to [0, 1], use_prefetcher=False": compared(to_unit, use_prefetcher=False),
}
for name, (equal, given, loaded) in found.items():
    print(f"{name}: {100 * equal:.0f} % as given, {given} values become {loaded}")
equal, given, loaded = zip(*found.values(), strict=True)
assert given == (256, 256, 256) and loaded == (2, 5, 256)
assert max(equal[:2]) < 0.02 and equal[2] == 1
PYTHON
