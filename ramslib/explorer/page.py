"""The explorer: see what a model looks at, move the threshold, understand why.

Widgets only: every number and picture comes from `looking`, `survey` and `pictures`. A control that
moves redraws at once what follows from recorded attention; what needs the model (next scales,
curves) follows when the controls rest. Bad input is a message on the page, never a traceback.
"""

import html
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from PIL import Image

from ramslib.data.annotations import TABLE_COLUMNS
from ramslib.data.datasets import load_table
from ramslib.errors import InputError
from ramslib.evaluation import BOX
from ramslib.explorer.browsing import Browser
from ramslib.explorer.controls import TOP, Controls
from ramslib.explorer.lenses import (
    Lens,
    Photo,
    describe_run,
    find_runs,
    open_backbone,
    open_photo,
    open_run,
)
from ramslib.explorer.looking import (
    Choice,
    Seen,
    build_up,
    choose,
    first_look,
    follow,
    measure,
    photo_boxes,
    probabilities,
    probability_curve,
    single_thread,
    threshold_curve,
)
from ramslib.explorer.panels import STYLE, Chart, Later, Panel, bars, offer, small
from ramslib.explorer.rows import Row, build_up_picture, threshold_chart
from ramslib.explorer.setpanels import SetPanels
from ramslib.plots.stories import top_classes

BACKBONES = ("vit_small_patch14_dinov2",)  # offered beside the runs; any other can be typed
CURVE = tuple(np.linspace(0, TOP, 41).round(3).tolist())
EXPLAINING = (0, 1)  # the tabs that explain this photo
CLASSES = 5  # shown with their probabilities
BLOCKS = "each in its own brightness: rollouts of the first blocks, or single blocks one by one"
log = logging.getLogger(__name__)


