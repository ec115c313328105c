"""Figures of one image with their numbers: the page, files and copied code call the same functions.

A view draws on a figure, which gets its size, and returns its numbers as a table. ``VIEWS`` has the
functions by name, ``READ`` what a view reads of the settings.
"""

import io
import json
import os
from base64 import b64encode
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ramslib import plots
from ramslib.attention import CLASS_STRENGTHS, border_sum, on_grid, principal_components
from ramslib.boxes import box_iou
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.dppm import upsample
from ramslib.errors import InputError, write_atomically
from ramslib.explorer import validation
from ramslib.inspector import Inspector, Token
from ramslib.model import ProposalSettings, RAMSTrans
from ramslib.plots import drawing
from ramslib.plots.images import top_classes
from ramslib.runs.folder import read_run
from ramslib.runs.inference import LoadedModel, load_backbone, load_model

PAGE_THRESHOLDS = [round(0.1 * number, 1) for number in range(41)]  # of an exported page
PAGE_SIDE = 480  # pixels of its pictures


def load(
    name: Path | str,
    checkpoint: str = "best",
    root: Path | str | None = None,
    table: pd.DataFrame | None = None,
) -> LoadedModel:
    """The model of a run, by its folder, or a pre-trained backbone, by timm's name.

    Args:
        name: with a slash, a run's folder.
        checkpoint: of a run: ``best`` or ``last``.
        root: where a run's images are looked for if they moved.
        table: images to show with a backbone.

    Raises:
        InputError: no such run or backbone, its checkpoint cannot be read, or the explorer does not
            show it.
    """
    name = str(name).strip()
    is_run = "/" in name and ":" not in name or Path(name).is_dir()  # hf-hub:timm/vit
    if not is_run:
        return load_backbone(name, table)
    loaded = load_model(run := Path(name).expanduser(), checkpoint)
    if not isinstance(loaded.model, RAMSTrans):
        kind = type(loaded.model).__name__
        raise InputError(f"{run}: the explorer shows RAMS-Trans and plain ViT, not {kind}")
    has_images = any(map(os.path.exists, loaded.table["path"]))
    return loaded if has_images else replace(loaded, table=read_run(run, root)[2])


def recursion(inspector: Inspector, settings: ProposalSettings, figure: Figure) -> pd.DataFrame:
    """All scales."""
    inspector = copy(inspector)  # whose scales are those of other settings
    outputs = inspector.outputs(settings)
    inspector.plot(settings, figure)
    boxes = {
        f"scale {number}": inspector.image_boxes(output.boxes[:1])
        for number, output in enumerate(outputs, start=1)
    }
    return _scores(inspector, boxes, inspector.probabilities(outputs))


def threshold(inspector: Inspector, settings: ProposalSettings, figure: Figure) -> pd.DataFrame:
    """What the threshold of scale 1 does to this image."""
    curve = inspector.threshold_curve(PAGE_THRESHOLDS, settings)
    if inspector.classes:
        proposed = (inspector.changed(settings, threshold=eta) for eta in PAGE_THRESHOLDS)
        curve["probability"] = list(inspector.true_probabilities(proposed))
    figure.set_size_inches(7, 2.8)
    plots.plot_threshold(curve, settings.threshold(0), ax=figure.subplots())
    return curve


def blocks(inspector: Inspector, settings: ProposalSettings, figure: Figure) -> pd.DataFrame:
    """The strength if the network ended after each block."""
    return _many(inspector, inspector.strength_per_block(settings), "block", figure)


def heads(
    inspector: Inspector, _, figure: Figure, block: int, token: Token, head: int | None = None
) -> pd.DataFrame:
    """What a token attends to in a block, in every head; ``head`` is not read."""
    maps = on_grid(inspector.attention_rows(block, token), inspector.model.grid)
    return _many(inspector, maps, "head", figure)


def tokens(
    inspector: Inspector, _, figure: Figure, block: int, token: Token, head: int | None = None
) -> pd.DataFrame:
    """What a token attends to in a block (mean over heads, or one); of a patch also its similarity.

    That is the cosine to all patch tokens after the last block, and how much more the class token
    attends to each patch than it does.
    """
    rows = inspector.attention_rows(block, token, head).mean(dim=0, keepdim=True)
    maps = {"attention": on_grid(rows, inspector.model.grid)[0]}
    if not isinstance(token, str):
        maps["cosine similarity"] = inspector.patch_similarity(token)
        if inspector.has_class_token:
            maps["class token − patch"] = inspector.disagreement(block, token, head)
    axes = drawing.new_grid(figure, (3 * len(maps), 2.4), 1, len(maps))[0]
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        plots.plot_map(inspector.pixels, values, name, ax=ax)
    return _by_patch(maps)


