"""Metadata of image files: they may turn a picture upright, and cannot make it unusable.

EXIF, text, colour profiles and times come from many programs, and are often damaged or huge where
the picture is not.
"""

import io
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

EMPTY_EXIF = 14  # bytes of EXIF without a tag: its header and an empty list of tags
# EXIF orientation -> what turns the stored picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(image: Image.Image) -> tuple[int, str | None]:
    """EXIF orientation of a loaded picture, 1 to 8, and why metadata were ignored, None if not."""
    content = b""
    try:
        content = _exif_of(image)
        if tags_exceed(io.BytesIO(content), len(content)):
            return 1, "the tags of its EXIF are longer than itself"
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception as error:
        return 1, f"its EXIF cannot be read ({reason(error)})"
    if not exif and len(content) > EMPTY_EXIF:
        return 1, "its EXIF cannot be read"  # Pillow says nothing of a damaged header
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        return 1, f"its EXIF orientation is {orientation!r:.20}"
    if orientation == 1:
        return 1, None
    try:
        exif.tobytes()  # reads all tags
    except MemoryError:
        raise
    except Exception as error:
        return orientation, f"a tag of its EXIF cannot be read ({reason(error)})"
    return orientation, None


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    """A picture turned as its EXIF orientation, 1 to 8, says."""
    method = _TURNS.get(orientation)
    return picture if method is None else picture.transpose(method)


def _exif_of(image: Image.Image) -> bytes:
    """The EXIF data that Pillow parses, b"" if there are none."""
    content = image.info.get("exif", b"")
    profile = image.info.get("Raw profile type exif")  # text in a PNG
    if not content and profile:
        content = bytes.fromhex("".join(profile.split("\n")[3:]))
    return content.removeprefix(b"Exif\0\0")


def reason(error: Exception) -> str:
    """What a decoder says of a failure, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def without_metadata(content: bytes, *, keep_exif: bool) -> bytes:
    """A PNG or a JPEG without its metadata; any other file as it is."""
    if content.startswith(b"\x89PNG"):
        return _strip_png(content, keep_exif)
    if content.startswith(b"\xff\xd8\xff"):
        return _strip_jpeg(content, keep_exif)
    return content


# Chunks of a PNG that are not critical by name and yet belong to the picture.
PNG_PICTURE = (b"tRNS", b"acTL", b"fcTL", b"fdAT")


def _strip_png(content: bytes, keep_exif: bool) -> bytes:
    """A PNG without its metadata: text, colour profile, times, ..."""
    kept, start = [content[:8]], 8
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        name = content[start + 4 : start + 8]
        critical = not name[0] & 0x20  # a capital letter
        if critical or name in PNG_PICTURE or (keep_exif and name == b"eXIf"):
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def _strip_jpeg(content: bytes, keep_exif: bool) -> bytes:
    """A JPEG without its metadata: application segments but Adobe's colour transform, comments."""
    kept, start = [content[:2]], 2
    while start + 4 <= len(content) and content[start] == 0xFF:
        marker = content[start + 1]
        if marker == 0xDA or marker < 0xC0:  # the first scan, or no marker of a header
            break
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        metadata = marker == 0xFE or (0xE1 <= marker <= 0xEF and marker != 0xEE)
        exif = content[start + 4 : start + 8] == b"Exif"
        if not metadata or (keep_exif and exif):
            kept.append(content[start:end])
        start = end
    return b"".join([*kept, content[start:]])


# -- Tags of a TIFF or of EXIF data ---------------------------------------------------------------

# Bytes of a value by the number of its type; Pillow ignores values of other types.
TYPE_BYTES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 0, 0])
DIRECTORIES = (0x8769, 0x8825, 0xA005)  # tags that lead to more: EXIF, GPS, interoperability


def tags_exceed(stream: BinaryIO, length: int) -> bool:
    """Whether the values of the tags of a TIFF, `length` bytes long, are longer than it by far.

    Values may overlap, and Pillow keeps a copy of each: 65,535 tags can name the same megabyte.
    Only the first directory and those it leads to are read; False if this is not a TIFF.
    """
    head = stream.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return False
    big = head[2:4] in (b"+\0", b"\0+")
    wide = np.dtype(order + ("u8" if big else "u4"))
    number = np.dtype(order + ("u8" if big else "u2"))
    entry = np.dtype([("tag", f"{order}u2"), ("type", f"{order}u2"), ("size", wide), ("at", wide)])
    start = 8 if big else 4
    offsets = [int(np.frombuffer(head[start : start + wide.itemsize], wide)[0])]
    total = 0.0
    for _ in range(1 + len(DIRECTORIES)):
        if not offsets:
            break
        entries = _entries(stream, length, offsets.pop(0), number, entry)
        types = np.minimum(entries["type"], len(TYPE_BYTES) - 1)
        sizes = TYPE_BYTES[types] * entries["size"].astype(np.float64)
        in_file = (length - entries["at"].astype(np.float64)).clip(0)
        total += float(np.minimum(sizes, in_file).sum())
        offsets += entries["at"][np.isin(entries["tag"], DIRECTORIES)].tolist()
    return total > 2 * length + 2**20


def _entries(
    stream: BinaryIO, length: int, offset: int, number: np.dtype, entry: np.dtype
) -> np.ndarray:
    """The entries of a directory, as far as they are in the file of `length` bytes."""
    try:
        stream.seek(offset)
        count = int(np.frombuffer(stream.read(number.itemsize), number)[0])
        content = stream.read(min(count * entry.itemsize, length))
    except (ValueError, IndexError, OverflowError, OSError):
        return np.zeros(0, entry)
    return np.frombuffer(content[: len(content) // entry.itemsize * entry.itemsize], entry)
