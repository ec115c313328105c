"""The explorer: see which regions a model proposes, move the threshold, understand why.

One way through: a model and an image (`gallery`) -> an `Inspector` -> what it computes for the
controls' settings -> images (`panels`) and analyses (`tabs`). Every number is the inspector's. A
control that moves redraws at once what follows from recorded attention; what needs a forward pass
follows when the controls rest. Bad input is a message on the page, never a traceback.
"""

import html
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
import torch

from ramslib.data.annotations import BOX_COLUMNS, TABLE_COLUMNS
from ramslib.data.datasets import read_table
from ramslib.errors import InputError, one_line
from ramslib.evaluation import probabilities
from ramslib.explorer import panels
from ramslib.explorer.gallery import ImageBrowser
from ramslib.explorer.tabs import AnalysisTabs
from ramslib.explorer.views import code, files, inspector_of, load
from ramslib.inspector import Inspector
from ramslib.model import ProposalSettings
from ramslib.plots.images import top_classes
from ramslib.runs.folder import is_finished, read_run
from ramslib.runs.inference import LoadedModel
from ramslib.runs.results import read_results
from ramslib.training import forks

BACKBONES = ("vit_small_patch14_dinov2",)  # offered beside the runs; any other can be typed
CLASSES = 5  # shown with their probabilities
PATIENCE = 5  # seconds that the app's server may take to end
VOILA = {  # kernels of pages that were left are ended; uploads above 10 MiB are taken
    "MappingKernelManager.cull_idle_timeout": 600,
    "MappingKernelManager.cull_interval": 60,
    "Voila.tornado_settings": {"websocket_max_message_size": 2**29},
}
log = logging.getLogger(__name__)


