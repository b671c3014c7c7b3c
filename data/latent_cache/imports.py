"""Latents that other code encoded -> latent caches of smalti, train/ and heldout/.

They do not say which tokenizer made them. The user does, by naming one: its fingerprint stands in
the caches, and only sizes can be checked against it. Of a held-out sample the first view is kept.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from smalti.config import check_at_least
from smalti.data.latent_cache.cache import (
    SPLITS,
    CacheInfo,
    EncodedRange,
    refuse_other_contents,
    write_cache,
)
from smalti.data.latents import LatentSpec
from smalti.data.sources.arrays import class_names, names_beside
from smalti.data.sources.base import divide
from smalti.errors import SmaltiError

Format = Literal["llamagen", "lightningdit"]
FORMATS: dict[Format, str] = {
    "llamagen": "smalti.data.latent_cache.llamagen:LlamaGenCodes",
    "lightningdit": "smalti.data.latent_cache.lightningdit:LightningDiTLatents",
}


@dataclass(frozen=True)
class Origin:
    """The tokenizer that is said to have made the latents."""

    spec: LatentSpec
    fingerprint: str
    # What it normalises continuous latents with, per channel: (z - mean) / std.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class ForeignLatents(ABC):
    """Latents in files of other code, in a fixed order.

    Raises:
        SmaltiError: a file is missing, damaged, or does not fit the tokenizer; it is named.
    """

    folder: Path  # where they are; classes.json there may name the classes
    views: tuple[str, ...]  # the plainest first
    labels: Tensor  # (N,) int64
    fingerprint: str  # changes with the files

    @abstractmethod
    def __init__(self, source: Path, origin: Origin, *, normalised: bool) -> None: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """All views of some samples as a cache stores them, (n, views, ...)."""


def open_foreign(source: Path, layout: Format, origin: Origin, normalised: bool) -> ForeignLatents:
    """Latents of another code in their files; see its class for the arguments."""
    if not source.is_dir():
        raise SmaltiError(f"the folder {source} does not exist: check where the latents are")
    module, _, name = FORMATS[layout].partition(":")
    return getattr(importlib.import_module(module), name)(source, origin, normalised=normalised)


@dataclass(frozen=True)
class Division:
    """How imported samples are divided and written."""

    heldout_fraction: float = 0.1
    split_seed: int = 0
    shard_size: int = 8192  # samples per file
    num_samples: int = 0  # how many there must be; 0 = not known

    def __post_init__(self) -> None:
        check_at_least(1, self, "shard_size")
        check_at_least(0, self, "num_samples")


def import_latents(
    latents: ForeignLatents,
    origin: Origin,
    out: Path,
    division: Division,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda samples: None,
) -> None:
    """Write the caches out/train and out/heldout; an interrupted import goes on.

    Args:
        rank, world_size, barrier, progress: see `write_cache`.

    Raises:
        SmaltiError: see `ForeignLatents` and `write_cache`; or names or counts do not fit.
    """
    count = len(latents.labels)
    if division.num_samples not in (0, count):
        raise SmaltiError(
            f"{latents.folder} holds {count} samples, and --num_samples says "
            f"{division.num_samples}: copy what is missing"
        )
    beside = latents.folder / "classes.json"
    classes = class_names(beside, names_beside(beside), int(latents.labels.max()) + 1)
    groups = [str(index) for index in range(count)]
    heldout = divide(latents.labels, groups, division.heldout_fraction, division.split_seed)
    refuse_other_contents(out)
    for split, chosen in zip(SPLITS, (~heldout, heldout), strict=True):
        positions = chosen.nonzero().flatten().tolist()
        views = latents.views if split == "train" else latents.views[:1]
        info = CacheInfo(
            spec=origin.spec,
            classes=classes,
            num_samples=len(positions),
            views=views,
            tokenizer_fingerprint=origin.fingerprint,
            dataset_fingerprint="",
            shard_size=division.shard_size,
            imported=latents.fingerprint,
        )
        write_cache(
            out / split,
            info,
            _Reader(latents, positions, len(views)),
            rank=rank,
            world_size=world_size,
            barrier=barrier,
            progress=progress,
        )


@dataclass
class _Reader:
    """(start, stop) -> the samples at these places of a split."""

    latents: ForeignLatents
    positions: list[int]
    num_views: int

    def __call__(self, start: int, stop: int) -> EncodedRange:
        chosen = self.positions[start:stop]
        stored = self.latents.read(chosen)[:, : self.num_views]
        return EncodedRange(stored, self.latents.labels[torch.tensor(chosen)])
