"""The latent cache between the stages: encoded once, read many times.

    cache/
        shard-00000.safetensors   stored (n, views, ...), labels (n,)
        manifest.json             what is inside, which tokenizer made it, sha256 of every shard

Shards are cut by sample index, so any number of processes writes the same files. Every shard is
written beside its place and renamed; the manifest comes last. An interrupted encoding goes on
where it stopped, and makes damaged shards again: each holds the hash of its own content.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import Dataset

from smalti.config import config_from_dict, config_to_dict
from smalti.data.images import fingerprint_of
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.files import read_json, replacing, sha256_of, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VIEWS = ("identity", "flip")
SHARD = "shard"  # key of a shard's metadata: identity of the cache, hash of the content
DAMAGED = "damaged"


@dataclass(frozen=True)
class CacheInfo:
    """The manifest: everything needed to know what a cache holds and whether it is whole."""

    spec: LatentSpec
    classes: tuple[str, ...]
    num_samples: int
    views: tuple[str, ...]  # stored versions of each image: ("identity",) or with "flip"
    tokenizer_fingerprint: str
    dataset_fingerprint: str
    shard_size: int  # samples per shard
    shards: tuple[str, ...] = ()  # sha256 of each shard file, in order
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.shard_size)

    def identity(self) -> str:
        """Hash of all that decides a shard's content; stands inside every shard."""
        content = {**asdict(self), "shards": ()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class LatentBatch:
    """Cached latents as `Tokenizer.latents` takes them."""

    stored: Tensor  # (B, L) int64, or (B, 2C, h, w) float32
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, positions in the cache


@dataclass
class EncodedRange:
    """The samples [start, stop) as an encoder returns them to `write_cache`."""

    stored: Tensor  # (n, views, ...)
    labels: Tensor  # (n,)


def write_cache(
    folder: Path,
    info: CacheInfo,
    encode: Callable[[int, int], EncodedRange],
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda samples: None,
) -> None:
    """Encode every sample into `folder`; shards that are already there and whole are kept.

    Args:
        encode: (start, stop) -> the encoded samples of that range.
        rank, world_size, barrier: this process, all processes, and how to wait for them.
        progress: called with the number of samples done, after each shard.

    Raises:
        SmaltiError: the folder holds a cache of another tokenizer, data set or layout.
    """
    refuse_other_cache(folder, info)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(rank, info.num_shards, world_size):
        start = number * info.shard_size
        stop = min(start + info.shard_size, info.num_samples)
        path = _shard_path(folder, number)
        if not _is_whole(path, info):
            _write_shard(path, info, encode(start, stop))
        progress(stop - start)
    barrier()
    if rank == 0:
        hashes = [sha256_of(_shard_path(folder, n)) for n in range(info.num_shards)]
        write_json(folder / MANIFEST, {**config_to_dict(info), "shards": hashes})
    barrier()


def refuse_other_cache(folder: Path, info: CacheInfo) -> None:
    """Raise `SmaltiError` if `folder` holds anything but this very cache, whole or in part."""
    if not folder.exists():
        return
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder)
        if found.identity() != info.identity():
            raise SmaltiError(
                f"{folder} holds the latents of another tokenizer, data set or layout: "
                "choose another output folder"
            )
        return
    strangers = [p.name for p in folder.iterdir() if not p.name.startswith(("shard-", ".tmp-"))]
    if strangers:
        raise SmaltiError(f"{folder} is no latent cache (it holds {strangers[0]}): choose another")
    for shard in folder.glob("shard-*.safetensors"):
        if _identity_in(shard) not in (info.identity(), DAMAGED):
            raise SmaltiError(
                f"{shard} was begun with another tokenizer, data set or layout: "
                "choose another output folder, or remove this one"
            )


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
    return info


