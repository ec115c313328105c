"""A trained run as one program for other places: all scales, from pixels to logits and boxes.

The file needs neither ramslib nor timm: it is torch.export's, to be read by torch alone. The batch
size is free; search for the largest component and cutting out the region are inside.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ramslib.classifier import ImageClassifier
from ramslib.data.transforms import ImageTransform
from ramslib.errors import InputError, write_atomically
from ramslib.runs.run import load, read_run


class Pixels(nn.Module):
    """A model that takes a view as it comes from the file: the part that is exported."""

    def __init__(self, model: ImageClassifier):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Look at all scales.

        Args:
            pixels: (B, 3, Hs, Ws) uint8 RGB, the test view (`transforms.ImageTransform`) of the photos.

        Returns:
            ``logits_1`` .. ``logits_S`` (B, K) and ``boxes_1`` .. ``boxes_S`` (B, 4), where each
            scale looked, in pixels of the model's input.
        """
        output = self.model(pixels)
        named = {f"logits_{scale + 1}": logits for scale, logits in enumerate(output.logits)}
        return named | {f"boxes_{scale + 1}": boxes for scale, boxes in enumerate(output.boxes)}


def export_model(
    model: ImageClassifier, highres_size: tuple[int, int]
) -> torch.export.ExportedProgram:
    """Trace a model for batches of any size.

    Args:
        model: in evaluation mode, on the CPU.
        highres_size: (Hs, Ws) of the views that the program will take.
    """
    pixels = torch.zeros(2, 3, *highres_size, dtype=torch.uint8)
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1, max=4096)}}
    with torch.no_grad():
        return torch.export.export(Pixels(model).eval(), (pixels,), dynamic_shapes=shapes)


def export_run(run: Path | str, path: Path | str, checkpoint: str = "best") -> Path:
    """Write the model of a run as one file.

    Args:
        run: the run's folder.
        path: the new file, ``.pt2``.
        checkpoint: ``best`` or ``last`` weights.

    Raises:
        InputError: no such run, a file that exists, or another ending.
    """
    path = Path(path)
    if path.suffix != ".pt2" or path.exists():
        raise InputError(f"{path}: give a new file that ends in .pt2")
    config, _, _ = read_run(run)
    program = export_model(
        load(run, checkpoint), ImageTransform(config.highres_size or config.image_size).size
    )
    write_atomically(path, partial(torch.export.save, program))
    return path