def colors(inspector: Inspector, _, figure: Figure, images: Sequence[str] = ()) -> pd.DataFrame:
    """Patch tokens as colors: their first three principal components of unit tokens of all images.

    Each component is spread from its 2nd to its 98th percentile over red, green and blue, so that a
    color means the same in all of them. Below, the patches whose first component is positive.
    ``images`` are files beside the inspector's image.
    """
    shown = [inspector]
    shown += [Inspector(inspector.model, inspector.transform).set_image(path) for path in images]
    found = F.normalize(torch.stack([each.patch_tokens() for each in shown]).cpu(), dim=-1)
    values = principal_components(found.flatten(0, 2)[None], 3).view(*found.shape[:3], 3)
    values *= torch.where(border_sum(values).sum(dim=0) > 0, -1, 1)  # as in token_pca
    low, high = torch.quantile(values.flatten(0, 2), torch.tensor([0.02, 0.98]), dim=0)
    levels = ((values - low) / (high - low)).clamp(0, 1).mul(255).byte().numpy()
    axes = drawing.new_grid(figure, (1.7 * len(shown), 5.1), 3, len(shown)).T
    for column, each, level, value in zip(axes, shown, levels, values[..., 0] > 0, strict=True):
        image = drawing.to_pil(each.pixels)
        plots.plot_image(image, title=Path(each.path).name[:18], ax=column[0])
        colored = Image.fromarray(level).resize(image.size, Image.Resampling.NEAREST)
        plots.plot_image(colored, title="components 1–3", ax=column[1])
        masked = drawing.draw_mask(image, value, value, drawing.output_color("scale 2"))
        plots.plot_image(masked, title="component 1 > 0", ax=column[2])
    names = [f"component {number}" for number in (1, 2, 3)]
    each = [_by_patch(dict(zip(names, v.unbind(-1), strict=True))) for v in values]
    return pd.concat(each, keys=[each.path for each in shown], names=["image"]).reset_index(0)


def by_hand(
    inspector: Inspector, settings: ProposalSettings, figure: Figure, box: Sequence[float]
) -> pd.DataFrame:
    """What scale 2 sees in a box (pixels of the image), beside what is proposed and annotated."""
    inspector, settings = copy(inspector), replace(settings, scales=2)
    first, proposed = inspector.outputs(settings)
    given = inspector.outputs(inspector.by_hand(box, settings))[1]
    outputs = {"scale 1": first, "scale 2": proposed, "by hand": given}
    boxes = {name: inspector.image_boxes(each.boxes[:1]) for name, each in outputs.items()}
    shown = {name: each.logits[0].float().softmax(dim=0).cpu() for name, each in outputs.items()}
    axes = drawing.new_grid(figure, (9.5, 2.5), 1, 3 + bool(inspector.classes))[0]
    scale = inspector.picture.height / inspector.size[0, 0]
    frames = {name: boxes[name] * scale for name in ("scale 2", "by hand")}
    plots.plot_image(inspector.picture, frames, inspector.box[0] * scale, "image", axes[0])
    for ax, name in zip(axes[1:], frames, strict=False):
        crop = inspector.model.denormalize(outputs[name].input[0])
        plots.plot_image(crop, title=f"input, {name}", ax=ax)
    if inspector.classes:
        plots.plot_probabilities(shown, inspector.classes, inspector.label, axes[3])
    return _scores(inspector, boxes, shown)


