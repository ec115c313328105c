"""The explorer: see what a model looks at, move the threshold, understand why.

One way through: lens and photo (`lenses`) -> looks (`looking`) -> choice (`controls`) -> regions ->
pictures (`rows`) and explanations (`explaining`). Widgets only: every number is the library's. A
control that moves redraws at once what follows from recorded attention; what needs the model
follows when the controls rest. Bad input is a message on the page, never a traceback.
"""

import html
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
import torch

from ramslib.data.annotations import BOX_COLUMNS, TABLE_COLUMNS
from ramslib.data.datasets import read_table
from ramslib.errors import InputError, one_line
from ramslib.evaluation import probabilities
from ramslib.explorer.browser import ImageBrowser
from ramslib.explorer.components import (
    STYLE,
    BackgroundWorker,
    probability_bars,
    set_options,
    small,
)
from ramslib.explorer.controls import Controls
from ramslib.explorer.lenses import (
    LoadedModel,
    Photo,
    describe_run,
    find_runs,
    open_backbone,
    open_photo,
    open_run,
)
from ramslib.explorer.looking import (
    ProposalSettings,
    RecordedScale,
    choose,
    follow,
    measure,
    photo_boxes,
    run_first_scale,
)
from ramslib.explorer.rows import Row
from ramslib.explorer.tabs import AnalysisTabs
from ramslib.plots.images import top_classes

BACKBONES = ("vit_small_patch14_dinov2",)  # offered beside the runs; any other can be typed
CLASSES = 5  # shown with their probabilities
log = logging.getLogger(__name__)


