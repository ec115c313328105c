"""The explorer's rows of pictures: what one proposal is made of, and the words below it."""

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from ramslib.boxes import rescale_boxes
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.explorer.components import Panel, fit
from ramslib.explorer.lenses import LoadedModel, Photo
from ramslib.explorer.looking import ProposalSettings, RecordedScale, Region
from ramslib.plots.drawing import (
    ANNOTATION_COLOR,
    HEATMAP_CMAP,
    draw_box,
    draw_mask,
    draw_strength,
    output_color,
    relative_strength,
    to_pil,
)

_STOPS = ", ".join(to_hex(color) for color in colormaps[HEATMAP_CMAP](np.linspace(0, 1, 9)))


class Row(widgets.VBox):
    """ImageTransform, attention strength, patch mask and crop of one proposal, below its threshold."""

    def __init__(self, number: int, slider: widgets.Widget):
        self.number, self.color = number, output_color(f"scale {number + 2}")
        view = f"scale {number + 1} saw" if number else "photo"
        names = (f"{what}, scale {number + 1}" for what in ("attention strength", "patch mask"))
        self.panels = [Panel(name) for name in (view, *names, f"scale {number + 2} sees")]
        self.view, self.heat, self.mask, self.crop = self.panels
        self.base: tuple[RecordedScale | None, Image.Image | None] = None, None
        self.photo: tuple[Photo | None, Image.Image | None] = None, None
        template = "repeat(4, minmax(0, 1fr))"
        grid = widgets.Layout(grid_template_columns=template, grid_gap="12px", width="100%")
        super().__init__([slider, widgets.GridBox(self.panels, layout=grid)])

    def draw(
        self,
        lens: LoadedModel,
        photo: Photo,
        seen: RecordedScale,
        region: Region,
        numbers: dict,
        choice: ProposalSettings,
        opacity: float,
    ) -> None:
        """Draw what has changed since the last time."""
        base, strength, proposal = self._base(lens, photo, seen), *region[:2]
        read, threshold = (seen, *choice.read()), choice.thresholds[self.number]
        self.heat.show(
            (*read, opacity),
            lambda: (draw_strength(base, strength[0], opacity), say_strength(strength[0])),
        )
        self.mask.show(
            (*read, choice.proposal, threshold),
            lambda: (
                draw_mask(base, proposal.mask[0], proposal.component[0], self.color),
                say_mask(numbers, strength[0].numel(), threshold),
            ),
        )
        crop = seen, tuple(region.boxes[0].tolist()), choice.from_source
        self.crop.show(
            crop,
            lambda: (fit(to_pil(lens.model.denormalize(region.crop[0]))), say_region(numbers)),
        )
        if self.number:
            self.view.show(crop, lambda: (self._boxed(base, region), ""))

    def draw_photo(self, photo: Photo, boxes: dict[str, list[float]]) -> None:
        """Draw the whole photo with the boxes of all scales, in pixels of the upright photo."""
        if self.photo[0] is not photo:
            self.photo = photo, draw_annotation(photo)
        picture, factor = self.photo[1], self.photo[1].height / float(photo.size[0, 0])

        def draw() -> tuple[Image.Image, str]:
            painted = picture
            for name, box in boxes.items():
                painted = draw_box(painted, [side * factor for side in box], output_color(name))
            return painted, say_photo(photo, boxes)

        self.view.show((picture, *map(tuple, boxes.values())), draw)

    def stale(self) -> None:
        """Dim all pictures until they are drawn again."""
        for panel in self.panels[not self.number :]:
            panel.stale(True)

    def _base(self, lens: LoadedModel, photo: Photo, seen: RecordedScale) -> Image.Image:
        """The view that was looked at, at the size of the page, made once."""
        if self.base[0] is not seen:
            seen_pixels = lens.model.denormalize(seen.view[0])
            self.base = seen, fit(to_pil(seen_pixels if self.number else photo.pixels))
        return self.base[1]

    def _boxed(self, base: Image.Image, region: Region) -> Image.Image:
        frame = torch.tensor([0.0, 0.0, base.height, base.width])
        grid = tuple(region.proposal.mask.shape[1:])
        box = rescale_boxes(region.proposal.patch_boxes[0].cpu(), grid, frame)
        return draw_box(base, box.tolist(), self.color)


def draw_annotation(photo: Photo) -> Image.Image:
    """The upright photo at the size of the page, with its annotated box dashed."""
    picture = fit(photo.picture)
    if photo.truth.isnan().any():
        return picture
    box = photo.truth[0] * (picture.height / float(photo.size[0, 0]))
    return draw_box(picture, box.tolist(), ANNOTATION_COLOR, dashed=True)


def say_photo(photo: Photo, boxes: dict[str, list[float]]) -> str:
    """Size of the photo and a legend of its boxes."""
    height, width = photo.size[0].tolist()
    marks = [_mark(output_color(name), name) for name in boxes]
    marks += [_mark(ANNOTATION_COLOR, "annotated")] * (not photo.truth.isnan().any())
    return f"{height} × {width} px (height × width)<br>{' '.join(marks)}"


def _mark(color: str, name: str) -> str:
    """A small empty box of that color, and its name."""
    box = f'<span class="rams-mark" style="border-color:{color}"></span>'
    return f'<span style="white-space:nowrap">{box}{name}</span>'


def say_strength(strength: Tensor) -> str:
    """The color scale, in multiples of the mean."""
    largest = float(relative_strength(strength).max())
    bar = f'<span class="rams-scale" style="background:linear-gradient(to right, {_STOPS})"></span>'
    return f"0 {bar} {largest:.1f} × mean"


def say_mask(numbers: dict, patches: int, threshold: float) -> str:
    """What the threshold left, and what was kept of it."""
    count, kept = numbers["components"], numbers["kept"]
    text = f"{numbers['patches']} of {patches} patches above {threshold:.2f} × mean"
    return f"{text}<br>{count} component{'s' * (count != 1)}, {kept} patches kept"


def say_region(numbers: dict) -> str:
    """Where a region lies in the photo."""
    top, left, bottom, right = (f"{numbers[side]:.0f}" for side in BOX_COLUMNS)
    iou = "" if np.isnan(numbers["iou"]) else f", IoU {numbers['iou']:.2f}"
    share = f"{100 * numbers['area']:.0f} % of the photo"
    return f"y {top}–{bottom}, x {left}–{right} px<br>{share}{iou}"