def elsewhere(
    inspector: Inspector,
    settings: ProposalSettings,
    figure: Figure,
    box: Sequence[float],
    steps: int = 8,
    probabilities: Sequence[float] | None = None,
) -> pd.DataFrame:
    """The true class's probability at scale 2 for a box slid over the image, at its centers.

    Args:
        inspector: of the image.
        settings: where crops are cut from.
        figure: where to draw.
        box: whose size the boxes have, in pixels of the image.
        steps: boxes per row and per column.
        probabilities: of the true class, where they are known.
    """
    boxes = inspector.sliding_boxes(box, steps)
    places = (inspector.by_hand(each, settings) for each in boxes.tolist())
    probabilities = probabilities or list(inspector.true_probabilities(places))
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2 * inspector.picture.height / inspector.size[0, 0]
    half = (centers[-1] - centers[0]) / (steps - 1) / 2
    frame = torch.cat([centers[0] - half, centers[-1] + half])
    figure.set_size_inches(5, 3)
    values = torch.tensor(probabilities).view(steps, steps)
    plots.plot_map(inspector.picture, values, "probability at scale 2", frame, figure.subplots())
    return pd.DataFrame(boxes, columns=BOX_COLUMNS).assign(probability=probabilities)


def compare(
    inspector: Inspector, settings: ProposalSettings, figure: Figure, other: tuple[str, ...]
) -> pd.DataFrame:
    """All scales, in this model and below in another one; ``other`` is what `load` takes."""
    second = inspector_of(load_once(*other))
    second.set_image(inspector.path, inspector.label, inspector.box[0].tolist())
    lacks = settings.functions[0] in CLASS_STRENGTHS and not second.has_class_token
    own = replace(settings, strength=second.settings.strength) if lacks else settings
    figure.set_size_inches(9.2, 5.4)
    tables = []
    both = (inspector, settings, "this model"), (second, own, " ".join(other[:2]))
    for half, (each, given, name) in zip(figure.subfigures(2, 1), both, strict=True):
        tables.append(recursion(each, given, half).assign(model=name))
        half.suptitle(name, fontsize=9, x=0.01, ha="left")
    return pd.concat(tables, ignore_index=True)


@drawing.styled
def files(inspector: Inspector, settings: ProposalSettings, state: dict) -> dict[str, bytes]:
    """Views as PNG, SVG and PDF, their numbers as CSV and their state as JSON, by name."""
    found = {"state.json": json.dumps(state, indent=1).encode()}
    for view, options in state["views"].items():
        figure = Figure()
        numbers = VIEWS[view](inspector, settings, figure, **options)
        for form in ("png", "svg", "pdf"):
            content = io.BytesIO()
            figure.savefig(content, format=form)
            found[f"{view}.{form}"] = content.getvalue()
        found[f"{view}.csv"] = numbers.to_csv(index=False).encode(errors="surrogateescape")
    return found


def code(state: dict) -> str:
    """A cell of Python that remakes what the explorer shows: figures, and ``numbers`` by view.

    Args:
        state: of the explorer, see `Explorer.state`.
    """
    given = state["widgets"]
    strength, block = repr(given["strength"]), given["block"]
    if given["strength"].startswith("single_"):
        head = given["head"] if given["strength"] == "single_head" else None
        strength = f"single_block({block}, {head}, inspector.has_class_token)"
    thresholds = tuple(value for name, value in given.items() if name.startswith("threshold"))
    return f"""\
import matplotlib.pyplot as plt
from ramslib.explorer.views import VIEWS, inspector_of, load
from ramslib.inspector import single_block

inspector = inspector_of(load({state["model"]!r}))
inspector.set_image({state["image"]!r}, {state["label"]!r}, {state["box"]!r})
settings = inspector.changed(
    thresholds={thresholds},
    strength={strength},
    proposal={given["proposal"]!r},
    scales={given["scales"]},
    from_high_res={given["crop from"]},
    upsampling={given["upsampling"]},
)
numbers = {{}}
for view, options in {state["views"]!r}.items():
    numbers[view] = VIEWS[view](inspector, settings, plt.figure(), **options)
"""


def export_page(run: Path | str, images: Sequence[Path | str], out: Path) -> Path:
    """Write images with all that a threshold does to them as one HTML file.

    It needs neither kernel nor network: a slider moves over thresholds that were computed.

    Args:
        run: a run's folder, or timm's name of a backbone.
        images: files.
        out: the new file.

    Raises:
        InputError: the file exists, or see `load` and `Inspector.set_image`.
    """
    if out.suffix != ".html" or os.path.lexists(out):
        raise InputError(f"{out}: give a new file that ends in .html")
    inspector = inspector_of(loaded := load(run))
    known = loaded.table.set_index("path")
    pages = []
    for path in map(os.path.abspath, images):
        row = known.loc[path] if path in known.index else None
        label, box = (None, None) if row is None else (int(row["label"]), row[BOX_COLUMNS])
        inspector.set_image(path, label, box)
        pages.append(_page_of(inspector, replace(inspector.settings, scales=2)))
    template = Path(__file__).with_name("export.html.j2").read_text("utf-8")
    eta = inspector.settings.threshold(0)
    shared = {"classes": loaded.classes, "thresholds": PAGE_THRESHOLDS, "model": loaded.name}
    shared["start"] = min(round(10 * eta), len(PAGE_THRESHOLDS) - 1)
    text = jinja2.Template(template, autoescape=True).render(images=pages, **shared)
    write_atomically(out, lambda part: part.write_text(text, encoding="utf-8"))
    return out


