"""Several views of one picture, to encode each of them once: mirrored, and cut at five places.

The ten crops are LlamaGen's (2406.06525): a picture squared to 1.1 times the size, its centre and
four corners, and the same places of its mirror image.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

ViewSet = Literal["identity", "flip", "ten-crop"]

PLACES = ("centre", "top-left", "top-right", "bottom-left", "bottom-right")
MIRRORED = "-mirrored"
# The first view of each set is the plainest: evaluation looks at it alone.
VIEW_SETS: dict[ViewSet, tuple[str, ...]] = {
    "identity": ("identity",),
    "flip": ("identity", "flip"),
    "ten-crop": (*PLACES, *(place + MIRRORED for place in PLACES)),
}
ENLARGED = 1.1  # side of the picture that crops are cut from / side of a crop


def decoded_size(views: ViewSet, size: int) -> int:
    """Side of the pictures, in pixels, that views of size x size pixels are made from."""
    return int(size * ENLARGED) if views == "ten-crop" else size


def views_of(images: Tensor, names: Sequence[str], size: int) -> Iterator[Tensor]:
    """Each of the named views in turn; a mirrored place is that place of the mirror image.

    Args:
        images: (B, 3, S, S), where S = `decoded_size` of the set that the names are from.

    Yields:
        (B, 3, size, size).
    """
    for name in names:
        place = name.removesuffix(MIRRORED)
        picture = images.flip(-1) if name in ("flip", place + MIRRORED) else images
        yield crop(picture, place, size) if place in PLACES else picture


def crop(images: Tensor, place: str, size: int) -> Tensor:
    """The square of size x size pixels at one of `PLACES`: (B, 3, H, W) -> (B, 3, size, size)."""
    height, width = images.shape[-2:]
    top, left = height - size, width - size  # of the square at the bottom right
    if place == "centre":
        top, left = round(top / 2), round(left / 2)
    else:
        top, left = top * place.startswith("bottom"), left * place.endswith("right")
    return images[..., top : top + size, left : left + size]
