"""Every kind of image file, the transform against torchvision, boxes and seeded randomness."""

import errno
import os
import random
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageDraw, ImageFile, ImageOps, features
from tiny import tiny_config
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from ramslib.data.annotations import image_size
from ramslib.data.datasets import PHOTO_SUFFIXES
from ramslib.data.transforms import (
    ImageDataset,
    ImageTransform,
    open_image,
    temporary_seed,
)
from ramslib.distributed import load_batches
from ramslib.errors import InputError
from ramslib.model import build_model

ORIENTATION = 0x0112


def picture(width=40, height=30, seed=0):
    """A smooth color picture without symmetry."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def message(call):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def difference(first, second):
    first, second = (np.asarray(image, dtype=int) for image in (first, second))
    assert first.shape == second.shape
    return np.abs(first - second).max()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_modes_show_the_same_picture(tmp_path, mode):
    gray = mode in ("1", "L", "LA")
    original = picture().convert(mode if mode != "P" else "RGB")
    if mode == "P":
        original = original.quantize(16)
    path = tmp_path / ("file.tif" if mode in ("CMYK", "YCbCr") else "file.png")
    original.save(path)
    found = open_image(path)
    assert found.mode == "RGB" and found.size == (40, 30)
    expected = original.convert("L").convert("RGB") if gray else original.convert("RGB")
    assert difference(found, expected) == 0


KINDS = {
    "mpo": "MPO",
    "jpe": "JPEG",
    "jfif": "JPEG",
    "jpg": "JPEG",
    "tif": "TIFF",
    "jp2": "JPEG2000",
}
KINDS |= {suffix: suffix.upper() for suffix in ("jpeg", "webp", "bmp", "gif", "png", "ppm", "tiff")}
KINDS |= {"avif": "AVIF"} if features.check("avif") else {}


@pytest.mark.parametrize("suffix", KINDS)
def test_formats(tmp_path, suffix):
    picture().save(tmp_path / f"file.{suffix}", format=KINDS[suffix])
    assert difference(open_image(tmp_path / f"file.{suffix}"), picture()) < 90
    assert f".{suffix}" in PHOTO_SUFFIXES


def test_no_other_reader_is_tried_whatever_the_content(tmp_path, monkeypatch):
    """Some of Pillow's readers start other programs: none is called but those that are listed."""
    called = []
    monkeypatch.setitem(Image.OPEN, "STAND-IN", (called.append, lambda prefix: True))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "STAND-IN"])
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", called.append)
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "other.jpg").write_bytes(b"of no known format")
    for file in tmp_path.iterdir():
        for call in (open_image, image_size):
            assert f"{file}: not an image" in message(lambda call=call, file=file: call(file))
    assert called == []


def test_images_are_opened_in_one_place():
    root = Path(__file__).parents[1]
    files = [*root.glob("ramslib/**/*.py"), *root.glob("notebooks/*.ipynb")]
    assert [f.name for f in files if "Image.open(" in f.read_text()] == ["annotations.py"]


def test_jpeg_in_cmyk_and_grey(tmp_path):
    picture().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    picture().convert("L").save(tmp_path / "gray.jpg", quality=100)
    assert difference(open_image(tmp_path / "cmyk.jpg"), picture()) < 30
    expected = picture().convert("L").convert("RGB")
    assert difference(open_image(tmp_path / "gray.jpg"), expected) < 8


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_range(tmp_path, suffix):
    values = np.linspace(0, 65535, 30 * 40).astype(np.uint16).reshape(30, 40)
    Image.fromarray(values).save(tmp_path / f"file.{suffix}")
    found = np.asarray(open_image(tmp_path / f"file.{suffix}"))
    assert (found == (values // 256)[..., None]).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 15])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_bits_of_a_camera_in_sixteen_are_scaled_by_those_in_use(tmp_path, suffix, bits):
    values = np.linspace(0, 2**bits - 1, 30 * 40).astype(np.uint16).reshape(30, 40)
    Image.fromarray(values).save(tmp_path / f"file.{suffix}")
    found = np.asarray(open_image(tmp_path / f"file.{suffix}"))
    assert found.max() == 255 and (found == (values >> (bits - 8))[..., None]).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_other_numbers_are_stretched(tmp_path, kind):
    values = np.linspace(-500, 70_000, 30 * 40).astype(kind).reshape(30, 40)
    Image.fromarray(values).save(tmp_path / "file.tif")
    found = np.asarray(open_image(tmp_path / "file.tif"))
    assert found.min() == 0 and found.max() == 255 and (np.diff(found[..., 0].ravel()) >= 0).all()
    Image.fromarray(np.full((3, 4), np.nan, np.float32)).save(tmp_path / "file.tif")
    assert np.asarray(open_image(tmp_path / "file.tif")).max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_lies_over_white(tmp_path, mode):
    path = tmp_path / "file.png"
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        image.putpixel((0, 0), (0, 0, 0, 255))
        image.convert(mode).save(path)
    else:
        image = Image.new("L", (4, 4), 1)
        image.putpixel((0, 0), 0)
        if mode == "P":
            image = image.convert("P")
            image.putpalette([0, 0, 0, 9, 9, 9])
        image = image.convert("RGB") if mode == "RGB" else image
        image.save(path, transparency=(1, 1, 1) if mode == "RGB" else 1)
    found = np.asarray(open_image(path))
    assert (found[0, 0] == 0).all() and (found[1:] == 255).all()


UPRIGHT = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, suffix, orientation):
    """The stored pixels are the upright picture, turned back from what the tag asks for."""
    stored = picture()
    for turn in UPRIGHT[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"file.{suffix}"
    stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {"quality": 100}))
    assert image_size(path) == (30, 40)
    assert difference(open_image(path), picture()) <= (40 if suffix == "jpg" else 0)


