"""What a person chooses: an image, and how regions are proposed in it."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from ramslib.data.annotations import BOX_COLUMNS
from ramslib.dppm import PROPOSALS
from ramslib.explorer.panels import TOP, caption_html, set_options
from ramslib.inspector import Inspector, single_block
from ramslib.model import ProposalSettings
from ramslib.plots.drawing import clean_class_name
from ramslib.runs.photos import find_images

SCALES = 4  # at most, in the explorer
THRESHOLDS = np.linspace(0, TOP, 81).round(3).tolist()  # what a slider can choose
SINGLE = ("single_block", "single_head")  # strengths beside those of the registry
ALL = "all"
SHOWN = 300  # names in the list of images; more are found by filter and search


class Controls(widgets.VBox):
    """Sliders and menus about proposals; ``moved()`` is called after every change.

    Args:
        moved: without arguments.
        strengths: further ones to offer, as functions or ``path/to/file.py:name``.
        proposals: likewise.
    """

    def __init__(self, moved: Callable, strengths: Sequence = (), proposals: Sequence = ()):
        self.moved, self.own, self.inspector, self.quiet = moved, (strengths, proposals), None, True
        slider, count, menu = widgets.FloatSlider, widgets.IntSlider, widgets.Dropdown
        names = [f"threshold of scale {scale}" for scale in range(1, SCALES)]
        self.thresholds = [slider(description=n, max=TOP, step=THRESHOLDS[1]) for n in names]
        self.opacity = slider(description="heat opacity", max=1, step=0.05, value=0.6)
        self.strength, self.proposal = menu(description="strength"), menu(description="proposal")
        self.from_high_res = menu(description="crop from")
        self.block, self.head = count(description="block", min=1), count(description="head", min=1)
        self.scales = count(description="scales", min=1, max=SCALES)
        self.upsampling = count(description="upsampling", min=1, max=8)
        self.reset = widgets.Button(description="Reset", tooltip="all controls as trained")
        self.reset.on_click(lambda _: self.fit(self.inspector))
        choices = self.strength, self.block, self.head, self.proposal, self.from_high_res
        self.all = *choices, self.upsampling, self.scales, self.opacity
        self.named = {control.description: control for control in (*self.thresholds, *self.all)}
        for control in self.named.values():
            control.observe(self._changed, "value")
        super().__init__([*self.all, self.reset])
        self.add_class("rams-controls")

    def fit(self, inspector: Inspector | None) -> None:
        """Take the limits of a model, and the values that it was trained with."""
        if inspector is None:
            return
        self.inspector, settings, self.quiet = inspector, inspector.settings, True
        strengths = [*inspector.strengths(), settings.strength, *self.own[0], *SINGLE]
        proposals = [*PROPOSALS, settings.proposal, *self.own[1]]
        set_options(self.strength, _labeled(strengths), settings.strength)
        set_options(self.proposal, _labeled(proposals), settings.proposal)
        size = " × ".join(map(str, inspector.transform.size))
        crops = [(f"high resolution ({size})", True), ("previous input", False)]
        set_options(self.from_high_res, crops if settings.from_high_res else crops[1:])
        blocks = inspector.model.backbone.blocks
        self.block.max, self.head.max = len(blocks), blocks[0].attn.num_heads
        for scale, slider in enumerate(self.thresholds):
            slider.max = max(TOP, settings.threshold(scale))
            slider.value = settings.threshold(scale)
        self.block.value, self.head.value, self.from_high_res.index = len(blocks), 1, 0
        self.scales.value, self.upsampling.value = max(2, settings.scales), settings.upsampling
        self.quiet = False
        self._changed()

    def settings(self) -> ProposalSettings:
        """What the controls say."""
        strength = self.strength.value
        if strength in SINGLE:
            head = self.head.value if strength == "single_head" else None
            strength = single_block(self.block.value, head, self.inspector.has_class_token)
        thresholds = tuple(slider.value for slider in self.thresholds)
        names = "proposal", "scales", "from_high_res", "upsampling"
        chosen = {name: getattr(self, name).value for name in names}
        settings = self.inspector.settings
        return replace(settings, thresholds=thresholds, strength=strength, **chosen)

    def _changed(self, _=None) -> None:
        self.block.layout.display = None if self.strength.value in SINGLE else "none"
        self.head.layout.display = None if self.strength.value == SINGLE[1] else "none"
        if not self.quiet:
            self.moved()


def _labeled(choices: Sequence[str | Callable]) -> list[tuple]:
    """Options of a menu, each choice once; one's own has the name of its function.

    Where two have one name, such as an idea and the copy that a run keeps of it, also of its file.
    """
    texts = {choice: _name(choice) for choice in choices}
    names = [text.rpartition(":")[2] for text in texts.values()]
    pairs = zip(texts.items(), names, strict=True)
    return [(text if names.count(name) > 1 else name, choice) for (choice, text), name in pairs]


def _name(choice: str | Callable) -> str:
    """``name``, or ``file.py:name`` of one's own."""
    return getattr(choice, "__name__", os.path.basename(str(choice)))


