"""Figures of images: patches, attention strength, masks, boxes, crops and probabilities.

An image is PIL's or a (3, H, W) uint8 tensor. Boxes are ``(top, left, bottom, right)`` in pixels of
the image that is shown.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from ramslib.boxes import rescale_boxes
from ramslib.classifier import ImageClassifier, ScaleOutput
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import open_image
from ramslib.dppm import Proposal
from ramslib.evaluation import probabilities
from ramslib.plots import drawing
from ramslib.plots.drawing import clean_class_name, new_axes, new_grid, output_color, styled, to_pil

RIM = [withStroke(linewidth=1.8, foreground="black", alpha=0.5)]  # lines on images of any color
AnyImage = Tensor | Image.Image
Box = Sequence[float] | Tensor


@styled
def plot_image(
    image: AnyImage,
    boxes: Mapping[str, Box] | None = None,
    truth: Box | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """An image with boxes.

    Args:
        image: PIL's, or (3, H, W) uint8.
        boxes: one (4,) or several (R, 4) by output, such as ``{"scale 2": box}``.
        truth: the annotated box, drawn dashed; None or NaN is none.
        title: above it.
        ax: where to draw.
    """
    ax = new_axes(ax, 2.4, 2.4)
    ax.imshow(to_pil(image))
    ax.set(xticks=[], yticks=[], title=title.encode(errors="replace").decode())  # names of files
    ax.spines[:].set_visible(False)
    for name, group in (boxes or {}).items():
        for box in torch.as_tensor(group).reshape(-1, 4).tolist():
            _add_box(ax, box, output_color(name), "-")
    if truth is not None and np.isfinite(np.asarray(truth, dtype=float)).all():
        _add_box(ax, truth, drawing.ANNOTATION_COLOR, (0, (4, 2)))
    return ax


def _add_box(ax: Axes, box: Sequence[float], color: str, line: str | tuple) -> None:
    top, left, bottom, right = (float(side) - 0.5 for side in box)
    for ink, width, style in (("black", 3, "-"), (color, 1.8, line)):
        options = {"fill": False, "edgecolor": ink, "linewidth": width, "linestyle": style}
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, **options, clip_on=False))


@styled
def plot_patch_grid(image: AnyImage, grid: tuple[int, int], ax: Axes | None = None) -> Axes:
    """An image cut into its (h, w) patches, the tokens of a Vision Transformer."""
    ax = plot_image(image, title=f"{grid[0]} × {grid[1]} patches", ax=ax)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    options = {"colors": "white", "linewidth": 0.7, "path_effects": RIM}
    ax.hlines(np.linspace(top, bottom, grid[0] + 1)[1:-1], left, right, **options)
    ax.vlines(np.linspace(left, right, grid[1] + 1)[1:-1], top, bottom, **options)
    return ax


@styled
def plot_map(
    image: AnyImage,
    values: Tensor,
    label: str = "",
    frame: Box | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Any values (h, w) over their image, with a color bar; zero is marked where some are below.

    Args:
        image: PIL's, or (3, H, W) uint8.
        values: one per patch or place.
        label: of the color bar.
        frame: where they lie, in pixels of the image; all of it by default.
        ax: where to draw.
    """
    ax, values = plot_image(image, ax=ax), values.float().cpu().numpy()
    top, left, bottom, right = (0, 0, *to_pil(image).size[::-1]) if frame is None else frame
    extent, lowest = [float(side) - 0.5 for side in (left, right, bottom, top)], values.min()
    options = {"cmap": drawing.HEATMAP_CMAP, "vmin": min(lowest, 0), "alpha": 0.6}
    limits = ax.get_xlim(), ax.get_ylim()
    heat = ax.imshow(values, **options, extent=extent, interpolation="nearest")
    ax.set(xlim=limits[0], ylim=limits[1])
    bar = ax.figure.colorbar(heat, ax=ax, shrink=0.8, pad=0.02, aspect=14)
    bar.solids.set_alpha(1)
    bar.set_label(label, fontsize="small")
    bar.ax.tick_params(labelsize="small")
    if lowest < 0:
        bar.ax.axhline(0, color="white", linewidth=1, path_effects=RIM)
    return ax