def test_damaged_exif_is_ignored(tmp_path):
    picture().save(tmp_path / "file.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert open_image(tmp_path / "file.jpg").size == (40, 30)
    assert image_size(tmp_path / "file.jpg") == (30, 40)


def test_one_pixel(tmp_path):
    Image.new("L", (1, 1), 77).save(tmp_path / "file.png")
    transform = ImageTransform((6, 9))(open_image(tmp_path / "file.png"))
    assert transform.shape == (3, 6, 9) and (transform == 77).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"file.{suffix}"
    picture(200, 200).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert message(lambda: open_image(path)).startswith(f"{path}: ")


def test_not_an_image(tmp_path):
    (tmp_path / "text.jpg").write_text("not a photo\n")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("text.jpg", "empty.jpg"):
        found = message(lambda name=name: open_image(tmp_path / name))
        assert f"{tmp_path / name}: not an image; replace it by" in found
    assert "folder.jpg: " in message(lambda: open_image(tmp_path / "folder.jpg"))
    assert "none.jpg: cannot be read (No such file" in message(
        lambda: open_image(tmp_path / "none.jpg")
    )
    assert "none.jpg: cannot be read (No such file" in message(
        lambda: image_size(tmp_path / "none.jpg")
    )


def heic(path):
    """How a HEIC file begins."""
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    return path


def test_heic_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    for name in ("photo.heic", "phone.jpg"):
        found = message(lambda name=name: open_image(heic(tmp_path / name)))
        assert f"{tmp_path / name}: a HEIC image; install the package pillow-heif" in found


def test_heic_is_opened_where_the_package_is_installed(tmp_path, monkeypatch):
    """A stand-in for the package registers a reader, as its function does."""

    class Reader(ImageFile.ImageFile):
        def _open(self):
            self._mode, self._size, self.tile = "RGB", (4, 3), []
            self.im = Image.new("RGB", (4, 3), "red").im

    stand_in = types.SimpleNamespace(
        register_heif_opener=lambda: Image.register_open("HEIF", Reader)
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    assert open_image(heic(tmp_path / "photo.heic")).getpixel((0, 0)) == (255, 0, 0)


def bmp_header(width, height):
    """The header of a 24-bit BMP file, without its pixels."""
    words = [40, width, height, 1 | 24 << 16, 0, 0, 0, 0, 0, 0]
    body = b"".join(word.to_bytes(4, "little") for word in words)
    return b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + body


@pytest.mark.filterwarnings("error")
def test_too_many_pixels(tmp_path):
    (tmp_path / "bomb.bmp").write_bytes(bmp_header(20_000, 20_000))
    assert "bomb.bmp: " in (text := message(lambda: open_image(tmp_path / "bomb.bmp")))
    assert "400000000 pixels" in text and "at most 178,956,970 pixels" in text
    (tmp_path / "large.bmp").write_bytes(bmp_header(10_000, 10_000))
    assert image_size(tmp_path / "large.bmp") == (10_000, 10_000)


def test_large_jpeg_is_decoded_smaller_only_where_that_will_do(tmp_path, monkeypatch):
    path = tmp_path / "file.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(800, 400).save(path, exif=exif, quality=95)
    assert open_image(path).size == (400, 800)
    assert open_image(path, at_least=201).size == (400, 800)
    assert open_image(path, at_least=200).size == (200, 400)
    assert open_image(path, at_least=50).size == (50, 100)
    table = pd.DataFrame({"path": [str(path)], "label": [0]})
    item = ImageDataset(table, ImageTransform((20, 30)))[0]
    assert item["size"].tolist() == [800, 400]
    seen = []
    keep = lambda self, image: seen.append(image.size) or image  # noqa: E731
    monkeypatch.setattr(ImageTransform, "resize", keep)
    ImageDataset(table, ImageTransform((40, 50), 1.0))[0]
    assert seen == [(100, 200)]
    monkeypatch.undo()
    whole = ImageTransform((20, 30))(open_image(path))
    assert (item["pixels"].int() - whole.int()).abs().max() <= 6


# ---------------------------------------------------------------- the transform


def test_center_crop_is_torchvisions(tmp_path):
    reference = v2.Compose(
        [
            v2.Resize((80, 100), interpolation=v2.InterpolationMode.BILINEAR),
            v2.CenterCrop((60, 75)),
            v2.PILToTensor(),
        ]
    )
    image = picture(123, 77)
    assert torch.equal(ImageTransform((60, 75), crop_fraction=0.75)(image), reference(image))


def test_papers_sizes():
    assert ImageTransform(448, 448 / 600).resized == (600, 600)
    assert ImageTransform(224, 0.5).resized == (448, 448)
    assert ImageTransform(304, 304 / 400).resized == (400, 400)


def test_training_takes_a_crop_maybe_flipped_of_the_resized_image():
    image, transform = picture(90, 70), ImageTransform(24, 0.5, augment="flip")
    resized = image.resize((48, 48), Image.Resampling.BILINEAR)
    pictures = [np.asarray(resized), np.asarray(ImageOps.mirror(resized))]
    windows = {
        np.ascontiguousarray(array[top : top + 24, left : left + 24]).tobytes(): (flip, top, left)
        for flip, array in enumerate(pictures)
        for top in range(25)
        for left in range(25)
    }
    with temporary_seed(0):
        seen = [windows[transform(image).permute(1, 2, 0).numpy().tobytes()] for _ in range(400)]
    flips, tops, lefts = map(np.array, zip(*seen, strict=True))
    assert 150 < flips.sum() < 250
    assert set(tops) == set(lefts) == set(range(25))


def test_no_augmentation_is_the_center_crop():
    image, transform = picture(), ImageTransform(16)
    top, left = transform.margins
    resized = image.resize(transform.resized[::-1], Image.Resampling.BILINEAR)
    center = np.asarray(resized.crop((left, top, left + 16, top + 16)))
    assert (transform(image).permute(1, 2, 0).numpy() == center).all() and not transform.is_random


@pytest.mark.parametrize("augment", ["autoaugment", "rand", "rand-m9-mstd0.5", "rand-n3-m7-inc1"])
def test_augmentations_change_pixels_and_keep_the_shape(augment):
    image = picture(90, 70)
    crops = {}
    for name in ("flip", augment):
        transform = ImageTransform(24, augment=name)
        for seed in range(8):
            with temporary_seed(seed):
                crops[name, seed] = transform(image)
    assert all(crop.shape == (3, 24, 24) and crop.dtype == torch.uint8 for crop in crops.values())
    same = [torch.equal(crops["flip", seed], crops[augment, seed]) for seed in range(8)]
    assert sum(same) < 5


@pytest.mark.parametrize("augment", ["rand-n9-m2", "rand-n9-m10-inc1", "rand-n9-m30-mmax30"])
def test_posterizing_keeps_1_to_8_bits(augment):
    transform = ImageTransform(24, augment=augment)
    for seed in range(20):
        with temporary_seed(seed):
            assert transform(picture()).shape == (3, 24, 24)


@pytest.mark.parametrize("augment", ["", "flips", "rand-x3", "rand-n2.5", "rand-", "augmix"])
def test_unknown_augmentation(augment):
    found = message(lambda: ImageTransform(24, augment=augment))
    assert f"augment is {augment!r}; choose none, flip, autoaugment" in found


@pytest.mark.parametrize("size,fraction", [(0, 1.0), ((3, 4, 5), 1.0), (8, 0.0), (8, 1.5)])
def test_impossible_sizes(size, fraction):
    assert "crop_fraction" in message(lambda: ImageTransform(size, fraction))


def drawn_box(box, size=(150, 200)):
    """A white box on black."""
    image = Image.new("L", size[::-1])
    top, left, bottom, right = box
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return image.convert("RGB")


def located(crop):
    """The box where a crop is brighter than half."""
    bright = crop[0] > 127
    rows, columns = bright.any(dim=1).nonzero()[:, 0], bright.any(dim=0).nonzero()[:, 0]
    return [int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1]


@pytest.mark.parametrize("box", [(40, 60, 90, 150), (0, 0, 80, 50), (100, 10, 150, 200)])
@pytest.mark.parametrize("size,fraction", [((120, 96), 0.8), ((300, 420), 0.75), (75, 1.0)])
def test_boxes_are_where_the_crop_shows_them(box, size, fraction):
    transform = ImageTransform(size, fraction)
    sizes = torch.tensor([[150, 200]])
    expected = transform.boxes_to_input(torch.tensor([box]), sizes, transform.size)[0]
    found = torch.tensor(located(transform(drawn_box(box))))
    assert (found - expected).abs().max() <= 0.51


def test_boxes_in_another_frame_and_nan():
    transform = ImageTransform((100, 200), 0.8)
    boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0], [torch.nan] * 4])
    sizes = torch.tensor([[80, 120], [50, 60]])
    found = transform.boxes_to_input(boxes, sizes, transform.size)
    half = transform.boxes_to_input(boxes, sizes, (50, 50))
    assert torch.allclose(half[0], found[0] * torch.tensor([0.5, 0.25, 0.5, 0.25]).double())
    assert found[1].isnan().all()


