"""The README's picture of the method: ``python docs/draw_story.py FILE RUN``.

It shows four test images, one per class, that a trained run of several scales classifies correctly
at scale 2 and by all scales together: those whose true class gains most by scale 2.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from ramslib.data.annotations import BOX_COLUMNS
from ramslib.data.transforms import open_image
from ramslib.evaluation import predict
from ramslib.plots import plot_recursion

WIDTH = 1300  # pixels


def choose_images(predictions: pd.DataFrame, count: int) -> list[str]:
    """Paths of correct images of different classes, the greatest gain by scale 2 first."""
    rows = predictions.pivot(index=["path", "label"], columns="output")
    correct = (rows["rank"][["scale 2", "mean logits"]] == 0).all(axis=1)
    gain = rows["true_probability"]["scale 2"] - rows["true_probability"]["scale 1"]
    best = gain[correct].sort_values(ascending=False, kind="stable").reset_index()
    return best.drop_duplicates("label")["path"].head(count).tolist()


def draw_story(loaded, path: Path | str, count: int = 4) -> list[str]:
    """Draw images of a `LoadedModel` into a file of 256 colors; returns their paths."""
    table = loaded.table[loaded.table["split"] == "test"].reset_index(drop=True)
    chosen = choose_images(predict(loaded.model, table, loaded.transform), count)
    rows, images = table.set_index("path").loc[chosen], [open_image(name) for name in chosen]
    sizes = torch.tensor([[image.height, image.width] for image in images])
    boxes = torch.tensor(rows[BOX_COLUMNS].to_numpy(float))
    boxes = loaded.transform.boxes_to_input(boxes, sizes, loaded.transform.size)
    pixels = torch.stack([loaded.transform(image) for image in images])
    with torch.inference_mode():
        outputs = list(loaded.model.forward_scales(pixels.to(loaded.model.mean.device)))
    labels = rows["label"].tolist()
    axes = plot_recursion(outputs, pixels, loaded.model, loaded.classes, labels, boxes)
    axes[0, 0].figure.savefig(path, dpi=220, bbox_inches="tight", format="png")
    with Image.open(path) as drawn:
        drawn.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        drawn = drawn.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
    drawn.save(path, "PNG", optimize=True)
    return chosen


if __name__ == "__main__":
    from ramslib.runs.inference import load_model

    print("\n".join(draw_story(load_model(sys.argv[2]), sys.argv[1])))
