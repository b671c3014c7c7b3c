"""Verification: every picture of a set is decoded once, before training; and what else is measured
over all of them, in threads."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol, TypeVar

from PIL import Image
from tqdm.auto import tqdm

from smalti.data.image_io import (
    FolderOptions,
    Unusable,
    check_length,
    decode,
    deep_values,
    without_pixel_warning,
)
from smalti.data.value_range import (
    MIN_LEVELS,
    Extent,
    RangeOption,
    ValueCounts,
    ValueRange,
    remedy,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PictureFiles(Protocol):
    """Encoded picture files; see `EncodedPictures`."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> BinaryIO: ...

    def size(self, index: int) -> int: ...

    def name(self, index: int) -> str: ...

    def place(self, index: int) -> str: ...


THREADS = min(8, os.cpu_count() or 1)  # Pillow releases the interpreter lock while it decodes
MAX_FINDINGS = 1_000_000  # kept, so that a process verifies no picture twice


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of decoding a picture file."""

    sha256: str  # of the file
    problem: str | None = None  # why it cannot be used
    undecodable: bool = False  # the file is damaged
    width: int = 0  # upright; 0 where nothing could be decoded
    height: int = 0
    mode: str = ""  # Pillow's name for the colour mode of the file
    extent: Extent | None = None  # of the values of a deep picture
    note: str | None = None  # why its metadata were ignored


def verify(
    pictures: PictureFiles, options: FolderOptions, value_range: ValueRange | None = None
) -> list[Finding]:
    """Decode all pictures of a set, in threads; a progress bar appears if it takes long.

    The remedy for deep pictures that are refused is one for the whole set.
    """
    if len(_FINDINGS) > MAX_FINDINGS:
        _FINDINGS.clear()
    findings = in_threads(
        lambda index: _examine(pictures, index, options, value_range),
        len(pictures),
        "check pictures",
    )
    deep = [found.extent for found in findings if found.extent]
    if not any(found.extent and found.problem for found in findings):
        return findings
    for_all = remedy(deep)
    return [
        replace(found, problem=f"{found.problem}: {for_all}")
        if found.extent and found.problem
        else found
        for found in findings
    ]


def in_threads(work: Callable[[int], T], count: int, title: str) -> list[T]:
    """`work` on 0 to count - 1, results in order; the first exception cancels the rest."""
    Image.init()  # Pillow's plugins cannot be loaded by two threads at once
    with ThreadPoolExecutor(THREADS) as pool, without_pixel_warning():
        try:
            results = pool.map(work, range(count))
            return list(tqdm(results, desc=title, total=count, delay=2, leave=False))
        finally:
            pool.shutdown(cancel_futures=True)


# (sha256, options, value range) -> finding; the problem of a deep picture lacks its remedy, because
# that depends on the set. The splits of a set are opened one after the other, and each stage of a
# demo opens the set again.
_FINDINGS: dict[tuple[str, FolderOptions, ValueRange | None], Finding] = {}


def _examine(
    pictures: PictureFiles, index: int, options: FolderOptions, value_range: ValueRange | None
) -> Finding:
    placeholder = hashlib.sha256(pictures.name(index).encode(errors="surrogateescape")).hexdigest()
    try:
        check_length(pictures.size(index), options)
        with contextlib.closing(pictures.open(index)) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            key = (sha256, options, value_range)
            known = _FINDINGS.get(key)
            if known is None:
                stream.seek(0)
                known = _FINDINGS[key] = _decode(stream, sha256, options, value_range)
            return known
    except Unusable as problem:  # too long to be read
        return Finding(placeholder, str(problem))
    except OSError as error:  # a dangling link, a file without read permission
        reason = f"cannot be decoded ({error}): replace or remove it"
        return Finding(placeholder, reason, undecodable=True)


def _decode(
    stream: BinaryIO, sha256: str, options: FolderOptions, value_range: ValueRange | None
) -> Finding:
    try:
        found = decode(stream, options, value_range)
    except Unusable as problem:
        return Finding(sha256, problem.reason, problem.undecodable, extent=problem.extent)
    size = found.image.size
    return Finding(sha256, None, False, *size, found.mode, found.extent, found.note)


# -- Ranges of values, measured over a set --------------------------------------------------------


def measured_over(
    pictures: PictureFiles, options: FolderOptions, value_range: RangeOption
) -> RangeOption:
    """Percentiles of the values in all deep pictures, each with its value: "0.5%=112".

    Raises:
        DataError: there are no deep pictures, or both percentiles are the same value.
    """
    counts = ValueCounts()

    def count(index: int) -> None:
        with contextlib.suppress(OSError), contextlib.closing(pictures.open(index)) as stream:
            values = deep_values(stream, options)
            if values is not None:
                counts.add(values)

    in_threads(count, len(pictures), "measure values")
    found, remark, levels = counts.measured(value_range)
    logger.log(logging.WARNING if levels < MIN_LEVELS else logging.INFO, remark)
    return found


def without_effect(title: str, value_range: object, deep: int) -> str | None:
    """That a range of values was given for a set without deep pictures; None = it has some.

    Args:
        deep: number of its deep pictures.
    """
    if value_range is None or deep:
        return None
    return (
        f"value_range has no effect on {title}, whose pictures have 8 bits per channel: leave it "
        "out, unless other pictures need it"
    )


def few_levels(pictures: PictureFiles, findings: list[Finding]) -> str | None:
    """How many pictures keep few grey levels within a measured range; None = none of them."""
    extents = [(row, f.extent) for row, f in enumerate(findings) if f.extent and f.extent.kept]
    few = [(e.kept, row, e) for row, e in extents if e.kept < min(MIN_LEVELS, e.distinct // 2 + 1)]
    if not few:
        return None
    kept, row, extent = min(few)
    return (
        f"the value range leaves fewer than {MIN_LEVELS} grey levels in {len(few)} of "
        f"{len(extents)} deep pictures; the fewest, {kept} of {extent.distinct} values, in "
        f"{pictures.place(row)}"
    )
