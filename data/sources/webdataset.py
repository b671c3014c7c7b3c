"""Pictures in WebDataset shards: tar files whose members 000017.jpg and 000017.cls make a sample.

The members' places are listed once, and pictures are then read by position. So any sample is at
hand at any time: the order of the data is exact, at any number of nodes and workers. Nothing is
unpacked, no command of a `pipe:` pattern is run, and members that are neither pictures nor labels
(pickles, say) are never read. A shard that is cut is an error, never fewer samples: its tar must be
closed properly, and hold as many samples as the manifest beside it says, if there is one.
"""

import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm.auto import tqdm

from smalti.data.sources.arrays import class_names, names_beside
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.data.sources.download import local_copies
from smalti.data.sources.folder import EXTENSIONS
from smalti.errors import SmaltiError
from smalti.files import read_json, write_json

# -------------------------------------------------------------------------------------------------
# What the label members of a WebDataset shard say: 000017.cls, 000017.json.

LABELS = (".cls", ".json")  # the first that tells a label counts
JSON_KEYS = ("label", "cls", "class")
MAX_LABEL_BYTES = 2**20


def read_label(shard: Path, name: str, content: bytes) -> int | str | None:
    """A number or the name of a class; None if a .json member says nothing of it.

    Raises:
        SmaltiError: the member holds something else; names it.
    """
    is_json = name.lower().endswith(".json")
    try:
        label: Any = content.decode("utf-8").strip()
        if is_json:
            label = _label_of(json.loads(label))
    except (ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "label"
        raise SmaltiError(f"{name} in {shard} holds no {kind}: write it again") from error
    if isinstance(label, str) and label.removeprefix("-").isdecimal():
        label = int(label)
    if isinstance(label, str) and not all(map(_can_be_printed, label)):
        raise SmaltiError(
            f"{name} in {shard} has the label {label[:40]!a}, which cannot be printed: write it "
            "again"
        )
    if (type(label) is int and label >= 0) or (type(label) is str and label):
        return label
    if is_json:
        return None
    raise SmaltiError(
        f"{name} in {shard} holds no label: it must be a number from 0 on or the name of a class"
    )


def first_label(labels: dict[str, int | str | None]) -> int | str | None:
    """What the members of a sample say together, by suffix."""
    said = (labels.get(suffix) for suffix in LABELS)
    return next((label for label in said if label is not None), None)


def _label_of(values: Any) -> Any:
    if not isinstance(values, dict):
        return None
    return next((values[key] for key in JSON_KEYS if key in values), None)


def _can_be_printed(letter: str) -> bool:
    """Whether it is neither a control character (zero is one) nor half of a character."""
    return unicodedata.category(letter) not in ("Cc", "Cs")


# -------------------------------------------------------------------------------------------------
# Which files a pattern of shards means.

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_SHARDS = 1_000_000
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst")


def expand_shards(spec: str) -> list[str]:
    """Paths or URLs of shards, in order: {000..009} counts, {a,b} lists, * and ? look around.

    Raises:
        SmaltiError: a command instead of files, no such files, or a pattern that cannot be read.
    """
    if spec.startswith("pipe:") or "::" in spec:
        raise SmaltiError(
            f"--data is {spec}: commands and chained locations are not run; name files or URLs"
        )
    if spec.endswith(COMPRESSED):
        raise SmaltiError(f"--data is {spec}: decompress the shards, then name the .tar files")
    names = expand_braces(spec)
    if "://" in spec:
        return names
    paths = [Path(name).expanduser() for name in names]
    found = [path for pattern in paths for path in _files(pattern)]
    if not found:
        raise SmaltiError(f"no shards fit {spec}: check --data")
    return [str(path) for path in found]


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern with {a,b} and {000..009} stands for.

    Raises:
        SmaltiError: braces that hold neither, or too many names.
    """
    choices = [_choices(body, pattern) for body in BRACES.findall(pattern)]
    literals = BRACES.split(pattern)[::2]
    count = 1
    for options in choices:
        count *= len(options)
    if count > MAX_SHARDS:
        raise SmaltiError(f"{pattern} stands for {count} files: more than {MAX_SHARDS}")
    return [
        literals[0] + "".join(a + b for a, b in zip(chosen, literals[1:], strict=True))
        for chosen in product(*choices)
    ]


def _choices(body: str, pattern: str) -> list[str]:
    if found := RANGE.fullmatch(body):
        first, last = found.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        if not 0 <= int(last) - int(first) < MAX_SHARDS:
            raise SmaltiError(f"{{{body}}} in {pattern} does not count upwards: mend the range")
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," in body:
        return body.split(",")
    raise SmaltiError(f"{{{body}}} in {pattern} is neither a range nor a list: {{000..009}} counts")


def _files(pattern: Path) -> list[Path]:
    if pattern.is_dir():
        seen = sorted(path for path in pattern.iterdir() if path.name[0] != ".")
        for path in seen:
            if path.name.endswith(COMPRESSED):
                raise SmaltiError(f"{path} would be passed over: decompress it, or move it away")
        return [path for path in seen if path.suffix == ".tar"]
    if not pattern.exists() and any(letter in str(pattern) for letter in "*?["):
        return [Path(name) for name in sorted(glob(str(pattern)))]
    return [pattern]  # one that is missing is named when it is opened


# -------------------------------------------------------------------------------------------------
# Pictures in WebDataset shards: tar files whose members 000017.jpg and 000017.cls make a sample.

# Beside the shards: {"000.tar": 1000, ...}, the same under "shards", or wids' "shardlist".
MANIFESTS = ("manifest.json", "sizes.json", "_shards.json")
BLOCK = 512  # bytes; a tar consists of such blocks and ends with two zero blocks, or some more:
PADDING = tarfile.RECORDSIZE  # bytes that fill it up, at most


@dataclass(frozen=True, slots=True)
class Member:
    """Where a sample's picture lies, and its label."""

    shard: int
    key: str
    suffix: str
    offset: int
    size: int
    label: int | str | None


class ShardPictures(EncodedPictures):
    """The samples of shards in order.

    Raises:
        SmaltiError: a shard is missing, cut or damaged, or a sample has no picture or label; names
            the shard.
    """

    def __init__(self, title: str, shards: Sequence[Path], *, expect_all: bool) -> None:
        self.title, self.shards = title, list(shards)
        manifests = {path.parent: read_manifest(path.parent) for path in self.shards}
        if expect_all:
            _refuse_missing(self.shards, manifests)
        self._members: list[Member] = []
        for number, path in enumerate(tqdm(self.shards, desc="list shards", delay=2, leave=False)):
            members = list_members(path, number)
            _check_count(path, len(members), manifests[path.parent])
            self._members += members
        if not self._members:
            raise SmaltiError(f"{title} holds no pictures: check --data")
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
        """Note beside the shards how many samples each holds, where no manifest does so already.

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
    """Shards by path, by a pattern like {000..009} or *, by their folder, or behind a URL.

    What lies behind a URL is copied to `stream_cache` once; processes that share that folder share
    the work.
    """
    urls = expand_shards(spec)
    if "://" in spec:
        copies = local_copies(urls, options.stream_cache, MANIFESTS, list_members)
        return ShardPictures(spec, copies, expect_all=False)
    whole = Path(spec).expanduser().is_dir() or any(letter in spec for letter in "*?[")
    return ShardPictures(spec, [Path(url) for url in urls], expect_all=whole)


def list_members(path: Path, number: int = 0) -> list[Member]:
    """The samples of a shard in the order of their pictures.

    Raises:
        SmaltiError: see `ShardPictures`.
    """
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, dict[str, int | str | None]] = {}
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                key, suffix = _split(member.name)
                if suffix not in EXTENSIONS and suffix not in LABELS:
                    continue
                _check_member(path, member, labels.get(key, {}))
                if suffix in LABELS:
                    labels.setdefault(key, {})[suffix] = _label(path, stream, member)
                elif key in pictures:
                    raise SmaltiError(f"{path} holds two pictures for {key}: rename one")
                else:
                    pictures[key] = (suffix, member.offset_data, member.size)
            stream.seek(archive.offset)
            _check_end(stream.read(2 * BLOCK + PADDING + 1))
    except tarfile.TarError as error:
        raise SmaltiError(f"the shard {path} is cut or damaged ({error}): copy it again") from error
    except OSError as error:
        raise SmaltiError(f"the shard {path} cannot be read ({error}): check --data") from error
    _refuse_halves(path, labels.keys() - pictures.keys())
    return [
        Member(number, key, *rest, first_label(labels.get(key, {})))
        for key, rest in pictures.items()
    ]


def read_manifest(folder: Path) -> dict[str, int] | None:
    """How many samples each shard of a folder must hold, if a manifest there says so.

    Raises:
        SmaltiError: the manifest says something else.
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
        raise SmaltiError(
            f"{path} does not tell how many samples each shard has: remove it, or write another "
            "with smalti check-data --write_manifest"
        )
    return content


def _check_count(path: Path, found: int, counts: dict[str, int] | None) -> None:
    if counts is None:
        return
    if path.name not in counts:
        raise SmaltiError(f"the manifest beside {path} does not name it: add it, or remove it")
    if found != counts[path.name]:
        raise SmaltiError(
            f"the shard {path} holds {found} samples, the manifest beside it says "
            f"{counts[path.name]}: copy it again"
        )


def _refuse_missing(
    shards: Sequence[Path], manifests: Mapping[Path, dict[str, int] | None]
) -> None:
    """Where a glob or a folder stands for all shards, all in the manifest must be there."""
    for folder, counts in manifests.items():
        for name in sorted(counts or {}):
            if folder / name not in shards and not (folder / name).is_file():
                raise SmaltiError(f"the shard {folder / name} is missing: its manifest names it")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: what stands before and after the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", f".{extension.lower()}"


def _check_end(rest: bytes) -> None:
    """What follows the last member that was read must be the end mark, and nothing more.

    Zeros are where a copy was not filled in, and a member whose head is zeros would hide all after
    it.

    Raises:
        tarfile.ReadError: it is not.
    """
    if len(rest) < BLOCK or rest[:BLOCK].strip(b"\0"):
        raise tarfile.ReadError("no end-of-archive mark")
    if len(rest) > 2 * BLOCK + PADDING or rest.strip(b"\0"):
        raise tarfile.ReadError("more follows its end-of-archive mark")


def _check_member(path: Path, member: tarfile.TarInfo, labels: Collection[str]) -> None:
    suffix = _split(member.name)[1]
    if not member.isreg() or member.issparse():
        raise SmaltiError(f"{member.name} in {path} is a link or no file: store the file itself")
    if suffix in labels:
        raise SmaltiError(f"{path} holds {member.name} twice: remove one")
    if suffix == ".cls" and member.size > MAX_LABEL_BYTES:
        raise SmaltiError(f"{member.name} in {path} is too large for a label: remove it")


def _label(path: Path, stream: BinaryIO, member: tarfile.TarInfo) -> int | str | None:
    if member.size > MAX_LABEL_BYTES:  # a .json of other things
        return None
    stream.seek(member.offset_data)
    return read_label(path, member.name, stream.read(member.size))


def _refuse_halves(path: Path, keys: Iterable[str]) -> None:
    for key in sorted(keys):
        raise SmaltiError(f"{path} holds a label for {key}, but no picture: write it again")


def _labels_of(
    shards: Sequence[Path], members: list[Member]
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the labels (N,) int64."""
    values = [member.label for member in members]
    if all(value is None for value in values):
        return ("",), torch.zeros(len(values), dtype=torch.int64)
    if any(value is None for value in values):
        member = members[values.index(None)]
        raise SmaltiError(
            f"{member.key} in {shards[member.shard]} has no label: add {member.key}.cls"
        )
    _refuse_mixed(shards, members)
    if all(type(value) is int for value in values):
        numbers = [int(value or 0) for value in values]
        names = class_names(shards[0].parent, names_beside(shards[0]), max(numbers) + 1)
        return names, torch.tensor(numbers)
    names = tuple(sorted({str(value) for value in values}))
    where = {name: number for number, name in enumerate(names)}
    return names, torch.tensor([where[str(value)] for value in values])


def _refuse_mixed(shards: Sequence[Path], members: list[Member]) -> None:
    """One name among numbers would make names of all, in another order: every class another."""
    named = [member for member in members if type(member.label) is str]
    numbered = [member for member in members if type(member.label) is int]
    if not (named and numbered):
        return
    odd, many = sorted((named, numbered), key=len)
    others = "numbers" if many is numbered else "names"
    raise SmaltiError(
        f"{odd[0].key} in {shards[odd[0].shard]} has the label {odd[0].label!r}, but {len(many)} "
        f"other samples have {others}, such as {many[0].label!r}: label all in the same way"
    )
