#!/usr/bin/env bash
# Lightning 2.6.6, Trainer(strategy="ddp"), data loaders with torch's SubsetRandomSampler.
#
# Expected: an epoch has each image once, divided among the processes, as it is with shuffle=True.
# Seen: each process wraps the sampler, draws its own order, and takes every second entry of that. So
# images that one process leaves to the other are often left by the other as well: of 100, about 25
# are not seen and 25 twice, other ones in each epoch, in training and in validation. No warning. After
# seed_everything the orders agree, until one process draws more random numbers than the other.
# Two processes; different images among the 100 that an epoch loads:
#   no seed: training 73 of 100, validation 71 of 100
#   seed_everything: training 100 of 100, validation 100 of 100
#   seed_everything, one process draws once more: training 100 of 100, validation 75 of 100
# Why it matters here: SubsetRandomSampler of a list of numbers is the usual split of a small
# fine-grained set. A quarter of the few validation images changes at random from epoch to epoch, and
# the best checkpoint is chosen on it. Use torch.utils.data.Subset, which Lightning divides rightly.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  lightning==2.6.6 torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >train.py <<'PYTHON'
import json
import logging
import sys

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, SubsetRandomSampler

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


class Model(LightningModule):
    """Remembers which images it saw."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), {"training": [], "validation": []}

    def training_step(self, images, _):
        self.seen["training"] += images.tolist()
        if "once more" in how and self.global_rank == 1:
            torch.rand(1)
        return self.layer(images[:, None].float()).mean()

    def validation_step(self, images, _):
        self.seen["validation"] += images.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


how = sys.argv[1]
if how != "no seed":
    seed_everything(0, verbose=False)
training, validation = (
    DataLoader(range(200), batch_size=10, sampler=SubsetRandomSampler(images))
    for images in (range(100), range(100, 200))
)
quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
trainer = Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    max_epochs=1,
    num_sanity_val_steps=0,
    **dict.fromkeys(quiet, False),
)
model = Model()
trainer.fit(model, training, validation)
with open(f"{trainer.global_rank}.json", "w") as file:
    json.dump(model.seen, file)
PYTHON
cat >compare.py <<'PYTHON'
import json
import subprocess
import sys

found = {}
for how in ("no seed", "seed_everything", "seed_everything, one process draws once more"):
    command = [sys.executable, "-W", "ignore", "train.py", how]
    subprocess.run(command, check=True, capture_output=True)
    ranks = [json.load(open(f"{rank}.json")) for rank in (0, 1)]
    for part in ("training", "validation"):
        seen = [image for rank in ranks for image in rank[part]]
        found[how, part] = len(set(seen)), len(seen)
    parts = (f"{part} {{}} of {{}}".format(*found[how, part]) for part in ranks[0])
    print(f"{how}:", ", ".join(parts))
for (how, part), (different, seen) in found.items():
    assert seen == 100
    is_right = how == "seed_everything" or (part == "training" and how != "no seed")
    assert different == 100 if is_right else 60 < different < 90
PYTHON
"$folder/venv/bin/python" -W ignore compare.py
