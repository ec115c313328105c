"""Frozen mode: an honest accuracy within a minute or two, without training the backbone.

A linear probe. The features of all images are computed once, scale by scale, and kept on disk;
`heads` are fitted to them in seconds. Whatever is chosen (regularization, calibration, weights of
the scales, threshold of early exit) is chosen by cross-validation within the training images.

Beside the looks that a configuration describes stand their rivals of at least equal cost: the whole
image, and its center, at a higher resolution. Cost is counted in tokens per image.

All is in one folder: ``features/KEY/*.safetensors``, ``probe.csv`` (a row per output),
``probe.json``, ``predictions.csv`` and ``out_of_sample.csv`` (the training images, each predicted
by heads that were fitted without it).
"""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ramslib import __version__, evaluation
from ramslib.acceleration import choose_amp
from ramslib.backbone import image_size, patch_grid
from ramslib.classifier import ImageClassifier
from ramslib.config import Config
from ramslib.data.datasets import fingerprint, load_table, relative_paths
from ramslib.data.transforms import ImageTransform, temporary_seed
from ramslib.errors import (
    InputError,
    file_errors,
    shorten,
    write_atomically,
    write_table,
    write_text,
    writing,
)
from ramslib.experiments import heads
from ramslib.experiments.comparison import paired_image_differences
from ramslib.experiments.heads import Array
from ramslib.model import build_model
from ramslib.runs.folder import lock_folder, run_key, shorten_paths
from ramslib.training.optimization import AMP_TYPES
from ramslib.weights import digest

RECORD, MADE_BY = "probe.json", "ramslib probe"  # marks a folder as a probe's
BATCH, CHUNK = 32, 256  # images per forward pass, and per file of features: what a kill may cost
FEW, REPEATS = 200, 3  # of fewer test images one split says little: cross-validation, 3 times
CROP = 0.75  # side of the center crop that is a rival, a share of the image's
READ = "weighted logits"  # the output that counts where there are several scales
GAIN = ["gain", "gain_low", "gain_high"]  # columns: points of the output that is read above another
EXIT_DROP = 0.5  # points of accuracy that early exit may cost on the training images
# Settings of data and model that do not decide features, or that other parts of their key cover.
NOT_IN_FEATURES = {"data", "root", "augment", "validation_fraction", "test_fraction", "workers"}
NOT_IN_FEATURES |= {"allow_missing", "lists", "year", "pretrained", "drop_path", "dropout"}
NOT_IN_FEATURES |= {"grad_checkpointing", "compile"}


def probe(
    config: Config,
    out: Path | str,
    head: str = "discriminant",
    images: int | None = None,
    with_rivals: bool = True,
) -> list[str]:
    """Probe the features that a configuration gives, and write what came out.

    Args:
        config: data and model; of the other settings only the seed is read.
        out: a new or empty folder, or that of a probe, whose features are used where they are the
            same, and whose results are replaced.
        head: a key of ``HEADS``.
        images: about as many of them, see `read_images`; None: all.
        with_rivals: compare with plain models of equal cost, which takes twice the time more.

    Returns:
        At most eight lines: the accuracy with its interval, what the second look is worth.

    Raises:
        InputError: a folder of somebody else, or what is wrong with the settings or the images.
    """
    out = Path(out)
    if head not in heads.HEADS:
        raise InputError(f"unknown head {head!r}; choose one of {', '.join(heads.HEADS)}")
    _check_folder(out)
    with lock_folder(out):
        if not (out / RECORD).exists():
            _write_record(out, {})
        table = read_images(config, images)
        found = extract_features(config, table, out / "features")
        scales = [found[f"class {number + 1}"] for number in range(found["tokens"].shape[1])]
        tokens, rivals = dict(enumerate(found["tokens"].mean(axis=0).cumsum(), start=1)), {}
        for name, rival in _rivals(config, found).items() if with_rivals else ():
            features = extract_features(rival, table, out / "features")
            rivals[name], tokens[name] = features["class 1"], features["tokens"].mean()
        test = (table["split"] == "test").to_numpy()
        splits = [(np.flatnonzero(~test), np.flatnonzero(test))]
        if test.sum() < FEW:
            splits += repeated_folds(table, seed=config.seed)
        outcomes = [
            evaluate_split(table, scales, rivals, *split, head, config.seed)
            for split in tqdm(splits, "heads", disable=None, leave=False)
        ]
        return _write(out, config, table, outcomes, tokens)


