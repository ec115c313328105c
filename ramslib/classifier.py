"""What every model of the workbench is: scales that are run one after the other, from pixels.

Training, evaluation, checkpoints and prediction use nothing but `ImageClassifier`. A new model is a
subclass with `iterate_scales` and, where its loss has another term, `loss`; a function ``(config,
num_classes) -> ImageClassifier`` builds it, in ``model.MODELS`` or in a file of your own.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramslib.backbone import image_size, normalization, patch_grid
from ramslib.dppm import Proposal
from ramslib.errors import InputError


class ScaleOutput(NamedTuple):
    """One scale: what it saw, what it says, and what it proposes.

    Where a proposal gave R regions per image, the rows of each image follow each other.

    Attributes:
        logits: (B, K); of several regions, their mean.
        input: (B * R, 3, H, W) normalized pixels.
        boxes: (B * R, 4) float32, where the input lies, in pixels of the input of scale 1; on the
            CPU.
        strength: (B * R, h, w) attention strength, None at the last scale.
        proposal: what the next scale will see, None at the last scale.
        feature: (B, D) what was classified.
    """

    logits: Tensor
    input: Tensor
    boxes: Tensor
    strength: Tensor | None = None
    proposal: Proposal | None = None
    feature: Tensor | None = None


class RAMSOutput(NamedTuple):
    """All scales, coarse to fine: fields of `ScaleOutput`, each a tuple with one entry per scale.

    ``strengths`` and ``proposals`` have one entry less: the last scale proposes nothing.
    """

    logits: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    strengths: tuple[Tensor, ...]
    proposals: tuple[Proposal, ...]


Scales = Generator[ScaleOutput, Tensor | None, None]


class ImageClassifier(nn.Module, ABC):
    """A backbone, a classifier that starts at zero, and pre-processing from pixels.

    Args:
        backbone: from `create_backbone`. Input size and patch grid are read from it.
        num_classes: K.
        mean_std: (mean, std) per channel that pixels in [0, 1] are normalized with; the backbone's
            own by default.

    Attributes:
        origin: one sentence about where the weights come from.
        temperatures: of the outputs that have one, see `evaluation.fit_calibration`.
        scale_weights: of the scales in their means, see `evaluation.fuse`; those of the loss.
    """

    num_scales = 1
    per_scale_token = False  # scale s reads class token s; otherwise all read the first

    def __init__(self, backbone: nn.Module, num_classes: int, mean_std: tuple | None = None):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        for name, values in zip(("mean", "std"), mean_std or normalization(backbone), strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.image_size = image_size(backbone)
        self.grid = patch_grid(backbone)
        self.origin = getattr(backbone, "origin", "")
        self.temperatures: dict[str, float] = {}
        self.scale_weights: tuple[float, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.mean.device

    def forward(self, pixels: Tensor) -> RAMSOutput:
        """Run all scales.

        Args:
            pixels: (B, 3, Hs, Ws) uint8, or float in [0, 1]: RGB images at the highest resolution
                available, as `transforms.ImageTransform` gives them. Scale 1 sees them resized to
                the input size; further scales crop from them.
        """
        return self.forward_preprocessed(*self.preprocess(pixels))

    def forward_preprocessed(self, images: Tensor, high_res: Tensor | None = None) -> RAMSOutput:
        """`forward` for what `preprocess` returns."""
        outputs = list(self.iterate_scales(images, high_res))
        return RAMSOutput(
            logits=tuple(output.logits for output in outputs),
            boxes=tuple(output.boxes for output in outputs),
            strengths=tuple(output.strength for output in outputs[:-1]),
            proposals=tuple(output.proposal for output in outputs[:-1]),
        )

    def forward_scales(self, pixels: Tensor) -> Scales:
        """Run one scale after the other, each only when it is asked for; see `forward`."""
        return self.iterate_scales(*self.preprocess(pixels))

    @abstractmethod
    def iterate_scales(self, images: Tensor, high_res: Tensor | None = None) -> Scales:
        """Yield a `ScaleOutput` per scale.

        ``send`` a mask (B,) bool of the images of the last output, instead of calling ``next``, to
        continue with those images alone.

        Args:
            images: (B, 3, H, W) normalized, of the backbone's input size.
            high_res: (B, 3, Hs, Ws) the same images at a higher resolution, normalized alike;
                crops are cut from it. None cuts each crop from the previous input, as in the paper.

        Raises:
            InputError: images of another size than the backbone's.
        """

    def preprocess(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalize pixels on their device, and shrink them to the input size with antialiasing.

        Args:
            pixels: (B, 3, Hs, Ws) uint8, or float in [0, 1].

        Returns:
            The input (B, 3, H, W), and the high-resolution pixels (B, 3, Hs, Ws) to crop from, or
            None where the sizes are equal; normalized, of the model's type.
        """
        values = pixels / (1 if pixels.is_floating_point() else 255)
        values, dtype = values.float().sub_(self.mean).div_(self.std), self.mean.dtype
        if values.shape[-2:] == self.image_size:
            return values.to(dtype), None
        images = F.interpolate(values, self.image_size, mode="bilinear", antialias=True)
        return images.to(dtype), values.to(dtype)

    def denormalize(self, images: Tensor) -> Tensor:
        """Normalized images (..., 3, H, W) as uint8 pixels."""
        return ((images * self.std + self.mean) * 255).round().clamp(0, 255).byte()

    def loss(self, output: ScaleOutput, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """What training minimizes at one scale: the cross entropy of its logits, in float32."""
        return F.cross_entropy(output.logits.float(), labels, label_smoothing=label_smoothing)

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
