"""An inspector's numbers equal the library's, and a control costs no forward pass of scale 1."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import draw_photos, tiny_config, tiny_model

from ramslib.attention import (
    STRENGTHS,
    RecordedScale,
    attention_probabilities,
    attention_strength,
    record_attention,
)
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.datasets import load_table
from ramslib.data.transforms import ImageTransform
from ramslib.dppm import PROPOSALS, attention_proposal, propose
from ramslib.errors import InputError
from ramslib.evaluation import predict
from ramslib.extensions import reads
from ramslib.inspector import Inspector, single_block
from ramslib.model import ProposalSettings, RAMSTrans

BOX = [5.0, 8.0, 30.0, 40.0]  # top, left, bottom, right in pixels of a photo


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Photos of three classes, 40 x 48 pixels."""
    return load_table(tiny_config(draw_photos(tmp_path_factory.mktemp("photos"), size=40)))


@pytest.fixture
def inspector(table):
    """Two scales of timm's test_vit at 64 pixels (4 x 4 patches), crops from 96; one image set."""
    model = tiny_model(3, image_size=64, highres_size=96, class_token="per_scale", threshold=1.0)
    with torch.no_grad():  # as after training: no two tokens alike
        model.backbone.cls_token[:, 1] += torch.linspace(-1, 1, 64)
    inspector = Inspector(model, ImageTransform(96, 0.875), ["a", "b", "c"])
    return inspector.set_image(table["path"][0], 1, BOX)


@pytest.fixture
def forwards(inspector, monkeypatch):
    """Count the passes through the backbone."""
    calls, forward = [], inspector.model.backbone.forward_features
    monkeypatch.setattr(
        inspector.model.backbone,
        "forward_features",
        lambda inputs: calls.append(1) or forward(inputs),
    )
    return calls


# --- the model's own numbers -------------------------------------------------------------------


@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("highres_size", [32, 48])
@pytest.mark.parametrize("class_token", ["per_scale", "shared"])
def test_outputs_are_those_of_the_model(table, scales, highres_size, class_token):
    model = tiny_model(3, scales=scales, threshold=0.9, class_token=class_token)
    transform = ImageTransform(highres_size)
    inspector = Inspector(model, transform, ["a", "b", "c"]).set_image(table["path"][0])
    found = inspector.outputs()
    with torch.no_grad():
        expected = list(model.forward_scales(inspector.pixels[None]))
    assert len(found) == len(expected) == scales
    for scale, (mine, output) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(mine.logits, output.logits, atol=1e-5)
        assert torch.allclose(mine.feature, output.feature, atol=1e-5)
        assert torch.equal(mine.input, output.input) and torch.equal(mine.boxes, output.boxes)
        if output.strength is not None:
            assert torch.allclose(mine.strength, output.strength, atol=1e-6)
            assert all(map(torch.equal, mine.proposal, output.proposal))
            region = inspector.region(scale)
            assert torch.equal(region.strength, mine.strength)
            assert all(map(torch.equal, region.proposal, mine.proposal))
            assert torch.equal(region.crop, found[scale + 1].input)
            assert torch.equal(region.boxes, found[scale + 1].boxes)
    for mine, output in zip(inspector.logits(scales), expected, strict=True):
        assert torch.allclose(mine, output.logits, atol=1e-5)


def test_regions_and_probabilities_are_those_of_predict(inspector, table):
    rows = predict(inspector.model, table[:4], inspector.transform).groupby("path", sort=False)
    for path, predictions in rows:
        outputs = inspector.set_image(path).outputs()
        boxes = inspector.image_boxes(torch.cat([output.boxes for output in outputs]))
        stored = predictions.set_index("output")
        shown = stored.loc[["scale 1", "scale 2"], BOX_COLUMNS]
        np.testing.assert_allclose(boxes, shown, rtol=1e-6)
        for name, values in inspector.probabilities(outputs).items():
            confidence, prediction = stored.loc[name, ["confidence", "prediction"]]
            assert float(values.max()) == pytest.approx(confidence, rel=1e-4)
            assert int(values.argmax()) == prediction


