"""Parts of the explorer's page: panels, a proposal's row, its controls, messages, slow work."""

import gc
import html
import io
import math
import os
import threading
import weakref
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from ramslib.boxes import rescale_boxes
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.dppm import PROPOSALS
from ramslib.errors import InputError
from ramslib.inspector import Inspector, Region, single_block
from ramslib.model import ProposalSettings
from ramslib.plots import drawing

SIDE = 420  # pixels of the longer side of an image on the page; shown at two thirds of it or less
CHART = (0.08, 0.17, 0.54, 0.78)  # left, bottom, width and height of a chart's axes in its figure
TOP = 4.0  # the largest threshold
THRESHOLDS = np.linspace(0, TOP, 81).round(3).tolist()  # what a slider can choose
SCALES = 4  # at most, in the explorer
SINGLE = ("single_block", "single_head")  # strengths beside those of the registry
Drawing = tuple[Image.Image, str]  # an image and its note


def encode(image: Image.Image, form: str = "jpeg", quality: int = 88) -> bytes:
    """An image as bytes; JPEG without color subsampling: fast, and sharp lines."""
    data = io.BytesIO()
    image.save(data, form, quality=quality, subsampling=0)
    return data.getvalue()


def fit(image: Image.Image) -> Image.Image:
    """The image with its longer side ``SIDE`` pixels long."""
    factor = SIDE / max(image.size)
    size = [max(1, round(length * factor)) for length in image.size]
    return image.resize(size, Image.Resampling.BILINEAR)


@drawing.styled
def draw_figure(draw: Callable[[Figure], object], width: float, height: float) -> Image.Image:
    """The image of a figure without pyplot: any thread may call it, and no figure remains open.

    A figure is a cycle of thousands of objects: they stay young while it is drawn, and are freed
    at once; left to a full collection, they would be tens of MB by then.
    """
    gc.disable()
    try:
        return _draw_figure(draw, width, height)
    finally:
        gc.collect(0)
        gc.enable()


def _draw_figure(draw: Callable[[Figure], object], width: float, height: float) -> Image.Image:
    canvas = FigureCanvasAgg(Figure((width, height), dpi=150))
    draw(canvas.figure)
    canvas.draw()
    size = canvas.get_width_height()
    return Image.frombytes("RGBA", size, canvas.buffer_rgba()).convert("RGB")


class Panel(widgets.VBox):
    """An image with a title and a note; drawn only when what it shows has changed."""

    def __init__(self, title: str, form: str = "jpeg"):
        self.title = widgets.HTML(f'<div class="rams-title">{html.escape(title)}</div>')
        self.image = widgets.Image(format=form, layout={"display": "none"})
        self.marker, self.note = widgets.HTML(), widgets.HTML()
        self.key, self.text, self.is_outdated = None, "", False
        super().__init__([self.title, widgets.Box([self.image, self.marker]), self.note])
        self.add_class("rams-panel").add_class(f"rams-{form}")

    def show(self, key: object, draw: Callable[[], Drawing]) -> None:
        """Show image and note that ``draw()`` gives, unless ``key`` is that of what is shown."""
        if self.key != key:
            image, self.text = draw()
            self.image.value = encode(image, self.image.format)
            self.image.layout.display, self.key = None, key
        self.outdated(False)

    def outdated(self, is_outdated: bool = True, why: str = "computing …") -> None:
        """Dim the image, and say why, while it is not of what the controls say."""
        (self.add_class if is_outdated else self.remove_class)("rams-outdated")
        self.is_outdated = is_outdated
        self.note.value = caption_html(why if is_outdated else self.text)

    def mark(self, threshold: float) -> None:
        """Put a vertical line at a threshold of a chart, without drawing the chart again."""
        left, bottom, width, height = (100 * share for share in CHART)
        left, top = left + width * min(threshold / TOP, 1), 100 - bottom - height
        style = f"left: {left:.2f}%; top: {top:.2f}%; height: {height:.2f}%"
        self.marker.value = f'<div class="rams-marker" style="{style}"></div>'


