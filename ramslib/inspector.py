"""Look into a model: set an image once, then move strength, threshold and proposal.

The forward pass of a scale runs once and leaves the attention of all blocks. What follows from it,
strength, mask, component, box and crop, is computed for any `ProposalSettings` without another one;
only what a further scale makes of a changed crop needs a forward pass, when it is asked for. The
recursion itself is the model's: an inspector gives it other settings and remembers its scales.

    inspector = ramslib.inspect("runs/birds")
    inspector.set_image("heron.jpg")
    region = inspector.region(threshold=0.8)  # no forward pass
    outputs = inspector.outputs(threshold=0.8)  # scale 2 on the new crop
    rows = inspector.attention_rows(12, (3, 5))  # what this patch attends to, by head
    outputs = inspector.outputs(inspector.by_hand([40, 60, 200, 240]))  # scale 2 there
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ramslib.acceleration import heads_of
from ramslib.attention import (
    CLASS_STRENGTHS,
    STRENGTHS,
    RecordedScale,
    attention_probabilities,
    attention_strength,
    last_class,
    on_grid,
    rollout_mean,
)
from ramslib.backbone import count_class_tokens
from ramslib.boxes import box_area, box_iou, full_image_boxes, rescale_boxes
from ramslib.classifier import ScaleOutput
from ramslib.data.annotations import BOX_COLUMNS, image_size
from ramslib.data.transforms import ImageTransform, open_image
from ramslib.dppm import Proposal, label_components, seed_random_proposals
from ramslib.errors import InputError
from ramslib.evaluation import probabilities
from ramslib.extensions import reads
from ramslib.model import ProposalSettings, RAMSTrans

Token = str | tuple[int, int]  # a name of `Inspector.prefix_tokens`, or a patch: row, column from 0
DISPLAY = 900  # pixels; the longer side of the copy of an image that is kept to show


@lru_cache
def single_block(number: int, head: int | None = None, class_token: bool = True) -> Callable:
    """The strength that reads one block, or one head of it, alone.

    Args:
        number: of the block, from 1.
        head: from 1; None averages over heads.
        class_token: read the class token's row; otherwise the mean of all rows.
    """

    @reads(blocks=None)
    def strength(recorded: RecordedScale) -> Tensor:
        block = recorded.blocks[number - 1]
        if head is not None:
            block = heads_of(block, (slice(None), slice(head - 1, head)))
        return (last_class if class_token else rollout_mean)(recorded._replace(blocks=[block]))

    strength.is_single = True
    return strength


@lru_cache
def fixed_box(*patch_box: float) -> Callable:
    """The proposal of one box ``(top, left, bottom, right)`` in patches, whatever the strength."""

    @reads(blocks=0)
    def by_hand(strength: Tensor, threshold: float, recorded: RecordedScale | None) -> Tensor:
        return torch.tensor(patch_box).expand(len(strength), 4)

    return by_hand


class Region(NamedTuple):
    """What one scale proposes, and the next one's input.

    Attributes:
        strength: (1, h, w).
        proposal: of one image.
        crop: (R, 3, H, W) normalized.
        boxes: (R, 4) where the crops lie, in pixels of the input of scale 1.
    """

    strength: Tensor
    proposal: Proposal
    crop: Tensor
    boxes: Tensor


@dataclass(eq=False)
class _Scale:
    """A scale that was run: what went in and came out, and strengths computed from it."""

    inputs: Tensor
    logits: Tensor
    feature: Tensor
    recorded: RecordedScale
    boxes: Tensor | None = None  # where the inputs lie
    strengths: dict[Callable, Tensor] = field(default_factory=dict)

    def strength(self, function: Callable) -> Tensor:
        """Attention strength, computed once."""
        if function not in self.strengths:
            self.strengths[function] = attention_strength(self.recorded, function)
        return self.strengths[function]


class Inspector:
    """A model and one image, ready to be asked.

    Args:
        model: in evaluation mode, on its device.
        transform: the deterministic one of the test.
        classes: K names; empty for a backbone without a trained classifier.

    Attributes:
        settings: how the model was trained to propose. Methods take other ones, or changes as
            keywords: ``threshold``, ``strength``, ``proposal``, ``scales``, ``from_high_res``.
        picture: the upright image, at most ``DISPLAY`` pixels, to show.
        pixels: (3, Hs, Ws) uint8, the transformed image at the highest resolution at hand.
        size: (1, 2) height and width of the upright image.
        label: true class, or None.
        box: (1, 4) annotated box in pixels of the upright image, NaN where unknown.
        seen: (1, 4) what scale 1 sees of the upright image, in its pixels.
    """

    def __init__(self, model: RAMSTrans, transform: ImageTransform, classes: Sequence[str] = ()):
        self.model, self.transform, self.classes = model, transform, list(classes)
        high_res = tuple(transform.size) != tuple(model.image_size)
        thresholds = model.settings.thresholds or (1.0,)
        self.settings = replace(model.settings, thresholds=thresholds, from_high_res=high_res)
        self._scales: tuple[_Scale, ...] = ()

    def set_image(
        self,
        image: Path | str | Image.Image,
        label: int | None = None,
        box: Sequence[float] | None = None,
    ) -> "Inspector":
        """Read an image and run scale 1 on it.

        Args:
            image: a file, or an upright RGB image.
            label: the true class, if known.
            box: annotated box in pixels of the upright image, if known.

        Raises:
            InputError: not a readable image, or one of fewer pixels than a patch.
        """
        if isinstance(image, Image.Image):
            opened, size = image, image.size[::-1]
        else:
            opened, size = open_image(image, 2 * max(self.transform.resized)), image_size(image)
        self._check_size(image, size)
        self.size = torch.tensor([size])
        self.path, self.label, self.pixels = str(image), label, self.transform(opened)
        self.picture = opened.copy()
        self.picture.thumbnail((DISPLAY, DISPLAY))
        self.box = torch.tensor([[torch.nan] * 4 if box is None else list(box)]).double()
        device = self.model.device
        with torch.inference_mode():
            self._images = self.model.preprocess(self.pixels[None].to(device))
            self._scales = (self._run(self._images[0], 0),)
        self._scales[0].boxes = full_image_boxes(self._images[0])
        self.seen = self.image_boxes(self._scales[0].boxes)
        return self

    def _check_size(self, image: object, size: tuple[int, int]) -> None:
        sides = zip(self.model.image_size, self.model.grid, strict=True)
        patch, (height, width) = [side // count for side, count in sides], size
        if height < patch[0] or width < patch[1]:
            raise InputError(
                f"{image}: {height} x {width} pixels are less than one patch ({patch[0]} x "
                f"{patch[1]}); choose a larger image"
            )

    def _run(self, inputs: Tensor, scale: int) -> _Scale:
        """Run one scale and record all of it; scales beyond the trained ones run as the last."""
        return _Scale(inputs, *self.model.run_scale(inputs, scale, blocks=None, tokens=True))

    def _run_before(self, scale: int) -> _Scale:
        if scale >= len(self._scales):
            missing = "outputs()" if self._scales else "set_image()"
            raise InputError(f"scale {scale + 1} was not run; call {missing} first")
        return self._scales[scale]

    def changed(self, settings: ProposalSettings | None = None, **changes) -> ProposalSettings:
        """Settings with some changed; ``threshold`` is one number for all proposals."""
        if "threshold" in changes:
            changes["thresholds"] = (changes.pop("threshold"),)
        return replace(settings or self.settings, **changes)

    @torch.inference_mode()
    def region(self, scale: int = 0, settings: ProposalSettings | None = None, **changes) -> Region:
        """What a scale that was run proposes to the next one: no forward pass.

        Args:
            scale: from 0.
            settings: other ones than the model's.
            **changes: see `changed`.

        Raises:
            InputError: no image is set, or the scale was not run.
        """
        settings, run = self.changed(settings, **changes), self._run_before(scale)
        strength, proposal = settings.functions
        values, steady = run.strength(strength), replace(settings, proposal=_steady(proposal))
        proposed = steady.propose(values, scale, run.recorded)
        source = self._images[1] if settings.from_high_res else None
        given = run.inputs, source, run.boxes, proposed.patch_boxes, scale + 1
        crop, boxes = self.model.crop_region(*given)
        return Region(values, proposed, crop, boxes)

    @torch.inference_mode()
    def outputs(self, settings: ProposalSettings | None = None, **changes) -> list[ScaleOutput]:
        """All scales; those whose input is as before are not run again."""
        settings, runs = self.changed(settings, **changes), []
        self._run_before(0)
        strength, proposal = settings.functions

        def known_strength(_) -> Tensor:  # equal to the last digit to what `region` computes
            return runs[-1].strength(strength)

        def recall(inputs: Tensor, scale: int, *_) -> tuple:
            known = self.has_run(scale, inputs)
            runs.append(self._scales[scale] if known else self._run(inputs, scale))
            return runs[-1].logits, runs[-1].feature, runs[-1].recorded

        steady = replace(settings, strength=known_strength, proposal=_steady(proposal))
        outputs = list(self.model.iterate_scales(*self._images, steady, recall))
        for run, output in zip(runs, outputs, strict=True):
            run.boxes = output.boxes
        self._scales = tuple(runs)
        return outputs

    def has_run(self, scale: int, inputs: Tensor) -> bool:
        """Whether a scale was run last on exactly these inputs."""
        return scale < len(self._scales) and torch.equal(self._scales[scale].inputs, inputs)

    def probabilities(self, outputs: Sequence[ScaleOutput]) -> dict[str, Tensor]:
        """(K,) class probabilities by output, see `probabilities`."""
        return probabilities([output.logits for output in outputs], self.model)

    def plot(
        self,
        settings: ProposalSettings | None = None,
        figure: Figure | None = None,
        **changes,
    ) -> Figure:
        """All scales as a figure: boxes, strength, mask, next input, class probabilities."""
        from ramslib.plots.images import plot_recursion  # importing pyplot takes half a second

        outputs = self.outputs(settings, **changes)
        box = self.transform.boxes_to_input(self.box, self.size, self.transform.size)[0]
        shown = self.model, self.classes, [self.label], [box]
        return plot_recursion(outputs, self.pixels[None], *shown, figure)[0, 0].figure

    def logits(self, count: int) -> tuple[Tensor, ...]:
        """(1, K) of the first scales that were run; of several regions, their mean."""
        return tuple(run.logits.mean(dim=0, keepdim=True) for run in self._scales[:count])

    def image_boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (B, 4) in pixels of the input of scale 1, as boxes in the upright image."""
        return self.transform.boxes_to_image(boxes.cpu(), self.size, self.model.image_size)

    def region_stats(self, region: Region) -> dict[str, float]:
        """The numbers of a region; of several, those of the first.

        Returns:
            ``top, left, bottom, right`` in pixels of the upright image; ``area``, its share of the
            image; ``iou`` with the annotated box, NaN without one; and, in patches of the input
            that it was proposed in, ``patches`` above the threshold, their number of
            ``components``, and ``kept``.
        """
        boxes, mask = self.image_boxes(region.boxes[:1]), region.proposal.mask[:1]
        return {
            **dict(zip(BOX_COLUMNS, boxes[0].tolist(), strict=True)),
            "area": float(box_area(boxes)[0] / self.size.prod()),
            "iou": float(box_iou(boxes, self.box)[0]),
            "patches": int(mask.sum()),
            "components": int(label_components(mask).max()),
            "kept": int(region.proposal.component[:1].sum()),
        }

    def threshold_curve(
        self, thresholds: Sequence[float], settings: ProposalSettings | None = None, **changes
    ) -> pd.DataFrame:
        """What any threshold of scale 1 does to this image: no forward pass.

        Returns:
            One row per threshold: ``threshold, area`` (share of the image), and ``iou`` if a box is
            annotated.
        """
        settings = self.changed(settings, **changes)
        stats = [self.region_stats(self.region(0, settings, threshold=eta)) for eta in thresholds]
        curve = pd.DataFrame(stats).assign(threshold=thresholds)
        return curve[["threshold", "area", "iou"]].dropna(axis=1)

    def true_probabilities(self, proposed: Iterable[ProposalSettings]) -> Iterator[float]:
        """Probability of the true class at scale 2, for each settings of what scale 1 proposes.

        Where the true class is unknown, that of the class which scale 1 predicts. One forward pass
        per different crop.
        """
        known, label = {}, self.label
        label = self._run_before(0).logits[0].argmax() if label is None else label
        for settings in proposed:
            region = self.region(0, settings)
            key = settings.from_high_res, *region.boxes.flatten().tolist()
            if key not in known:
                with torch.inference_mode():
                    logits = self.model.run_scale(region.crop, 1)[0].mean(dim=0)
                known[key] = float(logits.softmax(dim=0)[label])
            yield known[key]

    @torch.inference_mode()
    def strength_per_block(self, settings: ProposalSettings | None = None, **changes) -> Tensor:
        """The strength (L, h, w) of scale 1 if the network ended after each block.

        Strengths of a single block are computed block by block.
        """
        strength = self.changed(settings, **changes).functions[0]
        recorded = self._run_before(0).recorded
        numbers = range(1, len(recorded.blocks) + 1)
        if getattr(strength, "is_single", False):
            maps = [single_block(n, None, self.has_class_token)(recorded) for n in numbers]
        else:
            ends = [recorded._replace(blocks=recorded.blocks[:n]) for n in numbers]
            maps = [attention_strength(end, strength) for end in ends]
        return torch.cat(maps)

    @property
    def prefix_tokens(self) -> list[str]:
        """The tokens before the patches: ``class 1``, ..., then ``register 1``, ..."""
        recorded = self._run_before(0).recorded
        count = recorded.blocks[0].query.shape[2] - recorded.grid[0] * recorded.grid[1]
        classes = count_class_tokens(self.model.backbone)
        names = [f"class {number}" for number in range(1, classes + 1)]
        return names + [f"register {number}" for number in range(1, count - classes + 1)]

    def token_index(self, token: Token, scale: int = 0) -> int:
        """Where a token is in the sequence.

        Args:
            token: a name of `prefix_tokens`, or a patch as (row, column) from 0.
            scale: from 0, one that was run.

        Raises:
            InputError: there is none.
        """
        names, (height, width) = self.prefix_tokens, self._run_before(scale).recorded.grid
        if isinstance(token, str):
            if token not in names:
                raise InputError(f"no token {token!r}; choose one of {names} or (row, column)")
            return names.index(token)
        row = _checked("row", token[0], 0, height - 1)
        return len(names) + width * row + _checked("column", token[1], 0, width - 1)

    @torch.inference_mode()
    def attention_rows(
        self, block: int, token: Token, head: int | None = None, scale: int = 0
    ) -> Tensor:
        """What one token attends to: its row of a block's attention probabilities, by head.

        Args:
            block: from 1.
            token: the one that reads, see `token_index`.
            head: from 1; None gives all.
            scale: from 0, one that was run; of several regions, the first.

        Returns:
            (A, N), or (1, N) of one head; each row sums to 1. `attention.on_grid` gives the
            patches' part as maps.

        Raises:
            InputError: no such block, head or token.
        """
        blocks, index = self._run_before(scale).recorded.blocks, self.token_index(token, scale)
        chosen = blocks[_checked("block", block, 1, len(blocks)) - 1]
        rows = attention_probabilities(chosen, slice(index, index + 1))[0, :, 0]
        return rows if head is None else rows[[_checked("head", head, 1, len(rows)) - 1]]

    def disagreement(
        self, block: int, patch: Token, head: int | None = None, scale: int = 0
    ) -> Tensor:
        """Where class token and patch disagree: (h, w), positive where the class token looks more.

        The difference of what each gives to every patch, mean over heads, as shares of what it
        gives to all patches; the arguments are those of `attention_rows`.
        """
        if not self.has_class_token:
            raise InputError("this backbone has no class token; use attention_rows")
        asked = self.prefix_tokens[self._run_before(scale).recorded.class_index], patch
        rows = [self.attention_rows(block, token, head, scale).mean(dim=0) for token in asked]
        maps = on_grid(torch.stack(rows), self._run_before(scale).recorded.grid)
        first, second = maps / maps.sum(dim=(1, 2), keepdim=True)
        return first - second

    def patch_tokens(self, scale: int = 0) -> Tensor:
        """The patch tokens (h, w, D) of a scale that was run, after the last block."""
        return self._run_before(scale).recorded.tokens[0]

    @torch.inference_mode()
    def patch_similarity(self, patch: tuple[int, int], scale: int = 0) -> Tensor:
        """Cosine of a patch's token after the last block to those of all patches: (h, w)."""
        tokens = self.patch_tokens(scale)
        index = self.token_index(patch, scale) - len(self.prefix_tokens)
        return F.cosine_similarity(tokens, tokens.flatten(0, 1)[index], dim=-1)

    def by_hand(
        self, box: Sequence[float], settings: ProposalSettings | None = None, **changes
    ) -> ProposalSettings:
        """Settings that propose one box, whatever the attention is.

        Args:
            box: ``(top, left, bottom, right)`` in pixels of the upright image.
            settings: other ones than the model's.
            **changes: see `changed`.

        Raises:
            InputError: the model sees nothing of it.
        """
        given = torch.as_tensor([list(box)], dtype=torch.float64)
        inside = self.transform.boxes_to_input(given, self.size, self.model.image_size)[0]
        if not (inside[2:] > inside[:2]).all():
            raise InputError(
                f"box {list(box)}: the model sees nothing of it; give (top, left, bottom, right) "
                f"in pixels, within {self.seen[0].round().int().tolist()}"
            )
        whole = torch.tensor([0.0, 0.0, *self.model.grid])
        place = fixed_box(*rescale_boxes(inside, self.model.image_size, whole).tolist())
        exact = {"proposal": place, "margin": 0.0, "keep_aspect": False}
        return self.changed(settings, **changes | exact)

    def sliding_boxes(self, box: Sequence[float], steps: int = 8) -> Tensor:
        """A box (4,) slid over what the model sees: (steps * steps, 4), row by row."""
        seen, box = self.seen[0], torch.as_tensor(box)
        size = (box[2:] - box[:2]).minimum(seen[2:] - seen[:2])
        ways = seen[:2] + torch.linspace(0, 1, steps)[:, None] * (seen[2:] - size - seen[:2])
        corners = torch.cartesian_prod(*ways.T)
        return torch.cat([corners, corners + size], dim=1)

    @property
    def has_class_token(self) -> bool:
        """Whether the backbone has a class token."""
        return count_class_tokens(self.model.backbone) > 0

    def strengths(self) -> list[str]:
        """The built-in strengths that this backbone has: those of a class token need one."""
        hidden = () if self.has_class_token else CLASS_STRENGTHS
        return [name for name, function in STRENGTHS.items() if function not in hidden]


def _checked(name: str, number: int, first: int, last: int) -> int:
    if not first <= number <= last:
        raise InputError(f"{name} {number}: there is none; give one of {first} to {last}")
    return number


def _steady(proposal: Callable) -> Callable:
    """A proposal whose random regions stay the same while settings change."""

    @wraps(proposal)
    def seeded(strength: Tensor, threshold: float, recorded: RecordedScale) -> Proposal:
        with seed_random_proposals([0] * len(strength)):
            return proposal(strength, threshold, recorded)

    return seeded
