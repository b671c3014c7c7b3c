"""The latent cache between the stages: encoded once, read many times.

    cache/
        shard-00000.safetensors   stored (n, views, ...), labels (n,)
        manifest.json             contents, tokenizer, sha256 of every shard

Shards are cut by sample index, so any number of processes writes the same files. Every shard is
written to a temporary file and renamed; the manifest is written last. An interrupted encoding
continues after the shards that it finished, and replaces damaged ones: each shard contains the hash
of its content.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import Dataset

from smalti.config import config_from_dict, config_to_dict
from smalti.data.classes import check_class_names, normal_form
from smalti.data.dataset import OPTIONS
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.data.order import even_subset
from smalti.data.sources.base import fingerprint_of, in_threads
from smalti.errors import DataError
from smalti.files import (
    HASHES,
    read_hashed_json,
    read_json,
    replacing,
    sha256_of,
    write_hashed_json,
)

# -- The manifest ---------------------------------------------------------------------------------

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")  # a cache for each
TOKENIZER = "tokenizer"  # beside them: the tokenizer that encoded them, if it was in a checkpoint


@dataclass(frozen=True)
class CacheInfo:
    """The manifest: the contents of a cache, and everything that determines its shards.

    `stored_shape` and `stored_statistics` are those of the tokenizer, see `Tokenizer.store`. If
    they are (), as in the manifests of smalti 0.1.0, `shape` is that of codes (L,), of the mean and
    std (2C, h, w) of continuous latents, or of pairs of data and noise (2C, h, w).
    """

    spec: LatentSpec
    classes: tuple[str, ...]
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

    def __post_init__(self) -> None:
        counts = (self.num_samples, self.shard_size, len(self.views), len(self.classes))
        if min(*counts, *self.shape) < 1:
            raise DataError(
                f"a cache has {self.num_samples} samples, {len(self.views)} views of shape "
                f"{self.shape}, {len(self.classes)} classes and {self.shard_size} samples per "
                "file; each number must be at least 1"
            )
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

    def identity(self) -> str:
        """Hash of everything that determines a shard's content; recorded in every shard."""
        content = {**asdict(self), "shards": ()}
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


# -- One shard: `stored` (n, views, ...) and `labels` (n,) as safetensors -------------------------

NAMES = ("stored", "labels")
SHARD = "shard"  # key of the metadata, whose value is "identity of the cache/hash of the content"
DAMAGED = "damaged"
MAX_HEADER = 2**16  # bytes of the header of a shard, which names two tensors
TYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64, "F16": np.float16}


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard of a cache."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, np.ndarray], identity: str) -> None:
    """Write `stored` and `labels` atomically."""
    # safetensors ignores the strides of an array and writes its memory as it is.
    flat = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(path) as temporary:
        save_file(flat, temporary, metadata=_metadata(flat, identity))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard; safetensors checks that the sizes in its header fit the file.

    Raises:
        SafetensorError: it is damaged.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER:
        raise SafetensorError(f"its header has {length} bytes, and that of a shard {MAX_HEADER}")
    with safe_open(path, framework="np") as shard:
        yield shard


def is_whole(path: Path, identity: str) -> bool:
    """Whether a shard exists, belongs to the cache, and is not damaged."""
    try:
        with _opened(path) as shard:
            found = shard.metadata() or {}
            tensors = {name: shard.get_tensor(name) for name in NAMES}
    except (FileNotFoundError, SafetensorError):
        return False
    return found == _metadata(tensors, identity)


def identity_in(path: Path) -> str:
    """The identity of the cache that a shard belongs to: "" if it has none, or `DAMAGED`."""
    try:
        with _opened(path) as shard:
            return (shard.metadata() or {}).get(SHARD, "").partition("/")[0]
    except SafetensorError:
        return DAMAGED


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """`stored` and `labels`, memory-mapped: only the rows that are used are read.

    Raises:
        DataError: the file is not a shard of latents.
    """
    try:
        with _opened(path), path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        return {name: _map(path, header[name], 8 + length) for name in NAMES}
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path} is not a shard of latents ({error}): encode again") from error


