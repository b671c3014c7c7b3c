"""Pictures in WebDataset shards: tar files whose members 000017.jpg, 000017.cls (the label) and
000017.txt (the captions) form a sample.

The package `webdataset` defines which members form a sample, and writes shards. Reading is written
here, because the readers of the package are streams: here the offsets of all members are listed
once, and pictures are then read by position, so that the order of the data is exact on any number
of processes. Nothing is unpacked, no command of a `pipe:` pattern is run, and members that are
neither pictures nor labels (for example pickles) are never read. A truncated shard is an error, not
a shard with fewer samples: its tar must end correctly, and if there is a manifest beside it, it
must contain the number of samples in the manifest.
"""

import io
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm.auto import tqdm
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from smalti.data.classes import named_classes, names_beside, numbered_classes
from smalti.data.sources.annotations import (
    CAPTIONS,
    LABELS,
    MemberPlace,
    read_captions,
    read_label,
)
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.data.sources.download import local_copies
from smalti.data.sources.listing import (
    EXTENSIONS,
    HIDDEN,
    SPECIAL,
    UNNAMED,
    PassedOver,
    expand_braces,
    is_special,
    kind_of,
    matching,
    printable,
    split_pattern,
)
from smalti.data.sources.shard_manifest import (
    BESIDE_SHARDS,
    MANIFESTS,
    check_count,
    read_manifest,
    refuse_missing,
)
from smalti.errors import DataError, SmaltiError
from smalti.files import write_json

logger = logging.getLogger(__name__)

MAX_ANNOTATION_BYTES = 2**20  # of a member with a label or captions

# -- Patterns of shards: {000..009}, *, a folder, or a URL ----------------------------------------

COMPRESSED = (".tar.gz", ".tgz", ".tar.zst")


def expand_shards(spec: str) -> list[str]:
    """Paths or URLs of shards, in order: {000..009} is a range, {a,b} a list, * and ? are globs.

    Raises:
        DataError: a command instead of files, no such files, or a malformed pattern.
    """
    if spec.startswith("pipe:") or "::" in spec:
        raise DataError(
            f"--data is {spec}: commands and chained locations are not run; name files or URLs"
        )
    if spec.endswith(COMPRESSED):
        raise DataError(f"--data is {spec}: decompress the shards, then name the .tar files")
    if "://" in spec:
        return expand_braces(spec)
    literal, rest = split_pattern(Path(spec).expanduser())
    found = [path for name in expand_braces(rest) for path in _files(literal / name)]
    if not found:
        raise DataError(f"no shards match {spec}: check --data")
    return [str(path) for path in found]


def _files(pattern: Path) -> list[Path]:
    if not pattern.is_dir():
        return matching(pattern) or ([] if _is_glob(str(pattern)) else [pattern])
    found, passed = [], PassedOver()
    for path in sorted(pattern.iterdir()):
        if path.name.endswith(COMPRESSED):
            raise DataError(f"{path} would be ignored: decompress it, or move it away")
        if path.suffix == ".tar" and path.name[0] != "." and not is_special(path):
            found.append(path)
        elif path.name not in BESIDE_SHARDS:
            passed.add(SPECIAL if is_special(path) else kind_of(path.name), path.name)
    if passed.total:
        logger.warning("ignored %d files in %s: %s", passed.total, pattern, passed)
    return found


def _is_glob(text: str) -> bool:
    return any(letter in text for letter in "*?[")


# -- Writing --------------------------------------------------------------------------------------


def tar_writer(stream: BinaryIO) -> TarWriter:
    """A writer without times and owners: equal samples give equal bytes."""
    return TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False)


def write_sample(archive: TarWriter, key: str, members: Mapping[str, bytes]) -> None:
    """Write the members of a sample, by extension, in the order of the mapping."""
    for extension, content in members.items():  # in one call TarWriter would sort them
        archive.write({"__key__": key, extension: content})