# ---------------------------------------------------------------- features


def read_images(config: Config, images: int | None = None) -> pd.DataFrame:
    """The images of a dataset whose classes are known, by path; validation images train.

    Args:
        config: names the dataset.
        images: about as many of them, in equal shares of every class and split, at least one of
            each; None: all.
    """
    if images is not None and images < 1:
        raise InputError(f"images is {images}; give 1 or more")
    table = load_table(config.replace(validation_fraction=0.0))
    table = table[table["label"] >= 0]
    table = table.iloc[np.argsort(relative_paths(table).to_numpy(), kind="stable")]
    if images is not None and images < len(table):
        drawn = table.sample(frac=1, random_state=0).groupby(["split", "label"])
        size = drawn["path"].transform("size")
        table = table.loc[(drawn.cumcount() < np.ceil(size * images / len(table))).sort_index()]
    return table.reset_index(drop=True)


def extract_features(config: Config, table: pd.DataFrame, folder: Path) -> dict[str, Array]:
    """Features of all images of a table, from its folder or computed now.

    They are stored below ``folder`` under a key of all that decides them: the weights' digest, the
    settings of model and images, and the fingerprint of the data. What a killed call stored is
    used.

    Args:
        config: the model; with random weights, those of its seed.
        table: from `read_images`.
        folder: of the features of any number of configurations.

    Returns:
        A row per image: per scale s from 1, ``class s`` (N, D), what the model classifies, and
        ``boxes s`` (N, 4) in pixels of the upright image; ``strength s`` (N, h, w) for all scales
        but the last; ``tokens`` (N, S). The mean of the patch tokens was tried beside the class
        token and did not pay (docs/results.md).

    Raises:
        InputError: an image that cannot be read, or a damaged file of features.
    """
    with temporary_seed(config.seed):
        model = build_model(config, int(table["label"].max()) + 1).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    amp = choose_amp(config.amp, device)
    deciding = set(Config.names()[: Config.names().index("loss")]) - NOT_IN_FEATURES
    deciding = {name: getattr(config, name) for name in deciding} | {"amp": amp}
    decided_by = f"{digest(model.state_dict())} {fingerprint(table)} {table['path'].size}"
    folder = folder / run_key(Config(**deciding), decided_by)
    model, dtype = model.to(device), AMP_TYPES[amp]
    transform = ImageTransform(config.highres_size or config.image_size, config.crop_fraction)
    parts = _read_chunks(folder)
    start = sum(len(part["tokens"]) for part in parts)
    rows = range(start, len(table))
    batches = evaluation.iterate_batches(model, table, transform, BATCH, config.workers, rows)
    options = {"total": -(-len(rows) // BATCH), "unit": " batches", "leave": False}
    computed = (
        _batch_features(model, transform, batch)
        for batch in tqdm(batches, "features", disable=None, **options)
    )
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        while chunk := list(itertools.islice(computed, CHUNK // BATCH)):
            parts.append(_join(chunk))
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{start:07d}.safetensors"
            write_atomically(file, partial(save_file, parts[-1]))
            start += len(parts[-1]["tokens"])
    return {name: values.numpy() for name, values in _join(parts).items()}


def _read_chunks(folder: Path) -> list[dict[str, Tensor]]:
    """What is stored without a gap, from the first image on."""
    parts, done = [], 0
    while (file := folder / f"{done:07d}.safetensors").exists():
        with file_errors(file, "remove it"):
            parts.append(load_file(file))
            done += len(parts[-1]["tokens"])
    return parts


def _join(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def _batch_features(
    model: ImageClassifier, transform: ImageTransform, batch: dict
) -> dict[str, Tensor]:
    """The columns of `extract_features` for one batch, on the CPU."""
    count, found, tokens = len(batch["label"]), {}, []
    per_pixel = math.prod(patch_grid(model.backbone)) / math.prod(image_size(model.backbone))
    prefix = getattr(model.backbone, "num_prefix_tokens", 0)
    for number, output in enumerate(model.forward_scales(batch["pixels"]), start=1):
        found[f"class {number}"] = output.feature.float()
        boxes = evaluation.first_region(output.boxes, count)
        boxes = transform.boxes_to_image(boxes, batch["size"], model.image_size)
        found[f"boxes {number}"] = boxes.float()
        if output.strength is not None:
            found[f"strength {number}"] = evaluation.first_region(output.strength, count).float()
        regions, (height, width) = len(output.input) // count, output.input.shape[-2:]
        tokens.append(regions * (round(height * width * per_pixel) + prefix))
    found["tokens"] = torch.tensor(tokens, dtype=torch.float32).repeat(count, 1)
    return {name: values.cpu() for name, values in found.items()}


# ---------------------------------------------------------------- evaluation


class Outcome(NamedTuple):
    """One split, evaluated.

    Attributes:
        predictions: of the test images, as `evaluation.predict` gives them, by output.
        held: likewise of the training images, each predicted without it.
        weights: (S,) of the scales in the weighted logits.
        exit_threshold: confidence of scale 1 above which it is the answer.
        exit_rate: share of the test images of which that is so.
    """

    predictions: pd.DataFrame
    held: pd.DataFrame
    weights: Array
    exit_threshold: float
    exit_rate: float


def evaluate_split(
    table: pd.DataFrame,
    scales: Sequence[Array],
    rivals: Mapping[str, Array],
    train: Array,
    test: Array,
    head: str = "discriminant",
    seed: int = 0,
) -> Outcome:
    """Fit heads to the training images, choose everything there, and predict the test images.

    Args:
        table: N images, from `read_images`; those of one ``group`` stay together.
        scales: (N, D) features of each scale.
        rivals: further features (N, D) by name.
        train: rows.
        test: rows.
        head: a key of ``HEADS``.
        seed: of the folds.
    """
    labels, classes = table["label"].to_numpy(), int(table["label"].max()) + 1
    groups = heads.groups_of(table.iloc[train])
    features = {f"scale {number}": values for number, values in enumerate(scales, start=1)}
    names, weights, threshold, confident = list(features), np.ones(1), 1.0, np.zeros(1)
    if len(scales) > 1:
        features["concatenated"] = np.concatenate(scales, axis=1)
    held, found = {}, {}
    for name, values in (features | dict(rivals)).items():
        fitted = heads.cross_fit(
            values[train], labels[train], groups, values[test], classes, head, seed
        )
        held[name], found[name] = fitted
    if len(scales) > 1:
        weights = heads.stack([held[name] for name in names], labels[train])
        for side in (held, found):
            side |= _fuse([side[name] for name in names], weights)
        outputs = {name: held[name] for name in ("scale 1", READ)}
        confidences = _predictions(table.iloc[train], outputs)
        threshold = evaluation.choose_exit_threshold(confidences, EXIT_DROP)
        for side in (held, found):
            confident = np.exp(side["scale 1"]).max(axis=1, keepdims=True) > threshold
            side["early exit"] = np.where(confident, side["scale 1"], side[READ])
    tables = _predictions(table.iloc[test], found), _predictions(table.iloc[train], held)
    return Outcome(*tables, weights, threshold, float(confident.mean()))


def _fuse(scales: Sequence[Array], weights: Array) -> dict[str, Array]:
    """Log probabilities (N, K) of all scales together, by name of the fusion."""
    stacked = np.stack(scales)
    surest = stacked.max(axis=2).argmax(axis=0)
    return {
        "mean softmax": np.log(np.exp(stacked).mean(axis=0)),
        "mean logits": heads.combine(scales, np.full(len(scales), 1 / len(scales))),
        READ: heads.combine(scales, weights),
        "most confident": stacked[surest, np.arange(stacked.shape[1])],
    }


def _predictions(table: pd.DataFrame, outputs: Mapping[str, Array]) -> pd.DataFrame:
    """Log probabilities (n, K) by output as a table of predictions."""
    labels = torch.tensor(table["label"].to_numpy()[:, None])
    rows = [
        evaluation.prediction_metrics(torch.from_numpy(np.exp(v)), labels) for v in outputs.values()
    ]
    return evaluation.tidy(torch.stack(rows, dim=1).numpy(), table, list(outputs))


def repeated_folds(table: pd.DataFrame, seed: int = 0) -> list[tuple[Array, Array]]:
    """Training and test rows of `REPEATS` cross-validations of all images, by class and group."""
    labels, groups = table["label"].to_numpy(), heads.groups_of(table)
    drawn = (heads.draw_folds(labels, groups, seed + repeat) for repeat in range(REPEATS))
    return list(itertools.chain.from_iterable(drawn))


def summarize_splits(outcomes: Sequence[Outcome], read: str) -> pd.DataFrame:
    """Accuracy of every output with its interval, and how much better the one that is read is.

    Args:
        outcomes: of one split, or of `repeated_folds`.
        read: the output, chosen beforehand, that all are compared with.

    Returns:
        One row per output: ``splits, images``; ``top1, low, high`` with the 95 % interval;
        ``held_top1``, cross-validated within the training images; ``nll``; ``gain, gain_low,
        gain_high``, points of ``read`` above this output. Of one split the intervals are over test
        images (Wilson; paired: Agresti and Min, 2005). Of several they are over splits, widened
        because these share images (Nadeau and Bengio, 2003; Bouckaert and Frank, 2004); those of
        accuracies are at least Wilson's of as many images.
    """
    scores = [evaluation.score(each.predictions).set_index("output") for each in outcomes]
    top1, nll = (pd.DataFrame([each[name] for each in scores]) for name in ("top1", "nll"))
    held = pd.DataFrame(
        [evaluation.score(each.held).set_index("output")["top1"] for each in outcomes]
    )
    images = pd.concat([each.predictions["path"] for each in outcomes]).nunique()
    right = (top1.mean() / 100 * images).round().astype(int)
    wilson = [stats.binomtest(k, images).proportion_ci(method="wilson") for k in right]
    low, high = 100 * np.array(wilson).T
    if len(outcomes) == 1:
        predictions = outcomes[0].predictions
        pairs = paired_image_differences(predictions, predictions, read)
        gain = 0 - pairs[["difference", "high", "low"]].to_numpy().T
    else:
        shares = [len(each.predictions) / len(each.held) for each in outcomes]
        widened = np.sqrt(1 / len(outcomes) + np.mean(shares))
        widened *= stats.t.ppf(0.975, len(outcomes) - 1)
        gains = top1.rsub(top1[read], axis=0)
        low = np.minimum(low, top1.mean() - widened * top1.std())
        high = np.maximum(high, top1.mean() + widened * top1.std())
        gain = [gains.mean() + sign * widened * gains.std() for sign in (0, -1, 1)]
    found = pd.DataFrame({"splits": len(outcomes), "images": images, "top1": top1.mean()})
    found = found.assign(low=np.maximum(low, 0), high=np.minimum(high, 100))
    found = found.assign(held_top1=held.mean(), nll=nll.mean())
    return found.assign(**dict(zip(GAIN, gain, strict=True)))


# ---------------------------------------------------------------- results


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds anything but a probe."""
    with writing(out):
        names = set(os.listdir(out)) if os.path.lexists(out) else set()
    try:
        ours = json.loads((out / RECORD).read_text())["made_by"] == MADE_BY
    except (OSError, ValueError, TypeError, KeyError):
        ours = names <= {".lock"}
    if not ours:
        others = shorten(sorted(names - {".lock"}))
        raise InputError(f"{out}: holds files ({others}) but no probe; choose a new folder")


def _write_record(out: Path, facts: dict) -> None:
    facts = {"made_by": MADE_BY, "version": __version__} | facts
    write_text(out / RECORD, json.dumps(facts, indent=1))


def _rivals(config: Config, found: Mapping[str, Array]) -> dict[str, Config]:
    """Plain models that cost at least as much as all scales: of the whole image, of its center.

    Args:
        config: of the scales.
        found: their features, from `extract_features`.
    """
    tokens, (height, width) = found["tokens"].mean(axis=0), config.input_sizes()[0]
    if len(tokens) > 1:
        rows, columns = found["strength 1"].shape[1:]
        patch, prefix = (height // rows, width // columns), tokens[0] - rows * columns
        grids = ((n, round(n * columns / rows)) for n in itertools.count(rows))
        grid = next(each for each in grids if math.prod(each) + prefix >= tokens.sum())
        height, width = (count * side for count, side in zip(grid, patch, strict=True))
    size = f"{height} px" if height == width else f"{height} x {width} px"
    plain = {"scales": 1, "image_size": (height, width), "highres_size": None}
    rivals = {f"whole image at {size}": config.replace(**plain)} if len(tokens) > 1 else {}
    if config.crop_fraction > CROP:
        center = config.replace(**plain, crop_fraction=CROP)
        rivals[f"{100 * CROP:.0f} % center crop at {size}"] = center
    return rivals


def _write(
    out: Path,
    config: Config,
    table: pd.DataFrame,
    outcomes: Sequence[Outcome],
    tokens: Mapping[str | int, float],
) -> list[str]:
    """Write tables and record; returns the lines that say what came out.

    Args:
        out: the folder.
        config: of the scales.
        table: the images.
        outcomes: of the split that the dataset has, then those of `repeated_folds`, if any.
        tokens: per image, of the scales up to each number, and of each rival.
    """
    given, folds, scales = outcomes[0], outcomes[1:], len(outcomes[0].weights)
    read = READ if scales > 1 else "scale 1"
    parts = {"split": [given] * bool(len(given.predictions)), "cross-validation": folds}
    costs = {f"scale {number + 1}": tokens[number + 1] for number in range(scales)} | dict(tokens)
    tables = {}
    for name, part in parts.items():
        if part:
            tables[name] = summarize_splits(part, read)
            exit_rate = np.mean([each.exit_rate for each in part])
            costs["early exit"] = exit_rate * tokens[1] + (1 - exit_rate) * tokens[scales]
            each = tables[name].index.map(costs).fillna(tokens[scales])
            tables[name].insert(0, "tokens", each)
    results = pd.concat(tables, names=["evaluation", "output"]).reset_index()
    predictions = [each.predictions.assign(split=n) for n, each in enumerate(outcomes)]
    held = given.held[given.held["output"] == read].drop(columns=["output", "rank"])
    write_table(results, out / "probe.csv")
    write_table(shorten_paths(pd.concat(predictions), config.root), out / "predictions.csv")
    write_table(shorten_paths(held, config.root), out / "out_of_sample.csv")
    lines = _describe(table, results[results["evaluation"] == list(tables)[-1]], read, tokens)
    facts = {"settings": asdict(config), "images": len(table), "lines": lines}
    facts |= {"weights": given.weights.tolist(), "exit_threshold": given.exit_threshold}
    facts |= {"outputs": results.to_dict("records")}
    _write_record(out, facts)
    return [*lines, f"tables: {out / 'probe.csv'}"]


def _describe(
    table: pd.DataFrame, results: pd.DataFrame, read: str, tokens: Mapping[str | int, float]
) -> list[str]:
    """What came out in words.

    Args:
        table: the images.
        results: of one evaluation, with ``tokens``.
        read: the output that counts.
        tokens: as of `_write`; rivals are named by text.
    """
    rows = results.set_index("output")
    test, folds = (table["split"] == "test").sum(), rows["splits"].iloc[0]
    about = f"{len(table)} images of {table['label'].nunique()} classes, {test} of them to test on"
    few = f": too few for one split, so the numbers are of {folds} folds of all"
    several = read == READ
    scales = max(name for name in tokens if isinstance(name, int))
    whole = f"{scales} scales" if several else "scale 1"
    lines = [
        about + few if folds > 1 else about,
        f"frozen features, {whole}: {_number(rows.loc[read])}",
    ]
    others = ["scale 1"] * several + [name for name in tokens if isinstance(name, str)]
    for name in others:
        gain = "{:+.1f} points [{:.1f}, {:.1f}]".format(*rows.loc[name, GAIN])
        lines.append(f"{name}: {_number(rows.loc[name])}; {whole} against it: {gain}")
    rivals = rows.loc[[name for name in others if name != "scale 1"]]
    if several and len(rivals):
        better, worse = (rivals["gain_low"] > 0).all(), (rivals["gain_high"] < 0).any()
        verdict = "pays" if better else "does not pay" if worse else "makes no clear difference"
        lines.append(f"at equal cost, looking again {verdict}")
    if several:
        lines.append(f"early exit after scale 1: {_number(rows.loc['early exit'])}")
    return lines


def _number(row: pd.Series) -> str:
    accuracy = f"{row['top1']:.1f} % [{row['low']:.1f}, {row['high']:.1f}]"
    return f"{accuracy} ({row['tokens']:.0f} tokens per image)"
