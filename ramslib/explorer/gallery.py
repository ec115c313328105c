"""Images to open: pages of thumbnails, validation images in an order, a confusion matrix."""

import html
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as widgets
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ramslib.data.transforms import open_image
from ramslib.errors import InputError
from ramslib.evaluation import confusion_matrix
from ramslib.explorer.panels import caption_html, encode, set_options
from ramslib.explorer.validation import (
    CLASSES,
    PAGE,
    VALUES,
    CachedValidation,
    compare_models,
    images_of,
    sort_images,
)
from ramslib.plots import CMAP
from ramslib.plots.drawing import clean_class_name


class Thumbnails(widgets.VBox):
    """Pages of images with a button each; ``pick(path)`` when pressed. ``guard`` wraps handlers."""

    def __init__(self, pick: Callable[[str], None], guard: Callable):
        self.pick, self.paths, self.captions, self.meaning = pick, [], [], ""
        self.grid, self.caption = widgets.Box().add_class("rams-grid"), widgets.HTML()
        self.page = widgets.IntSlider(description="page", min=1, max=1)
        self.page.observe(guard(self._draw), "value")
        self.cells = []
        for number in range(PAGE):
            button = widgets.Button()
            button.on_click(guard(partial(self._open, number)))
            cell = widgets.VBox([widgets.Image(format="jpeg"), button, widgets.HTML()])
            self.cells.append(cell.add_class("rams-thumbnail"))
        super().__init__([self.grid, self.page, self.caption])
        self.show([], [])

    def show(self, paths: Sequence[str], captions: Sequence[str], meaning: str = "") -> None:
        """Show these images from the first page on; ``meaning`` explains what they are."""
        self.paths, self.captions, self.meaning = [], captions, meaning
        self.page.value, self.page.max, self.paths = 1, max(1, -(-len(paths) // PAGE)), paths
        self._draw()

    def _draw(self, _=None) -> None:
        """Show a page."""
        part = slice((self.page.value - 1) * PAGE, self.page.value * PAGE)
        paths = self.paths[part]
        for cell, path, text in zip(self.cells, paths, self.captions[part], strict=False):
            image, button, caption = cell.children
            image.value, button.tooltip = _thumbnail(path), f"open {Path(path).name}"
            caption.value = caption_html(text)
        self.grid.children = self.cells[: len(paths)]
        self.page.layout.display = None if self.page.max > 1 else "none"
        self.caption.value = caption_html(
            f"{len(self.paths)} images; " * bool(self.paths) + self.meaning
        )

    def _open(self, number: int, _) -> None:
        self.pick(self.paths[(self.page.value - 1) * PAGE + number])


def _thumbnail(path: str) -> bytes:
    """A small JPEG; nothing for an image that cannot be read."""
    try:
        image = open_image(path, 200)
    except InputError:
        return b""
    image.thumbnail((240, 180))
    return encode(image, quality=75)


class ValidationImages(widgets.VBox):
    """A menu about cached validation predictions and the images that it leads to; filled lazily."""

    def __init__(self, pick: Callable[[str], None], guard: Callable):
        self.menu, self.matrix = widgets.Dropdown(description="show"), widgets.Box()
        self.images, self.guard = Thumbnails(pick, guard), guard
        self.classes, self.cached, self.shown = [], None, None
        self.menu.observe(guard(lambda _: self.fill()), "value")
        super().__init__([self.menu, self.matrix, self.images])
        self.matrix.add_class("rams-matrix")

    def use(self, classes: Sequence[str], cached: CachedValidation) -> None:
        """Offer what the predictions of another model can tell."""
        self.classes, self.cached = [html.escape(clean_class_name(name)) for name in classes], None
        self.images.show([], [], "the model has no trained classifier")
        set_options(self.menu, [(name, name) for name in self.options(cached)])
        self.cached = cached

    def fill(self) -> None:
        """Show what the menu says, if it is not shown yet."""
        wanted = self.cached, self.menu.value
        if None not in wanted and self.shown != wanted:
            self.shown = wanted
            self.draw(self.menu.value)


class Gallery(ValidationImages):
    """The images in one of the orders of `sort_images`."""

    def options(self, cached: CachedValidation) -> Sequence[str]:
        """The orders that are known."""
        return list(sort_images(cached))

    def draw(self, order: str) -> None:
        """Show the images in an order."""
        values = sort_images(self.cached)[order]
        names = self.cached.strengths.table.set_index("path")["class_name"].map(clean_class_name)
        captions = [f"{value:.2f}, {html.escape(names[path])}" for path, value in values.items()]
        meaning = f"the number is the {VALUES[order]}" if len(values) else "no images"
        self.images.show(values.index.tolist(), captions, meaning)


class Disagreement(ValidationImages):
    """The images that only one of two models gets right; ``cached`` and ``of`` are of both."""

    of = None

    def options(self, cached: tuple[CachedValidation, CachedValidation]) -> Sequence[str]:
        """Which of the two is right."""
        return list(compare_models(*cached)[1])

    def draw(self, side: str) -> None:
        """Show the images that one of them gets right, and the paired difference."""
        differences, paths = compare_models(*self.cached)
        text = (
            "{images:.0f} images, {better:.0f} right in this model only, {worse:.0f} in the other "
            "only: {difference:+.1f} points of accuracy, 95 % interval {low:+.1f} to {high:+.1f}, "
            "McNemar's exact p = {p_value:.3f}"
        ).format(**differences.iloc[-1])
        names = [html.escape(Path(path).name) for path in paths[side]]
        self.images.show(paths[side], names, text)


class Confusion(ValidationImages):
    """The images by true and predicted class; a cell of the matrix opens its images."""

    def options(self, cached: CachedValidation) -> Sequence[str]:
        """The outputs of a trained classifier."""
        return cached.predictions["output"].unique() if self.classes else []

    def draw(self, output: str) -> None:
        """Show the confusion matrix of an output."""
        counts = confusion_matrix(self.cached.predictions, len(self.classes), output, CLASSES)
        shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        heading = '<div class="rams-class" title="{0}">{0}</div>'
        names = [heading.format(self.classes[label]) for label in counts]
        cells = [widgets.HTML(text) for text in ("true ↓ predicted →", *names)]
        for name, true in zip(names, counts.index, strict=True):
            cells.append(widgets.HTML(name))
            cells += [self._cell(true, p, counts[p][true], shares[p][true]) for p in counts]
        columns = f"minmax(64px, 160px) repeat({len(counts)}, minmax(24px, 72px))"
        self.matrix.layout.grid_template_columns = columns
        for old in self.matrix.children:
            old.close()
        self.matrix.children = cells
        left_out = f"; of {len(self.classes)} classes those with most mistakes"
        left_out = left_out if len(self.classes) > CLASSES else ""
        self.images.show([], [], f"press a cell for its images; color: share of its row{left_out}")

    def _cell(self, true: int, predicted: int, count: int, share: float) -> widgets.Button:
        meaning = f"{count} × {self.classes[true]} predicted as {self.classes[predicted]}"
        button = widgets.Button(description=str(count or ""), tooltip=meaning, disabled=not count)
        button.style.button_color = to_hex(colormaps[CMAP](share)) if count else "#f2f2f2"
        button.style.text_color = "black" if share > 0.43 else "white"
        button.on_click(self.guard(lambda _: self._open(true, predicted, meaning)))
        return button

    def _open(self, true: int, predicted: int, meaning: str) -> None:
        paths = images_of(self.cached, true, predicted, self.menu.value)
        self.images.show(paths, [html.escape(Path(path).name) for path in paths], meaning)
