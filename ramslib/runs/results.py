"""What a finished run leaves: predictions, scores with their uncertainty, and the model card."""

from pathlib import Path

import pandas as pd

from ramslib.config import Config, current_columns
from ramslib.errors import InputError, one_line, write_atomically, write_table
from ramslib.evaluation import score
from ramslib.runs.run import read_run

METHODS = {"rams": "RAMS-Trans", "transfg": "TransFG"}
RESULTS = {"output": str, "checkpoint": str, "images": int, "top1": float, "standard_error": float}
RESULTS |= {"top5": float, "mean_per_class_accuracy": float, "ece": float, "nll": float}
PREDICTIONS = {"path": str, "label": int, "output": str, "prediction": int, "confidence": float}
PREDICTIONS |= {"true_probability": float, "rank": int}
REMEDY = "restore the file, or train the run again in another folder"


def read_results(run: Path | str) -> pd.DataFrame:
    """Scores of a finished run, one row per checkpoint and output.

    Raises:
        InputError: the run is not finished, or the file is damaged.
    """
    path = Path(run) / "results.csv"
    if not path.exists():
        raise InputError(f"{run}: the run is not finished; train it to the end first")
    return _read_columns(path, RESULTS)


def read_predictions(run: Path | str, checkpoint: str = "best") -> pd.DataFrame:
    """Predictions of a finished run, one row per test image and output.

    Raises:
        InputError: the file is missing, damaged or lacks test images.
    """
    path = Path(run) / f"predictions_{checkpoint}.csv"
    predictions = _read_columns(path, PREDICTIONS)
    _, _, table = read_run(run)
    images, found = (table["split"] == "test").sum(), predictions["output"].value_counts()
    if found.empty or (found != images).any():
        count = int(found.min()) if len(found) else 0
        raise InputError(f"{path}: has {count} of {images} test images; {REMEDY}")
    return predictions


def _read_columns(path: Path, kinds: dict[str, type]) -> pd.DataFrame:
    """A table of a run, whatever version wrote it, with at least these columns."""
    try:
        return current_columns(pd.read_csv(path, encoding_errors="surrogateescape")).astype(kinds)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); {REMEDY}") from None


def write_results(run: Path, predictions: dict[str, pd.DataFrame], facts: dict) -> None:
    """Write the files that end a run; ``results.csv`` comes last and says that it is finished.

    Args:
        run: its folder.
        predictions: of the test split, by name of the weights that made them.
        facts: further columns of the results: epochs, seconds, processes.
    """
    scores = [
        score(table).assign(split="test", checkpoint=which) for which, table in predictions.items()
    ]
    results = pd.concat(scores).assign(**facts)
    for which, table in predictions.items():
        write_table(table, run / f"predictions_{which}.csv")
    card = model_card(run, results).encode("utf-8", "surrogateescape")
    write_atomically(run / "README.md", lambda part: part.write_bytes(card))
    write_table(results, run / "results.csv")


def model_card(run: Path, results: pd.DataFrame) -> str:
    """A run told to people, in Markdown: what it is, on which data, how good, how to use it."""
    config, description, table = read_run(run)
    counts = table["split"].value_counts()
    images = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("train", "validation", "test"))
    classes, facts = description["classes"], results.iloc[0]
    versions = ", ".join(f"{name} {number}" for name, number in description["versions"].items())
    return f"""# {run.name}: {METHODS[config.model]} on {config.data}

{_architecture(config)}
It tells {len(classes)} classes apart, from "{classes[0]}" to "{classes[-1]}".

- Weights before training: {description["weights"]}
- Data: {config.data}, {images} images; fingerprint {description["data_fingerprint"][:16]}.
- Training: {facts["epochs"]} epochs, best by validation: {facts["best_epoch"]};
  {facts["train_seconds"]:.0f} s with {facts["processes"]} process(es) on {description["machine"]};
  seed {config.seed}; all settings are in `config.json`.
- Made with {versions}; commit {description["commit"]}.

## Accuracy on the test split, percent

{_accuracy_table(results)}

The standard error says how far another test set of this size would move top-1; other seeds move it
too. The test split chose nothing.

## Use

```python
import ramslib

model = ramslib.load("{run.name}")  # the folder; checkpoint="last" for the last weights
```

    python -m ramslib predict --run {run.name} PHOTO...

The model knows only these classes and gives one of them to any picture. It was tested on pictures
like those it was trained on, and on no others.
"""


def _architecture(config: Config) -> str:
    height, width = (
        (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    )
    size = f"`{config.backbone}` at {height} x {width} pixels"
    if config.model == "transfg":
        stride = f"every {config.patch_stride} pixels" if config.patch_stride else "side by side"
        return (
            f"A Vision Transformer, {size}, whose last block sees the patches that its heads chose "
            f"(TransFG); patches stand {stride}."
        )
    if config.scales == 1:
        return f"A plain Vision Transformer, {size}."
    where = "a source of higher resolution" if config.highres_size else "the view before"
    return (
        f"A Vision Transformer, {size}, that looks {config.scales} times (RAMS-Trans): the region "
        f"of the next look is where attention (`{config.strength}`, threshold {config.threshold}) "
        f"was, cut from {where}."
    )


def _accuracy_table(results: pd.DataFrame) -> str:
    lines = ["| checkpoint | scale | images | top-1 | top-5 | mean per class | calibration error |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {row.checkpoint} | {row.output} | {row.images} | {row.top1:.1f} ± {row.standard_error:.1f} "
        f"| {row.top5:.1f} | {row.mean_per_class_accuracy:.1f} | {row.ece:.1f} |"
        for row in results.itertuples()
    ]
    return "\n".join(lines)
