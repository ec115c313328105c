"""A trained model ready to use: that of a run, a backbone alone, or a file that was exported.

An exported file holds all scales and needs neither ramslib nor timm.
"""

import importlib
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import format_exception
from types import ModuleType

import pandas as pd
import torch
from torch import Tensor, nn

from ramslib import __version__
from ramslib.backbone import count_class_tokens
from ramslib.classifier import ImageClassifier, RAMSOutput
from ramslib.config import Config
from ramslib.data.annotations import TABLE_COLUMNS, file_errors
from ramslib.data.transforms import ImageDataset, ImageTransform
from ramslib.dppm import random_proposal
from ramslib.errors import InputError, one_line, write_atomically
from ramslib.evaluation import output_names, predict
from ramslib.inspector import Inspector
from ramslib.model import RAMSTrans, build_model
from ramslib.runs.checkpoint import load_module, read_checkpoint
from ramslib.runs.folder import read_run, run_key
from ramslib.runs.results import read_calibration
from ramslib.weights import cache_folder

OPSET = 20  # of exported ONNX files; antialiased resizing needs 18
MAX_ONNX = 2**31 - 2**24  # bytes of weights; a protocol buffer holds 2 GiB
TOLERANCE = 1e-4  # between logits of a program and of its model, relative where they exceed 1
COMPARED = 8  # photos
MEASURED = 400  # photos at most, by which the accuracy of 8-bit weights is told: a minute or two
EXPORT_REMEDY = "; if code of your own does that, change it, or choose the other format"


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that belongs to it.

    Attributes:
        name: of the run or the backbone.
        model: in evaluation mode, on its device.
        transform: the deterministic one of the test.
        classes: K names; empty for a backbone without a trained classifier.
        table: the images of its dataset; empty where there is none.
        origin: one sentence about its weights.
        key: names all that decides what it computes.
        unsure_below: confidence by output, see `evaluation.fit_calibration`; empty where unknown.
        exit_above: the threshold of early exit, see there; NaN where unknown.
    """

    name: str
    model: ImageClassifier
    transform: ImageTransform
    classes: list[str]
    table: pd.DataFrame
    origin: str
    key: str
    unsure_below: dict[str, float] = field(default_factory=dict)
    exit_above: float = math.nan


def load(run: Path | str, checkpoint: str = "best") -> ImageClassifier:
    """The trained model of a run, in evaluation mode, on a GPU where there is one.

    Args:
        run: a run's folder.
        checkpoint: ``best`` (by validation) or ``last``.

    Raises:
        InputError: no such run, or no sound checkpoint in it.
    """
    return load_model(run, checkpoint).model


def inspect(run: Path | str, checkpoint: str = "best") -> Inspector:
    """An inspector of a run's model, see `inspector`.

    Args:
        run: a run's folder.
        checkpoint: ``best`` or ``last``.

    Raises:
        InputError: no such run, or one whose model is no RAMS-Trans.
    """
    loaded = load_model(run, checkpoint)
    if not isinstance(loaded.model, RAMSTrans):
        raise InputError(f"{run}: only RAMS-Trans and plain ViT can be inspected; give such a run")
    return Inspector(loaded.model, loaded.transform, loaded.classes)


def load_model(
    run: Path | str, checkpoint: str = "best", root: Path | str | None = None
) -> LoadedModel:
    """The trained model of a run with its transform, classes and images.

    Args:
        run: a run's folder.
        checkpoint: ``best`` (by validation) or ``last``.
        root: where the images are now, if they moved.

    Raises:
        InputError: no such run, or no sound checkpoint in it.
    """
    config, metadata, table = read_run(run, root)
    path = Path(run) / f"{checkpoint}.safetensors"
    stored = read_checkpoint(path, metadata.get("key", ""))
    model = build_model(config.replace(pretrained="none"), len(metadata["classes"]))
    load_module(model, stored, "ema" if config.ema_decay else "model")
    transform = ImageTransform(config.highres_size or config.image_size, config.crop_fraction)
    key = f"{run_key(config, metadata['data_fingerprint'])}-{checkpoint}"
    origin = f"{run}, {checkpoint} checkpoint"
    model, calibration = model.eval().to(_device()), read_calibration(run, checkpoint)
    model.temperatures = calibration["temperature"].to_dict()
    what = Path(run).name, model, transform, metadata["classes"], table, origin, key
    exit_above = calibration["exit_above"].max()  # it is one of them
    return LoadedModel(*what, calibration["unsure_below"].dropna().to_dict(), exit_above)


def load_backbone(
    name: str, table: pd.DataFrame | None = None, image_size: int = 224, highres_size: int = 448
) -> LoadedModel:
    """A pre-trained backbone alone: its attention needs no training, classes do.

    Args:
        name: of timm.
        table: images to look at, if there is a dataset.
        image_size: pixels of the input.
        highres_size: pixels that crops are cut from.

    Raises:
        InputError: see `create_backbone`.
    """
    table = pd.DataFrame(columns=TABLE_COLUMNS) if table is None else table
    sizes = {"image_size": image_size, "highres_size": highres_size}
    config = Config().replace(backbone=name, strength="rollout_mean", **sizes)
    stored = cache_folder() / f"{name}.safetensors"
    pretrained = str(stored) if stored.exists() else "auto"
    classes = int(table["label"].max()) + 1 if len(table) else 1  # never read, but scored
    model = build_model(config.replace(pretrained=pretrained), classes)
    if count_class_tokens(model.backbone):
        model.settings = replace(model.settings, strength="last_class")
    transform = ImageTransform(highres_size, config.crop_fraction)
    model, key = model.eval().to(_device()), run_key(config, model.origin)
    return LoadedModel(name, model, transform, [], table, model.origin, key)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class NamedOutputs(nn.Module):
    """The part of a model that is exported: from pixels to named tensors."""

    def __init__(self, model: ImageClassifier):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Run all scales.

        Args:
            pixels: (B, 3, Hs, Ws) uint8 RGB, transformed as for the test (`ImageTransform`).

        Returns:
            ``logits_1`` .. ``logits_S`` (B, K) and ``boxes_1`` .. ``boxes_S`` (B, 4), the region
            of each scale in pixels of the model's input.
        """
        output = self.model(pixels)
        named = {f"logits_{scale + 1}": logits for scale, logits in enumerate(output.logits)}
        return named | {f"boxes_{scale + 1}": boxes for scale, boxes in enumerate(output.boxes)}


