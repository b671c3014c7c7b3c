"""Image files: decoding of untrusted files to 8-bit pictures, and writing of images and grids.

A file is decoded by Pillow, only in formats that run no other program, and only after its length
and its header have been checked. A file with a property that 8-bit RGB cannot represent is refused
or converted, according to `FolderOptions` and, for more than 8 bits per channel, to a range of
values. Metadata never decide whether a picture can be used.
"""

import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, UnidentifiedImageError
from torch import Tensor

from smalti.config import added, check_at_least
from smalti.data.latents import MODES, as_rgb, to_levels
from smalti.data.metadata import orientation_of, reason, tags_exceed, upright, without_metadata
from smalti.data.value_range import (
    MIN_LEVELS,
    Extent,
    Histogram,
    ValueRange,
    remedy,
    to_eight_bits,
    written,
)
from smalti.errors import ConfigurationError, DataError
from smalti.files import replacing

# -- Decoding: an image file -> 8-bit RGB ---------------------------------------------------------

# The only formats that are opened, whatever the name of a file is: for others (EPS) Pillow starts
# another program. It decodes these itself, and opens MPO as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Longer files are refused unread: 16 bytes per allowed pixel are RGBA in 32 bits per channel, and
# the rest is room for metadata.
BYTES_PER_PIXEL, BYTES_OF_METADATA = 16, 64 * 2**20

WHITE = "white"
TRANSPARENT = "transparent"  # instead of the colour of a background: alpha is kept


@dataclass(frozen=True)
class FolderOptions:
    """Which image files are accepted. The defaults refuse files that decoding would change."""

    # Animated files, files of several pages, 16-bit (or deeper) and LAB files: refuse them, or
    # convert to 8-bit RGB (first frame; for deep ones see --value_range).
    unusual_images: Literal["refuse", "convert"] = "refuse"
    # Files that cannot be decoded: stop, leave them out, or replace them by others of their class.
    bad_images: Literal["refuse", "skip", "replace"] = "refuse"
    max_bad_images: int = 100  # how many may be replaced; more stop the run
    single_class: bool = False  # keep the class of a set with one class, instead of leaving it out
    min_side: int = 8  # pixels of the shorter side; smaller pictures are refused
    max_pixels: int = 50_000_000  # larger pictures are refused before they are decoded
    # The colour under transparent pixels: a name, as in white, or #rrggbb. A tokenizer with 4
    # image_channels keeps alpha instead.
    background: str = added(WHITE)
    # A set of at most this many pictures is decoded once at the start, to check it. In a larger set
    # each picture is checked when it is read; `smalti check-data` finds the bad ones beforehand.
    verify_up_to: int = 200_000

    def __post_init__(self) -> None:
        if self.min_side < 1 or self.max_pixels < 1:
            raise ConfigurationError("min_side and max_pixels must be at least 1")
        if not (self.background == TRANSPARENT or _is_colour(self.background)):
            raise ConfigurationError(
                f"background is {self.background!r}; give the name of a colour, as in white, or "
                "#rrggbb, as in #808080"
            )
        check_at_least(0, self, "max_bad_images", "verify_up_to")


def _is_colour(text: str) -> bool:
    """Whether a text names an opaque colour."""
    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False