def _map(path: Path, entry: Mapping[str, Any], data: int) -> np.ndarray:
    """The tensor of an entry of the header; `data` is the offset at which the tensors begin."""
    start, _ = entry["data_offsets"]
    shape = tuple(entry["shape"])
    array = np.memmap(path, TYPES[entry["dtype"]], "r", data + start, shape)
    return array.view(np.ndarray)  # indexing a plain array is faster


def _metadata(tensors: Mapping[str, np.ndarray], identity: str) -> dict[str, str]:
    parts = [
        part
        for name, array in sorted(tensors.items())
        for part in (f"{name}/{array.dtype}/{array.shape}".encode(), array.tobytes())
    ]
    # A single key, because safetensors writes several in no fixed order.
    return {SHARD: f"{identity}/{fingerprint_of(parts)}"}


# -- Writing a cache ------------------------------------------------------------------------------

LARGEST = float(np.finfo(np.float16).max)  # magnitude that a cache can store


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
    """Encode every sample into `folder`; shards that are there already and undamaged are kept.

    Args:
        encode: (start, stop) -> the encoded samples of that range.
        rank, world_size, barrier: this process, the number of processes, and a function that waits
            for all of them.
        progress: called with the number of samples done, after each shard.

    Raises:
        DataError: the folder holds a cache of another tokenizer, data set or layout.
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
        hashes = in_threads(
            lambda n: sha256_of(shard_path(folder, n)), info.num_shards, "hash latents"
        )
        write_hashed_json(folder / MANIFEST, {**config_to_dict(info), "shards": hashes})
    barrier()


def on_disk(info: CacheInfo, start: int, stop: int, part: EncodedRange) -> dict[str, np.ndarray]:
    """The samples [start, stop) as a shard stores them.

    Raises:
        DataError: they have another shape, or a value that the cache cannot store.
    """
    stored, labels = part.stored.cpu(), part.labels.cpu()
    expected = (stop - start, len(info.views), *info.shape)
    if tuple(stored.shape) != expected or tuple(labels.shape) != expected[:1]:
        raise DataError(
            f"the latents of the samples {start} to {stop - 1} have shape {tuple(stored.shape)} "
            f"and labels {tuple(labels.shape)}; the cache takes {expected} and {expected[:1]}"
        )
    _refuse_outside(labels, start, len(info.classes), "label", "classes")
    match info.spec:
        case CodeSpec():
            _refuse_outside(stored, start, info.spec.vocab_size, "code", "codes of the tokenizer")
        case ContinuousSpec():
            stored = stored.float()
            bad = (~(stored.abs() <= LARGEST)).nonzero()  # true for NaN
            if len(bad):
                raise DataError(
                    f"sample {start + bad[0][0]} has the latent {stored[tuple(bad[0])]:g}, and a "
                    f"cache stores half-precision numbers up to {LARGEST:g}: check the tokenizer, "
                    "whose latents should be near 1"
                )
    return {
        "stored": stored.numpy().astype(info.disk_type),
        "labels": labels.numpy().astype(np.int64),
    }


def _refuse_outside(values: Tensor, start: int, count: int, name: str, of: str) -> None:
    bad = ((values < 0) | (values >= count)).nonzero()
    if len(bad):
        raise DataError(
            f"sample {start + bad[0][0]} has the {name} {values[tuple(bad[0])]}, which is none of "
            f"the {count} {of}: 0 to {count - 1}"
        )


def refuse_other_cache(folder: Path, info: CacheInfo) -> None:
    """Raise `DataError` if `folder` holds anything but this cache, complete or in part."""
    if not folder.exists():
        return
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder)
        if found.identity() != info.identity():
            raise DataError(
                f"{folder} holds the latents of another tokenizer, data set or layout: "
                "choose another output folder"
            )
        return
    ours = ("shard-", ".", OPTIONS)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(ours)]
    if others:
        raise DataError(f"{folder} is not a latent cache (it holds {others[0]}): choose another")
    for shard in folder.glob("shard-*.safetensors"):
        if identity_in(shard) not in (info.identity(), DAMAGED):
            raise DataError(
                f"{shard} was written with another tokenizer, data set or layout: "
                "choose another output folder, or remove this one"
            )


def refuse_other_contents(folder: Path) -> None:
    """Raise `DataError` if `folder` contains anything but the caches of `SPLITS`, and the tokenizer
    that `smalti encode` made of a checkpoint."""
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(
        name for name in held if name not in (*SPLITS, TOKENIZER) and not name.startswith(".")
    )
    if others:
        raise DataError(
            f"{folder} holds {others[0]}, which is not a latent cache: choose another output folder"
        )


def most_mapped() -> int:
    """Number of shards that are mapped at a time: a quarter of the files that may be open."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(limit, 65_536) // 4)


