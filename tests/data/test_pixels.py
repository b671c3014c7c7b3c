"""Pixel values: what an 8-bit file holds, and back."""

import torch

from smalti.data.latents import rounded, to_float, to_levels


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
