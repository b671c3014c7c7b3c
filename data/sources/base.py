"""Where pictures come from: one interface, a registry of sources, and a split by group."""

import contextlib
import hashlib
import importlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from smalti.config import nearest
from smalti.data.image_io import FolderOptions, Unusable, decode, our_own_pixel_cap
from smalti.errors import SmaltiError

# -------------------------------------------------------------------------------------------------
# Decode every picture of a set once, to know before training what is wrong with it.

T = TypeVar("T")

THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without holding the interpreter
REMEMBERED = 1_000_000  # findings kept, so that a process decodes no picture twice to check it


class EncodedPictures(ABC):
    """Picture files as some format stores them, with labels; nothing is decoded yet."""

    title: str  # where they come from, for messages
    classes: tuple[str, ...]
    labels: Tensor  # (N,) int64
    heldout: Tensor | None = None  # (N,) bool where the set comes with a split of its own

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """The bytes of a picture file; safe in several threads and processes at once."""

    @abstractmethod
    def size(self, index: int) -> int:
        """How many bytes that file has, without reading it."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the picture, within the set."""

    def place(self, index: int) -> str:
        """Where a person finds the picture."""
        return f"{self.title}: {self.name(index)}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What decoding a picture file showed."""

    sha256: str  # of the file
    problem: str | None = None  # why it cannot be used
    undecodable: bool = False  # the problem is damage
    width: int = 0  # upright; 0 where nothing could be decoded
    height: int = 0
    mode: str = ""  # Pillow's name for the stored colours


def verify(pictures: EncodedPictures, options: FolderOptions) -> list[Finding]:
    """Decode all pictures of a set, in threads; a progress bar appears if it takes long."""
    if len(_FINDINGS) > REMEMBERED:
        _FINDINGS.clear()
    return in_threads(
        lambda index: _examine(pictures, index, options), len(pictures), "check pictures"
    )


def in_threads(work: Callable[[int], T], count: int, title: str) -> list[T]:
    """`work` on 0 to count - 1, results in order; the first failure ends it at once."""
    Image.init()  # Pillow's plugins cannot be loaded by two threads at once
    with ThreadPoolExecutor(THREADS) as pool, our_own_pixel_cap():
        try:
            results = pool.map(work, range(count))
            return list(tqdm(results, desc=title, total=count, delay=2, leave=False))
        finally:
            pool.shutdown(cancel_futures=True)


# (sha256, options) -> what was found: the splits of a set are opened one after the other, and each
# stage of a demo opens it anew.
_FINDINGS: dict[tuple[str, FolderOptions], Finding] = {}


def _examine(pictures: EncodedPictures, index: int, options: FolderOptions) -> Finding:
    try:
        with contextlib.closing(pictures.open(index)) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            known = _FINDINGS.get((sha256, options))
            if known is None:
                stream.seek(0)
                known = _FINDINGS[sha256, options] = _decode(stream, sha256, options)
            return known
    except OSError as error:  # a link to nowhere, a file that may not be read
        nothing = hashlib.sha256(pictures.name(index).encode(errors="surrogateescape"))
        reason = f"cannot be decoded ({error}): replace or remove it"
        return Finding(nothing.hexdigest(), reason, undecodable=True)


def _decode(stream: BinaryIO, sha256: str, options: FolderOptions) -> Finding:
    try:
        found = decode(stream, options)
    except Unusable as problem:
        return Finding(sha256, str(problem), problem.undecodable)
    return Finding(sha256, None, False, found.image.width, found.image.height, found.mode)


# -------------------------------------------------------------------------------------------------
# Where pictures come from: one interface, a registry of sources, and a split by group.

# How --data looks -> what opens it; the first that fits counts. "*.tar" and the like are also
# looked for among the files of a folder; a folder that no pattern fits is one of pictures.
HUGGING_FACE = "smalti.data.sources.huggingface"
SOURCES: dict[str, str] = {
    "emoji": "smalti.data.sources.embedded:open_embedded",
    "fashion": "smalti.data.sources.embedded:open_embedded",
    "hf:*": f"{HUGGING_FACE}:open_hub",
    "dataset_dict.json|state.json": f"{HUGGING_FACE}:open_saved",
    "*.parquet|*.arrow": f"{HUGGING_FACE}:open_files",
    "*.tar|*.tar.gz|*.tgz|*://*|pipe:*": "smalti.data.sources.webdataset:open_shards",
    "*.npz|*.npy": "smalti.data.sources.arrays:open_arrays",
}
FOLDER = "smalti.data.sources.folder:open_folder"


