"""Latents on several grids: a latent cache for each aspect-ratio bucket, read as one set.

    latents/
        buckets.json             the sizes of the images, and the hashes of the manifests
        64x64/train/ heldout/    ordinary latent caches, of the pictures of this bucket
        48x80/train/ heldout/

A batch has the latents of one bucket, because they have one shape.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalti.data.buckets import bucket_name
from smalti.data.latent_cache.cache import LatentBatch, LatentCache
from smalti.data.latent_cache.manifest import (
    BUCKETS,
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    CacheInfo,
    bucket_folders,
)
from smalti.data.latent_cache.splits import differing_part, open_splits
from smalti.data.latents import ContinuousSpec
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder, Key, even_subset
from smalti.errors import DataError
from smalti.files import write_hashed_json

# -- The order of training ------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, odd
RANGE = 2**64


class BucketOrder(DataOrder):
    """A bucket for each step, and its samples in the order of `DataOrder`.

    Step s takes the bucket in whose part of [0, 1) the fractional part of x + s g lies, where x
    depends on the seed, g is the inverse golden ratio, and the length of a part is the share of the
    bucket's samples. Of all additive recurrences this one is spread most evenly (Knuth, The Art of
    Computer Programming 3, section 6.4, theorem S): after any number of steps the buckets have been
    taken in proportion to their sizes, up to a few steps. Like `DataOrder` it is a pure function of
    the step, in integers, so that resumed runs and any number of processes agree.
    """

    def __init__(self, sizes: Sequence[int], global_batch_size: int, seed: int) -> None:
        super().__init__(sum(sizes), global_batch_size, seed)
        digest = hashlib.blake2b(f"{seed}/buckets".encode(), digest_size=8).digest()
        self._start = int.from_bytes(digest, "big")
        self._firsts = [0, *accumulate(sizes)]  # the first sample of each bucket, and the end
        self._limits = [RANGE * first // self.num_samples for first in self._firsts]
        self._orders = [
            DataOrder(size, global_batch_size, seed + number) for number, size in enumerate(sizes)
        ]

    def bucket(self, step: int) -> int:
        """The number of the bucket of a step."""
        place = (self._start + step * GOLDEN) % RANGE
        return next(n for n, limit in enumerate(self._limits[1:]) if place < limit)

    def earlier_steps(self, step: int, bucket: int) -> int:
        """How many of the steps before `step` take a bucket."""
        low, high = self._limits[bucket : bucket + 2]
        # (x + s g) mod R lies in [low, high) where floor((x + s g - low) / R) is larger by one than
        # floor((x + s g - high) / R), and is equal to it elsewhere.
        return sum(
            sign * sum_of_floors(step, RANGE, GOLDEN, self._start - limit)
            for sign, limit in ((1, low), (-1, high))
        )

    def keys(self, step: int) -> list[Key]:
        """The samples of a step, all of one bucket, for all processes."""
        bucket = self.bucket(step)
        first = self._firsts[bucket]
        turn = self.earlier_steps(step, bucket)
        return [(epoch, first + index) for epoch, index in self._orders[bucket].keys(turn)]


def sum_of_floors(count: int, divisor: int, slope: int, offset: int) -> int:
    """The sum of floor((slope s + offset) / divisor) over s from 0 to count - 1, in O(log divisor)
    steps: lattice points below a line, counted as in Euclid's algorithm."""
    total = 0
    while count:
        total += count * (count - 1) // 2 * (slope // divisor) + count * (offset // divisor)
        slope, offset = slope % divisor, offset % divisor
        top = slope * count + offset
        count, offset = divmod(top, divisor)
        divisor, slope = slope, divisor
    return total


# -- Reading --------------------------------------------------------------------------------------


