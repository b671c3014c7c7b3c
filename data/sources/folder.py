"""Pictures in a folder: one sub-folder per class, or split folders that contain these."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image

from smalti.config import nearest
from smalti.data.classes import named_classes, normal_form
from smalti.data.image_io import FolderOptions, Unusable, decode, without_pixel_warning
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.data.sources.listing import (
    EXTENSIONS,
    PassedOver,
    files_below,
    is_picture,
    kind_of,
    open_file,
)
from smalti.data.value_range import ValueRange
from smalti.errors import DataError

logger = logging.getLogger(__name__)

# Pictures in formats that are not read: passed over, counted and named.
IGNORED = {".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".psd", ".svg"} | {
    *(".ppm", ".pgm", ".tga", ".ico", ".exr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
}
# Files that other sources read: the kind -> what to pass as --data; {folder} contains the file.
OTHER_SOURCES = {
    ".parquet": "hf:{root}",
    ".arrow": "hf:{root}",
    ".tar": "{folder}/*.tar",
    ".npz": "{file}",
    ".npy": "{file}",
}
# Names of folders that are splits, as `datasets` knows them.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class _Picture:
    """A file and its class."""

    label: str  # name of the class folder, "" outside of one
    path: Path


class FolderPictures(EncodedPictures):
    """root/class/.../picture.png; classes are the sub-folders, sorted by name.

    If all sub-folders with pictures have the names of splits, they are splits, and the classes are
    the folders below them: root/train/class/.../picture.png. The pictures of "train" are then for
    training, and those of "validation", or else of "test", are held out.

    Args:
        split: divide this split instead of "train"; nothing else is read.
        heldout_split: hold out this split.

    Raises:
        DataError: no such folder or split, no pictures, or pictures outside the class folders.
    """

    def __init__(self, root: Path, split: str = "", heldout_split: str = "") -> None:
        passed = PassedOver()
        files = _list_pictures(root, passed)
        splits = _splits_of(root, files)
        if not splits and (split or heldout_split):
            raise DataError(
                f"{root} has no split folders (such as train and val): leave out --hf.split and "
                "--hf.heldout_split"
            )
        if splits:
            kept, rest, remark = _choose_splits(root, splits, split, heldout_split)
            found = [picture for part in (kept, rest) for picture in part]
            self.heldout = torch.arange(len(found)) >= len(kept) if rest else None
            self.remarks += (remark,)
        else:
            found = _labelled(root, files)
        self.remarks += _remarks_on(root, passed)
        for remark in self.remarks:
            logger.warning(remark)
        self.root, self.title = root, str(root)
        self.paths = [picture.path for picture in found]
        self.classes, self.labels = named_classes([picture.label for picture in found], root)

    def open(self, index: int) -> BinaryIO:
        return open_file(self.paths[index])

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


# -- Files, and the classes that their folders are ------------------------------------------------


def _list_pictures(root: Path, passed: PassedOver) -> list[Path]:
    """Every picture below root, sorted; all other files are counted in `passed`."""
    if not root.exists():
        raise DataError(f"the folder {root} does not exist: check --data")
    if not root.is_dir():
        raise DataError(f"{root} is a file: --data takes a folder with a sub-folder per class")
    found = []
    for path in files_below(root, passed):
        if is_picture(path):
            found.append(path)
        else:
            passed.add(kind_of(path.name), path.relative_to(root).as_posix())
    if not found:
        raise DataError(_no_pictures(root, passed))
    return sorted(found, key=lambda path: os.fsencode(path.relative_to(root)))


def _no_pictures(root: Path, passed: PassedOver) -> str:
    """Why a folder without pictures is refused, with the source that reads its other files."""
    for kind in filter(passed.counts.__contains__, OTHER_SOURCES):
        file = root / passed.first[kind]
        data = OTHER_SOURCES[kind].format(root=root, folder=file.parent, file=file)
        return f"{root} holds no pictures, but {passed}: pass --data '{data}'"
    holds = f" but {passed}" if passed.total else ""
    return f"{root} holds no pictures ({', '.join(sorted(EXTENSIONS))}){holds}: check --data"


def _remarks_on(root: Path, passed: PassedOver) -> tuple[str, ...]:
    """The remark on the files that are not read."""
    if not passed.total:
        return ()
    unread = ", ".join(sorted(IGNORED & passed.counts.keys()))
    hint = f"; save {unread} as PNG or JPEG" if unread else ""
    return (f"ignored {passed.total} files in {root} that are not pictures: {passed}{hint}",)


def _labelled(base: Path, files: Iterable[Path]) -> list[_Picture]:
    """Picture files with their classes, the sub-folders of `base`."""
    found = [_Picture(_class_of(path, base), path) for path in files]
    loose = [picture.path for picture in found if not picture.label]
    if loose and len(loose) < len(found):
        raise DataError(f"{loose[0]} is outside the class folders: move it into one of them")
    if not loose:
        _refuse_empty_folders(base, "class", {picture.path for picture in found})
    return found


def _class_of(path: Path, base: Path) -> str:
    """The name of the sub-folder, "" if there is none; UTF-8 in any locale."""
    parts = path.relative_to(base).parts
    if len(parts) == 1:
        return ""
    try:
        return os.fsencode(parts[0]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the name of the class folder {parts[0]!a} in {base} is not UTF-8: rename it"
        ) from error


def _refuse_empty_folders(base: Path, what: str, pictures: set[Path]) -> None:
    """Raise for a class folder without pictures, which would renumber later classes, or a split
    folder without any."""
    known = {path.relative_to(base).parts[0] for path in pictures}
    for entry in sorted(base.iterdir()):
        counts = what == "class" or split_called(entry.name)
        if entry.is_dir() and not entry.name.startswith(".") and counts and entry.name not in known:
            raise DataError(f"the {what} folder {entry} holds no pictures: add some or remove it")


# -- Split folders --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """A split folder and the picture files in it."""

    folder: Path
    files: list[Path]

    @property
    def has_classes(self) -> bool:
        return any(path.parent != self.folder for path in self.files)


def split_called(name: str) -> str | None:
    """The split that a name means: "train", "validation" or "test"."""
    return next((s for s, names in SPLIT_FOLDERS.items() if name.casefold() in names), None)


def _splits_of(root: Path, files: list[Path]) -> dict[str, _Split]:
    """The splits, if all folders with pictures are splits; else nothing."""
    folders: dict[str, list[Path]] = {}
    for path in files:
        folders.setdefault(path.relative_to(root).parts[0], []).append(path)
    splits: dict[str, _Split] = {}
    for name, paths in folders.items():
        split, folder = split_called(name), root / name
        if split is None or not folder.is_dir():
            return {}
        if split in splits:
            raise DataError(f"{splits[split].folder} and {folder} are both {split}: merge them")
        splits[split] = _Split(folder, paths)
    _refuse_empty_folders(root, "split", set(files))
    return splits


def _choose_splits(
    root: Path, splits: Mapping[str, _Split], split: str, heldout_split: str
) -> tuple[list[_Picture], list[_Picture], str]:
    """The pictures to train on, those to hold out, and a remark that says which they are."""
    named = [split_called(name) or name for name in (split, heldout_split)]
    for name in filter(None, named):
        if name not in splits:
            raise DataError(f'{root} has no split "{name}"; {nearest(name, splits)}')
    chosen = named[0] or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        first = next(iter(splits.values())).folder
        raise DataError(
            f"the folders of {root} are the splits {', '.join(splits)}, and none is for training: "
            f"name the one to read (--data '{first}'), or rename them if they are classes"
        )
    others = () if split else ("validation", "test")
    alike = [s for s in others if s in splits and s != chosen]
    alike = [s for s in alike if splits[s].has_classes == splits[chosen].has_classes]
    held = named[1] or next(iter(alike), "")
    if held == chosen:
        raise DataError(f"{held} of {root} is both read and held out: name two splits")
    kept = _labelled(splits[chosen].folder, splits[chosen].files)
    rest = _labelled(splits[held].folder, splits[held].files) if held else []
    _refuse_unseen_classes(kept, rest)
    said = f"the folders of {root} are splits: {len(kept)} pictures of {chosen} are read"
    said += f", {len(rest)} of {held} are held out" if held else ""
    unread = [name for name in splits if name not in (chosen, held)]
    said += "".join(f", {len(splits[name].files)} of {name} are not read" for name in unread)
    return kept, rest, f"{said} (rename the folders if they are classes)"


def _refuse_unseen_classes(kept: list[_Picture], rest: list[_Picture]) -> None:
    """Raise if all pictures of a class are held out: a prior would have an untrained class."""
    classes = {normal_form(picture.label) for picture in kept}
    for picture in rest:
        if normal_form(picture.label) not in classes:
            raise DataError(
                f'{picture.path} is held out, and no other picture of the class "{picture.label}" '
                "is for training: add some, or move the class away"
            )