def _page_of(inspector: Inspector, settings: ProposalSettings) -> dict:
    """What the page shows of an image: its picture, strength, and all that a threshold changes."""
    picture, content = inspector.picture.copy(), io.BytesIO()
    picture.thumbnail((PAGE_SIDE, PAGE_SIDE))
    picture.save(content, "jpeg", quality=80)
    steps, shown = [], {}
    for eta in PAGE_THRESHOLDS:
        region = inspector.region(0, settings, threshold=eta)
        step = {"box": inspector.image_boxes(region.boxes[:1])[0].round().tolist(), "classes": []}
        steps.append(step | {"kept": region.proposal.component[0].flatten().int().tolist()})
        if inspector.classes:
            shown = inspector.probabilities(inspector.outputs(settings, threshold=eta))
            top = top_classes(shown, inspector.classes, inspector.label, 4).round(3)
            steps[-1]["classes"] = top.reset_index().to_numpy().tolist()
    truth = [box for box in inspector.box.round().tolist() if box[0] == box[0]]
    finer = upsample(region.strength, settings.upsampling)[0]
    relative = drawing.relative_strength(finer).flatten().double()
    return {
        "name": Path(inspector.path).name,
        "picture": "data:image/jpeg;base64," + b64encode(content.getvalue()).decode(),
        "size": inspector.size[0].tolist(),
        "seen": inspector.seen[0].tolist(),
        "truth": truth,
        "grid": finer.shape,
        "strength": relative.round(decimals=3).tolist(),
        "outputs": list(shown),
        "steps": steps,
    }


load_once = lru_cache(maxsize=1)(load)


def inspector_of(loaded: LoadedModel) -> Inspector:
    """A new inspector of a model."""
    return Inspector(loaded.model, loaded.transform, loaded.classes)


def _scores(
    inspector: Inspector, boxes: dict[str, Tensor], probabilities: dict[str, Tensor]
) -> pd.DataFrame:
    """A row per output: its box (1, 4) in pixels of the image, its IoU, class probabilities."""
    rows = []
    for name in probabilities if inspector.classes else boxes:
        row = {"output": name}
        if name in boxes:
            row |= dict(zip(BOX_COLUMNS, boxes[name][0].tolist(), strict=True))
            row["iou"] = float(box_iou(boxes[name], inspector.box)[0])
        rows.append(row | dict(zip(inspector.classes, probabilities[name].tolist(), strict=False)))
    return pd.DataFrame(rows)


def _many(inspector: Inspector, maps: Tensor, name: str, figure: Figure) -> pd.DataFrame:
    plots.plot_strength_per_block(maps, inspector.pixels, name, figure)
    return _by_patch({f"{name} {number}": each for number, each in enumerate(maps, start=1)})


def _by_patch(maps: dict[str, Tensor]) -> pd.DataFrame:
    """Maps (h, w) as columns, a row per patch."""
    height, width = next(iter(maps.values())).shape
    places = {"row": np.repeat(range(height), width), "column": np.tile(range(width), height)}
    return pd.DataFrame(places | {name: each.flatten().tolist() for name, each in maps.items()})


SHOWN = threshold, recursion, blocks, tokens, heads, colors, by_hand, elsewhere, compare
VIEWS: dict[str, Callable[..., pd.DataFrame]] = {
    view.__name__.replace("_", " "): view for view in (*SHOWN, *validation.FIGURES)
}
READ: dict[str, Callable[[ProposalSettings], object]] = {  # all else redraws nothing
    "blocks": lambda settings: settings.functions[0],
    "elsewhere": lambda settings: settings.from_high_res,
    **dict.fromkeys(("tokens", "heads", "colors"), lambda settings: None),
}
