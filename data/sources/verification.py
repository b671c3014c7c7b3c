"""Decode every picture of a set once, to know before training what is wrong with it."""

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from smalti.data.decoding import FolderOptions, Unusable, decode, our_own_pixel_cap

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
