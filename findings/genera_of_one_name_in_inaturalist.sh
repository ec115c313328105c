#!/usr/bin/env bash
# torchvision 0.29.1, torchvision.datasets.INaturalist(version="2021_...", target_type="genus").
#
# Expected: four species of four genera have four genus labels; the folders of the archive name all
# ranks from the kingdom down, so the genera are told apart.
# Seen: two labels. Ranks are numbered by their bare name, and botany and zoology may use one name
# twice: Prunella is a bird (dunnock) and a herb (self-heal), Oenanthe a bird (wheatear) and a herb
# (water dropwort), Morus the gannets and the mulberries. Kingdom, phylum, class, order and family
# come out right. No warning.
# Output:
#   dunnock: family 0, genus 0
#   wheatear: family 1, genus 1
#   self-heal: family 2, genus 0
#   water dropwort: family 3, genus 1
# Why it matters here: a bird taken for a herb counts as a right genus, and the classes of two
# kingdoms are trained as one. Number a genus by its whole path, from the kingdom down.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

from PIL import Image
from torchvision.datasets import INaturalist

SPECIES = {
    "dunnock": "Animalia_Chordata_Aves_Passeriformes_Prunellidae_Prunella_modularis",
    "wheatear": "Animalia_Chordata_Aves_Passeriformes_Muscicapidae_Oenanthe_oenanthe",
    "self-heal": "Plantae_Tracheophyta_Magnoliopsida_Lamiales_Lamiaceae_Prunella_vulgaris",
    "water dropwort": "Plantae_Tracheophyta_Magnoliopsida_Apiales_Apiaceae_Oenanthe_crocata",
}
for number, taxa in enumerate(SPECIES.values()):
    species = Path("2021_valid", f"{number:05d}_{taxa}")
    species.mkdir(parents=True)
    Image.new("RGB", (32, 24)).save(species / "1.jpg")
photos = INaturalist(".", version="2021_valid", target_type=["full", "family", "genus"])
labels = sorted(photos[index][1] for index in range(len(photos)))
for name, (_, family, genus) in zip(SPECIES, labels, strict=True):
    print(f"{name}: family {family}, genus {genus}")
assert [family for _, family, _ in labels] == [0, 1, 2, 3]
assert [genus for _, _, genus in labels] == [0, 1, 0, 1]
PYTHON
