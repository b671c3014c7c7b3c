"""Image sources: protocol, verification, division into splits, and the registry that opens them.

A source is a list of labelled pictures in a fixed order with random access (`ImageSource`). Most
sources store encoded files (`EncodedPictures`); `EncodedSource` verifies and decodes those, so that
a set has the same pictures, splits and fingerprint whichever container stores its files.
"""

import contextlib
import hashlib
import logging
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from smalti.config import nearest
from smalti.data.image_io import (
    WHITE,
    FolderOptions,
    Unusable,
    check_length,
    decode,
)
from smalti.data.order import Blocks, divide
from smalti.data.sources.annotations import NO_CAPTIONS, why_incomplete
from smalti.data.sources.listing import is_picture, printable, split_called
from smalti.data.sources.options import HuggingFaceOptions, ShardOptions, SourceOptions
from smalti.data.sources.verification import (
    Finding,
    few_levels,
    in_threads,
    measured_over,
    verify,
    without_effect,
)
from smalti.data.value_range import RangeOption, ValueRange, limits_of, needs_measuring, written
from smalti.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)

# -- Protocols ------------------------------------------------------------------------------------


class BadPicture(DataError):
    """One picture is damaged; another of its class may replace it."""


class ImageSource(ABC):
    """Labelled pictures with random access, in a fixed order."""

    classes: tuple[str, ...]  # () = the pictures have no classes
    only_class: tuple[str, ...] = ()  # the one that all pictures have, where it is left out
    labels: Tensor  # (N,) int64; 0 where there are no classes
    fingerprint: str  # changes when any picture or label does, not with the captions
    has_captions: bool = False  # every picture has captions
    captions_problem: str = ""  # why there are none, where that is an error of the set
    heldout: Tensor | None = None  # (N,) bool where the set has a split of its own
    remarks: tuple[str, ...] = ()  # what was recognised, and what is not read; also logged
    max_replaced: int = 0  # how many damaged pictures may be replaced by others of their class
    blocks: Blocks | None = None  # of pictures that can only be read in blocks

    @cached_property
    def sizes(self) -> Tensor:
        """Height and width of each picture in pixels, upright: (N, 2) int64; 0 of a damaged one.
        All pictures are decoded."""

        def size(index: int) -> tuple[int, int]:
            try:
                picture = self.read(index)
            except BadPicture:
                return 0, 0
            return picture.height, picture.width

        return torch.tensor(in_threads(size, len(self), "read sizes of pictures"))

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The picture, RGB or RGBA, of any size; safe in several threads and processes at once.

        Raises:
            BadPicture: it is damaged.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of the picture in messages."""

    def group(self, index: int) -> str:
        """Pictures of one group are never divided between training and held-out pictures."""
        return self.name(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a picture: one or several lines of text, none of them empty.

        () if the set has no captions.
        """
        return ()

    def require_captions(self) -> None:
        """Raise `DataError`, which says why, if the pictures have no captions."""
        if not self.has_captions:
            raise DataError(self.captions_problem or NO_CAPTIONS)


