"""Where pictures come from: one interface, a registry of sources, and a split by group."""

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from smalti.config import nearest
from smalti.data.decoding import FolderOptions
from smalti.errors import SmaltiError

if TYPE_CHECKING:
    from smalti.data.sources.verification import EncodedPictures

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
    from smalti.data.sources.encoded import EncodedSource

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
