"""The style that all figures share, and painting on photos, fast enough for a slider.

Each scale has one color in all figures (Okabe and Ito: safe for all eyes); color maps are
perceptually uniform. Boxes are ``(top, left, bottom, right)`` in pixels of the picture.
"""

import functools
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import IPython.display
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

from ramslib.errors import write_atomically

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # of scales 1, 2, ..
FUSED = {"mean softmax": "#222222", "mean logits": "#999999"}
ANNOTATION_COLOR = "#ffffff"  # of annotated boxes, dashed
HEATMAP_CMAP = "inferno"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called $5
}
_STYLING = threading.RLock()  # matplotlib's style is one for all threads


def styled(function: Callable) -> Callable:
    """A decorator: what a function draws has the house style, whoever calls it from any thread."""

    @functools.wraps(function)
    def wrapper(*args, **options):
        with _STYLING:
            with plt.rc_context(STYLE):
                result = function(*args, **options)
                interactive = plt.isinteractive()  # a notebook's backend, once chosen, stays chosen
            matplotlib.interactive(interactive)
        return result

    return wrapper


def output_color(name: str) -> str:
    """The color of ``scale 1``, ``scale 2``, .. or of a fusion, the same in every figure."""
    return FUSED.get(name) or COLORS[(int(name.split()[-1]) - 1) % len(COLORS)]


def clean_class_name(class_name: str) -> str:
    """``001.Black_footed_Albatross`` as ``Black footed Albatross``."""
    head, dot, tail = class_name.partition(".")
    return (tail if dot and head.isdigit() else class_name).replace("_", " ")


@styled
def panels(rows: int = 1, columns: int = 1, height: float = 2.3, width: float | None = None):
    """A figure and its (rows, columns) Axes, each so many inches; square unless told."""
    inches = columns * (width or height), rows * height
    return plt.subplots(rows, columns, figsize=inches, squeeze=False)


def new_axes(ax: Axes | None, height: float = 2.8, width: float = 4.2) -> Axes:
    """``ax`` itself, or the Axes of a new figure of so many inches."""
    return panels(1, 1, height, width)[1][0, 0] if ax is None else ax


@styled
def as_bytes(axes: Axes | Sequence[Axes], form: str = "png") -> bytes:
    """The figure of some Axes as a file's content: png, jpeg or svg; the figure is closed."""
    figure = np.ravel(axes)[0].figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    plt.close(figure)
    return buffer.getvalue()


def as_image(axes: Axes | Sequence[Axes]) -> IPython.display.Image:
    """The figure of some Axes as a picture for a notebook's live display; the figure is closed."""
    return IPython.display.Image(as_bytes(axes))


@styled
def save(drawing: Axes | Figure, path: Path | str) -> Path:
    """Write a figure atomically; ``.pdf`` and ``.svg`` are vectors with real text."""
    path = Path(path)
    figure = drawing if isinstance(drawing, Figure) else drawing.figure
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: figure.savefig(part, format=path.suffix[1:]))
    return path


def to_picture(image: Tensor | Image.Image, mean_std: tuple | None = None) -> Image.Image:
    """Any image as RGB: PIL, a (3, H, W) uint8 tensor, or floats normalized with ``mean_std``."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.is_floating_point():
        mean, std = (torch.tensor(v, device=image.device)[:, None, None] for v in mean_std)
        image = ((image * std + mean) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())


def draw_strength(
    picture: Image.Image, strength: Tensor, opacity: float = 0.6, limit: float | None = None
) -> Image.Image:
    """Attention strength (h, w) as heat over its view.

    Args:
        picture: the view.
        strength: only its ratios matter; NaN is cold.
        opacity: of the heat, 0 to 1.
        limit: the multiple of the mean that is brightest; the maximum by default.
    """
    relative = relative_strength(strength).nan_to_num().numpy()
    levels = relative / (limit or max(float(relative.max()), 1e-12))
    heat = Image.fromarray(plt.get_cmap(HEATMAP_CMAP)(levels, bytes=True)[..., :3].copy())
    return Image.blend(picture, heat.resize(picture.size, Image.Resampling.NEAREST), opacity)


def relative_strength(strength: Tensor) -> Tensor:
    """Strength (h, w) in multiples of its mean, the unit of the threshold."""
    return (strength / strength.mean()).cpu()


def draw_mask(picture: Image.Image, mask: Tensor, component: Tensor, color: str) -> Image.Image:
    """The patch mask over its view: the kept component outlined, other strong patches dimmed.

    Args:
        picture: the view.
        mask: (h, w) bool, patches above the threshold; the others are almost dark.
        component: (h, w) bool, the one that the box encloses.
        color: of the outline, that of the scale which will look there.
    """
    light = torch.where(component.cpu(), 255, torch.where(mask.cpu(), 140, 60)).byte().numpy()
    light = Image.fromarray(light).resize(picture.size, Image.Resampling.NEAREST)
    picture = ImageChops.multiply(picture, Image.merge("RGB", [light] * 3))
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    padded = np.pad(component.cpu().numpy(), 1).astype(np.int8)
    tall, wide = height / component.shape[0], width / component.shape[1]
    thick = max(1, round(height / 180))
    for y, x in np.argwhere(np.diff(padded[:, 1:-1], axis=0)):
        draw.line((x * wide, y * tall, (x + 1) * wide, y * tall), fill=color, width=thick)
    for y, x in np.argwhere(np.diff(padded[1:-1], axis=1)):
        draw.line((x * wide, y * tall, x * wide, (y + 1) * tall), fill=color, width=thick)
    return picture


def draw_box(
    picture: Image.Image, box: Sequence[float], color: str, dashed: bool = False
) -> Image.Image:
    """The picture with one more box, drawn inside its edges with a dark rim."""
    picture, thick = picture.copy(), max(2, round(min(picture.size) / 110))
    top, left, bottom, right = (round(float(side)) for side in box)
    if right - left <= 2 * thick or bottom - top <= 2 * thick:
        return picture
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), None, "black", thick + 2)
    line = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(line).rectangle((1, 1, line.width - 2, line.height - 2), None, 255, thick)
    if dashed:
        across = np.add.outer(np.arange(line.height), np.arange(line.width)) // (4 * thick) % 2
        line = Image.fromarray(np.asarray(line) * across.astype(np.uint8))
    picture.paste(color, (left, top), line)
    return picture
