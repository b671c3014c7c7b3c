"""Latents cut into square patches, one token each in raster order, and put together again."""

import torch.nn.functional as F
from torch import Tensor, nn


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, rows * p, columns * p) -> (B, N, C * p * p), channels first in each patch."""
    cut = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, token_grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, N, p * p * C), channels last in each patch -> (B, C, rows * p, columns * p)."""
    patches = patches.unflatten(-1, (patch_size, patch_size, -1)).unflatten(1, token_grid)
    pixels = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
    return pixels.flatten(4, 5).flatten(2, 3)


class PatchEmbedder(nn.Module):
    """A linear map of each patch, its weights those of a convolution as in the published files."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, N, width)
        weight, bias = self.proj.weight, self.proj.bias
        patches = patchify(x.to(weight.dtype), self.patch_size)
        return F.linear(patches, weight.flatten(1), bias).to(weight.dtype)  # autocast: fp32 again
