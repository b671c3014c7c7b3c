"""Pixel values: what an 8-bit file holds, and back."""

import numpy as np
import torch
from PIL import Image

from smalti.data.image_io import to_pil
from smalti.data.latents import MODES, as_rgb, rgb_views, rounded, to_float, to_levels
from smalti.data.transforms import to_tensor


def test_every_level_of_a_file_survives_a_round_trip() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    images = to_float(stored)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(to_levels(images), stored.float())
    assert torch.equal(rounded(images), images)


def test_values_are_rounded_and_clamped_to_levels() -> None:
    assert to_levels(torch.tensor([-3.0, 1.5, 0.4 / 127.5 - 1])).tolist() == [0, 255, 0]
    images = torch.linspace(-1.2, 1.2, 1001)
    assert (rounded(images) - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(rounded(rounded(images)), rounded(images))


def test_images_of_other_channels_are_shown_as_rgb() -> None:
    grey, rgb = torch.rand(2, 1, 4, 5) * 2 - 1, torch.rand(2, 3, 4, 5) * 2 - 1
    assert torch.equal(as_rgb(grey), grey.repeat(1, 3, 1, 1)) and as_rgb(rgb) is rgb
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    canvas = Image.new("RGBA", (9, 8), "white")
    canvas.alpha_composite(Image.fromarray(pixels))
    shown = to_levels(as_rgb(to_float(to_tensor(Image.fromarray(pixels)))[None]))[0]
    expected = to_tensor(canvas.convert("RGB")).float()
    assert (shown - expected).abs().max() <= 1  # Pillow rounds in integers


def test_two_backgrounds_determine_alpha_and_one_does_not() -> None:
    white = torch.ones(1, 4, 3, 3)
    clear = white.clone()
    clear[:, 3] = -1
    assert torch.equal(as_rgb(white), as_rgb(clear))
    black, on_white = rgb_views(clear)
    assert black.eq(-1).all() and on_white.eq(1).all()
    images = torch.rand(2, 4, 5, 5) * 2 - 1
    black, on_white = rgb_views(images).split(2)
    assert torch.allclose(1 - (on_white - black).mean(1) / 2, (images[:, 3] + 1) / 2, atol=1e-6)


def test_pictures_of_every_mode_are_written_and_read_back() -> None:
    for channels, mode in MODES.items():
        pixels = torch.randint(256, (2, channels, 6, 7), dtype=torch.uint8)
        if channels == 4:
            pixels[:, 3].clamp_(min=1)
        pictures = to_pil(to_float(pixels))
        assert [(picture.mode, picture.size) for picture in pictures] == [(mode, (7, 6))] * 2
        assert torch.equal(torch.stack([to_tensor(picture) for picture in pictures]), pixels)


def test_the_colour_of_what_is_fully_transparent_is_white() -> None:
    pixels = np.full((4, 4, 4), 90, np.uint8)
    pixels[:2, :, 3] = 0
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor[:3, :2].eq(255).all() and tensor[3, :2].eq(0).all() and tensor[:, 2:].eq(90).all()