class BadPicture(SmaltiError):
    """One picture is damaged; another may take its place."""


class ImageSource(ABC):
    """Labelled pictures with random access, in a fixed order."""

    classes: tuple[str, ...]
    labels: Tensor  # (N,) int64
    fingerprint: str  # changes when any picture or label does
    heldout: Tensor | None = None  # (N,) bool where the set comes with a split of its own
    max_replaced: int = 0  # how many damaged pictures may be replaced by others of their class

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The picture, RGB, of any size; safe in several threads and processes at once.

        Raises:
            BadPicture: it is damaged.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the picture in a message."""

    def group(self, index: int) -> str:
        """Pictures of one group always fall on the same side of a split."""
        return self.name(index)


@dataclass(frozen=True)
class HuggingFaceOptions:
    """Which part of a Hugging Face data set; empty = what the set itself makes clear."""

    config: str = ""  # of a set that comes in several versions
    revision: str = ""  # a branch, tag or commit on the Hub
    split: str = ""  # empty = train, or the only one
    heldout_split: str = ""  # hold out the pictures of this split instead of some of the others
    image_column: str = ""
    label_column: str = ""
    streaming: bool = False  # never download the whole set: copy the samples to --stream_cache
    max_samples: int = 0  # of a stream, take only the first ones; 0 = all

    def __post_init__(self) -> None:
        if self.max_samples < 0:
            raise SmaltiError(f"max_samples is {self.max_samples}; it must be at least 0")
        if self.max_samples and not self.streaming:
            raise SmaltiError("--hf.max_samples is for streams: pass --hf.streaming, too")
        if self.streaming and self.heldout_split:
            raise SmaltiError(
                "--hf.heldout_split cannot be streamed: leave it out, or leave out --hf.streaming"
            )


@dataclass(frozen=True)
class SourceOptions:
    """How a set is read."""

    folder: FolderOptions = field(default_factory=FolderOptions)
    hf: HuggingFaceOptions = field(default_factory=HuggingFaceOptions)
    # Where streams and shards behind a URL are copied to, once, for exact order and resuming.
    stream_cache: Path | None = None


def open_source(
    spec: str,
    *,
    options: FolderOptions | None = None,
    hf: HuggingFaceOptions | None = None,
    stream_cache: Path | None = None,
) -> ImageSource:
    """A set of pictures by what `--data` says: see `SOURCES`, or a folder of pictures.

    Raises:
        SmaltiError: nothing fits, or the pictures are unusable.
    """
    from smalti.data.sources.base import EncodedSource

    reading = SourceOptions(options or FolderOptions(), hf or HuggingFaceOptions(), stream_cache)
    found = open_unverified(spec, reading)
    return found if isinstance(found, ImageSource) else EncodedSource(found, reading.folder)


def open_unverified(spec: str, options: SourceOptions) -> "ImageSource | EncodedPictures":
    """Like `open_source`, but picture files are not decoded yet."""
    entry = _entry(spec)
    if not entry.startswith(HUGGING_FACE):
        _refuse_unused(spec, options)
    return _resolve(entry)(spec, options)


def _refuse_unused(spec: str, options: SourceOptions) -> None:
    """Raise `SmaltiError` if options that are for other kinds of sets were given."""
    if options.hf != HuggingFaceOptions():
        raise SmaltiError(f"--hf.* is for Hugging Face data sets, and {spec} is none: leave it out")
    if options.stream_cache is not None and "://" not in spec:
        raise SmaltiError(
            f"--stream_cache is for streams and URLs, and {spec} is read in place: leave it out"
        )


def _entry(spec: str) -> str:
    """What of `SOURCES` opens `spec`."""
    path = Path(spec).expanduser()
    for patterns, entry in SOURCES.items():
        if any(fnmatchcase(spec, pattern) for pattern in patterns.split("|")):
            return entry
    if path.is_dir():
        return _entry_of_folder(path)
    known = [pattern for pattern in SOURCES if pattern.isalpha()]
    if not path.exists() and "/" not in spec and nearest(spec, known).startswith("did"):
        raise SmaltiError(f'no data set is called "{spec}"; {nearest(spec, known)}')
    return FOLDER


def _entry_of_folder(path: Path) -> str:
    """By its files; one with class folders holds pictures, whatever lies beside them."""
    entries = [entry for entry in path.iterdir() if entry.name[0] != "."]
    files = [entry.name for entry in entries if entry.is_file()]
    folders = [entry for entry in entries if entry.is_dir()]
    for patterns, entry in SOURCES.items():
        for pattern in patterns.split("|"):
            marks = "." in pattern and (not folders or not pattern.startswith("*"))
            if marks and any(fnmatchcase(name, pattern) for name in files):
                return entry
    return FOLDER


def _resolve(entry: str) -> "Callable[[str, SourceOptions], ImageSource | EncodedPictures]":
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)


def refuse_one_class(
    title: str, classes: Sequence[str], labels: Tensor, options: FolderOptions
) -> None:
    """Raise `SmaltiError` unless there are two classes, or one is what the options expect."""
    present = labels.unique().tolist()
    if len(present) < 2 and not options.single_class:
        name = f' ("{classes[present[0]]}")' if classes[present[0]] else ""
        raise SmaltiError(
            f"{title} has one class only{name}: give each picture one of several classes (in a "
            "folder: a sub-folder for each), or pass --folder.single_class"
        )


def heldout_mask(source: ImageSource, fraction: float, seed: int = 0) -> Tensor:
    """Which pictures are held out, (N,) bool: the set's own split, or about `fraction` of the
    groups, see `divide`.

    Raises:
        SmaltiError: the fraction is not in (0, 1), or nothing could be held out.
    """
    if source.heldout is not None:
        return source.heldout
    groups = [source.group(index) for index in range(len(source))]
    return divide(source.labels, groups, fraction, seed)


def divide(labels: Tensor, groups: Sequence[str], fraction: float, seed: int = 0) -> Tensor:
    """Which pictures to hold out, (N,) bool: about `fraction` of the groups, chosen by a hash of
    (seed, group).

    The choice for a group depends on nothing else, neither on the order nor on the number of the
    other pictures, but for one rule: a class with two groups or more has some on either side, and
    a class with a single group keeps it for training. A group of two classes is held out only if
    either class would do so.

    Args:
        labels: (N,) int64.
        groups: one for each picture.

    Raises:
        SmaltiError: the fraction is not in (0, 1), or nothing could be held out.
    """
    if not 0 < fraction < 1:
        raise SmaltiError(f"heldout_fraction is {fraction}; it must lie between 0 and 1")
    members: dict[int, set[str]] = {}
    for label, group in zip(labels.tolist(), groups, strict=True):
        members.setdefault(label, set()).add(group)
    heldout, kept = set[str](), set[str]()
    for _, of_class in sorted(members.items()):
        chosen = _held_out_of(of_class, fraction, seed)
        heldout |= chosen
        kept |= of_class - chosen
    heldout -= kept
    if not heldout:
        raise SmaltiError(
            f"{len(groups)} pictures are too few to hold out {fraction:.0%} of them: add pictures"
        )
    return torch.tensor([group in heldout for group in groups])


def _held_out_of(groups: set[str], fraction: float, seed: int) -> set[str]:
    """The held-out groups of one class: those with a small hash, but neither none nor all."""
    ranked = sorted((_unit_hash(seed, group), group) for group in groups)
    count = sum(rank < fraction for rank, _ in ranked)
    count = min(max(count, 1), len(ranked) - 1)
    return {group for _, group in ranked[:count]}


def _unit_hash(seed: int, text: str) -> float:
    # File names may hold bytes that are no Unicode.
    digest = hashlib.sha256(f"{seed}/split/{text}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def fingerprint_of(parts: Sequence[bytes]) -> str:
    """sha256 over length-prefixed parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------
