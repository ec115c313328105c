"""TransFG against loops: which patches heads select, what the last block sees, how it learns."""

import copy
import threading
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tiny import draw_photos, finish_training, read_log, same_run, tiny_config, tiny_model

import ramslib.training.trainer
from ramslib.attention import QueryKey, attention_probabilities, record_attention
from ramslib.backbone import overlap_patches, patch_grid
from ramslib.config import Config
from ramslib.data.transforms import ImageTransform
from ramslib.errors import InputError
from ramslib.evaluation import predict
from ramslib.model import MODELS, build_model
from ramslib.runs.folder import read_run
from ramslib.runs.inference import NamedOutputs, export_model, load
from ramslib.training.optimization import backward_scales, create_optimizer
from ramslib.training.trainer import train
from ramslib.transfg import TransFG, contrastive_loss, gather_tokens, select_parts

CLASSES = 5
FITS = ["vit", "qk_norm", "clip", "dinov2", "dinov2_registers", "deit3", "eva", "distilled"]
ROTARY = ["eva02", "eva_split", "dinov3", "rotary_mixed", "grouped_query"]
RELATIVE = ["beit", "beit_shared", "relpos", "relpos_mlp"]


def refused(function, *arguments, **options):
    """The one line with which something is refused."""
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def model_of(backbone_of):
    """Function (family, stride, **options) -> model with a random classifier."""

    def make(family="vit", stride=None, **options):
        backbone = backbone_of(family)
        if stride:
            overlap_patches(backbone, stride)
        model = TransFG(backbone, CLASSES, **options)
        torch.manual_seed(1)
        torch.nn.init.normal_(model.classifier.weight)
        return model.eval()

    return make


def slow_parts(model, inputs):
    """Feature and patches of a timm ViT, block by block, with attention that is not fused."""
    backbone, seen = model.backbone, []
    for block in backbone.blocks:
        block.attn.fused_attn = False
    hooks = [
        block.attn.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for block in backbone.blocks
    ]
    tokens = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(inputs)))
    for block in backbone.blocks[:-1]:
        tokens = block(tokens)
    maps = [probabilities.detach().numpy() for probabilities in seen]
    height, width = model.grid
    prefix = tokens.shape[1] - height * width
    rows, patches = [], []
    for image in range(len(inputs)):
        chosen = reference.chosen_patches([map[image] for map in maps], model.grid)
        rows.append(tokens[image, [*range(prefix), *(prefix + patch for patch in chosen)]])
        patches.append(chosen)
    feature = backbone.norm(backbone.blocks[-1](torch.stack(rows)))[:, 0]
    for hook in hooks:
        hook.remove()
    return feature, patches


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize(
    "family", ["vit", "qk_norm", "clip", "dinov2", "dinov2_registers", "deit3"]
)
def test_parts_are_those_of_the_loops(family, stride, model_of, images):
    model, inputs = model_of(family, stride), images(6)
    parts = model.run_parts(inputs)
    feature, patches = slow_parts(copy.deepcopy(model), inputs)
    assert parts.patches.tolist() == patches
    assert len({tuple(each) for each in patches}) > 1, "images differ"
    torch.testing.assert_close(parts.feature, feature, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.logits, model.classifier(feature), atol=1e-4, rtol=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0, 1, 3]))
def test_chosen_patches_are_those_of_full_products(seed, depth, registers):
    generator = torch.Generator().manual_seed(seed)
    shape = (depth, 2, 2, 3, 7 + registers, 4)
    blocks = [QueryKey(q, k, None, 0.5) for q, k in 2 * torch.randn(shape, generator=generator)]
    maps = [attention_probabilities(block).numpy() for block in blocks]
    expected = [reference.chosen_patches([m[image] for m in maps], (2, 3)) for image in range(2)]
    with torch.autocast("cpu", torch.bfloat16):  # choices do not depend on the training's precision
        assert select_parts(blocks, (2, 3)).tolist() == expected


def test_a_tie_goes_to_the_first_patch():
    block = QueryKey(torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4), None, 1.0)
    assert select_parts([block, block], (2, 3)).tolist() == [[0, 0]]


def test_patches_are_taken_in_the_order_of_the_heads_even_twice():
    tokens = torch.arange(8.0)[None, :, None].repeat(2, 1, 3)
    taken = gather_tokens(tokens, torch.tensor([[5, 0, 0], [2, 1, 3]]), (2, 3))
    assert taken[..., 0].tolist() == [[0, 1, 7, 2, 2], [0, 1, 4, 3, 5]]