class Pointer(Panel):
    """An image that is asked by a click, a dragged box, arrow keys or text: ``read()`` is which.

    The text, ``field``, is (row, column) or a box (top, left, bottom, right), or one of its options
    by name. Clicks reach it by page.js: no widget of ipywidgets takes them.
    """

    def __init__(self, title: str, form: str = "jpeg", is_box: bool = False):
        super().__init__(title, form)
        self.name, self.is_box, self.area = title, is_box, widgets.HTML()
        hint = "top, left, bottom, right in pixels" if is_box else "row, column"
        self.field = widgets.Combobox(placeholder=hint, continuous_update=False, tooltip=title)
        box = widgets.Box([self.image, self.area, self.marker])
        self.children = [self.title, box, self.field, self.note]
        self.add_class("rams-pointer")

    def read(self) -> str | list[float]:
        """What is asked.

        Raises:
            InputError: neither a name nor as many numbers as are needed.
        """
        text, kind = self.field.value.strip(), float if self.is_box else int
        if text in self.field.options:
            return text
        with suppress(ValueError):
            numbers = [kind(part) for part in text.split(",")]
            if len(numbers) == (4 if self.is_box else 2):
                return numbers
        raise InputError(f"{text!r}: give {self.field.placeholder}")

    def cover(self, size: Sequence[int]) -> None:
        """Divide the image into rows and columns (or pixels) that can be asked."""
        box = 'data-box="1"' if self.is_box else ""
        label = f"{self.name}: {self.field.placeholder}; click, or arrow keys"
        self.area.value = (
            f'<div class="rams-area" tabindex="0" role="application" aria-label="{label}" {box} '
            f'data-rows="{size[0]}" data-columns="{size[1]}"><div hidden></div></div>'
        )

    def aim(self, image: Image.Image, size: Sequence[int]) -> None:
        """Show an image of so many rows and columns (or pixels), and a frame around what is asked.

        Raises:
            InputError: see `read`.
        """
        self.show(image, lambda: (image, ""))
        self.cover(size)
        asked, style = self.read(), "display: none"
        if not isinstance(asked, str):
            top, left, bottom, right = asked if self.is_box else (*asked, *(n + 1 for n in asked))
            shares = top / size[0], 1 - right / size[1], 1 - bottom / size[0], left / size[1]
            style = "inset: " + " ".join(f"{100 * share:.2f}%" for share in shares)
        self.marker.value = f'<div class="rams-spot" style="{style}"></div>'


class ScaleRow(widgets.VBox):
    """Input, attention strength, patch mask and crop of one proposal, below its threshold."""

    def __init__(self, scale: int, slider: widgets.Widget):
        self.scale, self.name = scale, f"scale {scale + 2}"
        titles = [f"Scale {scale + 1} input" if scale else "Image"]
        titles += [f"Strength, scale {scale + 1}", f"Mask, scale {scale + 1}"]
        self.panels = [Panel(title) for title in (*titles, f"Scale {scale + 2} input")]
        self.input, self.heat, self.mask, self.crop = self.panels
        self.base = self.image = None, None  # what is shown, and its image at the page's size
        super().__init__([slider, widgets.Box(self.panels)])
        self.add_class("rams-row")

    def draw(
        self, key: object, pixels: Tensor, inspector: Inspector, settings: ProposalSettings, opacity
    ) -> tuple[Region, tuple]:
        """Draw what has changed; returns the proposed region, and the key of the next input.

        Args:
            key: names the input of this scale.
            pixels: that input: (3, H, W) uint8 of scale 1, normalized of a further one.
            inspector: of the image.
            settings: the controls'.
            opacity: of the heat map.
        """
        if self.base[0] != key:
            pixels = inspector.model.denormalize(pixels) if self.scale else pixels
            self.base = key, fit(drawing.to_pil(pixels))
        base, region = self.base[1], inspector.region(self.scale, settings)
        stats, (strength, proposal) = inspector.region_stats(region), settings.functions
        look, eta = (key, strength), settings.threshold(self.scale)
        crop = key, settings.from_high_res, *region.boxes.flatten().tolist()
        mask = partial(draw_mask, base, region, self.name, stats, eta)
        self.heat.show((*look, opacity), partial(draw_heat, base, region, opacity))
        self.mask.show((*look, proposal, settings.upsampling, eta), mask)
        self.crop.show(crop, partial(draw_crops, inspector, region, stats))
        if self.scale:
            frame = torch.tensor([0.0, 0.0, base.height, base.width])
            boxes = region.proposal.patch_boxes[0].reshape(-1, 4)
            boxes = rescale_boxes(boxes, region.strength.shape[1:], frame)
            self.input.show(crop, partial(draw_boxes, base, {self.name: boxes}, ""))
        return region, crop

    def draw_image(self, key: object, inspector: Inspector, boxes: dict[str, Tensor]) -> None:
        """Draw the whole image with the boxes (R, 4) of each scale, in its pixels."""
        if self.image[0] != key:
            self.image = key, fit(inspector.picture)
        height, width = inspector.size[0].tolist()
        factor = self.image[1].height / height
        boxes = {name: each * factor for name, each in boxes.items()}
        key = key, *(tuple(each.flatten().tolist()) for each in boxes.values())
        note = f"{height} × {width} px (height × width)"
        self.input.show(key, partial(draw_boxes, self.image[1], boxes, note))

    def outdated(self) -> None:
        """Dim all images of a further scale until they are drawn again."""
        for panel in self.panels:
            panel.outdated()