class ExportedModel:
    """An ``.onnx`` file that `evaluation.predict` takes for a model; onnxruntime runs it.

    Args:
        content: the file's path or its bytes.

    Raises:
        InputError: onnxruntime is not installed.
    """

    device = torch.device("cpu")

    def __init__(self, content: str | bytes):
        runtime = _import_extra("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # its own choice ignores limits
        options.log_severity_level = 4  # errors are raised as well
        self.session = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.num_scales = len(self.names) // 2
        self.about = {}
        for name, value in self.session.get_modelmeta().custom_metadata_map.items():
            with suppress(ValueError):  # other tools, such as quantizers, add texts of their own
                self.about[name] = json.loads(value)
        self.image_size = tuple(self.about["image_size"])
        self.temperatures = self.about["temperatures"]
        self.scale_weights = self.about.get("scale_weights", ())  # older files have none

    def named_outputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """What `NamedOutputs` gives."""
        values = self.session.run(self.names, {"pixels": pixels.numpy()})
        return dict(zip(self.names, map(torch.from_numpy, values), strict=True))

    def __call__(self, pixels: Tensor) -> RAMSOutput:
        """See `ImageClassifier.forward`; strengths and proposals are not part of the file."""
        values, scales = list(self.named_outputs(pixels).values()), self.num_scales
        return RAMSOutput(tuple(values[:scales]), tuple(values[scales:]), (), ())


def load_exported(path: Path | str) -> LoadedModel:
    """An exported ``.onnx`` file with its transform and classes; no model is built.

    Raises:
        InputError: the file is missing, or was not written by `export_run`.
    """
    with file_errors(str(path), "give an .onnx file that 'ramslib export' wrote"):
        model = ExportedModel(Path(path).read_bytes())
        about, table = model.about, pd.DataFrame(columns=TABLE_COLUMNS)
        transform = ImageTransform(about["highres_size"], about["crop_fraction"])
        what = about["run"], model, transform, about["classes"], table, f"{path}, exported"
        return LoadedModel(*what, about["key"], about["unsure_below"])


def export_model(
    model: ImageClassifier, highres_size: tuple[int, int]
) -> torch.export.ExportedProgram:
    """Trace a model for batches of any size.

    Args:
        model: in evaluation mode, on the CPU.
        highres_size: (Hs, Ws) of the pixels that the program will take.

    Raises:
        InputError: a model with random proposals.
    """
    if model.num_scales > 1 and model.settings.functions[1] is random_proposal:
        raise InputError("a file cannot hold random proposals; export a run with other proposals")
    pixels = torch.zeros(2, 3, *highres_size, dtype=torch.uint8)
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1, max=4096)}}
    with torch.no_grad():
        return torch.export.export(NamedOutputs(model).eval(), (pixels,), dynamic_shapes=shapes)


