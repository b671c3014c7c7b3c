"""Image files: decoding of untrusted files to 8-bit RGB, and writing of images and grids.

A file is decoded by Pillow, only in formats that run no other program, and only after its header
has been checked. A file with a property that 8-bit RGB cannot represent is refused or converted,
according to `FolderOptions`.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.utils import make_grid

from smalti.config import check_at_least
from smalti.data.latents import to_levels
from smalti.errors import ConfigurationError, DataError
from smalti.files import replacing

# -- Decoding: an image file -> 8-bit RGB ---------------------------------------------------------

# The only formats that are opened, whatever the name of a file is: for others (EPS) Pillow starts
# another program. It decodes these itself, and opens MPO as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True)
class FolderOptions:
    """Which image files are accepted. The defaults refuse files that decoding would change."""

    # 16-bit, CMYK, palette and animated files: refuse them, or convert to 8-bit RGB (first frame).
    unusual_images: Literal["refuse", "convert"] = "refuse"
    # Files that cannot be decoded: stop, leave them out, or replace them by others of their class.
    bad_images: Literal["refuse", "skip", "replace"] = "refuse"
    max_bad_images: int = 100  # how many may be replaced; more stop the run
    single_class: bool = False  # accept a set with one class, or a folder with no sub-folders
    min_side: int = 8  # pixels
    max_pixels: int = 50_000_000  # larger pictures are refused before they are decoded
    # A set of at most this many pictures is decoded once at the start, to check it. In a larger set
    # each picture is checked when it is read; `smalti check-data` finds the bad ones beforehand.
    verify_up_to: int = 200_000

    def __post_init__(self) -> None:
        if self.min_side < 1 or self.max_pixels < 1:
            raise ConfigurationError("min_side and max_pixels must be at least 1")
        check_at_least(0, self, "max_bad_images", "verify_up_to")


class Unusable(Exception):
    """A picture cannot be used; `undecodable` if its file is damaged."""

    def __init__(self, reason: str, *, undecodable: bool = False) -> None:
        super().__init__(reason)
        self.undecodable = undecodable


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture, and the colour mode of its file."""

    image: Image.Image  # RGB, upright
    mode: str  # Pillow's name for the stored colours


def decode(stream: BinaryIO | Path, options: FolderOptions) -> Decoded:
    """The picture in a stream or a file.

    Raises:
        Unusable: the file is damaged, or the options do not accept it; the message has a remedy.
    """
    try:
        with Image.open(stream, formats=FORMATS) as image:
            _check_header(image, options)
            return Decoded(_to_rgb(image), image.mode)
    except (Unusable, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # more pixels than Pillow ever opens
        raise Unusable(f"declares more pixels than are allowed ({error}): remove it") from error
    except Exception as error:  # decoders raise many kinds; each means that the file is damaged
        raise Unusable(
            f"cannot be decoded ({_why(error)}): replace or remove it", undecodable=True
        ) from error


def format_of(content: bytes) -> str | None:
    """The format of an encoded picture by its header: one of `FORMATS` or MPO; None = another."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.format
    except MemoryError:
        raise
    except Exception:  # as in `decode`
        return None


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture in a known format: {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def without_pixel_warning() -> Iterator[None]:
    """Silence Pillow's warning about large pictures, because `max_pixels` limits them.

    Not thread-safe: enter it before threads start.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _check_header(image: Image.Image, options: FolderOptions) -> None:
    width, height = image.size
    if width * height > options.max_pixels:
        raise Unusable(
            f"declares {width} x {height} pixels, more than {options.max_pixels}: shrink it, or"
            " raise --folder.max_pixels"
        )
    if min(width, height) < options.min_side:
        raise Unusable(
            f"is {width} x {height} pixels, less than {options.min_side} on a side: remove it, or"
            " lower --folder.min_side"
        )
    kind = _unusual(image)
    if kind and options.unusual_images == "refuse":
        raise Unusable(f"is {kind}: save it as 8-bit RGB, or pass --folder.unusual_images convert")


# Pillow's names for 16-bit colour in the arguments of a decoder; the mode is "RGB" nonetheless.
_DEEP_COLOUR = re.compile(r"\b(LA?|RGB[AX]?|CMYK);16")


def _unusual(image: Image.Image) -> str | None:
    """The property of a picture that 8-bit RGB cannot keep, or None."""
    if getattr(image, "n_frames", 1) > 1:
        return "animated"
    deep = any(_DEEP_COLOUR.search(str(tile[3])) for tile in getattr(image, "tile", ()))
    if deep or image.mode.startswith(("I", "F")):
        return "16-bit (or deeper)"
    names = {"CMYK": "CMYK", "P": "a palette image", "PA": "a palette image", "LAB": "LAB"}
    if image.mode in names:
        return names[image.mode]
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """First frame, upright, 8 bits, alpha composited on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: 65535 -> 255
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    elif image.mode == "F":
        image = image.point(lambda value: value * 255).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


# -- Writing: images (B, 3, H, W) in [-1, 1] -> 8-bit pictures and files --------------------------


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3): clamped, then rounded.

    Raises:
        DataError: a value is infinite or NaN; it would become an arbitrary level.
    """
    if not images.isfinite().all():
        raise DataError(
            "an image has values that are infinite or NaN, so it is not written: use bfloat16 or "
            "float32 if the model runs in float16, else an earlier checkpoint"
        )
    return to_levels(images).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] -> RGB pictures."""
    return [Image.fromarray(array) for array in to_uint8(images)]


def save_png(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically; missing folders are created."""
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
    """Images (B, 3, H, W) in [-1, 1] in rows of `columns`, on white.

    Args:
        row_labels: one text per row, written at its left.
        column_labels: one text per column, written above it.
        padding: pixels between images, before enlargement.
        scale: side, in pixels, of the square that each pixel becomes.
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
