"""Pictures in a folder: one sub-folder per class.

Everything that can be wrong with a file is found here, in one line that names the file and the
remedy, before any training starts.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from smalti.data.images import ImageSource, fingerprint_of
from smalti.errors import SmaltiError

logger = logging.getLogger(__name__)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


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
        self.classes = tuple(sorted({name for name, _ in found}))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.paths = [path for _, path in found]
        self.labels = torch.tensor([numbers[name] for name, _ in found])
        sizes = [path.stat().st_size for path in self.paths]
        self.fingerprint = fingerprint_of(
            [os.fsencode(f"{self.name(index)}/{size}") for index, size in enumerate(sizes)]
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

    def _check_classes(self, found: list[tuple[str, Path]]) -> None:
        names = sorted({name for name, _ in found})
        if len(names) < 2 and not self.options.single_class:
            raise SmaltiError(
                f'{self.root} has one class only ("{names[0] or "no sub-folders"}"): put each class'
                " into its own sub-folder, or pass --folder.single_class"
            )

    def _usable(self, found: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
        kept, refused, skipped = [], [], []
        for name, path in tqdm(found, desc="check pictures", disable=len(found) < 2000):
            try:
                self._check(path)
                kept.append((name, path))
            except _Unusable as problem:
                skip = problem.undecodable and self.options.bad_images == "skip"
                (skipped if skip else refused).append(f"{path} {problem}")
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

    def _check(self, path: Path) -> None:
        """Raise `_Unusable` unless the file is a picture this set accepts; decodes it once."""
        try:
            with _open(path) as image:
                self._check_header(image)
                _to_rgb(image)
        except Image.DecompressionBombError as error:  # too many even for Pillow to open
            raise _Unusable(
                f"claims more pixels than can be trusted: {error}: remove it"
            ) from error
        except _READ_ERRORS as error:
            raise _Unusable(
                f"cannot be decoded ({error}): replace or remove it, or pass --folder.bad_images"
                " skip",
                undecodable=True,
            ) from error

    def _check_header(self, image: Image.Image) -> None:
        width, height = image.size
        if width * height > self.options.max_pixels:
            raise _Unusable(
                f"claims {width} x {height} pixels, more than {self.options.max_pixels}: shrink it,"
                " or raise --folder.max_pixels"
            )
        if min(width, height) < self.options.min_side:
            raise _Unusable(
                f"is {width} x {height} pixels, less than {self.options.min_side} on a side: remove"
                " it, or lower --folder.min_side"
            )
        kind = _unusual(image)
        if kind and self.options.unusual_images == "refuse":
            raise _Unusable(
                f"is {kind}: save it as 8-bit RGB, or pass --folder.unusual_images convert"
            )


_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():  # the pixel cap is ours: `max_pixels`
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _list_pictures(root: Path) -> list[tuple[str, Path]]:
    """(class name, path) of every picture below root, sorted; hidden files are left out."""
    if not root.exists():
        raise SmaltiError(f"the folder {root} does not exist: check --data")
    if not root.is_dir():
        raise SmaltiError(f"{root} is a file: --data takes a folder with a sub-folder per class")
    found = []
    for path in _files_below(root, ()):
        if path.suffix.lower() in EXTENSIONS:
            parts = path.relative_to(root).parts
            found.append((parts[0] if len(parts) > 1 else "", path))
    if not found:
        raise SmaltiError(
            f"{root} holds no pictures ({', '.join(sorted(EXTENSIONS))}): check --data"
        )
    loose = [path for name, path in found if not name]
    if loose and len(loose) < len(found):
        raise SmaltiError(f"{loose[0]} lies beside the class folders: move it into one of them")
    if not loose:
        _check_every_folder_counts(root, {name for name, _ in found})
    return sorted(found, key=lambda item: str(item[1].relative_to(root)))


def _check_every_folder_counts(root: Path, classes: set[str]) -> None:
    """A class without pictures would shift the numbers of the classes after it."""
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