class ImageBrowser(widgets.VBox):
    """Chooses an image of the dataset, a folder or an upload, and calls ``pick(row)``.

    A row is one of a dataset's table; images from elsewhere have label -1 and no box. ``guard``
    wraps handlers.
    """

    def __init__(self, pick: Callable[[pd.Series], None], guard: Callable):
        self.pick, self.quiet = pick, False
        self.table = self.shown = _rows_of([])
        self.uploads = tempfile.TemporaryDirectory(prefix="ramslib-")
        self.split, self.class_name = (widgets.Dropdown(description=d) for d in ("split", "class"))
        self.search = widgets.Text(description="search", placeholder="part of a name")
        self.folder = widgets.Text(description="folder", placeholder="path, then Enter")
        self.folder.continuous_update = False
        self.upload = widgets.FileUpload(description="Choose photos", multiple=True)
        self.upload.accept = "image/*"
        self.sources = {
            "dataset": ([self.split, self.class_name, self.search], self._filtered),
            "folder": ([self.folder], self._in_folder),
            "upload": ([self.upload], self._uploaded),
        }
        self.source = widgets.RadioButtons(options=tuple(self.sources), orientation="horizontal")
        self.list, self.count = widgets.Select(rows=14, tooltip="images"), widgets.HTML()
        super().__init__()
        self.add_class("rams-browser")
        for control in (self.source, self.split, self.class_name, self.search, self.folder):
            control.observe(guard(self._update), "value")
        self.upload.observe(guard(self._store_uploads), "value")
        self.list.observe(guard(self._picked), "value")
        self._update()

    def use(self, table: pd.DataFrame) -> None:
        """Browse another dataset; filters and the image are kept where it has them."""
        present = [s for s in ("validation", "test", "train") if (table["split"] == s).any()]
        names = table.drop_duplicates("label").sort_values("label")["class_name"]
        self.table, self.quiet = table, True
        set_options(self.split, [(split, split) for split in (*present, ALL)])
        set_options(self.class_name, [(ALL, ALL), *((clean_class_name(n), n) for n in names)])
        self.quiet = False
        self._update()

    def pick_path(self, path: str) -> None:
        """Pick an image of the dataset by its path."""
        self.pick(self.table[self.table["path"] == path].iloc[0])

    def _update(self, _=None) -> None:
        """List the images of a source, and pick the one before or the first."""
        if self.quiet:
            return
        controls, find = self.sources[self.source.value]
        self.children = [self.source, *controls, self.list, self.count]
        rows = find()
        self.shown, paths = rows.head(SHOWN), rows["path"].head(SHOWN).map(Path)
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            names = ["/".join(path.parts[-2:]) for path in paths]
        more = f", the first {SHOWN} shown" if len(rows) > SHOWN else ""
        self.count.value = caption_html(f"{len(rows):,} images{more}")
        self.quiet = True
        set_options(self.list, list(zip(names, self.shown["path"], strict=True)))
        self.quiet = False
        self._picked()

    def _picked(self, _=None) -> None:
        if self.list.index is not None and not self.quiet:
            self.pick(self.shown.iloc[self.list.index])

    def _filtered(self) -> pd.DataFrame:
        rows = self.table
        for column, menu in (("split", self.split), ("class_name", self.class_name)):
            rows = rows if menu.value == ALL else rows[rows[column] == menu.value]
        names = rows["path"].str.rsplit("/", n=2).str[1:].str.join("/")
        return rows[names.str.contains(self.search.value.strip(), case=False, regex=False)]

    def _in_folder(self) -> pd.DataFrame:
        folder = os.path.expanduser(self.folder.value.strip())
        return _rows_of(find_images([folder]) if folder else [])

    def _store_uploads(self, _) -> None:
        """Write uploads, each to a folder of its own, for two may have one name."""
        for item in reversed(self.upload.value):
            folder = Path(self.uploads.name, f"{len(os.listdir(self.uploads.name)):06}")
            folder.mkdir()
            (folder / Path(item["name"]).name).write_bytes(item["content"])
        self.list.index = None  # the first of them is picked
        self._update()

    def _uploaded(self) -> pd.DataFrame:
        """Newest first."""
        return _rows_of(sorted(Path(self.uploads.name).glob("*/*"), reverse=True))


def _rows_of(paths: Sequence[Path]) -> pd.DataFrame:
    """Rows for images that are in no dataset."""
    table = pd.DataFrame({"path": [str(path) for path in paths]}, dtype=str)
    unknown = dict.fromkeys(BOX_COLUMNS, float("nan"))
    return table.assign(label=-1, class_name="", split="", **unknown)
