"""RAMS-Trans: one Vision Transformer that looks at the image, then at the region it chose.

Scale 1 sees the whole image. Its attention strength goes through the DPPM, the proposed region is
cut out and resized to the input size, and scale 2 sees that with the same encoder and classifier
but its own class token; recursively for any number of scales (RAMS-Trans, section 3, figure 2).

No gradient flows through a crop, so the scales are independent given their views.
`RAMSTrans.scales` hands them out one at a time: a training step can back-propagate and free one
before the next runs, and inference can stop early. `RAMSTrans.forward` simply collects them.

``MODELS`` is the registry of models. RAMS-Trans with one scale is the plain Vision Transformer.
"""

from collections.abc import Callable, Generator, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ramslib.attention import record_attention
from ramslib.backbone import count_class_tokens, create_backbone, encode
from ramslib.classifier import ImageClassifier, ScaleOutput
from ramslib.config import Config
from ramslib.dppm import PROPOSALS, propose
from ramslib.errors import InputError
from ramslib.regions import crop_and_resize, full_image_boxes, rescale_boxes
from ramslib.strength import LAST_BLOCKS, STRENGTHS, attention_strength
from ramslib.transfg import TransFG

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class RAMSTrans(ImageClassifier):
    """Recurrent attention multi-scale transformer over any timm Vision Transformer.

    Args:
        backbone: from `create_backbone`, with one class token per scale, or a single one that all
            scales share. Input size and patch grid are read from it.
        num_classes: K.
        scales: S >= 1; 1 is a plain Vision Transformer.
        thresholds: the paper's eta for each of the S - 1 proposals.
        strength: a key of ``STRENGTHS``.
        proposal: a key of ``PROPOSALS``.
        per_scale_token: scale s reads class token s; otherwise all read the first.
        legacy_boxes: shift each box by one pixel up and left and include its lower ends, as the
            released code does.
        align_corners: resize crops with coinciding corner pixels, as the released code does.
        mean_std: (mean, std) per channel that inputs are normalized with; the backbone's own by
            default. Kept for those who prepare inputs, see `transforms.prepare`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        scales: int = 2,
        thresholds: Sequence[float] = (1.0,),
        strength: str = "last_class",
        proposal: str = "attention",
        per_scale_token: bool = True,
        legacy_boxes: bool = False,
        align_corners: bool = False,
        mean_std: tuple | None = None,
    ):
        _check_options(backbone, scales, thresholds, strength, proposal)
        if per_scale_token and scales > 1 and count_class_tokens(backbone) != scales:
            raise InputError(
                f"{scales} scales need as many class tokens, {type(backbone).__name__} has "
                f"{count_class_tokens(backbone)}; extend_class_tokens it, or share one token"
            )
        super().__init__(backbone, num_classes, mean_std)
        self.num_scales = scales
        self.thresholds = tuple(thresholds)
        self.strength = strength
        self.proposal = proposal
        self.per_scale_token = per_scale_token and scales > 1
        self.legacy_boxes = legacy_boxes
        self.align_corners = align_corners

    def scales(
        self, images: Tensor, source: Tensor | None = None
    ) -> Generator[ScaleOutput, Tensor | None, None]:
        """Look at the image, propose, cut out, and look there; see `ImageClassifier.scales`.

        Who sends a mask (B,) bool of the images just looked at, instead of calling ``next``, goes
        on with those images alone.
        """
        self.check_size(images)
        view, boxes = images, full_image_boxes(images)
        for scale in range(self.num_scales):
            logits, strength = self.look(view, scale)
            proposal = None
            if strength is not None:
                proposal = propose(strength, self.thresholds[scale], self.proposal)
            kept = yield ScaleOutput(logits, view, boxes, strength, proposal)
            if proposal is not None:
                patch_boxes = proposal.patch_boxes
                if kept is not None:
                    view, boxes, patch_boxes = view[kept], boxes[kept], patch_boxes[kept]
                    source = None if source is None else source[kept]
                view, boxes = self.crop_region(view, source, boxes, patch_boxes)

    def look(self, view: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Encode and classify one view.

        Args:
            view: (B, 3, H, W) normalized.
            scale: 0 for scale 1; chooses the class token.

        Returns:
            Logits (B, K), and the attention strength (B, h, w), or None at the last scale, which
            proposes nothing and so records nothing.
        """
        token = scale if self.per_scale_token else 0
        if scale == self.num_scales - 1:
            return self.classifier(encode(self.backbone, view, token)), None
        with record_attention(self.backbone, LAST_BLOCKS.get(self.strength)) as blocks:
            feature = encode(self.backbone, view, token)
        strength = attention_strength(blocks, self.strength, self.grid, token)
        return self.classifier(feature), strength

    @torch.no_grad()
    def crop_region(
        self, view: Tensor, source: Tensor | None, boxes: Tensor, patch_boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Region amplification: the next scale's view (no gradient) and where it lies.

        Args:
            view: (B, 3, H, W) what this scale saw.
            source: (B, 3, Hs, Ws) or None, see `forward`.
            boxes: (B, 4) where that view lies, in input pixels.
            patch_boxes: (B, 4) the proposed region, in patches of that view.

        Returns:
            The next view (B, 3, H, W) and its boxes (B, 4) in input pixels.
        """
        inside = rescale_boxes(patch_boxes, self.grid, full_image_boxes(view))
        if self.legacy_boxes:
            inside = torch.cat([(inside[:, :2] - 1).clamp(min=0), inside[:, 2:]], dim=1)
        regions = rescale_boxes(inside, self.image_size, boxes)
        if source is not None:
            view, inside = source, rescale_boxes(regions, self.image_size, full_image_boxes(source))
        return crop_and_resize(view, inside, self.image_size, self.align_corners), regions


def _check_options(
    backbone: nn.Module, scales: int, thresholds: Sequence[float], strength: str, proposal: str
) -> None:
    if scales < 1:
        raise InputError(f"a model needs at least one scale, not {scales}")
    if len(thresholds) != scales - 1 or any(eta != eta for eta in thresholds):
        wanted = f"{scales} scales need {scales - 1} numbers as thresholds"
        raise InputError(f"{wanted}, not {tuple(thresholds)}")
    for name, known in ((strength, STRENGTHS), (proposal, PROPOSALS)):
        if name not in known:
            raise InputError(f"unknown name {name!r}; choose one of {', '.join(known)}")
    if scales > 1 and strength.endswith("_class") and not count_class_tokens(backbone):
        raise InputError(
            f"{type(backbone).__name__} has no class token for strength {strength!r}; "
            "use 'rollout_mean'"
        )


def _build_rams(config: Config, num_classes: int) -> tuple[RAMSTrans, str]:
    per_scale = config.class_token == "per_scale"
    backbone, origin = _build_backbone(config, class_tokens=config.scales if per_scale else 1)
    backbone.set_grad_checkpointing(config.grad_checkpointing)
    model = RAMSTrans(
        backbone,
        num_classes,
        scales=config.scales,
        thresholds=config.thresholds(),
        strength=config.strength,
        proposal=config.proposal,
        per_scale_token=per_scale,
        legacy_boxes=config.legacy_boxes,
        align_corners=config.align_corners,
        mean_std=_mean_std(config),
    )
    return model, origin


def _build_transfg(config: Config, num_classes: int) -> tuple[TransFG, str]:
    if config.grad_checkpointing:  # a block computed again would get other tokens
        raise InputError(
            "model transfg exchanges tokens between blocks; use grad_checkpointing=False"
        )
    backbone, origin = _build_backbone(config)
    options = config.contrastive_weight, config.contrastive_margin, _mean_std(config)
    return TransFG(backbone, num_classes, *options), origin


def _build_backbone(config: Config, class_tokens: int = 1) -> tuple[nn.Module, str]:
    return create_backbone(
        config.backbone,
        config.image_size,
        class_tokens=class_tokens,
        patch_stride=config.patch_stride,
        pretrained=config.pretrained,
        drop_path=config.drop_path,
        dropout=config.dropout,
        pos_embed_resize=config.pos_embed_resize,
        final_norm=config.final_norm,
    )


def _mean_std(config: Config) -> tuple | None:
    return IMAGENET if config.normalization == "imagenet" else None


MODELS: dict[str, Callable[[Config, int], tuple[ImageClassifier, str]]] = {
    "rams": _build_rams,
    "transfg": _build_transfg,
}


def build_model(config: Config, num_classes: int) -> tuple[ImageClassifier, str]:
    """The model that a configuration describes.

    Returns:
        The model, and one sentence about where its weights come from.

    Raises:
        InputError: a configuration that no model fits.
    """
    return MODELS[config.model](config, num_classes)
