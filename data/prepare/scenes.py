"""Scenes drawn by code, of which the synthetic dataset is made.

A scene is a bird on a branch above stones and grass. Pose, size, place, colors, light and clutter
vary and say nothing about the species. Species differ only in the sign on a badge on the wing
(about 5 % of the image side, equal ink for every sign); stones carry badges of random species. So
the sign cannot be read at low resolution, and a crop of the wrong place misleads.
Points are complex numbers x + y j, y down.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

VERSION = 1  # of the drawings: raise it when a scene of the same seed looks different
FINENESS = 2  # scenes are drawn at this multiple of their size, then averaged down
PARTS = ("beak", "crown", "eye", "head", "leg", "mark", "tail")


class Scene(NamedTuple):
    """A drawn scene, and where the bird and its parts are in it, in pixels."""

    image: Image.Image
    box: tuple[float, float, float, float]  # (top, left, bottom, right), bottom and right exclusive
    parts: dict[str, tuple[float, float]]  # name -> (y, x) of its middle, never covered


def _smooth(points: np.ndarray) -> np.ndarray:
    for _ in range(3):  # cut the corners of the closed outline (Chaikin)
        ahead = np.roll(points, -1) - points
        points = np.stack([points + 0.25 * ahead, points + 0.75 * ahead], axis=1).ravel()
    return points


def _disc(center: complex, radius: float, steps: int = 48) -> np.ndarray:
    return center + radius * np.exp(2j * np.pi * np.arange(steps) / steps)


def _ribbon(spine, widths) -> np.ndarray:
    along = np.gradient(np.array(spine, complex))
    side = 0.5j * along / abs(along) * widths
    return np.concatenate([spine + side, (spine - side)[::-1]])


LEAF = _smooth(np.array([-0.05j, 0.6 - 0.2j, 1.1, 0.6 + 0.2j, 0.05j]))
SIGNS = {  # strokes in the unit disc; every sign has the same area, 28 % of the disc
    "Dot": [_disc(0, 0.53)],
    "Ring": [_ribbon(_disc(0, 0.68)[np.arange(50) % 48], 0.208)],
    "Bar": [_ribbon([-0.8, 0.8], 0.55)],
    "Twin": [_ribbon([y - 0.68, y + 0.68], 0.324) for y in (-0.36j, 0.36j)],
    "Cross": [_ribbon([-0.8, 0.8], 0.304), _ribbon([-0.8j, 0.8j], 0.304)],
    "Chevron": [_ribbon([-0.62 + 0.55j, -0.46j, 0.62 + 0.55j], np.array([0.42, 0.62, 0.42]))],
    "Half": [_disc(-0.3j, 0.75)[:25]],
    "Triad": [_disc(-0.5j * np.exp(1j * angle), 0.306) for angle in (0, 2.094, 4.189)],
}
# The bird, back to front: joint, name, corners of a smooth outline in percent of the body length.
JOINTS = {"body": 0, "head": 27 - 16j, "wing": 20 - 6j, "tail": -36 + 2j}
BIRD = """\
tail quill -30-4j -70-16j -108-16j -108+0j -70+2j -30+8j
tail quill -30-4j -70+4j -108+6j -108+22j -70+18j -30+8j
tail tail -30-4j -70-8j -112-8j -112+12j -70+12j -30+8j
body leg -6+25j -3+46j -10+46j -10+49j 10+49j 10+46j 1+46j -2+25j
body leg 8+25j 11+46j 4+46j 4+49j 24+49j 24+46j 15+46j 12+25j
body body 48+0j 40+28j 10+40j -30+28j -56+10j -52-8j -20-20j 10-36j 30-42j 48-25j
body belly 47-2j 39+27j 10+38j -27+27j 0+12j 26+10j
head beak 50-44j 52-42j 76-30j 76-30j 52-26j 50-24j
head head 57-36j 55-20j 40-13j 22-15j 13-28j 15-46j 30-56j 48-53j
head crown 10-36j 24-58j 50-56j 60-38j 44-40j 30-34j 14-16j
wing quill 0+0j -30-2j -66+4j -68+12j -30+14j 0+10j
wing wing 0+4j -30+4j -58+11j -58+19j -30+18j 0+14j
wing wing 33-4j 27+16j 0+23j -34+16j -48+7j -22-12j 12-22j
head eye 48-41j 48-32j 39-32j 39-41j
head glint 46-40j 46-37j 43-37j 43-40j
wing mark 13-10j 13+10j -7+10j -7-10j"""


def _pose_bird(rng, width: int, height: int) -> list[tuple[str, np.ndarray]]:
    """Names and outlines in canvas pixels of a posed bird, 38 to 55 % of the image side across."""
    turns = {joint: np.exp(1j * rng.uniform(-0.35, 0.35)) for joint in JOINTS}
    roll, mirrored, bird = turns.pop("body"), rng.uniform() < 0.5, []
    for joint, name, *corners in map(str.split, BIRD.splitlines()):
        outline = _smooth(np.array(corners, complex)) - JOINTS[joint]
        outline = roll * (outline * turns.get(joint, 1) + JOINTS[joint])
        bird.append((name, -outline.conj() if mirrored else outline))
    left, top, right, bottom = _bounds(bird)
    across, down = width / (right - left), height / (bottom - top)
    scale = min(rng.uniform(0.38, 0.55) * np.sqrt(across * down), 0.62 * across, 0.62 * down)
    x = rng.uniform(0.07, 0.93 - scale / across) * width  # a center crop of 0.875 never cuts it
    y = rng.uniform(0.07, 0.93 - scale / down) * height
    return [(name, (o - complex(left, top)) * scale + complex(x, y)) for name, o in bird]


def _bounds(bird) -> tuple[float, float, float, float]:
    points = np.concatenate([outline for _, outline in bird]).view(float).reshape(-1, 2)
    return *points.min(axis=0).tolist(), *points.max(axis=0).tolist()


def _color(rng, hue, saturation, value) -> np.ndarray:
    """Draw a color from ranges of hue (degrees), saturation and value (percent)."""
    h, s, v = (rng.uniform(*bounds) for bounds in (hue, saturation, value))
    return np.array(ImageColor.getrgb(f"hsv({h % 360:.1f},{s:.1f}%,{v:.1f}%)"), float)


def _plumage(rng) -> dict[str, np.ndarray]:
    hue = rng.uniform(0, 360) + np.array([-20, 20])
    body, wing = _color(rng, hue, (30, 80), (50, 95)), _color(rng, hue, (30, 70), (30, 60))
    beak, other = _color(rng, (25, 45), (10, 75), (35, 95)), _color(rng, hue, (40, 90), (30, 90))
    crown = (body, wing, 0.5 * wing, other[::-1])[rng.integers(4)]
    belly = body + (np.array([250, 240, 225]) - body) * rng.uniform(0.3, 0.9)
    plumage = {"body": body, "head": body, "belly": belly, "crown": crown, "beak": beak}
    plumage |= {"wing": wing, "tail": wing, "quill": 0.6 * wing, "leg": 0.7 * beak}
    return plumage | {"eye": np.full(3, 25.0), "glint": np.full(3, 250.0)}


def _fill(canvas: Image.Image, outline: np.ndarray, color) -> None:
    fill = tuple(np.clip(color, 0, 255).astype(int).tolist())
    ImageDraw.Draw(canvas).polygon([(z.real, z.imag) for z in outline.tolist()], fill=fill)


def _paint(canvas: Image.Image, outline: np.ndarray, color: np.ndarray, light: complex) -> None:
    """Fill an outline, shaded as if it bulged; ``light`` is a unit vector towards the light."""
    left, top, right, bottom = (int(bound) for bound in _bounds([("", outline)]))
    mask = Image.new("L", (right - left + 3, bottom - top + 3))
    _fill(mask, outline - complex(left - 1, top - 1), [255])
    coarse, reach = mask.reduce(4), 0.04 * min(mask.size)
    shift = (1, 0, light.real * reach, 0, 1, light.imag * reach)
    bulge = coarse.transform(coarse.size, Image.Transform.AFFINE, shift)
    bulge = bulge.filter(ImageFilter.GaussianBlur(reach)).resize(mask.size, Image.BILINEAR)
    for end, where in (((15, 10, 40), mask), ((255, 246, 225), ImageChops.multiply(mask, bulge))):
        tone = (0.75 * color + 0.25 * np.array(end)).astype(int)
        canvas.paste(tuple(tone.tolist()), (left - 1, top - 1), where)


def _badge(canvas: Image.Image, rng, sign: str, disc: np.ndarray) -> None:
    center, hue = disc.mean(), (0, 360)
    paper, ink = _color(rng, hue, (2, 10), (92, 100)), _color(rng, hue, (30, 70), (8, 20))
    _fill(canvas, disc, (paper + ink) / 2)
    _fill(canvas, center + 0.9 * (disc - center), paper)
    for stroke in SIGNS[sign]:
        _fill(canvas, center + 0.9 * (disc[0] - center) * stroke, ink)


def _backdrop(rng, width: int, height: int, tones: list[np.ndarray]) -> Image.Image:
    """What lies out of focus, at a quarter of the size: soft blobs, and sprays of leaves."""
    rows = np.linspace(*tones, height // 4).astype(np.uint8)[:, None]
    image = Image.fromarray(np.repeat(rows, width // 4, axis=1))
    for x, y in rng.uniform(size=(rng.integers(15, 30), 2)) * image.size:
        glow = 0.7 * tones[rng.integers(2)] + 0.3 * _color(rng, (0, 360), (10, 50), (20, 100))
        _fill(image, _disc(complex(x, y), rng.uniform(0.02, 0.17) * image.height), glow)
    image = image.filter(ImageFilter.GaussianBlur(0.04 * image.height))
    for x, y in rng.uniform(size=(rng.integers(3, 7), 2)) * image.size:
        green = 0.55 * tones[0] + 0.45 * _color(rng, (40, 150), (40, 70), (35, 75))
        spot, angle = complex(x, y), rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(6, 14)):
            spot, angle = spot + 0.045 * image.height * np.exp(1j * angle), angle + 0.1
            for side in (-0.9j, 0.9j):
                leaf = LEAF * np.exp(1j * angle + side * rng.uniform(0.6, 1.3)) * image.height
                _fill(image, spot + leaf * rng.uniform(0.06, 0.11), green * rng.uniform(0.9, 1.2))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 3.5)))
    return image.resize((width, height), Image.BILINEAR)


def _foreground(canvas: Image.Image, rng, tones, light: complex, bird) -> None:
    """Paint grass, stones (with misleading badges where they are clear of the bird), the branch."""
    (width, height), t = canvas.size, np.linspace(0, 1, 40)
    (left, top, right, bottom), badge = _bounds(bird), bird[-1][1] - bird[-1][1].mean()
    green = 0.3 * tones[1] + 0.7 * _color(rng, (55, 145), (40, 70), (25, 60))
    for x in rng.uniform(-0.1, 1.1, size=rng.integers(25, 60)):
        sway, tall = rng.normal(0, 0.1), rng.uniform(0.08, 0.4)
        spine = width * (x + sway * t**2) + 1j * height * (1.02 - tall * t)
        _fill(canvas, _ribbon(spine, 0.014 * height * (1 - t) + 0.5), green * rng.uniform(0.6, 1.1))
    for x, y in rng.uniform((0, 0.72), (1, 1), size=(rng.integers(4, 9), 2)) * canvas.size:
        stone = _disc(0, rng.uniform(0.05, 0.1) * height, 9) * rng.uniform(0.8, 1.1, size=9)
        gray = 0.3 * tones[1] + 0.7 * _color(rng, (0, 220), (2, 20), (40, 75))
        _paint(canvas, complex(x, y) + _smooth(stone + 0.25 * stone.real), gray, light)
        if max(left - x, x - right, top - y, y - bottom) > 0.05 * height:
            disc = complex(x, y) + badge * np.exp(1j * rng.uniform(0, 2 * np.pi))
            _badge(canvas, rng, rng.choice(list(SIGNS)), disc)
    leg, t = dict(bird)["leg"], 2.4 * t - 1.2
    slope, bow, taper, thick = rng.uniform((-0.25, -0.3, -0.3, 0.35), (0.25, 0.3, 0.3, 0.6))
    wave = width * t + 1j * height * (slope * t + bow * t**2 + 0.01 * np.sin(9 * t))
    branch = _ribbon(leg[leg.imag.argmax()] + wave, thick * np.ptp(leg.imag) * (1 + taper * t))
    _paint(canvas, branch, _color(rng, (15, 35), (15, 45), (30, 60)), light)


def _develop(canvas: Image.Image, rng, light: complex) -> Image.Image:
    """Uneven light, tint, exposure and grain, at the final size."""
    pixels = np.asarray(canvas.reduce(FINENESS), np.float32)
    y, x = np.ogrid[-1 : 1 : pixels.shape[0] * 1j, -1 : 1 : pixels.shape[1] * 1j]
    lean = rng.uniform(0.05, 0.25) * (light.real * x + light.imag * y)
    shade = np.float32(1 + lean - 0.12 * (x * x + y * y))[..., None]
    tint = np.float32(rng.uniform(0.95, 1.3) * rng.uniform(0.92, 1.08, size=3))
    grain = rng.standard_normal(shade.shape, np.float32) * np.float32(rng.uniform(1, 4))
    pixels *= shade
    pixels *= tint
    pixels += grain
    return Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8))


def draw_scene(species: int, rng: np.random.Generator, image_size=(480, 640)) -> Scene:
    """Draw one scene; generators of the same state give scenes that differ in the sign only.

    Args:
        species: index into ``SIGNS``, from 0.
        rng: the only source of chance.
        image_size: (H, W); the image's own sides vary around it by a tenth.
    """
    height, width = (FINENESS * round(side * rng.uniform(0.9, 1.1)) for side in image_size)
    light, hue = -1j * np.exp(1j * rng.uniform(-0.8, 0.8)), rng.uniform(20, 230)
    tones = [_color(rng, (hue - 20, hue + 20), (15, 45), v) for v in ((50, 95), (30, 70))]
    bird, colors = _pose_bird(rng, width, height), _plumage(rng)
    canvas, outlines = _backdrop(rng, width, height, tones), dict(bird)
    _foreground(canvas, rng, tones, light, bird)
    for name, outline in bird[:-1]:
        _paint(canvas, outline, colors[name], light)
    _badge(canvas, rng, list(SIGNS)[species], outlines["mark"])
    left, top, right, bottom = (bound / FINENESS for bound in _bounds(bird))
    middles = {part: complex(outlines[part].mean() / FINENESS) for part in PARTS}
    parts = {part: (middle.imag, middle.real) for part, middle in middles.items()}
    return Scene(_develop(canvas, rng, light), (top, left, bottom, right), parts)
