"""Where pictures come from: one interface, a registry of named sets, and a split by group."""

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from smalti.config import nearest
from smalti.errors import SmaltiError

if TYPE_CHECKING:
    from smalti.data.folder import FolderOptions

SOURCES: dict[str, str] = {
    "emoji": "smalti.data.embedded:emoji",
    "fashion": "smalti.data.embedded:fashion",
}


class ImageSource(ABC):
    """Labelled pictures with random access, in a fixed order."""

    classes: tuple[str, ...]
    labels: Tensor  # (N,) int64
    fingerprint: str  # changes when any picture or label does
    heldout: Tensor | None = None  # (N,) bool where the set comes with a split of its own

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The picture, RGB, of any size."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the picture in a message."""

    def group(self, index: int) -> str:
        """Pictures of one group always fall on the same side of a split."""
        return self.name(index)


def open_source(spec: str, *, options: "FolderOptions | None" = None) -> ImageSource:
    """A named set ("emoji", "fashion"), or a folder of pictures.

    Raises:
        SmaltiError: neither a known name nor a folder; or the folder's pictures are unusable.
    """
    if spec in SOURCES:
        module, _, attribute = SOURCES[spec].partition(":")
        return getattr(importlib.import_module(module), attribute)()
    from smalti.data.folder import FolderOptions, FolderSource

    folder = Path(spec).expanduser()
    if not folder.exists() and "/" not in spec and nearest(spec, SOURCES).startswith("did"):
        raise SmaltiError(f'no data set is called "{spec}"; {nearest(spec, SOURCES)}')
    return FolderSource(folder, options or FolderOptions())


def heldout_mask(source: ImageSource, fraction: float, seed: int = 0) -> Tensor:
    """Which pictures are held out, (N,) bool: the set's own split, or about `fraction` of the
    groups, chosen by a hash of (seed, group).

    The choice for a group depends on nothing else, neither on the order nor on the number of the
    other pictures, but for one rule: a class with two groups or more has some on either side, and
    a class with a single group keeps it for training.

    Raises:
        SmaltiError: the fraction is not in (0, 1), or nothing could be held out.
    """
    if source.heldout is not None:
        return source.heldout
    if not 0 < fraction < 1:
        raise SmaltiError(f"heldout_fraction is {fraction}; it must lie between 0 and 1")
    groups = [source.group(index) for index in range(len(source))]
    members: dict[int, set[str]] = {}
    for label, group in zip(source.labels.tolist(), groups, strict=True):
        members.setdefault(label, set()).add(group)
    heldout = set[str]()
    for _, of_class in sorted(members.items()):
        heldout |= _held_out_of(of_class, fraction, seed)
    if not heldout:
        raise SmaltiError(
            f"{len(source)} pictures are too few to hold out {fraction:.0%} of them: add pictures"
        )
    return torch.tensor([group in heldout for group in groups])


def _held_out_of(groups: set[str], fraction: float, seed: int) -> set[str]:
    """The held-out groups of one class: those with a small hash, but neither none nor all."""
    ranked = sorted((_unit_hash(seed, group), group) for group in groups)
    count = sum(rank < fraction for rank, _ in ranked)
    count = min(max(count, 1), len(ranked) - 1)
    return {group for _, group in ranked[:count]}


def _unit_hash(seed: int, text: str) -> float:
    # File names may hold bytes that are no Unicode.
    digest = hashlib.sha256(f"{seed}/split/{text}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def fingerprint_of(parts: Sequence[bytes]) -> str:
    """sha256 over length-prefixed parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
