"""What every model of the workbench gives: looks at views, one after the other.

Training, evaluation, checkpoints and prediction ask a model for nothing but `ImageClassifier`. A new
method is a subclass with `ImageClassifier.scales` and, where its loss has another term,
`ImageClassifier.loss`, and an entry in ``model.MODELS``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ramslib.backbone import image_size, normalization, patch_grid
from ramslib.dppm import Proposal
from ramslib.errors import InputError


class ScaleOutput(NamedTuple):
    """One scale's look at its view.

    Attributes:
        logits: (B, K).
        view: (B, 3, H, W) what this scale saw.
        boxes: (B, 4) float32, where that view lies, in pixels of the input image.
        strength: (B, h, w) attention strength, None at the last scale.
        proposal: what the next scale will look at, None at the last scale.
        feature: (B, D) what was classified, where a model's loss needs it.
    """

    logits: Tensor
    view: Tensor
    boxes: Tensor
    strength: Tensor | None
    proposal: Proposal | None
    feature: Tensor | None = None


class RAMSOutput(NamedTuple):
    """All scales, coarse to fine: fields of `ScaleOutput`, each a tuple with one entry per scale.

    ``strengths`` and ``proposals`` have one entry less: the last scale proposes nothing.
    """

    logits: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    strengths: tuple[Tensor, ...]
    proposals: tuple[Proposal, ...]


class ImageClassifier(nn.Module, ABC):
    """A backbone, a classifier that starts at zero, and a number of scales to look at.

    Args:
        backbone: from `create_backbone`. Input size and patch grid are read from it.
        num_classes: K.
        mean_std: (mean, std) per channel that inputs are normalized with; the backbone's own by
            default. Kept for those who prepare inputs, see `transforms.prepare`.
    """

    num_scales = 1
    per_scale_token = False  # scale s reads class token s; otherwise all read the first

    def __init__(self, backbone: nn.Module, num_classes: int, mean_std: tuple | None = None):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.mean_std = mean_std or normalization(backbone)
        self.image_size = image_size(backbone)
        self.grid = patch_grid(backbone)

    def forward(self, images: Tensor, source: Tensor | None = None) -> RAMSOutput:
        """Look at all scales.

        Args:
            images: (B, 3, H, W) normalized, of the backbone's input size.
            source: (B, 3, Hs, Ws) the same view at a higher resolution, normalized alike; crops are
                cut from it. None cuts each crop from the view of the scale before, as in the paper.

        Returns:
            `RAMSOutput`.
        """
        looks = list(self.scales(images, source))
        return RAMSOutput(
            logits=tuple(look.logits for look in looks),
            boxes=tuple(look.boxes for look in looks),
            strengths=tuple(look.strength for look in looks[:-1]),
            proposals=tuple(look.proposal for look in looks[:-1]),
        )

    @abstractmethod
    def scales(self, images: Tensor, source: Tensor | None = None) -> Iterator[ScaleOutput]:
        """Look at one scale after the other, each only when it is asked for.

        Takes what `forward` takes. Yields a `ScaleOutput` per scale.

        Raises:
            InputError: images of another size than the backbone's.
        """

    def loss(self, look: ScaleOutput, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """What training minimizes at one scale: the cross entropy of its logits, in float32."""
        return F.cross_entropy(look.logits.float(), labels, label_smoothing=label_smoothing)

    def check_size(self, images: Tensor) -> None:
        """Raise InputError for images of another size than the backbone's."""
        if images.shape[-2:] != self.image_size:
            given, taken = (" x ".join(map(str, s)) for s in (images.shape[-2:], self.image_size))
            raise InputError(f"images are {given} pixels; this model takes {taken}: resize them")

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimizers leave without weight decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's order of the layers, for layer-wise learning rates: stem, blocks, classifier."""

        def inside(pattern: str) -> str:
            return rf"^backbone\.(?:{pattern.replace('^', '')})"

        groups = self.backbone.group_matcher(coarse)
        return {
            name: inside(rule) if isinstance(rule, str) else [(inside(p), o) for p, o in rule]
            for name, rule in groups.items()
        }
