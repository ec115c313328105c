"""The explorer's analyses: of one image, and of all validation images."""

import html
import json
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from ramslib import plots
from ramslib.explorer import panels, validation, views
from ramslib.explorer.gallery import Confusion, Disagreement, Gallery
from ramslib.explorer.panels import THRESHOLDS, Panel, Pointer, caption_html
from ramslib.inspector import Inspector
from ramslib.model import ProposalSettings
from ramslib.plots.images import map_grid
from ramslib.runs.inference import LoadedModel

BLOCKS = "Attention strength, block by block, each in its own brightness"
TOKENS = "What it attends to; of a patch, what is like it, and where the class token differs"
COLORS = "Patch tokens as colors: their principal components"
BY_HAND = "Scale 2 on the proposed box and on yours"
ELSEWHERE = "What scale 2 would have said elsewhere: its box slid over the image, at the centers"
COMPARE = "This model and the other, with the same controls"
SHARED = [("this image alone", 0), ("5 first in the list", 5), ("11 first in the list", 11)]
NOT_STORED = "stored: strengths of all heads; choose one, and a proposal that reads no more"
EVALUATE = "Evaluate validation set"


class ViewTab(widgets.VBox):
    """Views of the explorer's image, for what the tab's own controls say; see `views`.

    Args:
        explorer: its `Explorer`.
        shown: panels by view.
        controls: widgets by the option of the views that they choose; a `Pointer` is one, too.
    """

    def __init__(self, explorer, shown: dict[str, Panel], **controls):
        self.explorer, self.panels, self.controls = explorer, shown, controls
        self.inspector = None
        self.pointer = next((c for c in controls.values() if isinstance(c, Pointer)), None)
        for control in controls.values():
            getattr(control, "field", control).observe(lambda _: explorer.moved(), "value")
        super().__init__([widgets.Box([*controls.values()]), *shown.values()])
        self.add_class("rams-views")

    def options(self) -> dict:
        """What the controls say, by the option's name."""
        read = {name: getattr(c, "read", lambda c=c: c.value) for name, c in self.controls.items()}
        return {name: value() for name, value in read.items()}

    def update(self, inspector: Inspector, settings: ProposalSettings) -> Iterator | None:
        """Dim the panels that show something else; returns the work of drawing them again."""
        if self.pointer:
            self._aim(inspector, settings)
        options, missing = self.options(), {}
        for view, panel in self.panels.items():
            if view == "elsewhere" and not inspector.classes:
                panel.outdated(True, "this backbone has no trained classifier")
                continue
            key = inspector, views.READ.get(view, copy)(settings), json.dumps(options)
            panel.outdated(panel.key != key)
            missing |= {} if panel.key == key else {view: key}
        return self._draw(missing, inspector, settings, options) if missing else None

    def _aim(self, inspector: Inspector, settings: ProposalSettings) -> None:
        """Show the image; of a new one nothing is asked yet but the proposed box, or a name."""
        row, pointer, is_new = self.explorer.rows[0], self.pointer, self.inspector is not inspector
        self.inspector, text = inspector, pointer.field.value
        if pointer.is_box:
            image, size = row.image[1], inspector.size[0].tolist()
            box = inspector.image_boxes(inspector.region(0, settings).boxes[:1])[0].tolist()
            first = ", ".join(f"{side:.0f}" for side in box)
        else:
            image, size = row.base[1], inspector.model.grid
            pointer.field.options = inspector.prefix_tokens
            first = (*pointer.field.options, "0, 0")[0]
            is_new &= not text
        if is_new or not text:
            pointer.field.value = first
        pointer.aim(image, size)

    def _draw(self, missing: dict, inspector, settings, options: dict) -> Iterator[Callable]:
        for view, key in missing.items():
            if view == "elsewhere":
                boxes, probabilities = inspector.sliding_boxes(options["box"]).tolist(), []
                for probability in inspector.true_probabilities(
                    inspector.by_hand(box, settings) for box in boxes
                ):
                    probabilities.append(probability)
                    yield _step
                options = options | {"probabilities": probabilities}
            draw = partial(views.VIEWS[view], inspector, settings, **options)
            drawn = panels.draw_figure(draw, 5, 3), ""
            yield partial(self.panels[view].show, key, partial(tuple, drawn))


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
        self.effect = Panel("What the threshold of scale 1 does to the validation images", "png")
        pick = explorer.browser.pick_path
        self.gallery, self.confusion = Gallery(pick, guard), Confusion(pick, guard)
        self.pair = Disagreement(pick, guard)
        self.state, self.start = widgets.HTML(), widgets.Button(description=EVALUATE)
        self.start.on_click(guard(lambda _: self.worker(self._evaluate())))
        self.sets = {name: widgets.VBox() for name in ("validation set", "gallery", "confusion")}
        self.both = widgets.Button(description="Evaluate both on the validation set")
        self.views = self._build_views()
        other = self.views["compare"].controls["other"]
        self.both.on_click(guard(lambda _: self.worker(self._evaluate(other.value))))
        self.views["compare"].children += (self.both, self.state, self.pair)
        self.named = {
            f"{title}: {name}": getattr(control, "field", control)
            for title, tab in self.views.items()
            for name, control in tab.controls.items()
        }
        tabs = {"threshold": self.curve} | self.views | self.sets
        super().__init__([*tabs.values()], titles=[*tabs])
        self.selected_index = 0
        self.observe(lambda _: explorer.moved(), "selected_index")
        self.add_class("rams-tabs")

    def _build_views(self) -> dict[str, ViewTab]:
        """The tabs of views, by title."""
        make, menu = partial(ViewTab, self.explorer), widgets.Dropdown
        every = Pointer("Every head of the block; a click enlarges one", "png")
        every.field.layout.display = "none"  # the menu of heads is for the keyboard
        every.field.observe(self.explorer.guard(self._enlarge, "image"), "value")
        attention = {"tokens": Panel(TOKENS, "png"), "heads": every}
        asked = {"token": Pointer("Ask a patch, class token or register")}
        asked["block"] = widgets.IntSlider(description="block", min=1)
        images = menu(options=SHARED, description="shared with")
        images.read = lambda: self.explorer.browser.shown["path"].head(images.value).tolist()
        looked = {"by hand": Panel(BY_HAND, "png"), "elsewhere": Panel(ELSEWHERE, "png")}
        return {
            "blocks": make({"blocks": Panel(BLOCKS, "png")}),
            "attention": make(attention, **asked, head=menu(description="head")),
            "colors": make({"colors": Panel(COLORS, "png")}, images=images),
            "by hand": make(looked, box=Pointer("Propose by hand", is_box=True)),
            "compare": make({"compare": Panel(COMPARE, "png")}, other=menu(description="model")),
        }

    def front(self) -> dict[str, dict]:
        """The views of the tab in front with their options; before an evaluation, all scales."""
        title, cached = self.titles[self.selected_index], self.cached
        if title in self.views:
            shown = dict.fromkeys(self.views[title].panels, self.views[title].options())
            if title == "compare" and self._is_paired():
                mine, other = (str(each.folder) for each in self.pair.cached)
                shown["differences"] = {"stored": mine, "other": other}
        elif title == "threshold" or cached is None:
            shown = {"threshold" if title == "threshold" else "recursion": {}}
        elif title == "validation set":
            shown = dict.fromkeys(("all thresholds", "calibration"), {"stored": str(cached.folder)})
            if not validation.has_effect(cached, self.explorer.controls.settings()):
                del shown["all thresholds"]
        else:
            parts = {"gallery": (self.gallery, "order"), "confusion": (self.confusion, "output")}
            part, name = parts[title]
            shown = {title: {"stored": str(cached.folder), name: part.menu.value}}
        lacks = () if self.explorer.loaded.classes else ("elsewhere", "calibration", "confusion")
        return {view: options for view, options in shown.items() if view not in lacks}

    def _is_paired(self) -> bool:
        """Whether the two models that were compared on the validation set are those shown."""
        return self.pair.of == (self.explorer.loaded.key, self.views["compare"].options()["other"])

    def _enlarge(self, change: dict) -> None:
        """Choose the head that was clicked among all heads."""
        head = self.views["attention"].controls["head"]
        row, column = map(int, change["new"].split(","))
        number = row * map_grid(len(head.options) - 1)[1] + column + 1
        head.value = min(number, len(head.options) - 1)

    def _fit(self, loaded: LoadedModel) -> None:
        """Offer what a model has."""
        blocks, controls = loaded.model.backbone.blocks, self.views["attention"].controls
        controls["block"].max = controls["block"].value = len(blocks)
        heads = range(1, blocks[0].attn.num_heads + 1)
        options = [("mean of all", None), *((str(number), number) for number in heads)]
        panels.set_options(controls["head"], options)
        self.views["attention"].panels["heads"].cover(map_grid(len(heads)))
        known, root = self.explorer.models.options, str(self.explorer.root)
        options = [(text, (name, "best", root)) for text, name in known]
        runs = [(text.replace("best", "last"), name) for text, name in known if "/" in name]
        options += [(text, (name, "last", root)) for text, name in runs]
        others = (value for _, value in options if value[0] != self.explorer.model)
        panels.set_options(self.views["compare"].controls["other"], options, next(others, None))
        for tab in self.views.values():
            tab.inspector = None

    def use(self) -> None:
        """Offer what the explorer's model has, and show what is cached about it."""
        self._fit(self.explorer.loaded)
        self._show_cached()

    def _show_cached(self) -> None:
        """Show what is cached about the explorer's model, or offer to evaluate."""
        loaded = self.explorer.loaded
        self.cached = validation.read_cached_validation(loaded, self.explorer.out / "explorer")
        images, total = validation.validation_images(loaded)
        text = caption_html(f"{len(images)} of {total:,} images, not evaluated yet")
        self.state.value = "" if self.cached else text
        self.start.disabled = images.empty
        parts = self.effect, self.gallery, self.confusion
        for tab, part in zip(self.sets.values(), parts, strict=True):
            tab.children = [part] if self.cached else [self.state, self.start]
        for part in (self.gallery, self.confusion) if self.cached else ():
            part.use(loaded.classes, self.cached)

    def _predict(self, loaded: LoadedModel) -> validation.CachedValidation:
        """Predictions of the validation images, stored or new; slow."""

        def log(text: str) -> None:
            self.state.value = caption_html(f"{html.escape(text)} …")

        self.start.disabled = self.both.disabled = True
        try:
            return validation.predict_validation(loaded, self.explorer.out / "explorer", log)
        finally:
            self.start.disabled = self.both.disabled = False
            self.state.value = ""

    def _evaluate(self, other: tuple | None = None) -> Iterator[Callable]:
        """Evaluate the model in the background; and another, to list where the two differ."""
        loaded = self.explorer.loaded
        cached = self._predict(loaded)
        if other:
            both = cached, self._predict(views.load_once(*other))
            yield partial(self.pair.use, loaded.classes, both)
            yield partial(setattr, self.pair, "of", (loaded.key, other))
            yield self.pair.fill
        if loaded is self.explorer.loaded:
            yield self.explorer.guard(self._show_cached, "validation")
            yield self.explorer.moved

    def update(self, inspector: Inspector, settings: ProposalSettings) -> Iterator | None:
        """Bring the tab in front up to date, as far as that is known.

        Returns:
            What remains to be computed, as `BackgroundWorker` takes it, or None.
        """
        tab, functions = self.titles[self.selected_index], settings.functions
        self.curve.mark(settings.threshold(0))
        self.effect.mark(settings.threshold(0))
        if tab == "threshold":
            key = inspector, functions, settings.from_high_res, settings.upsampling
            return _missing(self.curve, key, self._draw_curve(key, inspector, settings))
        if tab == "compare":
            self.pair.layout.display = None if self._is_paired() else "none"
        if tab in self.views:
            return self.views[tab].update(inspector, settings)
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
        curve, probabilities = inspector.threshold_curve(THRESHOLDS, settings), []
        note = "computing the probability of the true class …" * bool(self.explorer.loaded.classes)
        drawn = draw_curve(curve, note)
        yield partial(self.curve.show, (key, not note), lambda: drawn)
        if note:
            proposed = (inspector.changed(settings, threshold=eta) for eta in THRESHOLDS)
            for probability in inspector.true_probabilities(proposed):
                probabilities.append(probability)
                yield _step
            curve["probability"] = probabilities
            full = draw_curve(curve)
            yield partial(self.curve.show, (key, True), lambda: full)

    def _draw_effect(self, key, cached, settings: ProposalSettings) -> Iterator:
        self.effects = validation.threshold_effect(cached, settings, THRESHOLDS)
        is_own = settings.functions == self.explorer.loaded.model.settings.functions
        self.accuracy = cached.accuracy if is_own and len(cached.accuracy) else None
        drawn = draw_curve(self.effects, accuracy=self.accuracy)
        yield partial(self.effect.show, (key, True), lambda: drawn)
        yield partial(self._note_effect, settings)

    def _note_effect(self, settings: ProposalSettings) -> None:
        """The numbers of one threshold, below the curve of the validation images."""
        eta = settings.threshold(0)
        row = self.effects.iloc[(self.effects["threshold"] - eta).abs().argmin()].drop("threshold")
        values = ", ".join(f"{value:.2f} {plots.LABELS[name]}" for name, value in row.items())
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
