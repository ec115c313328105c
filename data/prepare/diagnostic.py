"""The synthetic dataset: drawn scenes in the layout of CUB-200-2011."""

import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ramslib.errors import InputError
from ramslib.extensions import load_source

scenes = load_source(Path(__file__).with_name("scenes.py"))


def write_diagnostic_set(
    root: Path | str,
    *,
    species: int = 8,
    train_per_species: int = 40,
    test_per_species: int = 20,
    image_size: tuple[int, int] = (480, 640),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the dataset in the layout of CUB-200-2011, once: a second call finds it and returns.

    Args:
        root: folder to make; it appears when the dataset is complete.
        species: number of classes, the first of ``scenes.SIGNS``.
        train_per_species, test_per_species: images of each.
        image_size: (H, W) around which the sizes of the images vary.
        seed: a scene depends only on it and on its species, split and number in the class.
        progress: called with the number of scenes drawn so far and of all scenes.

    Raises:
        InputError: a value out of range, or other contents in ``root``: nothing is overwritten.
    """
    root, counts = Path(root), (test_per_species, train_per_species)
    wanted = {"species": species, "train_per_species": counts[1], "test_per_species": counts[0]}
    wanted |= {"image_size": list(image_size), "seed": seed, "version": scenes.VERSION}
    if not 2 <= species <= len(scenes.SIGNS) or min(counts) < 1 or min(image_size) < 64 or seed < 0:
        limits = (
            f"2 to {len(scenes.SIGNS)} species, 1 image each or more, 64 pixels or more, seed >= 0"
        )
        raise InputError(f"{root}: cannot draw a dataset of {wanted}; use {limits}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        _check_same(root, wanted)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        _write(Path(folder) / "set", counts, wanted, progress)
        os.replace(Path(folder) / "set", root)
    return root


def _check_same(root: Path, wanted: dict) -> None:
    try:
        found = dict(json.loads((root / "diagnostic.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{root}: exists and is no synthetic dataset; name a new folder") from None
    pairs = [(key, found.get(key), value) for key, value in wanted.items()]
    other = ", ".join(f"{key} {old} instead of {new}" for key, old, new in pairs if old != new)
    if other:
        raise InputError(
            f"{root}: holds a dataset of {other}; name a new folder or delete this one"
        )


def _write(folder: Path, counts: tuple[int, int], wanted: dict, progress) -> None:
    signs = list(scenes.SIGNS)[: wanted["species"]]
    classes = [f"{number:03d}.{sign}_Signbird" for number, sign in enumerate(signs, 1)]
    keys = [(s, t, k) for s in range(len(signs)) for t in (1, 0) for k in range(counts[t])]
    images = [f"{classes[s]}/{signs[s]}_Signbird_{k + 1:04d}_{t}.jpg" for s, t, k in keys]
    for name in classes:
        (folder / "images" / name).mkdir(parents=True)

    def draw(key: tuple[int, int, int], image: str) -> tuple:
        rng = np.random.default_rng([wanted["seed"], *key])
        scene = scenes.draw_scene(key[0], rng, wanted["image_size"])
        scene.image.save(folder / "images" / image, quality=90)
        return scene.box, scene.parts

    boxes, places = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and numpy let other threads draw
        for number, (box, parts) in enumerate(pool.map(draw, keys, images), 1):
            top, left, bottom, right = box
            boxes.append(f"{left:.1f} {top:.1f} {right - left:.1f} {bottom - top:.1f}")
            middles = enumerate(parts.values(), 1)
            places += [f"{number} {part} {x:.1f} {y:.1f} 1\n" for part, (y, x) in middles]
            if progress:
                progress(number, len(keys))
    tables = {"classes": classes, "images": images, "bounding_boxes": boxes, "parts/parts": parts}
    tables["image_class_labels"] = [label + 1 for label, _, _ in keys]
    tables["train_test_split"] = [train for _, train, _ in keys]
    (folder / "parts").mkdir()
    (folder / "parts" / "part_locs.txt").write_text("".join(places))
    for name, rows in tables.items():
        lines = [f"{number} {row}\n" for number, row in enumerate(rows, 1)]
        (folder / f"{name}.txt").write_text("".join(lines))
    (folder / "diagnostic.json").write_text(json.dumps(wanted))