class Explorer:
    """The page; show it by naming it in a notebook cell.

    Args:
        data: which reader, see `read_table`.
        root: folder of the data set; photos of other folders and uploads work without one.
        out: folder below which finished runs are found and surveys are stored.
        lens: what to look through first: a `LoadedModel`, a run's folder or timm's name of a backbone; the
            newest run of several scales by default, or else a pre-trained backbone.
    """

    def __init__(self, data="diagnostic", root="data/diagnostic", out="runs", lens=None):
        self.out, self.lock, self.seconds = Path(out), threading.RLock(), deque(maxlen=1000)
        self.lens, self.photo, self.seen, self.table = None, None, [], _no_images()
        self.later, self.threads = (
            BackgroundWorker(self.lock, self.complain),
            torch.get_num_threads(),
        )
        self._build()
        self.guard(self._read_table)(data, root)
        self.guard(self._offer_models)(lens)
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
        self.message, self.notice, self.scores = (widgets.HTML() for _ in range(3))
        self.controls = Controls(self.guard(self._moved))
        self.rows = [Row(number, slider) for number, slider in enumerate(self.controls.thresholds)]
        self.browser = ImageBrowser(_no_images(), self._pick, self.guard)
        later = BackgroundWorker(self.lock, self.complain, delay=0)
        parts = self.guard, later, self.out / "explorer", self._moved
        self.tabs = AnalysisTabs(self.guard(self.browser.pick_path), *parts)
        self.stage = widgets.VBox(self.rows)
        main = [self.controls, self.stage, self.scores, self.tabs]
        main = widgets.VBox(main, layout=widgets.Layout(flex="1 1 0", min_width="0"))
        body = widgets.HBox([self.browser, main], layout=widgets.Layout(grid_gap="20px"))
        head = widgets.HBox([self.models, self.other])
        parts = [
            widgets.HTML(f"<style>{STYLE.read_text()}</style>"),
            head,
            self.message,
            body,
            self.notice,
        ]
        self.page = widgets.VBox(parts)
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
        self.say(one_line(error), bad=True)

    def say(self, text: str, bad: bool = False) -> None:
        """Show one line above everything; an empty one takes it away."""
        look = "rams-say bad" if bad else "rams-say"
        line = f'<div class="{look}" role="status">{html.escape(text)}</div>'
        self.message.value = line if text else ""

    def _read_table(self, data: str, root: Path | str) -> None:
        self.table = read_table(data, root)

    def _offer_models(self, first: LoadedModel | str | None) -> None:
        """List the finished runs, newest first, and what is always there; choose the first."""
        options, refused = [], []
        for run in find_runs(self.out):
            try:
                options.append((describe_run(run, self.out), str(run)))
            except InputError as error:
                refused.append(f"not offered: {html.escape(str(error))}")
        options += [(f"{name}, pre-trained, no classes", name) for name in BACKBONES]
        self.notice.value = small("<br>".join(refused))
        set_options(self.models, options)
        known = [value for _, value in options if value == str(first)]
        several = [value for text, value in options if "(1 scale," not in text]
        self.models.value = (known or several)[0]

    def _load(self, model: LoadedModel | str) -> None:
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
        self.tabs.use(model)
        self.say("")
        table = model.table if len(model.table) else self.table
        if photo is None or table is not self.browser.table:
            self.browser.use(table)
        else:
            self._open(photo.path, photo.label, photo.truth[0])

    def _pick(self, row: pd.Series) -> None:
        label = None if row["label"] < 0 else int(row["label"])
        self._open(row["path"], label, row[BOX_COLUMNS].to_numpy(float))

    def _open(self, path: str, label: int | None, truth) -> None:
        """Look at a photo; if it cannot be opened, the one before stays."""
        if self.lens is not None:
            photo = open_photo(self.lens, path, label, truth)
            self.seen, self.photo = [run_first_scale(self.lens, photo)], photo
            self.say("")
            self._moved()

    def _moved(self) -> None:
        """Redraw what the controls say, and start what needs the model."""
        if self.photo is None:
            return
        choice = self.controls.choice()
        self.stage.children = self.rows[: max(1, choice.scales - 1)]
        with _single_thread():
            is_fresh = self._draw(choice)
            explain = self.tabs.update(self.photo, self.seen[0], choice)
        if explain or not is_fresh:
            looks = self.lens, self.photo, self.seen, choice
            self.later(partial(self._catch_up, looks, explain))

    def _draw(self, choice: ProposalSettings) -> bool:
        """Draw all that is known by now; returns whether the last scale is among it."""
        seen, is_fresh = self.seen[:1], True
        boxes = {"scale 1": photo_boxes(self.lens, self.photo, seen[0].boxes)[0].tolist()}
        for row in self.rows[: max(1, choice.scales - 1)]:
            if not is_fresh:
                row.stale()
                continue
            region = choose(self.lens, self.photo, seen[-1], choice, row.number)
            numbers = measure(self.lens, self.photo, region)
            opacity = self.controls.opacity.value
            row.draw(self.lens, self.photo, seen[-1], region, numbers, choice, opacity)
            if choice.scales > 1:
                boxes[f"scale {row.number + 2}"] = [numbers[side] for side in BOX_COLUMNS]
                following = self.seen[len(seen) : len(seen) + 1]
                is_fresh = bool(following) and torch.equal(following[0].view, region.crop)
                seen = seen + following if is_fresh else seen
        self.rows[0].draw_photo(self.photo, boxes)
        self._draw_scores(seen, is_fresh)
        return is_fresh

    def _draw_scores(self, seen: list[RecordedScale], is_fresh: bool) -> None:
        """Class probabilities of the looks that are known."""
        text = "attention only: this backbone has no trained classifier"
        if self.lens.classes:
            shown = self.lens.classes, self.photo.label, CLASSES
            text = probability_bars(
                top_classes(probabilities([one.logits for one in seen]), *shown)
            )
        text += "" if is_fresh else small("computing the next scale …")
        self.scores.value = f'<div class="rams-title">class probabilities</div>{text}'

    def _catch_up(
        self,
        looks: tuple[LoadedModel, Photo, list[RecordedScale], ProposalSettings],
        explain: Callable | None,
    ) -> Iterator[Callable]:
        """Beside the page: run the scales that have changed, then explain."""
        torch.set_num_threads(self.threads)
        seen = follow(*looks)
        yield partial(self._arrived, seen)
        yield from explain() if explain else ()

    def _arrived(self, seen: list[RecordedScale]) -> None:
        self.seen = seen
        self._draw(self.controls.choice())


@contextmanager
def _single_thread() -> Iterator[None]:
    """Small tensors are faster in one thread, above all while the model runs in others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _no_images() -> pd.DataFrame:
    return pd.DataFrame(columns=TABLE_COLUMNS)