@pytest.mark.parametrize("family", FITS)
def test_the_last_block_reads_prefix_and_chosen_tokens_only(family, model_of, images):
    model = model_of(family)
    seen = []
    hook = model.backbone.blocks[-1].attn.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    output = model.forward_preprocessed(images(3))
    hook.remove()
    assert seen == [model.backbone.num_prefix_tokens + 2]  # two heads
    assert len(output.logits) == 1 and output.logits[0].shape == (3, CLASSES)
    assert output.boxes[0].tolist() == [[0, 0, 24, 32]] * 3
    assert output.strengths == output.proposals == ()
    with record_attention(model.backbone) as blocks:  # nothing stays behind
        model.backbone.forward_features(images(1))
    assert blocks[-1].query.shape[2] == model.backbone.num_prefix_tokens + 12


@pytest.mark.parametrize("family", ROTARY + RELATIVE + ["siglip", "average", "registers_average"])
def test_backbones_that_need_every_patch_are_refused(family, backbone_of):
    message = refused(TransFG, backbone_of(family), CLASSES)
    assert "choose a plain ViT with a class token for TransFG" in message


def test_other_backbones_that_do_not_fit(backbone_of):
    message = refused(TransFG, backbone_of("vit", depth=1), CLASSES)
    assert "has one block" in message
    message = refused(TransFG, backbone_of("vit", global_pool="avg"), CLASSES)
    assert "does not read its class token" in message


def test_images_of_another_size_are_refused(model_of, images):
    assert "resize them" in refused(model_of().forward_preprocessed, images(1, (32, 24)))


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(-0.5, 0.9))
def test_contrastive_loss_is_that_of_the_pairs(seed, count, margin):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 4, generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    expected = reference.contrastive(features.tolist(), labels.tolist(), margin)
    assert contrastive_loss(features, labels, margin).item() == pytest.approx(expected, abs=1e-5)


