"""The explorer's controls: sliders and menus on one side, a `looking.ProposalSettings` on the other."""

from collections.abc import Callable

import ipywidgets as widgets
import numpy as np

from ramslib.dppm import PROPOSALS
from ramslib.explorer.components import set_options
from ramslib.explorer.lenses import LoadedModel
from ramslib.explorer.looking import SINGLE, ProposalSettings, default_choice, strength_names

SCALES = 4  # at most, in the explorer
TOP, STEP = 4.0, 0.05  # the largest threshold, and from one to the next
THRESHOLDS = np.linspace(0, TOP, round(TOP / STEP) + 1).round(3).tolist()
NAMES = {
    "rollout_mean": "rollout, mean of all rows",
    "rollout_class": "rollout, class token",
    "last_class": "last block, class token",
    "single_block": "one block",
    "single_head": "one head of one block",
    "attention": "largest component (DPPM)",
    "all_patches": "all strong patches",
    "random": "same box, random place",
    "center": "same box, center",
    "whole": "whole image",
}


class Controls(widgets.VBox):
    """All that can be chosen about a look; ``moved()`` is called after every change."""

    def __init__(self, moved: Callable):
        self.moved, self.quiet = moved, False
        names = [f"threshold of scale {n}" for n in range(1, SCALES)]
        wide = {"max": TOP, "step": STEP, "width": "620px"}
        self.thresholds = [_make(widgets.FloatSlider, name, **wide) for name in names]
        for slider in self.thresholds:
            slider.tooltip = "the paper's eta: patches above this multiple of the mean are kept"
        self.opacity = _make(widgets.FloatSlider, "heat opacity", max=1, step=0.05, value=0.6)
        menus = (_make(widgets.Dropdown, name) for name in ("strength", "region", "crop"))
        self.strength, self.proposal, self.source = menus
        counts = (_make(widgets.IntSlider, n, "190px", min=1) for n in ("block", "head", "scales"))
        self.block, self.head, self.scales = counts
        self.scales.max = SCALES
        self.reset = widgets.Button(description="as trained", tooltip="all controls as trained")
        self.reset.on_click(lambda _: self.fit(self.lens))
        everything = [*self.thresholds, self.opacity, self.strength, self.proposal, self.source]
        for control in [*everything, self.block, self.head, self.scales]:
            control.observe(self._changed, "value")
        layout = widgets.Layout(flex_flow="row wrap", grid_gap="2px 14px", align_items="center")
        self.box = widgets.Box(layout=layout)
        super().__init__([self.box])

    def fit(self, lens: LoadedModel) -> None:
        """Take a lens's limits and the values it was trained with."""
        self.lens, choice = lens, default_choice(lens)
        self.quiet = True
        set_options(self.strength, [(NAMES.get(n, n), n) for n in strength_names(lens)])
        set_options(self.proposal, [(NAMES.get(n, n), n) for n in PROPOSALS])
        size = " × ".join(map(str, lens.view.size))
        crops = [(f"from the source, {size} px", True), ("from the view before", False)]
        set_options(self.source, crops if choice.from_source else crops[1:])
        first = lens.model.backbone.blocks[0].attn
        self.block.max, self.head.max = choice.block, first.num_heads
        for number, slider in enumerate(self.thresholds):
            slider.value = choice.thresholds[min(number, len(choice.thresholds) - 1)]
        self.strength.value, self.proposal.value = choice.strength, choice.proposal
        self.block.value, self.head.value = choice.block, choice.head
        self.scales.value, self.source.value = max(2, choice.scales), choice.from_source
        self.quiet = False
        self._changed()

    def choice(self) -> ProposalSettings:
        """What the controls say."""
        return ProposalSettings(
            tuple(slider.value for slider in self.thresholds),
            self.strength.value,
            self.block.value,
            self.head.value,
            self.proposal.value,
            self.scales.value,
            self.source.value,
        )

    def _changed(self, _=None) -> None:
        if self.quiet:
            return
        single = [self.block] * (self.strength.value in SINGLE)
        single += [self.head] * (self.strength.value == "single_head")
        shown = [self.strength, *single, self.proposal, self.source, self.scales, self.opacity]
        if self.box.children[:-1] != tuple(shown):
            self.box.children = [*shown, self.reset]
        self.moved()


def _make(kind: type, description: str, width: str = "270px", **options) -> widgets.Widget:
    """A control whose description is never cut off."""
    layout = widgets.Layout(width=width, max_width="100%")
    style = {"description_width": "initial"}
    return kind(description=description, style=style, layout=layout, **options)
