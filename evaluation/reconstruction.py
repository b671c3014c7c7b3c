"""How close a reconstruction is to its original (PSNR, SSIM), and how much of a codebook is used.

torchmetrics computes PSNR and SSIM. Ours are the rounding to 8 bits, a value for each image, and
the crop of SSIM to the positions where its window lies inside the image, as published; torchmetrics
would also average over the reflected border.
"""

import torch
from torch import Tensor

from smalti.data.latents import to_levels
from smalti.errors import DataError

# torchmetrics is imported inside the functions: importing it takes several seconds, which would
# delay the start of training.

# -------------------------------------------------------------------------------------------------
# PSNR and SSIM

DATA_RANGE = 255.0  # of 8-bit values
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Gaussian window in pixels


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,): 10 log10(255^2 / mean squared error).

    Args:
        images, reference: (B, 3, H, W) in [-1, 1]; both are rounded to 8 bits first. Equal
            images give infinity.

    Raises:
        DataError: the shapes differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_shapes(images, reference)
    return peak_signal_noise_ratio(
        to_levels(images),
        to_levels(reference),
        data_range=DATA_RANGE,
        reduction="none",
        dim=(1, 2, 3),
    )


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004, eq. 13), (B,), 1 for equal images.

    Gaussian window 11 x 11, sigma 1.5, data range 255, mean over channels and over the positions
    where the window fits. Images as in `psnr`.

    Raises:
        DataError: the shapes differ, or the images are smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_shapes(images, reference)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise DataError(
            f"the images have {images.shape[-2]} x {images.shape[-1]} pixels; SSIM needs at least "
            f"{SSIM_WINDOW} x {SSIM_WINDOW}: evaluate a tokenizer with larger images"
        )
    # float64: variances are small differences of squares up to 255^2, float32 loses 3e-4 of SSIM
    _, at_each_position = structural_similarity_index_measure(
        to_levels(images).double(),
        to_levels(reference).double(),
        sigma=SSIM_SIGMA,  # torchmetrics makes the window 2 round(3.5 sigma) + 1 = 11 px wide
        data_range=DATA_RANGE,
        reduction="none",
        return_full_image=True,
    )  # (B, C, H, W)
    margin = SSIM_WINDOW // 2
    inside = at_each_position[..., margin:-margin, margin:-margin]
    return inside.mean((1, 2, 3)).float()


def known_psnr(images: Tensor, reference: Tensor, known: Tensor) -> Tensor:
    """`psnr` over some pixels of each image, (B,); NaN where there are none.

    Args:
        known: (B, 1, H, W) bool, true at the pixels that count.
    """
    _check_shapes(images, reference)
    errors = (to_levels(images) - to_levels(reference)).square().mean(1, keepdim=True)
    mean = (errors * known).sum((1, 2, 3)) / known.sum((1, 2, 3))
    return 10 * (DATA_RANGE**2 / mean).log10()


def _check_shapes(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise DataError(
            f"images have shape {tuple(images.shape)}, the reference {tuple(reference.shape)}: "
            "give two equal shapes (B, C, H, W)"
        )


# -------------------------------------------------------------------------------------------------
# Codebook usage and perplexity. Count over a complete set: a small sample underestimates usage.


def code_counts(codes: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs, (V,) int64, in codes of any shape.

    Raises:
        DataError: no codes, or one outside [0, vocab_size).
    """
    if not codes.numel():
        raise DataError("there are no codes to count: encode at least one image")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"codes range from {low} to {high}; a codebook of {vocab_size} ends "
            f"at {vocab_size - 1}: give the vocab_size of the tokenizer that made the codes"
        )
    return torch.bincount(codes.flatten(), minlength=vocab_size)


def usage(counts: Tensor) -> float:
    """Share of the codes that occur at least once, in [0, 1]."""
    return (counts > 0).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """exp(entropy of the code frequencies), in [1, V]: V if all are equally frequent."""
    frequencies = counts.double() / counts.sum()
    return torch.exp(torch.special.entr(frequencies).sum()).item()