class Unusable(Exception):
    """A picture cannot be used; `undecodable` if its file is damaged.

    If it is deep (more than 8 bits per channel) and a range of values would make it usable,
    `extent` is known, and the message ends with a remedy for this picture alone; `reason` is the
    message without that.
    """

    def __init__(
        self, reason: str, *, undecodable: bool = False, extent: Extent | None = None
    ) -> None:
        super().__init__(reason if extent is None else f"{reason}: {remedy([extent])}")
        self.reason, self.undecodable, self.extent = reason, undecodable, extent


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture, and what its file is like."""

    image: Image.Image  # RGB, or RGBA where the background is transparent; upright
    mode: str  # Pillow's name for the stored colours
    extent: Extent | None = None  # of the values of a deep picture
    note: str | None = None  # why metadata were ignored


def decode(
    stream: BinaryIO | Path, options: FolderOptions, value_range: ValueRange | None = None
) -> Decoded:
    """The picture in a stream or a file.

    Args:
        value_range: the stored values that become black and white where a channel has more than
            8 bits. None: such pictures are refused, or converted by the full range of their type,
            as `options.unusual_images` says. A range that does not fit the picture is refused.

    Raises:
        Unusable: the file is damaged, or the options do not accept it; the message has a remedy.
    """
    if isinstance(stream, Path):
        try:
            file = stream.open("rb")
        except OSError as error:
            raise Unusable(f"cannot be read ({error}): check the path") from error
        with file:
            return decode(file, options, value_range)
    _allow_pixels(options.max_pixels)
    length = stream.seek(0, os.SEEK_END)
    check_length(length, options)
    _check_tags(stream, length)
    try:
        return _decode(stream, options, value_range)
    except (Unusable, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # more pixels than Pillow ever opens
        number = re.search(r"\d+", str(error))
        declared = f"{number[0]} pixels, more than" if number else "more pixels than"
        raise Unusable(_too_large(declared, options)) from error
    except Exception as error:  # decoders raise many kinds; each means that the file is damaged
        found = _without_metadata(stream, options, value_range)
        if found is None:
            raise Unusable(
                f"cannot be decoded ({_why(error)}): replace or remove it", undecodable=True
            ) from error
        known = not isinstance(error, UnidentifiedImageError)
        why = f" ({_why(error)})" if known else ""
        return replace(found, note=f"its metadata cannot be read{why}")


def _decode(stream: BinaryIO, options: FolderOptions, value_range: ValueRange | None) -> Decoded:
    with Image.open(stream, formats=FORMATS) as image:
        _check_header(image, options)
        extent = None
        mode = image.mode
        if _is_deep(image):
            picture, extent = _from_deep(image, stream, options, value_range)
        else:
            image.load()
            picture = _on_background(image, options.background)
        orientation, note = orientation_of(image)
        return Decoded(upright(picture, orientation), mode, extent, note)


def deep_values(stream: BinaryIO, options: FolderOptions) -> np.ndarray | None:
    """The stored values of a picture with more than 8 bits per channel; None for others, and for
    those that `decode` refuses whatever the range."""
    _allow_pixels(options.max_pixels)
    try:
        length = stream.seek(0, os.SEEK_END)
        check_length(length, options)
        _check_tags(stream, length)
        with Image.open(stream, formats=FORMATS) as image:
            _check_header(image, options)
            if not _is_deep(image) or _has_upper_bits_only(image):
                return None
            values, _ = _deep_values(image, stream)
    except MemoryError:
        raise
    except Exception:  # as in `decode`, which names the reason
        return None
    return values if np.isfinite(values).all() else None


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
    return reason(error)


@contextmanager
def without_pixel_warning() -> Iterator[None]:
    """Silence Pillow's warning about large pictures, because `max_pixels` limits them.

    Not thread-safe: enter it before threads start.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


# -- Budgets and properties, known before the pixels are decoded --


def check_length(length: int, options: FolderOptions) -> None:
    """Raise `Unusable` for a file, `length` bytes long, that no picture of `max_pixels` needs."""
    limit = BYTES_OF_METADATA + BYTES_PER_PIXEL * options.max_pixels
    if length > limit:
        raise Unusable(
            f"is {length} bytes long, more than the {limit} that a picture of "
            f"{options.max_pixels} pixels needs: remove it, or raise --folder.max_pixels"
        )


def _check_tags(stream: BinaryIO, length: int) -> None:
    """Raise `Unusable` for a TIFF whose tags make Pillow copy the same bytes many times."""
    stream.seek(0)
    if tags_exceed(stream, length):
        raise Unusable(
            f"has tags that are longer than its {length} bytes: replace or remove it",
            undecodable=True,
        )
    stream.seek(0)


def _allow_pixels(count: int) -> None:
    """Raise Pillow's own limit for the process if the user allows larger pictures."""
    if Image.MAX_IMAGE_PIXELS is not None and count > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = count


def _too_large(declared: str, options: FolderOptions) -> str:
    return f"declares {declared} {options.max_pixels}: shrink it, or raise --folder.max_pixels"


def _check_header(image: Image.Image, options: FolderOptions) -> None:
    width, height = image.size
    if width * height > options.max_pixels:
        raise Unusable(_too_large(f"{width} x {height} pixels, more than", options))
    if min(width, height) < options.min_side:
        raise Unusable(
            f"is {width} x {height} pixels, less than {options.min_side} on a side: remove it, or"
            " lower --folder.min_side"
        )
    kind = _unusual(image)
    if kind and options.unusual_images == "refuse":
        raise Unusable(f"{kind}: save it as 8-bit RGB, or pass --folder.unusual_images convert")


def _unusual(image: Image.Image) -> str | None:
    """The property of a picture that 8-bit RGB cannot keep, or None."""
    # `is_animated` looks for a second frame; `n_frames` would read the headers of 60,000. The
    # further pictures in a JPEG (MPO) of a phone or a drone are previews and depth or gain maps.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return "has several pages" if image.format == "TIFF" else "is animated"
    return "is LAB" if image.mode == "LAB" else None