def test_pixels_of_the_crop_are_a_setting(inspector):
    sharp, coarse = inspector.region(), inspector.region(from_high_res=False)
    assert torch.equal(sharp.boxes, coarse.boxes) and not torch.equal(sharp.crop, coarse.crop)
    first = inspector.outputs()[0]
    given = first.input, None, first.boxes, coarse.proposal.patch_boxes
    assert torch.equal(coarse.crop, inspector.model.crop_region(*given)[0])


def test_more_scales_than_trained_read_the_last_token(inspector):
    outputs = inspector.outputs(scales=4)
    assert len(outputs) == 4
    for scale, output in enumerate(outputs):
        with torch.no_grad():
            logits = inspector.model.run_scale(output.input, min(scale, 1))[0]
        assert torch.allclose(output.logits, logits, atol=1e-5)
    mean = torch.stack([output.logits[0] for output in outputs]).mean(0).softmax(0)
    assert torch.allclose(inspector.probabilities(outputs)["mean logits"], mean)


def test_a_model_of_one_scale_proposes_regions_too(table):
    model = tiny_model(3, scales=1)
    inspector = Inspector(model, ImageTransform(32)).set_image(table["path"][0])
    assert len(inspector.outputs()) == 1
    assert inspector.region(threshold=1.0).crop.shape == (1, 3, 32, 32)
    assert len(inspector.outputs(scales=3)) == 3


@pytest.mark.parametrize("name", STRENGTHS)
def test_strengths_are_those_of_the_registry(inspector, name):
    model, images = inspector.model, inspector.outputs()[0].input
    with torch.no_grad(), record_attention(model.backbone) as blocks:
        tokens = model.backbone.forward_features(images)
    tokens = tokens[:, -16:].unflatten(1, (4, 4))
    expected = attention_strength(RecordedScale(blocks, (4, 4), 0, images, tokens), name)
    assert torch.allclose(inspector.region(strength=name).strength, expected, atol=1e-6)


def test_single_blocks_and_heads_are_rows_of_the_attention(inspector):
    model, images = inspector.model, inspector.outputs()[0].input
    with torch.no_grad(), record_attention(model.backbone) as blocks:
        model.backbone.forward_features(images)
    for number in (1, 4):
        rows = attention_probabilities(blocks[number - 1])[0, :, 0, -16:]
        mean = inspector.region(strength=single_block(number)).strength
        assert torch.allclose(mean.flatten(), rows.mean(dim=0), atol=1e-6)
        for head in (1, 2):
            one = inspector.region(strength=single_block(number, head)).strength
            assert torch.allclose(one.flatten(), rows[head - 1], atol=1e-6)


@pytest.mark.parametrize("family", ["average", "beit", "relpos", "dinov3"])
def test_models_without_class_token_and_with_bias_can_be_inspected(family, backbone_of, table):
    settings = ProposalSettings((), "rollout_mean", scales=1)
    model = RAMSTrans(backbone_of(family), 3, settings).eval()
    inspector = Inspector(model, ImageTransform((24, 32))).set_image(table["path"][0])
    names = inspector.strengths()
    assert names == (["rollout_mean", "token_pca"] if family == "average" else list(STRENGTHS))
    singles = [single_block(2, None, inspector.has_class_token), single_block(2, 2)]
    for strength in (*names, *singles):
        region = inspector.region(strength=strength)
        assert region.strength.isfinite().all() and region.strength.shape == (1, 3, 4)
        assert inspector.strength_per_block(strength=strength).shape == (3, 3, 4)


# --- any token, and boxes by hand --------------------------------------------------------------

PREFIXES = {
    "average": [],
    "vit": ["class 1"],
    "eva02": ["class 1"],
    "dinov3": ["class 1", *(f"register {number}" for number in range(1, 5))],
    "dinov2_registers": ["class 1", *(f"register {number}" for number in range(1, 5))],
}


def unfused(backbone, images):
    """The (A, N, N) probabilities of each block as timm's own unfused attention forms them."""
    formed = []
    for block in backbone.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, given: formed.append(given[0][0]))
    with torch.no_grad():
        backbone.forward_features(images)
    return formed