def draw_boxes(image: Image.Image, boxes: dict[str, Tensor], note: str) -> Drawing:
    """An image with the boxes (R, 4) of each scale, annotated ones dashed; a note and a legend."""
    legend = []
    for name, places in boxes.items():
        is_annotated = name == "annotated"
        color = drawing.ANNOTATION_COLOR if is_annotated else drawing.output_color(name)
        legend.append(f'<span class="rams-mark" style="--color:{color}">{name}</span>')
        for box in places.tolist():
            image = drawing.draw_box(image, box, color, dashed=is_annotated)
    return image, f"{note}<br>{' '.join(legend)}"


def draw_heat(base: Image.Image, region: Region, opacity: float) -> Drawing:
    """Attention strength over the input; its color scale, in multiples of the mean."""
    strength = region.strength[0]
    largest = float(drawing.relative_strength(strength).max())
    note = f'0 <span class="rams-scale"></span> {largest:.1f} × mean'
    return drawing.draw_strength(base, strength, opacity), note


def draw_mask(base: Image.Image, region: Region, name: str, stats: dict, eta: float) -> Drawing:
    """The patch mask over the input; what the threshold left, and what was kept of it."""
    mask, component, _ = (each[0] for each in region.proposal)
    unit = "patches" if mask.shape == region.strength.shape[1:] else "cells"
    left = f"{stats['patches']} of {mask.numel()} {unit} above {eta:.2f} × mean"
    count = stats["components"]
    kept = f"{count} component{'s' * (count != 1)}, {stats['kept']} {unit} kept"
    image = drawing.draw_mask(base, mask, component, drawing.output_color(name))
    return image, f"{left}<br>{kept}"


def draw_crops(inspector: Inspector, region: Region, stats: dict) -> Drawing:
    """The next scale's input, of several regions a grid; where the first is in the image."""
    crops = inspector.model.denormalize(region.crop)
    first = f"first of {len(crops)}: " if len(crops) > 1 else ""
    top, left, bottom, right = (f"{stats[side]:.0f}" for side in BOX_COLUMNS)
    iou = "" if math.isnan(stats["iou"]) else f", IoU {stats['iou']:.2f}"
    note = f"{first}y {top}–{bottom}, x {left}–{right} px<br>{stats['area']:.0%} of the image{iou}"
    grid = make_grid(crops, math.ceil(len(crops) ** 0.5), padding=0)
    return fit(drawing.to_pil(grid)), note


def caption_html(text: str) -> str:
    """HTML as small text."""
    return f'<div class="rams-note">{text}</div>'


def saved_html(found: dict[str, bytes], code: str) -> str:
    """Links to files that are in the page itself, and code to copy."""
    link = '<a download="{0}" href="data:application/octet-stream;base64,{1}">{0}</a>'
    links = " &ensp; ".join(link.format(name, b64encode(d).decode()) for name, d in found.items())
    lines = code.count("\n") + 1
    text = f'<textarea readonly rows="{lines}" aria-label="code">{html.escape(code)}</textarea>'
    return f"{links}{text}"