def _without_metadata(
    stream: BinaryIO, options: FolderOptions, value_range: ValueRange | None
) -> Decoded | None:
    """The picture in a file that cannot be decoded, if only its metadata are the reason."""
    try:
        stream.seek(0)
        content = stream.read()
    except OSError:
        return None
    for keep_exif in (True, False):
        stripped = without_metadata(content, keep_exif=keep_exif)
        if stripped == content:
            continue
        try:
            return _decode(io.BytesIO(stripped), options, value_range)
        except (Unusable, MemoryError):
            raise
        except Exception:  # as in `decode`
            continue
    return None


# -- Colours: alpha on a background, more than 8 bits per channel by a range of values --


def _on_background(image: Image.Image, background: str) -> Image.Image:
    """An 8-bit picture as RGB on a background; as RGBA where that is transparent."""
    if background == TRANSPARENT:
        return image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """A picture of mode RGB or RGBA in the mode of images of 1, 3 or 4 channels. Grey is Pillow's
    L, the luma 0.299 R + 0.587 G + 0.114 B, which leaves grey pictures as they are."""
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def to_8_bit(image: Image.Image, background: str = WHITE) -> Image.Image:
    """An open picture with 8 bits per channel: upright, as RGB on a background, or as RGBA where
    that is transparent.

    Raises:
        DataError: it has more than 8 bits per channel, so that a range of values is needed.
    """
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f'the picture has the mode "{image.mode}", more than 8 bits per channel: convert it to '
            "RGB first, with the range of values that is black to white"
        )
    orientation, _ = orientation_of(image)
    return upright(_on_background(image, background), orientation)


# Pillow's names for 16-bit colour in the arguments of a decoder; the mode of a picture is "RGB".
_DEEP_COLOUR = re.compile(r"\b(LA?|RGB[AX]?|CMYK);16")
TIFF_BITS, TIFF_SIGNED, SIGNED = 258, 339, 2  # tags, and the value of the second


def _is_deep(image: Image.Image) -> bool:
    """Whether a picture that is not loaded yet has more than 8 bits per channel."""
    return image.mode.startswith(("I", "F")) or _is_deep_colour(image)


def _is_deep_colour(image: Image.Image) -> bool:
    return any(_DEEP_COLOUR.search(str(tile[3])) for tile in getattr(image, "tile", ()))


@cache
def png_decoder() -> Any:
    """torchvision's, which keeps all 16 bits of colours, of which Pillow drops 8; None if there is
    none: torchvision has announced its removal."""
    try:
        from torchvision.io import decode_png  # takes seconds
    except ImportError:
        return None
    return decode_png


def _has_upper_bits_only(image: Image.Image) -> bool:
    """Whether only 8 of the 16 bits of colours can be read."""
    return _is_deep_colour(image) and (image.format != "PNG" or png_decoder() is None)


def _full_range(image: Image.Image) -> ValueRange:
    """The range of the type in which values are stored; for floats, 0 to 1."""
    if image.mode == "F":
        return 0, 1
    tags: Any = getattr(image, "tag_v2", {})
    bits, kind = tags.get(TIFF_BITS, (16,))[0], tags.get(TIFF_SIGNED, (1,))[0]
    return 0, 2 ** (bits - (kind == SIGNED)) - 1


def _from_deep(
    image: Image.Image, stream: BinaryIO, options: FolderOptions, value_range: ValueRange | None
) -> tuple[Image.Image, Extent]:
    """A deep picture as RGB or RGBA, not turned upright, and the extent of its values.

    Raises:
        Unusable: neither `options` nor a range accept it, or the range does not fit.
    """
    full = _full_range(image)
    limits = full if value_range is None else value_range
    if _has_upper_bits_only(image):
        return _from_upper_bits(image, options, value_range)
    values, opacity = _deep_values(image, stream)
    if not np.isfinite(values).all():
        raise Unusable("has values that are not finite: replace or remove it", undecodable=True)
    histogram = Histogram(values)
    extent = histogram.extent_within(limits)
    span = written((extent.low, extent.high)).replace(" ", " to ")
    about = f"is 16-bit (or deeper), with values {span}"
    if value_range is None and options.unusual_images == "refuse":
        raise Unusable(about, extent=extent)
    if problem := histogram.problem(limits):
        raise Unusable(f"{about}, and {problem}", extent=extent)
    levels = to_eight_bits(values, limits)
    picture = Image.fromarray(levels).convert("RGB")
    if options.background == TRANSPARENT:
        picture = picture.convert("RGBA")
        if opacity is not None:
            alpha = np.floor(255 * opacity + 0.5).astype(np.uint8)
            picture.putalpha(Image.fromarray(alpha))
    elif opacity is not None:
        below = np.array(ImageColor.getrgb(options.background), np.float32)
        rgb = below - opacity[..., None] * (below - np.asarray(picture, np.float32))
        picture = Image.fromarray(np.floor(rgb + 0.5).astype(np.uint8))
    return picture, extent


