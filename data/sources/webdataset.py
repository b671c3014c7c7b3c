"""Pictures in WebDataset shards: tar files whose members 000017.jpg and 000017.cls form a sample.

The package `webdataset` defines which members form a sample, and writes shards. Reading is written
here, because the readers of the package are streams: here the offsets of all members are listed
once, and pictures are then read by position, so that the order of the data is exact on any number
of processes. Nothing is unpacked, no command of a `pipe:` pattern is run, and members that are
neither pictures nor labels (for example pickles) are never read. A truncated shard is an error, not
a shard with fewer samples: its tar must end correctly, and if there is a manifest beside it, it
must contain the number of samples in the manifest.
"""

import io
import json
import logging
import re
import reprlib
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm.auto import tqdm
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from smalti.data.classes import named_classes, names_beside, numbered_classes, problem_of, shown
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
from smalti.errors import DataError, SmaltiError
from smalti.files import read_json, write_json

logger = logging.getLogger(__name__)

# -- Labels: the contents of the members 000017.cls and 000017.json -------------------------------

MAX_LABEL_BYTES = 2**20


@dataclass(frozen=True)
class LabelPlace:
    """Where the label of a sample is; the first suffix, and the first key, with a label is used."""

    suffixes: tuple[str, ...] = (".cls", ".json")
    json_keys: tuple[str, ...] = ("label", "cls", "class")

    @classmethod
    def named(cls, name: str) -> "LabelPlace":
        """The place that `ShardOptions.label` names: a suffix, or a key of .json members."""
        if not name:
            return cls()
        return cls((name.lower(),), ("label",)) if name[0] == "." else cls((".json",), (name,))


USUAL_PLACE = LabelPlace()


def read_label(
    shard: Path, name: str, content: bytes, place: LabelPlace = USUAL_PLACE
) -> int | str | None:
    """A number or the name of a class; None if a .json member has no label.

    Raises:
        DataError: the member has other content; the message names it.
    """
    is_json = name.lower().endswith(".json")
    try:
        label: Any = content.decode("utf-8").strip()
        if is_json:
            label = _label_of(json.loads(label), place.json_keys)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "label"
        raise DataError(f"{printable(name)} in {shard} holds no {kind}: write it again") from error
    if is_json and label is None:
        return None
    if isinstance(label, str) and (problem := problem_of(label)):
        raise DataError(
            f"{printable(name)} in {shard} has the label {shown(label)}, which {problem}"
        )
    if isinstance(label, str) and label.removeprefix("-").isdecimal():
        label = int(label)
    if (type(label) is int and label >= 0) or (type(label) is str and label):
        return label
    raise DataError(
        f"{printable(name)} in {shard} holds no label ({reprlib.repr(label)}): write a number from "
        "0 on or the name of a class, or name the label in --shards.label"
    )


def _label_of(values: Any, keys: Sequence[str]) -> Any:
    if not isinstance(values, dict):
        return None
    return next((values[key] for key in keys if key in values), None)


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


# -- Manifests: the number of samples of each shard -----------------------------------------------

# Beside the shards: {"000.tar": 1000, ...}, the same under "shards", or wids' "shardlist".
MANIFESTS = ("manifest.json", "sizes.json", "_shards.json")
BESIDE_SHARDS = (*MANIFESTS, "classes.json")  # files in the folder of shards that are also read


def read_manifest(folder: Path) -> dict[str, int] | None:
    """The number of samples of each shard in a folder; None without a manifest.

    Raises:
        DataError: the manifest has other content.
    """
    for name in MANIFESTS:
        if (folder / name).is_file():
            return _counts_in(folder / name)
    return None


def _counts_in(path: Path) -> dict[str, int]:
    content: Any = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("shardlist"), list):
        content = {
            Path(str(entry["url"])).name: entry["nsamples"]
            for entry in content["shardlist"]
            if isinstance(entry, dict) and {"url", "nsamples"} <= entry.keys()
        }
    elif isinstance(content, dict) and isinstance(content.get("shards"), dict):
        content = content["shards"]
    if not isinstance(content, dict) or not all(type(count) is int for count in content.values()):
        raise DataError(
            f"{path} does not list the number of samples of each shard: remove it, or write "
            "another with smalti check-data --write_manifest"
        )
    return content


def _check_count(path: Path, found: int, counts: dict[str, int] | None) -> None:
    if counts is None:
        return
    if path.name not in counts:
        raise DataError(
            f"the manifest beside {path} does not name it: add it there, or remove the manifest"
        )
    if found != counts[path.name]:
        remedy = "copy it again"
        if found > counts[path.name]:
            remedy += ", or, if the manifest is wrong, replace that by check-data --write_manifest"
        raise DataError(
            f"the shard {path} holds {found} samples, but {counts[path.name]} are listed in the "
            f"manifest beside it: {remedy}"
        )