@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.floats(0.3, 1),
    st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_boxes_go_there_and_back(image_size, size, fraction, box):
    transform, frame = ImageTransform(size, fraction), (56, 70)
    boxes = torch.tensor([box], dtype=torch.float64) * torch.tensor([*frame, *frame])
    sizes = torch.tensor([image_size])
    there = transform.boxes_to_image(boxes, sizes, frame)
    assert torch.allclose(transform.boxes_to_input(there, sizes, frame), boxes)
    assert (there >= 0).all() and (there <= torch.tensor([*image_size, *image_size])).all()


# ---------------------------------------------------------------- randomness


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{row}.png" for row in range(6)]
    for row, path in enumerate(paths):
        picture(50 + row, 40, seed=row).save(path)
    return pd.DataFrame({"path": list(map(str, paths)), "label": [0, 1, 2, 0, 1, 2]})


def pixels_of(batches):
    return torch.cat([batch["pixels"] for batch in batches])


@pytest.mark.parametrize("augment", ["flip", "autoaugment", "rand-m9-mstd0.5"])
def test_random_crops_do_not_depend_on_workers(table, augment):
    dataset = ImageDataset(table, ImageTransform(16, 0.6, augment=augment), seed=3)
    alone = pixels_of(DataLoader(dataset, batch_size=2))
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert torch.equal(pixels_of(DataLoader(dataset, batch_size=3, num_workers=2)), alone)
    order = [4, 2, 5]
    assert torch.equal(pixels_of(DataLoader(dataset, sampler=order)), alone[order])