class Explorer:
    """The page; show it by naming it in a notebook cell.

    Args:
        data: which reader, see `read_table`.
        root: folder of the dataset; images of other folders and uploads work without one.
        out: folder below which finished runs are found and validation predictions are cached.
        model: what to show first: a `LoadedModel`, a run's folder or timm's name of a backbone; by
            default the run of several scales with the highest accuracy, or else a pre-trained
            backbone.
        strengths: further ones to offer, as functions or ``path/to/file.py:name``.
        proposals: likewise.
    """

    def __init__(
        self, data="diagnostic", root="data/diagnostic", out="runs", model=None, **functions
    ):
        self.root, self.out = Path(root).expanduser(), Path(out).expanduser()
        self.lock, self.threads = threading.RLock(), torch.get_num_threads()
        self.loaded, self.inspector, self.table = None, None, pd.DataFrame(columns=TABLE_COLUMNS)
        self.worker = panels.BackgroundWorker(self.lock, self.report)
        self.saver = panels.BackgroundWorker(self.lock, partial(self.report, topic="save"), delay=0)
        self.messages, self.moved = panels.Messages(), self.guard(self._moved, "controls")
        self._build(panels.Controls(self.moved, **functions))
        self.guard(lambda: setattr(self, "table", read_table(data, self.root)), "dataset")()
        self.guard(self._offer_models, "model")(model)
        self.guard(self._load, "model")(model or self.models.value)
        for chooser in (self.models, self.other):
            chooser.observe(self.guard(self._chosen, "model"), "value")

    def _repr_mimebundle_(self, **options):
        return self.page._repr_mimebundle_(**options)

    def _build(self, controls: panels.Controls) -> None:
        """Make the page."""
        self.models = widgets.Dropdown(description="model")
        hint = "a run's folder, or timm's name of a ViT; then Enter"
        self.other = widgets.Text(placeholder=hint, tooltip=hint, continuous_update=False)
        self.controls, self.stage = controls, widgets.VBox()
        self.rows = [panels.ScaleRow(*each) for each in enumerate(controls.thresholds)]
        self.notice, self.scores = widgets.HTML(), widgets.HTML()
        self.browser = ImageBrowser(self._pick, partial(self.guard, topic="image"))
        self.tabs, self.saved = AnalysisTabs(self), widgets.HTML()
        self.save = widgets.Button(description="Save figure", tooltip="that of the tab in front")
        self.save.on_click(self.guard(lambda _: self.saver(self._save()), "save"))
        self.reopen = widgets.FileUpload(description="Reopen", accept=".json")
        self.reopen.tooltip = "a state.json that was saved"
        self.reopen.observe(self.guard(self._reopen, "model"), "value")
        line = widgets.HBox([self.save, self.reopen]).add_class("rams-line")
        parts = controls, self.stage, self.scores, self.tabs, line, self.saved
        main = widgets.VBox(parts).add_class("rams-main")
        style, script = (Path(__file__).with_name(n).read_text() for n in ("style.css", "page.js"))
        style = widgets.HTML(f'<style onload="{html.escape(script)}">{style}</style>')
        head = widgets.HBox([self.models, self.other]).add_class("rams-head")
        body = widgets.HBox([self.browser, main]).add_class("rams-body")
        self.page = widgets.VBox([style, head, self.messages, body, self.notice]).add_class("rams")

    def guard(self, handler: Callable, topic: str) -> Callable:
        """The handler, one at a time; its error becomes the message about a topic."""

        def guarded(*arguments) -> None:
            with self.lock:
                try:
                    handler(*arguments)
                    self.messages.show(topic, "")
                except Exception as error:
                    self.report(error, topic)
                torch.set_num_threads(self.threads)  # each thread has its own number

        return guarded

    def report(self, error: Exception, topic: str = "background") -> None:
        """Show an error as the message about a topic."""
        log.debug("in the explorer", exc_info=error)
        with self.lock:
            self.messages.show(topic, one_line(error))

    def _offer_models(self, first: LoadedModel | Path | str | None) -> None:
        """List the finished runs, newest first, and pre-trained backbones; choose the best run."""
        options, refused, top1 = [], [], {}
        for run in find_runs(self.out):
            try:
                options.append((describe_run(run, self.out), str(run)))
                top1[str(run)] = best_result(run)["top1"]
            except InputError as error:
                refused.append(f"not offered: {html.escape(str(error))}")
        self.notice.value = panels.caption_html("<br>".join(refused))
        options += [(f"{name}, pre-trained, no classes", name) for name in BACKBONES]
        panels.set_options(self.models, options)
        several = [value for text, value in options if "scales=1" not in text]
        given = Path(str(first)).absolute()
        known = [value for _, value in options if Path(value).absolute() == given]
        best = max(several, key=lambda value: top1.get(value, -1))  # of equal ones the newest
        self.models.value = next(iter(known), None if first else best)

    def _chosen(self, change: dict) -> None:
        """Load what was chosen or typed; what was typed is not the menu's choice."""
        self._load(change["new"])
        if change["owner"] is self.other:
            self.models.index = None

    def _load(self, model: LoadedModel | Path | str | None) -> None:
        """Show a run, by its folder, or a backbone, by its timm name."""
        if not model:
            return
        named = model.name if isinstance(model, LoadedModel) else str(model)
        if not isinstance(model, LoadedModel):
            self.messages.show("model", f"loading {model} …", is_error=False)
            model = load(model, root=self.root, table=self.table)
        self.model, self.loaded, self.inspector = named, model, None
        self.models.tooltip = model.origin
        self.controls.fit(inspector_of(model))
        self.guard(self.tabs.use, "validation")()
        self.guard(self.browser.use, "image")(model.table if len(model.table) else self.table)

    def state(self) -> dict:
        """What the page shows, as JSON takes it: model, image, controls, and the tab in front.

        Raises:
            InputError: no image is shown, or a function has no name in a file.
        """
        if self.inspector is None:
            raise InputError("no image is shown; choose one")
        box = self.inspector.box
        values = {name: widget.value for name, widget in self._named().items()}
        if own := [name for name, value in values.items() if callable(value)]:
            raise InputError(f"{own[0]}: a function that is in no file; give path/to/file.py:name")
        return {
            "model": self.model,
            "image": self.inspector.path,
            "label": self.inspector.label,
            "box": None if box.isnan().any() else box[0].tolist(),
            "tab": self.tabs.selected_index,
            "widgets": values,
            "views": self.tabs.front(),
        }

    def _named(self) -> dict[str, widgets.Widget]:
        return self.controls.named | self.tabs.named

    def restore(self, state: dict) -> None:
        """Show what `state` gave; only what the menus offer is taken.

        Raises:
            InputError: a model or image that cannot be read.
        """
        if state["model"] != self.model:
            self._load(state["model"])
        self._open(state["image"], state["label"], state["box"])
        self.tabs.selected_index = state["tab"]
        for name, widget in self._named().items():
            value = state["widgets"][name]
            if hasattr(widget, "max"):
                widget.max = max(widget.max, value)
            widget.value = tuple(value) if isinstance(value, list) else value

    def _save(self) -> Iterator:
        """In the background: the figure of the tab in front as links to files, and as code."""
        state = self.state()
        found = files(self.inspector, self.controls.settings(), state)
        shown = panels.saved_html(found, code(state))
        yield partial(setattr, self.saved, "value", shown)

    def _reopen(self, _) -> None:
        """Restore an uploaded state."""
        for item in self.reopen.value:
            try:
                self.restore(json.loads(bytes(item["content"])))
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f"{item['name']}: not a state that was saved here") from None

    def _pick(self, row: pd.Series) -> None:
        """Open an image; if it cannot be opened, the one before remains."""
        if self.loaded is not None:
            label = None if row["label"] < 0 else int(row["label"])
            self._open(row["path"], label, row[BOX_COLUMNS])

    def _open(self, *image) -> None:
        """Show an image in a new inspector, which work on the image before cannot change."""
        self.inspector = inspector_of(self.loaded).set_image(*image)
        self.moved()

    def _moved(self) -> None:
        """Redraw what the controls say, and start what needs a forward pass."""
        if self.inspector is None:
            return
        torch.set_num_threads(1)  # faster for small tensors, while the model runs in others
        self.saved.value = ""
        settings = self.controls.settings()
        self.stage.children = self.rows[: max(1, settings.scales - 1)]
        is_complete = self._draw(settings)
        analysis = self.tabs.update(self.inspector, settings)
        if analysis or not is_complete:
            self.worker(self._catch_up(self.inspector, settings, analysis))
        else:
            self.worker.cancel()

    def _catch_up(self, inspector: Inspector, settings: ProposalSettings, analysis) -> Iterator:
        """In the background: run the scales that have changed, then the analysis."""
        inspector.outputs(settings)
        yield partial(self._draw, settings)
        yield from analysis or ()
        yield partial(self.messages.show, "background", "")

    @torch.inference_mode()
    def _draw(self, settings: ProposalSettings) -> bool:
        """Draw all that is known by now; returns whether all scales are."""
        inspector, known = copy(self.inspector), 1  # work beside the page may replace its scales
        key, pixels = self.inspector, inspector.pixels
        boxes = {} if inspector.box.isnan().any() else {"annotated": inspector.box}
        boxes["scale 1"] = inspector.seen
        for row in self.stage.children:
            if row.scale >= known:
                row.outdated()
                continue
            region, key = row.draw(key, pixels, inspector, settings, self.controls.opacity.value)
            if settings.scales > 1:
                boxes[f"scale {row.scale + 2}"] = inspector.image_boxes(region.boxes)
                known += inspector.has_run(row.scale + 1, region.crop)
            pixels = region.crop[0]
        self.rows[0].draw_image(self.inspector, inspector, boxes)
        is_complete = known == settings.scales
        text = "attention only: this backbone has no trained classifier"
        if self.loaded.classes:
            shown = probabilities(inspector.logits(known), inspector.model)
            shown = top_classes(shown, self.loaded.classes, inspector.label, CLASSES)
            text = panels.probability_bars(shown)
        text += "" if is_complete else panels.caption_html("computing the next scale …")
        self.scores.value = f'<div class="rams-title">Class probabilities</div>{text}'
        return is_complete


