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
    groups of every class, chosen by a hash of (seed, group).

    The choice depends on nothing else: not on the order or number of the other pictures.

    Raises:
        SmaltiError: the fraction is not in (0, 1), or one side would be empty.
    """
    if source.heldout is not None:
        return source.heldout
    if not 0 < fraction < 1:
        raise SmaltiError(f"heldout_fraction is {fraction}; it must lie between 0 and 1")
    ranks = [_unit_hash(seed, source.group(index)) for index in range(len(source))]
    mask = torch.tensor(ranks) < fraction
    if not mask.any():  # a tiny set: hold out the group with the smallest hash
        mask = torch.tensor(ranks) == min(ranks)
    if mask.all():
        raise SmaltiError(
            f"{len(source)} pictures are too few to hold out {fraction:.0%} of them: add pictures"
        )
    return mask


def _unit_hash(seed: int, text: str) -> float:
    digest = hashlib.sha256(f"{seed}/split/{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def fingerprint_of(parts: Sequence[bytes]) -> str:
    """sha256 over length-prefixed parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