# -- The samples of one shard ---------------------------------------------------------------------

BLOCK = 512  # bytes; a tar consists of such blocks, and ends with two blocks of zeros
PADDING = tarfile.RECORDSIZE  # bytes of zeros that may follow them, at most
META = re.compile(r"__[^/]*__($|/)")  # names that `webdataset` skips
MAX_HEADER_BYTES = 2**20  # of one member; those of PAX are the longest


@dataclass(frozen=True, slots=True)
class Span:
    """The position of captions in a shard: a text file, or a key of a .json member."""

    name: str
    offset: int
    size: int
    key: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """The position of a sample's picture, its label, and the position of its captions."""

    shard: int
    key: str
    suffix: str  # from the first dot of the file name: ".png", or ".left.png"
    offset: int
    size: int
    label: int | str | None
    captions: Span | None = None


@dataclass
class Listing:
    """What is passed over in shards, and where their labels and captions are."""

    place: MemberPlace = LABELS
    captions: MemberPlace = CAPTIONS
    captions_problem: str = ""  # of the first sample whose captions cannot be read
    members: PassedOver = field(default_factory=PassedOver)  # of samples that have a picture
    samples: PassedOver = field(default_factory=PassedOver)  # without a picture that can be read


@dataclass
class _Sample:
    """The members of one key by suffix, ".png" or ".left.png"."""

    pictures: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    annotations: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # labels and captions
    others: list[str] = field(default_factory=list)  # names of members of other kinds


