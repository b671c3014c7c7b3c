"""Pictures in a folder: one sub-folder per class, or without classes; or split folders of these."""

import logging
import os
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image

from smalti.config import nearest
from smalti.data.classes import named_classes, names_in, normal_form, numbered_classes
from smalti.data.image_io import FolderOptions, Unusable, decode, without_pixel_warning
from smalti.data.sources.annotations import CAPTION_COLUMNS, LABEL_COLUMNS
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.data.sources.folder_annotations import (
    CLASSES,
    METADATA,
    TEXT,
    Metadata,
    may_annotate,
    read_metadata,
    read_text_file,
    text_files,
)
from smalti.data.sources.index import list_folder
from smalti.data.sources.listing import EXTENSIONS, PassedOver, kind_of, open_file, split_called
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


# A set has up to millions of pictures. They are lists of names, relative to the folder of the set
# with "/", and of labels: the name of the class folder, "" outside of one, or as a metadata file
# says. Paths are made when files are opened.
Label = int | str


class FolderPictures(EncodedPictures):
    """root/class/.../picture.png; classes are the sub-folders, sorted by name.

    If all sub-folders with pictures have the names of splits, they are splits, and the classes are
    the folders below them: root/train/class/.../picture.png. The pictures of "train" are then for
    training, and those of "validation", or else of "test", are held out.

    Captions are in metadata.jsonl or metadata.csv, or in a text file beside each picture. Labels
    are in the former if `options` names their column, or if there are no two class folders.

    Args:
        split: divide this split instead of "train"; nothing else is read.
        heldout_split: hold out this split.

    Raises:
        DataError: no such folder or split, no pictures, or pictures outside the class folders.
    """

    def __init__(
        self, root: Path, options: SourceOptions, split: str = "", heldout_split: str = ""
    ) -> None:
        passed = PassedOver()
        files, sizes, beside = _list_pictures(root, passed)
        self.root, self.title = root, str(root)
        metadata = self._metadata(files, beside, options)
        splits = _splits_of(root, files)
        if not splits and (split or heldout_split):
            raise DataError(
                f"{root} has no split folders (such as train and val): leave out --hf.split and "
                "--hf.heldout_split"
            )
        labels = self._labels_in(metadata, files, splits, options)
        if splits:
            kept, rest, found, remark = _choose_splits(root, splits, labels, split, heldout_split)
            self._names = kept + rest
            self.heldout = torch.arange(len(found)) >= len(kept) if rest else None
            self.remarks += (remark,)
            by_name = dict(zip(files, sizes, strict=True))
            self._sizes = [by_name[name] for name in self._names]
        else:
            self._names, self._sizes = files, sizes
            found = _labels_of(root, root, files, labels)
        self.classes, self.labels = _classes_of(root, found)
        used = self._find_captions(metadata, beside, options.caption_column)
        described = labels is not None or (self._captions and not used) or self.captions_problem
        if int in set(map(type, found)):
            used.add(root / CLASSES)
        for path in beside:
            if not (described if path.name in METADATA else path in used):
                passed.add(kind_of(path.name), path.relative_to(root).as_posix())
        self.remarks += _remarks_on(root, passed)
        for remark in self.remarks:
            logger.warning(remark)

    def _metadata(self, files: list[str], beside: list[Path], options: SourceOptions) -> Metadata:
        """The metadata files; empty if they cannot be read and no option needs them."""
        columns = [name for name in (options.caption_column, options.labels_in) if name]
        described = any(path.name in METADATA for path in beside)
        pictures = [self.root / name for name in files] if described else []
        try:
            return read_metadata(self.root, beside, pictures, columns)
        except DataError as error:
            if columns:
                raise
            self.captions_problem = str(error)
            return Metadata()

    def _labels_in(
        self,
        metadata: Metadata,
        files: list[str],
        splits: Mapping[str, "_Split"],
        options: SourceOptions,
    ) -> dict[Path, Label] | None:
        """The labels in metadata files; None if the classes are the sub-folders."""
        wanted = options.labels_in
        column = metadata.column(wanted, LABEL_COLUMNS, "label_column")
        if not column or (options.folder.single_class and not wanted):
            return None
        depth = 2 if splits else 1
        parts = [name.split("/") for name in files]
        folders = {names[depth - 1] for names in parts if len(names) > depth}
        if not wanted and len(folders) > 1:
            self.remarks += (
                f"the classes of {self.root} are its sub-folders; --label_column {column} reads "
                "those in the metadata files",
            )
            return None
        try:
            return metadata.labels(column)
        except DataError as error:
            if wanted:
                raise
            self.remarks += (f"labels are not used: {error}",)
            return None

    def _find_captions(self, metadata: Metadata, beside: list[Path], wanted: str) -> set[Path]:
        """Where the captions of each picture are; return the text files that are used."""
        self._captions: Mapping[Path, tuple[str, ...] | Path] = {}
        column = ""
        if wanted != TEXT:
            column = metadata.column(wanted, CAPTION_COLUMNS, "caption_column")
        if column:
            try:
                self._captions = metadata.captions(column)
            except DataError as error:
                self.captions_problem = str(error)
            self.captions_from = f'"{column}" in metadata files'
        elif not self.captions_problem:
            paths = [self.root / name for name in self._names] if beside else []
            self._captions = text_files(paths, beside)
            self.captions_from = "the text files beside the pictures"
        if self._captions:
            has_caption = [self.root / name in self._captions for name in self._names]
            self.captioned = torch.tensor(has_caption)
        return {found for found in self._captions.values() if isinstance(found, Path)}

    def captions(self, index: int) -> tuple[str, ...]:
        found = self._captions.get(self.root / self._names[index], ())
        return read_text_file(found) if isinstance(found, Path) else found

    def open(self, index: int) -> BinaryIO:
        return open_file(self.root / self._names[index])

    def size(self, index: int) -> int:
        return self._sizes[index]

    def identities(self, rows: Sequence[int]) -> list[str]:
        sizes, names = self._sizes, self._names
        return [f"{sizes[row]}/{names[row]}" for row in rows]

    def name(self, index: int) -> str:
        return self._names[index]

    def place(self, index: int) -> str:
        return str(self.root / self._names[index])


