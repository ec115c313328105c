"""Files of weights, read as plain tensors under timm's names. Nothing in them is ever executed.

``.safetensors``; ``.pth``, ``.pt``, ``.bin``, ``.tar`` of torch (``weights_only``, bare or under
``"model"`` or ``"state_dict"``); ``.npz`` with the names of Google's ViT checkpoints; and the bytes
of a DINOv2 exported to ONNX.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor

from ramslib.errors import InputError, one_line, shorten

State = dict[str, Tensor]
GOOGLE_NAMES = {  # pattern in the file's names: timm's
    r"^opt/target/": "",
    r"^Transformer/": "",
    r"^embedding/": "patch_embed.proj/",
    r"^cls$": "cls_token",
    r"^posembed_input/pos_embedding$": "pos_embed",
    r"^encoder_norm/": "norm/",
    r"^encoderblock_": "blocks/",
    r"LayerNorm_0": "norm1",
    r"LayerNorm_2": "norm2",
    r"MultiHeadDotProductAttention_1/out": "attn.proj",
    r"MultiHeadDotProductAttention_1": "attn",
    r"MlpBlock_3/Dense_0": "mlp.fc1",
    r"MlpBlock_3/Dense_1": "mlp.fc2",
    r"/(kernel|scale)$": ".weight",
    r"/": ".",
}
ONNX_NAMES = {
    r"^backbone\.(embeddings\.)?": "",
    r"^patch_embeddings\.projection": "patch_embed.proj",
    r"^encoder\.layer": "blocks",
    r"attention\.attention": "attn",
    r"attention\.output\.dense": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"^layernorm": "norm",
}


def read_weights(path: Path) -> State:
    """Tensors of a file by name.

    Raises:
        InputError: missing, of an unknown kind, damaged, or holding more than finite tensors.
    """
    readers = {".safetensors": safetensors.torch.load_file, ".npz": _read_google}
    readers |= dict.fromkeys((".pth", ".pt", ".bin", ".tar"), _read_torch)
    if not path.is_file() or path.suffix not in readers:
        kinds = ", ".join(readers)
        raise InputError(f"{path} is no existing file of kind {kinds}; check the path")
    try:
        state = readers[path.suffix](path)
        bad = [k for k, v in state.items() if not isinstance(v, Tensor) or not v.isfinite().all()]
    except Exception as error:  # damaged and planted files raise many kinds
        raise InputError(
            f"{path} is no file of plain tensors ({one_line(error)}); replace it"
        ) from error
    if bad or not state:
        raise InputError(f"{path}: no finite tensor in {shorten(bad) or 'it'}; replace it")
    return state


def _read_torch(path: Path) -> State:
    state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    return timm.models.clean_state_dict(state)


def _read_google(path: Path) -> State:
    """Flax keeps inputs before outputs and heads apart: (D, A, D/A) in, (A, D/A, D) out."""
    state = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            value = torch.from_numpy(arrays[key])
            if key.endswith("kernel") and value.ndim == 4:
                value = value.permute(3, 2, 0, 1)
            elif key.endswith("kernel"):
                value = value.flatten(*((0, -2) if "/out/" in key else (1, -1))).T
            state[_rename(key, GOOGLE_NAMES)] = value.flatten() if "/bias" in key else value
    return _merge_qkv(state)


def convert_onnx(data: bytes) -> State:
    """Tensors of a DINOv2 that was exported to ONNX with folded constants.

    Linear weights are anonymous and transposed there: each is the constant factor of the MatMul
    whose product meets the named bias. The position rows of the class token and of the patches are
    the anonymous constants of shapes (1, 1, D) and (1, h * w, D). Other networks are left out.
    """
    import onnx  # only for the conversion, once

    graph = onnx.load_model_from_string(data).graph
    named = {
        item.name: torch.tensor(onnx.numpy_helper.to_array(item)) for item in graph.initializer
    }
    state = {key: value for key, value in named.items() if key.startswith("backbone.")}
    factors = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    for node in graph.node:
        bias = next((key for key in node.input if key in state and key.endswith("bias")), "")
        factor = next((factors[key] for key in node.input if key in factors), "")
        if node.op_type == "Add" and bias and factor:
            state[bias.removesuffix("bias") + "weight"] = named[factor].T.contiguous()
    rows = [value for key, value in named.items() if value.ndim == 3 and key not in state]
    state["pos_embed"] = torch.cat(sorted(rows, key=lambda value: value.shape[1]), dim=1)
    return _merge_qkv({_rename(key, ONNX_NAMES): value for key, value in state.items()})


def _rename(key: str, table: dict[str, str]) -> str:
    for pattern, new in table.items():
        key = re.sub(pattern, new, key)
    return key


def _merge_qkv(state: State) -> State:
    """Stack query, key and value, as timm does."""
    merged = {}
    for key, value in state.items():
        if ".query." in key:
            parts = [state[key.replace("query", part)] for part in ("query", "key", "value")]
            merged[key.replace("query", "qkv")] = torch.cat(parts)
        elif ".key." not in key and ".value." not in key:
            merged[key] = value
    return merged


def digest(state: State) -> str:
    """SHA-256 of names, kinds, shapes and values, whatever file they lie in."""
    result = hashlib.sha256()
    for key, value in sorted(state.items()):
        result.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        result.update(value.flatten().numpy())
    return result.hexdigest()