def _deep_values(image: Image.Image, stream: BinaryIO) -> tuple[np.ndarray, np.ndarray | None]:
    """Stored values (H, W) or (H, W, 3), and the opacity (H, W), 0 to 1, where there is one."""
    if _is_deep_colour(image):  # Pillow would drop the lower 8 bits
        stream.seek(0)
        content = torch.frombuffer(bytearray(stream.read()), dtype=torch.uint8)
        planes = png_decoder()(content).permute(1, 2, 0).numpy()
        if planes.shape[2] in (2, 4):
            opacity = planes[..., -1].astype(np.float32) / 65535
            return planes[..., 0] if planes.shape[2] == 2 else planes[..., :-1], opacity
        values = planes
    else:
        values = np.asarray(image)
        values = values.astype(values.dtype.newbyteorder("="))
        if values.dtype == np.int32 and _full_range(image)[1] == 2**32 - 1:
            values = values.view(np.uint32)  # Pillow has no unsigned type of 32 bits
    key = image.info.get("transparency")  # the value, or the colour, that is transparent
    if key is None:
        return values, None
    opaque = values != np.asarray(key, values.dtype)
    return values, (opaque.any(-1) if values.ndim == 3 else opaque).astype(np.float32)


def _from_upper_bits(
    image: Image.Image, options: FolderOptions, value_range: ValueRange | None
) -> tuple[Image.Image, Extent]:
    """16-bit colour, of which Pillow reads the upper 8 bits: right for the full range."""
    about = f"is 16-bit colour in {image.format}, of which the upper 8 bits can be read"
    if value_range is None and options.unusual_images == "refuse":
        raise Unusable(f"{about}: save it as 8-bit RGB, or pass --folder.unusual_images convert")
    image.load()
    rgb = _on_background(image, WHITE)
    histogram = Histogram(np.asarray(rgb))
    if value_range not in (None, _full_range(image)) or len(histogram.values) < MIN_LEVELS:
        raise Unusable(
            f"{about}, with {len(histogram.values)} levels from {histogram.values[0]} to "
            f"{histogram.values[-1]}: save it as 8-bit RGB"
        )
    extent = Histogram(np.asarray(rgb, np.uint16) * 257).extent
    return _on_background(image, options.background), extent


# -- Writing: images (B, C, H, W) in [-1, 1] -> 8-bit pictures and files --------------------------


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C): clamped, then rounded.

    Raises:
        DataError: a value is infinite or NaN.
    """
    _check_finite(images)
    return to_levels(images).byte().permute(0, 2, 3, 1).cpu().numpy()


def _check_finite(images: Tensor) -> None:
    """Raise `DataError` if any of the images (B, C, H, W) has values that are infinite or NaN."""
    bad = (~images.isfinite()).flatten(1).any(1)
    if bad.any():
        raise DataError(
            f"{int(bad.sum())} of {len(images)} images have values that are infinite or NaN, the "
            f"first at position {int(bad.nonzero()[0])}, and are not written: use bfloat16 or "
            "float32 if the model runs in float16, else an earlier checkpoint"
        )


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, C, H, W) in [-1, 1] -> pictures: grey, RGB or RGBA for 1, 3 or 4 channels."""
    return [as_picture(array) for array in to_uint8(images)]


def as_picture(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, C) -> a grey, RGB or RGBA picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


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
    """Images (B, C, H, W) in [-1, 1] in rows of `columns`, as RGB on white.

    Args:
        row_labels: one text per row, written at its left.
        column_labels: one text per column, written above it.
        padding: pixels between images, before enlargement.
        scale: side, in pixels, of the square that each pixel becomes.

    Raises:
        DataError: a value is infinite or NaN.
    """
    from torchvision.utils import make_grid  # takes seconds

    _check_finite(images)
    grid = make_grid(as_rgb(images.clamp(-1, 1)), nrow=columns, padding=padding, pad_value=1.0)
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
