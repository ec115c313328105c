"""Images to open: those of a dataset, folder or upload; validation images by order or mistake."""

import html
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import open_image
from ramslib.errors import InputError
from ramslib.evaluation import confusion_matrix
from ramslib.explorer import validation
from ramslib.explorer.panels import caption_html, encode, set_options
from ramslib.explorer.validation import CLASSES, PAGE, CachedValidation
from ramslib.plots import CMAP, clean_class_name
from ramslib.runs.photos import find_images

ALL = "all"
SHOWN = 300  # names in the list of images; more are found by filter and search


class ImageBrowser(widgets.VBox):
    """Chooses an image of the dataset, a folder or an upload, and calls ``pick(row)``.

    A row is one of a dataset's table; images from elsewhere have label -1 and no box. ``guard``
    wraps handlers.
    """

    def __init__(self, pick: Callable[[pd.Series], None], guard: Callable):
        self.pick, self.quiet = pick, False
        self.table = self.shown = _rows_of([])
        self.uploads = tempfile.TemporaryDirectory(prefix="ramslib-")
        self.split, self.class_name = (widgets.Dropdown(description=d) for d in ("split", "class"))
        self.search = widgets.Text(description="search", placeholder="part of a name")
        self.folder = widgets.Text(description="folder", placeholder="path, then Enter")
        self.folder.continuous_update = False
        self.upload = widgets.FileUpload(description="Choose photos", multiple=True)
        self.upload.accept = "image/*"
        self.sources = {
            "dataset": ([self.split, self.class_name, self.search], self._filtered),
            "folder": ([self.folder], self._in_folder),
            "upload": ([self.upload], self._uploaded),
        }
        self.source = widgets.RadioButtons(options=tuple(self.sources), orientation="horizontal")
        self.list, self.count = widgets.Select(rows=14, tooltip="images"), widgets.HTML()
        super().__init__()
        self.add_class("rams-browser")
        for control in (self.source, self.split, self.class_name, self.search, self.folder):
            control.observe(guard(self._update), "value")
        self.upload.observe(guard(self._store_uploads), "value")
        self.list.observe(guard(self._picked), "value")
        self._update()

    def use(self, table: pd.DataFrame) -> None:
        """Browse another dataset; filters and the image are kept where it has them."""
        present = [s for s in ("validation", "test", "train") if (table["split"] == s).any()]
        names = table.drop_duplicates("label").sort_values("label")["class_name"]
        self.table, self.quiet = table, True
        set_options(self.split, [(split, split) for split in (*present, ALL)])
        set_options(self.class_name, [(ALL, ALL), *((clean_class_name(n), n) for n in names)])
        self.quiet = False
        self._update()

    def pick_path(self, path: str) -> None:
        """Pick an image of the dataset by its path."""
        self.pick(self.table[self.table["path"] == path].iloc[0])

    def _update(self, _=None) -> None:
        """List the images of a source, and pick the one before or the first."""
        if self.quiet:
            return
        controls, find = self.sources[self.source.value]
        self.children = [self.source, *controls, self.list, self.count]
        rows = find()
        self.shown, paths = rows.head(SHOWN), rows["path"].head(SHOWN).map(Path)
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            names = ["/".join(path.parts[-2:]) for path in paths]
        more = f", the first {SHOWN} shown" if len(rows) > SHOWN else ""
        self.count.value = caption_html(f"{len(rows):,} images{more}")
        self.quiet = True
        set_options(self.list, list(zip(names, self.shown["path"], strict=True)))
        self.quiet = False
        self._picked()

    def _picked(self, _=None) -> None:
        if self.list.index is not None and not self.quiet:
            self.pick(self.shown.iloc[self.list.index])

    def _filtered(self) -> pd.DataFrame:
        rows = self.table
        for column, menu in (("split", self.split), ("class_name", self.class_name)):
            rows = rows if menu.value == ALL else rows[rows[column] == menu.value]
        names = rows["path"].str.rsplit("/", n=2).str[1:].str.join("/")
        return rows[names.str.contains(self.search.value.strip(), case=False, regex=False)]

    def _in_folder(self) -> pd.DataFrame:
        folder = os.path.expanduser(self.folder.value.strip())
        return _rows_of(find_images([folder]) if folder else [])

    def _store_uploads(self, _) -> None:
        """Write uploads, each to a folder of its own, for two may have one name."""
        for item in reversed(self.upload.value):
            folder = Path(self.uploads.name, f"{len(os.listdir(self.uploads.name)):06}")
            folder.mkdir()
            (folder / Path(item["name"]).name).write_bytes(item["content"])
        self.list.index = None  # the first of them is picked
        self._update()

    def _uploaded(self) -> pd.DataFrame:
        """Newest first."""
        return _rows_of(sorted(Path(self.uploads.name).glob("*/*"), reverse=True))


def _rows_of(paths: Sequence[Path]) -> pd.DataFrame:
    """Rows for images that are in no dataset."""
    table = pd.DataFrame({"path": [str(path) for path in paths]}, dtype=str)
    unknown = dict.fromkeys(BOX_COLUMNS, float("nan"))
    return table.assign(label=-1, class_name="", split="", **unknown)


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
        return list(validation.sort_images(cached))

    def draw(self, order: str) -> None:
        """Show the images in an order."""
        values = validation.sort_images(self.cached)[order]
        names = self.cached.strengths.table.set_index("path")["class_name"].map(clean_class_name)
        captions = [f"{value:.2f}, {html.escape(names[path])}" for path, value in values.items()]
        meaning = f"the number is the {validation.VALUES[order]}" if len(values) else "no images"
        self.images.show(values.index.tolist(), captions, meaning)


class Disagreement(ValidationImages):
    """The images that only one of two models gets right; ``cached`` and ``of`` are of both."""

    of = None

    def options(self, cached: tuple[CachedValidation, CachedValidation]) -> Sequence[str]:
        """Which of the two is right."""
        return list(validation.compare_models(*cached)[1])

    def draw(self, side: str) -> None:
        """Show the images that one of them gets right, and the paired difference."""
        differences, paths = validation.compare_models(*self.cached)
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
        paths = validation.images_of(self.cached, true, predicted, self.menu.value)
        self.images.show(paths, [html.escape(Path(path).name) for path in paths], meaning)