def probability_bars(table: pd.DataFrame) -> str:
    """Class probabilities as HTML: a card of bars per class.

    Args:
        table: a row per class and a column per output, see `plots.images.top_classes`.
    """
    bar = '<span class="rams-bar" style="width:{:.0f}px; background:{}"></span>{}'
    colors, cards = {output: drawing.output_color(output) for output in table}, []
    for name, row in table.iterrows():
        bars = (bar.format(1 + 90 * p, colors[output], f"{p:.3f}") for output, p in row.items())
        cards.append(f"<div><b>{html.escape(str(name))}</b><br>{'<br>'.join(bars)}</div>")
    legend = " &ensp; ".join(bar.format(10, color, output) for output, color in colors.items())
    return f"<div class='rams-cards'>{''.join(cards)}</div>{caption_html(legend)}"


def set_options(menu: widgets.Widget, options: Sequence[tuple], chosen: object = None) -> None:
    """Give a menu or list new options; ``chosen``, or else its old choice, is kept if offered."""
    values, chosen = [value for _, value in options], chosen or menu.value
    menu.index = None
    menu.options = tuple(options)
    menu.index = (values.index(chosen) if chosen in values else 0) if values else None


class Controls(widgets.VBox):
    """Sliders and menus about proposals; ``moved()`` is called after every change.

    Args:
        moved: without arguments.
        strengths: further ones to offer, as functions or ``path/to/file.py:name``.
        proposals: likewise.
    """

    def __init__(self, moved: Callable, strengths: Sequence = (), proposals: Sequence = ()):
        self.moved, self.own, self.inspector, self.quiet = moved, (strengths, proposals), None, True
        slider, count, menu = widgets.FloatSlider, widgets.IntSlider, widgets.Dropdown
        names = [f"threshold of scale {scale}" for scale in range(1, SCALES)]
        self.thresholds = [slider(description=n, max=TOP, step=THRESHOLDS[1]) for n in names]
        self.opacity = slider(description="heat opacity", max=1, step=0.05, value=0.6)
        self.strength, self.proposal = menu(description="strength"), menu(description="proposal")
        self.from_high_res = menu(description="crop from")
        self.block, self.head = count(description="block", min=1), count(description="head", min=1)
        self.scales = count(description="scales", min=1, max=SCALES)
        self.upsampling = count(description="upsampling", min=1, max=8)
        self.reset = widgets.Button(description="Reset", tooltip="all controls as trained")
        self.reset.on_click(lambda _: self.fit(self.inspector))
        choices = self.strength, self.block, self.head, self.proposal, self.from_high_res
        self.all = *choices, self.upsampling, self.scales, self.opacity
        self.named = {control.description: control for control in (*self.thresholds, *self.all)}
        for control in self.named.values():
            control.observe(self._changed, "value")
        super().__init__([*self.all, self.reset])
        self.add_class("rams-controls")

    def fit(self, inspector: Inspector | None) -> None:
        """Take the limits of a model, and the values that it was trained with."""
        if inspector is None:
            return
        self.inspector, settings, self.quiet = inspector, inspector.settings, True
        strengths = [*inspector.strengths(), settings.strength, *self.own[0], *SINGLE]
        proposals = [*PROPOSALS, settings.proposal, *self.own[1]]
        set_options(self.strength, _labeled(strengths), settings.strength)
        set_options(self.proposal, _labeled(proposals), settings.proposal)
        size = " × ".join(map(str, inspector.transform.size))
        crops = [(f"high resolution ({size})", True), ("previous input", False)]
        set_options(self.from_high_res, crops if settings.from_high_res else crops[1:])
        blocks = inspector.model.backbone.blocks
        self.block.max, self.head.max = len(blocks), blocks[0].attn.num_heads
        for scale, slider in enumerate(self.thresholds):
            slider.max = max(TOP, settings.threshold(scale))
            slider.value = settings.threshold(scale)
        self.block.value, self.head.value, self.from_high_res.index = len(blocks), 1, 0
        self.scales.value, self.upsampling.value = max(2, settings.scales), settings.upsampling
        self.quiet = False
        self._changed()

    def settings(self) -> ProposalSettings:
        """What the controls say."""
        strength = self.strength.value
        if strength in SINGLE:
            head = self.head.value if strength == "single_head" else None
            strength = single_block(self.block.value, head, self.inspector.has_class_token)
        thresholds = tuple(slider.value for slider in self.thresholds)
        names = "proposal", "scales", "from_high_res", "upsampling"
        chosen = {name: getattr(self, name).value for name in names}
        settings = self.inspector.settings
        return replace(settings, thresholds=thresholds, strength=strength, **chosen)

    def _changed(self, _=None) -> None:
        self.block.layout.display = None if self.strength.value in SINGLE else "none"
        self.head.layout.display = None if self.strength.value == SINGLE[1] else "none"
        if not self.quiet:
            self.moved()


