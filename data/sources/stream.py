"""A stream of samples, written to local shards once.

A stream has no random access, so it could neither be shuffled exactly nor resumed at a step. Hence
what it yields is copied: into shards of equal numbers of samples, each written whole or not at all,
the manifest last. A copy that was interrupted goes on after its last whole shard.
"""

import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from smalti.data.decoding import format_of
from smalti.data.sources.download import alone
from smalti.data.sources.folder import EXTENSIONS
from smalti.data.sources.webdataset import MANIFESTS, ShardPictures, list_members
from smalti.errors import SmaltiError
from smalti.files import replacing, write_json

SHARD_SIZE = 1000  # samples
MANIFEST = MANIFESTS[0]


@dataclass(frozen=True)
class Sample:
    """An encoded picture and its label."""

    content: bytes
    label: int | str | None


def copy_stream(
    folder: Path,
    samples: Callable[[int], Iterator[Sample]],
    *,
    title: str,
    classes: Callable[[], tuple[str, ...] | None],
    request: dict[str, Any],
    shard_size: int = SHARD_SIZE,
) -> ShardPictures:
    """The samples of a stream as local shards in `folder`, which is made if need be.

    Args:
        samples: yields the samples from a position on, in an order that is always the same.
        classes: tells the names of the classes where labels are numbers.
        request: what the stream was asked for; kept in the manifest.

    Raises:
        SmaltiError: the stream holds nothing.
    """
    with alone(folder / MANIFEST):
        if not (folder / MANIFEST).is_file():
            counts = _write_shards(folder, samples, title, shard_size)
            names = classes()
            if names is not None:
                write_json(folder / "classes.json", list(names))
            write_json(folder / MANIFEST, {"shards": counts, "stream": request})
    return ShardPictures(title, sorted(folder.glob("[0-9]*.tar")), expect_all=True)


def _write_shards(
    folder: Path, samples: Callable[[int], Iterator[Sample]], title: str, shard_size: int
) -> dict[str, int]:
    """Write what is missing; how many samples each shard holds."""
    whole = itertools.takewhile(Path.is_file, (_shard(folder, n) for n in itertools.count()))
    counts = {path.name: len(list_members(path)) for path in whole}
    done = sum(counts.values())
    if len(counts) * shard_size != done:  # the last one is short: the stream has ended there
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
        raise SmaltiError(f"the stream of {title} holds no pictures: check --data and --hf.split")
    return counts


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.tar"


def _write_shard(path: Path, samples: list[Sample], first: int) -> None:
    with replacing(path) as temporary, tarfile.open(temporary, "w") as archive:
        for number, sample in enumerate(samples, first):
            _add(archive, f"{number:09d}{_suffix(sample.content)}", sample.content)
            if sample.label is not None:
                _add(archive, f"{number:09d}.cls", str(sample.label).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _suffix(content: bytes) -> str:
    """How files of this kind are called; a damaged picture is kept, and dealt with later."""
    suffix = f".{(format_of(content) or '').lower()}"
    return suffix if suffix in EXTENSIONS else ".png"
