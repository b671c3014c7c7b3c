"""Pictures in a folder: one sub-folder per class.

Everything that can be wrong with a file is found here, in one line that names the file and the
remedy, before any training starts.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from smalti.data.images import ImageSource, fingerprint_of
from smalti.errors import SmaltiError
from smalti.files import sha256_of

logger = logging.getLogger(__name__)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Pictures too, but of kinds that are not read: passed over, and counted.
PASSED_OVER = {".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".psd", ".svg"} | {
    *(".ppm", ".pgm", ".tga", ".ico", ".exr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
}


@dataclass(frozen=True)
class FolderOptions:
    """What a folder may hold. The defaults refuse whatever would change silently."""

    # 16-bit, CMYK, palette and animated files: refuse, or convert to 8-bit RGB (first frame).
    unusual_images: Literal["refuse", "convert"] = "refuse"
    bad_images: Literal["refuse", "skip"] = "refuse"  # files that cannot be decoded
    single_class: bool = False  # accept a folder with one class, or with no sub-folders
    min_side: int = 8  # pixels
    max_pixels: int = 50_000_000  # larger ones are refused undecoded: they may be bombs

    def __post_init__(self) -> None:
        if self.min_side < 1 or self.max_pixels < 1:
            raise SmaltiError("min_side and max_pixels must be at least 1")


@dataclass(frozen=True)
class _Picture:
    """A file and what is known of it."""

    label: str  # name of the class, "" beside the class folders
    path: Path
    sha256: str = ""  # once it is checked


class _Unusable(Exception):
    """Why one file cannot be used, and whether skipping is an option."""

    def __init__(self, reason: str, *, undecodable: bool = False) -> None:
        super().__init__(reason)
        self.undecodable = undecodable


class FolderSource(ImageSource):
    """root/class/.../picture.png; classes are the sub-folders, sorted by name.

    Raises:
        SmaltiError: no folder, no pictures, one class only, or a picture that cannot be used.
    """

    def __init__(self, root: Path, options: FolderOptions) -> None:
        self.root, self.options = root, options
        found = _list_pictures(root)
        self._check_classes(found)
        found = self._usable(found)
        self._check_classes(found)  # a class may have held nothing but bad pictures
        self.classes = tuple(sorted({picture.label for picture in found}))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.paths = [picture.path for picture in found]
        self.labels = torch.tensor([numbers[picture.label] for picture in found])
        self.fingerprint = fingerprint_of(
            [os.fsencode(f"{self.name(i)}/{picture.sha256}") for i, picture in enumerate(found)]
        )

    def name(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()

    def read(self, index: int) -> Image.Image:
        path = self.paths[index]
        try:
            with _open(path) as image:
                return _to_rgb(image)
        except _READ_ERRORS as error:
            raise SmaltiError(
                f"{path} cannot be decoded ({error}): replace or remove it"
            ) from error

    def _check_classes(self, found: list[_Picture]) -> None:
        names = sorted({picture.label for picture in found})
        if len(names) < 2 and not self.options.single_class:
            raise SmaltiError(
                f'{self.root} has one class only ("{names[0] or "no sub-folders"}"): put each class'
                " into its own sub-folder, or pass --folder.single_class"
            )

    def _usable(self, found: list[_Picture]) -> list[_Picture]:
        kept, refused, skipped = [], [], []
        for picture in tqdm(found, desc="check pictures", disable=len(found) < 2000):
            path = picture.path
            try:
                _read_checked(path, self.options)
                kept.append(replace(picture, sha256=sha256_of(path)))
            except _Unusable as problem:
                if problem.undecodable and self.options.bad_images == "skip":
                    skipped.append(f"{path} {problem}")
                else:
                    hint = ", or pass --folder.bad_images skip" if problem.undecodable else ""
                    refused.append(f"{path} {problem}{hint}")
        if refused:
            more = f" (and {len(refused) - 1} more cannot be used)" if len(refused) > 1 else ""
            raise SmaltiError(refused[0] + more)
        for line in skipped:
            logger.warning("skipped: %s", line)
        if skipped:
            logger.warning("skipped %d of %d pictures", len(skipped), len(found))
        if not kept:
            raise SmaltiError(f"{self.root} has no picture that can be used: check --data")
        return kept


def read_picture(path: Path, options: FolderOptions) -> Image.Image:
    """One picture by its file, RGB, under the rules that hold for a folder.

    Raises:
        SmaltiError: no such file, or one that cannot be used.
    """
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
        raise SmaltiError(f"the picture {path} {wrong}: check the path")
    try:
        return _read_checked(path, options)
    except _Unusable as problem:
        raise SmaltiError(f"{path} {problem}") from problem


def _read_checked(path: Path, options: FolderOptions) -> Image.Image:
    """The picture in a file; raise `_Unusable` unless it is one that the options accept."""
    try:
        with _open(path) as image:
            _check_header(image, options)
            return _to_rgb(image)
    except Image.DecompressionBombError as error:  # too many even for Pillow to open
        raise _Unusable(f"claims more pixels than can be trusted: {error}: remove it") from error
    except _READ_ERRORS as error:
        raise _Unusable(
            f"cannot be decoded ({error}): replace or remove it", undecodable=True
        ) from error


def _check_header(image: Image.Image, options: FolderOptions) -> None:
    width, height = image.size
    if width * height > options.max_pixels:
        raise _Unusable(
            f"claims {width} x {height} pixels, more than {options.max_pixels}: shrink it, or"
            " raise --folder.max_pixels"
        )
    if min(width, height) < options.min_side:
        raise _Unusable(
            f"is {width} x {height} pixels, less than {options.min_side} on a side: remove it, or"
            " lower --folder.min_side"
        )
    kind = _unusual(image)
    if kind and options.unusual_images == "refuse":
        raise _Unusable(f"is {kind}: save it as 8-bit RGB, or pass --folder.unusual_images convert")


_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():  # the pixel cap is ours: `max_pixels`
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _list_pictures(root: Path) -> list[_Picture]:
    """Every picture below root, sorted; hidden files are left out."""
    if not root.exists():
        raise SmaltiError(f"the folder {root} does not exist: check --data")
    if not root.is_dir():
        raise SmaltiError(f"{root} is a file: --data takes a folder with a sub-folder per class")
    files = list(_files_below(root, ()))
    _tell_passed_over([path for path in files if path.suffix.lower() in PASSED_OVER])
    found = [
        _Picture(_class_of(path, root), path) for path in files if path.suffix.lower() in EXTENSIONS
    ]
    if not found:
        raise SmaltiError(
            f"{root} holds no pictures ({', '.join(sorted(EXTENSIONS))}): check --data"
        )
    loose = [picture.path for picture in found if not picture.label]
    if loose and len(loose) < len(found):
        raise SmaltiError(f"{loose[0]} lies beside the class folders: move it into one of them")
    if not loose:
        _check_every_folder_counts(root, {picture.path for picture in found})
    return sorted(found, key=lambda picture: os.fsencode(picture.path.relative_to(root)))


def _class_of(path: Path, root: Path) -> str:
    """The name of the sub-folder, "" if there is none; read as UTF-8 whatever the locale is."""
    parts = path.relative_to(root).parts
    if len(parts) == 1:
        return ""
    try:
        return os.fsencode(parts[0]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SmaltiError(
            f"the name of the class folder {parts[0]!a} in {root} is not UTF-8: rename it"
        ) from error


def _tell_passed_over(paths: list[Path]) -> None:
    if paths:
        kinds = ", ".join(sorted({path.suffix.lower() for path in paths}))
        logger.warning(
            "passed over %d files of kinds that are not read (%s): save them as PNG or JPEG",
            len(paths),
            kinds,
        )


def _check_every_folder_counts(root: Path, pictures: set[Path]) -> None:
    """A class without pictures would shift the numbers of the classes after it."""
    classes = {path.relative_to(root).parts[0] for path in pictures}
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in classes:
            raise SmaltiError(f"the class folder {entry} holds no pictures: add some or remove it")


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Every file that is not hidden; links are followed, but not into a folder `above`."""
    here = folder.resolve()
    if here in above:  # a loop of links
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(entry, (*above, here))
        else:
            yield entry


# How Pillow calls 16-bit colour in a decoder's arguments; the mode says "RGB" all the same.
_DEEP_COLOUR = re.compile(r"\b(LA?|RGB[AX]?|CMYK);16")


def _unusual(image: Image.Image) -> str | None:
    """What about a picture could not be kept in 8-bit RGB, or None."""
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
    """First frame, upright, 8 bit, alpha laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: 65535 becomes 255
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    elif image.mode == "F":
        image = image.point(lambda value: value * 255).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")
