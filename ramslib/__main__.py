"""Command line: ``ramslib COMMAND``, or ``python -m ramslib COMMAND``.

Bad input is one line on stderr and exit code 2.
"""

import argparse
import atexit
import gc
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ramslib.config import PRESETS, Config, check_shares
from ramslib.errors import InputError, one_line, plain_warnings
from ramslib.extensions import loaded_files

ABOUT = """Fine-grained image recognition with a Vision Transformer that looks twice. Settings are
given as name=value, in any number; 'ramslib COMMAND --help' lists what a command takes."""
PRESET_HELP = f"settings to start from: {', '.join(PRESETS)}; small by default"
SETTINGS_HELP = "settings, such as epochs=5 seed=1; docs/training.md lists all"
OLD_NAMES = {"data": "describe-data", "road": "notebooks"}  # of commands, in version 0.1


def run() -> None:
    """Entry point of the program ``ramslib`` and of ``python -m ramslib``."""
    atexit.register(gc.freeze)  # the end need not search torch for garbage: two seconds less
    plain_warnings()
    sys.stdout.reconfigure(errors="backslashreplace")  # file names of any encoding
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if "RANK" in os.environ and not multiprocessing.parent_process():  # a fork has a stand-in
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    options = _parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        return options.run_command(options) or 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        if type(error).__name__ != "OtherProcessFailed":  # which reports its error itself
            sys.stderr.write(f"error: {_with_place(error)}\n")  # whole, beside other processes
        return 2


def _end_with_parent(parent: int, every: float = 0.5) -> None:
    """End one of several training processes with the process that started them."""
    while os.getppid() == parent:
        time.sleep(every)
    os._exit(1)


