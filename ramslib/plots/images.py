"""Figures that show photos: what each scale looked at, and why. Tensors in, Axes out.

Each function draws on ``ax`` (or a row of ``axes``) where given, else on a new figure. Boxes are
``(top, left, bottom, right)`` in pixels of the photo shown.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from ramslib.boxes import rescale_boxes
from ramslib.classifier import ScaleOutput
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import open_image
from ramslib.dppm import Proposal
from ramslib.evaluation import fuse, output_names
from ramslib.plots.drawing import (
    ANNOTATION_COLOR,
    HEATMAP_CMAP,
    clean_class_name,
    draw_mask,
    draw_strength,
    new_axes,
    output_color,
    panels,
    relative_strength,
    styled,
    to_picture,
)


@styled
def plot_image(
    photo: Tensor | Image.Image,
    boxes: Mapping[str, Sequence[float]] | None = None,
    truth: Sequence[float] | None = None,
    title: str = "",
    ax: Axes | None = None,
    mean_std: tuple | None = None,
) -> Axes:
    """A photo with boxes.

    Args:
        photo: see `to_picture`.
        boxes: by view name, such as ``{"scale 2": box}``, in pixels of the photo.
        truth: the annotated box, drawn dashed; None or NaN is none.
        title: above it.
        ax: where to draw.
        mean_std: what a float photo was normalized with.
    """
    ax = new_axes(ax, 2.4, 2.4)
    ax.imshow(to_picture(photo, mean_std))
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)
    for name, box in (boxes or {}).items():
        _draw_box(ax, box, output_color(name), "-")
    if truth is not None and np.isfinite(np.asarray(truth, dtype=float)).all():
        _draw_box(ax, truth, ANNOTATION_COLOR, (0, (4, 2)))
    return ax


def _draw_box(ax: Axes, box: Sequence[float], color: str, line) -> None:
    top, left, bottom, right = (float(side) - 0.5 for side in box)
    for ink, width, style in (("black", 3, "-"), (color, 1.8, line)):
        look = {"fill": False, "edgecolor": ink, "linewidth": width, "linestyle": style}
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, **look, clip_on=False))


@styled
def plot_strength(
    photo: Tensor | Image.Image,
    strength: Tensor,
    threshold: float | None = None,
    title: str = "attention strength",
    ax: Axes | None = None,
    mean_std: tuple | None = None,
    opacity: float = 0.6,
    limit: float | None = None,
    bar: bool = True,
) -> Axes:
    """Attention strength (h, w) over its view, with a color bar in multiples of the mean.

    Args:
        photo: the view, see `to_picture`.
        strength: one value per patch.
        threshold: the paper's eta, marked on the bar.
        title: above it.
        ax: where to draw.
        mean_std: what a float photo was normalized with.
        opacity: of the heat.
        limit: the end of the bar; the maximum by default.
        bar: whether there is one.
    """
    picture = draw_strength(to_picture(photo, mean_std), strength, opacity, limit)
    ax = plot_image(picture, title=title, ax=ax)
    if bar:
        end = limit or float(relative_strength(strength).nan_to_num().max())
        colors = ScalarMappable(Normalize(0, end), HEATMAP_CMAP)
        scale = ax.figure.colorbar(colors, ax=ax, shrink=0.8, pad=0.02, aspect=14)
        scale.set_label("× mean strength", fontsize="small")
        scale.ax.tick_params(labelsize="small")
        if threshold is not None:
            scale.ax.axhline(threshold, color="black", linewidth=3)
            scale.ax.axhline(threshold, color="white", linewidth=1.2)
    return ax


@styled
def plot_mask(
    photo: Tensor | Image.Image,
    proposal: Proposal,
    index: int = 0,
    scale: int = 2,
    title: str = "patch mask",
    ax: Axes | None = None,
    mean_std: tuple | None = None,
) -> Axes:
    """The patch mask over its view, its kept component, and the box for the next ``scale``.

    ``index`` chooses the image of the proposal's batch; see `draw_mask` for the drawing.
    """
    name = f"scale {scale}"
    picture = to_picture(photo, mean_std)
    mask, component = proposal.mask[index], proposal.component[index]
    frame = torch.tensor([0.0, 0.0, picture.height, picture.width])
    box = rescale_boxes(proposal.patch_boxes[index].cpu(), tuple(mask.shape), frame)
    painted = draw_mask(picture, mask, component, output_color(name))
    return plot_image(painted, {name: box}, title=title, ax=ax)


@styled
def plot_recursion(
    looks: Sequence[ScaleOutput],
    photo: Tensor | Image.Image,
    mean_std: tuple,
    classes: Sequence[str] = (),
    label: int | None = None,
    truth: Sequence[float] | None = None,
    index: int = 0,
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """What happened to one photo: boxes; per proposal strength, mask and crop; probabilities.

    Args:
        looks: ``list(model.scales(images, source))``.
        photo: the view of scale 1 at any resolution.
        mean_std: the model's.
        classes: K names; none leaves the probabilities out.
        label: the true class, or None.
        truth: the annotated box, in pixels of ``photo``.
        index: which image of the batch.
        axes: `recursion_columns` of them.
    """
    if axes is None:
        axes = panels(1, recursion_columns(len(looks), bool(len(classes))))[1][0]
    picture, size = to_picture(photo, mean_std), tuple(looks[0].view.shape[-2:])
    frame = torch.tensor([0.0, 0.0, picture.height, picture.width])
    boxes = {
        f"scale {number}": rescale_boxes(look.boxes[index].cpu(), size, frame)
        for number, look in enumerate(looks[1:], start=2)
    }
    title = "" if label is None or not len(classes) else clean_class_name(classes[label])
    plot_image(picture, boxes, truth, title, axes[0])
    for number, (look, following) in enumerate(zip(looks, looks[1:], strict=False), start=1):
        heat, mask, crop = axes[3 * number - 2 : 3 * number + 1]
        view, title = look.view[index], f"attention strength, scale {number}"
        plot_strength(view, look.strength[index], None, title, heat, mean_std)
        title = f"patch mask, scale {number}"
        plot_mask(view, look.proposal, index, number + 1, title, mask, mean_std)
        title = f"scale {number + 1} sees"
        plot_image(following.view[index], title=title, ax=crop, mean_std=mean_std)
    if len(classes):
        plot_probabilities(probabilities_of(looks, index), classes, label, ax=axes[-1])
    return axes


def recursion_columns(scales: int, classified: bool = True) -> int:
    """How many Axes `plot_recursion` draws on."""
    return 1 + 3 * (scales - 1) + classified


def probabilities_of(looks: Sequence[ScaleOutput], index: int = 0) -> dict[str, Tensor]:
    """(K,) class probabilities of one image per scale, and their mean where there are several."""
    fused = fuse(tuple(look.logits[index : index + 1] for look in looks))
    names = [name for name in output_names(len(looks)) if name != "mean logits"]
    return {name: values[0].cpu() for name, values in zip(names, fused, strict=False)}


@styled
def plot_probabilities(
    probabilities: Mapping[str, Tensor],
    classes: Sequence[str],
    label: int | None = None,
    count: int = 4,
    ax: Axes | None = None,
) -> Axes:
    """The likeliest classes as probability_bars, one bar per view name; the true class is ticked.

    Args:
        probabilities: (K,) per view name, see `probabilities_of`.
        classes: K names.
        label: the true class, always shown; None is unknown.
        count: classes shown, by their best probability in any view.
        ax: where to draw.
    """
    table = top_classes(probabilities, classes, label, count)
    palette = {name: output_color(name) for name in probabilities}
    ax = new_axes(ax, 2.3, 3.4)
    shape = {"y": "class", "x": "probability", "hue": "view"}
    sns.barplot(table, **shape, palette=palette, saturation=1, ax=ax, errorbar=None)
    ax.set(xlim=(0, 1), ylabel="", title="class probabilities")
    ax.grid(False, axis="y")
    ax.legend(loc="lower right", fontsize="x-small")
    return ax


def top_classes(
    probabilities: Mapping[str, Tensor], classes: Sequence[str], label: int | None, count: int
) -> pd.DataFrame:
    """The probability_bars of `plot_probabilities`: ``class, view, probability``, likeliest class first."""
    stacked = torch.stack(list(probabilities.values())).cpu()
    shown = stacked.max(dim=0).values.topk(min(count, stacked.shape[1])).indices.tolist()
    if label is not None and label not in shown:
        shown[-1] = label
    names = [clean_class_name(classes[k]) + (" ✓" if k == label else "") for k in shown]
    return pd.DataFrame(
        {
            "class": np.repeat(names, len(probabilities)),
            "view": list(probabilities) * len(shown),
            "probability": stacked[:, shown].T.flatten().tolist(),
        }
    )


@styled
def plot_strength_per_block(
    strengths: Tensor, photo: Tensor | Image.Image, mean_std: tuple | None = None, axes=None
) -> Sequence[Axes]:
    """The strength (L, h, w) after each block over its view, each in its own brightness."""
    if axes is None:
        axes = panels(-(-len(strengths) // 6), min(6, len(strengths)), 1.5)[1].flat
    axes = list(axes)
    for number, (ax, strength) in enumerate(zip(axes, strengths, strict=False), start=1):
        plot_strength(photo, strength, None, f"block {number}", ax, mean_std, bar=False)
    for ax in axes[len(strengths) :]:
        ax.axis("off")
    return axes


@styled
def plot_samples(table: pd.DataFrame, rows: int = 2, columns: int = 5, seed: int = 0):
    """A sheet of photos drawn by seed, classes in turn, with annotated boxes and class names."""
    shuffled = table.sample(frac=1, random_state=seed)
    turn = shuffled.groupby("label").cumcount()
    chosen = shuffled.iloc[np.lexsort([shuffled["label"], turn])].head(rows * columns)
    axes = panels(rows, columns, 1.7, 2)[1]
    for ax in axes.flat:
        ax.axis("off")
    for ax, row in zip(axes.flat, chosen.to_dict("records"), strict=False):
        box = [row[side] for side in BOX_COLUMNS]
        plot_image(open_image(row["path"]), None, box, clean_class_name(row["class_name"]), ax)
    return axes
