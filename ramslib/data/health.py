"""The health of a dataset before anything is trained: what it holds, and what spoils results.

`measure_images` decodes every image once; `describe` and `find_problems` read what it measured, and
`write_fixes` writes lists that leave images out or keep them together. No image is touched.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from ramslib.data import annotations, readers
from ramslib.data.annotations import BOX_COLUMNS, LISTS, SPLITS
from ramslib.data.datasets import absolute, read_list, write_list
from ramslib.data.transforms import open_image, reading_error
from ramslib.errors import InputError

SIDE, WAVES = 64, 12  # pixels, and cosine waves, per side of what a signature is made of
# Cosine of two signatures that tells near duplicates: about one of `PAIRS` pairs of different birds
# is above, and ten times as many are above 0.1 less. Pairs from `DOUBT` less on are laid over each
# other, and are near duplicates if they correlate; different birds correlate up to 0.84.
ALIKE, PAIRS, DOUBT, CORRELATED = 0.6, 3e5, 0.25, 0.9
COMPARED, DOUBTED = 4_000_000, 3  # pairs that are compared at once; doubtful ones of an image
THUMB, PARTS = 48, (1, 0.95, 0.9, 0.85, 0.8)  # pixels of a side, and shares of it that a crop keeps
SCENE = 50  # so many photos that are alike are of one scene, as those of a fixed camera
BURST = 3  # seconds between two photos of a burst
FEW, FEW_IN_ALL, UNEQUAL = 5, 200, 10  # test images of a class; of all; largest class / smallest
COLUMNS = ["kind", "across", "group", "path", "detail"]
REMEDIES = {
    "unreadable": "replace them by whole files, or leave them out (--fix)",
    "duplicate": "--fix leaves out all but one, the test image; of several classes, all of them",
    "near duplicate": "look; --fix leaves out those like test images, keeps others in one split",
    "one scene": "test on scenes that training has not seen: name each in groups.csv",
    "burst": "--fix keeps each in one split: then remove a drawn split.csv; others are left out "
    "where they are of one burst with test images",
    "group": "it lies in several splits; correct them",
    "suspicious label": "look, the most doubtful come first; move the image to its class, or name "
    "it in exclude.csv",
    "smaller than a patch": "replace them by larger ones",
    "odd": "look",
    "few to test": "read accuracies with their intervals; add images, or cross-validate (probe)",
    "unequal classes": "read mean_per_class_accuracy beside top1; add images of small classes",
}


def measure_images(table: pd.DataFrame) -> pd.DataFrame:
    """Decode every image of a table, in threads.

    Returns:
        The table with ``error`` (why an image cannot be read, or ""), ``height, width`` (pixels,
        upright), ``remark`` (what is odd, or ""), ``digest`` (of the decoded pixels), ``camera,
        taken`` (from EXIF, or ""), ``signature`` and ``thumb`` (what it looks like).
    """
    return pd.concat([table, pd.DataFrame(_decode(table, _measure), table.index)], axis=1)


def _decode(table: pd.DataFrame, function: Callable[[str], object]) -> list:
    """What a function of a path gives for every image of a table, in threads."""
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # threads share the filters
        found = pool.map(function, table["path"])
        return list(tqdm(found, "decoding", len(table), unit=" images", disable=None, leave=False))


def _measure(path: str) -> dict:
    found = dict.fromkeys(("error", "remark", "digest", "camera", "taken"), "")
    found |= {"height": np.nan, "width": np.nan, "signature": np.zeros(WAVES**2), "thumb": None}
    try:
        with annotations.image_file(path) as image:
            height, width = annotations.upright_size(image)
            # of a phone's MPO the others are previews
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            exif = image.getexif() if "exif" in image.info else Image.Exif()
        image = open_image(path, SIDE)
    except InputError as error:
        return found | {"error": str(error)}
    with suppress(Exception):  # damaged EXIF
        found["camera"] = f"{exif.get(0x010F)} {exif.get(0x0110)}"
        found["taken"] = str(exif.get_ifd(0x8769).get(0x9003, ""))
    found |= {"height": height, "width": width, "signature": signature(image)}
    found["thumb"] = np.asarray(image.convert("L").resize((THUMB, THUMB), reducing_gap=3))
    found["digest"] = hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()
    remarks = {f"{frames} frames": frames > 1, "blank": not found["signature"].any()}
    remarks[f"{height} x {width} pixels"] = max(height, width) > 4 * min(height, width)
    return found | {"remark": ", ".join(text for text, is_so in remarks.items() if is_so)}


def signature(image: Image.Image) -> np.ndarray:
    """What an image looks like: a unit vector of `WAVES` squared numbers, zeros if it is blank.

    The lowest waves of the discrete cosine transform of the gray image, weighted by frequency as
    photos have less of the higher ones, and clipped so that a caption or a frame counts little.
    """
    gray = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3)
    waves = dctn(np.asarray(gray, np.float32), norm="ortho")[:WAVES, :WAVES]
    waves *= np.hypot(*np.mgrid[:WAVES, :WAVES])  # the mean brightness counts nothing
    limit = np.median(abs(waves))
    clipped = waves.clip(-limit, limit).ravel()
    return clipped / np.linalg.norm(clipped) if limit > 1 else np.zeros(WAVES**2)


def find_problems(
    table: pd.DataFrame, backbone: str = "", held: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What may spoil results, a row per problem and image.

    Args:
        table: from `measure_images`.
        backbone: timm's name, which tells the size of a patch; 16 pixels if it does not.
        held: predictions for `suspicious_labels`, if there are any.

    Returns:
        Columns ``kind`` (a key of `REMEDIES`), ``across`` ("splits", "classes", "splits, classes"
        or ""), ``group`` (the first of images that belong together, or ""), ``path`` ("" of a class
        or of the dataset) and ``detail``. Near duplicates and bursts that are one group already
        are no problem.
    """
    sound = table[table["error"] == ""]
    sides, patch = sound[["height", "width"]].min(axis=1), re.search(r"patch(\d+)|$", backbone)[1]
    small = sides[sides < int(patch or 16)]
    details = {
        "unreadable": table["error"][table["error"] != ""],
        "suspicious label": table["error"][:0] if held is None else suspicious_labels(table, held),
        "smaller than a patch": small.map("{:.0f} pixels".format),
        "odd": sound["remark"][sound["remark"] != ""],
        **_check_balance(table),
    }
    found = [
        pd.DataFrame({"kind": kind, "path": table["path"].reindex(detail.index), "detail": detail})
        for kind, detail in details.items()
    ]
    found.append(_share("duplicate", sound, sound["digest"]))
    if len(seen := sound[sound["signature"].map(np.any)]):
        names = pd.Series(_alike(np.stack(seen["signature"]), [*seen["thumb"]]), seen.index)
        several = seen["digest"].groupby(names).transform("nunique")
        kinds = {"near duplicate": several.between(2, SCENE - 1), "one scene": several >= SCENE}
        found += [_share(kind, seen, names.where(of_kind)) for kind, of_kind in kinds.items()]
    found += [_share("burst", sound, sound["class_name"] + names) for names in _bursts(sound)]
    given = _share("group", table, table["group"])
    found.append(given[given["across"].str.startswith("splits")])
    found = pd.concat(found, ignore_index=True)[COLUMNS].fillna("")
    groups = found["path"].map(table.set_index("path")["group"]).fillna(found["path"])
    of_one = groups.groupby([found["kind"], found["group"]]).transform("nunique") == 1
    is_solved = of_one & (found["across"] == "") & found["kind"].isin(["near duplicate", "burst"])
    return found[~is_solved].reset_index(drop=True)


