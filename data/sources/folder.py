"""Pictures in a folder: one sub-folder per class."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image

from smalti.data.image_io import FolderOptions, Unusable, decode, without_pixel_warning
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.errors import SmaltiError

logger = logging.getLogger(__name__)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Pictures too, but of kinds that are not read: passed over, and counted.
PASSED_OVER = {".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".psd", ".svg"} | {
    *(".ppm", ".pgm", ".tga", ".ico", ".exr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
}


@dataclass(frozen=True)
class _Picture:
    """A file and the class that its place gives it."""

    label: str  # name of the class, "" beside the class folders
    path: Path


class FolderPictures(EncodedPictures):
    """root/class/.../picture.png; classes are the sub-folders, sorted by name.

    Raises:
        SmaltiError: no folder, no pictures, or pictures where they belong to no class.
    """

    def __init__(self, root: Path) -> None:
        found = _list_pictures(root)
        self.root, self.title = root, str(root)
        self.paths = [picture.path for picture in found]
        self.classes = tuple(sorted({picture.label for picture in found}))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[picture.label] for picture in found])

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


def read_picture(path: Path, options: FolderOptions) -> Image.Image:
    """One picture by its file, RGB, under the rules that hold for a folder.

    Raises:
        SmaltiError: no such file, or one that cannot be used.
    """
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
        raise SmaltiError(f"the picture {path} {wrong}: check the path")
    try:
        with without_pixel_warning():
            return decode(path, options).image
    except Unusable as problem:
        raise SmaltiError(f"{path} {problem}") from problem


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
