"""Figures of images: patches, attention strength, masks, boxes, crops and probabilities.

An image is PIL's or a (3, H, W) uint8 tensor. Boxes are ``(top, left, bottom, right)`` in pixels of
the image that is shown.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from ramslib.boxes import rescale_boxes
from ramslib.classifier import ImageClassifier, ScaleOutput
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import open_image
from ramslib.dppm import Proposal
from ramslib.evaluation import probabilities
from ramslib.plots.drawing import (
    ANNOTATION_COLOR,
    HEATMAP_CMAP,
    clean_class_name,
    draw_mask,
    new_axes,
    output_color,
    relative_strength,
    styled,
    to_pil,
)


@styled
def plot_image(
    image: Tensor | Image.Image,
    boxes: Mapping[str, Sequence[float] | Tensor] | None = None,
    truth: Sequence[float] | None = None,
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
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)
    for name, group in (boxes or {}).items():
        for box in torch.as_tensor(group).reshape(-1, 4).tolist():
            _add_box(ax, box, output_color(name), "-")
    if truth is not None and np.isfinite(np.asarray(truth, dtype=float)).all():
        _add_box(ax, truth, ANNOTATION_COLOR, (0, (4, 2)))
    return ax


def _add_box(ax: Axes, box: Sequence[float], color: str, line: str | tuple) -> None:
    top, left, bottom, right = (float(side) - 0.5 for side in box)
    for ink, width, style in (("black", 3, "-"), (color, 1.8, line)):
        options = {"fill": False, "edgecolor": ink, "linewidth": width, "linestyle": style}
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, **options, clip_on=False))


@styled
def plot_patch_grid(
    image: Tensor | Image.Image, grid: tuple[int, int], title: str = "", ax: Axes | None = None
) -> Axes:
    """An image cut into its (h, w) patches, the tokens of a Vision Transformer."""
    ax = plot_image(image, title=title or f"{grid[0]} × {grid[1]} patches", ax=ax)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for color, width in (("black", 1.6), ("white", 0.7)):
        options = {"colors": color, "linewidth": width}
        ax.hlines(np.linspace(top, bottom, grid[0] + 1)[1:-1], left, right, **options)
        ax.vlines(np.linspace(left, right, grid[1] + 1)[1:-1], top, bottom, **options)
    return ax


@styled
def plot_strength(
    image: Tensor | Image.Image,
    strength: Tensor,
    threshold: float | None = None,
    title: str = "attention strength",
    ax: Axes | None = None,
    has_bar: bool = True,
) -> Axes:
    """Attention strength (h, w) over its image, with a color bar in multiples of the mean.

    Args:
        image: PIL's, or (3, H, W) uint8.
        strength: one value per patch.
        threshold: the paper's eta, marked on the bar.
        title: above it.
        ax: where to draw.
        has_bar: whether there is a color bar.
    """
    ax = plot_image(image, title=title, ax=ax)
    where = *ax.get_xlim(), *ax.get_ylim()
    options = {"cmap": HEATMAP_CMAP, "vmin": 0, "alpha": 0.6, "extent": where}
    heat = ax.imshow(relative_strength(strength).numpy(), **options)
    if has_bar:
        bar = ax.figure.colorbar(heat, ax=ax, shrink=0.8, pad=0.02, aspect=14)
        bar.solids.set_alpha(1)
        bar.set_label("× mean strength", fontsize="small")
        bar.ax.tick_params(labelsize="small")
        for color, width in (("black", 3), ("white", 1.2)) if threshold is not None else ():
            bar.ax.axhline(threshold, color=color, linewidth=width)
    return ax


@styled
def plot_mask(
    image: Tensor | Image.Image,
    proposal: Proposal,
    index: int = 0,
    scale: int = 2,
    title: str = "mask, component, box",
    ax: Axes | None = None,
) -> Axes:
    """The patch mask over its image, the kept component outlined, the box for the next ``scale``.

    ``index`` chooses the image of the proposal's batch; see `draw_mask` for the drawing.
    """
    name, image = f"scale {scale}", to_pil(image)
    mask, component = proposal.mask[index], proposal.component[index]
    frame = torch.tensor([0.0, 0.0, image.height, image.width])
    box = rescale_boxes(proposal.patch_boxes[index].cpu(), tuple(mask.shape), frame)
    drawn = draw_mask(image, mask, component, output_color(name))
    return plot_image(drawn, {name: box}, title=title, ax=ax)


@styled
def plot_recursion(
    outputs: Sequence[ScaleOutput],
    pixels: Tensor,
    model: ImageClassifier,
    classes: Sequence[str] = (),
    labels: Sequence[int | None] | None = None,
    truths: Sequence[Sequence[float] | Tensor] | None = None,
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

    Returns:
        (B, columns) Axes.
    """
    images, columns = len(pixels), 3 * len(outputs) - 2 + bool(len(classes))
    size, frame = (2.3 * columns, 2.3 * images), torch.tensor([0.0, 0.0, *pixels.shape[-2:]])
    axes = plt.subplots(images, columns, figsize=size, squeeze=False)[1]
    for index, row in enumerate(axes):
        label = None if labels is None else labels[index]
        title = "image" if label is None or not len(classes) else clean_class_name(classes[label])
        boxes = {
            f"scale {number}": rescale_boxes(
                output.boxes.unflatten(0, (images, -1))[index], model.image_size, frame
            )
            for number, output in enumerate(outputs[1:], start=2)
        }
        plot_image(pixels[index], boxes, None if truths is None else truths[index], title, row[0])
        for scale, (output, following) in enumerate(zip(outputs, outputs[1:], strict=False), 1):
            heat, mask, crop = row[3 * scale - 2 : 3 * scale + 1]
            first, which = index * len(output.input) // images, f" {scale}" * (len(outputs) > 2)
            image = model.denormalize(output.input[first])
            plot_strength(image, output.strength[first], None, f"attention strength{which}", heat)
            title = f"mask, component, box{which}"
            plot_mask(image, output.proposal, first, scale + 1, title, mask)
            image = model.denormalize(following.input[index * len(following.input) // images])
            plot_image(image, title=f"crop: input of scale {scale + 1}", ax=crop)
        if len(classes):
            shown = probabilities([output.logits for output in outputs], index)
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
    count: int = 4,
    ax: Axes | None = None,
) -> Axes:
    """The likeliest classes as bars, one bar per output; see `top_classes`."""
    table = top_classes(by_output, classes, label, count)
    colors = {name: output_color(name) for name in table}
    ax = table.plot.barh(ax=new_axes(ax, 3.4, 2.3), color=colors, width=0.8)
    ax.set(xlim=(0, 1), title="class probabilities")
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.legend(loc="lower right", fontsize="x-small")
    return ax


@styled
def plot_strength_per_block(
    strengths: Tensor, image: Tensor | Image.Image, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """The strength (L, h, w) after each block over its image, each in its own brightness."""
    if axes is None:
        rows, columns = -(-len(strengths) // 6), min(6, len(strengths))
        axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.6 * rows), squeeze=False)[1]
    axes = list(np.ravel(axes))
    for number, (ax, strength) in enumerate(zip(axes, strengths, strict=False), start=1):
        plot_strength(image, strength, None, f"block {number}", ax, has_bar=False)
    for ax in axes[len(strengths) :]:
        ax.axis("off")
    return axes


@styled
def plot_samples(table: pd.DataFrame, rows: int = 2, columns: int = 5, seed: int = 0) -> np.ndarray:
    """Images drawn by seed, classes in turn, with annotated boxes and class names."""
    shuffled = table.sample(frac=1, random_state=seed)
    turn = shuffled.groupby("label").cumcount()
    chosen = shuffled.iloc[np.lexsort([shuffled["label"], turn])].head(rows * columns)
    axes = plt.subplots(rows, columns, figsize=(2 * columns, 1.7 * rows), squeeze=False)[1]
    for ax in axes.flat:
        ax.axis("off")
    for ax, row in zip(axes.flat, chosen.to_dict("records"), strict=False):
        box = [row[side] for side in BOX_COLUMNS]
        plot_image(open_image(row["path"]), None, box, clean_class_name(row["class_name"]), ax)
    return axes