# -- Reading a cache ------------------------------------------------------------------------------

VERIFIED_AT_ONCE = 2**20  # values
MEMORY_TYPE = {"codes": np.int64, "continuous": np.float32}


@dataclass
class LatentBatch:
    """Cached latents as `Tokenizer.latents` takes them, or pairs of rectified flow."""

    stored: Tensor  # (B, L) int64; or float32, for example (B, 2C, h, w): mean | std, data | noise
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, positions in the cache
    captions: list[tuple[str, ...]] | None = None  # the texts of each sample
    shown: Tensor | None = None  # (B,) int64, which of its captions each sample has in this epoch

    @property
    def texts(self) -> list[str] | None:
        """The caption that each sample has in this epoch; None if there are no captions."""
        if self.captions is None or self.shown is None:
            return None
        return [texts[n] for texts, n in zip(self.captions, self.shown.tolist(), strict=True)]


class LatentCache(Dataset):
    """A finished cache, verified once, then memory-mapped: it may be larger than memory.

    Index with keys (epoch, index). The view (for example flipped or not) of a sample is a pure
    function of (seed, epoch, index).

    Raises:
        DataError: a shard is missing or damaged, or holds a value that no latent has; the message
            names it. Or the manifest is not the one that the shards were written with.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0) -> None:
        self.folder = Path(folder)
        self.info = read_manifest(self.folder)
        self.seed = seed
        for number in range(self.info.num_shards):
            if not shard_path(self.folder, number).is_file():
                raise DataError(f"{shard_path(self.folder, number)} is missing: encode again")
        labels = in_threads(self._verified_labels, self.info.num_shards, "verify latents")
        self._verify_manifest()
        self.labels = torch.from_numpy(np.concatenate(labels))

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory maps, which pickle would copy; a worker maps the files again."""
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
        """Hash of the manifest, which contains the hashes of all shards."""
        return hashlib.sha256(repr(self.info).encode()).hexdigest()

    def __len__(self) -> int:
        return self.info.num_samples

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> LatentBatch:
        indices = np.array([index for _, index in keys])
        views = np.array([self._view(epoch, index) for epoch, index in keys])
        return self._batch(indices, views)

    def first_view(self, indices: Sequence[int]) -> LatentBatch:
        """The first view of some samples, for evaluation: the image itself, or its centre."""
        array = np.asarray(indices)
        return self._batch(array, np.zeros_like(array))

    def even_subset(self, count: int, seed: int) -> list[int]:
        """At most `count` samples, evenly over classes and groups, to measure."""
        return even_subset(self.labels, self.info.groups or None, count, seed)

    def all_views(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """All views of some samples in the type of the files, (n, views, *info.shape)."""
        shards, rows = np.divmod(np.asarray(indices), self.info.shard_size)
        views = len(self.info.views)
        maps = [self._stored(shard) for shard in shards]
        parts = [m[row * views : row * views + views] for m, row in zip(maps, rows, strict=True)]
        return np.stack(parts).reshape(-1, views, *self.info.shape)

    def _view(self, epoch: int, index: int) -> int:
        if len(self.info.views) == 1:
            return 0
        digest = hashlib.blake2b(f"{self.seed}/view/{epoch}/{index}".encode(), digest_size=4)
        return int.from_bytes(digest.digest(), "big") % len(self.info.views)

    def _batch(self, indices: np.ndarray, views: np.ndarray) -> LatentBatch:
        shards, rows = np.divmod(indices, self.info.shard_size)
        rows = rows * len(self.info.views) + views
        maps, kind = self._stored, MEMORY_TYPE[self.spec.kind]
        places = zip(shards.tolist(), rows.tolist(), strict=True)
        chosen = [maps(n)[row].astype(kind) for n, row in places]  # copies: views keep files open
        stored = torch.from_numpy(np.concatenate(chosen)).view(-1, *self.info.shape)
        return LatentBatch(stored, self.labels[indices], torch.from_numpy(indices))

    @cached_property
    def _stored(self) -> Callable[[int], np.ndarray]:
        """The number of a shard -> all views of its samples as rows: (n * views, values of one
        view). The least recently used maps are closed: each keeps a file open."""
        width = math.prod(self.info.shape)

        def rows(number: int) -> np.ndarray:
            return self._map(number)["stored"].reshape(-1, width)

        return lru_cache(most_mapped())(rows)

    def _map(self, number: int) -> dict[str, np.ndarray]:
        """A shard of the cache; raise `DataError` if its shapes contradict the manifest."""
        path = shard_path(self.folder, number)
        shard = map_shard(path)
        start, stop = self.info.shard_range(number)
        shape = (stop - start, len(self.info.views), *self.info.shape)
        found = shard["stored"]
        if (found.shape, found.dtype) != (shape, self.info.disk_type) or (
            shard["labels"].shape != shape[:1]
        ):
            raise DataError(
                f"{path} holds {found.dtype} {found.shape}; the manifest requires "
                f"{np.dtype(self.info.disk_type)} {shape}: encode again"
            )
        return shard

    def _verified_labels(self, number: int) -> np.ndarray:
        """The labels of a shard; raise `DataError` if it is damaged, or holds a value that no
        latent has."""
        path = shard_path(self.folder, number)
        if sha256_of(path) != self.info.shards[number]:
            raise DataError(
                f"{path} is damaged (its sha256 differs from the manifest): encode again"
            )
        shard = self._map(number)
        labels, values = shard["labels"], shard["stored"].reshape(-1)
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise DataError(
                f"{path} holds labels from {labels.min()} to {labels.max()}, but the manifest has "
                f"{len(self.classes)} classes: encode again"
            )
        for start in range(0, len(values), VERIFIED_AT_ONCE):
            self._verify_values(path, values[start : start + VERIFIED_AT_ONCE])
        return labels.copy()  # a view of a memory map would keep the file open

    def _verify_values(self, path: Path, values: np.ndarray) -> None:
        if isinstance(self.spec, ContinuousSpec):
            if not np.isfinite(values).all():
                raise DataError(
                    f"{path} holds latents that are NaN or infinite: check the tokenizer, and "
                    "encode again"
                )
        elif values.min() < 0 or values.max() >= self.spec.vocab_size:
            raise DataError(
                f"{path} holds codes from {values.min()} to {values.max()}, but the tokenizer has "
                f"{self.spec.vocab_size}: encode again"
            )

    def _verify_manifest(self) -> None:
        """Raise `DataError` if the shards were written with another manifest."""
        identity = self.info.identity()
        for number in range(self.info.num_shards):
            path = shard_path(self.folder, number)
            if identity_in(path) != identity:
                raise DataError(
                    f"{self.folder / MANIFEST} is damaged or was edited ({path.name} was written "
                    "with another): remove it, and encode again"
                )


def open_splits(folder: Path, *, seed: int = 0) -> tuple[LatentCache, LatentCache]:
    """The training and the held-out latents of a folder.

    Args:
        seed: of the views of training latents.

    Raises:
        DataError: one is missing or damaged, or the two do not belong together.
    """
    train, heldout = (LatentCache(folder / split, seed=seed) for split in SPLITS)
    for name, one, other in (
        ("tokenizer", train.info.tokenizer_fingerprint, heldout.info.tokenizer_fingerprint),
        ("specification of latents", train.spec, heldout.spec),
        ("shape of latents", train.info.shape, heldout.info.shape),
        ("kind of latents", bool(train.info.pairs), bool(heldout.info.pairs)),
        ("table of classes", *(list(map(normal_form, c.classes)) for c in (train, heldout))),
    ):
        if one != other:
            raise DataError(
                f"{train.folder} and {heldout.folder} do not belong together, because the {name} "
                "differs: write both with one command into a new folder"
            )
    return train, heldout
