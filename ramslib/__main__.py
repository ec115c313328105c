"""Command line: ``python -m ramslib COMMAND``; bad input is one line on stderr and exit code 2."""

import argparse
import atexit
import gc
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from ramslib.config import PRESETS, Config
from ramslib.errors import InputError, one_line

PRESET_HELP = f"settings to start from: {', '.join(PRESETS)}; small by default"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if "RANK" in os.environ:  # before the slow imports, for it may be killed in them
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    options = _parse(arguments)
    try:
        options.run_command(options)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        if type(error).__name__ != "OtherProcessFailed":  # which reports its error itself
            print(f"error: {_with_place(error)}", file=sys.stderr)
        return 2
    return 0


def _end_with_parent(parent: int, every: float = 0.5) -> None:
    """End one of several training processes with the process that started them."""
    while os.getppid() == parent:
        time.sleep(every)
    os._exit(1)


def _with_place(error: Exception) -> str:
    text = one_line(error)
    if isinstance(error, InputError | OSError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"{text} ({where}; --debug shows the traceback)"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and settings in any order."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if rest != late or not hasattr(options, "settings"):
        parser.parse_args(arguments)
    elif late:
        options.settings += late
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ramslib", description=__doc__, allow_abbrev=False
    )
    debug = {"action": "store_true", "help": "show the traceback of an error"}
    parser.add_argument("--debug", **debug)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run_command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--debug", default=argparse.SUPPRESS, **debug)
        command.set_defaults(run_command=run_command)
        return command

    train = add("train", _train, "train a run, or go on with one")
    train.add_argument("--run", required=True, type=Path, help="folder of the run")
    train.add_argument(
        "--save-every", type=float, default=300.0, metavar="SECONDS", help="between checkpoints"
    )
    train.add_argument("--processes", type=int, default=1, help="training processes")
    _add_settings(train)
    data = add("data", _data, "read a data set and say what was found")
    data.add_argument("--download", action="store_true", help="fetch its official files first")
    _add_settings(data)

    predict = add("predict", _predict, "classify photos with a finished run")
    predict.add_argument("paths", nargs="+", help="image files, folders or patterns")
    predict.add_argument("--run", required=True, type=Path, help="folder of the run")
    predict.add_argument("--out", type=Path, help="CSV file to write; the terminal by default")
    predict.add_argument("--pictures", type=Path, help="folder for pictures with the regions")

    export = add("export", _export, "write a run's model as one file that needs no ramslib")
    export.add_argument("--run", required=True, type=Path, help="folder of the run")
    export.add_argument("--out", required=True, type=Path, help="new file, .pt2")

    sweep = add("sweep", _sweep, "train a grid; start it again in other shells to share the work")
    sweep.add_argument("--out", required=True, type=Path, help="folder of all runs")
    sweep.add_argument("--processes", type=int, default=1, help="training processes per run")
    sweep.add_argument("--storage", metavar="ADDRESS", help="database that machines share")
    _add_settings(sweep, "settings of Config; one that is given several times is an axis")

    report = add("report", _report, "render a finished run as one page, report.html in its folder")
    report.add_argument("run", type=Path, help="folder of the run")

    notebooks = add("notebooks", _notebooks, "execute the numbered notebooks")
    notebooks.add_argument("--data", default="diagnostic", help="a reader's name")
    notebooks.add_argument("--root", type=Path, help="folder of the data set")
    notebooks.add_argument(
        "--out", type=Path, default=Path("runs/notebooks"), help="folder of all results"
    )
    notebooks.add_argument("--preset", default="small", help=PRESET_HELP)
    notebooks.add_argument("settings", nargs="*", metavar="name=value", help="notebook parameters")

    app = add("app", _app, "serve the explorer as a page without code")
    app.add_argument("--data", default="diagnostic", help="a reader's name")
    app.add_argument("--root", type=Path, help="folder of the data set")
    app.add_argument("--out", type=Path, default=Path("runs"), help="runs are found below it")
    app.add_argument("--run", type=Path, help="folder of the run to look through first")
    app.add_argument("voila", nargs="*", help="after --: Voila's own options")
    return parser