@styled
def plot_strength(
    image: AnyImage, strength: Tensor, threshold: float | None = None, ax: Axes | None = None
) -> Axes:
    """Attention strength (h, w) over its image, with a color bar in multiples of the mean.

    Args:
        image: PIL's, or (3, H, W) uint8.
        strength: one value per patch.
        threshold: the paper's eta, marked on the bar.
        ax: where to draw.
    """
    ax = plot_map(image, drawing.relative_strength(strength), "× mean strength", ax=ax)
    ax.set_title("attention strength")
    if threshold is not None:
        bar = ax.images[-1].colorbar.ax
        bar.axhline(threshold, color="white", linewidth=1, path_effects=RIM)
    return ax


@styled
def plot_mask(
    image: AnyImage, proposal: Proposal, index: int = 0, scale: int = 2, ax: Axes | None = None
) -> Axes:
    """The patch mask over its image, the kept component outlined, the box for the next ``scale``.

    ``index`` chooses the image of the proposal's batch; see `draw_mask` for the drawing.
    """
    name, image = f"scale {scale}", to_pil(image)
    mask, component, boxes = (values[index].cpu() for values in proposal)
    frame = torch.tensor([0.0, 0.0, image.height, image.width])
    drawn = drawing.draw_mask(image, mask, component, output_color(name))
    boxes = {name: rescale_boxes(boxes, tuple(mask.shape), frame)}
    return plot_image(drawn, boxes, title="mask, component, box", ax=ax)