def _labeled(choices: Sequence[str | Callable]) -> list[tuple]:
    """Options of a menu, each choice once; one's own has the name of its function.

    Where two have one name, such as an idea and the copy that a run keeps of it, also of its file.
    """
    texts = {choice: _name(choice) for choice in choices}
    names = [text.rpartition(":")[2] for text in texts.values()]
    pairs = zip(texts.items(), names, strict=True)
    return [(text if names.count(name) > 1 else name, choice) for (choice, text), name in pairs]


def _name(choice: str | Callable) -> str:
    """``name``, or ``file.py:name`` of one's own."""
    return getattr(choice, "__name__", os.path.basename(str(choice)))


class Messages(widgets.VBox):
    """A line per topic, until it is cleared or its button is pressed."""

    def show(self, topic: str, text: str, is_error: bool = True) -> None:
        """Show a line about a topic in place of the one before; an empty one removes it."""
        lines = {line.topic: line for line in self.children if line.topic != topic}
        if text:
            kind = "rams-error" if is_error else ""
            message = f'<div class="rams-message {kind}" role="status">{html.escape(text)}</div>'
            button = widgets.Button(description="Close")
            button.on_click(lambda _: self.show(topic, ""))
            line = widgets.HBox([widgets.HTML(message), button]).add_class("rams-line")
            line.topic, lines[topic] = topic, line
        self.children = tuple(lines.values())


class BackgroundWorker:
    """Slow work beside the page: it starts when controls rest, and newer work replaces older.

    Work is an iterator of functions that change the page; they are called under ``lock``, the work
    between them is not. It is abandoned at the next step when there is newer work or the process
    ends. Each has a thread of its own, which never keeps the process alive; one works at a time.
    """

    def __init__(self, lock: threading.RLock, report: Callable[[Exception], None], delay=0.15):
        self.lock, self.report, self.delay, self.busy = lock, report, delay, threading.Lock()
        self.threads, self.jobs = torch.get_num_threads(), []  # threads, and what cancels each
        weakref.finalize(self, _stop, self.jobs)

    def __call__(self, work: Iterator[Callable]) -> None:
        """Do this work when no other has come for ``delay`` seconds."""
        self.cancel()
        cancelled = threading.Event()
        thread = threading.Thread(target=self._work, args=(cancelled, work), daemon=True)
        thread.start()
        self.jobs[:] = [job for job in self.jobs if job[0].is_alive()] + [(thread, cancelled)]

    def cancel(self) -> None:
        """Abandon what is done."""
        for _, cancelled in self.jobs:
            cancelled.set()

    @torch.inference_mode()
    def _work(self, cancelled: threading.Event, work: Iterator[Callable]) -> None:
        torch.set_num_threads(self.threads)  # each thread has its own number
        try:
            cancelled.wait(self.delay)
            with self.busy:
                for change_page in () if cancelled.is_set() else work:
                    with self.lock:
                        if cancelled.is_set():
                            return
                        change_page()
        except Exception as error:
            self.report(error)

    def wait(self) -> None:
        """Wait until all work is done."""
        for thread, _ in self.jobs:
            thread.join()


def _stop(jobs: list[tuple[threading.Thread, threading.Event]]) -> None:
    """End a worker's threads; Python aborts where torch still computes in one when it exits."""
    for _, cancelled in jobs:
        cancelled.set()
    for thread, _ in jobs:
        if thread is not threading.current_thread():  # which may have been the last to know it
            thread.join(timeout=2)
