"""RAMSTrans against a plain ViT and against the whole recursion, image by image, from the loops."""

import copy
from functools import partial
from itertools import cycle, product

import numpy as np
import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ramslib.attention import STRENGTHS
from ramslib.backbone import extend_class_tokens
from ramslib.classifier import RAMSOutput
from ramslib.config import Config
from ramslib.dppm import PROPOSALS, attention_proposal, seed_random_proposals
from ramslib.errors import InputError
from ramslib.extensions import reads
from ramslib.model import ProposalSettings, RAMSTrans, build_model

CLASSES = 5
NORMALIZATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the tiny backbones


def refused(call, *args, **kwargs):
    """The message of the InputError that a call raises; always one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tiny(**changes):
    """A configuration that builds in milliseconds."""
    start = {"backbone": "test_vit", "pretrained": "none", "image_size": 32, "highres_size": None}
    return Config().replace(**start | changes)


@pytest.fixture
def model_of(backbone_of):
    """Function (family, scales, **settings) -> RAMSTrans with a random classifier, eval mode."""

    def build(family="vit", scales=2, seed=0, per_scale_token=True, released=False, **settings):
        backbone = backbone_of(family, seed)
        generator = torch.Generator().manual_seed(seed)
        if per_scale_token and scales > 1:
            extend_class_tokens(backbone, scales)
            with torch.no_grad():  # as after training: no two tokens alike
                backbone.cls_token += torch.randn(1, scales, 32, generator=generator)
        thresholds = tuple(1.0 + 0.1 * scale for scale in range(scales - 1))
        settings = ProposalSettings(**{"thresholds": thresholds, "scales": scales} | settings)
        model = RAMSTrans(backbone, CLASSES, settings, per_scale_token, released, released)
        with torch.no_grad():
            model.classifier.weight.copy_(torch.randn(CLASSES, 32, generator=generator))
            model.classifier.bias.copy_(torch.randn(CLASSES, generator=generator))
        return model.eval()

    return build


def reference_run(model, name, per_scale_token):
    """Function (input, scale) -> (logits, strength) from timm's unfused attention and the loops."""
    backbone = copy.deepcopy(model.backbone)
    weight, bias = (p.detach().numpy() for p in model.classifier.parameters())
    caught = []
    for block in backbone.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))

    def run(crop, scale):
        caught.clear()
        token = scale if per_scale_token else 0
        with torch.no_grad():
            tokens = backbone.forward_features(torch.from_numpy(crop)[None].float())
            feature = backbone.forward_head(tokens[:, token:], pre_logits=True)[0]
        blocks = [probabilities.numpy().astype(np.float64) for probabilities in caught]
        return weight @ feature.numpy() + bias, reference.strength(blocks, name, (3, 4), token)

    return run


# --- the recursion -----------------------------------------------------------------------------

CASES = [
    ("vit", "rollout_mean", True),
    ("vit", "last_class", False),
    ("dinov2_registers", "last_class", True),
    ("deit3", "rollout_class", True),
    ("dinov3", "rollout_mean", True),
    ("rotary_mixed", "last_class", True),
    ("grouped_query", "rollout_class", False),
    ("beit", "rollout_class", False),
    ("relpos", "last_class", False),
    ("distilled", "rollout_mean", False),
    ("siglip", "rollout_mean", False),
    ("registers_average", "rollout_mean", False),
]