@styled
def plot_recursion(
    outputs: Sequence[ScaleOutput],
    pixels: Tensor,
    model: ImageClassifier,
    classes: Sequence[str] = (),
    labels: Sequence[int | None] | None = None,
    truths: Sequence[Box] | None = None,
    figure: Figure | None = None,
) -> np.ndarray:
    """What a model does with each image: strength, mask and box, crop, probabilities in a row.

    Strength, mask and crop are repeated for every proposal; of several regions the first is shown.

    Args:
        outputs: ``list(model.forward_scales(pixels))``.
        pixels: (B, 3, Hs, Ws) uint8, the transformed images.
        model: that of the outputs.
        classes: K names; none leaves the probabilities out.
        labels: B true classes, None where unknown.
        truths: (B, 4) annotated boxes, in pixels of ``pixels``.
        figure: where to draw.

    Returns:
        (B, columns) Axes.
    """
    count, columns = len(pixels), 3 * len(outputs) - 2 + bool(len(classes))
    size, frame = (2.3 * columns, 2.3 * count), torch.tensor([0.0, 0.0, *pixels.shape[-2:]])
    axes = new_grid(figure, size, count, columns)
    boxes = [rescale_boxes(output.boxes, model.image_size, frame) for output in outputs]
    for index, row in enumerate(axes):
        places = [index * len(output.input) // count for output in outputs]  # of first regions
        inputs = [model.denormalize(o.input[k]) for o, k in zip(outputs, places, strict=True)]
        label = None if labels is None or not len(classes) else labels[index]
        title = "image" if label is None else clean_class_name(classes[label])
        truth = None if truths is None else truths[index]
        own = {f"scale {n}": box.chunk(count)[index] for n, box in enumerate(boxes[1:], start=2)}
        plot_image(pixels[index], own, truth, title, row[0])
        for scale, output in enumerate(outputs[:-1]):
            heat, mask, crop = row[3 * scale + 1 : 3 * scale + 4]
            plot_strength(inputs[scale], output.strength[places[scale]], ax=heat)
            plot_mask(inputs[scale], output.proposal, places[scale], scale + 2, mask)
            plot_image(inputs[scale + 1], title=f"input of scale {scale + 2}", ax=crop)
        if len(classes):
            logits = [output.logits for output in outputs]
            shown = probabilities(logits, model, index)
            plot_probabilities(shown, classes, label, ax=row[-1])
    return axes


def top_classes(
    by_output: Mapping[str, Tensor], classes: Sequence[str], label: int | None, count: int
) -> pd.DataFrame:
    """The likeliest classes by their greatest probability at any output, the likeliest first.

    Args:
        by_output: (K,) probabilities, see `evaluation.probabilities`.
        classes: K names.
        label: the true class, always among them and ticked; None is unknown.
        count: classes at most.

    Returns:
        Probabilities: a row per class, with its clean name, and a column per output.
    """
    table = pd.DataFrame({name: values.tolist() for name, values in by_output.items()})
    shown = table.max(axis=1).nlargest(count).index.tolist()
    if label is not None and label not in shown:
        shown[-1] = label
    names = [clean_class_name(classes[k]) + (" ✓" if k == label else "") for k in shown]
    return table.loc[shown].set_axis(names)


@styled
def plot_probabilities(
    by_output: Mapping[str, Tensor],
    classes: Sequence[str],
    label: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The likeliest four classes as bars, one bar per output; see `top_classes`."""
    table = top_classes(by_output, classes, label, 4)
    colors = {name: output_color(name) for name in table}
    ax = table.plot.barh(ax=new_axes(ax, 3.4, 2.3), color=colors, width=0.8)
    ax.set(xlim=(0, 1), title="class probabilities")
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.legend(loc="lower right", fontsize="x-small")
    return ax


@styled
def plot_strength_per_block(
    strengths: Tensor, image: AnyImage, name: str = "block", figure: Figure | None = None
) -> Sequence[Axes]:
    """The strength (L, h, w) after each block over its image, each in its own brightness.

    Or any other maps, such as those of all heads, with ``name`` above them.
    """
    rows, columns = map_grid(len(strengths))
    axes = list(new_grid(figure, (1.5 * columns, 1.6 * rows), rows, columns, blank=True).flat)
    for number, (ax, strength) in enumerate(zip(axes, strengths, strict=False), start=1):
        drawn = drawing.draw_strength(to_pil(image), strength)
        plot_image(drawn, title=f"{name} {number}", ax=ax)
    return axes


def map_grid(count: int) -> tuple[int, int]:
    """Rows and columns of a figure of many maps."""
    return -(-count // 6), min(6, count)


@styled
def plot_samples(table: pd.DataFrame, rows: int = 2, columns: int = 5, seed: int = 0) -> np.ndarray:
    """Images drawn by seed, classes in turn, with annotated boxes and class names."""
    shuffled = table.sample(frac=1, random_state=seed)
    shuffled = shuffled.assign(turn=shuffled.groupby("label").cumcount())
    chosen = shuffled.sort_values(["turn", "label"]).head(rows * columns)
    axes = new_grid(None, (2 * columns, 1.7 * rows), rows, columns, blank=True)
    for ax, row in zip(axes.flat, chosen.to_dict("records"), strict=False):
        box = [row[side] for side in BOX_COLUMNS]
        plot_image(open_image(row["path"]), None, box, clean_class_name(row["class_name"]), ax)
    return axes


@styled
def plot_problems(problems: pd.DataFrame, columns: int = 4) -> np.ndarray:
    """Images with problems: at most two rows of each kind and place, a row per group.

    Args:
        problems: from `health.find_problems`; those of classes and of the dataset have no image.
        columns: images in a row, the first of a group.
    """
    images = problems[problems["path"] != ""]
    alone = images.groupby(["kind", "across"]).cumcount() // columns
    group = images["group"].where(images["group"] != "", alone.astype(str))
    rows = images.groupby([images["kind"], images["across"], group], sort=False)
    first = rows.head(1).groupby(["kind", "across"], sort=False).head(2).index
    chosen = [row.head(columns) for _, row in rows if row.index[0] in first]
    height = max(len(chosen), 1)
    axes = new_grid(None, (2.4 * columns, 2.4 * height), height, columns, blank=True)
    for line, row in zip(axes, chosen, strict=False):
        for ax, image in zip(line, row.itertuples(), strict=False):
            unread = image.kind == "unreadable"
            picture = Image.new("RGB", (4, 3), "lightgray") if unread else open_image(image.path)
            detail = Path(image.path).name if unread else image.detail
            plot_image(picture, title="\n".join([image.kind, *textwrap.wrap(detail, 26)]), ax=ax)
    return axes