def _add_settings(parser: argparse.ArgumentParser, text: str = "settings of Config") -> None:
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--preset", default="small", help=PRESET_HELP)
    base.add_argument("--config", type=Path, help="JSON file with settings, such as a run's")
    parser.add_argument("settings", nargs="*", metavar="name=value", help=text)


def _assignments(texts: Sequence[str]) -> dict[str, str]:
    """``name=value`` texts as a dictionary; the last value of a name counts."""
    return {name: values[-1] for name, values in _axes(texts).items()}


def _axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """``name=value`` texts as the values of each name, in order."""
    values: dict[str, list[str]] = {}
    for text in texts:
        if "=" not in text.lstrip("="):
            raise InputError(f"{text!r} is not of the form name=value")
        name, value = text.split("=", 1)
        values.setdefault(name, []).append(value)
    return values


def _base(options: argparse.Namespace) -> Config:
    return Config.from_file(options.config) if options.config else Config.preset(options.preset)


def _config(options: argparse.Namespace) -> Config:
    return _base(options).replace(**_assignments(options.settings))


def _train(options: argparse.Namespace) -> None:
    config = _config(options)  # before the slow import: typos are answered at once
    from ramslib.training.trainer import train

    if options.processes == 1:
        train(config, options.run, options.save_every)
        return
    from ramslib.distributed import Processes
    from ramslib.training.launch import overrides, run_in_processes
    from ramslib.training.optimization import check_shares

    check_shares(config, Processes(world=options.processes))
    save_every = ["--save-every", options.save_every]
    arguments = ["train", "--run", options.run, *save_every, *overrides(config)]
    if code := run_in_processes(arguments, options.processes):
        sys.exit(code)


def _data(options: argparse.Namespace) -> None:
    config = _config(options)
    from ramslib.data.datasets import describe, download, load_table

    if options.download:
        download(config.data, config.root)
    table = load_table(config)
    print(describe(table).to_string())


def _predict(options: argparse.Namespace) -> None:
    from ramslib.errors import write_table
    from ramslib.runs.inference import find_images, picture_paths, predict, save_pictures

    if options.out and (options.out.exists() or not options.out.parent.is_dir()):
        raise InputError(f"{options.out} exists, or its folder does not; give another file")
    if options.pictures:
        picture_paths(list(map(str, find_images(options.paths))), options.pictures)
    predictions = predict(options.run, options.paths)
    if options.out:
        write_table(predictions, options.out)
    else:
        print(predictions.to_string(index=False))
    if options.pictures:
        save_pictures(predictions, options.pictures)
    if failed := (predictions["error"] != "").sum():
        raise InputError(f"files that cannot be read: {failed}, see the column 'error'")


def _export(options: argparse.Namespace) -> None:
    from ramslib.runs.inference import export_run

    print(export_run(options.run, options.out))


def _sweep(options: argparse.Namespace) -> None:
    _config(options)  # before the slow imports: typos are answered at once
    from ramslib.errors import write_table
    from ramslib.experiments.comparison import collect, grid
    from ramslib.experiments.sweep import train_all
    from ramslib.training.launch import available_processes

    processes, why = available_processes(options.processes)
    print(why)
    axes = _axes(options.settings)
    configs = grid(_base(options), **axes)
    results = collect(train_all(configs, options.out, processes, storage=options.storage))
    write_table(results, options.out / "results.csv")
    asked = [name for name, values in axes.items() if len(values) > 1]
    print(results[[*asked, "output", "images", "top1", "standard_error", "run"]].to_string())


def _report(options: argparse.Namespace) -> None:
    from ramslib.experiments.notebooks import write_report

    print(write_report(options.run))


def _notebooks(options: argparse.Namespace) -> None:
    from ramslib.experiments.notebooks import run_notebooks

    parameters = _assignments(options.settings)
    run_notebooks(options.data, _root(options), options.out, options.preset, parameters)


def _app(options: argparse.Namespace) -> None:
    from ramslib.explorer.app import serve

    sys.exit(serve(options.data, _root(options), options.out, options.run, options.voila))


def _root(options: argparse.Namespace) -> Path:
    return options.root or Path("data") / options.data


if __name__ == "__main__":
    atexit.register(gc.freeze)  # the end need not look through torch for garbage: two seconds less
    warnings.simplefilter("once")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names of any encoding
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.exit(main())
