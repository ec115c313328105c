"""Photos to press: pages of thumbnails, the surveyed photos in an order, a confusion matrix."""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ramslib.data.transforms import open_image
from ramslib.errors import InputError
from ramslib.evaluation import confusion_matrix
from ramslib.explorer import validation as validations
from ramslib.explorer.components import encode, set_options, small
from ramslib.explorer.lenses import LoadedModel
from ramslib.explorer.validation import CachedValidation
from ramslib.plots.drawing import clean_class_name
from ramslib.plots.figures import CMAP

PAGE = 18  # thumbnails at once
CLASSES = 12  # in the confusion matrix


class Thumbnails(widgets.VBox):
    """Pages of photos as buttons, which a keyboard reaches too; ``pick(path)`` when pressed."""

    count = 0  # of instances, so that each has its own styles

    def __init__(self, pick: Callable[[str], None], guard: Callable):
        Thumbnails.count += 1
        self.mark, self.pick = f"rams-{Thumbnails.count}", pick
        self.paths, self.captions, self.meaning, self.page = [], [], "", 0
        self.cells = [self._cell(number, guard) for number in range(PAGE)]
        self.pictures, self.place = widgets.HTML(), widgets.HTML()
        layout = widgets.Layout(flex_flow="row wrap", grid_gap="8px", margin="6px 0")
        self.grid = widgets.Box(layout=layout)
        self.back, self.ahead = (widgets.Button(description=d) for d in ("previous", "next"))
        self.back.on_click(guard(lambda _: self._turn(-1)))
        self.ahead.on_click(guard(lambda _: self._turn(1)))
        self.turning = widgets.HBox([self.back, self.ahead])
        super().__init__([self.pictures, self.grid, self.turning, self.place])
        self.show([], [])

    def show(self, paths: Sequence[str], captions: Sequence[str], meaning: str = "") -> None:
        """Show these photos from the first page on; ``meaning`` explains what they are."""
        self.paths, self.captions, self.meaning, self.page = paths, captions, meaning, 0
        self._turn(0)

    def _turn(self, step: int) -> None:
        """Show another page."""
        pages = max(1, -(-len(self.paths) // PAGE))
        self.page = min(max(self.page + step, 0), pages - 1)
        part = slice(self.page * PAGE, (self.page + 1) * PAGE)
        shown = self.paths[part]
        styles = [self._style(number, path) for number, path in enumerate(shown)]
        self.pictures.value = f"<style>{''.join(styles)}</style>"
        for cell, path, text in zip(self.cells, shown, self.captions[part], strict=False):
            cell.children[0].tooltip = f"open {Path(path).name}"
            cell.children[1].value = small(text)
        self.grid.children = self.cells[: len(shown)]
        place = f"{len(self.paths)} photos, page {self.page + 1} of {pages}; " if shown else ""
        self.place.value = small(f"{place}{self.meaning}")
        self.back.disabled, self.ahead.disabled = self.page == 0, self.page == pages - 1
        self.turning.layout.display = None if pages > 1 else "none"

    def _style(self, number: int, path: str) -> str:
        """The rule that puts a photo behind its button; none for one that cannot be read."""
        try:
            picture = open_image(path, 200)
        except InputError:
            return f".{self.mark}-{number}{{background-image:none}}"
        picture.thumbnail((240, 180))
        data = base64.b64encode(encode(picture, quality=75)).decode()
        return f".{self.mark}-{number}{{background-image:url(data:image/jpeg;base64,{data})}}"

    def _cell(self, number: int, guard: Callable) -> widgets.Widget:
        button = widgets.Button(layout=widgets.Layout(width="132px", height="99px", margin="0"))
        button.add_class("rams-thumb")
        button.add_class(f"{self.mark}-{number}")
        button.on_click(guard(lambda _: self.pick(self.paths[self.page * PAGE + number])))
        return widgets.VBox([button, widgets.HTML()], layout=widgets.Layout(width="132px"))


class Surveyed(widgets.VBox):
    """A menu about a survey, and the photos that it leads to; filled when first looked at."""

    def __init__(self, description: str, pick: Callable[[str], None], guard: Callable):
        style, layout = {"description_width": "initial"}, widgets.Layout(width="300px")
        self.menu = widgets.Dropdown(description=description, style=style, layout=layout)
        self.photos, self.guard = Thumbnails(pick, guard), guard
        self.lens, self.survey, self.shown = None, None, None
        self.menu.observe(guard(lambda _: self.fill()), "value")
        super().__init__([self.menu, self.photos])

    def use(self, lens: LoadedModel, survey: CachedValidation) -> None:
        """Offer what another survey can tell."""
        self.lens, self.survey = lens, None
        self.photos.show([], [], "the model has no trained classifier")
        set_options(self.menu, self._options(lens, survey))
        self.survey = survey

    def fill(self) -> None:
        """Show what the menu says, if it is not there yet."""
        wanted = self.survey, self.menu.value
        if None not in (self.survey, self.menu.value) and self.shown != wanted:
            self.shown = wanted
            self._draw(self.menu.value)


class Gallery(Surveyed):
    """The surveyed photos in one of the orders of `survey.ORDERS`."""

    def _options(self, lens: LoadedModel, survey: CachedValidation) -> list[str]:
        return validations.orders_of(lens, survey)

    def _draw(self, order: str) -> None:
        rows = validations.sort_images(self.survey, order)
        names = (
            self.lens.table.set_index("path")["class_name"].map(clean_class_name).map(html.escape)
        )
        form = "{:+.2f}, {}" if validations.UNITS[order] == validations.CHANGE else "{:.2f}, {}"
        captions = [form.format(row.value, names[row.path]) for row in rows.itertuples()]
        meaning = f"the number is the {validations.UNITS[order]}"
        self.photos.show(rows["path"].tolist(), captions, meaning)


class Confusion(Surveyed):
    """Surveyed photos by true and predicted class; a cell opens its photos."""

    def __init__(self, description: str, pick: Callable[[str], None], guard: Callable):
        super().__init__(description, pick, guard)
        self.matrix = widgets.GridBox()
        self.children = [self.menu, self.matrix, self.photos]

    def _options(self, lens: LoadedModel, survey: CachedValidation) -> list[str]:
        self.matrix.children = []
        return list(dict.fromkeys(survey.predictions["output"])) if lens.classes else []

    def _draw(self, scale: str) -> None:
        classes = len(self.lens.classes)
        counts = confusion_matrix(self.survey.predictions, classes, scale, CLASSES)
        shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        cells = [widgets.HTML(small("true ↓ predicted →")), *map(self._heading, counts)]
        for true, row in counts.iterrows():
            found = (self._cell(true, given, row[given], shares[given][true]) for given in counts)
            cells += [self._heading(true), *found]
        template = f"minmax(90px, 160px) repeat({len(counts)}, minmax(30px, 72px))"
        self.matrix.layout = widgets.Layout(grid_template_columns=template, grid_gap="2px")
        for old in self.matrix.children:
            old.close()
        self.matrix.children = cells
        some = f"; of {classes} classes those with most mistakes" if classes > CLASSES else ""
        self.photos.show([], [], f"press a cell for its photos; color: share of its row{some}")

    def _heading(self, label: int) -> widgets.HTML:
        name = html.escape(clean_class_name(self.lens.classes[label]))
        return widgets.HTML(f'<div class="rams-class" title="{name}">{name}</div>')

    def _cell(self, true: int, given: int, count: int, share: float) -> widgets.Button:
        names = [clean_class_name(self.lens.classes[label]) for label in (true, given)]
        button = widgets.Button(
            description=str(count or ""),
            tooltip=f"{count} × {names[0]} taken for {names[1]}",
            layout=widgets.Layout(width="auto", height="26px", margin="0", padding="0"),
            disabled=not count,
        )
        button.style.button_color = to_hex(colormaps[CMAP](share)) if count else "#f2f2f2"
        button.style.text_color = "black" if share > 0.55 else "white"
        button.on_click(self.guard(lambda _: self._open(true, given, button.tooltip)))
        return button

    def _open(self, true: int, given: int, meaning: str) -> None:
        paths = validations.images_of(self.survey, true, given, self.menu.value)
        names = [html.escape(Path(path).name) for path in paths]
        self.photos.show(paths, names, html.escape(meaning))
