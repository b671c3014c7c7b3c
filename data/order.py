"""Which samples are used: in training the order, in measurements a part of the held-out set.

The order of training samples is a pure function of the step. Resuming therefore needs no saved
state, and the order is the same on any number of processes. It is written here because no library's
sampler defines its order as such a function.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from smalti.errors import ConfigurationError, DataError

Key = tuple[int, int]  # (epoch, index): which sample, and in which pass over the data


def _permutation(count: int, purpose: str) -> list[int]:
    """A random permutation of 0 to count - 1, the same for the same purpose."""
    digest = hashlib.sha256(purpose.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(count, generator=generator).tolist()


def even_subset(
    labels: Tensor, groups: Sequence[Hashable] | None, count: int, seed: int
) -> list[int]:
    """At most `count` positions of a set, ascending, evenly over its classes and groups.

    Sets are often sorted by class, so their first samples show a few classes only. The classes take
    turns, and so do the groups of a class: the numbers of samples of two classes differ by one at
    most, unless a class has no more samples. All samples are taken if there are no more than
    `count`; otherwise the seed decides among equals.

    Args:
        labels: (N,) int64.
        groups: one for each sample, for example the copies of a picture; None: no sample is related
            to another.
    """
    if count >= len(labels):
        return list(range(len(labels)))
    order, of = _permutation(len(labels), f"{seed}/subset"), labels.tolist()
    if groups is not None:
        order = _in_turns(order, [(label, group) for label, group in zip(of, groups, strict=True)])
    return sorted(_in_turns(order, of)[:count])


def _in_turns(order: Sequence[int], keys: Sequence[Hashable]) -> list[int]:
    """Samples reordered so that keys take turns: the first sample of each key, then the second."""
    seen = Counter[Hashable]()
    turns = {}
    for position in order:
        turns[position] = seen[keys[position]]
        seen[keys[position]] += 1
    return sorted(order, key=turns.__getitem__)  # stable: equal turns stay in order


class DataOrder:
    """An endless shuffled stream of samples, cut into batches.

    Position p of the stream is sample `permutation(epoch)[p % N]` of epoch p // N, so every epoch
    contains each sample exactly once; batch k contains positions k G to (k + 1) G - 1.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int) -> None:
        if num_samples < 1:
            raise DataError("there are no samples to train on: check the data set")
        if global_batch_size < 1:
            raise ConfigurationError(
                f"the batch size is {global_batch_size}; it must be at least 1"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[int]:
        return _permutation(self.num_samples, f"{self.seed}/order/{epoch}")

    def keys(self, step: int) -> list[Key]:
        """The samples of a step, for all processes."""
        first = step * self.global_batch_size
        positions = range(first, first + self.global_batch_size)
        split = (divmod(position, self.num_samples) for position in positions)
        return [(epoch, self._permutation(epoch)[offset]) for epoch, offset in split]

    def shard(self, step: int, rank: int, world_size: int) -> list[Key]:
        """The samples of a step for one process: a contiguous part of `keys(step)`."""
        if self.global_batch_size % world_size:
            raise ConfigurationError(
                f"the batch size {self.global_batch_size} cannot be divided among {world_size} "
                f"processes: use a multiple of {world_size}"
            )
        size = self.global_batch_size // world_size
        return self.keys(step)[rank * size : (rank + 1) * size]