def _refuse_missing(
    shards: Sequence[Path], manifests: Mapping[Path, dict[str, int] | None]
) -> None:
    """Raise if a shard that a manifest names does not exist."""
    for folder, counts in manifests.items():
        for name in sorted(counts or {}):
            if folder / name not in shards and not (folder / name).is_file():
                raise DataError(
                    f"the shard {folder / name} is missing, and its manifest names it: copy it"
                )


# -- The samples of one shard ---------------------------------------------------------------------

BLOCK = 512  # bytes; a tar consists of such blocks, and ends with two blocks of zeros
PADDING = tarfile.RECORDSIZE  # bytes of zeros that may follow them, at most
META = re.compile(r"__[^/]*__($|/)")  # names that `webdataset` skips
MAX_HEADER_BYTES = 2**20  # of one member; those of PAX are the longest


@dataclass(frozen=True, slots=True)
class Member:
    """The position of a sample's picture, and its label."""

    shard: int
    key: str
    suffix: str  # from the first dot of the file name: ".png", or ".left.png"
    offset: int
    size: int
    label: int | str | None


@dataclass
class Listing:
    """What is passed over in shards, and where their labels are."""

    place: LabelPlace = USUAL_PLACE
    members: PassedOver = field(default_factory=PassedOver)  # of samples that have a picture
    samples: PassedOver = field(default_factory=PassedOver)  # without a picture that can be read


@dataclass
class _Sample:
    """The members of one key by suffix, ".png" or ".left.png"."""

    pictures: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    labels: dict[str, tarfile.TarInfo] = field(default_factory=dict)
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
    elif suffix.endswith(listing.place.suffixes):
        if suffix in sample.labels:
            raise DataError(f"{path} holds {info.name} twice: remove one")
        sample.labels[suffix] = info
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
    # The label of a.left.png is in a.left.cls or a.cls. The first one with a label is used.
    stem = chosen.rpartition(".")[0]
    places = listing.place.suffixes
    wanted = dict.fromkeys(prefix + kind for kind in places for prefix in (stem, ""))
    labels = [sample.labels[suffix] for suffix in wanted if suffix in sample.labels]
    unused = sorted({*sample.pictures, *sample.labels} - {chosen, *wanted})
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
    values = [_label(path, stream, info, listing.place) for info in labels]
    label = next((value for value in values if value is not None), None)
    for info in labels if label is None else ():
        listing.members.add(".json without a label", info.name)
    return Member(number, key, chosen, picture.offset_data, picture.size, label)


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
    path: Path, stream: BinaryIO, member: tarfile.TarInfo, place: LabelPlace
) -> int | str | None:
    _check_member(path, member)
    if member.size > MAX_LABEL_BYTES:
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
        place: LabelPlace = USUAL_PLACE,
    ) -> None:
        self.title, self.shards = title, list(shards)
        manifests = {path.parent: read_manifest(path.parent) for path in self.shards}
        if expect_all:
            _refuse_missing(self.shards, manifests)
        self._members: list[Member] = []
        listing = Listing(place)
        for number, path in enumerate(tqdm(self.shards, desc="list shards", delay=2, leave=False)):
            members = list_members(path, number, listing)
            _check_count(path, len(members), manifests[path.parent])
            self._members += members
        self._without_picture = listing.samples
        self.remarks = _remarks_on(title, listing, self._members)
        for remark in self.remarks:
            logger.warning(remark)
        if not self._members:
            raise DataError(f"{title} holds no pictures: check --data")
        self.classes, self.labels = _labels_of(self.shards, self._members, place)

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
    urls, place = expand_shards(spec), LabelPlace.named(options.shards.label)
    if "://" in spec:
        copies = local_copies(
            *(urls, options.stream_cache, MANIFESTS),
            check=lambda path: list_members(path, listing=Listing(place)),
        )
        return ShardPictures(spec, copies, expect_all=False, place=place)
    expect_all = Path(spec).expanduser().is_dir() or _is_glob(spec)
    return ShardPictures(spec, [Path(url) for url in urls], expect_all=expect_all, place=place)


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
        hint = "; name the label in --shards.label, if one of them has it" if unlabelled else ""
        remarks.append(
            f"ignored {listing.members.total} members of {title} that are neither pictures nor "
            f"labels: {listing.members}{hint}"
        )
    return tuple(remarks)


def _labels_of(
    shards: Sequence[Path], members: list[Member], place: LabelPlace
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the labels (N,) int64."""
    values = [member.label for member in members]
    if place == USUAL_PLACE and all(value is None for value in values):
        return ("",), torch.zeros(len(values), dtype=torch.int64)
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
