"""The explorer's tabs that say why: about the photo, and about all validation images."""

import html
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from ramslib.explorer.components import BackgroundWorker, Chart, Panel, draw_figure, small
from ramslib.explorer.controls import THRESHOLDS
from ramslib.explorer.gallery import Confusion, Gallery
from ramslib.explorer.lenses import LoadedModel, Photo
from ramslib.explorer.looking import (
    ProposalSettings,
    RecordedScale,
    probability_curve,
    strength_per_block,
    threshold_curve,
)
from ramslib.explorer.validation import (
    CachedValidation,
    nearest_stored_accuracy,
    predict_validation,
    read_cached_validation,
    threshold_effect,
    validation_images,
)
from ramslib.plots import plot_threshold
from ramslib.plots.images import plot_strength_per_block

TITLES = ("threshold", "blocks", "validation set", "gallery", "confusion")
BLOCKS = "each in its own brightness: rollouts of the first blocks, or single blocks one by one"


class AnalysisTabs(widgets.Tab):
    """Threshold curve and blocks of one photo; threshold curve, gallery and confusion of a set.

    ``pick(path)`` opens a photo, ``guard`` wraps handlers, ``later`` is for surveys, which are
    stored in ``folder``; ``refresh()`` redraws the page when a survey is there. The key of a panel
    is what it explains, and whether all of it is there.
    """

    def __init__(
        self,
        pick: Callable,
        guard: Callable,
        later: BackgroundWorker,
        folder: Path,
        refresh: Callable,
    ):
        self.later, self.folder, self.refresh = later, folder, refresh
        self.lens: LoadedModel | None = None
        self.survey: CachedValidation | None = None
        self.of_set: pd.DataFrame | None = None
        self.curve = Chart("what the threshold of scale 1 does to this photo")
        self.blocks = Panel("attention strength, block by block")
        self.effect = Chart("what the threshold of scale 1 does to the set")
        self.gallery, self.confusion = Gallery("show", pick, guard), Confusion("of", pick, guard)
        self.state = widgets.HTML()
        self.start = widgets.Button(description="look at all of them", button_style="primary")
        self.start.on_click(guard(lambda _: self.later(partial(self._look, self.lens))))
        about_set = [widgets.VBox() for _ in TITLES[2:]]
        super().__init__([self.curve, self.blocks, *about_set], titles=TITLES, selected_index=0)
        self.observe(guard(lambda _: refresh()), "selected_index")

    def use(self, lens: LoadedModel) -> None:
        """Show what is stored about a lens, or set_options to look."""
        self.lens, self.survey = lens, read_cached_validation(lens, self.folder)
        images, total = validation_images(lens)
        sample = f" (a sample of {total:,})" if total > len(images) else ""
        self.state.value = small(f"{len(images)} images{sample}, not looked at yet")
        self.start.disabled = images.empty
        asking, telling = [self.state, self.start], (self.effect, self.gallery, self.confusion)
        for tab, panel in zip(self.children[2:], telling, strict=True):
            tab.children = asking if self.survey is None else [panel]
        if self.survey is not None:
            self.gallery.use(lens, self.survey)
            self.confusion.use(lens, self.survey)

    def _look(self, lens: LoadedModel) -> Iterator[Callable]:
        """CachedValidation the set beside the page."""

        def say(text: str) -> None:
            self.state.value = small(f"{html.escape(text)} …")

        yield partial(setattr, self.start, "disabled", True)
        predict_validation(lens, self.folder, say)
        if lens is self.lens:
            yield partial(self.use, lens)
            yield self.refresh

    def update(
        self, photo: Photo, seen: RecordedScale, choice: ProposalSettings
    ) -> Callable | None:
        """Bring the tab in front up to date, as far as that is known.

        Returns:
            What remains to be computed beside the page, as `BackgroundWorker` takes it, or None.
        """
        tab, look = self.selected_index or 0, (*choice.read(), choice.proposal)
        if tab == 0:
            self.curve.mark(choice.thresholds[0])
            key = seen, *look, choice.from_source
            return _missing(self.curve, key, self._explain_photo, self.lens, photo, seen, choice)
        if tab == 1:
            key = seen, choice.strength
            return _missing(self.blocks, key, self._explain_blocks, self.lens, photo, seen, choice)
        if self.survey is None:
            return None
        if tab > 2:
            return (self.gallery if tab == 3 else self.confusion).fill()
        self.effect.mark(choice.thresholds[0])
        if choice.strength not in self.survey.strengths.maps:
            self.effect.stale(True, "stored for strengths of all heads only; choose one of those")
            return None
        work = _missing(self.effect, (self.survey, *look), self._explain_set, self.survey, choice)
        if work is None:
            self._say_effect(choice)
        return work

    def _explain_photo(
        self,
        key: tuple,
        lens: LoadedModel,
        photo: Photo,
        seen: RecordedScale,
        choice: ProposalSettings,
    ) -> Iterator[Callable]:
        """Draw the threshold curve; then the probabilities, which take longer, too."""
        curve = threshold_curve(lens, photo, seen, choice, THRESHOLDS)
        more = "computing the probability of the true class …" if lens.classes else ""
        yield self.curve.draw((key, not more), _plot(curve), more)
        if more:
            values = []
            for value in probability_curve(lens, photo, seen, choice, THRESHOLDS):
                values.append(value)
                yield _let_newer_work_in
            curve["probability"] = values
            yield self.curve.draw((key, True), _plot(curve))

    def _explain_blocks(
        self,
        key: tuple,
        lens: LoadedModel,
        photo: Photo,
        seen: RecordedScale,
        choice: ProposalSettings,
    ) -> Iterator[Callable]:
        maps = strength_per_block(lens, seen, choice)
        draw, rows = partial(plot_strength_per_block, maps, photo.pixels), -(-len(maps) // 6)
        picture = draw_figure(draw, 9, 1.75 * rows, rows, 6)[1]
        yield partial(self.blocks.show, (key, True), lambda: (picture, BLOCKS))

    def _explain_set(
        self, key: tuple, survey: CachedValidation, choice: ProposalSettings
    ) -> Iterator[Callable]:
        rows = []
        for threshold in THRESHOLDS:
            rows.append(threshold_effect(survey, choice.strength, choice.proposal, [threshold]))
            yield _let_newer_work_in
        self.of_set = pd.concat(rows, ignore_index=True)
        accuracy = self._accuracy(choice)
        yield self.effect.draw((key, True), _plot(self.of_set, accuracy=accuracy))
        yield partial(self._say_effect, choice)

    def _accuracy(self, choice: ProposalSettings) -> pd.DataFrame | None:
        """The stored accuracies, if they are of this strength and proposal."""
        model = self.lens.model
        own = (model.strength, model.proposal) == (choice.strength, choice.proposal)
        return self.survey.accuracy if own and len(self.survey.accuracy) else None

    def _say_effect(self, choice: ProposalSettings) -> None:
        """The numbers of one threshold, below the curve of the set."""
        threshold, images = choice.thresholds[0], len(self.survey.strengths.table)
        row = self.of_set.iloc[(self.of_set["threshold"] - threshold).abs().argmin()]
        words = [f"{100 * row['area']:.0f} % of the image"]
        if "iou" in row:
            hit = f"IoU above 0.5 in {100 * row['iou_above_half']:.0f} %"
            words += [f"mean IoU {row['iou']:.2f}", hit]
        text = f"threshold {threshold:.2f}, {images} images: {', '.join(words)}"
        if self._accuracy(choice) is not None:
            near = nearest_stored_accuracy(self.survey, threshold)
            stored = near.pop("threshold")
            scores = ", ".join(f"{name} {value:.1f} %" for name, value in near.items())
            text += f"<br>accuracy (stored at threshold {stored:.2f}): {scores}"
        self.effect.say(text)


def _missing(panel: Panel, key: tuple, explain: Callable, *about) -> Callable | None:
    """Dim a panel that explains something else; returns the work it lacks, if any."""
    shown, is_whole = panel.key or (None, False)
    panel.stale(shown != key)
    return None if shown == key and is_whole else partial(explain, key, *about)


def _plot(curve: pd.DataFrame, **options) -> Callable:
    return lambda ax: plot_threshold(curve, ax=ax, **options)


def _let_newer_work_in() -> None:
    """Between two steps of long work: `BackgroundWorker` may abandon it here."""
