"""Random crops as in guided diffusion, and all colour modes of files."""

import io
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.data.dataset import ImageDataset
from smalti.data.image_io import FolderOptions, decode
from smalti.data.sources.base import open_source
from smalti.data.transforms import (
    CENTRE,
    CROPS,
    CropUniforms,
    RandomCrop,
    center_crop,
    crop_uniforms,
    decoded_size,
    random_crop,
    views_of,
)
from smalti.errors import SmaltiError


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(101, 67), (67, 101), (64, 64), (33, 200), (20, 17)])
def test_a_random_crop_is_that_of_guided_diffusion(size: tuple[int, int]) -> None:
    """A plain re-implementation with the same random numbers."""
    rng = random.Random(0)
    image, side, limits = noise(*size), 16, RandomCrop(0.6, 0.9)
    for _ in range(20):
        uniforms = CropUniforms(rng.random(), rng.random(), rng.random())
        low, high = math.ceil(side / 0.9), math.ceil(side / 0.6)  # 18 and 27
        shorter = low + math.floor(uniforms.scale * (high + 1 - low))
        step = image
        while min(step.size) >= 2 * shorter:
            step = step.resize((step.width // 2, step.height // 2), Image.Resampling.BOX)
        scale = shorter / min(step.size)
        target = (round(step.width * scale), round(step.height * scale))
        pixels = np.asarray(step.resize(target, Image.Resampling.BICUBIC))
        top = math.floor(uniforms.top * (pixels.shape[0] - side + 1))
        left = math.floor(uniforms.left * (pixels.shape[1] - side + 1))
        expected = pixels[top : top + side, left : left + side]
        assert np.array_equal(np.asarray(random_crop(image, side, limits, uniforms)), expected)


def test_every_position_is_reached_and_none_outside() -> None:
    """In a picture whose pixels encode their position."""
    places = np.arange(20 * 20, dtype=np.uint16).reshape(20, 20)
    pixels = np.stack([places % 256, places // 256, places * 0], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels)
    corners = Counter()
    for index in range(4000):
        crop = np.asarray(random_crop(image, 16, RandomCrop(0.8, 0.8), crop_uniforms(0, 0, index)))
        assert crop.shape == (16, 16, 3)
        corners[int(crop[0, 0, 0]) + 256 * int(crop[0, 0, 1])] += 1
    assert sorted(corners) == sorted(20 * top + left for top in range(5) for left in range(5))
    assert min(corners.values()) > 100  # 160 on average


def test_the_random_numbers_of_crops_are_uniform_and_pure() -> None:
    uniforms = [crop_uniforms(0, epoch, index) for epoch in range(10) for index in range(200)]
    assert uniforms == [
        crop_uniforms(0, epoch, index) for epoch in range(10) for index in range(200)
    ]
    assert crop_uniforms(1, 0, 0) != uniforms[0] != uniforms[1] != uniforms[200]
    numbers = np.array([[one.scale, one.top, one.left] for one in uniforms])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 0.07


def test_a_full_crop_at_the_centre_is_the_centre_crop() -> None:
    image = noise(50, 30)
    crop = random_crop(image, 16, RandomCrop(1.0, 1.0), CropUniforms(0.3, 0.0, 0.49))
    assert np.array_equal(np.asarray(crop), np.asarray(center_crop(image, 16)))


def test_impossible_crops_are_refused() -> None:
    for fractions in ((0.0, 1.0), (0.9, 0.8), (0.5, 1.1), (float("nan"), 1.0)):
        with pytest.raises(SmaltiError, match="fractions"):
            RandomCrop(*fractions)


def test_crops_depend_on_seed_epoch_and_index_alone(pictures: Path) -> None:
    source = open_source(str(pictures))
    images = ImageDataset(source, 16, crop=RandomCrop(0.5, 1.0), flip=True)
    keys = [(epoch, index) for epoch in range(3) for index in range(4)]
    together = images.__getitems__(keys).images
    alone = torch.cat([images.__getitems__([key]).images for key in reversed(keys)]).flip(0)
    assert torch.equal(together, alone)
    assert len({image.numpy().tobytes() for image in together}) == len(keys)
    other = ImageDataset(source, 16, crop=RandomCrop(0.5, 1.0), flip=True, seed=1)
    assert not torch.equal(other.__getitems__(keys).images, together)
    plain = ImageDataset(source, 16)
    assert torch.equal(images.all_images(), plain.all_images())  # never of what is measured
    assert images.fingerprint == plain.fingerprint


# -- colours ----------------------------------------------------------------------------------

CONVERT = FolderOptions(unusual_images="convert")
RED = (200, 40, 10)


def stored(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


def flat(mode: str, colour) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (stored(flat("L", 90)), (90, 90, 90)),
        (stored(flat("1", 1)), (255, 255, 255)),
        (stored(flat("LA", (90, 255))), (90, 90, 90)),
        (stored(flat("LA", (90, 0))), (255, 255, 255)),
        (stored(flat("RGBA", (*RED, 255))), RED),
        (stored(flat("RGBA", (0, 0, 0, 128))), (127, 127, 127)),
        (stored(flat("RGB", RED).convert("P", palette=Image.Palette.ADAPTIVE)), RED),
        (stored(flat("RGB", RED).convert("CMYK"), "TIFF"), RED),
        (stored(Image.fromarray(np.full((16, 16), 0, np.uint16))), (0, 0, 0)),
        (stored(Image.fromarray(np.full((16, 16), 65535, np.uint16))), (255, 255, 255)),
        (stored(Image.fromarray(np.full((16, 16), 128 * 257, np.uint16))), (128, 128, 128)),
        (stored(Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF"), (128, 128, 128)),
    ],
)
def test_every_colour_mode_becomes_rgb(stream: io.BytesIO, expected: tuple[int, ...]) -> None:
    found = decode(stream, CONVERT)
    assert found.image.mode == "RGB"
    assert found.image.getpixel((3, 3)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_rotated_by_their_exif_orientation(orientation: int) -> None:
    """A white corner is where a viewer shows it, in each orientation of the camera."""
    upright = Image.new("L", (24, 16))
    upright.paste(255, (0, 0, 8, 8))
    undo = {  # from upright to how a camera stores it
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    kept = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(stored(kept, "JPEG", exif=exif, quality=95), FolderOptions()).image
    assert found.size == (24, 16)
    pixels = np.asarray(found)[..., 0]
    assert pixels[:7, :7].min() > 200 and pixels[9:, :].max() < 50 and pixels[:, 10:].max() < 50


# -- rectangles -------------------------------------------------------------------------------


def test_a_rectangle_is_the_centre_of_the_smallest_picture_that_covers_it() -> None:
    image = noise(120, 60)
    half = image.resize((60, 30), Image.Resampling.BOX)
    for size, box in (((20, 60), (0, 5, 60, 25)), ((30, 40), (10, 0, 50, 30))):
        assert np.array_equal(np.asarray(center_crop(image, size)), np.asarray(half.crop(box)))
    enlarged = image.resize((180, 90), Image.Resampling.BICUBIC).crop((0, 10, 180, 80))
    assert np.array_equal(np.asarray(center_crop(image, (70, 180))), np.asarray(enlarged))


@pytest.mark.parametrize("size", [(101, 67), (67, 101), (33, 200)])
def test_a_square_may_be_given_as_height_and_width(size: tuple[int, int]) -> None:
    image, limits = noise(*size), RandomCrop(0.6, 0.9)
    uniforms = CropUniforms(0.3, 0.7, 0.1)
    assert np.array_equal(center_crop(image, 24), center_crop(image, (24, 24)))
    square = random_crop(image, 24, limits, uniforms)
    assert np.array_equal(square, random_crop(image, (24, 24), limits, uniforms))


def test_random_rectangles_reach_every_corner() -> None:
    image, whole = noise(48, 32), RandomCrop(1.0, 1.0)
    for top, left in ((0.0, 0.0), (0.999, 0.999), (0.0, 0.999)):
        crop = random_crop(image, (16, 40), whole, CropUniforms(0.5, top, left))
        scaled = image.resize((40, 27), Image.Resampling.BICUBIC)
        y = 11 if top else 0
        assert np.array_equal(np.asarray(crop), np.asarray(scaled)[y : y + 16])
    small = random_crop(noise(90, 90), (16, 40), RandomCrop(0.5, 0.5), CropUniforms(0.1, 0.2, 0.3))
    assert small.size == (40, 16)


def test_an_extreme_picture_is_cut_in_proportion_to_the_rectangle() -> None:
    """Its size stays bounded, and a picture like the rectangle loses nothing."""
    assert center_crop(noise(5000, 1), (8, 64)).size == (64, 8)
    assert center_crop(noise(1, 5000), (8, 256)).size == (256, 8)
    wide = noise(640, 20)  # as wide as the rectangle
    assert np.array_equal(
        np.asarray(center_crop(wide, (10, 320))),
        np.asarray(wide.resize((320, 10), Image.Resampling.BOX)),
    )


def test_ten_crops_of_a_rectangle() -> None:
    assert decoded_size("ten-crop", (20, 30)) == (22, 33) and decoded_size("flip", 16) == 16
    images = torch.arange(2 * 22 * 33).view(1, 2, 22, 33)
    views = dict(zip(CROPS, views_of(images, CROPS, (20, 30)), strict=True))
    assert torch.equal(views["top-left"], images[..., :20, :30])
    assert torch.equal(views["bottom-right"], images[..., 2:, 3:])
    assert views[CENTRE].shape == (1, 2, 20, 30)
