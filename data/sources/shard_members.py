"""The samples of one WebDataset shard: the positions of their pictures, and their labels.

A shard, a local file or one behind a URL, is read once from its beginning to its end; pictures are
passed over. What was found in a remote one is saved as an index in the user's cache folder.
"""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from smalti.data.sources.annotations import (
    CAPTIONS,
    LABELS,
    MemberPlace,
    read_captions,
    read_label,
)
from smalti.data.sources.download import folder_name
from smalti.data.sources.index import cache_folder, read_index, save_index
from smalti.data.sources.listing import (
    EXTENSIONS,
    HIDDEN,
    UNNAMED,
    PassedOver,
    is_special,
    printable,
)
from smalti.data.sources.remote import RemoteFile
from smalti.errors import DataError, SmaltiError

MAX_ANNOTATION_BYTES = 2**20  # of a member with a label or captions
MAX_KEPT_BYTES = 2**14  # of a label that is kept while its shard is listed
Shard = Path | RemoteFile

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

    def merge(self, other: "Listing") -> None:
        """Add what another shard has."""
        self.members.merge(other.members)
        self.samples.merge(other.samples)
        self.captions_problem = self.captions_problem or other.captions_problem


Listed = tuple[list[Member], Listing]  # the samples of a shard, and what is passed over


@dataclass
class _Sample:
    """The members of one key by suffix, ".png" or ".left.png"."""

    pictures: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    annotations: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # labels and captions
    others: list[str] = field(default_factory=list)  # names of members of other kinds


class _Headers(io.BufferedReader):
    """A shard of which only headers and labels are read, at most `MAX_HEADER_BYTES` at a time.

    Short labels are kept when the shard is passed: a server is not asked for each of them again.
    """

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard.raw() if isinstance(shard, RemoteFile) else io.FileIO(shard))
        self._kept: dict[int, bytes] = {}  # by position

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)

    def keep(self, member: tarfile.TarInfo) -> None:
        """Read a label now if it is short."""
        if member.isreg() and member.size <= MAX_KEPT_BYTES:
            self.seek(member.offset_data)
            self._kept[member.offset_data] = self.read(member.size)

    def content(self, member: tarfile.TarInfo) -> bytes:
        """The content of a label."""
        if member.offset_data in self._kept:
            return self._kept[member.offset_data]
        self.seek(member.offset_data)
        return self.read(member.size)


def list_members(path: Shard, number: int = 0, listing: Listing | None = None) -> list[Member]:
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
        remote = isinstance(path, RemoteFile)
        if not remote and is_special(path):
            raise DataError(f"the shard {path} is a pipe or a device, not a file: check --data")
        with _Headers(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            length = path.length if remote else path.stat().st_size
            for info in archive:
                # After a negative size the next header would be this one again, without end.
                if info.size < 0 or (info.isreg() and info.offset_data + info.size > length):
                    raise tarfile.ReadError(f"{printable(info.name)} has {info.size} bytes")
                if _add_to_sample(path, info, samples, listing):
                    stream.keep(info)
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
    path: Shard, info: tarfile.TarInfo, samples: dict[str, _Sample], listing: Listing
) -> bool:
    """Add a member to the sample of its key, or count it as passed over.

    Returns:
        Whether its content may have to be read.
    """
    from webdataset.tariterators import base_plus_ext  # the library takes a tenth of a second

    if info.isdir():
        return False
    key, extension = base_plus_ext(info.name)
    hidden = info.name.rpartition("/")[2].startswith(".") or META.match(info.name)
    if key is None or hidden:
        listing.members.add(HIDDEN if hidden else UNNAMED, info.name)
        return False
    suffix = f".{extension}".lower()
    sample = samples.setdefault(key, _Sample())
    if f".{suffix.rpartition('.')[2]}" in EXTENSIONS:
        if suffix in sample.pictures:
            raise DataError(f"{path} holds two pictures for {key}: rename one")
        sample.pictures[suffix] = info
        return False
    if suffix.endswith(listing.place.suffixes + listing.captions.suffixes):
        if suffix in sample.annotations:
            raise DataError(f"{path} holds {info.name} twice: remove one")
        sample.annotations[suffix] = info
        return suffix.endswith((*listing.place.suffixes, ".json"))
    sample.others.append(info.name)
    return False


