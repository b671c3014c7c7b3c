"""Pictures out: tensors to 8-bit files and grids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid

from smalti.data.pixels import to_levels
from smalti.files import replacing


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3): clamped, then rounded."""
    return to_levels(images).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] -> RGB pictures."""
    return [Image.fromarray(array) for array in to_uint8(images)]


def save_png(path: Path, image: Image.Image) -> None:
    """Write a PNG that is either absent or whole; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def image_grid(
    images: Tensor,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    padding: int = 2,
    scale: int = 1,
) -> Image.Image:
    """Images (B, 3, H, W) in [-1, 1], row by row on white; `scale` enlarges every pixel.

    Args:
        row_labels: one text per row, written at the left.
        column_labels: one text per column, written at the top.
    """
    grid = make_grid(images.clamp(-1, 1), nrow=columns, padding=padding, pad_value=1.0)
    picture = to_pil(grid[None])[0]
    size = (picture.width * scale, picture.height * scale)
    picture = picture.resize(size, resample=Image.Resampling.NEAREST)
    return _with_labels(picture, row_labels, column_labels)


def _with_labels(
    picture: Image.Image, row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    widths = [int(ImageDraw.Draw(picture).textlength(label)) for label in row_labels]
    left, top = 8 + max(widths) if widths else 0, 16 if column_labels else 0
    canvas = Image.new("RGB", (picture.width + left, picture.height + top), "white")
    canvas.paste(picture, (left, top))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels):
        middle = top + round((row + 0.5) * picture.height / len(row_labels))
        draw.text((4, middle), label, fill="black", anchor="lm")
    for column, label in enumerate(column_labels):
        middle = left + round((column + 0.5) * picture.width / len(column_labels))
        draw.text((middle, top // 2), label, fill="black", anchor="mm")
    return canvas
