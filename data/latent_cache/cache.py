"""The latent cache between the stages: encoded once, read many times.

    cache/
        shard-00000.safetensors   latents, labels, captions and conditions of the first samples
        manifest.json             contents, tokenizer, sha256 of every shard

Shards are cut by sample index, so any number of processes writes the same files. Every shard is
written to a temporary file and renamed; the manifest is written last. An interrupted encoding
continues after the shards that it finished, and replaces damaged ones: each shard contains the hash
of its content.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalti.config import saved_fields
from smalti.data.dataset import OPTIONS
from smalti.data.latent_cache.manifest import (
    BUCKET,
    BUCKETS,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    CacheInfo,
    StoredCondition,
    read_manifest,
)
from smalti.data.latent_cache.shard import (
    CAPTIONS,
    DAMAGED,
    PackedCaptions,
    identity_in,
    is_whole,
    map_shard,
    pack_captions,
    shard_path,
    write_shard,
)
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder, Key, even_subset
from smalti.data.sources.verification import in_threads
from smalti.errors import DataError
from smalti.files import sha256_of, write_hashed_json

logger = logging.getLogger(__name__)

# -- Writing a cache ------------------------------------------------------------------------------

LARGEST = float(np.finfo(np.float16).max)  # magnitude that a cache can store


@dataclass
class EncodedRange:
    """The samples [start, stop) as an encoder returns them to `write_cache`."""

    stored: Tensor  # (n, views, ...)
    labels: Tensor  # (n,)
    captions: Sequence[tuple[str, ...]] | None = None  # one or several texts of each sample
    # By name; the rows are those that `StoredCondition.rows` says: (n, views, ...), (n, ...), or a
    # row for each text of the samples, in their order.
    conditions: Mapping[str, Tensor] = field(default_factory=dict)


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
    info = _as_begun(folder, info)
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
        write_hashed_json(folder / MANIFEST, {**saved_fields(info), "shards": hashes})
    barrier()


def _as_begun(folder: Path, info: CacheInfo) -> CacheInfo:
    """What to write: without captions if the same cache was begun without them. Those of
    smalti 0.1.0 have none, and they continue."""
    if not info.captions or any(condition.rows == "caption" for condition in info.conditions):
        return info
    plain = replace(info, captions="")
    finished = (folder / MANIFEST).is_file()
    if finished and read_manifest(folder).identity() != plain.identity():
        return info
    begun = [identity_in(shard) for shard in folder.glob("shard-*.safetensors")]
    if plain.identity() not in begun:
        return info
    logger.warning(
        "the latents in %s were begun without captions, which are left out: for a prior of "
        "captions choose another output folder",
        folder,
    )
    return plain


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
    _refuse_outside(labels, start, info.num_labels, "label", "classes")
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
    arrays = {
        "stored": stored.numpy().astype(info.disk_type),
        "labels": labels.numpy().astype(np.int64),
    }
    if info.captions:
        arrays |= pack_captions(_checked_captions(part.captions, start, stop))
    count = len(arrays[CAPTIONS[1]]) if info.captions else 0
    for condition in info.conditions:
        shape = condition.shape_of(stop - start, len(info.views), count)
        values = part.conditions.get(condition.name)
        arrays[condition.array] = _condition_on_disk(condition, values, shape, start)
    return arrays


def _checked_captions(
    captions: Sequence[tuple[str, ...]] | None, start: int, stop: int
) -> Sequence[tuple[str, ...]]:
    """The captions; raise `DataError` if a sample has none, or one that cannot be stored."""
    if captions is None or len(captions) != stop - start:
        found = "no" if captions is None else str(len(captions))
        raise DataError(
            f"the samples {start} to {stop - 1} have {found} captions; the cache takes one or "
            "several texts of each"
        )
    for sample, texts in enumerate(captions, start):
        if not texts or not all(texts):
            raise DataError(f"sample {sample} has no caption, or an empty one: give each a text")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"a caption of sample {sample} is not Unicode ({error})") from error
    return captions


def _condition_on_disk(
    condition: StoredCondition, values: Tensor | None, shape: tuple[int, ...], start: int
) -> np.ndarray:
    """The rows of a condition; raise `DataError` if they have another shape, or values that its
    type does not have."""
    if values is None or tuple(values.shape) != shape:
        found = "missing" if values is None else f"of shape {tuple(values.shape)}"
        raise DataError(
            f"the condition {condition.name} of the samples from {start} on is {found}; the cache "
            f"takes {shape}"
        )
    array = values.cpu().float() if values.is_floating_point() else values.cpu()
    given = array.numpy()
    with np.errstate(over="ignore"):
        stored = given.astype(condition.disk_type)
    same = np.isfinite(stored).all() if stored.dtype.kind == "f" else (stored == given).all()
    if not same:
        raise DataError(
            f"the condition {condition.name} of the samples from {start} on has values that "
            f"{condition.dtype} does not hold"
        )
    return stored


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
            raise DataError(_difference(folder, found, info))
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


def _difference(folder: Path, found: CacheInfo, info: CacheInfo) -> str:
    """What a cache holds instead of the latents that are to be written, and what to do."""
    theirs, ours = (
        (cache.num_samples, cache.dataset_fingerprint, cache.imported, cache.captions)
        for cache in (found, info)
    )
    if theirs == ours:
        return (
            f"{folder} holds the latents of another tokenizer or layout: choose another output "
            "folder"
        )
    return (
        f"{folder} holds the latents of other pictures ({found.num_samples}; these are "
        f"{info.num_samples}), or of other captions: choose another output folder. A run on "
        "those latents continues on these with --resume_from_checkpoint latest --accept_new_data "
        "--latents, the new folder"
    )


def refuse_other_contents(folder: Path, caches: Sequence[str] = SPLITS) -> None:
    """Raise `DataError` if `folder` contains anything but the folders of these caches, and the
    tokenizer that `smalti encode` made of a checkpoint.

    Args:
        caches: names; those of the splits, or of the buckets and their list.
    """
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(
        name for name in held if name not in (*caches, TOKENIZER) and not name.startswith(".")
    )
    if others:
        known = others[0] in (*SPLITS, BUCKETS) or BUCKET.fullmatch(others[0])
        what = "the latents of other buckets" if known else "which is not a latent cache"
        raise DataError(f"{folder} holds {others[0]}, {what}: choose another output folder")


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


Choose = Callable[[int, int], int]  # (place in the batch, number of variants) -> a variant


@dataclass
class LatentBatch:
    """Cached latents as `Tokenizer.latents` takes them, or pairs of rectified flow."""

    stored: Tensor  # (B, L) int64; or float32, for example (B, 2C, h, w): mean | std, data | noise
    labels: Tensor  # (B,) int64; all 0 where the pictures have no classes
    indices: Tensor  # (B,) int64, positions in the cache
    captions: list[tuple[str, ...]] | None = None  # the texts of each sample
    shown: Tensor | None = None  # (B,) int64, which of its captions each sample has in this epoch
    # By name, (B, ...): of the view and of the caption that each sample has in this epoch; float32,
    # int64 or bool.
    conditions: dict[str, Tensor] = field(default_factory=dict)
    epochs: Tensor | None = None  # (B,) int64, of samples that are encoded for each step
    grid: tuple[int, int] | None = None  # (h, w) of the latents, of a set with several buckets

    @property
    def texts(self) -> list[str] | None:
        """The caption that each sample has in this epoch; None if there are no captions."""
        if self.captions is None or self.shown is None:
            return None
        return [texts[n] for texts, n in zip(self.captions, self.shown.tolist(), strict=True)]


def choice(purpose: str, seed: int, key: Key, count: int) -> int:
    """One of `count` variants of a sample, a pure function of (seed, epoch, index); 0 if there is
    one at most."""
    if count <= 1:
        return 0
    digest = hashlib.blake2b(f"{seed}/{purpose}/{key[0]}/{key[1]}".encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "big") % count


@dataclass
class _MappedShard:
    """The arrays of a shard, memory-mapped."""

    stored: np.ndarray  # (n * views, values of one view)
    labels: np.ndarray  # (n,)
    captions: PackedCaptions | None
    conditions: dict[str, np.ndarray]  # (rows, ...) each


class LatentCache(Dataset):
    """A finished cache, verified once, then memory-mapped: it may be larger than memory.

    Index with keys (epoch, index). The view (for example flipped or not) and the caption of a
    sample are pure functions of (seed, epoch, index).

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
        return {name: value for name, value in self.__dict__.items() if name != "_shard"}

    @property
    def spec(self) -> LatentSpec:
        return self.info.spec

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The grids of several buckets: a cache has one grid."""
        return ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    @property
    def num_classes(self) -> int:
        return len(self.info.classes)

    @property
    def place(self) -> str:
        """Where the latents are, for messages."""
        return str(self.folder)

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest, which contains the hashes of all shards."""
        return hashlib.sha256(repr(self.info).encode()).hexdigest()

    def __len__(self) -> int:
        return self.info.num_samples

    def __getitems__(self, keys: Sequence[Key]) -> LatentBatch:
        return self._batch(
            np.array([index for _, index in keys]),
            lambda place, count: choice("view", self.seed, keys[place], count),
            lambda place, count: choice("caption", self.seed, keys[place], count),
        )

    def first_view(self, indices: Sequence[int]) -> LatentBatch:
        """The first view of some samples, for evaluation: the image itself, or its centre; and
        their first captions."""
        return self._batch(np.asarray(indices), _first, _first)

    def batches_of(self, indices: Sequence[int], size: int) -> Iterator[LatentBatch]:
        """The first view of some samples in order, at most `size` at a time."""
        for start in range(0, len(indices), size):
            yield self.first_view(indices[start : start + size])

    def even_subset(self, count: int, seed: int) -> list[int]:
        """At most `count` samples, evenly over classes and groups, to measure."""
        return even_subset(self.labels, self.info.groups or None, count, seed)

    def order(self, batch_size: int, seed: int) -> DataOrder:
        """The order of training."""
        return DataOrder(len(self), batch_size, seed)

    def batches(self, order: DataOrder, **share: Any) -> Iterator[list[LatentBatch]]:
        """The batches of each step in this process; for `share` see `stream_batches`."""
        return stream_batches(self, order, **share)

    def all_views(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """All views of some samples in the type of the files, (n, views, *info.shape)."""
        shards, rows = np.divmod(np.asarray(indices), self.info.shard_size)
        views = len(self.info.views)
        maps = [self._shard(shard).stored for shard in shards]
        parts = [m[row * views : row * views + views] for m, row in zip(maps, rows, strict=True)]
        return np.stack(parts).reshape(-1, views, *self.info.shape)

    def all_captions(self, indices: Sequence[int] | np.ndarray) -> list[tuple[str, ...]] | None:
        """The texts of some samples; None if the cache has none."""
        if not self.info.captions:
            return None
        shards, samples = np.divmod(np.asarray(indices), self.info.shard_size)
        places = zip(shards.tolist(), samples.tolist(), strict=True)
        return [self._captions(shard).of(sample) for shard, sample in places]

    def _batch(self, indices: np.ndarray, view: Choose, caption: Choose) -> LatentBatch:
        """The samples, each with the view and the caption that are chosen for its place."""
        shards, samples = (part.tolist() for part in np.divmod(indices, self.info.shard_size))
        numbers = range(len(indices))
        views = [view(place, len(self.info.views)) for place in numbers]
        rows = [s * len(self.info.views) + v for s, v in zip(samples, views, strict=True)]
        kind = MEMORY_TYPE[self.spec.kind]
        # Copies, one map at a time: a map, or a view of it, keeps its file open.
        chosen = [
            self._shard(n).stored[row].astype(kind) for n, row in zip(shards, rows, strict=True)
        ]
        batch = LatentBatch(
            torch.from_numpy(np.concatenate(chosen)).view(-1, *self.info.shape),
            self.labels[indices],
            torch.from_numpy(indices),
        )
        places = {"sample": samples, "view": rows}
        if self.info.captions:
            texts = [self._captions(n).rows(s) for n, s in zip(shards, samples, strict=True)]
            shown = [caption(place, len(texts[place])) for place in numbers]
            batch.captions, batch.shown = self.all_captions(indices), torch.tensor(shown)
            places["caption"] = [texts[place][shown[place]] for place in numbers]
        for condition in self.info.conditions:
            found = [
                self._shard(n).conditions[condition.name][row].copy()
                for n, row in zip(shards, places[condition.rows], strict=True)
            ]
            batch.conditions[condition.name] = in_memory(np.stack(found))
        return batch

    @cached_property
    def _shard(self) -> Callable[[int], _MappedShard]:
        """The number of a shard -> its arrays. The least recently used maps are closed: each keeps
        a file open."""
        return lru_cache(most_mapped())(self._map)

    def _captions(self, number: int) -> PackedCaptions:
        captions = self._shard(number).captions
        assert captions is not None, "the cache has captions"
        return captions

    def _map(self, number: int) -> _MappedShard:
        """A shard of the cache; raise `DataError` if its arrays contradict the manifest."""
        path, info = shard_path(self.folder, number), self.info
        arrays = map_shard(path)
        start, stop = info.shard_range(number)
        captions = PackedCaptions(arrays) if set(CAPTIONS) <= arrays.keys() else None
        count = captions.count if captions else 0
        expected = info.arrays_of(stop - start, count)
        for name in (*expected, *sorted(arrays.keys() - expected.keys() - set(CAPTIONS))):
            found = (arrays[name].dtype, arrays[name].shape) if name in arrays else ("no", name)
            wanted = expected.get(name, ("no", name))
            if found != wanted:
                raise DataError(
                    f"{path} holds {found[0]} {found[1]}; the manifest requires {wanted[0]} "
                    f"{wanted[1]}: encode again"
                )
        if (captions is not None) != bool(info.captions):
            raise DataError(
                f"{path} holds {'' if captions else 'no '}captions, and the manifest requires "
                f"{'some' if info.captions else 'none'}: encode again"
            )
        return _MappedShard(
            arrays["stored"].reshape(-1, math.prod(info.shape)),
            arrays["labels"],
            captions,
            {c.name: arrays[c.array].reshape(-1, *c.shape) for c in info.conditions},
        )

    def _verified_labels(self, number: int) -> np.ndarray:
        """The labels of a shard; raise `DataError` if it is damaged, or holds a value that no
        latent has."""
        path = shard_path(self.folder, number)
        if sha256_of(path) != self.info.shards[number]:
            raise DataError(
                f"{path} is damaged (its sha256 differs from the manifest): encode again"
            )
        shard = self._map(number)
        labels = shard.labels
        if labels.min() < 0 or labels.max() >= self.info.num_labels:
            raise DataError(
                f"{path} holds labels from {labels.min()} to {labels.max()}, but the manifest has "
                f"{len(self.classes)} classes: encode again"
            )
        for values in _pieces(shard.stored):
            self._verify_values(path, values)
        if shard.captions and (problem := shard.captions.problem(len(labels))):
            raise DataError(f"the captions in {path} {problem}: encode again")
        for name, array in shard.conditions.items():
            if array.dtype.kind == "f" and not all(np.isfinite(p).all() for p in _pieces(array)):
                raise DataError(
                    f"the condition {name} in {path} holds numbers that are NaN or infinite: "
                    "encode again"
                )
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


def _first(place: int, count: int) -> int:
    return 0


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """The values of an array, some at a time."""
    values = array.reshape(-1)
    for start in range(0, len(values), VERIFIED_AT_ONCE):
        yield values[start : start + VERIFIED_AT_ONCE]


def in_memory(array: np.ndarray) -> Tensor:
    """The values of a condition in the type that models take: float32, int64 or bool."""
    kinds: dict[str, type] = {"f": np.float32, "b": np.bool_}
    return torch.from_numpy(array.astype(kinds.get(array.dtype.kind, np.int64)))
