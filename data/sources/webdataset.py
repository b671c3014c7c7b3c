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
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from smalti.data.classes import named_classes, names_in, numbered_classes
from smalti.data.sources.annotations import (
    CAPTIONS,
    LABELS,
    MemberPlace,
    read_captions,
)
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.data.sources.download import copy_manifest, folder_name, local_copies, parent_of
from smalti.data.sources.index import cache_folder
from smalti.data.sources.listing import (
    SPECIAL,
    SPLIT_FOLDERS,
    PassedOver,
    expand_braces,
    is_special,
    kind_of,
    matching,
    split_called,
    split_pattern,
    split_word,
)
from smalti.data.sources.remote import RemoteFile
from smalti.data.sources.shard_members import Listing, Member, Shard, list_members, list_shard
from smalti.data.sources.verification import in_threads
from smalti.errors import DataError
from smalti.files import read_json, write_json

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

logger = logging.getLogger(__name__)


# -- The manifest of shards: the number of samples of each, in a JSON file beside them ------------

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


def check_count(path: Path | RemoteFile, found: int, counts: dict[str, int] | None) -> None:
    """Raise `DataError` if a shard does not hold the number of samples that its manifest states.

    Args:
        counts: of the manifest; None: there is none.
    """
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


def refuse_missing(shards: Sequence[Path], manifests: Mapping[Path, dict[str, int] | None]) -> None:
    """Raise `DataError` if a shard that a manifest names does not exist."""
    for folder, counts in manifests.items():
        for name in sorted(counts or {}):
            if folder / name not in shards and not (folder / name).is_file():
                raise DataError(
                    f"the shard {folder / name} is missing, and its manifest names it: copy it"
                )


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


def tar_writer(stream: BinaryIO) -> "TarWriter":
    """A writer without times and owners: equal samples give equal bytes."""
    from webdataset.writer import TarWriter

    return TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False)


def write_sample(archive: "TarWriter", key: str, members: Mapping[str, bytes]) -> None:
    """Write the members of a sample, by extension, in the order of the mapping."""
    for extension, content in members.items():  # in one call TarWriter would sort them
        archive.write({"__key__": key, extension: content})


# -- Shards at a URL that are read in place -------------------------------------------------------


def _part(shard: Shard, offset: int, size: int) -> bytes:
    if isinstance(shard, RemoteFile):
        return shard.part(offset, size)
    with shard.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _remote_files(urls: Sequence[str]) -> list[RemoteFile]:
    cache = cache_folder()

    def find(number: int) -> RemoteFile:
        url = urls[number]
        place = parent_of(url)
        beside = (cache or Path(os.devnull)) / "shards" / folder_name(place, place)
        if cache is not None:
            copy_manifest(url, beside, MANIFESTS)
        return RemoteFile.find(url, beside)

    shards = in_threads(find, len(urls), "find shards")
    logger.info(
        "%d shards are read in place, a request for each sample; --stream_cache FOLDER copies them",
        len(shards),
    )
    return shards


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
        shards: Sequence[Shard],
        *,
        expect_all: bool,
        place: MemberPlace = LABELS,
        captions: MemberPlace = CAPTIONS,
    ) -> None:
        self.title, self.shards = title, list(shards)
        manifests = {path.parent: read_manifest(path.parent) for path in self.shards}
        if expect_all:
            refuse_missing([path for path in shards if isinstance(path, Path)], manifests)
        self._members: list[Member] = []
        listing = Listing(place, captions)
        listed = in_threads(
            lambda number: list_shard(self.shards[number], number, place, captions),
            len(self.shards),
            "list shards",
        )
        for path, (members, found) in zip(self.shards, listed, strict=True):
            check_count(path, len(members), manifests[path.parent])
            self._members += members
            listing.merge(found)
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
        content = _part(shard, span.offset, span.size)
        return read_captions(shard, span.name, content, [span.key])[0]

    def open(self, index: int) -> BinaryIO:
        member = self._members[index]
        return io.BytesIO(_part(self.shards[member.shard], member.offset, member.size))

    def size(self, index: int) -> int:
        return self._members[index].size

    def name(self, index: int) -> str:
        member = self._members[index]
        return f"{self.shards[member.shard].name}/{member.key}{member.suffix}"

    def place(self, index: int) -> str:
        shard = self.shards[self._members[index].shard]
        folder = shard.place if isinstance(shard, RemoteFile) else shard.parent
        return f"{folder}/{self.name(index)}"

    def write_manifests(self) -> list[Path]:
        """Write beside the shards how many samples each holds, where there is no manifest yet.

        Returns:
            The files that were written.

        Raises:
            DataError: samples without a picture that can be read would not be counted, or the
                shards are at a URL.
        """
        if any(isinstance(shard, RemoteFile) for shard in self.shards):
            raise DataError(
                f"{self.title} is at a URL, where nothing can be written: copy it with "
                "--stream_cache FOLDER first"
            )
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
    work. Without it they are read in place, each sample by a request of its own.
    """
    urls, place = expand_shards(spec), MemberPlace.named(options.labels_in, LABELS)
    captions = MemberPlace.named(options.caption_column, CAPTIONS)
    if "://" in spec and options.stream_cache is None and not spec.startswith("file:"):
        shards = _remote_files(urls)
        return ShardPictures(spec, shards, expect_all=False, place=place, captions=captions)
    if "://" in spec:
        copies = local_copies(
            *(urls, options.stream_cache, MANIFESTS),
            check=lambda path: list_members(path, listing=Listing(place)),
        )
        return ShardPictures(spec, copies, expect_all=False, place=place, captions=captions)
    folder, shards = Path(spec).expanduser(), [Path(url) for url in urls]
    if folder.is_dir():
        _refuse_several_splits(folder, shards)
    expect_all = folder.is_dir() or _is_glob(spec)
    return ShardPictures(spec, shards, expect_all=expect_all, place=place, captions=captions)


def _refuse_several_splits(folder: Path, shards: Sequence[Path]) -> None:
    """Raise `DataError` if the names of the shards in a folder tell that they are of several
    splits: read as one set, pictures for validation would be trained on."""
    words = {split_called(word): word for path in shards if (word := split_word(path.name))}
    if len(words) > 1:
        first, second = [words[s] for s in SPLIT_FOLDERS if s in words][:2]
        raise DataError(
            f"the shards in {folder} are of several splits ({', '.join(words.values())}): name "
            f"those to read, for example --data '{folder}/*{first}*.tar' --heldout_data "
            f"'{folder}/*{second}*.tar'"
        )


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
    shards: Sequence[Shard], members: list[Member], place: MemberPlace
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
        return numbered_classes(numbers, names_in(shards[0].parent), shards[0].parent)
    return named_classes([str(value) for value in values], shards[0].parent)


def _refuse_mixed(shards: Sequence[Shard], members: list[Member]) -> None:
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