class _Headers(io.BufferedReader):
    """A shard of which only headers and labels are read, at most `MAX_HEADER_BYTES` at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def list_members(path: Path, number: int = 0, listing: Listing | None = None) -> list[Member]:
    """The samples of a shard in the order of their pictures.

    As in `webdataset`, the key of a member is its name up to the first dot of the last part, and
    the part after the last dot is its kind. If a key has several pictures, the one with a single
    dot, 000017.jpg, is the sample's.

    Args:
        listing: says where the labels are, and counts what is passed over.

    Raises:
        DataError: see `ShardPictures`.
    """
    listing = listing or Listing()
    samples: dict[str, _Sample] = {}
    try:
        if is_special(path):
            raise DataError(f"the shard {path} is a pipe or a device, not a file: check --data")
        with (
            _Headers(io.FileIO(path)) as stream,
            tarfile.open(fileobj=stream, mode="r:") as archive,
        ):
            length = path.stat().st_size
            for info in archive:
                # After a negative size the next header would be this one again, without end.
                if info.size < 0 or (info.isreg() and info.offset_data + info.size > length):
                    raise tarfile.ReadError(f"{printable(info.name)} has {info.size} bytes")
                _add_to_sample(path, info, samples, listing)
            stream.seek(archive.offset)
            _check_end(stream.read(2 * BLOCK + PADDING + 1))
            members = [
                _member_of(path, stream, number, key, sample, listing)
                for key, sample in samples.items()
            ]
    except SmaltiError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, RecursionError) as error:
        raise DataError(f"the shard {path} is cut or damaged ({error}): copy it again") from error
    except OSError as error:
        raise DataError(f"the shard {path} cannot be read ({error}): check --data") from error
    return sorted(filter(None, members), key=lambda member: member.offset)


def _add_to_sample(
    path: Path, info: tarfile.TarInfo, samples: dict[str, _Sample], listing: Listing
) -> None:
    """Add a member to the sample of its key, or count it as passed over."""
    if info.isdir():
        return
    key, extension = base_plus_ext(info.name)
    hidden = info.name.rpartition("/")[2].startswith(".") or META.match(info.name)
    if key is None or hidden:
        listing.members.add(HIDDEN if hidden else UNNAMED, info.name)
        return
    suffix = f".{extension}".lower()
    sample = samples.setdefault(key, _Sample())
    if f".{suffix.rpartition('.')[2]}" in EXTENSIONS:
        if suffix in sample.pictures:
            raise DataError(f"{path} holds two pictures for {key}: rename one")
        sample.pictures[suffix] = info
        return
    if suffix.endswith(listing.place.suffixes + listing.captions.suffixes):
        if suffix in sample.annotations:
            raise DataError(f"{path} holds {info.name} twice: remove one")
        sample.annotations[suffix] = info
    else:
        sample.others.append(info.name)


def _member_of(
    path: Path, stream: BinaryIO, number: int, key: str, sample: _Sample, listing: Listing
) -> Member | None:
    """The picture of a sample with its label; None if it has no picture and no label."""
    candidates = [suffix for suffix in sample.pictures if suffix.count(".") == 1]
    candidates = candidates or list(sample.pictures)
    if len(candidates) > 1:
        raise DataError(f"{path} holds two pictures for {key}: rename one")
    chosen = candidates[0] if candidates else ""
    labels = _annotations_of(sample, chosen, listing.place)
    captions = _annotations_of(sample, chosen, listing.captions)
    # A text file that is the label is no caption; a .json member may hold both.
    captions = {s: info for s, info in captions.items() if s not in labels or s.endswith(".json")}
    used = {chosen, *labels, *captions} if chosen else {*labels}
    unused = sorted({*sample.pictures, *sample.annotations} - used)
    names = [*sample.others, *(key + suffix for suffix in unused)]
    if not chosen:
        if labels:
            raise DataError(_without_picture(path, key, sample))
        listing.samples.add(_kind_of_member(names[0]), names[0])
        return None
    for name in names:
        listing.members.add(_kind_of_member(name), name)
    picture = sample.pictures[chosen]
    _check_member(path, picture)
    values = [_label(path, stream, info, listing.place) for info in labels.values()]
    label = next((value for value in values if value is not None), None)
    found = _captions(path, stream, list(captions.values()), listing)
    for info in labels.values() if label is None else ():
        if found is None or info.name != found.name:
            listing.members.add(".json without a label", info.name)
    return Member(number, key, chosen, picture.offset_data, picture.size, label, found)


def _annotations_of(
    sample: _Sample, picture: str, place: MemberPlace
) -> dict[str, tarfile.TarInfo]:
    """The members that may hold the label, or the captions, of a picture, by suffix: those of
    a.left.png are in a.left.cls or a.cls. The first one with a value is used."""
    stem = picture.rpartition(".")[0]
    wanted = dict.fromkeys(prefix + kind for kind in place.suffixes for prefix in (stem, ""))
    return {s: sample.annotations[s] for s in wanted if s in sample.annotations}


def _captions(
    path: Path, stream: BinaryIO, members: Sequence[tarfile.TarInfo], listing: Listing
) -> Span | None:
    """Where the captions of a sample are. A text file is read only when its captions are used."""
    for info in members:
        key, size = "", info.size
        if not info.isreg() or info.issparse() or size > MAX_ANNOTATION_BYTES:
            continue
        if info.name.lower().endswith(".json"):
            stream.seek(info.offset_data)
            content = stream.read(size)
            try:
                found, key = read_captions(path, info.name, content, listing.captions.json_keys)
            except DataError as error:
                listing.captions_problem = listing.captions_problem or str(error)
                continue
            size = size if found else 0
        if size:
            return Span(info.name, info.offset_data, size, key)
    return None


def _kind_of_member(name: str) -> str:
    """All after the first dot of a member's name: ".mask.png"."""
    return f".{base_plus_ext(name)[1]}".lower()


def _without_picture(path: Path, key: str, sample: _Sample) -> str:
    """Why a label without a picture is refused."""
    if not sample.others:
        return f"{path} holds a label for {printable(key)}, but no picture: write it again"
    name = printable(sample.others[0])
    return (
        f"{path} holds a label for {printable(key)}, but its picture has an unknown extension "
        f"({name}): save it as PNG or JPEG"
    )


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        raise DataError(f"{member.name} in {path} is a link or not a file: store the file itself")


