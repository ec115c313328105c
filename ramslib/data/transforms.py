"""From an image file to the pixels that a model is given, and boxes from one to the other and back.

The transform is the paper's: resize to a fixed size without keeping the aspect (bilinear), then
crop, at random with a flip in training, in the center otherwise. It is applied once, at the highest
resolution; the model shrinks the result to the input of scale 1, so that both show the same part.
"""

import os
import random
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ramslib.data.annotations import image_file, upright_size
from ramslib.errors import InputError

HEADER = struct.Struct("<2I")  # height and width, before the pixels of an image that is kept


def open_image(path: Path | str, at_least: int | None = None) -> Image.Image:
    """Open any image as upright RGB of 8 bits.

    The EXIF orientation is applied, transparency is laid over white. Gray values of 16 bits are
    shifted to 8 by the number of bits that the file uses, as cameras fill 10 or 12 of them; other
    numbers (32-bit, float) are scaled from their minimum and maximum. Of several frames, the first
    is read.

    Args:
        path: the file.
        at_least: with it, a JPEG is decoded at the least of 1, 1/2, 1/4 and 1/8 of its size that
            leaves no side below ``at_least`` pixels: much faster, and in little memory.

    Raises:
        InputError: missing, not an image, truncated, or larger than Pillow's safety limit.
    """
    return _open(path, at_least)[0]


def reading_error(path: Path | str, at_least: int | None = None) -> str:
    """Why `open_image` refuses a file; empty where it does not."""
    try:
        open_image(path, at_least)
    except InputError as error:
        return str(error)
    return ""


