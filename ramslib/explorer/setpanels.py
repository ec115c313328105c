"""The explorer's panels about a whole set of images: thresholds, gallery, confusion matrix."""

import html
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import ipywidgets as widgets
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ramslib.explorer.browsing import Thumbnails
from ramslib.explorer.lenses import Lens
from ramslib.explorer.looking import Choice
from ramslib.explorer.panels import Chart, Later, Panel, offer, small
from ramslib.explorer.survey import (
    ORDERS,
    UNITS,
    Survey,
    accuracy_near,
    confusion,
    effect,
    effect_curve,
    images_of,
    images_to_survey,
    orders_of,
    sort_images,
    stored_survey,
    survey_images,
)
from ramslib.plots.figures import SCORES, plot_threshold
from ramslib.plots.pictures import readable


class SetPanels:
    """Three boxes for tabs, filled from a survey of the lens's validation images.

    Args:
        pick: opens a photo by its path.
        guard: wraps handlers.
        lock: of the page.
        complain: shows an error.
        folder: where surveys are stored.
        thresholds: of the curves.
        refresh: redraws the page when a survey is there.
    """

    titles = ("validation set", "gallery", "confusion")

    def __init__(
        self,
        pick: Callable[[str], None],
        guard: Callable,
        lock: threading.RLock,
        complain: Callable[[Exception], None],
        folder: Path,
        thresholds: tuple[float, ...],
        refresh: Callable[[], None],
    ):
        self.folder, self.thresholds, self.guard = folder, thresholds, guard
        self.refresh = refresh
        self.lens: Lens | None = None
        self.survey: Survey | None = None
        self.chart, self.chart_of, self.filled = None, None, set()
        self.later = Later(lock, complain, delay=0)
        self.start = widgets.Button(description="look at all of them", button_style="primary")
        self.start.layout.width = "200px"
        self.start.on_click(guard(lambda _: self.later(partial(self._look, self.lens))))
        self.state, self.panel = (
            widgets.HTML(),
            Panel("what the threshold of scale 1 does to the set"),
        )
        self.panel.add_class("rams-chart")
        self.order = widgets.Dropdown(description="show", layout=widgets.Layout(width="300px"))
        self.order.observe(guard(lambda _: self._fill_gallery()), "value")
        self.gallery = Thumbnails(pick, guard)
        self.scale = widgets.Dropdown(description="read at", layout=widgets.Layout(width="300px"))
        self.scale.observe(guard(lambda _: self._fill_confusion()), "value")
        self.matrix, self.cell = widgets.GridBox(), Thumbnails(pick, guard)
        self.tabs = [widgets.VBox() for _ in self.titles]

    def use(self, lens: Lens) -> None:
        """Show what is stored about a lens, or offer to look."""
        self.lens, self.survey, self.chart_of = lens, stored_survey(lens, self.folder), None
        self.filled = set()
        images, total = images_to_survey(lens)
        sample = f" (a sample of {total:,})" if total > len(images) else ""
        self.state.value = small(f"{len(images)} images{sample}, not looked at yet")
        self.start.disabled = images.empty
        if self.survey is None:
            for tab in self.tabs:
                tab.children = [self.state, self.start]
            return
        orders = orders_of(lens, self.survey)
        scales = list(dict.fromkeys(self.survey.predictions["scale"]))
        offer(self.order, orders)
        offer(self.scale, scales)
        missing = widgets.HTML(small("the model has no trained classifier"))
        self.tabs[0].children = [self.panel]
        self.tabs[1].children = [self.order, self.gallery]
        confused = [self.scale, self.matrix, self.cell]
        self.tabs[2].children = confused if lens.classes else [missing]

    def _look(self, lens: Lens) -> Iterator[Callable]:
        """Survey the set beside the page."""

        def say(text: str) -> None:
            self.state.value = small(f"{html.escape(text)} …")

        yield partial(setattr, self.start, "disabled", True)
        survey_images(lens, self.folder, say)
        if lens is self.lens:
            yield partial(self.use, lens)
            yield self.refresh

    def show(self, number: int, choice: Choice) -> None:
        """Fill the tab that is looked at, and move its marker."""
        if self.survey is None:
            return
        if number == 0:
            self._show_effect(choice)
        elif number not in self.filled:
            self.filled.add(number)
            (self._fill_gallery if number == 1 else self._fill_confusion)()

    def _show_effect(self, choice: Choice) -> None:
        if choice.strength not in self.survey.strengths.maps:
            text = "stored for the strengths of all heads and blocks only; choose one of those"
            self.panel.show(choice.strength, lambda: (self.chart.picture, text))
            return
        own = self.lens.model.strength, self.lens.model.proposal
        accuracy = self.survey.accuracy if own == (choice.strength, choice.proposal) else None
        if self.chart_of != (choice.strength, choice.proposal):
            self.chart_of = choice.strength, choice.proposal
            curve = effect_curve(self.survey, *self.chart_of, self.thresholds)
            self.chart = Chart(lambda ax: plot_threshold(curve, accuracy=accuracy, ax=ax), 7, 3.4)
        threshold = choice.thresholds[0]
        known = accuracy is not None
        self.panel.show(
            (self.chart, threshold),
            lambda: (self.chart.marked(threshold), say_effect(self.survey, choice, known)),
        )

    def _fill_gallery(self) -> None:
        if 1 not in self.filled or not self.order.value:
            return
        rows = sort_images(self.survey, self.order.value)
        sign = "+" if self.order.value in ORDERS[:2] else ""
        captions = [f"{value:{sign}.2f}" for value in rows["value"]]
        meaning = f"; the number is the {UNITS[self.order.value]}"
        self.gallery.show(rows["path"].tolist(), captions, meaning)

    def _fill_confusion(self) -> None:
        if 2 not in self.filled or not self.scale.value or not self.lens.classes:
            return
        counts = confusion(self.survey, self.scale.value)
        shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        cells = [widgets.HTML()] + [self._heading(label) for label in counts.columns]
        for true in counts.index:
            cells.append(self._heading(true))
            for given in counts.columns:
                cells.append(self._cell_button(true, given, counts, shares))
        template = f"minmax(90px, 160px) repeat({len(counts)}, minmax(30px, 72px))"
        self.matrix.layout = widgets.Layout(grid_template_columns=template, grid_gap="2px")
        for old in self.matrix.children:
            old.close()
        self.matrix.children = cells
        self.cell.explain("rows: true class, columns: predicted class; press a cell for its photos")

    def _heading(self, label: int) -> widgets.HTML:
        name = html.escape(readable(self.lens.classes[label]))
        return widgets.HTML(f'<div class="rams-class" title="{name}">{name}</div>')

    def _cell_button(self, true: int, given: int, counts, shares) -> widgets.Button:
        count, share = counts.loc[true, given], shares.loc[true, given]
        names = [readable(self.lens.classes[label]) for label in (true, given)]
        button = widgets.Button(
            description=str(count or ""),
            tooltip=f"{count} × {names[0]} taken for {names[1]}",
            layout=widgets.Layout(width="auto", height="26px", margin="0", padding="0"),
            disabled=not count,
        )
        button.style.button_color = to_hex(colormaps[SCORES](share)) if count else "#f2f2f2"
        button.style.text_color = "black" if share > 0.55 else "white"
        button.on_click(self.guard(lambda _: self._open_cell(true, given)))
        return button

    def _open_cell(self, true: int, given: int) -> None:
        paths = images_of(self.survey, true, given, self.scale.value)
        self.cell.show(paths, [Path(path).name for path in paths])


def say_effect(survey: Survey, choice: Choice, with_accuracy: bool) -> str:
    """The numbers of one threshold."""
    threshold = choice.thresholds[0]
    found = effect(survey, choice.strength, threshold, choice.proposal)
    words = [f"{100 * found['area']:.0f} % of the image"]
    if "iou" in found:
        words += [f"mean IoU {found['iou']:.2f}", f"IoU above 0.5 in {100 * found['hit']:.0f} %"]
    text = f"threshold {threshold:.2f}, {len(survey.strengths.table)} images: {', '.join(words)}"
    near = accuracy_near(survey, threshold) if with_accuracy else {}
    if near:
        stored = near.pop("threshold")
        scores = ", ".join(f"{name} {value:.1f} %" for name, value in near.items())
        text += f"<br>accuracy (stored at threshold {stored:.2f}): {scores}"
    return text