def _member_of(
    path: Shard, stream: _Headers, number: int, key: str, sample: _Sample, listing: Listing
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
    path: Shard, stream: _Headers, members: Sequence[tarfile.TarInfo], listing: Listing
) -> Span | None:
    """Where the captions of a sample are. A text file is read only when its captions are used."""
    for info in members:
        key, size = "", info.size
        if not info.isreg() or info.issparse() or size > MAX_ANNOTATION_BYTES:
            continue
        if info.name.lower().endswith(".json"):
            content, keys = stream.content(info), listing.captions.json_keys
            try:
                found, key = read_captions(path, info.name, content, keys)
            except DataError as error:
                listing.captions_problem = listing.captions_problem or str(error)
                continue
            size = size if found else 0
        if size:
            return Span(info.name, info.offset_data, size, key)
    return None


def _kind_of_member(name: str) -> str:
    """All after the first dot of a member's name: ".mask.png"."""
    from webdataset.tariterators import base_plus_ext

    return f".{base_plus_ext(name)[1]}".lower()


def _without_picture(path: Shard, key: str, sample: _Sample) -> str:
    """Why a label without a picture is refused."""
    if not sample.others:
        return f"{path} holds a label for {printable(key)}, but no picture: write it again"
    name = printable(sample.others[0])
    return (
        f"{path} holds a label for {printable(key)}, but its picture has an unknown extension "
        f"({name}): save it as PNG or JPEG"
    )


def _check_member(path: Shard, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        raise DataError(f"{member.name} in {path} is a link or not a file: store the file itself")


def _label(
    path: Shard, stream: _Headers, member: tarfile.TarInfo, place: MemberPlace
) -> int | str | None:
    _check_member(path, member)
    if member.size > MAX_ANNOTATION_BYTES:
        if not member.name.lower().endswith(".json"):
            raise DataError(f"{member.name} in {path} is too large for a label: remove it")
        return None  # a .json member with other content
    return read_label(path, member.name, stream.content(member), place)


def _check_end(rest: bytes) -> None:
    """Raise `tarfile.ReadError` unless the end mark, and nothing more, follows the last member.

    tarfile stops at the first block of zeros. In an incomplete copy, or if the header of a member
    was lost, all members after it would be missing without an error.
    """
    if len(rest) < BLOCK or rest[:BLOCK].strip(b"\0"):
        raise tarfile.ReadError("no end-of-archive mark")
    if len(rest) > 2 * BLOCK + PADDING or rest.strip(b"\0"):
        raise tarfile.ReadError("more follows its end-of-archive mark")


# -- The index of a remote shard -----------------------------------------------------------------


def list_shard(shard: Shard, number: int, labels: MemberPlace, captions: MemberPlace) -> Listed:
    """The samples of a shard; of a remote one from its index, if it has one."""
    remote = isinstance(shard, RemoteFile)
    index = _index_of(shard, labels, captions) if remote else None
    found = index and _from_index(read_index(index), number, Listing(labels, captions))
    if found:
        return found
    listing = Listing(labels, captions)
    members = list_members(shard, number, listing)
    if index:
        save_index(index, _as_index(members, listing))
    return members, listing


def _index_of(shard: RemoteFile, labels: MemberPlace, captions: MemberPlace) -> Path | None:
    """Where the index of a shard is saved; None if a change of the shard would not be noticed."""
    cache = cache_folder()
    if cache is None or not shard.version:
        return None
    identity = repr((str(shard), shard.length, shard.version, labels, captions))
    return shard.beside / f"{folder_name(shard.name, identity)}.json.gz"


def _as_index(members: list[Member], listing: Listing) -> dict[str, Any]:
    passed = {name: asdict(getattr(listing, name)) for name in ("members", "samples")}
    problem = listing.captions_problem
    return {"samples": [astuple(m)[1:] for m in members], "passed": passed, "problem": problem}


def _from_index(index: Any, number: int, listing: Listing) -> Listed | None:
    """What `_as_index` saved."""
    try:
        members = [
            Member(number, *rest, captions=span and Span(*span)) for *rest, span in index["samples"]
        ]
        for name, passed in index["passed"].items():
            setattr(listing, name, PassedOver(Counter(passed["counts"]), passed["first"]))
        listing.captions_problem = index["problem"]
    except (TypeError, LookupError, AttributeError):
        return None
    return members, listing
