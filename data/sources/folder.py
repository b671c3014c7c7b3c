"""Pictures in a folder: one sub-folder per class."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from smalti.data.classes import named_classes
from smalti.data.image_io import FolderOptions, Unusable, decode, without_pixel_warning
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.data.value_range import ValueRange
from smalti.errors import DataError

logger = logging.getLogger(__name__)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Pictures in formats that are not read: ignored, counted and named.
IGNORED = {".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".psd", ".svg"} | {
    *(".ppm", ".pgm", ".tga", ".ico", ".exr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
}


@dataclass(frozen=True)
class _Picture:
    """A file and its class."""

    label: str  # name of the class folder, "" outside of one
    path: Path


class FolderPictures(EncodedPictures):
    """root/class/.../picture.png; classes are the sub-folders, sorted by name.

    Raises:
        DataError: no such folder, no pictures, or pictures outside the class folders.
    """

    def __init__(self, root: Path) -> None:
        found = _list_pictures(root)
        self.root, self.title = root, str(root)
        self.paths = [picture.path for picture in found]
        self.classes, self.labels = named_classes([picture.label for picture in found], root)

    def open(self, index: int) -> BinaryIO:
        return self.paths[index].open("rb")

    def size(self, index: int) -> int:
        return self.paths[index].stat().st_size

    def name(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()

    def place(self, index: int) -> str:
        return str(self.paths[index])


def open_folder(spec: str, options: SourceOptions) -> FolderPictures:
    """A folder with a sub-folder of pictures per class."""
    return FolderPictures(Path(spec).expanduser())


def read_picture(
    path: Path, options: FolderOptions, value_range: ValueRange | None = None
) -> Image.Image:
    """One picture file, RGB, under the same rules as those of a folder.

    Raises:
        DataError: no such file, or one that cannot be used.
    """
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"the picture {path} {wrong}: check the path")
    try:
        with without_pixel_warning():
            found = decode(path, options, value_range)
    except Unusable as problem:
        raise DataError(f"{path} {problem}") from problem
    if found.note:
        logger.warning("%s: %s", path, found.note)
    return found.image


def _list_pictures(root: Path) -> list[_Picture]:
    """Every picture below root, sorted, without hidden files."""
    if not root.exists():
        raise DataError(f"the folder {root} does not exist: check --data")
    if not root.is_dir():
        raise DataError(f"{root} is a file: --data takes a folder with a sub-folder per class")
    files = list(_files_below(root, ()))
    _warn_of_ignored([path for path in files if path.suffix.lower() in IGNORED])
    found = [
        _Picture(_class_of(path, root), path) for path in files if path.suffix.lower() in EXTENSIONS
    ]
    if not found:
        raise DataError(f"{root} holds no pictures ({', '.join(sorted(EXTENSIONS))}): check --data")
    loose = [picture.path for picture in found if not picture.label]
    if loose and len(loose) < len(found):
        raise DataError(f"{loose[0]} is outside the class folders: move it into one of them")
    if not loose:
        _refuse_empty_classes(root, {picture.path for picture in found})
    return sorted(found, key=lambda picture: os.fsencode(picture.path.relative_to(root)))


def _class_of(path: Path, root: Path) -> str:
    """The name of the sub-folder, "" if there is none; UTF-8 in any locale."""
    parts = path.relative_to(root).parts
    if len(parts) == 1:
        return ""
    try:
        return os.fsencode(parts[0]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the name of the class folder {parts[0]!a} in {root} is not UTF-8: rename it"
        ) from error


def _warn_of_ignored(paths: list[Path]) -> None:
    if paths:
        kinds = ", ".join(sorted({path.suffix.lower() for path in paths}))
        logger.warning(
            "ignored %d files in formats that are not read (%s): save them as PNG or JPEG",
            len(paths),
            kinds,
        )


def _refuse_empty_classes(root: Path, pictures: set[Path]) -> None:
    """Raise for a class folder without pictures: ignored, it would renumber later classes."""
    classes = {path.relative_to(root).parts[0] for path in pictures}
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in classes:
            raise DataError(f"the class folder {entry} holds no pictures: add some or remove it")


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Every file that is not hidden; links are followed, except to one of the folders `above`."""
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
