"""The order of training samples as a pure function of the step.

Resuming therefore needs no saved state, and the order is the same on any number of processes. It is
written here because no library's sampler defines its order as such a function.
"""

import hashlib
from functools import lru_cache

import torch

from smalti.errors import ConfigurationError, DataError

Key = tuple[int, int]  # (epoch, index): which sample, and in which pass over the data


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
        digest = hashlib.sha256(f"{self.seed}/order/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(self.num_samples, generator=generator).tolist()

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