@pytest.mark.parametrize("scales", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("family, strength, per_scale", CASES)
def test_recursion_equals_the_loops(family, strength, per_scale, scales, model_of, images):
    model = model_of(family, scales, strength=strength, per_scale_token=per_scale)
    batch = images(2)
    output = model.forward_preprocessed(batch)
    run = reference_run(model, strength, per_scale)
    for index, image in enumerate(batch.numpy().astype(np.float64)):
        logits, boxes = reference.recursion(run, image, (3, 4), scales, model.settings.thresholds)
        for scale in range(scales):
            np.testing.assert_allclose(output.boxes[scale][index], boxes[scale], atol=1e-3)
            np.testing.assert_allclose(
                output.logits[scale][index].detach(), logits[scale], atol=2e-4, rtol=1e-4
            )
    assert len(output.logits) == len(output.boxes) == scales
    assert len(output.strengths) == len(output.proposals) == scales - 1


@pytest.mark.parametrize("family, strength, per_scale", CASES[:6])
def test_high_res_crops_equal_the_loops(family, strength, per_scale, model_of, images):
    model = model_of(family, 3, strength=strength, per_scale_token=per_scale)
    high_res = images(2, (72, 96), seed=1)  # three times the input: all boxes on whole pixels
    batch = F.avg_pool2d(high_res, 3)
    output = model.forward_preprocessed(batch, high_res)
    run = reference_run(model, strength, per_scale)
    for index in range(2):
        logits, boxes = reference.recursion(
            run,
            batch[index].double().numpy(),
            (3, 4),
            3,
            model.settings.thresholds,
            high_res[index].double().numpy(),
        )
        for scale in range(3):
            np.testing.assert_allclose(output.boxes[scale][index], boxes[scale], atol=1e-3)
            np.testing.assert_allclose(
                output.logits[scale][index].detach(), logits[scale], atol=2e-4, rtol=1e-4
            )


def test_the_cases_do_propose_regions(model_of, images):
    areas = [
        (box[:, 2:] - box[:, :2]).prod(1)
        for family, strength, per_scale in CASES
        for box in model_of(family, 3, strength=strength, per_scale_token=per_scale)(
            images(3)
        ).boxes
    ]
    assert torch.stack(areas).unique().numel() > 8


def test_one_scale_is_a_plain_vision_transformer(family, backbone_of, images):
    backbone = backbone_of(family)
    model = RAMSTrans(backbone, CLASSES, ProposalSettings((), scales=1)).eval()
    torch.nn.init.normal_(model.classifier.weight)
    output = model.forward_preprocessed(images())
    assert isinstance(output, RAMSOutput) and len(output.logits) == 1 and not output.strengths
    expected = model.classifier(backbone(images()))
    torch.testing.assert_close(output.logits[0], expected, atol=1e-5, rtol=1e-5)
    assert output.boxes[0].tolist() == [[0, 0, 24, 32]] * 2


def test_class_token_of_each_scale_decides(model_of, images):
    model = model_of(scales=3, proposal="whole")
    logits = model.forward_preprocessed(images()).logits
    assert min((logits[i] - logits[j]).abs().max() for i, j in [(0, 1), (0, 2), (1, 2)]) > 0.1
    shared = model_of(scales=3, per_scale_token=False, proposal="whole")(images()).logits
    for scale in (1, 2):
        torch.testing.assert_close(shared[scale], shared[0], atol=1e-4, rtol=1e-4)


def test_each_scale_has_its_threshold(model_of, images):
    boxes = model_of(scales=3, thresholds=(float("inf"), 1.0))(images()).boxes
    assert (boxes[1] == boxes[0]).all() and not (boxes[2] == boxes[0]).all()
    boxes = model_of(scales=3, thresholds=(1.0, float("inf")))(images()).boxes
    assert not (boxes[1] == boxes[0]).all() and (boxes[2] == boxes[1]).all()


# --- geometry ----------------------------------------------------------------------------------


def test_boxes_nest_and_inputs_are_their_crops(model_of, images):
    model = model_of(scales=4)
    batch = images(8)
    outputs = list(model.iterate_scales(batch))
    for outer, inner in zip(outputs, outputs[1:], strict=False):
        assert (inner.boxes[:, :2] >= outer.boxes[:, :2] - 1e-3).all()
        assert (inner.boxes[:, 2:] <= outer.boxes[:, 2:] + 1e-3).all()
        pixels = outer.proposal.patch_boxes * 8
        for index, (top, left, bottom, right) in enumerate(pixels.tolist()):
            expected = F.interpolate(
                outer.input[index, None, :, top:bottom, left:right], (24, 32), mode="bilinear"
            )
            torch.testing.assert_close(inner.input[index, None], expected, atol=1e-4, rtol=0)
    assert torch.equal(outputs[0].input, batch)
    assert outputs[-1].strength is None and outputs[-1].proposal is None


@pytest.mark.parametrize("size", [(48, 64), (60, 56), (24, 32), (12, 16)])
def test_high_res_crops_are_cut_where_the_boxes_lie(size, model_of, images):
    model = model_of(scales=2)
    high_res = images(6, size, seed=1)
    batch = F.interpolate(high_res, (24, 32), mode="bilinear")
    outputs = list(model.iterate_scales(batch, high_res))
    factor = torch.tensor([size[0] / 24, size[1] / 32] * 2)
    cut = (outputs[1].boxes * factor).round().long()
    assert torch.allclose(cut.float(), outputs[1].boxes * factor)  # whole pixels for these sizes
    for index, (top, left, bottom, right) in enumerate(cut.tolist()):
        expected = F.interpolate(
            high_res[index, None, :, top:bottom, left:right], (24, 32), mode="bilinear"
        )
        torch.testing.assert_close(outputs[1].input[index, None], expected, atol=1e-4, rtol=0)


def test_regions_below_a_pixel_of_the_high_resolution_are_cut_as_one(model_of, images):
    model, high_res = model_of(), images(1, (48, 64))
    inputs, boxes = images(1), torch.tensor([[0.0, 0.0, 24.0, 32.0]])
    for _ in range(4):
        inputs, boxes = model.crop_region(inputs, high_res, boxes, torch.tensor([[1, 1, 2, 2]]))
        assert inputs.shape == (1, 3, 24, 32) and inputs.isfinite().all()
    assert boxes[0, 2] - boxes[0, 0] < 0.5  # less than a high-resolution pixel


def test_high_resolution_of_the_same_pixels_changes_nothing_at_scale_two(model_of, images):
    model = model_of()
    plain = model.forward_preprocessed(images())
    sharp = model.forward_preprocessed(images(), images())
    assert torch.equal(plain.boxes[1], sharp.boxes[1])
    torch.testing.assert_close(plain.logits[1], sharp.logits[1])


def test_released_boxes_start_a_pixel_early(model_of, images):
    exact, shifted = model_of(), model_of(released=True)
    batch = images(8)
    before, after = list(exact.iterate_scales(batch)), list(shifted.iterate_scales(batch))
    expected = before[1].boxes.clone()
    expected[:, :2] = (expected[:, :2] - 1).clamp(min=0)
    torch.testing.assert_close(after[1].boxes, expected)
    assert not torch.equal(after[1].boxes, before[1].boxes)
    for index, (top, left, bottom, right) in enumerate(expected.long().tolist()):
        crop = batch[index, None, :, top:bottom, left:right]
        crop = F.interpolate(crop, (24, 32), mode="bilinear", align_corners=True)
        torch.testing.assert_close(after[1].input[index, None], crop, atol=1e-4, rtol=0)


def test_results_of_an_image_do_not_depend_on_its_batch(model_of, images):
    model, batch = model_of("dinov3", 3), images(5)
    together = model.forward_preprocessed(batch, F.interpolate(batch, (48, 64)))
    for index in range(5):
        one = batch[index, None]
        alone = model.forward_preprocessed(one, F.interpolate(one, (48, 64)))
        for scale in range(3):
            torch.testing.assert_close(alone.boxes[scale][0], together.boxes[scale][index])
            torch.testing.assert_close(
                alone.logits[scale][0], together.logits[scale][index], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_an_image_that_is_not_finite_is_not_cropped(strength, poison, model_of, images):
    model, batch = model_of(scales=3, strength=strength), images(3)
    clean = model.forward_preprocessed(batch)
    batch[1, 0, 5, 5] = poison
    output = model.forward_preprocessed(batch)
    for scale in range(3):
        assert output.boxes[scale][1].tolist() == [0, 0, 24, 32]
        others = [0, 2]
        assert torch.equal(output.boxes[scale][others], clean.boxes[scale][others])
        torch.testing.assert_close(output.logits[scale][others], clean.logits[scale][others])


def test_constant_images_give_finite_logits(model_of):
    output = model_of(scales=3)(torch.zeros(2, 3, 24, 32))
    assert all(logits.isfinite().all() for logits in output.logits)


@pytest.mark.parametrize("upsampling", [1, 4])
def test_upsampled_strength_gives_finer_boxes(upsampling, model_of, images):
    model = model_of(strength="token_contrast", upsampling=upsampling)
    output = model.forward_preprocessed(images(8))
    in_patches = output.boxes[1] / 8
    torch.testing.assert_close(in_patches, output.proposals[0].patch_boxes.float())
    assert torch.equal(upsampling * in_patches, (upsampling * in_patches).round())
    assert (in_patches % 1 != 0).any() == (upsampling > 1)


FAMILIES = ["test_vit", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


@pytest.mark.slow
@pytest.mark.parametrize("class_token", ["shared", "per_scale"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("patches", [(4, 6, 8), (8, 6, 2)])
def test_every_scale_has_its_own_size(patches, name, class_token, images, monkeypatch):
    """Each scale equals a timm model that was built for its size, here of three blocks."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=3))
    patch = 14 if "patch14" in name else 16
    first, *others = (patch * count for count in patches)
    sizes = {"image_size": first, "region_size": tuple(others), "highres_size": 2 * first}
    choice = {"class_token": class_token, "backbone": name, "scales": 3}
    model = build_model(tiny(**sizes, **choice), CLASSES).eval()
    with torch.no_grad():
        for parameter in (*model.classifier.parameters(), model.backbone.cls_token):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        outputs = list(model.forward_scales(images(2, (2 * first, 2 * first)).sigmoid()))
    largest = max(patches)
    for scale, (count, output) in enumerate(zip(patches, outputs, strict=True)):
        assert output.input.shape == (2, 3, patch * count, patch * count)
        assert scale == 2 or output.strength.shape == (2, count, count)
        alone = timm.create_model(name, img_size=patch * count, num_classes=0, global_pool="token")
        tokens = model.backbone.cls_token.shape[1]
        state = dict(model.backbone.state_dict())
        state["cls_token"] = state["cls_token"][:, min(scale, tokens - 1), None]
        if "pos_embed" in state:
            prefix = state["pos_embed"].shape[1] - largest**2
            grids = [count, count], [largest, largest]
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], *grids, prefix)
            state["pos_embed"] = state["pos_embed"][:, max(0, prefix - 1) :]
        alone.load_state_dict(state)
        if class_token == "per_scale":  # the other scales' tokens are in the sequence, too
            extend_class_tokens(alone, 3)
            alone.cls_token.data.copy_(model.backbone.cls_token)
        features = alone.eval().forward_features(output.input)[:, min(scale, tokens - 1)]
        expected = model.classifier(features)
        torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)


def test_regions_of_another_size_lie_in_pixels_of_scale_one(images):
    model = build_model(tiny(region_size=(48, 64), highres_size=96, scales=3, margin=0.1), 3)
    high_res = images(2, (96, 96)).sigmoid()
    outputs = list(model.eval().forward_scales(high_res))
    box, inner = outputs[1].boxes, outputs[1].proposal.patch_boxes / 3  # 3 x 3 patches at scale 2
    extent = box[:, 2:] - box[:, :2]
    expected = box[:, :2].repeat(1, 2) + inner * extent.repeat(1, 2)
    torch.testing.assert_close(outputs[2].boxes, expected)
    for boxes, output in ((box, outputs[1]), (expected, outputs[2])):
        for number, (top, left, bottom, right) in enumerate((3 * boxes).round().int().tolist()):
            crop = model.preprocess(high_res)[1][number, None, :, top:bottom, left:right]
            resized = F.interpolate(crop, output.input.shape[-2:], mode="bilinear")
            torch.testing.assert_close(output.input[number, None], resized)


def test_backbones_of_one_size_are_refused_for_several():
    message = refused(build_model, tiny(backbone="vit_relpos_small_patch16_224", region_size=64), 3)
    assert "vit_relpos_small_patch16_224" in message and "region_size" in message
    message = refused(build_model, tiny(region_size=40), 3)
    assert "40 x 40" in message and "use 32 x 32" in message


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_every_proposal_runs(proposal, model_of, images):
    output = model_of(scales=3, proposal=proposal)(images())
    assert all(logits.shape == (2, CLASSES) for logits in output.logits)
    if proposal == "whole":
        assert all(torch.equal(boxes, output.boxes[0]) for boxes in output.boxes)


# --- laziness and gradients --------------------------------------------------------------------


def count_forwards(model):
    """A list that grows by one with each pass through the encoder."""
    passes = []
    model.backbone.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_a_scale_runs_only_when_it_is_asked_for(model_of, images):
    model = model_of(scales=3)
    passes = count_forwards(model)
    outputs = model.iterate_scales(images())
    assert len(passes) == 0
    for asked in (1, 2, 3):
        next(outputs)
        assert len(passes) == asked
    assert next(outputs, None) is None and len(passes) == 3


@pytest.mark.parametrize("from_high_res", [False, True])
def test_a_sent_mask_continues_with_these_images_alone(from_high_res, model_of, images):
    model, high_res = model_of(scales=3), images(4, (72, 96), seed=2) if from_high_res else None
    expected = list(model.iterate_scales(images(4), high_res))
    outputs = model.iterate_scales(images(4), high_res)
    next(outputs)
    first, second = torch.tensor([True, False, True, True]), torch.tensor([False, True, True])
    for kept, rows, whole in ((first, [0, 2, 3], expected[1]), (second, [2, 3], expected[2])):
        output = outputs.send(kept)
        assert torch.equal(output.boxes, whole.boxes[rows])
        torch.testing.assert_close(output.input, whole.input[rows])
        torch.testing.assert_close(output.logits, whole.logits[rows])


@pytest.mark.parametrize("from_high_res", [False, True])
def test_scale_by_scale_gradients_equal_the_joint_ones(from_high_res, model_of, images):
    labels = torch.tensor([1, 4, 0])
    high_res = images(3, (72, 96), seed=2) if from_high_res else None
    gradients = []
    for joint in (True, False):
        model = model_of("dinov2_registers", 3).train()
        if joint:
            output = model.forward_preprocessed(images(3), high_res)
            losses = [F.cross_entropy(logits, labels) for logits in output.logits]
            expected = [
                reference.cross_entropy(logits.detach(), labels) for logits in output.logits
            ]
            assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)
            sum(losses).backward()
        else:
            for output in model.iterate_scales(images(3), high_res):
                F.cross_entropy(output.logits, labels).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_no_gradient_flows_through_a_crop(model_of, images):
    model, batch = model_of(scales=3), images().requires_grad_()
    outputs = list(model.iterate_scales(batch))
    assert torch.autograd.grad(outputs[0].logits.sum(), batch, retain_graph=True)[0].abs().max() > 0
    for output in outputs[1:]:
        assert not output.input.requires_grad and not output.boxes.requires_grad
        assert torch.autograd.grad(output.logits.sum(), batch, allow_unused=True)[0] is None
    assert not outputs[0].strength.requires_grad


def test_proposing_regions_changes_no_gradient_of_scale_one(model_of, images):
    gradients = []
    for scales in (2, 1):
        model = model_of("siglip", scales, per_scale_token=False, strength="rollout_mean")
        next(model.iterate_scales(images())).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


MASKS = [torch.tensor(mask) for mask in product([False, True], repeat=3)]


@pytest.mark.parametrize("first", MASKS, ids=lambda mask: str(mask.int().tolist()))
@pytest.mark.parametrize("proposal", ["random", "attention", "two"])
def test_any_mask_at_any_scale_gives_the_same_as_all_images(proposal, first, model_of, images):
    model = model_of(scales=3, proposal=two_regions if proposal == "two" else proposal)
    with seed_random_proposals([5, 3, 8]):
        expected = list(model.iterate_scales(images(3)))
    for second in MASKS if proposal == "random" else MASKS[::3]:
        with seed_random_proposals([5, 3, 8]):
            outputs = model.iterate_scales(images(3))
            next(outputs)
            check_rows(outputs.send(first), expected[1], first)
            check_rows(outputs.send(second[first]), expected[2], first & second)
            assert next(outputs, None) is None


def check_rows(found, whole, kept):
    """An output holds those images of another that a mask keeps."""
    rows = kept.repeat_interleave(len(whole.input) // len(kept))
    assert torch.equal(found.boxes, whole.boxes[rows])
    torch.testing.assert_close(found.input, whole.input[rows])
    torch.testing.assert_close(found.logits, whole.logits[kept], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.feature, whole.feature[kept], atol=1e-4, rtol=1e-4)


# --- several regions ---------------------------------------------------------------------------


def two_regions(strength, threshold, recorded):
    """A proposal of two regions: the DPPM's, and one at a place that depends on the image."""
    first = attention_proposal(strength, threshold).patch_boxes
    top = (recorded.image.mean(dim=(1, 2, 3)) > 0).long()
    return torch.stack([first, torch.stack([top, top, top + 2, top + 3], dim=1)], dim=1)


@pytest.mark.parametrize("from_high_res", [False, True])
def test_of_several_regions_each_is_run_and_logits_are_means(from_high_res, model_of, images):
    model = model_of("dinov2_registers", 3, proposal=two_regions)
    high_res = images(4, (72, 96), seed=2) if from_high_res else None
    outputs = list(model.iterate_scales(images(4), high_res))
    assert [len(output.input) for output in outputs] == [4, 8, 16]
    assert [len(output.boxes) for output in outputs] == [4, 8, 16]
    assert [output.logits.shape for output in outputs] == [(4, CLASSES)] * 3
    assert outputs[1].strength.shape == (8, 3, 4) and outputs[1].proposal.patch_boxes.shape[1] == 2
    for image in range(4):
        own = None if high_res is None else high_res[image, None]
        boxes, inputs = outputs[0].boxes[image, None], images(4)[image, None]
        places, crops = [boxes], [inputs]
        for scale in (1, 2):  # each region of each region, one at a time
            found = []
            for box, crop in zip(places, crops, strict=True):
                recorded = model.run_scale(crop, scale - 1, None, True)[2]
                regions = model.propose(recorded, model.settings, scale - 1)[1].patch_boxes
                found += [model.crop_region(crop, own, box, region[None]) for region in regions[0]]
            crops, places = zip(*found, strict=True)
            rows = slice(image * len(crops), (image + 1) * len(crops))
            torch.testing.assert_close(outputs[scale].boxes[rows], torch.cat(places))
            torch.testing.assert_close(outputs[scale].input[rows], torch.cat(crops))
            logits, features, _ = zip(
                *(model.run_scale(crop, scale) for crop in crops), strict=True
            )
            for one, each in ((outputs[scale].logits, logits), (outputs[scale].feature, features)):
                mean = torch.cat(each).mean(dim=0)
                torch.testing.assert_close(one[image], mean, atol=1e-4, rtol=1e-4)
    assert len(outputs[1].boxes.unique(dim=0)) > 4


def test_gradients_of_several_regions_are_those_of_their_mean(model_of, images):
    labels, gradients = torch.tensor([1, 4, 0]), []
    for together in (True, False):
        model = model_of(scales=3, proposal=two_regions).train()
        for scale, output in enumerate(model.iterate_scales(images(3))):
            logits = output.logits
            if not together:
                each = [model.run_scale(crop[None], scale)[0] for crop in output.input]
                logits = torch.cat(each).unflatten(0, (3, -1)).mean(dim=1)
            F.cross_entropy(logits, labels).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_one_region_in_a_list_is_one_region(model_of, images):
    plain = model_of(scales=3)
    in_a_list = reads(blocks=0)(lambda *given: attention_proposal(*given).patch_boxes[:, None])
    listed = model_of(scales=3, proposal=in_a_list)
    outputs = (model.forward_preprocessed(images(3)) for model in (plain, listed))
    for one, other in zip(*(output.logits + output.boxes for output in outputs), strict=True):
        assert torch.equal(one, other)


# --- pre-processing ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 32), (48, 64), (72, 40), (17, 29)])
def test_pixels_are_normalized_and_shrunk(size, model_of):
    model = model_of()
    pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    before = pixels.clone()
    inputs, high_res = model.preprocess(pixels)
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATION)
    normalized = (pixels / 255 - mean) / std
    expected = F.interpolate(normalized, (24, 32), mode="bilinear", antialias=True)
    assert torch.equal(inputs, normalized if size == (24, 32) else expected)
    assert high_res is None if size == (24, 32) else torch.equal(high_res, normalized)
    for one, other in zip(model.preprocess(pixels / 255), (inputs, high_res), strict=True):
        assert one is other is None or torch.equal(one, other), "float in [0, 1] is the same"
    assert torch.equal(pixels, before)
    floats = pixels / 255
    model.preprocess(floats)
    assert torch.equal(floats, pixels / 255), "a caller's tensor is left alone"
    assert torch.equal(model.denormalize(normalized), pixels)


def test_forward_takes_pixels(model_of):
    model, pixels = model_of(scales=3), torch.rand(2, 3, 72, 96)
    expected = model.forward_preprocessed(*model.preprocess(pixels))
    output, outputs = model(pixels), list(model.forward_scales(pixels))
    for scale in range(3):
        assert torch.equal(output.logits[scale], expected.logits[scale])
        assert torch.equal(outputs[scale].logits, expected.logits[scale])
        assert torch.equal(outputs[scale].boxes, expected.boxes[scale])


# --- what a scale leaves to functions of one's own ---------------------------------------------


def test_recorded_tokens_are_timms_patch_tokens(family, backbone_of, images):
    backbone = backbone_of(family)
    model = RAMSTrans(backbone, CLASSES, ProposalSettings(scales=1)).eval()
    logits, feature, recorded = model.run_scale(images(), 0, blocks=None, tokens=True)
    expected = backbone.forward_features(images())[:, -12:].reshape(2, 3, 4, 32)
    assert torch.equal(recorded.tokens, expected) and not recorded.tokens.requires_grad
    assert torch.equal(recorded.image, images()) and recorded.grid == (3, 4)
    assert len(recorded.blocks) == 3
    plain = model.run_scale(images(), 0)
    assert plain[2].tokens is None and not plain[2].blocks
    torch.testing.assert_close((logits, feature), plain[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "strength_reads, proposal_reads, blocks, tokens",
    [
        ({"blocks": 2}, {"blocks": 0}, 2, False),
        ({"blocks": 1}, {"blocks": 2}, 2, False),
        ({"blocks": 0, "tokens": True}, {"blocks": 0}, 0, True),
        ({"blocks": 1}, {"blocks": 0, "tokens": True}, 1, True),
        ({"blocks": None}, {"blocks": 0}, 3, False),
        (None, {"blocks": 0}, 3, True),
        ({"blocks": 1}, None, 3, True),
    ],
)
def test_reads_limits_what_is_recorded(
    strength_reads, proposal_reads, blocks, tokens, model_of, images
):
    seen = []

    def strength(recorded):
        seen.append(recorded)
        return recorded.image.mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(-1, -2))

    def proposal(strength, threshold, recorded):
        seen.append(recorded)
        return attention_proposal(strength, threshold)

    strength = reads(**strength_reads)(strength) if strength_reads else strength
    proposal = reads(**proposal_reads)(proposal) if proposal_reads else proposal
    model = model_of(strength=strength, proposal=proposal)
    output = model.forward_preprocessed(images())
    assert len(seen) == 2 and seen[0] is seen[1]
    assert len(seen[0].blocks) == blocks and (seen[0].tokens is not None) == tokens
    expected = F.avg_pool2d(images().mean(dim=1), 8)
    torch.testing.assert_close(output.strengths[0], expected)


def test_callables_without_a_name_can_be_strengths_and_proposals(model_of, images):
    class Strength:
        def __call__(self, recorded):
            return recorded.tokens.norm(dim=-1)

    def shrunk(by, strength, threshold, recorded):
        return attention_proposal(strength, threshold * by)

    model = model_of(strength=Strength(), proposal=partial(shrunk, 0.9))
    output = model.forward_preprocessed(images())
    expected = attention_proposal(output.strengths[0], 0.9 * model.settings.threshold(0))
    assert torch.equal(output.proposals[0].patch_boxes, expected.patch_boxes)
    message = refused(model_of(strength=partial(lambda recorded: 1)).forward_preprocessed, images())
    assert "gives int" in message


IDEAS = """
import torch

def norms(recorded):
    return recorded.tokens.norm(dim=-1)

def corner(strength, threshold, recorded):
    return torch.tensor([[0, 0, 1, 2]]).expand(len(strength), 4)

def flat(recorded):
    return recorded.tokens

def outside(strength, threshold, recorded):
    return torch.tensor([[0, 0, 3, 9]]).expand(len(strength), 4)

def empty(strength, threshold, recorded):
    return torch.tensor([[1, 1, 1, 2]]).expand(len(strength), 4)

def nothing(strength, threshold, recorded):
    return None

def model(config, num_classes):
    return torch.nn.Linear(3, num_classes)
"""


@pytest.fixture
def ideas(tmp_path, monkeypatch):
    """The current folder holds a file of one's own."""
    (tmp_path / "ideas.py").write_text(IDEAS)
    monkeypatch.chdir(tmp_path)


def test_ideas_in_a_file_reach_the_model_by_its_configuration(ideas):
    config = tiny(strength="ideas.py:norms", proposal="ideas.py:corner", image_size=64)
    model = build_model(config, 3)
    output = model(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(output.boxes[1], torch.tensor([[0.0, 0, 16, 32]] * 2))
    recorded = model.run_scale(model.preprocess(torch.rand(2, 3, 64, 64))[0], 0, tokens=True)[2]
    assert model.propose(recorded, model.settings, 0)[0].equal(recorded.tokens.norm(dim=-1))


@pytest.mark.parametrize(
    "setting, name, words",
    [
        ("strength", "flat", ["(2, 4, 4, 64)", "(B, h, w) = (2, 4, 4)"]),
        ("proposal", "outside", ["leaves the grid of 4 x 4"]),
        ("proposal", "empty", ["empty"]),
        ("proposal", "nothing", ["NoneType", "(B, 4) or (B, R, 4)"]),
    ],
)
def test_an_idea_that_gives_something_else_is_refused_by_name(setting, name, words, ideas):
    model = build_model(tiny(image_size=64, **{setting: f"ideas.py:{name}"}), 3)
    message = refused(model, torch.rand(2, 3, 64, 64))
    assert all(word in message for word in [f"{setting} {name!r}", *words])


def test_a_model_of_ones_own_must_be_one(ideas):
    message = refused(build_model, tiny(model="ideas.py:model"), 3)
    assert "'ideas.py:model' gives a Linear" in message and "ImageClassifier" in message


@pytest.mark.slow
def test_a_model_with_ideas_of_ones_own_can_be_exported(model_of):
    def norms(recorded):
        return recorded.tokens.norm(dim=-1)

    def halves(strength, threshold, recorded):
        halves = torch.tensor([[0, 0, 3, 2], [0, 2, 3, 4]])
        return halves.expand(strength.shape[0], 2, 4)

    model = model_of(scales=3, strength=norms, proposal=halves)
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1, max=64)}}
    pixels = torch.randint(0, 256, (5, 3, 48, 64), dtype=torch.uint8)
    program = torch.export.export(model, (pixels[:2],), dynamic_shapes=shapes).module()
    for batch in (1, 5):
        with torch.no_grad():
            found, expected = program(pixels[:batch]), model(pixels[:batch])
        assert [len(boxes) for boxes in found.boxes] == [batch, 2 * batch, 4 * batch]
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.boxes, expected.boxes)


# --- precision and devices ---------------------------------------------------------------------


def test_autocast_gives_half_logits_and_float32_geometry(model_of, images):
    model = model_of("dinov3", 3)
    exact = model.forward_preprocessed(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.forward_preprocessed(images())
    assert output.logits[0].dtype == torch.bfloat16
    torch.testing.assert_close(output.logits[0].float(), exact.logits[0], atol=0.3, rtol=0.05)
    for strength, expected in zip(output.strengths[:1], exact.strengths, strict=False):
        assert strength.dtype == torch.float32
        torch.testing.assert_close(strength, expected, atol=0.02, rtol=0.1)
    assert all(boxes.dtype == torch.float32 for boxes in output.boxes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_precision(dtype, model_of, images):
    model = model_of(scales=3).to(dtype)
    for output in (
        model.forward_preprocessed(images().to(dtype), images(2, (72, 96)).to(dtype)),
        model(torch.randint(0, 256, (2, 3, 72, 96), dtype=torch.uint8)),
        model(torch.rand(2, 3, 72, 96)),
    ):
        assert all(logits.dtype == dtype and logits.isfinite().all() for logits in output.logits)
        assert all(boxes.dtype == torch.float32 for boxes in output.boxes)


def test_inference_mode(model_of, images):
    model = model_of(scales=3)
    expected = model.forward_preprocessed(images())
    with torch.inference_mode():
        output = model.forward_preprocessed(images())
    assert all(torch.equal(a, b) for a, b in zip(output.logits, expected.logits, strict=True))


EACH = list(zip(cycle(STRENGTHS), PROPOSALS, strict=False))


@pytest.mark.parametrize(
    "strength, proposal",
    [EACH[0], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in EACH[1:])],
)
def test_everything_but_boxes_and_masks_is_on_the_models_device(
    strength, proposal, model_of, images, monkeypatch
):
    model = model_of("dinov3", 3, strength=strength, proposal=proposal, released=True)
    # what needs values, which fake tensors have not
    monkeypatch.setattr(FakeTensor, "numpy", lambda mask: np.zeros(mask.shape, dtype=bool))
    monkeypatch.setattr(FakeTensor, "tolist", lambda boxes: [[0, 8, 16, 24]] * len(boxes))
    with FakeTensorMode(allow_non_fake_inputs=True):  # needs no such device, checks each operation
        model.to_empty(device="cuda")
        batch = torch.empty(2, 3, 24, 32, device="cuda")
        pixels = torch.empty(2, 3, 72, 96, device="cuda", dtype=torch.uint8)
        for output in (model(pixels), model.forward_preprocessed(batch)):
            tensors = [*output.logits, *output.strengths]
            assert {tensor.device.type for tensor in tensors} == {"cuda"}
            places = [*output.boxes, *output.proposals[0], *output.proposals[1]]
            assert {tensor.device.type for tensor in places} == {"cpu"}


# --- building and refusing ---------------------------------------------------------------------


def test_a_configuration_reaches_the_model():
    config = tiny(
        image_size=(48, 32),
        scales=3,
        threshold=(1.1, 1.3),
        strength="rollout_mean",
        proposal="center",
        class_token="per_scale",
        legacy_boxes=True,
        align_corners=True,
        drop_path=0.2,
    )
    model = build_model(config, 7)
    assert "random" in model.origin and model.backbone.cls_token.shape == (1, 3, 64)
    assert (model.image_size, model.grid, model.num_scales) == ((48, 32), (3, 2), 3)
    assert model.settings == ProposalSettings((1.1, 1.3), "rollout_mean", "center", 3)
    assert model.legacy_boxes and model.align_corners and model.per_scale_token
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    output = model(torch.rand(2, 3, 48, 32))
    assert [logits.shape for logits in output.logits] == [(2, 7)] * 3
    assert all((logits == 0).all() for logits in output.logits)  # the classifier starts at zero


@pytest.mark.parametrize("scales, shared, tokens", [(1, False, 1), (2, True, 1), (2, False, 2)])
def test_class_tokens_follow_the_configuration(scales, shared, tokens):
    class_token = "shared" if shared else "per_scale"
    model = build_model(tiny(scales=scales, class_token=class_token), 3)
    assert model.backbone.cls_token.shape[1] == tokens
    assert len(model(torch.rand(1, 3, 32, 32)).logits) == scales


def mean_std(model):
    """What a model normalizes with: (3,) each."""
    return tuple(tuple(values.flatten().tolist()) for values in (model.mean, model.std))


def test_normalization_follows_the_configuration():
    backbone = build_model(tiny(normalization="backbone"), 3)
    assert mean_std(backbone) == ((0.5,) * 3, (0.5,) * 3)
    imagenet = build_model(tiny(normalization="imagenet"), 3)
    for found, expected in zip(mean_std(imagenet), NORMALIZATION, strict=True):
        assert found == pytest.approx(expected)
    assert not {"mean", "std"} & set(imagenet.state_dict()), "a checkpoint holds weights alone"


def test_state_survives_saving(model_of, images):
    def logits(model):
        return model.forward_preprocessed(images()).logits[1]

    model, other = model_of(scales=2), model_of(scales=2, seed=1)
    assert not torch.equal(logits(model), logits(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_images_of_another_size_are_refused():
    model = build_model(tiny(), 3)  # test_vit itself would take any size
    message = refused(model.forward_preprocessed, torch.randn(1, 3, 32, 48))
    assert "images are 32 x 48 pixels" in message and "takes 32 x 32" in message


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scales": 0, "thresholds": ()}, ["at least one scale", "0"]),
        ({"scales": 3, "thresholds": (1.0,)}, ["3 scales need 2 thresholds", "(1.0,)"]),
        ({"thresholds": (float("nan"),)}, ["2 scales need 1 thresholds", "(nan,)"]),
        ({"strength": "mean"}, ["unknown strength 'mean'", "rollout_mean", "file.py:name"]),
        ({"proposal": "middle"}, ["unknown proposal 'middle'", "attention", "file.py:name"]),
        ({}, ["2 scales need as many class tokens", "VisionTransformer has 1"]),
    ],
)
def test_settings_that_make_no_model(options, words, backbone_of):
    message = refused(RAMSTrans, backbone_of("vit"), CLASSES, ProposalSettings(**options))
    assert all(word in message for word in words)


def test_backbones_without_class_token_are_refused_where_one_is_read(backbone_of):
    given = backbone_of("registers_average"), CLASSES
    for name in set(STRENGTHS) - {"rollout_mean", "token_pca"}:
        settings = ProposalSettings(strength=name)
        message = refused(RAMSTrans, *given, settings, per_scale_token=False)
        assert "no class token" in message and f"{name!r}; use 'rollout_mean'" in message
    message = refused(RAMSTrans, *given, ProposalSettings(strength="rollout_mean"))
    assert "2 scales need as many class tokens, VisionTransformer has 0" in message