# A source over picture files: verified, decoded, and damage dealt with as the options say.

logger = logging.getLogger(__name__)


class EncodedSource(ImageSource):
    """Picture files as labelled pictures with random access.

    A set of at most `verify_up_to` pictures is decoded once to check it. Its fingerprint then
    covers the bytes of all files, and equal files form a group: a picture that is there twice never
    stands on both sides of a split, and the split is the same whatever stores the files. Of a
    larger set the names, sizes and labels count.

    Raises:
        SmaltiError: one class only, or pictures that cannot be used; names the first of them.
    """

    def __init__(self, pictures: EncodedPictures, options: FolderOptions) -> None:
        self.pictures, self.options = pictures, options
        self.classes = pictures.classes
        refuse_one_class(pictures.title, pictures.classes, pictures.labels, options)
        self._findings: list[Finding] = []  # of the pictures that are used; none in a large set
        self._rows = list(range(len(pictures)))
        if len(pictures) <= options.verify_up_to:
            self._settle(verify(pictures, options))
        elif options.bad_images == "skip":
            raise SmaltiError(
                f"{pictures.title} has {len(pictures)} pictures, more than are decoded at the "
                "start: raise --folder.verify_up_to, or pass --folder.bad_images replace"
            )
        self.labels = pictures.labels[self._rows]
        self.heldout = None if pictures.heldout is None else pictures.heldout[self._rows]
        self.max_replaced = options.max_bad_images if options.bad_images == "replace" else 0
        self.fingerprint = fingerprint_of(
            [repr(self.classes).encode(), *map(self._identity, range(len(self)))]
        )

    def read(self, index: int) -> Image.Image:
        place = self.pictures.place(self._rows[index])
        try:
            with contextlib.closing(self.pictures.open(self._rows[index])) as stream:
                return decode(stream, self.options).image
        except OSError as error:
            raise BadPicture(f"{place} cannot be read ({error}): restore or remove it") from error
        except Unusable as problem:
            kind = BadPicture if problem.undecodable else SmaltiError
            raise kind(f"{place} {problem}") from problem

    def name(self, index: int) -> str:
        return self.pictures.name(self._rows[index])

    def group(self, index: int) -> str:
        return self._findings[index].sha256 if self._findings else self.name(index)

    def _identity(self, index: int) -> bytes:
        """What the fingerprint takes of a picture."""
        label = self.classes[self.labels[index]]
        if self._findings:
            content = self._findings[index].sha256
        else:
            row = self._rows[index]
            content = f"{self.pictures.size(row)}/{self.name(index)}"
        return f"{label}/{content}".encode(errors="surrogateescape")

    def _settle(self, findings: list[Finding]) -> None:
        """Keep the pictures that the options let pass, or raise."""
        policy = self.options.bad_images
        damaged = [row for row, found in enumerate(findings) if found.undecodable]
        refused = [
            row
            for row, found in enumerate(findings)
            if found.problem and not (found.undecodable and policy != "refuse")
        ]
        if refused:
            raise SmaltiError(self._complaint(refused, findings))
        done = "skipped" if policy == "skip" else "to be replaced"
        for row in damaged:
            logger.warning("%s: %s %s", done, self.pictures.place(row), findings[row].problem)
        if damaged:
            logger.warning("%s %d of %d pictures", done, len(damaged), len(findings))
        if policy == "replace":
            refuse_too_many(len(damaged), self.options.max_bad_images, self.pictures.title)
        if len(damaged) == len(findings):
            raise SmaltiError(
                f"{self.pictures.title} has no picture that can be used: check --data"
            )
        good = [row for row, found in enumerate(findings) if not found.problem]
        self._refuse_lost_classes(good)
        self._rows = good if policy == "skip" else self._rows
        self._findings = [findings[row] for row in self._rows]

    def _complaint(self, refused: list[int], findings: list[Finding]) -> str:
        first = findings[refused[0]]
        hint = ", or pass --folder.bad_images replace (or skip)" if first.undecodable else ""
        more = f" (and {len(refused) - 1} more cannot be used)" if len(refused) > 1 else ""
        return f"{self.pictures.place(refused[0])} {first.problem}{hint}{more}"

    def _refuse_lost_classes(self, good: list[int]) -> None:
        """A class that lost all its pictures would be asked for, and never be learned."""
        before, after = (set(labels.tolist()) for labels in (self.pictures.labels, self._of(good)))
        for label in sorted(before - after):
            raise SmaltiError(
                f'no picture of the class "{self.classes[label]}" in {self.pictures.title} can be '
                "decoded: replace them, or remove the class"
            )

    def _of(self, rows: list[int]) -> torch.Tensor:
        return self.pictures.labels[rows]


def refuse_too_many(bad: int, limit: int, title: str) -> None:
    """Raise `SmaltiError` if more pictures are bad than may be replaced."""
    if bad > limit:
        raise SmaltiError(
            f"{title} has {bad} bad pictures or more, and --folder.max_bad_images allows {limit}: "
            "look at them with smalti check-data"
        )
