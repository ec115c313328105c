"""What a finished run leaves: predictions, scores with their uncertainty, and the model card."""

from pathlib import Path

import pandas as pd

from ramslib.config import Config, current_columns
from ramslib.errors import InputError, one_line, write_atomically, write_table
from ramslib.evaluation import score
from ramslib.runs.folder import is_finished, locate_images, read_run, shorten_paths

RESULTS = {"output": str, "checkpoint": str, "images": int, "top1": float, "standard_error": float}
RESULTS |= {"top5": float, "mean_per_class_accuracy": float, "ece": float, "nll": float}
RESULTS |= {"best_epoch": int, "epochs": int}
PREDICTIONS = {"path": str, "label": int, "output": str, "prediction": int, "confidence": float}
PREDICTIONS |= {"true_probability": float, "rank": int}
REMEDY = "restore it, or remove results.csv and train again: only the results are written anew"


def write_results(run: Path, predictions: dict[str, pd.DataFrame], columns: dict) -> None:
    """Write the files that end a run; ``results.csv`` comes last and means that it is finished.

    Args:
        run: its folder.
        predictions: of the test split, by checkpoint.
        columns: further columns of the results: epochs, best_epoch, seconds, processes.
    """
    _, metadata, _ = read_run(run)
    scores = [
        score(table).assign(split="test", checkpoint=checkpoint)
        for checkpoint, table in predictions.items()
    ]
    results = pd.concat(scores).assign(**columns)
    for checkpoint, table in predictions.items():
        write_table(shorten_paths(table, metadata["root"]), run / f"predictions_{checkpoint}.csv")
    card = model_card(run, results).encode("utf-8", "surrogateescape")
    write_atomically(run / "README.md", lambda part: part.write_bytes(card))
    write_table(results, run / "results.csv")


def read_results(run: Path | str) -> pd.DataFrame:
    """Scores of a finished run: a row per checkpoint and output, the best checkpoint first.

    Raises:
        InputError: the run is not finished, or the file is damaged.
    """
    if not is_finished(run):
        raise InputError(f"{run}: the run is not finished; train it to the end first")
    results = _read_columns(Path(run) / "results.csv", RESULTS)
    return results.sort_values("checkpoint", kind="stable", ignore_index=True)


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
    predictions = _read_columns(path, PREDICTIONS)
    images, found = (table["split"] == "test").sum(), predictions["output"].value_counts()
    if found.empty or (found != images).any():
        count = int(found.min()) if len(found) else 0
        raise InputError(f"{path}: has {count} of {images} test images; {REMEDY}")
    return locate_images(predictions, metadata.get("root", config.root), root)


def _read_columns(path: Path, kinds: dict[str, type]) -> pd.DataFrame:
    """A table of a run, whatever version wrote it, with at least these columns."""
    try:
        return current_columns(pd.read_csv(path, encoding_errors="surrogateescape")).astype(kinds)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); {REMEDY}") from None


def method_name(config: Config) -> str:
    """The method of a configuration, for titles."""
    if config.model == "rams":
        return "RAMS-Trans" if config.scales > 1 else "Vision Transformer"
    return "TransFG" if config.model == "transfg" else config.model.rpartition(":")[2]


def model_card(run: Path, results: pd.DataFrame) -> str:
    """A run in Markdown: what it is, on which data, how good, how to use it."""
    config, metadata, table = read_run(run)
    counts = table["split"].value_counts()
    images = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("train", "validation", "test"))
    classes, facts = metadata["classes"], results.iloc[0]
    versions = ", ".join(f"{name} {number}" for name, number in metadata["versions"].items())
    chosen = "lowest validation nll" if counts.get("validation") else "last; no validation split"
    return f"""# {run.name}: {method_name(config)} on {config.data}

{_architecture(config)}
It distinguishes {len(classes)} classes, from "{classes[0]}" to "{classes[-1]}".

- Weights before training: {metadata["weights"]}
- Data: {config.data}, {images} images; fingerprint {metadata["data_fingerprint"][:16]}.
- Training: {facts["epochs"]} epochs; best epoch: {facts["best_epoch"]} ({chosen});
  {facts["train_seconds"]:.0f} s with {facts["processes"]} process(es) on {metadata["machine"]};
  seed {config.seed}; all settings are in `config.json`.
- Made with {versions}; commit {metadata["commit"]}.

## Accuracy on the test split, percent

{_accuracy_table(results)}

The standard error is what another test set of this size would move top-1 by; another seed moves it
too. The test split chose nothing.

## Use

```python
import ramslib

model = ramslib.load("{run.name}")  # the folder; checkpoint="last" for the last epoch
```

    python -m ramslib predict --run {run.name} IMAGE...

The model assigns one of these classes to any image. It was tested on images like those that it was
trained on, and on no others.
"""


def _architecture(config: Config) -> str:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    backbone = f"`{config.backbone}` at {height} x {width} pixels"
    if config.model == "transfg":
        stride = f"every {config.patch_stride} pixels" if config.patch_stride else "side by side"
        return (
            f"A Vision Transformer, {backbone}, whose last block sees the patches that its heads "
            f"selected (TransFG); patches lie {stride}."
        )
    if config.model != "rams":
        return f"The model `{config.model}`, {backbone}."
    if config.scales == 1:
        return f"A plain Vision Transformer, {backbone}."
    where = "the image at a higher resolution" if config.highres_size else "the crop before"
    return (
        f"A Vision Transformer, {backbone}, with {config.scales} scales (RAMS-Trans): the region "
        f"of the next scale is where attention (`{config.strength}`, threshold "
        f"{config.threshold}) is strong, cut from {where}."
    )


def _accuracy_table(results: pd.DataFrame) -> str:
    lines = ["| checkpoint | output | images | top-1 | top-5 | mean per class | nll | ece |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [
        f"| {row.checkpoint} | {row.output} | {row.images} | {row.top1:.1f} "
        f"± {row.standard_error:.1f} | {row.top5:.1f} | {row.mean_per_class_accuracy:.1f} "
        f"| {row.nll:.3f} | {row.ece:.1f} |"
        for row in results.itertuples()
    ]
    return "\n".join(lines)
