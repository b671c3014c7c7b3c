"""The manifest of a latent cache: what the cache holds, and what determines its shards."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from smalti.config import ADDED, config_from_dict, saved_fields
from smalti.data.classes import check_class_names
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.errors import DataError
from smalti.files import HASHES, check_hashes, read_hashed_json, read_json, recorded_hashes

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")  # a cache for each
BUCKETS = "buckets.json"  # beside the folders of several buckets, see `latent_cache/buckets.py`
TOKENIZER = "tokenizer"  # beside them: the tokenizer that encoded them, if it was in a checkpoint
NAME = re.compile(r"[a-z0-9_]{1,64}")
BUCKET = re.compile(r"[0-9]{1,5}x[0-9]{1,5}")

Rows = Literal["sample", "view", "caption"]


@dataclass(frozen=True)
class StoredCondition:
    """A condition that a cache holds beside the latents, for example features of the captions."""

    name: str  # lower-case letters, digits and _
    shape: tuple[int, ...]  # of one row
    dtype: Literal["bool", "uint8", "uint16", "int32", "int64", "float16", "float32"]
    rows: Rows  # a row for each sample, for each of its views, or for each of its captions
    recipe: str  # hash of all that determines the values, for example of the text encoder

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise DataError(
                f"a condition is called {self.name[:80]!a}: use lower-case letters, digits and _"
            )
        if min(self.shape, default=1) < 1:
            raise DataError(
                f"the rows of the condition {self.name} have shape {self.shape}; each side must be "
                "at least 1"
            )

    @property
    def array(self) -> str:
        """The name of its array in a shard."""
        return f"condition.{self.name}"

    @property
    def disk_type(self) -> np.dtype:
        """The type in which it is stored."""
        return np.dtype(self.dtype)

    @property
    def in_words(self) -> str:
        """What it is, for people."""
        return f"{self.name}, {self.dtype} {self.shape} for each {self.rows}"

    def shape_of(self, samples: int, views: int, captions: int) -> tuple[int, ...]:
        """The shape of its array for so many samples with so many captions in all."""
        rows = {"sample": (samples,), "view": (samples, views), "caption": (captions,)}
        return (*rows[self.rows], *self.shape)


@dataclass(frozen=True)
class CacheInfo:
    """The manifest: the contents of a cache, and everything that determines its shards.

    `stored_shape` and `stored_statistics` are those of the tokenizer, see `Tokenizer.store`. If
    they are (), as in the manifests of smalti 0.1.0, `shape` is that of codes (L,), of the mean and
    std (2C, h, w) of continuous latents, or of pairs of data and noise (2C, h, w).
    """

    spec: LatentSpec
    classes: tuple[str, ...]  # () = the pictures have no classes, and all labels are 0
    num_samples: int
    views: tuple[str, ...]  # stored versions of each image, see `transforms.VIEW_SETS`
    tokenizer_fingerprint: str
    dataset_fingerprint: str  # of the pictures; "" = unknown
    shard_size: int  # samples per shard
    # Hash of the recipe of the stored pairs, data | noise, for rectified flow; "" = latents.
    pairs: str = ""
    imported: str = ""  # hash of imported latents, whose tokenizer was named by the user
    shards: tuple[str, ...] = ()  # sha256 of each shard file, in order
    format_version: int = FORMAT_VERSION
    # Not in the repr, because `LatentCache.fingerprint` is the hash of the repr: runs that were
    # saved without these fields can be resumed. The hashes of the shards do depend on them.
    stored_shape: tuple[int, ...] = field(default=(), repr=False)
    stored_statistics: tuple[str, ...] = field(default=(), repr=False)
    # The number of the group of each sample, of held-out samples only; () = unknown, or no two
    # samples are related. It follows from the pictures, so no hash depends on it.
    groups: tuple[int, ...] = field(default=(), repr=False)
    # Hash of the captions of all samples, "" = none are stored; and the conditions beside them.
    # They are in the manifest only if there are any: other caches keep the hashes they always had.
    captions: str = field(default="", repr=False, metadata={ADDED: True})
    conditions: tuple[StoredCondition, ...] = field(default=(), repr=False, metadata={ADDED: True})

    def __post_init__(self) -> None:
        counts = (self.num_samples, self.shard_size, len(self.views))
        if min(*counts, *self.shape) < 1:
            raise DataError(
                f"a cache has {self.num_samples} samples, {len(self.views)} views of shape "
                f"{self.shape} and {self.shard_size} samples per file; each number must be at "
                "least 1"
            )
        names = [condition.name for condition in self.conditions]
        if len(set(names)) < len(names):
            raise DataError(f"2 conditions have the same name: {', '.join(names)}")
        if not self.captions and any(c.rows == "caption" for c in self.conditions):
            raise DataError("a condition has a row for each caption, and there are no captions")
        check_class_names(self.classes, "the latent cache")
        if len(self.groups) not in (0, self.num_samples):
            raise DataError(
                f"a cache has {self.num_samples} samples and groups of {len(self.groups)}; give "
                "the group of each, or of none"
            )
        if self.shape[0] % max(len(self.statistics), 1):
            raise DataError(
                f"the stored shape is {self.shape}; its first side must be a multiple of the "
                f"{len(self.statistics)} stored statistics"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one stored view: (L,) codes, or for example (2C, h, w)."""
        return self.stored_shape or self._stored_by_0_1_0()[0]

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that are stacked along the first axis of a stored view."""
        return self.stored_statistics if self.stored_shape else self._stored_by_0_1_0()[1]

    def _stored_by_0_1_0(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Shape and statistics where the manifest does not record them."""
        match self.spec:
            case CodeSpec():
                return (self.spec.length,), ()
            case ContinuousSpec(channels, height, width):
                return (2 * channels, height, width), () if self.pairs else ("mean", "std")

    @property
    def num_labels(self) -> int:
        """Number of values that a label may have: 0 to num_labels - 1."""
        return max(len(self.classes), 1)

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.shard_size)

    def shard_range(self, number: int) -> tuple[int, int]:
        """The samples [start, stop) of a shard."""
        start = number * self.shard_size
        return start, min(start + self.shard_size, self.num_samples)

    @property
    def disk_type(self) -> type[np.generic]:
        """The type in which latents are stored."""
        match self.spec:
            case CodeSpec():
                return np.uint16 if self.spec.vocab_size <= 2**16 else np.int32
            case ContinuousSpec():
                return np.float16

    def arrays_of(self, samples: int, captions: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of the arrays of a shard of so many samples, but the captions'."""
        views = len(self.views)
        arrays = {
            "stored": (np.dtype(self.disk_type), (samples, views, *self.shape)),
            "labels": (np.dtype(np.int64), (samples,)),
        }
        for condition in self.conditions:
            shape = condition.shape_of(samples, views, captions)
            arrays[condition.array] = (condition.disk_type, shape)
        return arrays

    def identity(self) -> str:
        """Hash of everything that determines a shard's content; recorded in every shard."""
        content = {**saved_fields(self), "shards": ()}
        del content["groups"]
        if (self.shape, self.statistics) == self._stored_by_0_1_0():
            del content["stored_shape"], content["stored_statistics"]  # 0.1.0 did not hash them
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def group_numbers(groups: Sequence[str]) -> tuple[int, ...]:
    """`CacheInfo.groups` of samples in these groups."""
    numbers: dict[str, int] = {}
    found = tuple(numbers.setdefault(group, len(numbers)) for group in groups)
    return found if len(numbers) < len(found) else ()


def read_manifest(folder: Path) -> CacheInfo:
    """The manifest of a finished cache.

    Raises:
        DataError: no such folder, encoding was not finished, or the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        why = "is not finished: run encode again" if folder.is_dir() else "does not exist"
        raise DataError(f"the latent cache {folder} {why}")
    content = read_json(path)
    if isinstance(content, dict):
        content.pop(HASHES, None)  # compared below
    info: CacheInfo = config_from_dict(CacheInfo, content, str(path))
    if info.format_version != FORMAT_VERSION:
        raise DataError(f"{path} has format {info.format_version}; smalti reads {FORMAT_VERSION}")
    if len(info.shards) != info.num_shards:
        raise DataError(
            f"{path} is damaged: it names {len(info.shards)} of {info.num_shards} shards: remove "
            "it, and encode again"
        )
    read_hashed_json(path, "remove it, and encode again")
    return info


# -- Folders with the caches of several buckets ----------------------------------------------------


def bucket_folders(latents: Path) -> list[Path]:
    """The folders of the buckets in a folder of latents, each with its splits; [] if it has none.

    Raises:
        SmaltiError: the list of the buckets, or a manifest that it names, is damaged.
    """
    path = latents / BUCKETS
    if not path.is_file():
        return []
    again = "remove it, and encode again"
    content = read_hashed_json(path, again)
    names = content.get("buckets")
    known = isinstance(names, list) and all(BUCKET.fullmatch(str(name)) for name in names)
    if content.get("format_version") != FORMAT_VERSION or not names or not known:
        raise DataError(f"{path} is no list of buckets that this version of smalti reads: {again}")
    manifests = [name for name in recorded_hashes(path) if name != BUCKETS]
    for name in manifests:
        if not (latents / name).is_file():
            raise DataError(f"{latents / name} is missing: {again}")
    check_hashes(path, manifests)
    return [latents / name for name in names]


def training_cache(latents: Path) -> Path:
    """The cache of the training pictures in a folder of latents; that of the first bucket, if there
    are several."""
    return (bucket_folders(latents) or [latents])[0] / SPLITS[0]
