"""A finished run as one page: opens in any browser, without network, kernel or this library.

Class names, file names and settings are other people's text: the template escapes all of them.
"""

import base64
import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from ramslib import plots
from ramslib.config import Config
from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import open_image
from ramslib.errors import InputError, write_atomically
from ramslib.evaluation import most_confused
from ramslib.runs.run import is_finished, read_metrics, read_run
from ramslib.training.launch import overrides

CLOSEST = 8  # pairs, and classes, that are mistaken for each other most often
SPLITS = ("train", "validation", "test")
EXAMPLES = 5  # photos in a row
ROWS = {
    "Surest of the true class": 0.0,
    "In the middle": 0.5,
    "Furthest from the true class": 1.0,
}

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ name }}: a run of RAMS-Trans</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
.facts { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0 }
.facts div { background: #f4f6f8; border-radius: 6px; padding: .6rem 1rem; min-width: 8rem }
.facts b { display: block; font-size: 1.5rem; line-height: 1.2 } .facts span, p.note { color: #666 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee }
th { border-bottom-color: #999; font-weight: 600 } td:first-child, th:first-child, td.text
  { text-align: left } tr.changed td { font-weight: 600 }
img { max-width: 100%; height: auto } pre { background: #f4f6f8; padding: .8rem; overflow-x: auto }
.side { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start }
</style>
{%- macro grid(table) %}
<table><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{%- for row in table.itertuples(index=False) %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{%- endmacro %}
<h1>{{ name }}</h1>
<p class="note">RAMS-Trans, {{ config.scales }} scale{{ "s" if config.scales > 1 }}, on
{{ config.data }}: {{ description.classes | length }} classes, {{ images }}</p>
<div class="facts">{% for label, value in facts %}<div><b>{{ value }}</b><span>{{ label }}</span>
</div>{% endfor %}</div>
<h2>Accuracy on the test split, percent</h2>
{{ grid(accuracy) }}
<p class="note">± is one standard error: how far another test set of this size would move top-1;
other seeds move it too. The best weights are those of epoch {{ best }}, chosen on the validation
split.</p>
<h2>How it learned</h2>
<img src="{{ learning }}" alt="losses and validation accuracy">
<h2>Can its probabilities be believed?</h2>
<img src="{{ reliability }}" alt="accuracy against confidence">
<h2>Classes it takes for each other</h2>
{% if confused is none %}<p>None: every test image was right.</p>{% else %}
<div class="side">{{ grid(pairs) }}
<img src="{{ confused }}" alt="confusion of the closest classes"></div>{% endif %}
<h2>What it looked at</h2>
{%- for title, picture in examples %}<p>{{ title }}</p>
<img src="{{ picture }}" alt="{{ title }}">{% else %}
<p>The photos are no longer where they were.</p>{% endfor %}
<p class="note">Test photos by their probability of the true class ({{ view }}); boxes are what
further scales looked at{{ ", dashed is annotated" if has_boxes }}.</p>
<h2>How it was made</h2>
<p>Weights before training: {{ description.weights.rstrip(".") }}. Data fingerprint
{{ description.data_fingerprint[:16] }}.</p>
<pre>{{ command }}</pre>
<div class="side"><table><tr><th>setting</th><th>value</th></tr>
{%- for setting, value, changed in settings %}
<tr{{ ' class="changed"' | safe if changed }}><td>{{ setting }}</td><td>{{ value }}</td></tr>
{%- endfor %}</table>
{{ grid(versions) }}</div>
<p class="note">Bold: not the default.</p>
</html>
"""


def write_report(run: Path | str) -> Path:
    """Render a finished run as ``report.html`` in its folder.

    Returns:
        The file.

    Raises:
        InputError: no run there, or one that is not finished.
    """
    run = Path(run)
    config, description, table = read_run(run)
    if not is_finished(run):
        raise InputError(f"{run}: the run is not finished; train it to the end first")
    try:
        results = pd.read_csv(run / "results.csv")
        predictions = pd.read_csv(run / "predictions_last.csv", encoding_errors="surrogateescape")
        content = _content(run, config, description, table, results, predictions)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"{run}: its results cannot be read ({error})") from None
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(content)
    text = page.encode("utf-8", "replace")
    write_atomically(run / "report.html", lambda part: part.write_bytes(text))
    return run / "report.html"


def _content(
    run: Path,
    config: Config,
    description: dict,
    table: pd.DataFrame,
    results: pd.DataFrame,
    predictions: pd.DataFrame,
) -> dict:
    """What the template shows."""
    metrics, names = read_metrics(run), description["classes"]
    view = list(dict.fromkeys(predictions["output"]))[-1]
    pairs = most_confused(predictions, names, view, CLOSEST)
    confusion = plots.plot_confusion(predictions, names, view, CLOSEST)
    counts = table["split"].value_counts()
    return {
        "name": run.resolve().name,
        "config": config,
        "description": description,
        "images": ", ".join(f"{counts.get(name, 0)} {name}" for name in SPLITS) + " images",
        "view": view,
        "best": results["best_epoch"].iloc[0],
        "facts": _facts(results, metrics),
        "accuracy": _accuracy(results),
        "learning": _picture(plots.plot_learning(metrics)),
        "reliability": _picture(_reliability(predictions)),
        "pairs": pairs.map(
            lambda cell: plots.clean_class_name(cell) if isinstance(cell, str) else cell
        ),
        "confused": _picture(plots.plot_confusion(predictions, names, view, CLOSEST))
        if len(pairs)
        else None,
        "examples": list(_examples(predictions, table, names, view)),
        "has_boxes": table["top"].notna().any(),
        "command": shlex.join(
            ["python", "-m", "ramslib", "train", "--run", str(run), *overrides(config)]
        ),
        "settings": [
            (name, getattr(config, name), getattr(config, name) != getattr(Config(), name))
            for name in Config.names()
        ],
        "versions": _versions(description),
    }


def _facts(results: pd.DataFrame, metrics: pd.DataFrame) -> list[tuple[str, str]]:
    """The numbers that one looks for first."""
    last = results[results["checkpoint"] == "last"].iloc[-1]
    minutes, seconds = divmod(round(last["train_seconds"]), 60)
    speed = metrics["images_per_second"].median()
    return [
        (f"top-1, {last['scale']}", f"{last['top1']:.1f} ± {last['standard_error']:.1f} %"),
        ("test images", str(last["images"])),
        (f"epochs, best {last['best_epoch']}", str(last["epochs"])),
        (f"training, {last['processes']} process(es)", f"{minutes} min {seconds:02d} s"),
        ("images per second", f"{speed:.3g}"),
    ]


def _accuracy(results: pd.DataFrame) -> pd.DataFrame:
    """The scores as text; once where the best weights are the last."""
    results = results.drop_duplicates(results.columns.drop("checkpoint"))
    top1 = [f"{r.top1:.1f} ± {r.standard_error:.1f}" for r in results.itertuples()]
    columns = {"top5": "top-5", "mean_per_class_accuracy": "mean per class"}
    columns |= {"ece": "calibration error", "nll": "log loss (nats)"}
    table = results[["output", "checkpoint", "images"]].assign(**{"top-1": top1})
    for name, shown in columns.items():
        table[shown] = results[name].map(
            lambda x, form=".2f" if name == "nll" else ".1f": format(x, form)
        )
    return table


def _versions(description: dict) -> pd.DataFrame:
    facts = description["versions"] | {"commit": description["commit"]}
    facts |= {"Python": description["python"], "machine": description["machine"]}
    return pd.DataFrame(facts.items(), columns=["made with", ""])


def _reliability(predictions: pd.DataFrame) -> Sequence[Axes]:
    """One diagram per view, side by side."""
    views = list(dict.fromkeys(predictions["output"]))
    axes = _row(len(views), 3.1, 2.6)
    for ax, view in zip(axes, views, strict=True):
        plots.plot_reliability(predictions, view, ax=ax)
    return axes


@plots.styled
def _row(columns: int, width: float, height: float) -> Sequence[Axes]:
    return plt.subplots(1, columns, figsize=(columns * width, height), squeeze=False)[1][0]


def _examples(predictions: pd.DataFrame, table: pd.DataFrame, names: Sequence[str], view: str):
    """Rows of photos with the looked-at regions: title and picture."""
    ranked = predictions[predictions["output"] == view]
    ranked = ranked.sort_values("true_probability", ascending=False, kind="stable")
    count = min(EXAMPLES, len(ranked))
    if not ranked["path"].map(lambda path: Path(path).is_file()).all():
        return
    for title, place in ROWS.items():
        first = round(place * (len(ranked) - count))
        axes = _row(count, 2.1, 2.3)
        for ax, row in zip(axes, ranked[first : first + count].itertuples(), strict=True):
            _photo(ax, row, predictions[predictions["path"] == row.path], table, names)
        yield title, _picture(axes, "jpeg")


def _photo(ax: Axes, row, looks: pd.DataFrame, table: pd.DataFrame, names: Sequence[str]) -> None:
    """One photo: its regions, the true class, and what was said where that was wrong."""
    photo, longest = open_image(row.path), 300
    factor = min(1.0, longest / max(photo.size))
    photo = photo.resize([max(1, round(side * factor)) for side in photo.size])
    boxes = {
        look.output: [factor * getattr(look, side) for side in BOX_COLUMNS]
        for look in looks.dropna(subset=BOX_COLUMNS).iloc[1:].itertuples()
    }
    annotated = table.loc[table["path"] == row.path, BOX_COLUMNS].to_numpy(dtype=float)[0] * factor
    said = "" if row.rank == 0 else f"\nsaid: {plots.clean_class_name(names[row.prediction])}"
    title = f"{plots.clean_class_name(names[row.label])}, {row.true_probability:.2f}{said}"
    plots.plot_image(photo, boxes, annotated, title, ax)


def _picture(axes: Axes | Sequence[Axes], form: str = "svg") -> str:
    """The figure of some Axes as an address that holds the whole picture."""
    content = base64.b64encode(plots.as_bytes(axes, form)).decode()
    return f"data:image/{form.replace('svg', 'svg+xml')};base64,{content}"
