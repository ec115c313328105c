"""What a data set holds: images, classes, boxes and parts, as small tables; nothing is decoded."""

from pathlib import Path

import pandas as pd

from ramslib.data import annotations, readers
from ramslib.errors import InputError


def describe(table: pd.DataFrame, sample: int = 2000) -> pd.DataFrame:
    """Summary of a table, one row per split.

    Args:
        table: a data set.
        sample: image sizes are read from the headers of at most so many images per split.

    Returns:
        Columns ``images, classes, smallest_class, largest_class`` (images), ``height, width``
        (median pixels), ``shortest_side`` (smallest), ``boxes`` (count), ``box_share`` (mean share
        of the image's area). A box outside its image is an InputError.
    """
    parts = {split: table[table["split"] == split] for split in annotations.SPLITS}
    rows = {name: _describe(part, sample) for name, part in parts.items() if len(part)}
    return pd.DataFrame.from_dict(rows, orient="index")


def _describe(table: pd.DataFrame, sample: int) -> dict[str, float]:
    seen = _spread(table, sample)
    sizes = _image_sizes(seen)
    per_class = table["class_name"].value_counts()
    return {
        "images": len(table),
        "classes": len(per_class),
        "smallest_class": per_class.min(),
        "largest_class": per_class.max(),
        "height": sizes["height"].median(),
        "width": sizes["width"].median(),
        "shortest_side": sizes.min(axis=None),
        "boxes": table["top"].notna().sum(),
        "box_share": _shares(seen, sizes)["area"].mean(),
    }


def describe_boxes(table: pd.DataFrame, sample: int = 2000) -> pd.DataFrame:
    """Size, shape and place of annotated boxes, a row per image that has one.

    Args:
        table: a data set.
        sample: so many images at most, spread over the table.

    Returns:
        Columns ``area`` (share of the image), ``height, width`` (share of its sides), ``aspect``
        (width / height in pixels), ``y, x`` (the box's middle, as a share of the image's sides).
    """
    seen = _spread(table[table["top"].notna()], sample)
    return _shares(seen, _image_sizes(seen))


def describe_parts(table: pd.DataFrame, parts: pd.DataFrame) -> pd.DataFrame:
    """How often each part is seen, and where, a row per part, from most to least often.

    Args:
        table: a data set.
        parts: as of `load_parts`.

    Returns:
        Columns ``visible`` (share of the table's images) and ``y, x`` (mean place within the
        annotated box, as a share of its sides; NaN without boxes), by part.
    """
    placed = parts.merge(table, on="path")
    for name, low, high in (("y", "top", "bottom"), ("x", "left", "right")):
        placed[name] = (placed[name] - placed[low]) / (placed[high] - placed[low])
    by_part = placed.groupby("part")
    found = by_part[["y", "x"]].mean()
    found.insert(0, "visible", by_part["path"].nunique() / len(table))
    return found.sort_values("visible", ascending=False)


def load_parts(data: str, root: Path | str) -> pd.DataFrame:
    """Visible parts as of `readers.read_parts`; no rows where a data set has none."""
    has_parts = data in ("cub", "nabirds", "diagnostic")
    return readers.read_parts(root) if has_parts else pd.DataFrame(columns=readers.PART_COLUMNS)


def _spread(table: pd.DataFrame, sample: int) -> pd.DataFrame:
    return table.iloc[:: max(-(-len(table) // sample), 1)]


def _image_sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Height and width of every upright image, from its header."""
    sizes = [annotations.image_size(path) for path in table["path"]]
    return pd.DataFrame(sizes, columns=["height", "width"], index=table.index, dtype=float)


def _shares(table: pd.DataFrame, sizes: pd.DataFrame) -> pd.DataFrame:
    """Boxes as shares of their images, clipped to them; a box outside is an InputError."""
    box = table[annotations.BOX_COLUMNS]
    height, width = sizes["height"], sizes["width"]
    outside = (box["top"] >= height) | (box["left"] >= width)
    if outside.any():
        row = outside.idxmax()
        raise InputError(
            f"{table.loc[row, 'path']}: the box {box.loc[row].tolist()} lies outside this image of "
            f"{sizes.loc[row].astype(int).tolist()} pixels (height, width); correct its annotation"
        )
    bottom, right = box["bottom"].clip(upper=height), box["right"].clip(upper=width)
    tall, wide = bottom - box["top"], right - box["left"]
    columns = {
        "area": tall * wide / (height * width),
        "height": tall / height,
        "width": wide / width,
        "aspect": wide / tall,
        "y": (box["top"] + bottom) / 2 / height,
        "x": (box["left"] + right) / 2 / width,
    }
    return pd.DataFrame(columns)