def _open(path: Path | str, at_least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """The image, and its upright (height, width) in the file whatever size it was decoded at."""
    with image_file(path) as image:
        size = upright_size(image)
        if at_least:
            image.draft(None, (at_least, at_least))
        image.load()
        with suppress(Exception):  # damaged EXIF is no reason to refuse a sound image
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image), size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        bits = max(int(values.max()).bit_length(), 8)
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = values.min(), values.max()
        values = (values - low) * (255 / (high - low)) if high > low else values.clip(0, 255)
        image = Image.fromarray((values + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop and augment: called on a PIL image, returns (3, H, W) uint8.

    In training it draws from the global generators; `ImageDataset` makes that reproducible.

    Attributes:
        size: (H, W) of the result, or one number for both.
        crop_fraction: size / the size that the image is resized to before cropping.
        augment: "none": the center crop; "flip": random crop and flip, after which "autoaugment"
            is ImageNet's policy, and "rand-m9-mstd0.5" and the like timm's RandAugment.
    """

    size: int | tuple[int, int]
    crop_fraction: float = 0.875
    augment: str = "none"

    def __post_init__(self):
        size = (self.size,) * 2 if isinstance(self.size, int) else tuple(self.size)
        if len(size) != 2 or min(size) < 1 or not 0 < self.crop_fraction <= 1:
            raise InputError(
                f"size {self.size} with crop_fraction {self.crop_fraction}: give (height, width) "
                "in pixels and a fraction above 0 and up to 1"
            )
        object.__setattr__(self, "size", size)
        _augmentation(self.augment, min(size))

    @property
    def is_random(self) -> bool:
        """Whether two results of one image differ."""
        return self.augment != "none"

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) that images are resized to before cropping."""
        return round(self.size[0] / self.crop_fraction), round(self.size[1] / self.crop_fraction)

    @property
    def margins(self) -> tuple[int, int]:
        """(top, left) of the center crop in the resized image, in pixels."""
        return tuple(round((r - s) / 2) for r, s in zip(self.resized, self.size, strict=True))

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an upright RGB image to (3, H, W) uint8."""
        return self.crop(self.resize(image))

    def resize(self, image: Image.Image) -> Image.Image:
        """The part that is the same every time."""
        return image.resize(self.resized[::-1], Image.Resampling.BILINEAR)

    def crop(self, image: Image.Image) -> Tensor:
        """Crop and augment a resized image: (3, H, W) uint8."""
        (height, width), (top, left) = self.size, self.margins
        if self.is_random:
            top, left = (
                int(torch.randint(r - s + 1, ()))
                for r, s in zip(self.resized, self.size, strict=True)
            )
        image = image.crop((left, top, left + width, top + height))
        if self.is_random:
            if torch.rand(()) < 0.5:
                image = ImageOps.mirror(image)
            image = _augmentation(self.augment, min(self.size))(image)
        bands = np.stack([np.asarray(band) for band in image.split()])
        return torch.from_numpy(bands)  # contiguous, so that a batch of them is soon put together

    def boxes_to_input(self, boxes: Tensor, image_sizes: Tensor, frame: Sequence[int]) -> Tensor:
        """Boxes in upright images, as boxes in their center crops, clipped to these.

        Args:
            boxes: (B, 4) pixels of the upright image; NaN stays NaN.
            image_sizes: (B, 2) height, width of the upright images.
            frame: (height, width) of the crop in the wanted pixels: its own, or the model's input.

        Returns:
            (B, 4) float64, pixels of the frame.
        """
        scale, shift = self._mapping(image_sizes, frame)
        limit = torch.tensor([*frame, *frame], dtype=torch.float64)
        return torch.clamp(boxes * scale - shift, min=torch.zeros(4).double(), max=limit)

    def boxes_to_image(self, boxes: Tensor, image_sizes: Tensor, frame: Sequence[int]) -> Tensor:
        """The way back: boxes in pixels of the frame, as boxes in pixels of the upright images."""
        scale, shift = self._mapping(image_sizes, frame)
        return (boxes + shift) / scale

    def _mapping(self, image_sizes: Tensor, frame: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, 4) scale and (4,) shift of ``frame box = image box * scale - shift``."""
        unit = torch.tensor(frame, dtype=torch.float64) / torch.tensor(self.size)
        scale = torch.tensor(self.resized) * unit / image_sizes
        return scale.repeat(1, 2), (torch.tensor(self.margins) * unit).repeat(2)


@lru_cache
def _augmentation(name: str, side: int):
    """A function from PIL image to PIL image."""
    fixed = {"none": v2.Identity, "flip": v2.Identity, "autoaugment": v2.AutoAugment}
    if name in fixed:
        return fixed[name]()
    if re.fullmatch(r"rand(-(m|n|mstd|mmax|p|inc)\d+(\.\d+)?)*", name):
        with suppress(ValueError):  # such as n2.5
            color = (124, 116, 104)  # ImageNet's mean fills what turns and shifts leave empty
            options = {"translate_const": int(0.45 * side), "img_mean": color}
            policy = rand_augment_transform(name, options)
            for op in policy.ops:
                op.aug_fn = _posterize if op.aug_fn is posterize else op.aug_fn
            return policy
    raise InputError(
        f"augment is {name!r}; choose none, flip, autoaugment or RandAugment as rand-m9-mstd0.5"
    )


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """With 1 to 8 bits also where timm asks for fewer or more, which Pillow refuses."""
    return ImageOps.posterize(image, min(max(1, bits), 8))


class ImageDataset(Dataset):
    """Images of a table, transformed.

    Items: ``pixels`` (3, Hs, Ws) uint8, ``label``, ``index`` (the row) and ``size`` (2,), height
    and width of the upright image in the file. What is random about it depends on seed, epoch and
    row alone: not on the worker or process that makes it, nor on what was made before. The epoch is
    given with the key, ``dataset[epoch, row]``; a row alone is of epoch 0.

    Args:
        table: a dataset table.
        transform: of the images.
        seed: of what is random.
        keep: decode and resize each image once: the result stays in a temporary file (`Kept`).
    """

    def __init__(
        self, table: pd.DataFrame, transform: ImageTransform, seed: int = 0, keep: bool = False
    ):
        self.paths = table["path"].tolist()
        self.labels = table["label"].tolist()
        self.transform, self.seed = transform, seed
        self.kept = Kept(len(self.paths), transform.resized) if keep else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, row = key if isinstance(key, tuple) else (0, key)
        row = range(len(self))[row]
        image, size = (self.kept and self.kept.read(row)) or self._resize(row)
        seeded = temporary_seed(self.seed, epoch, row)
        with seeded if self.transform.is_random else nullcontext():
            pixels = self.transform.crop(image)
        size = torch.tensor(size)
        return {"pixels": pixels, "label": self.labels[row], "index": row, "size": size}

    def _resize(self, row: int) -> tuple[Image.Image, tuple[int, int]]:
        image, size = _open(self.paths[row], 2 * max(self.transform.resized))
        image = self.transform.resize(image)
        if self.kept:
            self.kept.write(row, image, size)
        return image, size


class Kept:
    """Resized images, and the upright sizes of their files, in a temporary file.

    It has no name, so it is gone with the last process that has it open, however that ends. Loader
    processes share it if they are forks. It takes at most a quarter of the free space: of more
    images, the first ones are kept, and of none where the space ends.

    Args:
        count: of the images.
        size: (H, W) that they are resized to.
    """

    def __init__(self, count: int, size: tuple[int, int]):
        self.size, self.length = size, HEADER.size + 3 * size[0] * size[1]
        self.file = tempfile.TemporaryFile(prefix="ramslib-")
        self.count = min(count, shutil.disk_usage(tempfile.gettempdir()).free // 4 // self.length)

    def read(self, row: int) -> tuple[Image.Image, tuple[int, int]] | None:
        """An image, and its (height, width) in the file; None if it is not here."""
        found = os.pread(self.file.fileno(), self.length, row * self.length)
        if len(found) < self.length or not any(size := HEADER.unpack_from(found)):
            return None
        pixels = memoryview(found)[HEADER.size :]
        return Image.frombuffer("RGB", self.size[::-1], pixels, "raw", "RGB", 0, 1), size

    def write(self, row: int, image: Image.Image, size: tuple[int, int]) -> None:
        """Keep an image; the header, which says that it is complete, comes last."""
        pixels, start = image.tobytes(), row * self.length
        if row < self.count:
            with suppress(OSError):  # no space left
                if os.pwrite(self.file.fileno(), pixels, start + HEADER.size) == len(pixels):
                    os.pwrite(self.file.fileno(), HEADER.pack(*size), start)


@contextmanager
def temporary_seed(*key: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch (CPU) inside, and restore them after."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)
    torch.random.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
