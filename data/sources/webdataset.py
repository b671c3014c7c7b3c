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
import math
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import torch
from braceexpand import braceexpand
from tqdm.auto import tqdm
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from smalti.data.classes import named_classes, names_beside, numbered_classes, problem_of, shown
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.data.sources.download import local_copies
from smalti.data.sources.folder import EXTENSIONS
from smalti.errors import DataError
from smalti.files import read_json, write_json

logger = logging.getLogger(__name__)

# -- Labels: the contents of the members 000017.cls and 000017.json -------------------------------

LABELS = (".cls", ".json")  # the first one with a label is used
JSON_KEYS = ("label", "cls", "class")
MAX_LABEL_BYTES = 2**20


def read_label(shard: Path, name: str, content: bytes) -> int | str | None:
    """A number or the name of a class; None if a .json member has no label.

    Raises:
        DataError: the member has other content; the message names it.
    """
    is_json = name.lower().endswith(".json")
    try:
        label: Any = content.decode("utf-8").strip()
        if is_json:
            label = _label_of(json.loads(label))
    except (ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "label"
        raise DataError(f"{name} in {shard} holds no {kind}: write it again") from error
    if isinstance(label, str) and (problem := problem_of(label)):
        raise DataError(f"{name} in {shard} has the label {shown(label)}, which {problem}")
    if isinstance(label, str) and label.removeprefix("-").isdecimal():
        label = int(label)
    if (type(label) is int and label >= 0) or (type(label) is str and label):
        return label
    if is_json:
        return None
    raise DataError(
        f"{name} in {shard} holds no label: it must be a number from 0 on or the name of a class"
    )


def _label_of(values: Any) -> Any:
    if not isinstance(values, dict):
        return None
    return next((values[key] for key in JSON_KEYS if key in values), None)


# -- Patterns of shards: {000..009}, *, a folder, or a URL ----------------------------------------

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_SHARDS = 1_000_000
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
    names = expand_braces(spec)
    if "://" in spec:
        return names
    paths = [Path(name).expanduser() for name in names]
    found = [path for pattern in paths for path in _files(pattern)]
    if not found:
        raise DataError(f"no shards match {spec}: check --data")
    return [str(path) for path in found]


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern with {a,b} and {000..009} expands to.

    They are counted first, because `braceexpand` builds every range in memory.

    Raises:
        DataError: braces with neither a list nor an ascending range, or too many names.
    """
    count = math.prod(_num_alternatives(body, pattern) for body in BRACES.findall(pattern))
    if count > MAX_SHARDS:
        raise DataError(f"{pattern} expands to {count} files; use at most {MAX_SHARDS}")
    if re.search(r"[{}]", BRACES.sub("", pattern)):
        raise DataError(f"the braces in {pattern} are nested or unbalanced: write simple ones")
    return list(braceexpand(pattern, escape=False))


def _num_alternatives(body: str, pattern: str) -> int:
    if found := RANGE.fullmatch(body):
        first, last = map(int, found.groups())
        if last < first:
            raise DataError(f"{{{body}}} in {pattern} is a descending range: swap its ends")
        return last - first + 1
    if "," in body:
        return body.count(",") + 1
    raise DataError(
        f"{{{body}}} in {pattern} is neither a range like {{000..009}} nor a list like {{a,b}}"
    )


def _files(pattern: Path) -> list[Path]:
    if pattern.is_dir():
        seen = sorted(path for path in pattern.iterdir() if path.name[0] != ".")
        for path in seen:
            if path.name.endswith(COMPRESSED):
                raise DataError(f"{path} would be ignored: decompress it, or move it away")
        return [path for path in seen if path.suffix == ".tar"]
    if not pattern.exists() and any(letter in str(pattern) for letter in "*?["):
        return [Path(name) for name in sorted(glob(str(pattern)))]
    return [pattern]  # a missing one is named when it is opened


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
        raise DataError(
            f"the shard {path} holds {found} samples, but {counts[path.name]} are listed in the "
            "manifest beside it: copy it again"
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
KINDS = {*EXTENSIONS, *LABELS}
MAX_KINDS = 10  # kinds of ignored members that a warning names


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
class _Sample:
    """The members of one key by suffix, ".png" or ".left.png"."""

    pictures: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    labels: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def list_members(path: Path, number: int = 0, ignored: Counter[str] | None = None) -> list[Member]:
    """The samples of a shard in the order of their pictures.

    As in `webdataset`, the key of a member is its name up to the first dot of the last part, and
    the part after the last dot is its kind. If a key has several pictures, the one with a single
    dot, 000017.jpg, is the sample's.

    Args:
        ignored: counts the members that are neither the picture nor a label of a sample, by kind.

    Raises:
        DataError: see `ShardPictures`.
    """
    ignored = Counter() if ignored is None else ignored
    samples: dict[str, _Sample] = {}
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for info in archive:
                _add_to_sample(path, info, samples, ignored)
            stream.seek(archive.offset)
            _check_end(stream.read(2 * BLOCK + PADDING + 1))
            members = [
                _member_of(path, stream, number, key, sample, ignored)
                for key, sample in samples.items()
            ]
    except tarfile.TarError as error:
        raise DataError(f"the shard {path} is cut or damaged ({error}): copy it again") from error
    except OSError as error:
        raise DataError(f"the shard {path} cannot be read ({error}): check --data") from error
    return sorted(filter(None, members), key=lambda member: member.offset)


def _add_to_sample(
    path: Path, info: tarfile.TarInfo, samples: dict[str, _Sample], ignored: Counter[str]
) -> None:
    """Add a member to the sample of its key, or count it as ignored."""
    if info.isdir():
        return
    key, extension = base_plus_ext(info.name)
    suffix = f".{extension}".lower() if key else ""
    kind = f".{suffix.rpartition('.')[2]}"
    hidden = info.name.rpartition("/")[2].startswith(".") or META.match(info.name)
    if key is None or hidden or kind not in KINDS:
        ignored["hidden" if hidden else kind if suffix else "without suffix"] += 1
        return
    sample = samples.setdefault(key, _Sample())
    if kind in EXTENSIONS:
        if suffix in sample.pictures:
            raise DataError(f"{path} holds two pictures for {key}: rename one")
        sample.pictures[suffix] = info
    else:
        if suffix in sample.labels:
            raise DataError(f"{path} holds {info.name} twice: remove one")
        sample.labels[suffix] = info


def _member_of(
    path: Path, stream: BinaryIO, number: int, key: str, sample: _Sample, ignored: Counter[str]
) -> Member | None:
    """The picture of a sample with its label; None if it has neither."""
    candidates = [suffix for suffix in sample.pictures if suffix.count(".") == 1]
    candidates = candidates or list(sample.pictures)
    if len(candidates) > 1:
        raise DataError(f"{path} holds two pictures for {key}: rename one")
    chosen = candidates[0] if candidates else ""
    # The label of a.left.png is in a.left.cls or a.cls. The first one with a label is used.
    stem = chosen.rpartition(".")[0]
    wanted = dict.fromkeys(prefix + kind for kind in LABELS for prefix in (stem, ""))
    labels = [sample.labels[suffix] for suffix in wanted if suffix in sample.labels]
    for suffix in {*sample.pictures, *sample.labels} - {chosen, *wanted}:
        ignored[suffix] += 1
    if not chosen:
        if labels:
            raise DataError(f"{path} holds a label for {key}, but no picture: write it again")
        return None
    picture = sample.pictures[chosen]
    _check_member(path, picture)
    values = [_label(path, stream, info) for info in labels]
    label = next((value for value in values if value is not None), None)
    return Member(number, key, chosen, picture.offset_data, picture.size, label)


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        raise DataError(f"{member.name} in {path} is a link or not a file: store the file itself")


def _label(path: Path, stream: BinaryIO, member: tarfile.TarInfo) -> int | str | None:
    _check_member(path, member)
    if member.size > MAX_LABEL_BYTES:
        if member.name.lower().endswith(".cls"):
            raise DataError(f"{member.name} in {path} is too large for a label: remove it")
        return None  # a .json member with other content
    stream.seek(member.offset_data)
    return read_label(path, member.name, stream.read(member.size))


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

    def __init__(self, title: str, shards: Sequence[Path], *, expect_all: bool) -> None:
        self.title, self.shards = title, list(shards)
        manifests = {path.parent: read_manifest(path.parent) for path in self.shards}
        if expect_all:
            _refuse_missing(self.shards, manifests)
        self._members: list[Member] = []
        ignored: Counter[str] = Counter()
        for number, path in enumerate(tqdm(self.shards, desc="list shards", delay=2, leave=False)):
            members = list_members(path, number, ignored)
            _check_count(path, len(members), manifests[path.parent])
            self._members += members
        _warn_of_ignored(title, ignored)
        if not self._members:
            raise DataError(f"{title} holds no pictures: check --data")
        self.classes, self.labels = _labels_of(self.shards, self._members)

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
        """
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
    urls = expand_shards(spec)
    if "://" in spec:
        copies = local_copies(urls, options.stream_cache, MANIFESTS, list_members)
        return ShardPictures(spec, copies, expect_all=False)
    expect_all = Path(spec).expanduser().is_dir() or any(letter in spec for letter in "*?[")
    return ShardPictures(spec, [Path(url) for url in urls], expect_all=expect_all)


def _warn_of_ignored(title: str, ignored: Counter[str]) -> None:
    if ignored:
        kinds = sorted(ignored)
        named = ", ".join(kinds[:MAX_KINDS]) + (", ..." if len(kinds) > MAX_KINDS else "")
        logger.warning(
            "ignored %d members of %s that are neither pictures nor labels (%s)",
            ignored.total(),
            title,
            named,
        )


def _labels_of(
    shards: Sequence[Path], members: list[Member]
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the labels (N,) int64."""
    values = [member.label for member in members]
    if all(value is None for value in values):
        return ("",), torch.zeros(len(values), dtype=torch.int64)
    if any(value is None for value in values):
        member = members[values.index(None)]
        raise DataError(
            f"{member.key} in {shards[member.shard]} has no label: add {member.key}.cls"
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
