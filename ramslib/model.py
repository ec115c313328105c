"""RAMS-Trans: one Vision Transformer for the image, then for the region that it proposes.

Scale 1 sees the whole image. Its attention strength goes through the DPPM, the proposed region is
cropped and resized to the input size, and scale 2 sees that with the same encoder and classifier
but its own class token; recursively for any number of scales (RAMS-Trans, section 3, figure 2).

No gradient flows through a crop, so the scales are independent given their inputs.
`RAMSTrans.iterate_scales` yields them one at a time: a training step can back-propagate and free
one before the next runs, and inference can stop early.

``MODELS`` is the registry of models. RAMS-Trans with one scale is the plain Vision Transformer.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ramslib.acceleration import last_block_for_one_token
from ramslib.attention import (
    CLASS_STRENGTHS,
    STRENGTHS,
    RecordedScale,
    attention_strength,
    record_attention,
)
from ramslib.backbone import count_class_tokens, create_backbone, image_size, patch_grid
from ramslib.boxes import crop_and_resize, full_image_boxes, rescale_boxes
from ramslib.classifier import ImageClassifier, ScaleOutput, Scales
from ramslib.config import Config
from ramslib.dppm import PROPOSALS, Proposal, keep_random_proposals, propose
from ramslib.errors import InputError
from ramslib.extensions import resolve
from ramslib.transfg import TransFG


@dataclass(frozen=True)
class ProposalSettings:
    """How one scale proposes the region of the next; a model has those it was trained with.

    Attributes:
        thresholds: the paper's eta, one per proposal; the last one also counts for further scales.
        strength: a key of ``STRENGTHS``, ``path/to/file.py:name`` or a function.
        proposal: a key of ``PROPOSALS``, ``path/to/file.py:name`` or a function.
        scales: the number of scales.
        from_high_res: crop from the high-resolution pixels, else from the previous input.
        upsampling: of the strength before threshold and box, see `dppm.propose`.
        margin: around each box, a share of its sides.
        keep_aspect: boxes grow to the shape of the image.
    """

    thresholds: tuple[float, ...] = (1.0,)
    strength: str | Callable = "last_class"
    proposal: str | Callable = "attention"
    scales: int = 2
    from_high_res: bool = True
    upsampling: int = 1
    margin: float = 0.0
    keep_aspect: bool = False

    @cached_property
    def functions(self) -> tuple[Callable, Callable]:
        """Strength and proposal as functions.

        Raises:
            InputError: an unknown name.
        """
        proposal = resolve(self.proposal, PROPOSALS, "proposal")
        return resolve(self.strength, STRENGTHS, "strength"), proposal

    @property
    def reads(self) -> tuple[int | None, bool]:
        """Number of last blocks that both functions read (None: all), and whether tokens."""
        blocks = [getattr(function, "reads_blocks", None) for function in self.functions]
        tokens = [getattr(function, "reads_tokens", True) for function in self.functions]
        return None if None in blocks else max(blocks), any(tokens)

    def threshold(self, scale: int) -> float:
        """Eta for the proposal of a scale, counted from 0."""
        return self.thresholds[min(scale, len(self.thresholds) - 1)]

    def propose(self, strength: Tensor, scale: int, recorded: RecordedScale | None) -> Proposal:
        """`dppm.propose` with these settings, for the strength (B, h, w) of a scale from 0."""
        shape = self.upsampling, self.margin, self.keep_aspect
        return propose(strength, self.threshold(scale), self.proposal, recorded, *shape)


class RAMSTrans(ImageClassifier):
    """Recurrent attention multi-scale transformer over any timm Vision Transformer.

    Args:
        backbone: from `create_backbone`, with one class token per scale, or a single one that all
            scales share.
        num_classes: K.
        settings: number of scales, and how each proposes the next region.
        per_scale_token: scale s reads class token s; otherwise all read the first.
        legacy_boxes: shift each box by one pixel up and left and include its lower ends, as the
            released code does.
        align_corners: resize crops with coinciding corner pixels, as the released code does.
        mean_std: see `ImageClassifier`.
        image_sizes: (H, W) of the input of each scale; the last one also counts for further scales.
            By default all have the backbone's. A backbone for several sizes is built with
            ``further_sizes``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        settings: ProposalSettings = ProposalSettings(),  # noqa: B008 (frozen)
        per_scale_token: bool = True,
        legacy_boxes: bool = False,
        align_corners: bool = False,
        mean_std: tuple | None = None,
        image_sizes: Sequence[tuple[int, int]] = (),
    ):
        _check_settings(backbone, settings, per_scale_token)
        super().__init__(backbone, num_classes, mean_std)
        self.settings = settings
        self.image_sizes = tuple(image_sizes) or (self.image_size,)
        self.image_size = self.image_sizes[0]
        self.grid = self.grid_of(self.image_size)
        self.per_scale_token = per_scale_token and settings.scales > 1
        self.legacy_boxes = legacy_boxes
        self.align_corners = align_corners

    @property
    def num_scales(self) -> int:
        """S, the number of scales."""
        return self.settings.scales

    def input_size(self, scale: int) -> tuple[int, int]:
        """(H, W) of the input of a scale, counted from 0."""
        return self.image_sizes[min(scale, len(self.image_sizes) - 1)]

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """(h, w) patches of an input of (H, W) pixels."""
        whole, grid = image_size(self.backbone), patch_grid(self.backbone)
        return tuple(a * count // b for a, b, count in zip(size, whole, grid, strict=True))

    def iterate_scales(
        self,
        images: Tensor,
        high_res: Tensor | None = None,
        settings: ProposalSettings | None = None,
        run: Callable | None = None,
    ) -> Scales:
        """See `ImageClassifier.iterate_scales`.

        Args:
            images: (B, 3, H, W).
            high_res: (B, 3, Hs, Ws) or None.
            settings: other ones than the model was trained with.
            run: takes the place of `run_scale`, such as a function that keeps what it returned.
        """
        self.check_size(images)
        settings, run = settings or self.settings, run or self.run_scale
        inputs, boxes, regions = images, full_image_boxes(images), 1
        for scale in range(settings.scales):
            is_last = scale == settings.scales - 1
            logits, feature, recorded = run(inputs, scale, *(() if is_last else settings.reads))
            strength, proposal = (
                (None, None) if is_last else self.propose(recorded, settings, scale)
            )
            logits, feature = (x.unflatten(0, (-1, regions)).mean(1) for x in (logits, feature))
            kept = yield ScaleOutput(logits, inputs, boxes, strength, proposal, feature)
            if is_last:
                return
            if kept is not None:
                rows = kept.repeat_interleave(regions)
                images, high_res = images[kept], None if high_res is None else high_res[kept]
                inputs, boxes = inputs[rows], boxes[rows.cpu()]
                proposal = Proposal(*(each[rows.cpu()] for each in proposal))
                keep_random_proposals(kept)
            regions *= proposal.patch_boxes.shape[1:-1].numel()  # 1 for boxes (B, 4)
            source = high_res if settings.from_high_res else None
            given = inputs, source, boxes, proposal.patch_boxes, scale + 1
            inputs, boxes = self.crop_region(*given)

    def run_scale(
        self, inputs: Tensor, scale: int, blocks: int | None = 0, tokens: bool = False
    ) -> tuple[Tensor, Tensor, RecordedScale | None]:
        """Encode and classify the input of one scale.

        Args:
            inputs: (B, 3, H, W) normalized.
            scale: from 0; chooses the class token.
            blocks: number of last blocks whose attention is recorded; None: all.
            tokens: whether patch tokens are recorded.

        Returns:
            Logits (B, K), features (B, D), and what was recorded.
        """
        token = min(scale, self.num_scales - 1) if self.per_scale_token else 0
        accelerated = nullcontext() if tokens else last_block_for_one_token(self.backbone, token)
        record = nullcontext() if blocks == 0 else record_attention(self.backbone, blocks)
        with accelerated, record as recorded:
            features = self.backbone.forward_features(inputs)
        feature = self.backbone.forward_head(features[:, token:], pre_logits=True)
        grid = self.grid_of(inputs.shape[-2:])
        patches = features[:, -math.prod(grid) :].detach().unflatten(1, grid) if tokens else None
        recorded = RecordedScale(recorded or [], grid, token, inputs, patches)
        return self.classifier(feature), feature, recorded

    def propose(
        self, recorded: RecordedScale, settings: ProposalSettings, scale: int
    ) -> tuple[Tensor, Proposal]:
        """Attention strength (B, h, w) and proposal of a recorded scale: no forward pass."""
        strength = attention_strength(recorded, settings.functions[0])
        return strength, settings.propose(strength, scale, recorded)

    @torch.no_grad()
    def crop_region(
        self,
        inputs: Tensor,
        high_res: Tensor | None,
        boxes: Tensor,
        patch_boxes: Tensor,
        scale: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Region amplification: the next scale's input (no gradient) and where it lies.

        Args:
            inputs: (B, 3, H, W) what this scale saw.
            high_res: (B' , 3, Hs, Ws) or None; B is a multiple of B'.
            boxes: (B, 4) where the inputs lie, in pixels of the input of scale 1.
            patch_boxes: (B, 4) or (B, R, 4) the proposed regions, in patches of the inputs.
            scale: the next one, from 0: what size its inputs have.

        Returns:
            The next inputs (B * R, 3, H', W') and their boxes (B * R, 4).
        """
        boxes = boxes.repeat_interleave(patch_boxes.shape[1:-1].numel(), dim=0)
        whole, size = full_image_boxes(inputs[:1]), tuple(inputs.shape[-2:])
        inside = rescale_boxes(patch_boxes.reshape(-1, 4), self.grid_of(size), whole)
        if self.legacy_boxes:
            inside = torch.cat([(inside[:, :2] - 1).clamp(min=0), inside[:, 2:]], dim=1)
        places = rescale_boxes(inside, size, boxes)
        pixels = inputs if high_res is None else high_res
        if high_res is not None:
            inside = rescale_boxes(places, self.image_size, full_image_boxes(high_res[:1]))
        if pixels.shape[0] != inside.shape[0]:
            pixels = pixels.repeat_interleave(inside.shape[0] // pixels.shape[0], dim=0)
        return crop_and_resize(pixels, inside, self.input_size(scale), self.align_corners), places


def _check_settings(backbone: nn.Module, settings: ProposalSettings, per_scale: bool) -> None:
    scales, thresholds = settings.scales, settings.thresholds
    if scales < 1:
        raise InputError(f"a model needs at least one scale, not {scales}")
    if len(thresholds) < scales - 1 or any(eta != eta for eta in thresholds):
        raise InputError(f"{scales} scales need {scales - 1} thresholds, not {tuple(thresholds)}")
    reads_class = settings.functions[0] in CLASS_STRENGTHS  # raises on unknown names
    if scales > 1 and reads_class and not count_class_tokens(backbone):
        raise InputError(
            f"{type(backbone).__name__} has no class token for strength {settings.strength!r}; "
            "use 'rollout_mean'"
        )
    if per_scale and scales > 1 and count_class_tokens(backbone) != scales:
        raise InputError(
            f"{scales} scales need as many class tokens, {type(backbone).__name__} has "
            f"{count_class_tokens(backbone)}; extend_class_tokens it, or share one token"
        )


def build_rams(config: Config, num_classes: int) -> RAMSTrans:
    """RAMS-Trans, or with one scale a plain Vision Transformer, as configured."""
    per_scale = config.class_token == "per_scale"
    backbone = build_backbone(config, class_tokens=config.scales if per_scale else 1)
    backbone.set_grad_checkpointing(config.grad_checkpointing)
    names = "strength", "proposal", "scales", "upsampling", "margin", "keep_aspect"
    chosen = {name: getattr(config, name) for name in names}
    settings = ProposalSettings(config.thresholds(), **chosen)
    return RAMSTrans(
        backbone,
        num_classes,
        settings,
        per_scale_token=per_scale,
        legacy_boxes=config.legacy_boxes,
        align_corners=config.align_corners,
        mean_std=configured_mean_std(config),
        image_sizes=config.input_sizes(),
    )


def build_transfg(config: Config, num_classes: int) -> ImageClassifier:
    """TransFG, as configured."""
    if config.grad_checkpointing:  # a block computed again would get other tokens
        raise InputError(
            "model transfg exchanges tokens between blocks; use grad_checkpointing=False"
        )
    options = config.contrastive_weight, config.contrastive_margin, configured_mean_std(config)
    return TransFG(build_backbone(config), num_classes, *options)


def build_backbone(config: Config, class_tokens: int = 1) -> nn.Module:
    """The backbone that a configuration describes, with its pre-trained weights.

    It is built for the largest input of a scale: positions lose least when they are resampled.
    """
    largest, *others = sorted(config.input_sizes(), key=math.prod, reverse=True)
    names = "patch_stride", "pretrained", "drop_path", "dropout", "pos_embed_resize", "final_norm"
    options = {name: getattr(config, name) for name in names}
    return create_backbone(config.backbone, largest, class_tokens, others, **options)


def configured_mean_std(config: Config) -> tuple | None:
    """(mean, std) of ImageNet where it is configured, None for the backbone's own."""
    imagenet = config.normalization == "imagenet"
    return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if imagenet else None


MODELS: dict[str, Callable[[Config, int], ImageClassifier]] = {
    "rams": build_rams,
    "transfg": build_transfg,
}


def build_model(config: Config, num_classes: int) -> ImageClassifier:
    """The model that a configuration describes; its ``origin`` says where its weights come from.

    Raises:
        InputError: a configuration that no model fits, or a builder that gives something else.
    """
    model = resolve(config.model, MODELS, "model")(config, num_classes)
    if not isinstance(model, ImageClassifier):
        raise InputError(
            f"model {config.model!r} gives a {type(model).__name__}; it must return an "
            "ImageClassifier (docs/extending.md)"
        )
    model.scale_weights = config.loss_weights(model.num_scales)
    return model