def test_epochs_and_seeds_differ_and_repeat(table):
    transform = ImageTransform(16, 0.6, augment="flip")
    dataset = ImageDataset(table, transform, seed=3)
    first = pixels_of(DataLoader(dataset))
    second = pixels_of(DataLoader(dataset, sampler=[(1, row) for row in range(len(dataset))]))
    other = pixels_of(DataLoader(ImageDataset(table, transform, seed=4)))
    for epoch in (second, other):
        assert sum(torch.equal(a, b) for a, b in zip(first, epoch, strict=True)) < 3
    keys = [[(0, 0), (1, 1)], [(1, 2), (0, 3)]]
    mixed = pixels_of(DataLoader(dataset, batch_sampler=keys))
    assert torch.equal(mixed, torch.stack([first[0], second[1], second[2], first[3]]))


@pytest.fixture
def lost(table, tmp_path):
    """The same images, in files that can be removed."""
    paths = [shutil.copy(path, tmp_path) for path in table["path"]]
    return table.assign(path=paths)


@pytest.mark.parametrize("augment", ["flip", "autoaugment"])
@pytest.mark.parametrize("workers", [0, 2])
def test_kept_images_are_the_same_without_their_files(table, lost, augment, workers):
    transform = ImageTransform((16, 20), 0.6, augment=augment)
    plain = ImageDataset(table, transform, seed=3)
    kept = ImageDataset(lost, transform, seed=3, keep=True)
    for epoch in range(3):
        keys = {"sampler": [(epoch, row) for row in range(6)], "batch_size": 2}
        batches = list(load_batches(kept, workers, **keys))
        assert torch.equal(pixels_of(batches), pixels_of(DataLoader(plain, **keys)))
        assert torch.cat([batch["size"] for batch in batches])[:, 1].tolist() == [*range(50, 56)]
        for path in lost["path"]:
            Path(path).unlink(missing_ok=True)


