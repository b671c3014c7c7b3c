"""The manifest of a latent cache: what is inside, and which tokenizer made it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from smalti.config import config_from_dict
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.files import read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CacheInfo:
    """The manifest: everything needed to know what a cache holds and whether it is whole."""

    spec: LatentSpec
    classes: tuple[str, ...]
    num_samples: int
    views: tuple[str, ...]  # stored versions of each image, see `views.VIEW_SETS`
    tokenizer_fingerprint: str
    dataset_fingerprint: str  # of the pictures; "" = not known
    shard_size: int  # samples per shard
    # Of rectified flow: hash of what drew the pairs, data | noise, that are stored; "" = latents.
    pairs: str = ""
    imported: str = ""  # hash of what other code encoded, and the user says this tokenizer did
    shards: tuple[str, ...] = ()  # sha256 of each shard file, in order
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if min(self.num_samples, self.shard_size, len(self.views), len(self.classes)) < 1:
            raise SmaltiError(
                f"a cache of {self.num_samples} samples in {len(self.views)} views, of "
                f"{len(self.classes)} classes and {self.shard_size} to a file, would be empty"
            )

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.shard_size)

    def shard_range(self, number: int) -> tuple[int, int]:
        """Which samples are in a shard: from the first up to, not including, the second."""
        start = number * self.shard_size
        return start, min(start + self.shard_size, self.num_samples)

    @property
    def disk_type(self) -> type[np.generic]:
        """What the latents are stored as."""
        match self.spec:
            case CodeSpec():
                return np.uint16 if self.spec.vocab_size <= 2**16 else np.int32
            case ContinuousSpec():
                return np.float16

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one stored view: (L,) codes, or (2C, h, w) numbers."""
        match self.spec:
            case CodeSpec():
                return (self.spec.length,)
            case ContinuousSpec():
                return (2 * self.spec.channels, self.spec.height, self.spec.width)

    def identity(self) -> str:
        """Hash of all that decides a shard's content; stands inside every shard."""
        content = {**asdict(self), "shards": ()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> CacheInfo:
    """The manifest of a finished cache.

    Raises:
        SmaltiError: no such folder, encoding never finished, or the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        why = "is not finished: run encode again" if folder.is_dir() else "does not exist"
        raise SmaltiError(f"the latent cache {folder} {why}")
    info: CacheInfo = config_from_dict(CacheInfo, read_json(path), str(path))
    if info.format_version != FORMAT_VERSION:
        raise SmaltiError(
            f"{path} has format {info.format_version}; this smalti reads {FORMAT_VERSION}"
        )
    if len(info.shards) != info.num_shards:
        raise SmaltiError(
            f"{path} is damaged: it names {len(info.shards)} shards, and {info.num_samples} "
            f"samples in shards of {info.shard_size} make {info.num_shards}: encode again"
        )
    return info
