"""How close a reconstruction is: PSNR and SSIM, per picture, on 8-bit values."""

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.data.latents import to_levels
from smalti.errors import SmaltiError

# -------------------------------------------------------------------------------------------------
# How much of a codebook is used. Count over a whole set: a window flatters or slanders.


def code_counts(codes: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs, (V,) int64, in codes of any shape.

    Raises:
        SmaltiError: no codes, or one outside [0, vocab_size).
    """
    if not codes.numel():
        raise SmaltiError("there are no codes to count: encode at least one picture")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= vocab_size:
        raise SmaltiError(
            f"codes range from {low} to {high}; a codebook of {vocab_size} ends "
            f"at {vocab_size - 1}: count them with the tokenizer that made them"
        )
    return torch.bincount(codes.flatten(), minlength=vocab_size)


def usage(counts: Tensor) -> float:
    """Share of the codes that occur at least once, in [0, 1]."""
    return (counts > 0).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """exp(entropy of the code frequencies), in [1, V]: V if all are equally frequent."""
    frequencies = counts.double() / counts.sum()
    return torch.exp(torch.special.entr(frequencies).sum()).item()


# -------------------------------------------------------------------------------------------------
# How close a reconstruction is: PSNR and SSIM, per picture, on 8-bit values.

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, as published


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,): 10 log10(255^2 / mean squared error).

    Args:
        images, reference: (B, 3, H, W) in [-1, 1]; both are rounded to 8 bits first. Equal
            pictures give infinity.
    """
    _check(images, reference)
    error = (to_levels(images) - to_levels(reference)).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004, eq. 13), (B,), 1 for equal pictures.

    Gaussian window 11 x 11, sigma 1.5, data range 255, mean over channels and over the positions
    where the window fits.

    Raises:
        SmaltiError: shapes differ, or the pictures are smaller than the window.
    """
    _check(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        raise SmaltiError(f"SSIM needs at least {WINDOW} x {WINDOW} pixels")
    x, y = to_levels(images), to_levels(reference)
    moments = [_blur(m) for m in (x, y, x * x, y * y, x * y)]
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments
    variance_x, variance_y = mean_xx - mean_x**2, mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Local means under the Gaussian window, (B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, device=x.device) - (WINDOW - 1) / 2
    kernel = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    x = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def _check(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise SmaltiError(
            f"images have shape {tuple(images.shape)}, the reference {tuple(reference.shape)}: "
            "give two equal shapes (B, C, H, W)"
        )
