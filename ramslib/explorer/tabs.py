"""The explorer's analyses: of one image, and of all validation images."""

import html
from collections.abc import Callable, Iterator
from functools import partial

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from ramslib import plots
from ramslib.explorer import panels, validation
from ramslib.explorer.controls import THRESHOLDS
from ramslib.explorer.gallery import Confusion, Gallery
from ramslib.explorer.panels import Panel, caption_html
from ramslib.inspector import Inspector
from ramslib.model import ProposalSettings
from ramslib.plots.figures import LABELS
from ramslib.runs.inference import LoadedModel

TITLES = ("threshold", "blocks", "validation set", "gallery", "confusion")
BLOCKS = "each in its own brightness: rollouts of the first blocks, or single blocks one by one"
NOT_STORED = "stored: strengths of all heads; choose one, and a proposal that reads no more"
EVALUATE = "Evaluate validation set"


class AnalysisTabs(widgets.Tab):
    """Analyses for an `Explorer`: of its image, and of all validation images of its model.

    The key of a panel is what it explains, and whether it is complete.
    """

    def __init__(self, explorer):
        self.explorer, self.cached, self.effects, self.accuracy = explorer, None, None, None
        guard = partial(explorer.guard, topic="image")
        report = partial(explorer.report, topic="validation")
        self.worker = panels.BackgroundWorker(explorer.lock, report, delay=0)
        self.curve = Panel("What the threshold of scale 1 does to this image", "png")
        self.blocks = Panel("Attention strength, block by block")
        self.effect = Panel("What the threshold of scale 1 does to the validation images", "png")
        pick = explorer.browser.pick_path
        self.gallery, self.confusion = Gallery(pick, guard), Confusion(pick, guard)
        self.state, self.start = widgets.HTML(), widgets.Button(description=EVALUATE)
        self.start.on_click(guard(lambda _: self.worker(self._evaluate(explorer.loaded))))
        self.sets = [widgets.VBox() for _ in TITLES[2:]]
        tabs = [self.curve, self.blocks, *self.sets]
        super().__init__(tabs, titles=TITLES, selected_index=0)
        self.observe(lambda _: explorer.moved(), "selected_index")
        self.add_class("rams-tabs")

    def use(self) -> None:
        """Show what is cached about the explorer's model, or offer to evaluate."""
        loaded = self.explorer.loaded
        self.cached = validation.read_cached_validation(loaded, self.explorer.out / "explorer")
        images, total = validation.validation_images(loaded)
        self.state.value = caption_html(f"{len(images)} of {total:,} images, not evaluated yet")
        self.start.disabled = images.empty
        for tab, part in zip(self.sets, (self.effect, self.gallery, self.confusion), strict=True):
            tab.children = [part] if self.cached else [self.state, self.start]
        for part in (self.gallery, self.confusion) if self.cached else ():
            part.use(loaded.classes, self.cached)

    def _evaluate(self, loaded: LoadedModel) -> Iterator[Callable]:
        """Evaluate the validation images in the background."""

        def log(text: str) -> None:
            self.state.value = caption_html(f"{html.escape(text)} …")

        self.start.disabled = True
        try:
            validation.predict_validation(loaded, self.explorer.out / "explorer", log)
        finally:
            self.start.disabled = False
        if loaded is self.explorer.loaded:
            yield self.explorer.guard(self.use, "validation")
            yield self.explorer.moved

    def update(self, inspector: Inspector, settings: ProposalSettings) -> Iterator | None:
        """Bring the tab in front up to date, as far as that is known.

        Returns:
            What remains to be computed, as `BackgroundWorker` takes it, or None.
        """
        tab, functions = TITLES[self.selected_index], settings.functions
        self.curve.mark(settings.threshold(0))
        self.effect.mark(settings.threshold(0))
        if tab == "threshold":
            key = inspector, functions, settings.from_high_res, settings.upsampling
            return _missing(self.curve, key, self._draw_curve(key, inspector, settings))
        if tab == "blocks":
            key = inspector, functions[0]
            return _missing(self.blocks, key, self._draw_blocks(key, inspector, settings))
        if self.cached is None:
            return None
        if tab != "validation set":
            return (self.gallery if tab == "gallery" else self.confusion).fill()
        if not validation.has_effect(self.cached, settings):
            return self.effect.outdated(True, NOT_STORED)
        key = self.cached, functions, settings.upsampling
        work = _missing(self.effect, key, self._draw_effect(key, self.cached, settings))
        return work or self._note_effect(settings)

    def _draw_curve(self, key, inspector: Inspector, settings: ProposalSettings) -> Iterator:
        """The threshold curve of an image; then with probabilities, which take longer."""
        curve, chances = inspector.threshold_curve(THRESHOLDS, settings), []
        note = (
            "computing the probability of the true class …" if self.explorer.loaded.classes else ""
        )
        drawn = draw_curve(curve, note)
        yield partial(self.curve.show, (key, not note), lambda: drawn)
        if note:
            for chance in inspector.probability_curve(THRESHOLDS, settings):
                chances.append(chance)
                yield _step
            curve["probability"] = chances
            full = draw_curve(curve)
            yield partial(self.curve.show, (key, True), lambda: full)

    def _draw_blocks(self, key, inspector: Inspector, settings: ProposalSettings) -> Iterator:
        maps = inspector.strength_per_block(settings)
        rows = -(-len(maps) // 6)

        def draw(figure: Figure) -> None:
            axes = figure.subplots(rows, 6, squeeze=False).flat
            plots.plot_strength_per_block(maps, inspector.pixels, axes=axes)

        drawn = panels.draw_figure(draw, 9, 1.75 * rows), BLOCKS
        yield partial(self.blocks.show, (key, True), lambda: drawn)

    def _draw_effect(self, key, cached, settings: ProposalSettings) -> Iterator:
        rows = []
        for threshold in THRESHOLDS:
            rows.append(validation.threshold_effect(cached, settings, [threshold]))
            yield _step
        self.effects = pd.concat(rows, ignore_index=True)
        is_own = settings.functions == self.explorer.loaded.model.settings.functions
        self.accuracy = cached.accuracy if is_own and len(cached.accuracy) else None
        drawn = draw_curve(self.effects, accuracy=self.accuracy)
        yield partial(self.effect.show, (key, True), lambda: drawn)
        yield partial(self._note_effect, settings)

    def _note_effect(self, settings: ProposalSettings) -> None:
        """The numbers of one threshold, below the curve of the validation images."""
        eta = settings.threshold(0)
        row = self.effects.iloc[(self.effects["threshold"] - eta).abs().argmin()].drop("threshold")
        values = ", ".join(f"{value:.2f} {LABELS[name]}" for name, value in row.items())
        text = f"threshold {eta:.2f}, {len(self.cached.strengths.table)} images: {values}"
        if self.accuracy is not None:
            near = validation.nearest_stored_accuracy(self.cached, eta)
            scores = ", ".join(f"{each.output} {each.top1:.1f}%" for each in near.itertuples())
            text += f"<br>accuracy (stored at threshold {near['threshold'].max():.2f}): {scores}"
        self.effect.text = text
        self.effect.outdated(False)


def _missing(panel: Panel, key: tuple, work: Iterator) -> Iterator | None:
    """Dim a panel that shows something else; returns the work if it lacks something."""
    shown, is_complete = panel.key or (None, False)
    panel.outdated(shown != key)
    return None if shown == key and is_complete else work


def draw_curve(curve: pd.DataFrame, note: str = "", **options) -> panels.Drawing:
    """A chart of shares over thresholds, at the place where `Panel.mark` expects it.

    Slow: called without the lock.
    """

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")
        axes = plots.plot_threshold(curve, ax=figure.add_axes(panels.CHART), **options)
        axes.set_xlim(0, panels.TOP)

    return panels.draw_figure(draw, 7, 3.2), note


def _step() -> None:
    """Between two steps of long work: `BackgroundWorker` may abandon it here."""