class Explorer:
    """The page; show it by naming it in a notebook cell.

    Args:
        data: which reader, see `load_table`.
        root: folder of the data set; photos of other folders and uploads work without one.
        out: folder below which finished runs are found and surveys are stored.
        lens: what to look through first; the newest run of several scales by default, or else a
            pre-trained backbone.
    """

    def __init__(self, data="diagnostic", root="data/diagnostic", out="runs", lens=None):
        self.out, self.lock, self.seconds = Path(out), threading.RLock(), deque(maxlen=1000)
        self.lens, self.photo, self.seen = None, None, []
        self.chart, self.chart_of = None, None
        self.shown = [None, None]  # what each of the first two tabs explains, once it is whole
        self.later, self.threads = Later(self.lock, self.complain), torch.get_num_threads()
        self._build()
        self.table = _no_images()
        self.guard(self._read_table)(data, root)
        self.guard(self._offer_models)()
        self.guard(self._load)(lens or self.models.value)
        for chooser in (self.models, self.other):
            chooser.observe(self.guard(lambda change: self._load(change["new"])), "value")

    def _repr_mimebundle_(self, **options):
        return self.page._repr_mimebundle_(**options)

    def _build(self) -> None:
        """Make the page."""
        wide = {"layout": widgets.Layout(width="auto", flex="1 1 320px")}
        self.models = widgets.Dropdown(description="model", **wide)
        hint = "or a run's folder, or timm's name of a Vision Transformer; then Enter"
        self.other = widgets.Text(placeholder=hint, continuous_update=False, **wide)
        self.message, self.scores = widgets.HTML(), widgets.HTML()
        self.controls = Controls(self.guard(self._moved))
        self.rows = [Row(number, slider) for number, slider in enumerate(self.controls.thresholds)]
        self.browser = Browser(_no_images(), self._pick, self.guard)
        parts = self.guard, self.lock, self.complain, self.out / "explorer", CURVE, self._moved
        self.set = SetPanels(self.guard(self.browser.pick_path), *parts)
        self.curve, self.blocks = Panel("the threshold of scale 1"), Panel("the strength by block")
        self.curve.add_class("rams-chart")
        self.tabs = widgets.Tab([self.curve, self.blocks, *self.set.tabs])
        for number, title in enumerate(("threshold", "blocks", *self.set.titles)):
            self.tabs.set_title(number, title)
        self.tabs.observe(self.guard(lambda _: self._moved()), "selected_index")
        self.stage = widgets.VBox(self.rows)
        main = [self.controls, self.stage, self.scores, self.tabs]
        main = widgets.VBox(main, layout=widgets.Layout(flex="1 1 0", min_width="0"))
        body = widgets.HBox([self.browser, main], layout=widgets.Layout(grid_gap="20px"))
        head = widgets.HBox([self.models, self.other])
        self.page = widgets.VBox([widgets.HTML(STYLE), head, self.message, body])
        self.page.add_class("rams")

    def guard(self, handler: Callable) -> Callable:
        """The handler, one at a time, timed, its errors shown as messages."""

        def guarded(*arguments):
            start = time.perf_counter()
            with self.lock:
                try:
                    handler(*arguments)
                except Exception as error:
                    self.complain(error)
            self.seconds.append(time.perf_counter() - start)

        return guarded

    def complain(self, error: Exception) -> None:
        """Show an error as a message."""
        log.debug("in the explorer", exc_info=error)
        name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        self.say(f"{name}{error}", bad=True)

    def say(self, text: str, bad: bool = False) -> None:
        """Show one line above everything; an empty one takes it away."""
        look = "rams-say bad" if bad else "rams-say"
        line = f'<div class="{look}" role="status">{html.escape(text)}</div>'
        self.message.value = line if text else ""

    def _read_table(self, data: str, root: Path | str) -> None:
        self.table = load_table(data, root)

    def _offer_models(self) -> None:
        """List the finished runs, newest first, and what is always there."""
        runs = find_runs(self.out)
        options = [(describe_run(run, self.out), str(run)) for run in runs]
        options += [(f"{name}, pre-trained, no classes", name) for name in BACKBONES]
        offer(self.models, options)
        self.models.value = next(value for text, value in options if "(1 scale," not in text)

    def _load(self, model: Lens | str) -> None:
        """Look through a run, by its folder, or a backbone, by its timm name."""
        if not model:
            return
        if isinstance(model, str):
            name = model.strip()
            self.say(f"loading {name} …")
            is_run = Path(name).is_dir() or "/" in name
            model = open_run(name) if is_run else open_backbone(name, self.table)
        photo, self.photo, self.lens = self.photo, None, model
        self.models.tooltip = model.origin
        self.controls.fit(model)
        self.set.use(model)
        self.say("")
        table = model.table if len(model.table) else self.table
        if photo is None or table is not self.browser.table:
            self.browser.use(table)
        else:
            self._open(photo.path, photo.label, photo.truth[0])

    def _pick(self, row: pd.Series) -> None:
        label = None if row["label"] < 0 else int(row["label"])
        self._open(row["path"], label, row[BOX].to_numpy(float))

    def _open(self, path: str, label: int | None, truth) -> None:
        """Look at a photo; if it cannot be opened, the one before stays."""
        if self.lens is not None:
            photo = open_photo(self.lens, path, label, truth)
            self.seen, self.photo = [first_look(self.lens, photo)], photo
            self.say("")
            self._moved()

    def _moved(self) -> None:
        """Redraw what the controls say, and start what needs the model."""
        if self.photo is None:
            return
        choice, tab = self.controls.choice(), self.tabs.selected_index or 0
        self.stage.children = self.rows[: max(1, choice.scales - 1)]
        with single_thread():
            is_fresh = self._draw(choice)
            if tab > 1:
                self.set.show(tab - 2, choice)
        waits = tab in EXPLAINING and self.shown[tab] != self._explains(choice)
        if waits or not is_fresh:
            self.later(partial(self._catch_up, self.lens, self.photo, self.seen, choice))

    def _draw(self, choice: Choice) -> bool:
        """Draw all that is known by now; returns whether the last scale is among it."""
        seen, is_fresh = self.seen[:1], True
        boxes = {"scale 1": photo_boxes(self.lens, self.photo, seen[0].boxes)[0].tolist()}
        for row in self.rows[: max(1, choice.scales - 1)]:
            if not is_fresh:
                row.stale()
                continue
            region = choose(self.lens, self.photo, seen[-1], choice, row.number)
            numbers = measure(self.lens, self.photo, region)
            if choice.scales > 1:
                boxes[f"scale {row.number + 2}"] = [numbers[side] for side in BOX]
            opacity = self.controls.opacity.value
            row.draw(self.lens, self.photo, seen[-1], region, numbers, choice, opacity)
            if choice.scales > 1:
                following = self.seen[len(seen) : len(seen) + 1]
                is_fresh = bool(following) and torch.equal(following[0].view, region.crop)
                seen = seen + following if is_fresh else seen
        self.rows[0].draw_photo(self.photo, boxes)
        self._draw_scores(seen, is_fresh)
        self._draw_marker(choice)
        return is_fresh

    def _draw_scores(self, seen: list[Seen], is_fresh: bool) -> None:
        """Class probabilities of the looks that are known."""
        if not self.lens.classes:
            text = "attention only: this backbone has no trained classifier"
        else:
            views = probabilities(seen)
            views.pop("mean logits", None)
            text = bars(top_classes(views, self.lens.classes, self.photo.label, CLASSES))
        text += "" if is_fresh else small("computing the next scale …")
        self.scores.value = f'<div class="rams-title">class probabilities</div>{text}'

    def _draw_marker(self, choice: Choice) -> None:
        """Move the marker of this photo's threshold curve; dim what explains something else."""
        tab, threshold = self.tabs.selected_index, choice.thresholds[0]
        explains = self._explains(choice)
        if tab == 1:
            self.blocks.stale(self.shown[1] != explains)
        elif tab == 0 and self.chart_of == explains:
            self.curve.show((self.chart, threshold), lambda: (self.chart.marked(threshold), ""))
        elif tab == 0:
            self.curve.stale(True)

    def _explains(self, choice: Choice) -> tuple:
        """What the explaining tabs depend on."""
        read = choice.strength, choice.block, choice.head
        return self.seen[0], *read, choice.proposal, choice.from_source

    def _catch_up(
        self, lens: Lens, photo: Photo, seen: list[Seen], choice: Choice
    ) -> Iterator[Callable]:
        """Beside the page: run the scales that have changed, then explain."""
        torch.set_num_threads(self.threads)
        looks = follow(lens, photo, seen, choice)
        yield partial(self._arrived, looks)
        tab, explains = self.tabs.selected_index, self._explains(choice)
        if tab not in EXPLAINING or explains == self.shown[tab]:
            return
        if tab == 1:
            maps = build_up(lens, looks[0], choice)
            picture = build_up_picture(photo, maps)
            yield partial(self._show_blocks, explains, picture)
        else:
            curve = threshold_curve(lens, photo, looks[0], choice, CURVE)
            is_whole = not lens.classes
            yield partial(self._show_curve, explains, threshold_chart(curve), is_whole)
            if not is_whole:
                values = []
                for value in probability_curve(lens, photo, looks[0], choice, CURVE):
                    values.append(value)
                    yield lambda: None  # newer work may take over here
                curve["probability"] = values
                yield partial(self._show_curve, explains, threshold_chart(curve), True)

    def _arrived(self, looks: list[Seen]) -> None:
        self.seen = looks
        self._draw(self.controls.choice())

    def _show_blocks(self, explains: tuple, picture: Image.Image) -> None:
        self.shown[1] = explains
        self.blocks.show(explains, lambda: (picture, BLOCKS))

    def _show_curve(self, explains: tuple, chart: Chart, is_whole: bool) -> None:
        """Show a threshold curve; one that is not whole yet is asked for again."""
        self.shown[0] = explains if is_whole else None
        self.chart, self.chart_of = chart, explains
        self._draw_marker(self.controls.choice())


def _no_images() -> pd.DataFrame:
    return pd.DataFrame(columns=TABLE_COLUMNS)