class LatentCache(Dataset):
    """A finished cache, read into memory. Index with keys (epoch, index).

    The view (for example flipped or not) of a sample is a pure function of (seed, epoch, index).

    Raises:
        SmaltiError: a shard is missing, cut or damaged; the message names it.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0) -> None:
        self.folder = Path(folder)
        self.info = read_manifest(self.folder)
        self.seed = seed
        parts = [self._read_shard(number) for number in range(self.info.num_shards)]
        self._stored = np.concatenate([stored for stored, _ in parts])  # (N, views, ...)
        self.labels = torch.from_numpy(np.concatenate([labels for _, labels in parts]))
        if len(self._stored) != self.info.num_samples:
            raise SmaltiError(
                f"{self.folder} holds {len(self._stored)} samples; its manifest promises "
                f"{self.info.num_samples}: encode again"
            )

    @property
    def spec(self) -> LatentSpec:
        return self.info.spec

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    @property
    def num_classes(self) -> int:
        return len(self.info.classes)

    @property
    def fingerprint(self) -> str:
        """Hash of the content: of all shards and what they mean."""
        return hashlib.sha256(repr(self.info).encode()).hexdigest()

    def __len__(self) -> int:
        return self.info.num_samples

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> LatentBatch:
        indices = np.array([index for _, index in keys])
        views = np.array([self._view(epoch, index) for epoch, index in keys])
        return self._batch(indices, views)

    def first_view(self, indices: Sequence[int]) -> LatentBatch:
        """The un-augmented view of some samples, for evaluation."""
        array = np.asarray(indices)
        return self._batch(array, np.zeros_like(array))

    def _view(self, epoch: int, index: int) -> int:
        if len(self.info.views) == 1:
            return 0
        digest = hashlib.blake2b(f"{self.seed}/view/{epoch}/{index}".encode(), digest_size=4)
        return int.from_bytes(digest.digest(), "big") % len(self.info.views)

    def _batch(self, indices: np.ndarray, views: np.ndarray) -> LatentBatch:
        stored = torch.from_numpy(self._stored[indices, views].astype(_MEMORY_TYPE[self.spec.kind]))
        return LatentBatch(stored, self.labels[indices], torch.from_numpy(indices))

    def _read_shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        path = _shard_path(self.folder, number)
        if not path.is_file():
            raise SmaltiError(f"{path} is missing: encode again")
        if sha256_of(path) != self.info.shards[number]:
            raise SmaltiError(
                f"{path} is damaged (its sha256 differs from the manifest): encode again"
            )
        with safe_open(path, framework="np") as shard:
            return shard.get_tensor("stored"), shard.get_tensor("labels")


_MEMORY_TYPE = {"codes": np.int64, "continuous": np.float32}


def _disk_type(spec: LatentSpec) -> type[np.generic]:
    match spec:
        case CodeSpec():
            return np.uint16 if spec.vocab_size <= 2**16 else np.int32
        case ContinuousSpec():
            return np.float16


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _identity_in(path: Path) -> str:
    """The cache that a shard says it belongs to: "" if it says nothing, or `DAMAGED`."""
    try:
        with safe_open(path, framework="np") as shard:
            return (shard.metadata() or {}).get(SHARD, "").partition("/")[0]
    except SafetensorError:
        return DAMAGED


def _is_whole(path: Path, info: CacheInfo) -> bool:
    """Whether a shard is there, belongs to the cache, and holds what was once written."""
    try:
        with safe_open(path, framework="np") as shard:
            found = shard.metadata() or {}
            tensors = {name: shard.get_tensor(name) for name in ("stored", "labels")}
    except (FileNotFoundError, SafetensorError):
        return False
    return found == _metadata(tensors, info)


def _metadata(tensors: dict[str, np.ndarray], info: CacheInfo) -> dict[str, str]:
    parts = [
        part
        for name, array in sorted(tensors.items())
        for part in (f"{name}/{array.dtype}/{array.shape}".encode(), array.tobytes())
    ]
    # One key only: safetensors writes several in no certain order.
    return {SHARD: f"{info.identity()}/{fingerprint_of(parts)}"}


def _write_shard(path: Path, info: CacheInfo, part: EncodedRange) -> None:
    tensors = {
        "stored": part.stored.cpu().numpy().astype(_disk_type(info.spec)),
        "labels": part.labels.cpu().numpy().astype(np.int64),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=_metadata(tensors, info))
