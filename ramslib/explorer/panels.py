"""Small pieces of the explorer's page: pictures, bars and charts as widgets, and work beside them.

Nothing here knows what it shows.
"""

import html
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ramslib.plots.pictures import styled, view_colour

PANEL = 448  # pixels of the longer side of a picture on the page; shown at half of it or less
STYLE = """<style>
.rams {font-family: var(--jp-ui-font-family, system-ui, sans-serif); line-height: 1.35}
.rams .widget-html-content {line-height: 1.35}
.rams-title {font-weight: 600; font-size: 13px; color: var(--jp-ui-font-color1, #222)}
.rams-note {font-size: 12px; color: var(--jp-ui-font-color2, #555);
  font-variant-numeric: tabular-nums}
.rams-say {font-size: 13px; padding: 5px 10px; border-radius: 4px; background: #eef3f8; color: #123}
.rams-say.bad {background: #fdeeda; color: #5c3300; border-left: 4px solid #d55e00}
.rams-panel .rams-note {min-height: 33px}
.rams-chart {max-width: 760px}
.rams-panel img {width: 100%; border-radius: 3px; display: block}
.rams-stale img {opacity: 0.4; transition: opacity 0.15s 0.2s}
.rams-thumb {background-size: cover; background-position: center; border-radius: 3px}
.rams-thumb:focus, .rams-thumb:hover {outline: 3px solid #0072b2; outline-offset: 1px}
.rams-cards {display: flex; flex-wrap: wrap; gap: 6px 26px; font-size: 12px; margin: 4px 0;
  font-variant-numeric: tabular-nums}
.rams-cards b {font-weight: 500}
.rams-mark {display: inline-block; width: 8px; height: 8px; border: 2px solid;
  outline: 1px solid #444; margin: 0 5px -1px 2px}
.rams-scale {display: inline-block; width: 90px; height: 9px; border-radius: 2px; margin: 0 4px}
.rams-class {font-size: 11px; line-height: 1.1; overflow: hidden; text-overflow: ellipsis;
  overflow-wrap: anywhere; max-height: 37px}
.rams-bar {display: inline-block; height: 10px; border-radius: 2px; margin-right: 6px}
</style>"""


def jpeg(picture: Image.Image, quality: int = 88) -> bytes:
    """A picture as the bytes of a JPEG without colour subsampling: fast, and sharp lines."""
    data = io.BytesIO()
    picture.save(data, "jpeg", quality=quality, subsampling=0)
    return data.getvalue()


def fit(picture: Image.Image, side: int = PANEL) -> Image.Image:
    """The picture with its longer side so many pixels long."""
    factor = side / max(picture.size)
    size = [max(1, round(length * factor)) for length in picture.size]
    return picture.resize(size, Image.Resampling.BILINEAR)


class Panel(widgets.VBox):
    """A picture with a title above and a note below; drawn only when what it shows has changed."""

    def __init__(self, title: str = ""):
        self.title, self.note = widgets.HTML(), widgets.HTML()
        self.image = widgets.Image(format="jpeg", layout=widgets.Layout(display="none"))
        self.key, self.text, self.is_stale = None, "", False
        super().__init__([self.title, self.image, self.note])
        self.add_class("rams-panel")
        self.name(title)

    def name(self, title: str) -> None:
        """Change the title."""
        self.title.value = f'<div class="rams-title">{html.escape(title)}</div>'

    def show(self, key: object, draw: Callable[[], tuple[Image.Image, str]]) -> None:
        """Show picture and note that ``draw()`` gives, unless ``key`` is that of what is shown."""
        if self.key != key:
            self.key = key
            picture, self.text = draw()
            self.image.value = jpeg(picture)
            self.image.layout.display = None
            self._write(self.text)
        if self.is_stale:
            self.stale(False)

    def stale(self, is_stale: bool) -> None:
        """Dim the picture, and say so, while a newer one is computed."""
        if is_stale != self.is_stale:
            self.is_stale = is_stale
            (self.add_class if is_stale else self.remove_class)("rams-stale")
            self._write("computing …" if is_stale else self.text)

    def _write(self, text: str) -> None:
        self.note.value = small(text)


def offer(menu: widgets.Widget, options) -> None:
    """Give a menu or list new options and choose the first."""
    menu.index = None
    menu.options = tuple(options)
    menu.index = 0 if menu.options else None


def small(text: str) -> str:
    """HTML as small text."""
    return f'<div class="rams-note">{text}</div>'


def bars(table: pd.DataFrame) -> str:
    """Class probabilities as HTML, a card of bars per class.

    Args:
        table: ``class, view, probability``, see `stories.top_classes`.
    """
    cards = []
    for name, group in table.groupby("class", sort=False):
        lines = [
            f"<div>{_bar(view_colour(row.view), round(90 * row.probability))}"
            f"{row.probability:.3f}</div>"
            for row in group.itertuples()
        ]
        cards.append(f"<div><b>{html.escape(str(name))}</b>{''.join(lines)}</div>")
    views = dict.fromkeys(table["view"])
    legend = " &ensp; ".join(f"{_bar(view_colour(view), 10)}{view}" for view in views)
    return f"<div class='rams-cards'>{''.join(cards)}</div>{small(legend)}"


def _bar(colour: str, width: int) -> str:
    return f'<span class="rams-bar" style="width:{max(1, width)}px; background:{colour}"></span>'


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


class Chart:
    """A drawn chart on which a marker moves along the horizontal axis, without drawing it anew."""

    def __init__(self, draw: Callable, width: float = 5.6, height: float = 3.2):
        axes, self.picture = draw_figure(lambda axes: draw(axes[0]), width, height)
        self.axes = axes[0, 0]

    def marked(self, x: float) -> Image.Image:
        """The picture with a vertical line at ``x``."""
        corners = self.axes.transAxes.transform([(0, 0), (1, 1)])
        (left, bottom), (right, top) = corners
        column = min(max(self.axes.transData.transform((x, 0))[0], left), right)
        picture = self.picture.copy()
        line = (column, picture.height - top, column, picture.height - bottom)
        ImageDraw.Draw(picture).line(line, fill="#222222", width=3)
        return picture


class Later:
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

    def settle(self) -> None:
        """Wait until all work is done."""
        while self.last is not None and not self.last.done():
            self.last.result()
