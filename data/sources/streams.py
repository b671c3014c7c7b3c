"""Streams of samples, copied once to local shards.

A stream has no random access, so it can neither be shuffled exactly nor resumed at a step. Its
samples are copied to shards of equal numbers of samples, each written atomically, and the manifest
last. An interrupted copy continues after its last finished shard.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from smalti.data.image_io import format_of
from smalti.data.sources.download import locked
from smalti.data.sources.listing import EXTENSIONS
from smalti.data.sources.shard_members import list_members
from smalti.data.sources.webdataset import MANIFESTS, ShardPictures, tar_writer, write_sample
from smalti.errors import DataError
from smalti.files import read_json, replacing, write_json

logger = logging.getLogger(__name__)

SHARD_SIZE = 1000  # samples
MANIFEST = MANIFESTS[0]


@dataclass(frozen=True)
class Sample:
    """An encoded picture, its label and its captions."""

    content: bytes
    label: int | str | None
    captions: tuple[str, ...] = ()


def copy_stream(
    folder: Path,
    samples: Callable[[int], Iterator[Sample]],
    *,
    title: str,
    classes: Callable[[], tuple[str, ...] | None],
    request: dict[str, Any],
    shard_size: int = SHARD_SIZE,
) -> ShardPictures:
    """The samples of a stream as local shards in `folder`, which is created if necessary.

    Args:
        samples: yields the samples from a position on, always in the same order.
        classes: returns the names of the classes where labels are numbers.
        request: the options of the stream, which the manifest records.

    Raises:
        DataError: the stream is empty.
    """
    with locked(folder / MANIFEST):
        if not (folder / MANIFEST).is_file():
            counts = _write_shards(folder, samples, title, shard_size)
            names = classes()
            if names is not None:
                write_json(folder / "classes.json", list(names))
            content = {"shards": counts, "stream": request, "captions": True}
            write_json(folder / MANIFEST, content)
        elif "captions" not in read_json(folder / MANIFEST):
            logger.warning(
                "the copy of %s in %s was made when captions were not copied: if the set has some, "
                "name their column in --caption_column for another copy",
                *(title, folder),
            )
    return ShardPictures(title, sorted(folder.glob("[0-9]*.tar")), expect_all=True)


def _write_shards(
    folder: Path, samples: Callable[[int], Iterator[Sample]], title: str, shard_size: int
) -> dict[str, int]:
    """Write the missing shards; return the number of samples of each."""
    finished = itertools.takewhile(Path.is_file, (_shard(folder, n) for n in itertools.count()))
    counts = {path.name: len(list_members(path)) for path in finished}
    done = sum(counts.values())
    if len(counts) * shard_size != done:  # the last one is shorter: the stream ended there
        return counts
    stream = iter(tqdm(samples(done), desc=f"copy {title}", initial=done, unit=" pictures"))
    for number in itertools.count(len(counts)):
        part = list(itertools.islice(stream, shard_size))
        if part:
            path = _shard(folder, number)
            _write_shard(path, part, number * shard_size)
            counts[path.name] = len(part)
        if len(part) < shard_size:
            break
    if not counts:
        raise DataError(f"the stream of {title} holds no pictures: check --data and --hf.split")
    return counts


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.tar"


def _write_shard(path: Path, samples: list[Sample], first: int) -> None:
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        tar_writer(file) as archive,
    ):
        for number, sample in enumerate(samples, first):
            members = {_extension(sample.content): sample.content}
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            if sample.captions:
                members["txt"] = "\n".join(sample.captions).encode()
            write_sample(archive, f"{number:09d}", members)


def _extension(content: bytes) -> str:
    """The file extension of a picture; a damaged one is copied as it is, and verified later."""
    extension = (format_of(content) or "").lower()
    return extension if f".{extension}" in EXTENSIONS else "png"