def _check_balance(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Details about classes and the dataset."""
    counts = pd.crosstab(table["class_name"], table["split"]).reindex(columns=SPLITS, fill_value=0)
    few = [f"{name}: {n} test images" for name, n in counts["test"].items() if n < FEW]
    if (total := counts["test"].sum()) < FEW_IN_ALL:
        points = 98 / max(total, 1) ** 0.5  # 1.96 standard errors of an accuracy of 50 %
        few.append(f"{total} test images: accuracy is known to {points:.0f} points")
    least, most = counts["train"].agg(["min", "max"])
    unequal = [f"{least} to {most} training images"] if most > UNEQUAL * least else []
    found = {"few to test": few, "unequal classes": unequal}
    return {kind: pd.Series(each, [-1] * len(each), dtype=str) for kind, each in found.items()}


def _share(kind: str, table: pd.DataFrame, names: pd.Series) -> pd.DataFrame:
    """Images that share a name, and whether they lie across splits and classes; NaN is no name."""
    grouped = table.groupby(names)
    columns = {"splits": grouped["split"], "classes": grouped["class_name"]}
    across = pd.DataFrame({name: each.transform("nunique") > 1 for name, each in columns.items()})
    rows = table[["path"]].assign(kind=kind, group=grouped["path"].transform("min"))
    rows["across"] = across.dot(across.columns + ", ").str.removesuffix(", ")
    rows["detail"] = table["split"] + ", " + table["class_name"]
    return rows[grouped["path"].transform("size") > 1].sort_values(["group", "path"])


def _alike(signatures: np.ndarray, thumbs: list[np.ndarray]) -> np.ndarray:
    """Numbers of sets of near duplicates, mirrored ones too; an image may be alone in its set.

    Blocks of images are compared with all later ones: the memory is that of `COMPARED` pairs.
    """
    count, names = len(signatures), np.arange(len(signatures))
    size = max(COMPARED // count, 1)
    mirrored = signatures * np.where(np.arange(WAVES**2) % WAVES % 2, -1, 1)
    limit = ALIKE + 0.1 * np.log10(max(count**2 / PAIRS, 1))
    for start in range(0, count, size):
        others, block = signatures[start:].T, slice(start, start + size)
        cosines = np.triu(np.maximum(signatures[block] @ others, mirrored[block] @ others), 1)
        names = _join(names, *(np.argwhere(cosines >= limit).T + start))
        cosines[cosines >= limit] = 0
        tried = min(DOUBTED, count - start)
        nearest = np.argpartition(cosines, -tried, axis=1)[:, -tried:]
        rows, places = (np.take_along_axis(cosines, nearest, axis=1) >= limit - DOUBT).nonzero()
        pairs = np.column_stack([rows, nearest[rows, places]]) + start
        pairs = pairs[names[pairs[:, 0]] != names[pairs[:, 1]]]
        alike = [_correlate(thumbs[one], thumbs[other]) >= CORRELATED for one, other in pairs]
        names = _join(names, *pairs[np.array(alike, bool)].T)
    return names


def _join(names: np.ndarray, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Numbers of sets, after those of pairs of members were joined."""
    edges = csr_array((np.ones(len(ones)), (names[ones], names[others])), (len(names),) * 2)
    return connected_components(edges, directed=False)[1][names]


def _correlate(one: np.ndarray, other: np.ndarray) -> float:
    """Greatest correlation of two thumbs, where one may be a part of the other, or mirrored."""
    best = -1.0
    for whole, part in ((one, other), (other, one), (one[:, ::-1], other), (other[:, ::-1], one)):
        for side in (round(THUMB * share) for share in PARTS):
            small = Image.fromarray(part).resize((side, side), Image.Resampling.BILINEAR)
            windows = sliding_window_view(whole, (side, side)).reshape(-1, side**2)
            vectors = np.vstack([np.ravel(small), windows]).astype(np.float32)
            vectors -= vectors.mean(axis=1, keepdims=True)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6
            best = max(best, (vectors[1:] @ vectors[0]).max())
    return best


def _bursts(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Names of bursts by time and camera, and by file names such as IMG_1234_2; NaN is none."""
    stem = table["path"].str.extract(r"([^/]*?)(?:\.\w+)?$")[0]
    date = stem.str.extract(r"^(\D*)((?:19|20)\d{6})[_-]?(\d{6})")
    time = pd.to_datetime(table["taken"], format="%Y:%m:%d %H:%M:%S", errors="coerce")
    time = time.fillna(pd.to_datetime(date[1] + date[2], format="%Y%m%d%H%M%S", errors="coerce"))
    time = time[time != time.dt.normalize()].dropna().sort_values()  # midnight: a clock never set
    camera = table["camera"].where(table["taken"] != "", date[0])[time.index]
    pause = time.groupby(camera).diff() > pd.Timedelta(seconds=BURST)
    by_time = camera + pause.groupby(camera).cumsum().astype(str)
    numbered = stem.str.extract(r"^(.*\d{4,})(?:[ _-]*\(?(\d+|copy)\)?)?$").replace("copy", "0")
    largest = numbered[1].astype(float).groupby(numbered[0]).transform("max")
    by_name = numbered[0].where(largest < 100)  # else one of a whole series
    return by_time.reindex(table.index), by_name


def suspicious_labels(table: pd.DataFrame, held: pd.DataFrame) -> pd.Series:
    """Images whose label predictions contradict, by confident learning (Northcutt et al., 2021).

    The label's probability is below what is usual for images of that class, and the predicted class
    is at least as probable as is usual for its own.

    Args:
        table: a dataset.
        held: per image ``path`` (as in the table), ``label, prediction, confidence`` and
            ``true_probability``, that of the label, by a model fitted without this image.

    Returns:
        What is said of these images, by their index in the table, the worst first.
    """
    usual = held.groupby("label")["true_probability"].mean()
    doubted = held["true_probability"] < held["label"].map(usual)
    believed = held["confidence"] >= held["prediction"].map(usual)
    wrong = held[doubted & believed & (held["label"] != held["prediction"])]
    rows = pd.Series(table.index, table["path"])
    wrong = wrong[wrong["path"].isin(rows.index)].sort_values("true_probability")
    names = table.groupby("label")["class_name"].first()
    detail = wrong["label"].map(names) + ", or rather " + wrong["prediction"].map(names)
    return detail.set_axis(rows[wrong["path"]])


def read_held(probe: Path | str, root: Path | str) -> pd.DataFrame:
    """Predictions for `suspicious_labels` from the folder of a probe of a dataset."""
    file = Path(probe) / "out_of_sample.csv"
    with annotations.file_errors(str(file), "run ramslib probe first"):
        held = pd.read_csv(file, encoding_errors="surrogateescape")
        held["path"] = [os.path.join(absolute(root), path) for path in held["path"]]
        return held[["path", "label", "prediction", "confidence", "true_probability"]]


def summarize_problems(problems: pd.DataFrame) -> pd.DataFrame:
    """A row per kind and place: ``count, groups, first`` (path or detail) and ``remedy``."""
    first = problems["path"].where(problems["path"] != "", problems["detail"])
    named = problems.assign(first=first, group=problems["group"].where(problems["group"] != ""))
    columns = {"count": ("first", "nunique"), "groups": ("group", "nunique")}
    found = named.groupby(["kind", "across"], sort=False).agg(**columns, first=("first", "first"))
    return found.assign(remedy=found.index.get_level_values("kind").map(REMEDIES))


def write_fixes(
    problems: pd.DataFrame, table: pd.DataFrame, root: Path | str, lists: Path | str = ""
) -> list[str]:
    """Add to ``exclude.csv`` and ``groups.csv`` what solves problems without touching an image.

    Left out are unreadable images, duplicates but one, near duplicates of test images and, unless
    a drawn split.csv can be drawn anew, images of one burst with them. Others that are alike or of
    one burst are put into one group.

    Args:
        problems: from `find_problems`.
        table: the dataset.
        root: its folder.
        lists: folder of the lists, if another.

    Returns:
        What was written, a line per list.
    """
    root, folder, lines = absolute(root), absolute(lists or root), []
    split, group = (table.set_index("path")[name] for name in ("split", "group"))
    order = {path: (-SPLITS.index(name), path) for path, name in split.items()}
    groups = given = dict(group.dropna())
    is_drawn = os.path.lexists(f"{folder}/{LISTS['split']}")
    out = dict.fromkeys(problems["path"][problems["kind"] == "unreadable"], "unreadable")
    alike = problems[~problems["group"].eq("") & ~problems["kind"].isin(["group", "one scene"])]
    for (kind, _), part in alike.groupby(["kind", "group"], sort=False):
        first, *others = paths = sorted(set(part["path"]), key=order.get)
        reason = f"{kind} of {os.path.relpath(first, root)}"
        if kind == "duplicate":
            out |= dict.fromkeys(others, reason)
            if part["across"].iloc[0].endswith("classes"):
                out[first] = f"{kind} of {os.path.relpath(others[0], root)}"
        elif split[first] == "test" and (kind == "near duplicate" or not is_drawn):
            out |= {path: reason for path in others if split[path] != "test"}
        else:
            known = {groups[path] for path in paths if path in groups}
            name = min(known, default=os.path.relpath(first, root))
            groups = {path: name if old in known else old for path, old in groups.items()}
            groups = groups | dict.fromkeys(paths, name)
    groups = {path: n for path, n in groups.items() if path not in out and given.get(path) != n}
    for column, values in (("reason", out), ("group", groups)):
        old, separator = read_list(folder, column, [])
        new = {os.path.relpath(path, root): value for path, value in values.items()}
        if new := {key: value for key, value in new.items() if key not in old}:
            write_list(folder, column, old | new, separator)
            lines.append(f"{folder}/{LISTS[column]}: {len(new):,} images added")
    return lines or ["nothing to fix"]


def check_readable(table: pd.DataFrame) -> None:
    """Decode all images, so that a damaged one is told before a training and not at its end.

    Raises:
        InputError: some cannot be read.
    """
    if errors := list(filter(None, _decode(table, partial(reading_error, at_least=SIDE)))):
        raise InputError(
            f"{len(errors):,} of {len(table):,} images cannot be read, first: {errors[0]}; or "
            "leave them out by: ramslib describe-data --fix"
        )


# ---------------------------------------------------------------- what a dataset holds


def describe(table: pd.DataFrame) -> pd.DataFrame:
    """Summary of a table from `measure_images`, one row per split.

    Returns:
        Columns ``images, classes, smallest_class, largest_class`` (images), ``height, width``
        (median pixels), ``shortest_side`` (smallest), ``boxes`` (count), ``box_share`` (mean share
        of the image's area). A box outside its image is an InputError.
    """
    by_split = table.assign(area=describe_boxes(table)["area"]).groupby("split")
    per_class = by_split["class_name"].value_counts().groupby("split")
    columns = {"images": by_split.size(), "classes": per_class.size()}
    columns |= {"smallest_class": per_class.min(), "largest_class": per_class.max()}
    columns |= {side: by_split[side].median() for side in ("height", "width")}
    columns["shortest_side"] = by_split[["height", "width"]].min().min(axis=1)
    columns |= {"boxes": by_split["top"].count(), "box_share": by_split["area"].mean()}
    return pd.DataFrame(columns).reindex([name for name in SPLITS if name in by_split.groups])


def describe_boxes(table: pd.DataFrame) -> pd.DataFrame:
    """Size, shape and place of annotated boxes, a row per image that has one.

    Args:
        table: from `measure_images`.

    Returns:
        Columns ``area`` (share of the image), ``height, width`` (share of its sides), ``aspect``
        (width / height in pixels), ``y, x`` (the box's middle, as a share of the image's sides).

    Raises:
        InputError: a box lies outside its image.
    """
    table = table[table["top"].notna() & (table["error"] == "")]
    boxes, sizes = table[BOX_COLUMNS].to_numpy(), table[["height", "width"]].to_numpy()
    boxes = annotations.clip_boxes(boxes, table["path"].tolist(), sizes)
    top, left, bottom, right = (boxes / np.tile(sizes, 2)).T
    found = {"area": (bottom - top) * (right - left), "height": bottom - top, "width": right - left}
    found["aspect"] = found["width"] / found["height"] * sizes[:, 1] / sizes[:, 0]
    found |= {"y": (top + bottom) / 2, "x": (left + right) / 2}
    return pd.DataFrame(found, index=table.index)


def describe_parts(table: pd.DataFrame, parts: pd.DataFrame) -> pd.DataFrame:
    """How often each part is visible, and where, a row per part, from most to least often.

    Args:
        table: a dataset.
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
    """Visible parts as of `readers.read_parts`; no rows where a dataset has none."""
    has_parts = data in ("cub", "nabirds", "diagnostic")
    return readers.read_parts(root) if has_parts else pd.DataFrame(columns=readers.PART_COLUMNS)