def open_folder(spec: str, options: SourceOptions) -> FolderPictures:
    """A folder of pictures, with or without a sub-folder per class."""
    return FolderPictures(Path(spec).expanduser(), options)


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


def _list_pictures(root: Path, passed: PassedOver) -> tuple[list[str], list[int], list[Path]]:
    """Every picture below root, sorted, their sizes, and the files that may annotate pictures; all
    other files are counted in `passed`."""
    if not root.exists():
        raise DataError(f"the folder {root} does not exist: check --data")
    if not root.is_dir():
        raise DataError(f"{root} is a file: --data takes a folder with a sub-folder per class")
    listing, beside = list_folder(root), list[Path]()
    listing.count_unread(passed)
    found, others = _divided(listing.files)
    for name in others:
        if may_annotate(root / name):
            beside.append(root / name)
        else:
            passed.add(kind_of(name), name)
    if not found:
        for path in beside:
            passed.add(kind_of(path.name), path.relative_to(root).as_posix())
        raise DataError(_no_pictures(root, passed))
    # By their bytes, which for ASCII is the order of texts.
    found.sort(key=None if "".join(found).isascii() else os.fsencode)
    if found == listing.files:
        return found, listing.sizes, beside
    sizes = dict(zip(listing.files, listing.sizes, strict=True))
    return found, [sizes[name] for name in found], beside


def _divided(files: list[str]) -> tuple[list[str], list[str]]:
    """The pictures among files, and the others."""
    text = "\0".join(files).lower() + "\0"  # to count suffixes takes less time than to look at each
    if sum(text.count(f"{suffix}\0") for suffix in EXTENSIONS) == len(files):
        return list(files), []
    found = [name for name in files if name[name.rfind(".") :].lower() in EXTENSIONS]
    pictures = set(found)
    return found, [name for name in files if name not in pictures]


def _folders_of(files: Sequence[str], before: int = 0) -> list[tuple[str, int]]:
    """The sub-folders in sorted names, and how many files each has; "" stands for files in none.

    Args:
        before: letters of the folder that contains them.
    """
    found, start = list[tuple[str, int]](), 0
    while start < len(files):
        name = files[start]
        end = name.find("/", before)
        stop = start + 1
        if end >= 0:  # up to the first name after folder/..., and "0" follows "/"
            after = os.fsencode(f"{name[:end]}0")
            stop = bisect_left(files, after, start, key=os.fsencode)
        found.append((name[before : max(before, end)], stop - start))
        start = stop
    return found


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