def _to_pt2(program: torch.export.ExportedProgram, about: dict) -> tuple[bytes, Callable]:
    """The content of a file, and what it computes."""
    content, texts = io.BytesIO(), {"ramslib.json": json.dumps(about)}
    torch.export.save(program, content, extra_files=texts)  # its own files abort on a full disk
    content.seek(0)
    return content.getvalue(), torch.export.load(content).module()


def _to_onnx(program: torch.export.ExportedProgram, about: dict) -> tuple[bytes, Callable]:
    """The content of a file, and what it computes."""
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > MAX_ONNX:
        raise InputError(f"its {size / 1e9:.1f} GB exceed what one .onnx file holds; export a .pt2")
    numbers = range(1, len(program.graph_signature.user_outputs) // 2 + 1)
    names = [f"{kind}_{number}" for kind in ("logits", "boxes") for number in numbers]
    options = {"input_names": ["pixels"], "output_names": names, "opset_version": OPSET}
    exported = torch.onnx.export(program, dynamo=True, verbose=False, **options)
    exported.model.metadata_props.update({name: json.dumps(about[name]) for name in about})
    content = exported.model_proto.SerializeToString()
    return content, ExportedModel(content).named_outputs


FORMATS = {"pt2": _to_pt2, "onnx": _to_onnx}
WEIGHTS = ("float32", "int8")


def _quantize(content: bytes, about: dict) -> bytes:
    """An ONNX file with the weights of its linear layers in 8 bits, scaled channel by channel.

    What is multiplied with them is quantized as it comes ("dynamic"). Without the first step, no
    layer that is used more than once would be quantized, and all scales use the same.
    """
    quantization = _import_extra("onnxruntime.quantization")
    with tempfile.TemporaryDirectory(prefix="ramslib-") as folder:
        plain, prepared, small = (f"{folder}/{number}.onnx" for number in range(3))
        Path(plain).write_bytes(content)
        quantization.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantization.quantize_dynamic(prepared, small, per_channel=True)
        model = _import_extra("onnx").load(small)
    del model.metadata_props[:]
    for name in about:
        model.metadata_props.add(key=name, value=json.dumps(about[name]))
    return model.SerializeToString()


def export_run(
    run: Path | str,
    path: Path | str,
    checkpoint: str = "best",
    kind: str | None = None,
    root: Path | str | None = None,
    weights: str = "float32",
    log: Callable[[str], object] = print,
) -> Path:
    """Write the model of a run as one program: all scales, from pixels to logits and boxes.

    The file needs neither ramslib nor timm. ``pt2`` is torch.export's, read by torch alone;
    ``onnx`` (operators of `OPSET`) is read by onnxruntime and others. The batch size is free;
    search for the largest component and cropping are inside, and what `about_export` gives. Before
    the file is written, the program must answer like the model on photos of the test split: logits
    within `TOLERANCE`, the same boxes. Weights of 8 bits make an ``onnx`` file a quarter as large
    and faster on CPUs, and change answers: its accuracy and the run's on up to `MEASURED` photos of
    the test split are told.

    Args:
        run: the run's folder.
        path: the new file.
        checkpoint: ``best`` or ``last``.
        kind: ``pt2`` or ``onnx``; by default the ending of the path.
        root: where the run's photos are now, if they moved.
        weights: one of ``WEIGHTS``.
        log: called with what was compared.

    Raises:
        InputError: no such run, a file that exists or cannot be written, another ending, or a model
            that the format cannot hold.
    """
    path = Path(path)
    kind = path.suffix[1:] if kind is None else kind
    if kind not in FORMATS or os.path.lexists(path) or not path.parent.is_dir():
        raise InputError(
            f"{path}: give a new file that ends in .pt2 or .onnx, in a folder that exists"
        )
    if weights not in WEIGHTS or weights != "float32" and kind != "onnx":
        raise InputError(f"weights {weights!r}: give float32, or for an .onnx file int8")
    if kind == "onnx":  # before the slow part
        _import_extra("onnxscript"), _import_extra("onnxruntime")
    loaded = load_model(run, checkpoint, root)
    if weights == "int8" and _test_photos(loaded, 1).empty:
        raise InputError(f"{run}: its test photos, to measure int8 on, are not there; give --root")
    try:
        with redirect_stderr(io.StringIO()):  # torch prints the graph of what it cannot export
            program = export_model(loaded.model.cpu(), loaded.transform.size)
            content, outputs = FORMATS[kind](program, about_export(loaded))
        log(_compare(outputs, loaded))
        if weights == "int8":
            content = _quantize(content, about_export(loaded))
            log(_measure(ExportedModel(content), loaded))
    except Exception as error:
        missing = re.search(r"target=torch\.ops\.([\w.]+)", "".join(format_exception(error)))
        why = f"{missing[1]} has no ONNX operator" if missing else one_line(error)
        remedy = "" if isinstance(error, InputError) else EXPORT_REMEDY
        raise InputError(f"{run}: cannot be exported as {kind}: {why}{remedy}") from None
    write_atomically(path, lambda part: part.write_bytes(content))
    return path


def about_export(loaded: LoadedModel) -> dict:
    """What an exported file tells about itself: ``ramslib.json`` in it, or ONNX properties in JSON.

    Returns:
        ``classes``; ``output``, the name of the answer (of several scales ``mean logits``, the mean
        of all logits by ``scale_weights``); ``resized`` and ``highres_size``, the (height, width)
        that a photo is resized to and that of the center crop which is the input; ``image_size``
        (H, W) of scale 1, in whose pixels boxes are; ``image_sizes`` of the scales, the last one
        also of further ones; ``mean`` and ``std``, applied inside; name, key with checkpoint, and
        version of the run.
    """
    model, transform = loaded.model, loaded.transform
    return {
        "classes": loaded.classes,
        "output": output_names(model.num_scales)[-1],
        "resized": transform.resized,
        "highres_size": transform.size,
        "crop_fraction": transform.crop_fraction,
        "image_size": model.image_size,
        "image_sizes": getattr(model, "image_sizes", [model.image_size]),
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "scale_weights": model.scale_weights,
        "temperatures": model.temperatures,
        "unsure_below": loaded.unsure_below,
        "run": loaded.name,
        "key": loaded.key,
        "ramslib": __version__,
    }


def _compare(outputs: Callable[[Tensor], dict[str, Tensor]], loaded: LoadedModel) -> str:
    """Check that a program answers like its model, one image at a time and several.

    Raises:
        InputError: it does not.
    """
    table = _test_photos(loaded, COMPARED)
    images = ImageDataset(table, loaded.transform)
    pixels, where = [item["pixels"] for item in images], f"{len(table)} test photos"
    if not pixels:
        shape, where = (
            (COMPARED, 3, *loaded.transform.size),
            "noise: the run's photos are not there",
        )
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8).unbind()
    worst = 0.0
    for part in filter(len, (pixels[:1], pixels[1:])):
        with torch.inference_mode():
            expected, found = (f(torch.stack(part)) for f in (NamedOutputs(loaded.model), outputs))
        for name, values in expected.items():
            gap = float((found[name] - values).abs().max())
            is_box = name.startswith("boxes")
            limit = 1e-3 if is_box else TOLERANCE * max(1.0, float(values.abs().max()))
            if not gap <= limit:
                raise InputError(f"{name} of the program differs by {gap:.3g}, compared on {where}")
            worst = max(worst, 0.0 if is_box else gap)
    return f"compared with the run on {where}: logits within {worst:.1g}, equal boxes"


def _test_photos(loaded: LoadedModel, count: int) -> pd.DataFrame:
    """At most so many photos of the test split, of those that are there."""
    table = loaded.table[loaded.table["split"] == "test"]
    table = table[[os.path.isfile(path) for path in table["path"]]]
    return table.sample(min(count, len(table)), random_state=0)


def _measure(program: ExportedModel, loaded: LoadedModel) -> str:
    """What a program that rounds costs in accuracy."""
    table, answers = _test_photos(loaded, MEASURED), []
    for model in (program, loaded.model):
        predictions = predict(model, table, loaded.transform)
        last = predictions["output"] == output_names(loaded.model.num_scales)[-1]
        answers.append(predictions[last].reset_index(drop=True))
    rounded, exact = (100 * (each["rank"] == 0).mean() for each in answers)
    same = 100 * (answers[0]["prediction"] == answers[1]["prediction"]).mean()
    return (
        f"int8 on {len(table)} test photos: {rounded:.1f} % correct, {exact:.1f} % before; the "
        f"same class for {same:.1f} %"
    )


def _import_extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is not installed; pip install 'ramslib[onnx]'") from None
