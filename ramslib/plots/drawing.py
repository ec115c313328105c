"""The style that all figures share, and drawing on images, fast enough for a slider.

Each output has one color, marker and line style in all figures (colors of Okabe and Ito, safe for
color-blind readers); color maps are perceptually uniform. Boxes are ``(top, left, bottom, right)``
in pixels of the image that is drawn on.
"""

import functools
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

ANNOTATION_COLOR = "#ffffff"  # of annotated boxes, dashed
HEATMAP_CMAP = "inferno"
STYLE = matplotlib.rc_params_from_file(
    Path(__file__).with_name("style.mplstyle"), use_default_template=False
)
_INSTALLED = set(fontManager.get_font_names())  # a family that is not would log a line per text
STYLE["font.family"] = [name for name in STYLE["font.sans-serif"] if name in _INSTALLED]
_COLORS = STYLE["axes.prop_cycle"].by_key()["color"]  # of scales 1, 2, ...
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = "os^Dvp"
_FUSIONS = {
    "mean softmax": {"color": "#222222", "marker": "X", "linestyle": (0, (8, 2))},
    "mean logits": {"color": "#999999", "marker": "P", "linestyle": (0, (2, 2))},
    "by hand": {"color": "#cc79a7", "marker": "*", "linestyle": ":"},
}
_LOCK = threading.RLock()  # matplotlib has one style for all threads


@contextmanager
def _style() -> Iterator[None]:
    with _LOCK:
        with plt.rc_context(STYLE):
            yield
            interactive = plt.isinteractive()  # a notebook's backend, once chosen, remains chosen
        matplotlib.interactive(interactive)


styled = _style()  # a decorator: what a function draws has this style, in any thread


def output_style(name: str) -> dict:
    """Color, marker and line style of ``scale 1``, ``scale 2``, ... or of a fusion."""
    if name in _FUSIONS:
        return _FUSIONS[name]
    index = (int(name.split()[-1]) - 1) % len(_COLORS)
    return {"color": _COLORS[index], "marker": _MARKERS[index], "linestyle": LINE_STYLES[index]}


def output_color(name: str) -> str:
    """The color of an output, the same in every figure; see `output_style`."""
    return output_style(name)["color"]


def clean_class_name(class_name: str) -> str:
    """``001.Black_footed_Albatross`` as ``Black footed Albatross``."""
    head, dot, tail = class_name.partition(".")
    name = (tail if dot and head.isdigit() else class_name).replace("_", " ")
    name = name.encode(errors="replace").decode()  # names of folders may be no Unicode
    if not _drawable().issuperset("".join(name.split())):
        _warn_of_missing_glyphs()
    return name


@functools.cache
def _drawable() -> frozenset[str]:
    """The characters that the fonts of `STYLE` have."""
    fonts = (get_font(findfont(family)) for family in STYLE["font.family"])
    return frozenset(chr(code) for font in fonts for code in font.get_charmap())


@functools.cache  # once, where matplotlib would warn at each glyph of each figure
def _warn_of_missing_glyphs() -> None:
    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
    text = "no font for some characters of the class names: figures show them as boxes"
    remedy = f"install Noto Sans CJK, delete {matplotlib.get_cachedir()} and start Python again"
    warnings.warn(f"{text}; {remedy}", stacklevel=3)


def new_axes(ax: Axes | None, width: float = 4.2, height: float = 2.8) -> Axes:
    """``ax`` itself, or the Axes of a new figure of this size in inches."""
    return plt.subplots(figsize=(width, height))[1] if ax is None else ax


def new_grid(
    figure: FigureBase | None, size: tuple, rows: int = 1, columns: int = 1, blank: bool = False
) -> np.ndarray:
    """Axes (rows, columns) in a figure, or in a new one, of this size in inches.

    ``blank`` shows nothing of those that remain empty.
    """
    figure = plt.figure() if figure is None else figure
    if isinstance(figure, Figure):  # a part of one has its size
        figure.set_size_inches(*size)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat if blank else ():
        ax.axis("off")
    return axes


def to_pil(image: Tensor | Image.Image) -> Image.Image:
    """A PIL image or a (3, H, W) uint8 tensor as an RGB image."""
    is_pil = isinstance(image, Image.Image)
    return image.convert("RGB") if is_pil else to_pil_image(image.cpu())


def relative_strength(strength: Tensor) -> Tensor:
    """Strength (h, w) in multiples of its mean, the unit of the threshold; NaN is 0."""
    return (strength / strength.mean()).nan_to_num().cpu()


def draw_strength(image: Image.Image, strength: Tensor, opacity: float = 0.6) -> Image.Image:
    """Attention strength (h, w) as a heat map over the image that it was recorded for.

    Args:
        image: RGB.
        strength: only its ratios matter; NaN is cold.
        opacity: of the heat map, 0 to 1.
    """
    relative = relative_strength(strength).numpy()
    levels = relative / max(float(relative.max()), 1e-12)
    heat = Image.fromarray(plt.get_cmap(HEATMAP_CMAP)(levels, bytes=True)[..., :3].copy())
    return Image.blend(image, heat.resize(image.size, Image.Resampling.NEAREST), opacity)


def draw_mask(image: Image.Image, mask: Tensor, component: Tensor, color: str) -> Image.Image:
    """The patch mask over its image: the kept component outlined, other strong patches dimmed.

    Args:
        image: RGB.
        mask: (h, w) bool, patches above the threshold; the others are almost dark.
        component: (h, w) bool, the one that the box encloses.
        color: of the outline, that of the next scale.
    """
    light = torch.where(component.cpu(), 255, torch.where(mask.cpu(), 140, 60)).byte().numpy()
    light = Image.fromarray(light).resize(image.size, Image.Resampling.NEAREST)
    image = ImageChops.multiply(image, Image.merge("RGB", [light] * 3))
    draw = ImageDraw.Draw(image)
    tall, wide = image.height / component.shape[0], image.width / component.shape[1]
    for axis, (dy, dx) in enumerate(((0, 1), (1, 0))):  # horizontal edges, then vertical ones
        edges = np.diff(component.cpu().numpy(), axis=axis, prepend=False, append=False)
        for y, x in np.argwhere(edges):
            line = x * wide, y * tall, (x + dx) * wide, (y + dy) * tall
            draw.line(line, fill=color, width=max(1, round(image.height / 180)))
    return image


def draw_box(
    image: Image.Image, box: Sequence[float], color: str, dashed: bool = False
) -> Image.Image:
    """A copy of the image with one more box, drawn inside its edges with a dark rim."""
    image, thick = image.copy(), max(2, round(min(image.size) / 110))
    top, left, bottom, right = (round(float(side)) for side in box)
    if right - left <= 2 * thick or bottom - top <= 2 * thick:
        return image
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), None, "black", thick + 2)
    line = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(line).rectangle((1, 1, line.width - 2, line.height - 2), None, 255, thick)
    if dashed:
        across = np.add.outer(np.arange(line.height), np.arange(line.width)) // (4 * thick) % 2
        line = Image.fromarray(np.asarray(line) * across.astype(np.uint8))
    image.paste(color, (left, top), line)
    return image