def _labels_of(
    root: Path, base: Path, files: list[str], labels: Mapping[Path, Label] | None
) -> list[Label]:
    """The class of each picture: the given label, or else the sub-folder of `base`."""
    if labels is not None:
        for path in (root / name for name in files):
            if path not in labels:
                raise DataError(f"{path} has no label: no metadata file names it; add a line")
        return [labels[root / name] for name in files]
    before = 0 if base == root else len(base.name) + 1
    folders = _folders_of(files, before)
    classes = {folder: _class_of(folder, base) for folder, _ in folders}
    if "" not in classes:
        _refuse_empty_folders(base, "class", classes)
    elif len(classes) > 1:
        loose = next(name for name in files if "/" not in name[before:])
        raise DataError(f"{root / loose} is outside the class folders: move it into one of them")
    found = list[Label]()
    for folder, count in folders:
        found += [classes[folder]] * count
    return found


def _classes_of(root: Path, labels: list[Label]) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, () if there are none, and the labels (N,) int64."""
    kinds = set(map(type, labels))
    names = [label for label in labels if type(label) is str] if str in kinds else []
    numbers = [label for label in labels if type(label) is int] if int in kinds else []
    if names and numbers:
        raise DataError(
            f"some labels of {root} are names, such as {names[0]!r}, and some are numbers, such as "
            f"{numbers[0]}: label all in the same way"
        )
    if numbers:
        return numbered_classes(numbers, names_in(root), root)
    if not any(names):
        return (), torch.zeros(len(labels), dtype=torch.int64)
    return named_classes(names, root)


def _class_of(folder: str, base: Path) -> str:
    """The class that a sub-folder is: its name, UTF-8 in any locale."""
    try:
        return os.fsencode(folder).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the name of the class folder {folder!a} in {base} is not UTF-8: rename it"
        ) from error


def _refuse_empty_folders(base: Path, what: str, known: Collection[str]) -> None:
    """Raise for a class folder without pictures, which would renumber later classes, or a split
    folder without any.

    Args:
        known: the names of the folders with pictures.
    """
    for entry in sorted(base.iterdir()):
        counts = what == "class" or split_called(entry.name)
        if entry.is_dir() and not entry.name.startswith(".") and counts and entry.name not in known:
            raise DataError(f"the {what} folder {entry} holds no pictures: add some or remove it")


# -- Split folders --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """A split folder and the picture files in it."""

    folder: Path
    files: list[str]

    @property
    def has_classes(self) -> bool:
        return any(name.count("/") > 1 for name in self.files)


def _splits_of(root: Path, files: list[str]) -> dict[str, _Split]:
    """The splits, if all folders with pictures are splits; else nothing."""
    splits: dict[str, _Split] = {}
    start, folders = 0, _folders_of(files)
    for name, count in folders:
        split, folder = split_called(name), root / name
        if split is None:
            return {}
        if split in splits:
            raise DataError(f"{splits[split].folder} and {folder} are both {split}: merge them")
        splits[split] = _Split(folder, files[start : start + count])
        start += count
    _refuse_empty_folders(root, "split", dict(folders))
    return splits


def _choose_splits(
    root: Path,
    splits: Mapping[str, _Split],
    labels: Mapping[Path, Label] | None,
    split: str,
    heldout_split: str,
) -> tuple[list[str], list[str], list[Label], str]:
    """The pictures to train on, those to hold out, the labels of both, and a remark that says which
    they are."""
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
    if labels is None:
        alike = [s for s in alike if splits[s].has_classes == splits[chosen].has_classes]
    held = named[1] or next(iter(alike), "")
    if held == chosen:
        raise DataError(f"{held} of {root} is both read and held out: name two splits")
    kept, rest = splits[chosen].files, splits[held].files if held else []
    found = _labels_of(root, splits[chosen].folder, kept, labels)
    of_rest = _labels_of(root, splits[held].folder, rest, labels) if held else []
    _refuse_unseen_classes(root, found, rest, of_rest)
    said = f"the folders of {root} are splits: {len(kept)} pictures of {chosen} are read"
    said += f", {len(rest)} of {held} are held out" if held else ""
    unread = [name for name in splits if name not in (chosen, held)]
    said += "".join(f", {len(splits[name].files)} of {name} are not read" for name in unread)
    return kept, rest, found + of_rest, f"{said} (rename the folders if they are classes)"


def _refuse_unseen_classes(
    root: Path, kept: list[Label], rest: list[str], of_rest: list[Label]
) -> None:
    """Raise if all pictures of a class are held out: a prior would have an untrained class."""
    classes = {normal_form(str(label)) for label in set(kept)}
    for name, label in zip(rest, of_rest, strict=True):
        if normal_form(str(label)) not in classes:
            raise DataError(
                f'{root / name} is held out, and no other picture of the class "{label}" is for '
                "training: add some, or move the class away"
            )