def find_runs(folder: Path) -> list[Path]:
    """Finished runs anywhere below a folder, newest first."""
    found = {path.parent for path in folder.rglob("config.json")}
    runs = [run for run in found if is_finished(run) and (run / "best.safetensors").exists()]
    return sorted(runs, key=lambda run: (run / "results.csv").stat().st_mtime, reverse=True)


def best_result(run: Path) -> pd.Series:
    """The scores of a finished run's best checkpoint at its last output."""
    return read_results(run).query("checkpoint == 'best'").iloc[-1]


def describe_run(run: Path, folder: Path) -> str:
    """One line about a finished run: its place, settings, and the score of its best checkpoint.

    Raises:
        InputError: a file of the run is damaged, its code is not trusted, or the explorer does not
            show its model.
    """
    config, _, _ = read_run(run)
    if config.model == "transfg":
        raise InputError(f"{run}: the explorer shows RAMS-Trans and plain ViT, not {config.model}")
    strength, proposal = config.strength, config.proposal
    strength, _ = ProposalSettings(strength=strength, proposal=proposal).functions  # are trusted
    best = best_result(run)
    settings = f"scales={config.scales}, strength={strength.__name__}, seed={config.seed}"
    score = f"{best['top1']:.1f}% at {best['output']}, best checkpoint"
    return f"{run.relative_to(folder)} ({settings}; {score})"


