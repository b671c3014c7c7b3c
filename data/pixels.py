"""What the numbers of a picture mean: float in [-1, 1] within smalti, 0 to 255 in a file."""

from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """Values of an 8-bit file in [0, 255], of any type -> float in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> float, the values 0 to 255 that an 8-bit file would hold."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def rounded(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> the same, as an 8-bit file would give them back."""
    return to_float(to_levels(images))