def test_five_steps_are_those_of_plain_loops(model_of, images):
    """Losses of SGD steps by the library and by a loop that shares no code with it."""
    pixels, labels = images(4).sigmoid(), torch.tensor([0, 1, 1, 4])
    model = model_of("vit", 6, contrastive_weight=0.7, contrastive_margin=0.1)
    slow = copy.deepcopy(model)
    optimizer = create_optimizer(
        model, Config.preset("released", model="transfg", learning_rate=0.01)
    )
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    inputs = (pixels - mean) / std
    plain = torch.optim.SGD(slow.parameters(), lr=0.01, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        _, loss = backward_scales(model, pixels, labels, [1.0])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plain.zero_grad()
        feature, _ = slow_parts(slow, inputs)
        cosine = F.cosine_similarity(feature[:, None], feature[None], dim=2)
        pairs = [
            1 - cosine[i, j] if labels[i] == labels[j] else F.relu(cosine[i, j] - 0.1)
            for i in range(4)
            for j in range(4)
        ]
        logits = slow.classifier(feature)
        entropies = torch.logsumexp(logits, 1) - logits[range(4), labels]
        expected = entropies.mean() + 0.7 * sum(pairs) / 16
        expected.backward()
        torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
        plain.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert sum(pairs) > 0.1, "the contrastive loss counts"


def test_mixed_precision_follows_the_full_one(model_of, images):
    pixels, labels = images(4).sigmoid(), torch.tensor([0, 1, 1, 4])
    losses = [
        backward_scales(model_of(), pixels, labels, [1.0], amp=amp)[1].item()
        for amp in (None, torch.bfloat16)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0] != losses[1]


@pytest.mark.parametrize("family", FITS)
@pytest.mark.parametrize("stride", [8, 5, 1])
def test_overlapping_patches_are_windows_of_the_image(family, stride, backbone_of, images):
    backbone, plain, inputs = backbone_of(family), backbone_of(family), images(1)
    overlap_patches(backbone, stride)
    grid = (24 - 8) // stride + 1, (32 - 8) // stride + 1
    assert patch_grid(backbone) == grid
    tokens = backbone.patch_embed(inputs)
    assert tokens.shape[1] == grid[0] * grid[1] == backbone.patch_embed.num_patches
    row, column = grid[0] - 1, grid[1] - 2
    top, left = row * stride, column * stride
    window = torch.zeros_like(inputs)
    window[..., :8, :8] = inputs[..., top : top + 8, left : left + 8]
    alone = plain.patch_embed(window)[:, 0]
    torch.testing.assert_close(tokens[:, row * grid[1] + column], alone, atol=1e-5, rtol=1e-4)
    assert backbone.forward_features(inputs).shape[1] == tokens.shape[1] + plain.num_prefix_tokens
    if stride == 8:
        assert torch.equal(backbone(inputs), plain(inputs))


def test_strides_and_families_that_cannot_overlap(backbone_of):
    for stride in (0, -1, 9):
        message = refused(overlap_patches, backbone_of("vit"), stride)
        assert f"patch_stride is {stride}; choose 1 to 8" in message
    for family in (*ROTARY, *RELATIVE):
        message = refused(overlap_patches, backbone_of(family), 4)
        assert "ties positions to patches that tile" in message


def tiny(**changes):
    """A configuration of TransFG without data."""
    return tiny_config("", model="transfg", **changes)


def test_a_configuration_reaches_the_model():
    settings = {"patch_stride": 8, "contrastive_weight": 0.5, "contrastive_margin": 0.2}
    model = build_model(tiny(normalization="imagenet", drop_path=0.2, **settings), 7)
    assert isinstance(model, TransFG) and "random" in model.origin
    assert set(MODELS) == {"rams", "transfg"}
    assert (model.grid, model.num_scales, model.contrastive_weight) == ((3, 3), 1, 0.5)
    assert model.contrastive_margin == 0.2
    assert model.mean.flatten().tolist() == pytest.approx(IMAGENET_DEFAULT_MEAN)
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    vit = build_model(tiny_config("", model="vit", patch_stride=8), 7)
    assert (vit.grid, vit.num_scales) == ((3, 3), 1)


@pytest.mark.slow
def test_the_exported_program_takes_any_batch():
    model = tiny_model(CLASSES, model="transfg")
    program = export_model(model, (48, 48)).module()
    for batch in (1, 5):
        pixels = torch.randint(0, 256, (batch, 3, 48, 48), dtype=torch.uint8)
        with torch.no_grad():
            expected, found = NamedOutputs(model)(pixels), program(pixels)
        assert found.keys() == expected.keys() == {"logits_1", "boxes_1"}
        torch.testing.assert_close(found["logits_1"], expected["logits_1"], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of three classes."""
    return draw_photos(tmp_path_factory.mktemp("photos"))


@contextmanager
def asked_to_stop():
    """A request to stop that is there from the start."""
    stop = threading.Event()
    stop.set()
    yield stop


@pytest.mark.slow
def test_a_run_trains_resumes_and_is_loaded(photos, tmp_path, monkeypatch):
    config = tiny_config(photos, model="transfg", patch_stride=8, epochs=2, ema_decay=0.9)
    run = train(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(ramslib.training.trainer, "stop_request", asked_to_stop)
        assert "at step 1 of 6" in refused(train, config, tmp_path / "cut")
    same_run(run, train(config, tmp_path / "cut"))
    stored = pd.read_csv(run / "predictions_last.csv")
    assert set(stored["output"]) == {"scale 1"} and len(stored) == 15
    assert stored[["top", "left"]].notna().all().all()
    model = load(run, "last")
    assert isinstance(model, TransFG) and not model.training
    table = read_run(run)[2].query("split == 'test'").reset_index(drop=True)
    again = predict(model, table, ImageTransform(48, config.crop_fraction), batch_size=4)
    assert again["prediction"].tolist() == stored["prediction"].tolist()
    assert "TransFG on folder" in (run / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_train_it_with_micro_batches_and_mixed_precision(photos, tmp_path):
    options = {"epochs": 1, "batch_size": 8, "grad_accum_steps": 2, "amp": "bf16"}
    config = tiny_config(photos, model="transfg", **options)
    code, output = finish_training(config, tmp_path / "run", processes=2)
    assert code == 0, output
    losses = [row["loss"] for row in read_log(tmp_path / "run") if row["split"] == "train"]
    assert len(losses) == 2 and np.isfinite(losses).all()
    results = pd.read_csv(tmp_path / "run" / "results.csv")
    assert set(results["images"]) == {15} and set(results["output"]) == {"scale 1"}


def test_blocks_whose_tokens_are_exchanged_are_not_computed_again():
    config = tiny_config(".", model="transfg", scales=1, grad_checkpointing=True)
    assert "use grad_checkpointing=False" in refused(build_model, config, 5)
