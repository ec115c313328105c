"""An exported model against eager torch on CPUs: the same answers on photos, and the time.

    python -m benchmarks.export --root ../CUB_200_2011

Two looks of the pre-trained ViT-S/14 at 224 pixels, whose classifier compares with the mean feature
of each class; photos of the first classes of a dataset. Times are of pairs, one after the other.
"""

import argparse
import itertools
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.timing import machine, ratios, row
from ramslib.classifier import ImageClassifier
from ramslib.config import Config
from ramslib.data.datasets import load_table
from ramslib.data.transforms import ImageTransform
from ramslib.evaluation import iterate_batches
from ramslib.model import build_model
from ramslib.runs import inference

SIZE, HIGH_RES = 224, 448


def compare_with_means(model: ImageClassifier, batches, classes: int) -> None:
    """Make the classifier that of the nearest mean feature, by cosine."""
    sums = torch.zeros(classes, model.backbone.num_features)
    for batch in batches:
        feature = next(model.forward_scales(batch["pixels"])).feature
        sums.index_add_(0, batch["label"], F.normalize(feature))
    model.classifier.weight.copy_(F.normalize(sums))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="cub")
    parser.add_argument("--root", required=True)
    parser.add_argument("--images", type=int, default=100, help="of each split")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    config = Config().replace(image_size=SIZE, highres_size=HIGH_RES)
    table = load_table(config.replace(data=options.data, root=options.root))
    transform, classes = ImageTransform(HIGH_RES), int(table["label"].max()) + 1
    train, test = (
        table[table["split"] == split].sample(options.images, random_state=0).reset_index(drop=True)
        for split in ("train", "test")
    )
    model = build_model(config, classes).eval()
    with torch.no_grad():
        compare_with_means(model, iterate_batches(model, train, transform, 8), classes)
    eager = inference.NamedOutputs(model)
    about = {"image_size": (SIZE, SIZE), "temperatures": {}}
    content, program = inference._to_onnx(
        inference.export_model(model, (HIGH_RES, HIGH_RES)), about
    )
    small = inference._quantize(content, about)
    print(f"files: {len(content) / 1e6:.0f} MB, int8 {len(small) / 1e6:.0f} MB", flush=True)
    programs = {"float32": program, "int8": inference.ExportedModel(small).named_outputs}
    with torch.inference_mode():
        compare(iterate_batches(model, test, transform, 8), eager, programs)
        for batch, (name, program) in itertools.product((1, 8), programs.items()):
            pixels = torch.randint(256, (batch, 3, HIGH_RES, HIGH_RES), dtype=torch.uint8)
            pair = partial(program, pixels), partial(eager, pixels)
            what = f"onnxruntime, {name} / torch eager, batch {batch}"
            told = row(what, "", *ratios(*pair, options.repeats))
            line = "{figure}: {ratio:.2f} [{lowest:.2f}, {highest:.2f}], {measured:.3f} s"
            print(line.format(**told), flush=True)


def compare(batches, eager, programs: dict) -> None:
    """Print accuracy, agreement, cosine of logits and share of equal boxes on photos."""
    found, labels = {"eager": []} | {name: [] for name in programs}, []
    for batch in batches:
        labels.append(batch["label"])
        for name, program in ({"eager": eager} | programs).items():
            found[name].append(program(batch["pixels"]))
    labels = torch.cat(labels)
    found = {
        name: {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for name, parts in found.items()
    }
    reference = found["eager"]
    for name, outputs in found.items():
        shares = (outputs["logits_1"] * 20).softmax(1) + (outputs["logits_2"] * 20).softmax(1)
        known = (reference["logits_1"] * 20).softmax(1) + (reference["logits_2"] * 20).softmax(1)
        correct = 100 * (shares.argmax(1) == labels).float().mean()
        same = 100 * (shares.argmax(1) == known.argmax(1)).float().mean()
        cosine = F.cosine_similarity(outputs["logits_1"], reference["logits_1"]).min()
        boxes = 100 * (outputs["boxes_2"] == reference["boxes_2"]).all(1).float().mean()
        print(
            f"{name}: top-1 {correct:.1f} %, same class {same:.1f} %, smallest cosine of logits_1 "
            f"{cosine:.5f}, same boxes {boxes:.1f} %, {len(labels)} photos",
            flush=True,
        )


if __name__ == "__main__":
    main()
