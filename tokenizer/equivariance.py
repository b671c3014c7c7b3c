"""Equivariance regularisation (EQ-VAE, 2502.09509): turning or shrinking the latents should turn
or shrink the picture. The decoder is asked for tau(image) from tau(latents)."""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SIDE = 32  # pixels


def transformed(z: Tensor, images: Tensor, turn: float, size: float) -> tuple[Tensor, Tensor]:
    """The same quarter turns and scaling of latents (B, C, h, w) and images (B, 3, H, W).

    The scale takes the latent grid to h', 1/4 h or more, and the image to h' H / h, 32 px or more:
    smaller ones LPIPS cannot judge.

    Args:
        turn: in [0, 1): from no quarter turn to three.
        size: in [0, 1): from the smallest h' to h.
    """
    turns = int(4 * turn)
    height, width = z.shape[2:]
    factor = images.shape[2] // height
    least = min(height, max(height // 4, -(-MIN_SIDE // factor), 1))
    rows = least + int((height + 1 - least) * size)
    columns = max(1, round(rows * width / height))
    z = torch.rot90(resized(z, rows, columns), turns, (2, 3))
    images = torch.rot90(resized(images, rows * factor, columns * factor), turns, (2, 3))
    return z, images


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, C, H, W) shrunk to (height, width) with antialiasing."""
    if maps.shape[2:] == (height, width):
        return maps
    size = (height, width)
    return F.interpolate(maps.float(), size, mode="bicubic", antialias=True).to(maps.dtype)