class EncodedPictures(ABC):
    """Encoded picture files with labels, in any container; nothing is decoded yet."""

    title: str  # what contains them, for messages
    classes: tuple[str, ...]  # () = the pictures have no classes
    labels: Tensor  # (N,) int64; 0 where there are no classes
    captioned: Tensor | None = None  # (N,) bool: which pictures have captions; None = none has
    captions_from: str = ""  # where the captions are, for messages
    captions_problem: str = ""  # why there are none, where that is an error of the set
    heldout: Tensor | None = None  # (N,) bool where the set has a split of its own
    remarks: tuple[str, ...] = ()  # what was recognised, and what is not read; also logged
    blocks: Blocks | None = None  # of pictures that can only be read in blocks

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """The bytes of a picture file; safe in several threads and processes at once."""

    @abstractmethod
    def size(self, index: int) -> int:
        """The length of that file in bytes, without reading it."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of the picture within the set."""

    def identities(self, rows: Sequence[int]) -> list[str]:
        """What is known of pictures without reading them, for the fingerprint of a large set."""
        return [f"{self.size(row)}/{self.name(row)}" for row in rows]

    def place(self, index: int) -> str:
        """The location of the picture, for messages."""
        return f"{self.title}: {self.name(index)}"

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a picture, () if it has none; safe in several threads at once.

        Raises:
            DataError: they cannot be read.
        """
        return ()


# -- Classes -------------------------------------------------------------------------------------


def classes_kept(
    title: str, classes: tuple[str, ...], labels: Tensor, options: FolderOptions
) -> tuple[tuple[str, ...], str]:
    """The classes of a set, () if all its pictures are of one, and a remark that says so.

    Args:
        labels: (N,) int64, at least one.
    """
    if options.single_class:
        return classes or ("",), ""
    if not classes:
        return (), f"the pictures of {title} have no classes"
    present = names_present(classes, labels)
    if len(present) > 1:
        return classes, ""
    only = printable(next(iter(present)))
    return (), (
        f'all pictures of {title} are of one class ("{only}"), and are read without classes: '
        "--folder.single_class keeps the class"
    )


def names_present(classes: tuple[str, ...], labels: Tensor) -> tuple[str, ...]:
    """The names of the classes that have pictures; () of a set without classes."""
    return tuple(classes[number] for number in labels.unique().tolist()) if classes else ()


# -- Captions -------------------------------------------------------------------------------------


def captions_found(pictures: EncodedPictures, *, read: bool) -> tuple[Tensor, str]:
    """Which pictures have captions, (N,) bool, and why they cannot be used, "" if they can.

    Args:
        read: read the captions; otherwise, those that are listed are taken to be readable.
    """
    none = torch.zeros(len(pictures), dtype=torch.bool)
    captioned, problems = none if pictures.captioned is None else pictures.captioned, list[str]()

    def examine(index: int) -> bool:
        try:
            return bool(captioned[index]) and bool(pictures.captions(index))
        except DataError as error:
            problems.append(str(error))
            return False

    if read and captioned.any():
        captioned = torch.tensor(in_threads(examine, len(pictures), "check captions"))
    if problem := pictures.captions_problem or (min(problems) if problems else ""):
        return captioned, problem
    if pictures.captioned is None:
        return captioned, ""
    return captioned, why_incomplete(pictures.title, captioned, pictures.place)


# -- Division into training and held-out pictures -------------------------------------------------


def heldout_mask(source: ImageSource, fraction: float, seed: int = 0) -> Tensor:
    """Which pictures are held out, (N,) bool: the set's own split, or else that of `divide`.

    Raises:
        ConfigurationError: the fraction is not in (0, 1).
        DataError: there are too few pictures to hold any out.
    """
    if source.heldout is not None:
        return source.heldout
    groups = [source.group(index) for index in range(len(source))]
    return divide(source.labels, groups, fraction, seed)


def fingerprint_of(parts: Sequence[bytes]) -> str:
    """sha256 over length-prefixed parts."""
    lengths = [len(part) for part in parts]
    prefixes = {length: length.to_bytes(8, "big") for length in set(lengths)}
    pairs = zip(map(prefixes.__getitem__, lengths), parts, strict=True)
    return hashlib.sha256(b"".join(chain.from_iterable(pairs))).hexdigest()


# -- A source over encoded picture files ----------------------------------------------------------


class EncodedSource(ImageSource):
    """Encoded picture files as a source: verified and decoded; `options` apply to damaged files.

    A set of at most `verify_up_to` pictures is decoded once to verify it. Its fingerprint then
    covers the bytes of all files, and equal files form a group: copies of a picture are never
    divided between training and held-out pictures. For a larger set, the fingerprint covers names,
    sizes and labels instead of the bytes.

    Raises:
        DataError: a picture cannot be used; the message names the first one.
    """

    def __init__(
        self,
        pictures: EncodedPictures,
        options: FolderOptions,
        value_range: ValueRange | None = None,
    ) -> None:
        self.pictures, self.options, self.value_range = pictures, options, value_range
        self.classes, self.remarks = pictures.classes, pictures.remarks
        self._leave_out_one_class()
        self._findings: list[Finding] = []  # of the pictures that are used; empty for a large set
        self._noted = False  # whether the log names a picture whose metadata were ignored
        self._rows = list(range(len(pictures)))  # indices in `pictures` of those that are used
        if len(pictures) <= options.verify_up_to:
            self._apply_policy(verify(pictures, options, value_range))
        elif options.bad_images == "skip":
            raise DataError(
                f"{pictures.title} has {len(pictures)} pictures, more than are decoded at the "
                "start: raise --folder.verify_up_to, or pass --folder.bad_images replace"
            )
        labels = pictures.labels if self.classes else torch.zeros_like(pictures.labels)
        self.labels = labels[self._rows]
        self._find_captions()
        self.heldout = None if pictures.heldout is None else pictures.heldout[self._rows]
        self.blocks = None if pictures.blocks is None else pictures.blocks.part(self._rows)
        self.max_replaced = options.max_bad_images if options.bad_images == "replace" else 0
        self.fingerprint = fingerprint_of(
            [repr(self.classes).encode(), *self._identities()]
            + ([] if value_range is None else [written(value_range).encode()])
            + ([] if options.background == WHITE else [options.background.encode()])
        )

    def read(self, index: int) -> Image.Image:
        place = self.pictures.place(self._rows[index])
        try:
            check_length(self.pictures.size(self._rows[index]), self.options)
            with contextlib.closing(self.pictures.open(self._rows[index])) as stream:
                found = decode(stream, self.options, self.value_range)
        except OSError as error:
            raise BadPicture(f"{place} cannot be read ({error}): restore or remove it") from error
        except Unusable as problem:
            kind = BadPicture if problem.undecodable else DataError
            raise kind(f"{place} {problem}") from problem
        if found.note and not self._findings and not self._noted:  # else counted at the start
            self._noted = True
            logger.warning(
                "%s: %s; perhaps of others too, which smalti check-data counts", place, found.note
            )
        return found.image

    @cached_property
    def sizes(self) -> Tensor:
        """As they were found when the set was verified; those of a large set are read."""
        if not self._findings:
            return super().sizes
        return torch.tensor([(found.height, found.width) for found in self._findings])

    def name(self, index: int) -> str:
        return self.pictures.name(self._rows[index])

    def group(self, index: int) -> str:
        return self._findings[index].sha256 if self._findings else self.name(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.pictures.captions(self._rows[index])

    def _leave_out_one_class(self) -> None:
        pictures = self.pictures
        self.classes, remark = classes_kept(
            pictures.title, pictures.classes, pictures.labels, self.options
        )
        if remark:
            logger.info(remark)
            self.remarks += (remark,)
        if not self.classes:
            self.only_class = names_present(pictures.classes, pictures.labels)

    def _find_captions(self) -> None:
        """Whether every picture has captions, or why not; the log says so."""
        pictures = self.pictures
        _, self.captions_problem = captions_found(pictures, read=bool(self._findings))
        self.has_captions = pictures.captioned is not None and not self.captions_problem
        if self.has_captions:
            logger.info("captions of %s: %s", pictures.title, pictures.captions_from)
        elif self.captions_problem:
            remark = f"captions are not used: {self.captions_problem}"
            logger.warning(remark)
            self.remarks += (remark,)

    def _identities(self) -> list[bytes]:
        """The parts of the fingerprint that the pictures contribute."""
        classes = self.classes or ("",)
        labels = map(classes.__getitem__, self.labels.tolist())
        if self._findings:
            contents = [found.sha256 for found in self._findings]
        else:
            contents = self.pictures.identities(self._rows)
        pairs = zip(labels, contents, strict=True)
        return [f"{label}/{of}".encode(errors="surrogateescape") for label, of in pairs]

    def _apply_policy(self, findings: list[Finding]) -> None:
        """Keep the pictures that the options accept, or raise."""
        policy, title = self.options.bad_images, self.pictures.title
        damaged = [row for row, found in enumerate(findings) if found.undecodable]
        refused = [
            row
            for row, found in enumerate(findings)
            if found.problem and not (found.undecodable and policy != "refuse")
        ]
        if refused:
            raise DataError(self._refusal(refused, findings))
        done = "skipped" if policy == "skip" else "to be replaced"
        for row in damaged:
            logger.warning("%s: %s %s", done, self.pictures.place(row), findings[row].problem)
        if damaged:
            logger.warning("%s %d of %d pictures", done, len(damaged), len(findings))
        if policy == "replace" and len(damaged) > self.options.max_bad_images:
            raise DataError(
                f"{title} has {len(damaged)} bad pictures or more, and --folder.max_bad_images "
                f"allows {self.options.max_bad_images}: list them with smalti check-data"
            )
        noted = [row for row, found in enumerate(findings) if found.note]
        if noted:
            place, note = self.pictures.place(noted[0]), findings[noted[0]].note
            logger.warning(
                "ignored metadata of %d of %d pictures, the first %s: %s",
                len(noted),
                len(findings),
                place,
                note,
            )
        deep = sum(found.extent is not None for found in findings)
        for remark in (
            few_levels(self.pictures, findings),
            without_effect(title, self.value_range, deep),
        ):
            if remark:
                logger.warning(remark)
        if len(damaged) == len(findings):
            raise DataError(f"{title} has no picture that can be used: check --data")
        good = [row for row, found in enumerate(findings) if not found.problem]
        self._refuse_empty_classes(good)
        self._rows = good if policy == "skip" else self._rows
        self._findings = [findings[row] for row in self._rows]

    def _refusal(self, refused: list[int], findings: list[Finding]) -> str:
        first = findings[refused[0]]
        hint = ", or pass --folder.bad_images replace (or skip)" if first.undecodable else ""
        more = f" (and {len(refused) - 1} more cannot be used)" if len(refused) > 1 else ""
        return f"{self.pictures.place(refused[0])} {first.problem}{hint}{more}"

    def _refuse_empty_classes(self, good: list[int]) -> None:
        """Raise if a class lost all its pictures: a prior would have a class without samples."""
        labels = self.pictures.labels
        for label in sorted(set(labels.tolist()) - set(labels[good].tolist())):
            raise DataError(
                f'no picture of the class "{printable(self.classes[label])}" in '
                f"{self.pictures.title} can be decoded: replace them, or remove the class"
            )


# -- The registry: which function opens what --data names -----------------------------------------

HUGGING_FACE = "smalti.data.sources.huggingface"
SHARDS = "smalti.data.sources.webdataset:open_shards"
# Patterns of --data -> the function that opens it; the first match is used. The file names in a
# folder are also matched; a folder without a match is a folder of pictures.
SOURCES: dict[str, str] = {
    "emoji": "smalti.data.sources.embedded:open_embedded",
    "fashion": "smalti.data.sources.embedded:open_embedded",
    "hf:*": f"{HUGGING_FACE}:open_hub",
    "dataset_dict.json|state.json": f"{HUGGING_FACE}:open_saved",
    "*.parquet|*.arrow": f"{HUGGING_FACE}:open_files",
    "*.tar|*.tar.gz|*.tgz|*://*|pipe:*": SHARDS,
    "*.npz|*.npy": "smalti.data.sources.arrays:open_arrays",
}
FOLDER = "smalti.data.sources.folder:open_folder"
SPLITS = "smalti.data.sources.splits:open_splits"


def open_source(
    spec: str,
    *,
    options: FolderOptions | None = None,
    hf: HuggingFaceOptions | None = None,
    stream_cache: Path | None = None,
    shards: ShardOptions | None = None,
    value_range: RangeOption | None = None,
    caption_column: str = "",
    label_column: str = "",
) -> ImageSource:
    """The picture set that `spec`, the value of `--data`, names: see `SOURCES`, or a folder.

    Raises:
        DataError: no such set, or its pictures cannot be used.
        ConfigurationError: an option does not apply to this kind of set.
    """
    reading = SourceOptions(
        options or FolderOptions(),
        hf or HuggingFaceOptions(),
        stream_cache,
        shards or ShardOptions(),
        value_range,
        caption_column,
        label_column,
    )
    return open_verified(spec, reading)


def open_verified(spec: str, options: SourceOptions) -> ImageSource:
    """Like `open_source`, with all options in one."""
    found = open_unverified(spec, options)
    if not isinstance(found, ImageSource):
        limits = limits_of(measured_range(spec, options, found))
        found = EncodedSource(found, options.folder, limits)
    elif needs_measuring(options.value_range):
        measured_range(spec, options, found)
    elif remark := without_effect(spec, options.value_range, deep=0):
        logger.warning(remark)
    if options.caption_column:
        found.require_captions()
    return found


# Percentiles that were measured: the splits of a set are opened one after the other.
_MEASURED: dict[tuple[str, SourceOptions], RangeOption] = {}


def measured_range(
    spec: str, options: SourceOptions, pictures: ImageSource | EncodedPictures | None = None
) -> RangeOption | None:
    """`options.value_range`, with its percentiles measured over the set, once per process.

    Args:
        pictures: the set, if it is open already.

    Raises:
        DataError: the set has no pictures with more than 8 bits per channel.
    """
    wanted = options.value_range
    if wanted is None or not needs_measuring(wanted):
        return wanted
    key = spec, SourceOptions(**{f.name: getattr(options, f.name) for f in fields(SourceOptions)})
    if key not in _MEASURED:
        found = pictures or open_unverified(spec, options)
        if isinstance(found, ImageSource):
            raise DataError(
                f"value_range is {wanted[0]} {wanted[1]}, and the pictures of {spec} have 8 bits "
                "per channel: leave it out"
            )
        _MEASURED[key] = measured_over(found, options.folder, wanted)
    return _MEASURED[key]


def open_unverified(spec: str, options: SourceOptions) -> ImageSource | EncodedPictures:
    """Like `open_source`, but encoded pictures are not decoded yet."""
    entry = entry_of(spec)
    if not entry.startswith(HUGGING_FACE):
        _refuse_unused(spec, options)
    if entry != SHARDS and options.shards != ShardOptions():
        raise ConfigurationError(
            f"--shards.* is for WebDataset shards, and {spec} is not one: leave it out"
        )
    return pkgutil.resolve_name(entry)(spec, options)


def _refuse_unused(spec: str, options: SourceOptions) -> None:
    """Raise `ConfigurationError` if options for another kind of set were given."""
    if options.hf != HuggingFaceOptions():
        raise ConfigurationError(
            f"--hf.* is for Hugging Face data sets, and {spec} is not one: leave it out"
        )
    if options.stream_cache is not None and "://" not in spec:
        raise ConfigurationError(
            f"--stream_cache is for streams and URLs, and {spec} is read in place: leave it out"
        )


def entry_of(spec: str) -> str:
    """The entry of `SOURCES` that opens `spec`."""
    path = Path(spec).expanduser()
    for patterns, entry in SOURCES.items():
        if any(fnmatchcase(spec, pattern) for pattern in patterns.split("|")):
            return entry
    if path.is_dir():
        return _entry_of_folder(path)
    known = [pattern for pattern in SOURCES if pattern.isalpha()]
    if not path.exists() and "/" not in spec and nearest(spec, known).startswith("did"):
        raise DataError(f'no data set is called "{spec}"; {nearest(spec, known)}')
    return FOLDER


def _entry_of_folder(path: Path) -> str:
    """The entry that opens a folder, by the names of its files; sub-folders are classes.

    Raises:
        DataError: it has no sub-folders, and files for several entries.
    """
    with os.scandir(path) as listed:  # a million entries, without a system call for each
        entries = [entry for entry in listed if entry.name[0] != "."]
    has_folders, names = False, list[str]()
    for entry in entries:
        with contextlib.suppress(OSError):  # a link to itself, which is named when it is opened
            if entry.is_dir():
                has_folders = True
            elif entry.is_file():
                names.append(entry.name)
    # Of files with the same suffix the first is enough, unless a pattern is a whole name.
    whole = {p for patterns in SOURCES for p in patterns.split("|") if "*" not in p}
    first_of: dict[str, str] = {}
    for name in sorted(names, reverse=True):
        first_of[name if name in whole else name[name.find(".") :]] = name
    files = sorted(path / name for name in first_of.values())
    found: dict[str, Path] = {}  # entry -> the first of its files
    for patterns, entry in SOURCES.items():
        for pattern in patterns.split("|"):
            first = next((file for file in files if fnmatchcase(file.name, pattern)), None)
            if first is not None and "*" not in pattern:  # `save_to_disk` writes these names
                return entry
            if first is not None and not has_folders:
                found.setdefault(entry, first)
    pictures = [file for file in files if is_picture(file)]
    if found and len(found) + bool(pictures) > 1:
        first = next(iter(found.values()))
        named = ", ".join(file.name for file in (*found.values(), *pictures[:1]))
        single = first.suffix in (".npz", ".npy")
        example = first if single else first.with_name(f"*{first.suffix}")
        raise DataError(
            f"{path} holds files of several kinds ({named}): name those to read, for example "
            f"--data '{example}', or move them away"
        )
    if found:
        return next(iter(found))
    folders = [path / entry.name for entry in entries if entry.is_dir()]
    splits = not files and len(folders) > 1 and all(split_called(f.name) for f in folders)
    return SPLITS if splits and FOLDER not in map(_entry_of_folder, folders) else FOLDER
