"""Which samples are used: which are held out, in training the order, in measurements a part.

The order of training samples is a pure function of the step. Resuming therefore needs no saved
state, and the order is the same on any number of processes. It is written here because no library's
sampler defines its order as such a function.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
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


# -- Division into training and held-out samples ----------------------------------------------


def divide(labels: Tensor, groups: Sequence[str], fraction: float, seed: int = 0) -> Tensor:
    """Which pictures to hold out, (N,) bool: about `fraction` of the groups, by a hash.

    A group is held out if hash(seed, group) < fraction, whatever the order and number of the other
    pictures, with two exceptions: a class with at least two groups has at least one in each split,
    and a class with a single group keeps it for training. A group that occurs in several classes is
    held out only if each of them would hold it out.

    Args:
        labels: (N,) int64.
        groups: one for each picture.

    Raises:
        ConfigurationError: the fraction is not in (0, 1).
        DataError: there are too few pictures to hold any out.
    """
    if not 0 < fraction < 1:
        raise ConfigurationError(f"heldout_fraction is {fraction}; it must lie between 0 and 1")
    members: dict[int, set[str]] = {}
    for label, group in zip(labels.tolist(), groups, strict=True):
        members.setdefault(label, set()).add(group)
    heldout, kept = set[str](), set[str]()
    for _, of_class in sorted(members.items()):
        chosen = _heldout_groups(of_class, fraction, seed)
        heldout |= chosen
        kept |= of_class - chosen
    heldout -= kept
    if not heldout:
        raise DataError(
            f"{len(groups)} pictures are too few to hold out {fraction:.0%} of them: add pictures"
        )
    return torch.tensor([group in heldout for group in groups])


def _heldout_groups(groups: set[str], fraction: float, seed: int) -> set[str]:
    """The held-out groups of one class: those with a small hash, but neither none nor all."""
    ranked = sorted((_unit_hash(seed, group), group) for group in groups)
    count = sum(rank < fraction for rank, _ in ranked)
    count = min(max(count, 1), len(ranked) - 1)
    return {group for _, group in ranked[:count]}


def _unit_hash(seed: int, text: str) -> float:
    """A hash in [0, 1)."""
    # File names may contain bytes that are not UTF-8.
    digest = hashlib.sha256(f"{seed}/split/{text}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# -- A part of a set, and the order of training ---------------------------------------------------


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


@dataclass(frozen=True)
class Blocks:
    """Samples that are stored together, and can only be read together.

    In an order of such samples the blocks are shuffled, and then the samples of each `mixed` blocks
    that follow one another, so that a process reads a block once and keeps `mixed` of them.
    """

    of: Tensor  # (N,) int64: the block of each sample
    mixed: int  # number of blocks

    def part(self, samples: Tensor | Sequence[int]) -> "Blocks":
        """The blocks of some of the samples."""
        return Blocks(self.of[torch.as_tensor(samples, dtype=torch.int64)], self.mixed)


class DataOrder:
    """An endless shuffled stream of samples, cut into batches.

    Position p of the stream is sample `permutation(epoch)[p % N]` of epoch p // N, so every epoch
    contains each sample exactly once; batch k contains positions k G to (k + 1) G - 1.

    Args:
        blocks: of the samples, if they can only be read in blocks.
    """

    def __init__(
        self, num_samples: int, global_batch_size: int, seed: int, blocks: Blocks | None = None
    ) -> None:
        if num_samples < 1:
            raise DataError("there are no samples to train on: check the data set")
        if global_batch_size < 1:
            raise ConfigurationError(
                f"the batch size is {global_batch_size}; it must be at least 1"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.blocks = blocks
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[int]:
        order = _permutation(self.num_samples, f"{self.seed}/order/{epoch}")
        if self.blocks is None:
            return order
        count = int(self.blocks.of.max()) + 1
        place = torch.tensor(_permutation(count, f"{self.seed}/blocks/{epoch}"))
        turns = (place[self.blocks.of] // self.blocks.mixed).tolist()
        return sorted(order, key=turns.__getitem__)  # stable: shuffled within a turn

    def identity(self, data: str) -> str:
        """The fingerprint `data` of the samples, with the blocks, on which their order depends."""
        if self.blocks is None:
            return data
        digest = hashlib.sha256(self.blocks.of.numpy().astype("<i8").tobytes()).hexdigest()
        return f"{data}/{self.blocks.mixed}/{digest}"

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