def _label(
    path: Path, stream: BinaryIO, member: tarfile.TarInfo, place: MemberPlace
) -> int | str | None:
    _check_member(path, member)
    if member.size > MAX_ANNOTATION_BYTES:
        if not member.name.lower().endswith(".json"):
            raise DataError(f"{member.name} in {path} is too large for a label: remove it")
        return None  # a .json member with other content
    stream.seek(member.offset_data)
    return read_label(path, member.name, stream.read(member.size), place)


def _check_end(rest: bytes) -> None:
    """Raise `tarfile.ReadError` unless the end mark, and nothing more, follows the last member.

    tarfile stops at the first block of zeros. In an incomplete copy, or if the header of a member
    was lost, all members after it would be missing without an error.
    """
    if len(rest) < BLOCK or rest[:BLOCK].strip(b"\0"):
        raise tarfile.ReadError("no end-of-archive mark")
    if len(rest) > 2 * BLOCK + PADDING or rest.strip(b"\0"):
        raise tarfile.ReadError("more follows its end-of-archive mark")


# -- A set of shards ------------------------------------------------------------------------------


class ShardPictures(EncodedPictures):
    """The samples of shards in order.

    Args:
        expect_all: every shard that a manifest names must exist.

    Raises:
        DataError: a shard is missing or damaged, or a sample has no picture or no label; the
            message names the shard.
    """

    def __init__(
        self,
        title: str,
        shards: Sequence[Path],
        *,
        expect_all: bool,
        place: MemberPlace = LABELS,
        captions: MemberPlace = CAPTIONS,
    ) -> None:
        self.title, self.shards = title, list(shards)
        manifests = {path.parent: read_manifest(path.parent) for path in self.shards}
        if expect_all:
            refuse_missing(self.shards, manifests)
        self._members: list[Member] = []
        listing = Listing(place, captions)
        for number, path in enumerate(tqdm(self.shards, desc="list shards", delay=2, leave=False)):
            members = list_members(path, number, listing)
            check_count(path, len(members), manifests[path.parent])
            self._members += members
        self._without_picture = listing.samples
        self.remarks = _remarks_on(title, listing, self._members)
        for remark in self.remarks:
            logger.warning(remark)
        if not self._members:
            raise DataError(f"{title} holds no pictures: check --data")
        self.classes, self.labels = _labels_of(self.shards, self._members, place)
        self._captions_of_members(listing)

    def _captions_of_members(self, listing: Listing) -> None:
        """Which samples have captions, and in which members."""
        found = [member.captions for member in self._members]
        self.captions_problem = listing.captions_problem
        if not any(found):
            return
        self.captioned = torch.tensor([span is not None for span in found])
        keys = dict.fromkeys(span.key for span in found if span)
        named = [f'"{key}" of the .json members' if key else "the text members" for key in keys]
        self.captions_from = " and ".join(named)

    def captions(self, index: int) -> tuple[str, ...]:
        member = self._members[index]
        if member.captions is None:
            return ()
        shard, span = self.shards[member.shard], member.captions
        with shard.open("rb") as stream:
            stream.seek(span.offset)
            return read_captions(shard, span.name, stream.read(span.size), [span.key])[0]

    def open(self, index: int) -> BinaryIO:
        member = self._members[index]
        with self.shards[member.shard].open("rb") as stream:
            stream.seek(member.offset)
            return io.BytesIO(stream.read(member.size))

    def size(self, index: int) -> int:
        return self._members[index].size

    def name(self, index: int) -> str:
        member = self._members[index]
        return f"{self.shards[member.shard].name}/{member.key}{member.suffix}"

    def place(self, index: int) -> str:
        return f"{self.shards[self._members[index].shard].parent}/{self.name(index)}"

    def write_manifests(self) -> list[Path]:
        """Write beside the shards how many samples each holds, where there is no manifest yet.

        Returns:
            The files that were written.

        Raises:
            DataError: samples without a picture that can be read would not be counted.
        """
        if self._without_picture.total:
            raise DataError(
                f"no manifest is written for {self.title}, because it would not count "
                f"{self._without_picture.total} samples that have no picture that can be read "
                f"({self._without_picture}): save their pictures as PNG or JPEG, or remove them"
            )
        counts = Counter(self.shards[member.shard] for member in self._members)
        written = []
        for folder in sorted({path.parent for path in self.shards}):
            if read_manifest(folder) is None:
                shards = {path.name: counts[path] for path in self.shards if path.parent == folder}
                written.append(folder / MANIFESTS[0])
                write_json(written[-1], {"shards": shards})
        return written