@pytest.mark.parametrize("family", PREFIXES)
def test_rows_of_any_token_are_those_of_unfused_attention(family, backbone_of, table):
    backbone = backbone_of(family)
    model = RAMSTrans(backbone, 3, ProposalSettings((), "rollout_mean", scales=1)).eval()
    inspector = Inspector(model, ImageTransform((24, 32))).set_image(table["path"][0])
    names = inspector.prefix_tokens
    assert names == PREFIXES[family]
    expected = unfused(backbone, inspector.outputs()[0].input)
    assert len(expected) == 3 and expected[0].shape[-1] == len(names) + 12
    patches = [(row, column) for row in range(3) for column in range(4)]
    for block in (1, 3):
        for index, token in enumerate([*names, *patches]):
            rows = inspector.attention_rows(block, token)
            assert torch.allclose(rows, expected[block - 1][:, index], atol=1e-6)
            one = inspector.attention_rows(block, token, head=2)
            assert torch.equal(one, rows[1:])
    if names:
        first, second = (expected[2][:, index, -12:].mean(0) for index in (0, len(names) + 6))
        difference = (first / first.sum() - second / second.sum()).view(3, 4)
        assert torch.allclose(inspector.disagreement(3, (1, 2)), difference, atol=1e-6)
    else:
        with pytest.raises(InputError, match="no class token; use attention_rows"):
            inspector.disagreement(3, (1, 2))


def test_rows_of_scale_2_are_of_what_it_saw(inspector):
    model, second = inspector.model, inspector.outputs()[1]
    with torch.no_grad(), record_attention(model.backbone) as blocks:
        model.backbone.forward_features(second.input)
    rows = attention_probabilities(blocks[3])[0, :, 0]
    found = inspector.attention_rows(4, "class 1", scale=1)
    assert torch.allclose(found, rows, atol=1e-6)
    assert not torch.allclose(found, inspector.attention_rows(4, "class 1"), atol=1e-3)


@pytest.mark.parametrize("scale", [0, 1])
def test_similarity_is_the_cosine_of_the_tokens(inspector, scale):
    inputs = inspector.outputs()[scale].input
    with torch.no_grad():
        tokens = inspector.model.backbone.forward_features(inputs)[0, -16:]
    found = inspector.patch_similarity((2, 1), scale)
    assert torch.allclose(inspector.patch_tokens(scale).flatten(0, 1), tokens, atol=1e-5)
    for place, other in enumerate(tokens):
        cosine = float(tokens[9] @ other / (tokens[9].norm() * other.norm()))
        assert float(found.flatten()[place]) == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, "class 1"), "block 0: there is none; give one of 1 to 6"),
        ((1, "class 1", 9), "head 9: there is none"),
        ((1, (4, 0)), "row 4: there is none; give one of 0 to 3"),
        ((1, (0, -1)), "column -1"),
        ((1, "class 3"), "no token 'class 3'; choose one of"),
    ],
)
def test_tokens_that_there_are_not(inspector, arguments, words):
    with pytest.raises(InputError, match=words):
        inspector.attention_rows(*arguments)


def test_a_box_by_hand_is_where_scale_2_looks(inspector, forwards):
    outputs = inspector.outputs(inspector.by_hand(BOX))
    assert inspector.image_boxes(outputs[1].boxes)[0].tolist() == pytest.approx(BOX, abs=1e-3)
    box = inspector.transform.boxes_to_input(inspector.box, inspector.size, (96, 96))
    top, left, bottom, right = box[0].round().int().tolist()
    crop = inspector.model.preprocess(inspector.pixels[None])[1][..., top:bottom, left:right]
    size = {"size": (64, 64), "mode": "bilinear"}
    expected = torch.nn.functional.interpolate(crop, **size)
    assert torch.allclose(outputs[1].input, expected, atol=1e-5)
    with torch.no_grad():
        logits = inspector.model.run_scale(expected, 1)[0]
    assert torch.allclose(outputs[1].logits, logits, atol=1e-4)
    stats = inspector.region_stats(inspector.region(0, inspector.by_hand(BOX, margin=0.5)))
    assert stats["iou"] == pytest.approx(1, abs=1e-3)
    with pytest.raises(InputError, match="the model sees nothing of it"):
        inspector.by_hand([10, 0, 10, 40])


