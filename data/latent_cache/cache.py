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
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import Dataset

from smalti.config import config_from_dict, config_to_dict
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.data.sources.base import fingerprint_of, in_threads
from smalti.errors import SmaltiError
from smalti.files import read_json, replacing, sha256_of, write_json

# -------------------------------------------------------------------------------------------------
# The manifest of a latent cache: what is inside, and which tokenizer made it.

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


# -------------------------------------------------------------------------------------------------
# One file of a latent cache: `stored` (n, views, ...) and `labels` (n,), as safetensors.
#
# Each holds the identity of its cache and the hash of its own content, so that an interrupted
# encoding knows what it can keep.

NAMES = ("stored", "labels")
SHARD = "shard"  # key of the metadata: identity of the cache, hash of the content
DAMAGED = "damaged"
TYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64, "F16": np.float16}


def shard_path(folder: Path, number: int) -> Path:
    """Where a cache keeps its shard of this number."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, np.ndarray], identity: str) -> None:
    """Write `stored` and `labels`; a reader finds all of it or nothing."""
    # safetensors writes memory as it lies, whatever the strides say.
    flat = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(path) as temporary:
        save_file(flat, temporary, metadata=_metadata(flat, identity))


def is_whole(path: Path, identity: str) -> bool:
    """Whether a shard is there, belongs to the cache, and holds what was once written."""
    try:
        with safe_open(path, framework="np") as shard:
            found = shard.metadata() or {}
            tensors = {name: shard.get_tensor(name) for name in NAMES}
    except (FileNotFoundError, SafetensorError):
        return False
    return found == _metadata(tensors, identity)


def identity_in(path: Path) -> str:
    """The cache that a shard says it belongs to: "" if it says nothing, or `DAMAGED`."""
    try:
        with safe_open(path, framework="np") as shard:
            return (shard.metadata() or {}).get(SHARD, "").partition("/")[0]
    except SafetensorError:
        return DAMAGED


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """`stored` and `labels` as they lie in the file: only what is used is read, when it is used.

    Raises:
        SmaltiError: the file is no shard of latents.
    """
    try:
        with safe_open(path, framework="np"):  # checks the header: its sizes fit the file
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        return {name: _map(path, header[name], 8 + length) for name in NAMES}
    except (SafetensorError, KeyError) as error:
        raise SmaltiError(f"{path} is no shard of latents ({error}): encode again") from error


def _map(path: Path, entry: Mapping[str, Any], data: int) -> np.ndarray:
    """The tensor of an entry of the header; `data` is where the tensors begin."""
    start, _ = entry["data_offsets"]
    shape = tuple(entry["shape"])
    array = np.memmap(path, TYPES[entry["dtype"]], "r", data + start, shape)
    return array.view(np.ndarray)  # rows of a plain array are quicker to take


def _metadata(tensors: Mapping[str, np.ndarray], identity: str) -> dict[str, str]:
    parts = [
        part
        for name, array in sorted(tensors.items())
        for part in (f"{name}/{array.dtype}/{array.shape}".encode(), array.tobytes())
    ]
    # One key only: safetensors writes several in no certain order.
    return {SHARD: f"{identity}/{fingerprint_of(parts)}"}


# -------------------------------------------------------------------------------------------------
# The latent cache between the stages: encoded once, read many times.

SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")  # a cache for each
LARGEST = float(np.finfo(np.float16).max)  # of the numbers that a cache can hold
MEMORY_TYPE = {"codes": np.int64, "continuous": np.float32}


@dataclass
class LatentBatch:
    """Cached latents as `Tokenizer.latents` takes them, or pairs."""

    stored: Tensor  # (B, L) int64, or (B, 2C, h, w) float32: mean | std, or data | noise
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
        start, stop = info.shard_range(number)
        path = shard_path(folder, number)
        if not is_whole(path, info.identity()):
            write_shard(path, on_disk(info, start, stop, encode(start, stop)), info.identity())
        progress(stop - start)
    barrier()
    if rank == 0:
        hashes = _hashes(folder, info, "hash latents")
        write_json(folder / MANIFEST, {**config_to_dict(info), "shards": hashes})
    barrier()


def on_disk(info: CacheInfo, start: int, stop: int, part: EncodedRange) -> dict[str, np.ndarray]:
    """The samples [start, stop) as a shard stores them.

    Raises:
        SmaltiError: they have another shape, or a value that the cache cannot hold.
    """
    stored, labels = part.stored.cpu(), part.labels.cpu()
    expected = (stop - start, len(info.views), *info.shape)
    if tuple(stored.shape) != expected or tuple(labels.shape) != expected[:1]:
        raise SmaltiError(
            f"the latents of the samples {start} to {stop - 1} have shape {tuple(stored.shape)} "
            f"and labels {tuple(labels.shape)}; the cache takes {expected} and {expected[:1]}"
        )
    _refuse_outside(labels, start, len(info.classes), "label", "classes")
    match info.spec:
        case CodeSpec():
            _refuse_outside(stored, start, info.spec.vocab_size, "code", "codes of the tokenizer")
        case ContinuousSpec():
            stored = stored.float()
            bad = (~(stored.abs() <= LARGEST)).nonzero()
            if len(bad):
                raise SmaltiError(
                    f"sample {start + bad[0][0]} has the latent {stored[tuple(bad[0])]:g}, and a "
                    f"cache holds half-precision numbers up to {LARGEST:g}: check the tokenizer, "
                    "whose latents should be near 1"
                )
    return {
        "stored": stored.numpy().astype(info.disk_type),
        "labels": labels.numpy().astype(np.int64),
    }


def _refuse_outside(values: Tensor, start: int, count: int, name: str, of: str) -> None:
    bad = ((values < 0) | (values >= count)).nonzero()
    if len(bad):
        raise SmaltiError(
            f"sample {start + bad[0][0]} has the {name} {values[tuple(bad[0])]}, which is none of "
            f"the {count} {of}: 0 to {count - 1}"
        )


def _hashes(folder: Path, info: CacheInfo, title: str) -> list[str]:
    """sha256 of each shard; a progress bar appears if it takes long."""
    return in_threads(lambda n: sha256_of(shard_path(folder, n)), info.num_shards, title)


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
        if identity_in(shard) not in (info.identity(), DAMAGED):
            raise SmaltiError(
                f"{shard} was begun with another tokenizer, data set or layout: "
                "choose another output folder, or remove this one"
            )


def refuse_other_contents(folder: Path) -> None:
    """Raise `SmaltiError` if `folder`, which takes a cache for each of `SPLITS`, holds more."""
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    strangers = sorted(name for name in held if name not in SPLITS and not name.startswith("."))
    if strangers:
        raise SmaltiError(
            f"{folder} holds {strangers[0]}, which is no cache of latents: choose another output "
            "folder"
        )


class LatentCache(Dataset):
    """A finished cache, verified once, then read where it lies: it may be larger than memory.

    Index with keys (epoch, index). The view (for example flipped or not) of a sample is a pure
    function of (seed, epoch, index).

    Raises:
        SmaltiError: a shard is missing, cut or damaged; the message names it.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0) -> None:
        self.folder = Path(folder)
        self.info = read_manifest(self.folder)
        self.seed = seed
        self._verify()
        shards = (self._map(number) for number in range(self.info.num_shards))
        self.labels = torch.from_numpy(np.concatenate([shard["labels"] for shard in shards]))

    def __getstate__(self) -> dict[str, Any]:
        """A worker process maps the files anew; pickled, a map would become its content."""
        return {name: value for name, value in self.__dict__.items() if name != "_stored"}

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
        """The first view of some samples, for evaluation: the picture itself, or its centre."""
        array = np.asarray(indices)
        return self._batch(array, np.zeros_like(array))

    def _view(self, epoch: int, index: int) -> int:
        if len(self.info.views) == 1:
            return 0
        digest = hashlib.blake2b(f"{self.seed}/view/{epoch}/{index}".encode(), digest_size=4)
        return int.from_bytes(digest.digest(), "big") % len(self.info.views)

    def all_views(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Every view of some samples as the files hold them: (n, views, L) uint16 or int32 codes,
        or (n, views, 2C, h, w) numbers of half precision."""
        shards, rows = np.divmod(np.asarray(indices), self.info.shard_size)
        views = len(self.info.views)
        maps = [self._stored[shard] for shard in shards]
        parts = [m[row * views : row * views + views] for m, row in zip(maps, rows, strict=True)]
        return np.stack(parts).reshape(-1, views, *self.info.shape)

    def _batch(self, indices: np.ndarray, views: np.ndarray) -> LatentBatch:
        shards, rows = np.divmod(indices, self.info.shard_size)
        rows = rows * len(self.info.views) + views
        maps = self._stored
        chosen = [maps[n][row] for n, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        joined = np.concatenate(chosen).astype(MEMORY_TYPE[self.spec.kind])
        stored = torch.from_numpy(joined).view(-1, *self.info.shape)
        return LatentBatch(stored, self.labels[indices], torch.from_numpy(indices))

    @cached_property
    def _stored(self) -> list[np.ndarray]:
        """Of each shard, all views of all samples in one line: (n * views, values)."""
        width = math.prod(self.info.shape)
        numbers = range(self.info.num_shards)
        return [self._map(number)["stored"].reshape(-1, width) for number in numbers]

    def _map(self, number: int) -> dict[str, np.ndarray]:
        """A shard of the cache; what is in it must be what the manifest says."""
        path = shard_path(self.folder, number)
        shard = map_shard(path)
        start, stop = self.info.shard_range(number)
        shape = (stop - start, len(self.info.views), *self.info.shape)
        found = shard["stored"]
        if (found.shape, found.dtype) != (shape, self.info.disk_type) or (
            shard["labels"].shape != shape[:1]
        ):
            raise SmaltiError(
                f"{path} holds {found.dtype} {found.shape}; the manifest promises "
                f"{np.dtype(self.info.disk_type)} {shape}: encode again"
            )
        return shard

    def _verify(self) -> None:
        for number in range(self.info.num_shards):
            if not shard_path(self.folder, number).is_file():
                raise SmaltiError(f"{shard_path(self.folder, number)} is missing: encode again")
        hashes = _hashes(self.folder, self.info, "verify latents")
        for number, (found, expected) in enumerate(zip(hashes, self.info.shards, strict=True)):
            if found != expected:
                raise SmaltiError(
                    f"{shard_path(self.folder, number)} is damaged (its sha256 differs from the "
                    "manifest): encode again"
                )