class BucketedLatents(Dataset):
    """The latents of one split in several buckets, with the interface of `LatentCache`.

    Samples are counted through all buckets. The keys of one batch are those of one bucket.
    """

    def __init__(self, folder: Path, caches: Sequence[LatentCache]) -> None:
        self.folder, self.caches = folder, tuple(caches)
        self.labels = torch.cat([cache.labels for cache in caches])
        self._firsts = [0, *accumulate(map(len, caches))]

    @property
    def info(self) -> CacheInfo:
        """The manifest of the first bucket, whose size is the default of a prior."""
        return self.caches[0].info

    @property
    def spec(self) -> ContinuousSpec:
        """That of the first bucket."""
        spec = self.info.spec
        assert isinstance(spec, ContinuousSpec), "codes have no buckets"
        return spec

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The grid (h, w) of each bucket."""
        return tuple(map(_grid_of, self.caches))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def place(self) -> str:
        """Where the latents are, for messages."""
        return str(self.folder)

    @property
    def fingerprint(self) -> str:
        """Hash of the manifests of all buckets, in their order."""
        parts = "/".join(cache.fingerprint for cache in self.caches)
        return hashlib.sha256(f"buckets/{parts}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitems__(self, keys: Sequence[Key]) -> LatentBatch:
        number, first = self._bucket_of(keys[0][1])
        inside = [(epoch, index - first) for epoch, index in keys]
        return self._of_bucket(number, self.caches[number].__getitems__(inside))

    def first_view(self, indices: Sequence[int]) -> LatentBatch:
        """The first view of some samples of one bucket, for evaluation; and their first
        captions."""
        number, first = self._bucket_of(indices[0])
        batch = self.caches[number].first_view([index - first for index in indices])
        return self._of_bucket(number, batch)

    def batches_of(self, indices: Sequence[int], size: int) -> Iterator[LatentBatch]:
        """The first view of some samples, at most `size` at a time: those of a bucket, then those
        of the next."""
        for first, end in zip(self._firsts, self._firsts[1:], strict=False):
            inside = [index for index in indices if first <= index < end]
            for start in range(0, len(inside), size):
                yield self.first_view(inside[start : start + size])

    def even_subset(self, count: int, seed: int) -> list[int]:
        """At most `count` samples, evenly over classes and groups, to measure."""
        groups = [
            (number, group)
            for number, cache in enumerate(self.caches)
            for group in cache.info.groups or range(-len(cache), 0)
        ]
        return even_subset(self.labels, groups, count, seed)

    def all_captions(self, indices: Sequence[int]) -> list[tuple[str, ...]] | None:
        """The texts of some samples; None if the cache has none."""
        if not self.info.captions:
            return None
        places = [(*self._bucket_of(index), index) for index in indices]
        found = [self.caches[n].all_captions([index - first]) for n, first, index in places]
        return [texts[0] for texts in found if texts is not None]

    def order(self, batch_size: int, seed: int) -> BucketOrder:
        """The order of training: every step has the samples of one bucket."""
        return BucketOrder([len(cache) for cache in self.caches], batch_size, seed)

    def batches(self, order: DataOrder, **share: Any) -> Iterator[list[LatentBatch]]:
        """The batches of each step in this process; for `share` see `stream_batches`."""
        return stream_batches(self, order, **share)

    def _bucket_of(self, index: int) -> tuple[int, int]:
        """The number of the bucket of a sample, and the first sample of that bucket."""
        number = next(n for n, end in enumerate(self._firsts[1:]) if index < end)
        return number, self._firsts[number]

    def _of_bucket(self, number: int, batch: LatentBatch) -> LatentBatch:
        indices: Tensor = batch.indices + self._firsts[number]
        return replace(batch, indices=indices, grid=_grid_of(self.caches[number]))


def _grid_of(cache: LatentCache) -> tuple[int, int]:
    spec = cache.spec
    if not isinstance(spec, ContinuousSpec):
        raise DataError(
            f"{cache.folder} holds codes, and a bucket has continuous latents: encode again"
        )
    return spec.height, spec.width


def write_buckets(folder: Path, sizes: Sequence[Any]) -> None:
    """Write the list of the buckets in a folder, when all of their caches are finished.

    Args:
        sizes: of the images, in pixels; the first one is the default of a prior.
    """
    names = [bucket_name(size) for size in sizes]
    manifests = [f"{name}/{split}/{MANIFEST}" for name in names for split in SPLITS]
    written = [path for path in manifests if (folder / path).is_file()]
    content = {"format_version": FORMAT_VERSION, "buckets": names}
    write_hashed_json(folder / BUCKETS, content, written)


def open_buckets(folder: Path, *, seed: int = 0) -> tuple[BucketedLatents, BucketedLatents]:
    """The training and the held-out latents of a folder with buckets.

    Args:
        seed: of the views of training latents.

    Raises:
        DataError: a cache is missing or damaged, or two do not belong together.
    """
    train, heldout = list[LatentCache](), list[LatentCache]()
    for inside in bucket_folders(folder):
        if (inside / SPLITS[1]).is_dir():
            pair = open_splits(inside, seed=seed)
            heldout.append(pair[1])
            train.append(pair[0])
        else:  # no held-out picture has this shape
            train.append(LatentCache(inside / SPLITS[0], seed=seed))
    for cache in (*train[1:], *heldout):
        if part := differing_part(train[0], cache, same_grid=False):
            raise DataError(
                f"{train[0].folder} and {cache.folder} do not belong together, because the {part} "
                "differs: write both with one command into a new folder"
            )
    for cache in train:
        _grid_of(cache)  # raises
    return BucketedLatents(folder, train), BucketedLatents(folder, heldout)