def test_probabilities_elsewhere_are_those_of_the_boxes(inspector):
    boxes = inspector.sliding_boxes(inspector.box[0], steps=3)
    seen = inspector.image_boxes(torch.tensor([[0, 0, 64, 64]]))[0]
    assert boxes.shape == (9, 4)
    assert torch.allclose(boxes[0, :2], seen[:2]) and torch.allclose(boxes[-1, 2:], seen[2:])
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert torch.allclose(sizes, torch.tensor([[25.0, 32.0]]).double().expand(9, 2))
    places = [inspector.by_hand(box) for box in boxes]
    for place, chance in zip(places, inspector.true_probabilities(places), strict=True):
        outputs = inspector.outputs(place)
        assert chance == pytest.approx(float(outputs[1].logits[0].softmax(0)[1]), abs=1e-6)


# --- what runs again ---------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_region_needs_no_forward_pass(inspector, forwards, proposal):
    for threshold in (0.0, 0.7, 1.3, 50.0):
        changes = {"threshold": threshold, "strength": "rollout_class", "proposal": proposal}
        first, second = (inspector.region(**changes) for _ in range(2))
        assert torch.equal(first.boxes, second.boxes), "a random region stays where it is"
        if proposal != "random":
            expected = propose(first.strength, threshold, proposal)
            assert all(map(torch.equal, first.proposal, expected))
        inspector.strength_per_block(strength="rollout_class")
    assert not forwards


def test_only_changed_scales_run_again(inspector, forwards):
    settings = replace(inspector.settings, thresholds=(1.1, 1.1), scales=3)
    outputs = inspector.outputs(settings)
    assert not torch.equal(outputs[0].boxes, outputs[1].boxes)
    assert len(forwards) == 2, "scale 1 was run when the image was set"
    inspector.outputs(settings)
    assert len(forwards) == 2
    other = replace(settings, thresholds=(1.1, 0.0))
    assert not torch.equal(inspector.region(1, other).boxes, outputs[2].boxes)
    assert inspector.has_run(1, outputs[1].input)
    assert not inspector.has_run(2, inspector.region(1, other).crop)
    changed = inspector.outputs(other)
    assert len(forwards) == 3
    assert all(map(torch.equal, changed[1][:3], outputs[1][:3]))
    assert not torch.equal(changed[2].logits, outputs[2].logits)
    inspector.outputs(settings, strength="rollout_mean", threshold=1e9)
    assert len(forwards) == 5, "two scales see the whole image, each with another token"
    inspector.outputs(settings, strength="last_class", threshold=1e9)
    assert len(forwards) == 5, "another strength, the same crops"
    assert not inspector.has_run(3, outputs[2].input)


def test_random_regions_stay_while_settings_change(inspector):
    changes = {"proposal": "random", "scales": 3}
    first, again = inspector.outputs(**changes), inspector.outputs(**changes)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(inspector.region(**changes).boxes, first[1].boxes)
    state = torch.get_rng_state()
    inspector.outputs(**changes)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_image_starts_over(inspector, table, forwards):
    before = inspector.outputs()
    after = inspector.set_image(table["path"].iloc[-1]).outputs()
    assert not torch.equal(before[0].logits, after[0].logits)
    assert len(forwards) == 3 and inspector.label is None and inspector.box.isnan().all()
    assert inspector.path == table["path"].iloc[-1]


def test_boxes_are_on_the_cpu_and_nothing_has_a_gradient(inspector):
    for output in inspector.outputs(scales=3):
        tensors = [output.logits, output.input, output.boxes, output.feature]
        assert not any(tensor.requires_grad for tensor in tensors)
        assert output.boxes.device.type == "cpu"
    region = inspector.region()
    assert region.boxes.device.type == region.proposal.mask.device.type == "cpu"