def _with_place(error: Exception) -> str:
    if isinstance(error, InputError | OSError):
        return one_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if frame.filename in loaded_files()] or frames)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"{one_line(error)} ({where}; --debug shows the traceback)"


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Options and settings in any order."""
    parser, arguments = _parser(), [OLD_NAMES.get(a, a) for a in arguments[:1]] + arguments[1:]
    options, rest = parser.parse_known_args(arguments)
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if rest != late or not hasattr(options, "settings"):
        parser.parse_args(arguments)
    elif late:
        options.settings += late
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ramslib", description=ABOUT, allow_abbrev=False)
    debug = {"action": "store_true", "help": "show the traceback of an error"}
    parser.add_argument("--debug", **debug)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run_command: Callable, text: str, run: str = "") -> Callable:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--debug", default=argparse.SUPPRESS, **debug)
        command.set_defaults(run_command=run_command)
        if run:
            command.add_argument("--run", required=True, type=_path, help=run)
        return command.add_argument

    train = add("train", _train, "train or resume a run", "folder of the run")
    train("--save-every", type=float, default=300.0, metavar="SECONDS", help="between checkpoints")
    train("--processes", type=int, default=1, help="training processes")
    _add_settings(train)
    data = add("describe-data", _describe_data, "read a dataset and describe it")
    data("--download", action="store_true", help="download its official files first")
    data("--probe", type=_path, help="folder of ramslib probe: find suspicious labels, too")
    data("--out", type=_path, help="CSV file to write with every image that has a problem")
    data("--fix", action="store_true", help="list what to leave out and what to keep together")
    _add_settings(data)
    probe = add("probe", _probe, "accuracy of the features as they are: no training, minutes")
    probe("--out", required=True, type=_path, help="folder of features and tables")
    probe("--head", default="discriminant", help="discriminant (the default) or logistic")
    probe("--images", type=int, metavar="N", help="draw about N images instead of using all")
    _add_settings(probe)
    predict = add("predict", _predict, "classify images with a run or an exported model")
    model = commands.choices["predict"].add_mutually_exclusive_group(required=True).add_argument
    model("--run", type=_path, help="folder of the run")
    model("--model", type=_path, metavar="FILE", help=".onnx file of 'export'; needs onnxruntime")
    predict("paths", nargs="+", type=_path, help="image files, folders or patterns")
    predict("--out", type=_path, help="CSV file to write; the terminal by default")
    predict("--unsure-below", type=float, metavar="P", help="probability; the run's by default")
    predict("--early-exit", action="store_true", help="only scale 1 where it is sure: faster")
    predict("--pictures", type=_path, help="folder for pictures with the regions")
    predict("--contact-sheet", type=_path, metavar="FILE", help="new .html page of thumbnails")
    predict("--sort-into", type=_path, metavar="FOLDER", help="new folder for copies by class")
    export = add("export", _export, "write a run's model as one file", "folder of the run")
    export("--out", required=True, type=_path, help="new file, .pt2 or .onnx: needs no ramslib")
    export("--format", choices=["pt2", "onnx"], help="by default the ending of the file")
    export("--root", type=_path, help="folder of the run's photos, if they moved")
    export("--weights", default="float32", help="float32, or for .onnx int8: smaller and faster")
    page = add("export-page", _export_page, "write images and their thresholds as one HTML file")
    page("--run", required=True, help="folder of the run, or timm's name of a backbone")
    page("--out", required=True, type=_path, help="new file, .html, that needs no network")
    page("images", nargs="+", type=_path, help="image files, folders or patterns")
    sweep = add("sweep", _sweep, "train a grid; start it in several shells to share the work")
    sweep("--out", required=True, type=_path, help="folder of all runs")
    sweep("--processes", type=int, default=1, help="training processes per run")
    sweep("--storage", metavar="URL", help="database that several machines share")
    _add_settings(sweep, f"{SETTINGS_HELP}; one that is given several times is an axis")
    report = add("report", _report, "write report.html, a page about a finished run")
    report("run", type=_path, help="folder of the run")
    report("--root", type=_path, help="folder of its images, if they moved")
    notebooks = add("notebooks", _notebooks, "execute the numbered notebooks")
    _add_place(notebooks, Path("runs/notebooks"), "folder of all results")
    notebooks("--preset", default="small", help=PRESET_HELP)
    notebooks("settings", nargs="*", metavar="name=value", help="parameters and settings of Config")
    app = add("app", _app, "serve the explorer as a page without code")
    _add_place(app, Path("runs"), "folder below which runs are found")
    app("--run", type=_path, help="folder of the run to show first")
    app("voila", nargs="*", help="after --: Voila's own options")
    trust = add("trust", _trust, "allow the code that a run of somebody else brings")
    trust("run", type=_path, help="folder of the run")
    return parser


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give a file or folder")
    return Path(text).expanduser()


def _add_settings(add: Callable, text: str = SETTINGS_HELP) -> None:
    add("--preset", help=PRESET_HELP)
    add("--config", type=_path, help="JSON file with settings, such as a run's; no preset then")
    add("settings", nargs="*", metavar="name=value", help=text)


def _add_place(add: Callable, out: Path, text: str) -> None:
    add("--data", default="diagnostic", help="name of a reader")
    add("--root", type=_path, help="folder of the dataset")
    add("--out", type=_path, default=out, help=text)


def _axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """``name=value`` texts as the values of each name, in order."""
    values: dict[str, list[str]] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise InputError(f"{text!r} is not of the form name=value")
        values.setdefault(name, []).append(os.path.expanduser(value))
    return values


def _base(options: argparse.Namespace) -> Config:
    if options.config and options.preset:
        raise InputError("--preset and --config both give settings to start from; choose one")
    preset = options.preset or "small"
    return Config.from_file(options.config) if options.config else Config.preset(preset)


def _config(options: argparse.Namespace) -> Config:
    axes = _axes(options.settings)
    return _base(options).replace(**{name: values[-1] for name, values in axes.items()})


def _train(options: argparse.Namespace) -> int:
    config, code = _config(options), 0  # before the slow imports: typos are answered at once
    if options.processes == 1:
        from ramslib.training.trainer import train

        train(config, options.run, options.save_every)
    else:
        from ramslib.training.launch import overrides, run_in_processes

        check_shares(config, options.processes)
        arguments = ["--run", options.run, "--save-every", options.save_every, *overrides(config)]
        code = run_in_processes(["train", *arguments], options.processes)
    if not code and "RANK" not in os.environ:  # once, not by each of several processes
        print(f"{options.run}: finished; its README.md says how good it is and how to use it")
    return code


def _describe_data(options: argparse.Namespace) -> None:
    config = _config(options)
    from ramslib.data import health
    from ramslib.data.datasets import load_table, preparation
    from ramslib.errors import write_table

    if options.out:
        _check_new(options.out)
    if options.download:
        preparation("download").download(config.data, config.root)
    held = health.read_held(options.probe, config.root) if options.probe else None
    table = health.measure_images(load_table(config))
    problems = health.find_problems(table, config.backbone, held)
    print(health.describe(table).to_string())
    for row in health.summarize_problems(problems).reset_index().itertuples(index=False):
        across = f" across {row.across}" if row.across else ""
        groups = f" (groups: {row.groups:,})" if row.groups else ""
        print(f"{row.kind}{across}: {row.count:,}{groups}, first: {row.first}\n    {row.remedy}")
    if options.out:
        write_table(problems, options.out)
    if options.fix:
        print(*health.write_fixes(problems, table, config.root, config.lists), sep="\n")


def _check_new(path: Path) -> None:
    if os.path.lexists(path) or not path.parent.is_dir():
        raise InputError(f"{path} exists, or its folder does not; give another file")


def _probe(options: argparse.Namespace) -> None:
    config = _config(options)
    from ramslib.experiments.probe import probe

    print(*probe(config, options.out, options.head, options.images), sep="\n")


def _predict(options: argparse.Namespace) -> int:
    from ramslib.errors import write_table
    from ramslib.runs import photos

    for file in filter(None, (options.out, options.contact_sheet)):
        _check_new(file)
    if options.early_exit and (options.pictures or options.contact_sheet):
        raise InputError("--early-exit gives no regions, which pictures and contact sheets show")
    for folder in filter(None, (options.pictures, options.sort_into)):
        _check_outside(folder, options.paths)
    if options.pictures:
        photos.picture_paths(list(map(str, photos.find_images(options.paths))), options.pictures)
    if options.sort_into:
        photos.check_empty(options.sort_into)
    given = {"unsure_below": options.unsure_below, "early_exit": options.early_exit}
    predictions = photos.predict(options.model or options.run, options.paths, **given)
    failed = int((predictions["error"] != "").sum())
    if options.out:
        write_table(predictions, options.out)
    else:
        shown = predictions[predictions["error"] == ""].drop(columns="error")
        print(shown.to_string(index=False, na_rep=""))
        sys.stderr.writelines(f"error: {text}\n" for text in predictions["error"] if text)
    if options.pictures:
        photos.save_pictures(predictions, options.pictures)
    if options.contact_sheet:
        photos.save_contact_sheet(predictions, options.contact_sheet)
    if options.sort_into:
        photos.sort_into(predictions, options.sort_into)
    if failed:
        print(f"error: {failed} images cannot be read; see the column 'error'", file=sys.stderr)
    return min(failed, 1)


def _check_outside(folder: Path, paths: Sequence[Path]) -> None:
    """Refuse a folder below those that are searched: what is put there would be found next time."""
    for path in paths:
        while not path.exists() and path.name:  # a pattern
            path = path.parent
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{folder}: is inside the folder of the photos, {path}; give another")


def _export(options: argparse.Namespace) -> None:
    from ramslib.runs.inference import export_run

    given = {"kind": options.format, "root": options.root, "weights": options.weights}
    print(export_run(options.run, options.out, **given))


def _export_page(options: argparse.Namespace) -> None:
    from ramslib.explorer.views import export_page
    from ramslib.runs.photos import find_images

    print(export_page(options.run, find_images(options.images), options.out))


def _sweep(options: argparse.Namespace) -> None:
    _config(options)  # before the slow imports: typos are answered at once
    table = options.out / "results.csv"
    if table.exists() and not any(options.out.glob("*/config.json")):
        raise InputError(f"{table}: made by somebody else; choose another folder")
    from ramslib.errors import write_table
    from ramslib.experiments.comparison import collect, grid
    from ramslib.experiments.sweep import train_all
    from ramslib.training.launch import available_processes

    processes, why = available_processes(options.processes)
    print(why)
    axes = _axes(options.settings)
    configs = grid(_base(options), **axes)
    results = collect(train_all(configs, options.out, processes, storage=options.storage))
    write_table(results, table)
    varied = [name for name, values in axes.items() if len(values) > 1]
    scores = ["output", "images", "top1", "standard_error", "checkpoint", "run"]
    print(results[[*varied, *scores]].to_string())


def _report(options: argparse.Namespace) -> None:
    from ramslib.experiments.notebooks import write_report

    print(write_report(options.run, options.root))


def _notebooks(options: argparse.Namespace) -> None:
    parameters = {name: values[-1] for name, values in _axes(options.settings).items()}
    from ramslib.training.forks import forking

    with forking():  # which imports meanwhile
        from ramslib.experiments.notebooks import run_notebooks

        root = options.root or Path("data", options.data)
        run_notebooks(options.data, root, options.out, options.preset, parameters)


def _app(options: argparse.Namespace) -> int:
    from ramslib.explorer.page import serve

    root = options.root or Path("data", options.data)
    return serve(options.data, root, options.out, options.run, options.voila)


def _trust(options: argparse.Namespace) -> None:
    from ramslib.extensions import trust

    if not (files := trust(options.run)):
        raise InputError(f"{options.run}: no run that brings code of its own; nothing to allow")
    print(*(f"trusted: {file}" for file in files), sep="\n")


if __name__ == "__main__":
    run()