def test_of_more_images_than_fit_the_first_ones_are_kept(table, lost, monkeypatch):
    usage = types.SimpleNamespace(free=4 * 2 * (8 + 3 * 16 * 16) + 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    kept = ImageDataset(lost, ImageTransform(16, 1), keep=True)
    first = [kept[row]["pixels"] for row in range(6)]
    for path in lost["path"]:
        Path(path).unlink()
    assert all(torch.equal(kept[row]["pixels"], first[row]) for row in (0, 1))
    for row in range(2, 6):
        assert f"{row}.png" in message(lambda row=row: kept[row])


@pytest.mark.parametrize("end", ["error", "short"])
def test_where_the_space_ends_images_are_decoded_again(table, monkeypatch, end):
    def write(file, data, start):
        if end == "error":
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[:9], start)

    pwrite, plain = os.pwrite, ImageDataset(table, ImageTransform(16))
    kept = ImageDataset(table, ImageTransform(16), keep=True)
    kept[0]
    monkeypatch.setattr(os, "pwrite", write)
    for row in (1, 0, 1, 5):
        assert torch.equal(kept[row]["pixels"], plain[row]["pixels"])
    assert [kept.kept.read(row) is None for row in range(6)] == [False] + [True] * 5


def test_rows_differ_even_of_one_image(table):
    twelve = pd.concat([table.iloc[:1]] * 12)
    found = pixels_of(DataLoader(ImageDataset(twelve, ImageTransform(16, 0.6, augment="flip"))))
    assert len({pixels.numpy().tobytes() for pixels in found}) > 6


@pytest.mark.parametrize("augment", ["flip", "autoaugment", "rand-m9-mstd0.5"])
def test_global_generators_are_left_alone(table, augment):
    dataset = ImageDataset(table, ImageTransform(16, 0.6, augment=augment))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    [dataset[row] for row in range(len(dataset))]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states
    with pytest.raises(KeyError), temporary_seed(1):
        torch.rand(3)
        raise KeyError
    assert torch.get_rng_state().tolist() == states[2]


def test_item(table):
    dataset = ImageDataset(table, ImageTransform(16))
    item = dataset[4]
    assert item["pixels"].shape == (3, 16, 16) and item["pixels"].dtype == torch.uint8
    assert (item["label"], item["index"], item["size"].tolist()) == (1, 4, [40, 54])
    assert dataset[-1]["index"] == 5 and len(dataset) == 6
    with pytest.raises(IndexError):
        dataset[6]
    batch = next(iter(DataLoader(dataset, batch_size=6)))
    assert batch["label"].tolist() == table["label"].tolist() and batch["size"].shape == (6, 2)


def test_broken_image_is_named_by_the_loader(table, tmp_path):
    (tmp_path / "broken.jpg").write_text("text")
    broken = pd.concat([table, pd.DataFrame({"path": [str(tmp_path / "broken.jpg")], "label": 0})])
    dataset = ImageDataset(broken, ImageTransform(16))
    with pytest.raises(InputError, match=r"broken\.jpg: not an image"):
        list(DataLoader(dataset, num_workers=0))


# ---------------------------------------------------------------- on the device


@pytest.fixture
def model():
    return build_model(tiny_config(".", image_size=(32, 48)), 3)


def test_the_model_shrinks_as_torchvision_with_antialiasing(model):
    pixels = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    images, high_res = model.preprocess(pixels)
    normalize = v2.Normalize(model.mean.flatten().tolist(), model.std.flatten().tolist())
    as_float = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    resized = v2.functional.resize(as_float, [32, 48], antialias=True)
    assert torch.allclose(images, normalize(resized), atol=1e-5)
    assert torch.allclose(high_res, normalize(as_float), atol=1e-6)
    assert pixels.dtype == torch.uint8


def test_the_model_keeps_no_larger_pixels_of_its_own_size(model):
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    images, high_res = model.preprocess(pixels)
    wanted = (pixels / 255 - model.mean) / model.std
    assert high_res is None and torch.allclose(images, wanted, atol=1e-6)