# --- numbers of an image -----------------------------------------------------------------------


def test_stats_of_a_region(inspector):
    region = inspector.region()
    stats = inspector.region_stats(region)
    box = [float(side) * 16 for side in region.proposal.patch_boxes[0]]  # pixels of the input
    resized = round(96 / 0.875)
    margin = round((resized - 96) / 2)
    height, width = inspector.size[0].tolist()
    factors = (height, width, height, width)
    sides = [(side * 96 / 64 + margin) * f / resized for side, f in zip(box, factors, strict=True)]
    assert [stats[name] for name in BOX_COLUMNS] == pytest.approx(sides)
    top, left, bottom, right = sides
    assert stats["area"] == pytest.approx((bottom - top) * (right - left) / (height * width))
    tall = max(0, min(bottom, 30) - max(top, 5))
    wide = max(0, min(right, 40) - max(left, 8))
    union = (bottom - top) * (right - left) + 25 * 32 - tall * wide
    assert stats["iou"] == pytest.approx(tall * wide / union)
    assert stats["patches"] == int(region.proposal.mask.sum())
    assert 1 <= stats["kept"] <= stats["patches"] and stats["components"] >= 1


def test_without_an_annotated_box_there_is_no_iou(inspector, table):
    inspector.set_image(table["path"].iloc[-1], box=[np.nan] * 4)
    assert np.isnan(inspector.region_stats(inspector.region())["iou"])
    assert list(inspector.threshold_curve([0.5, 1])) == ["threshold", "area"]


@pytest.mark.parametrize("label", [1, None])
def test_curves_are_the_numbers_at_every_threshold(inspector, table, label):
    inspector.set_image(table["path"][0], label, BOX)
    thresholds = [0.0, 0.9, 1.1, 9.0]
    curve = inspector.threshold_curve(thresholds)
    chances = list(
        inspector.true_probabilities(inspector.changed(threshold=eta) for eta in thresholds)
    )
    for threshold, row, chance in zip(thresholds, curve.itertuples(), chances, strict=True):
        stats = inspector.region_stats(inspector.region(threshold=threshold))
        assert (row.area, row.iou) == pytest.approx((stats["area"], stats["iou"]))
        first, second = inspector.outputs(threshold=threshold)
        index = int(first.logits.argmax()) if label is None else label
        assert chance == pytest.approx(float(second.logits[0].softmax(0)[index]), abs=1e-6)


def test_probabilities_run_each_crop_once(inspector, forwards):
    proposed = [inspector.changed(threshold=eta) for eta in (50.0, 60.0, 0.0, 70.0)]
    list(inspector.true_probabilities(proposed))
    assert len(forwards) == 1, "no patch or every patch: the whole image"
    coarse = replace(proposed[0], from_high_res=False)
    first, *_, last = inspector.true_probabilities([*proposed, coarse])
    assert len(forwards) == 3 and first != last, "the same box of other pixels"


@pytest.mark.parametrize("name", STRENGTHS)
def test_strength_per_block_ends_with_the_strength(inspector, name):
    maps = inspector.strength_per_block(strength=name)
    assert maps.shape == (6, 4, 4)
    assert torch.equal(maps[-1:], inspector.region(strength=name).strength)
    model, images = inspector.model, inspector.outputs()[0].input
    if not STRENGTHS[name].reads_tokens:
        with torch.no_grad(), record_attention(model.backbone) as blocks:
            model.backbone.forward_features(images)
        expected = attention_strength(RecordedScale(blocks[:2], (4, 4)), name)
        assert torch.allclose(maps[1], expected[0], atol=1e-6)


def test_single_blocks_are_shown_block_by_block(inspector):
    maps = inspector.strength_per_block(strength=single_block(3))
    for number, one in enumerate(maps, start=1):
        assert torch.equal(one[None], inspector.region(strength=single_block(number)).strength)


# --- functions of one's own, several regions ---------------------------------------------------


def halves(strength, threshold, recorded):
    """Left and right, without anything recorded."""
    boxes = torch.tensor([[0, 0, 4, 2], [0, 2, 4, 4]])
    return boxes.expand(len(strength), 2, 4)


