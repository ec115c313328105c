"""Small pieces of the explorer's page: pictures, probability_bars and charts as widgets, and work beside them.

Nothing here knows what it shows.
"""

import html
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ramslib.plots.drawing import output_color, styled

PANEL = 420  # pixels of the longer side of a picture on the page; shown at two thirds of it or less
STYLE = Path(__file__).with_name("style.css")


def encode(picture: Image.Image, form: str = "jpeg", quality: int = 88) -> bytes:
    """A picture as bytes; JPEGs without color subsampling: fast, and sharp lines."""
    data = io.BytesIO()
    picture.save(data, form, quality=quality, subsampling=0)
    return data.getvalue()


def fit(picture: Image.Image, side: int = PANEL) -> Image.Image:
    """The picture with its longer side so many pixels long."""
    factor = side / max(picture.size)
    size = [max(1, round(length * factor)) for length in picture.size]
    return picture.resize(size, Image.Resampling.BILINEAR)


class Panel(widgets.VBox):
    """A picture with a title above and a note below; drawn only when what it shows has changed."""

    form = "jpeg"

    def __init__(self, title: str = ""):
        self.title = widgets.HTML(f'<div class="rams-title">{html.escape(title)}</div>')
        self.note = widgets.HTML()
        self.image = widgets.Image(format=self.form, layout=widgets.Layout(display="none"))
        self.key, self.text, self.is_stale = None, "", False
        super().__init__([self.title, self.image, self.note])
        self.add_class("rams-panel")

    def show(self, key: object, draw: Callable[[], tuple[Image.Image, str]]) -> None:
        """Show picture and note that ``draw()`` gives, unless ``key`` is that of what is shown."""
        if self.key != key:
            self.key = key
            picture, text = draw()
            self.image.value = encode(picture, self.form)
            self.image.layout.display = None
            self.say(text)
        self.stale(False)

    def say(self, text: str) -> None:
        """Change the note."""
        self.text = text
        self.note.value = small(text)

    def stale(self, is_stale: bool, why: str = "computing …") -> None:
        """Dim the picture, and say why, while it is not of what the controls say."""
        if is_stale != self.is_stale:
            self.is_stale = is_stale
            (self.add_class if is_stale else self.remove_class)("rams-stale")
        self.note.value = small(why if is_stale else self.text)


class Chart(Panel):
    """A drawn chart on which a marker moves along the horizontal axis, without drawing it anew."""

    form = "png"

    def __init__(self, title: str = ""):
        super().__init__(title)
        self.axes, self.x, self.marker = None, 0.0, widgets.HTML()
        plot = widgets.Box([self.image, self.marker])
        plot.add_class("rams-plot")
        self.children = [self.title, plot, self.note]
        self.add_class("rams-chart")

    def draw(self, key: object, draw: Callable[[Axes], object], text="") -> Callable[[], None]:
        """Let ``draw(ax)`` draw a chart; returns what shows it, to be called under the lock."""
        axes, picture = draw_figure(lambda axes: draw(axes[0]), 7, 3.2)

        def change_page() -> None:
            self.axes = axes[0, 0]
            self.show(key, lambda: (picture, text))
            self.mark(self.x)

        return change_page

    def mark(self, x: float) -> None:
        """Put a vertical line at ``x``."""
        self.x = x
        if self.axes is not None:
            low, high = self.axes.get_xlim()
            left, bottom, width, height = self.axes.get_position().bounds
            left += width * min(max((x - low) / (high - low), 0), 1)
            place = {"left": left, "top": 1 - bottom - height, "height": height}
            style = "; ".join(f"{name}: {100 * value:.2f}%" for name, value in place.items())
            self.marker.value = f'<div class="rams-marker" style="{style}"></div>'


@styled
def draw_figure(draw: Callable, width: float, height: float, rows: int = 1, columns: int = 1):
    """Let ``draw(axes)`` draw on (rows, columns) Axes; gives them and the drawn picture.

    No pyplot: it may be called beside the page, and nothing stays open.
    """
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    draw(axes.flat)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return axes, Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def set_options(menu: widgets.Widget, options) -> None:
    """Give a menu or list new options and choose the first."""
    menu.index = None
    menu.options = tuple(options)
    menu.index = 0 if menu.options else None


def small(text: str) -> str:
    """HTML as small text."""
    return f'<div class="rams-note">{text}</div>'


def probability_bars(table: pd.DataFrame) -> str:
    """Class probabilities as HTML, a card of probability_bars per class.

    Args:
        table: a row per class and a column per output, see `plots.images.top_classes`.
    """
    cards = []
    for name, row in table.iterrows():
        lines = [
            f"<div>{_bar(output_color(output), round(90 * probability))}{probability:.3f}</div>"
            for output, probability in row.items()
        ]
        cards.append(f"<div><b>{html.escape(str(name))}</b>{''.join(lines)}</div>")
    legend = " &ensp; ".join(f"{_bar(output_color(output), 10)}{output}" for output in table)
    return f"<div class='rams-cards'>{''.join(cards)}</div>{small(legend)}"


def _bar(color: str, width: int) -> str:
    return f'<span class="rams-bar" style="width:{max(1, width)}px; background:{color}"></span>'


class BackgroundWorker:
    """Slow work beside the page: it starts when controls rest, and newer work replaces older.

    Work is a function that yields functions which change the page; they are called under ``lock``,
    the work between them is not. It is abandoned at the next yield as soon as newer work is there.
    """

    def __init__(self, lock: threading.RLock, complain: Callable[[Exception], None], delay=0.15):
        self.lock, self.complain, self.delay, self.ticket = lock, complain, delay, 0
        self.worker, self.last = ThreadPoolExecutor(1), None

    def __call__(self, work: Callable[[], Iterator[Callable]]) -> None:
        """Do this work when no other has come for ``delay`` seconds."""
        self.ticket += 1
        self.last = self.worker.submit(self._work, self.ticket, work)

    def _work(self, ticket: int, work: Callable[[], Iterator[Callable]]) -> None:
        if ticket == self.ticket:
            time.sleep(self.delay)
        try:
            for change_page in work() if ticket == self.ticket else ():
                with self.lock:
                    if ticket != self.ticket:
                        return
                    change_page()
        except Exception as error:
            self.complain(error)

    def wait(self) -> None:
        """Wait until all work is done."""
        while self.last is not None and not self.last.done():
            self.last.result()
