"""Ways to a photo: the data set with filter and search, a folder, an upload."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from ramslib.data.annotations import BOX_COLUMNS
from ramslib.explorer.components import set_options, small
from ramslib.plots.drawing import clean_class_name
from ramslib.runs.inference import find_images

ALL = "all"
SHOWN = 300  # names in the list; more are found by filter and search
SOURCES = ("data set", "folder", "upload")


class ImageBrowser(widgets.VBox):
    """Chooses a photo and calls ``pick(row)``, a row of a data set's table.

    Photos from elsewhere have label -1 and no box.
    """

    def __init__(self, table: pd.DataFrame, pick: Callable[[pd.Series], None], guard: Callable):
        self.table, self.pick, self.shown, self.quiet = table, pick, table, True
        self.uploads = tempfile.TemporaryDirectory(prefix="ramslib-")
        full = {"layout": widgets.Layout(width="auto"), "style": {"description_width": "44px"}}
        self.source = widgets.ToggleButtons(options=SOURCES, style={"button_width": "auto"})
        self.split = widgets.Dropdown(description="split", **full)
        self.class_name = widgets.Dropdown(description="class", **full)
        self.search = widgets.Text(description="search", placeholder="part of a name", **full)
        self.folder = widgets.Text(
            description="folder", placeholder="path, then Enter", continuous_update=False, **full
        )
        self.upload = widgets.FileUpload(
            description="choose photos", accept="image/*", multiple=True, layout=full["layout"]
        )
        self.list = widgets.Select(rows=14, layout=full["layout"])
        self.count = widgets.HTML()
        super().__init__(layout=widgets.Layout(width="250px", flex="0 0 auto"))
        self.source.observe(guard(self._switch), "value")
        for control in (self.split, self.class_name, self.search):
            control.observe(guard(self._filter), "value")
        self.folder.observe(guard(self._read_folder), "value")
        self.upload.observe(guard(self._read_upload), "value")
        self.list.observe(guard(self._picked), "value")
        self.use(table)

    def use(self, table: pd.DataFrame) -> None:
        """Browse another data set."""
        self.table = table
        present = [s for s in ("validation", "test", "train") if (table["split"] == s).any()]
        names = table.drop_duplicates("label").sort_values("label")["class_name"]
        self.quiet = True
        set_options(self.split, [*present, ALL])
        set_options(
            self.class_name, [(ALL, ALL), *((clean_class_name(name), name) for name in names)]
        )
        self.quiet = False
        self._switch()

    def pick_path(self, path: str) -> None:
        """Pick a photo of the data set by its path."""
        self.pick(self.table[self.table["path"] == path].iloc[0])

    def _switch(self, _=None) -> None:
        """Show the controls of one source."""
        of_set = [self.split, self.class_name, self.search]
        extra = {"data set": of_set, "folder": [self.folder], "upload": [self.upload]}
        self.children = [self.source, *extra[self.source.value], self.list, self.count]
        if self.source.value == "data set":
            self._filter()
        else:
            self._list(self.table.iloc[:0])

    def _filter(self, _=None) -> None:
        if self.quiet:
            return
        rows = self.table
        if self.split.value != ALL:
            rows = rows[rows["split"] == self.split.value]
        if self.class_name.value != ALL:
            rows = rows[rows["class_name"] == self.class_name.value]
        names = rows["path"].str.rsplit("/", n=2).str[1:].str.join("/")
        self._list(rows[names.str.contains(self.search.value.strip(), case=False, regex=False)])

    def _list(self, rows: pd.DataFrame) -> None:
        """Offer rows, and pick the first."""
        self.shown = rows.head(SHOWN)
        names = [Path(path).name for path in self.shown["path"]]
        if len(set(names)) < len(names):
            names = ["/".join(Path(path).parts[-2:]) for path in self.shown["path"]]
        more = f", the first {SHOWN} shown" if len(rows) > SHOWN else ""
        self.count.value = small(f"{len(rows):,} photos{more}")
        self.quiet = True
        set_options(self.list, zip(names, range(len(names)), strict=True))
        self.quiet = False
        self._picked()

    def _picked(self, _=None) -> None:
        if self.list.value is not None and not self.quiet:
            self.pick(self.shown.iloc[self.list.value])

    def _read_folder(self, _=None) -> None:
        self._list(_foreign(find_images([self.folder.value.strip()])))

    def _read_upload(self, _=None) -> None:
        paths = []
        for item in self.upload.value:
            path = Path(self.uploads.name) / Path(item["name"]).name
            path.write_bytes(item["content"])
            paths.append(path)
        self._list(_foreign(paths))


def _foreign(paths: Sequence[Path]) -> pd.DataFrame:
    """Rows of photos that no data set knows."""
    table = pd.DataFrame({"path": [str(path) for path in paths]})
    return table.assign(
        label=-1, class_name="", split="", **dict.fromkeys(BOX_COLUMNS, float("nan"))
    )