def app_command(options: Sequence[str]) -> list[str]:
    """The command that serves the explorer as a page without code, with Voila's own options."""
    page = Path(__file__).with_name("app.ipynb")
    # Voila takes an option once
    defaults = [f"--{n}={v}" for n, v in VOILA.items() if f"--{n}" not in " ".join(options)]
    return [sys.executable, "-m", "voila", str(page), *defaults, *options]


def serve(data: str, root: Path, out: Path, run: Path | None, voila: Sequence[str]) -> int:
    """Serve the page until it is interrupted or terminated; returns the server's exit code.

    Args:
        data: a reader's name.
        root: folder of the dataset.
        out: folder below which runs are found.
        run: the run to show first, or None.
        voila: Voila's own options.

    Raises:
        InputError: ``run`` is not the folder of a run.
    """
    if run:
        read_run(run)
    paths = {"root": root, "out": out} | ({"model": run} if run else {})
    options = {name: str(path.expanduser().absolute()) for name, path in paths.items()}
    os.environ["RAMSLIB_EXPLORER"] = json.dumps({"data": data} | options)  # app.ipynb reads it
    command = app_command(voila)
    print("Voila ends kernels of pages that were left, with:", *command[4:])
    with forks.listening() as line, tempfile.TemporaryDirectory(prefix="ramslib-") as folder:
        _write_kernel_spec(Path(folder))
        server = subprocess.Popen(command)
        for number in (signal.SIGTERM, signal.SIGINT):  # it must not outlive this process
            signal.signal(number, lambda *_: _stop(server))
        if line:  # kernels are forks of this process, which computes nothing
            forks.fork_for_callers(line, lambda: server.poll() is None)
            for kernel in multiprocessing.active_children():
                kernel.kill()
        return server.wait()


def _write_kernel_spec(folder: Path) -> None:
    """Make the kernels that are started here and below forks."""
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": forks.stand_in(command), "display_name": "Python 3", "language": "python"}
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec))
    places = str(folder), os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, places))


def _stop(server: subprocess.Popen) -> None:
    """End a server, if need be after a few seconds: kernels may keep it waiting."""
    server.terminate()
    threading.Timer(PATIENCE, server.kill).start()