def open_shards(spec: str, options: SourceOptions) -> ShardPictures:
    """Shards by path, by a pattern like {000..009} or *, by their folder, or by URL.

    Shards at a URL are copied to `stream_cache` once; processes that share that folder share the
    work.
    """
    urls, place = expand_shards(spec), MemberPlace.named(options.labels_in, LABELS)
    captions = MemberPlace.named(options.caption_column, CAPTIONS)
    if "://" in spec:
        copies = local_copies(
            *(urls, options.stream_cache, MANIFESTS),
            check=lambda path: list_members(path, listing=Listing(place)),
        )
        return ShardPictures(spec, copies, expect_all=False, place=place, captions=captions)
    expect_all = Path(spec).expanduser().is_dir() or _is_glob(spec)
    shards = [Path(url) for url in urls]
    return ShardPictures(spec, shards, expect_all=expect_all, place=place, captions=captions)


def _remarks_on(title: str, listing: Listing, members: list[Member]) -> tuple[str, ...]:
    """The remarks on what is not read."""
    remarks = []
    if listing.samples.total:
        remarks.append(
            f"ignored {listing.samples.total} samples of {title} without a picture that can be "
            f"read: {listing.samples}; save their pictures as PNG or JPEG"
        )
    if listing.members.total:
        unlabelled = all(member.label is None for member in members)
        hint = "; name the label in --label_column, if one of them has it" if unlabelled else ""
        remarks.append(
            f"ignored {listing.members.total} members of {title} that are neither pictures nor "
            f"labels nor captions: {listing.members}{hint}"
        )
    return tuple(remarks)


def _labels_of(
    shards: Sequence[Path], members: list[Member], place: MemberPlace
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the labels (N,) int64."""
    values = [member.label for member in members]
    if place == LABELS and all(value is None for value in values):
        return (), torch.zeros(len(values), dtype=torch.int64)
    if any(value is None for value in values):
        member = members[values.index(None)]
        suffix = place.suffixes[0]
        key = f' with "{place.json_keys[0]}"' if suffix == ".json" else ""
        raise DataError(
            f"{member.key} in {shards[member.shard]} has no label: add {member.key}{suffix}{key}"
        )
    _refuse_mixed(shards, members)
    if all(type(value) is int for value in values):
        numbers = [int(value or 0) for value in values]
        return numbered_classes(numbers, names_beside(shards[0]), shards[0].parent)
    return named_classes([str(value) for value in values], shards[0].parent)


def _refuse_mixed(shards: Sequence[Path], members: list[Member]) -> None:
    """Raise if some labels are names and others numbers: one name would renumber all classes."""
    named = [member for member in members if type(member.label) is str]
    numbered = [member for member in members if type(member.label) is int]
    if not (named and numbered):
        return
    few, many = sorted((named, numbered), key=len)
    others = "numbers" if many is numbered else "names"
    raise DataError(
        f"{few[0].key} in {shards[few[0].shard]} has the label {few[0].label!r}, but {len(many)} "
        f"other samples have {others}, such as {many[0].label!r}: label all in the same way"
    )
