"""What a finished run leaves: predictions, scores with their uncertainty, and the model card."""

import math
from collections.abc import Mapping
from pathlib import Path

import jinja2
import pandas as pd

from ramslib.config import Config
from ramslib.data.annotations import SPLITS
from ramslib.errors import InputError, write_table, write_text
from ramslib.evaluation import score
from ramslib.runs.folder import (
    is_finished,
    locate_images,
    read_csv,
    read_run,
    shorten_paths,
)

CARD = Path(__file__).with_name("card.md.j2")
RESULTS = {"output": str, "checkpoint": str, "images": int, "top1": float, "standard_error": float}
RESULTS |= {"top5": float, "mean_per_class_accuracy": float, "ece": float, "nll": float}
RESULTS |= {"best_epoch": int, "epochs": int}
RESULTS |= {"temperature": float, "unsure_below": float, "ece_calibrated": float}
RESULTS |= {"exit_above": float}
UNCALIBRATED = {"temperature": 1.0, "unsure_below": math.nan, "ece_calibrated": math.nan}
UNCALIBRATED |= {"exit_above": math.nan}
PREDICTIONS = {"path": str, "label": int, "output": str, "prediction": int, "confidence": float}
PREDICTIONS |= {"true_probability": float, "rank": int, "calibrated": float}
REMEDY = "restore it, or remove results.csv and train again: only the results are written anew"


def write_results(
    run: Path, outcomes: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], columns: dict
) -> None:
    """Write the files that end a run; ``results.csv`` comes last and means that it is finished.

    Args:
        run: its folder.
        outcomes: by checkpoint, the table of `evaluation.fit_calibration` and the predictions of
            the test split.
        columns: further columns of the results: epochs, best_epoch, seconds, processes.
    """
    _, metadata, _ = read_run(run)
    parts = []
    for checkpoint, (calibration, predictions) in outcomes.items():
        scores = score(predictions).assign(split="test", checkpoint=checkpoint, **columns)
        parts.append(scores.merge(calibration, on="output"))
        predictions = shorten_paths(predictions, metadata["root"])
        write_table(predictions, run / f"predictions_{checkpoint}.csv")
    results = pd.concat(parts)
    write_text(run / "README.md", model_card(run, results))
    write_table(results, run / "results.csv")


def read_results(run: Path | str) -> pd.DataFrame:
    """Scores of a finished run: a row per checkpoint and output, the best checkpoint first.

    Raises:
        InputError: the run is not finished, or the file is damaged.
    """
    if not is_finished(run):
        raise InputError(f"{run}: the run is not finished; train it to the end first")
    results = read_csv(Path(run) / "results.csv", RESULTS, REMEDY, UNCALIBRATED)
    return results.sort_values("checkpoint", kind="stable", ignore_index=True)


def read_calibration(run: Path | str, checkpoint: str) -> pd.DataFrame:
    """What `evaluation.fit_calibration` gave, by output; empty where the run is not finished."""
    if not is_finished(run):
        return pd.DataFrame(columns=list(UNCALIBRATED), dtype=float)
    results = read_results(run)
    return results[results["checkpoint"] == checkpoint].set_index("output")


def read_predictions(
    run: Path | str, checkpoint: str = "best", root: Path | str | None = None
) -> pd.DataFrame:
    """Predictions of a finished run, one row per test image and output.

    Args:
        run: its folder.
        checkpoint: ``best`` or ``last``.
        root: where the images are now, if they moved.

    Raises:
        InputError: the file is missing, damaged or lacks test images.
    """
    config, metadata, table = read_run(run, root)
    path = Path(run) / f"predictions_{checkpoint}.csv"
    predictions = read_csv(path, PREDICTIONS, REMEDY, {"calibrated": lambda t: t["confidence"]})
    images, found = (table["split"] == "test").sum(), predictions["output"].value_counts()
    if found.empty or (found != images).any():
        count = int(found.min()) if len(found) else 0
        raise InputError(f"{path}: has {count} of {images} test images; {REMEDY}")
    return locate_images(predictions, metadata.get("root", config.root), root)


def method_name(config: Config) -> str:
    """The method of a configuration, for titles."""
    if config.model == "rams":
        return "RAMS-Trans" if config.scales > 1 else "Vision Transformer"
    return "TransFG" if config.model == "transfg" else config.model.rpartition(":")[2]


def model_card(run: Path, results: pd.DataFrame) -> str:
    """A run in Markdown: what it is, on which data, how good, how to use it."""
    config, metadata, table = read_run(run)
    counts = table["split"].value_counts()
    template = jinja2.Template(
        CARD.read_text("utf-8"), trim_blocks=True, keep_trailing_newline=True
    )
    return template.render(
        metadata,
        run=run,
        config=config,
        results=results.reset_index(drop=True),
        method=method_name(config),
        images=", ".join(f"{counts.get(name, 0)} {name}" for name in SPLITS),
        chosen="lowest validation nll" if "validation" in counts else "the last: no validation",
    )