def test_functions_of_ones_own_and_several_regions(inspector, forwards):
    def norms(recorded):
        return recorded.tokens.norm(dim=-1)

    outputs = inspector.outputs(strength=norms, proposal=halves, scales=3)
    assert [len(output.boxes) for output in outputs] == [1, 2, 4] and len(forwards) == 2
    assert torch.equal(outputs[0].strength, inspector.region(strength=norms).strength)
    region = inspector.region(1, strength=norms, proposal=halves)
    assert torch.equal(region.crop, outputs[2].input)
    assert torch.equal(region.boxes, outputs[2].boxes)
    stats = inspector.region_stats(region)
    assert stats["patches"] == int(region.proposal.mask[0].sum())
    assert stats["kept"] == 8, "of several regions, the first"
    first = inspector.image_boxes(region.boxes[:1])[0]
    assert [stats[name] for name in BOX_COLUMNS] == pytest.approx(first.tolist())
    for scale in (1, 2):
        with torch.no_grad():
            logits = inspector.model.run_scale(outputs[scale].input, scale)[0].mean(0)
        assert torch.allclose(outputs[scale].logits[0], logits, atol=1e-5)
        assert torch.allclose(inspector.logits(3)[scale][0], logits, atol=1e-5)
    proposed = [inspector.changed(threshold=eta, proposal=halves) for eta in (0.5, 1.0)]
    chances = list(inspector.true_probabilities(proposed))
    expected = outputs[1].logits[0].softmax(0)[1]
    assert chances == pytest.approx([float(expected)] * 2, abs=1e-6)


def test_a_trained_function_is_the_default(table):
    @reads(blocks=0)
    def shrunk(strength, threshold, recorded):
        return attention_proposal(strength, threshold * 1.2)

    model = tiny_model(3, image_size=64, threshold=0.9)
    model.settings = replace(model.settings, proposal=shrunk)
    inspector = Inspector(model, ImageTransform(96)).set_image(table["path"][0])
    expected = attention_proposal(inspector.region().strength, 0.9 * 1.2)
    assert torch.equal(inspector.region().proposal.patch_boxes, expected.patch_boxes)
    assert inspector.settings.reads == model.settings.reads


# --- images ------------------------------------------------------------------------------------


def test_an_image_in_memory_is_as_good_as_its_file(inspector, table):
    expected = inspector.set_image(table["path"][3]).outputs()
    with Image.open(table["path"][3]) as image:
        found = inspector.set_image(image.convert("RGB")).outputs()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)
    assert inspector.size.tolist() == [[40, 48]] and inspector.picture.size == (48, 40)


def test_images_that_cannot_be_read_are_one_line_and_leave_the_inspector_as_it_was(
    inspector, tmp_path
):
    before = inspector.outputs(), inspector.size.clone(), inspector.path
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    for name, words in (("text.jpg", "image"), ("dot.png", "1 x 1"), ("none.png", "No such file")):
        with pytest.raises(InputError, match=words) as error:
            inspector.set_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
        assert torch.equal(inspector.size, before[1]) and inspector.path == before[2]
        assert torch.equal(inspector.outputs()[1].logits, before[0][1].logits)


def test_what_was_not_run_says_what_to_call(inspector):
    with pytest.raises(InputError, match=r"scale 2 was not run; call outputs\(\) first"):
        inspector.region(1)
    bare = Inspector(inspector.model, inspector.transform)
    for call in (bare.region, bare.outputs, bare.strength_per_block):
        with pytest.raises(InputError, match=r"call set_image\(\) first"):
            call()


def test_unknown_names_are_one_line(inspector):
    for changes in ({"strength": "rolout"}, {"proposal": "atention"}):
        (kind,) = changes
        with pytest.raises(InputError, match=f"unknown {kind} {changes[kind]!r}"):
            inspector.region(**changes)
        with pytest.raises(InputError, match=f"unknown {kind} {changes[kind]!r}"):
            inspector.outputs(**changes)
