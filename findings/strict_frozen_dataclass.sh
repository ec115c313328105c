#!/usr/bin/env bash
# huggingface_hub 2.4.0, strict dataclasses (huggingface_hub/dataclasses.py, function strict).
#
# Expected: @strict validates the fields of a frozen dataclass when an instance is made, as it does
# for one that is not frozen.
# Seen: on a frozen dataclass it checks neither types nor validators, without a warning. A value of
# the wrong type or outside of its validator's range is accepted by the constructor and by
# dataclasses.replace. The decorator wraps __setattr__, which the constructor of a frozen dataclass
# bypasses (it calls object.__setattr__).
# Why it matters here: ramslib.config.Config is frozen, so it checks its fields itself.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check huggingface_hub==2.4.0
"$folder/venv/bin/python" - <<'PYTHON'
from dataclasses import dataclass, replace

from huggingface_hub.dataclasses import strict, validated_field


def positive(value):
    if value <= 0:
        raise ValueError(f"{value} is not positive")


@strict
@dataclass
class Open:
    epochs: int = validated_field(positive, default=3)


@strict
@dataclass(frozen=True)
class Frozen:
    epochs: int = validated_field(positive, default=3)


def accepts(kind, value):
    try:
        return kind(epochs=value).epochs == value
    except Exception as error:
        print(f"{kind.__name__}(epochs={value!r}): {type(error).__name__}")
        return False


seen = {
    (kind.__name__, value): accepts(kind, value) for kind in (Open, Frozen) for value in (0, "many")
}
print(seen, replace(Frozen(), epochs=-1))
assert seen == {
    ("Open", 0): False,
    ("Open", "many"): False,
    ("Frozen", 0): True,
    ("Frozen", "many"): True,
}
print("as stated: a frozen strict dataclass validates nothing")
PYTHON
