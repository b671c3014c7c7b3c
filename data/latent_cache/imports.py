"""Import of latents that other code encoded -> latent caches of smalti, train/ and heldout/.

Such latents do not record their tokenizer. The user names it, its fingerprint is written to the
caches, and only sizes can be checked against it. Held-out samples keep only their first view.

LlamaGen's extraction (2406.06525) writes two .npy files per picture:

    source/
        imagenet256_codes/0.npy, 1.npy, ...    int64 (1, views, L)
        imagenet256_labels/0.npy, 1.npy, ...   int64 (1,)

Ten views are its ten crops, two are a picture and its mirror image.

LightningDiT's extraction (2501.01423) writes shards of safetensors:

    source/
        latents_rank00_shard000.safetensors, ...   latents, latents_flip (n, C, h, w); labels (n,)
        latents_stats.pt                           mean and std per channel, (1, C, 1, 1)

Each of its latents is one sample of the tokenizer's posterior. Where a cache stores mean and
standard deviation, the sample takes the place of the mean and the deviation is 0, so that a prior
is trained on exactly this sample.
"""

import contextlib
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smalti.config import check_at_least
from smalti.data.classes import names_in, numbered_classes
from smalti.data.latent_cache.cache import EncodedRange, refuse_other_contents, write_cache
from smalti.data.latent_cache.manifest import SPLITS, CacheInfo
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.data.sources.arrays import map_npy
from smalti.data.sources.base import divide, fingerprint_of
from smalti.data.sources.verification import in_threads
from smalti.data.transforms import VIEW_SETS
from smalti.errors import ConfigurationError, DataError

# -- Protocol -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """The tokenizer that, according to the user, made the latents."""

    spec: LatentSpec
    fingerprint: str
    stored_shape: tuple[int, ...]  # see `Tokenizer.stored_shape` and `stored_statistics`
    stored_statistics: tuple[str, ...] = ()
    # Statistics per channel by which it normalises continuous latents: (z - mean) / std.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class ForeignLatents(ABC):
    """Latents in files of other code, in a fixed order.

    Raises:
        DataError: a file is missing, damaged, or does not fit the tokenizer; the message names it.
        ConfigurationError: the tokenizer makes another kind of latents.
    """

    folder: Path  # that contains the files; classes.json in it may name the classes
    views: tuple[str, ...]  # see `transforms.VIEW_SETS`
    labels: Tensor  # (N,) int64
    fingerprint: str  # changes with the files

    @abstractmethod
    def __init__(self, source: Path, origin: Origin, *, normalised: bool) -> None: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """All views of some samples as a cache stores them, (n, views, ...)."""


# -- LlamaGen -------------------------------------------------------------------------------------

CODES, LABELS = "_codes", "_labels"
# Positions of our ten crops in LlamaGen's order, which is top left, top right, bottom left, bottom
# right and centre, first of the picture, then of its mirror image.
TEN_CROPS = (4, 0, 1, 2, 3, 9, 5, 6, 7, 8)
ORDERS = {
    1: (VIEW_SETS["identity"], (0,)),
    2: (VIEW_SETS["flip"], (0, 1)),
    10: (VIEW_SETS["ten-crop"], TEN_CROPS),
}


class LlamaGenCodes(ForeignLatents):
    """LlamaGen's codes; `source` contains the folders of codes and labels, or is that of codes."""

    def __init__(self, source: Path, origin: Origin, *, normalised: bool) -> None:
        if normalised:
            raise ConfigurationError("codes are not normalised: leave out --normalised")
        if not isinstance(origin.spec, CodeSpec):
            raise ConfigurationError(
                "LlamaGen's latents are codes, and the tokenizer makes continuous latents: give "
                "the tokenizer that made them"
            )
        self._spec = origin.spec
        self._codes, self._labels = _folders(source)
        self.folder = self._codes.parent
        count = _count(self._codes, self._labels)
        self.views, self._order = self._views()
        labels = in_threads(self._label, count, "read labels")
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.fingerprint = fingerprint_of(
            [b"llamagen", self._codes.name.encode(), repr(labels).encode()]
        )

    def read(self, indices: Sequence[int]) -> Tensor:
        codes = np.concatenate([self._read(index) for index in indices])
        return torch.from_numpy(codes[:, self._order].astype(np.int64))

    def _views(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The views of all samples, and LlamaGen's order of them, from the first sample."""
        path = self._codes / "0.npy"
        shape = _read_npy(path).shape
        if len(shape) != 3 or shape[1] not in ORDERS:
            raise DataError(
                f"{path} has shape {shape}; codes are (1, views, L) with 1, 2 or 10 views"
            )
        return ORDERS[shape[1]]

    def _read(self, index: int) -> np.ndarray:
        path = self._codes / f"{index}.npy"
        codes = _read_npy(path)
        expected = (1, len(self.views), self._spec.length)
        if codes.shape != expected:
            raise DataError(
                f"{path} has shape {codes.shape}; with this tokenizer and the views of 0.npy it "
                f"must be {expected}"
            )
        if codes.min() < 0 or codes.max() >= self._spec.vocab_size:
            raise DataError(
                f"{path} holds codes from {codes.min()} to {codes.max()}; the tokenizer has "
                f"{self._spec.vocab_size}: give the tokenizer that made them"
            )
        return codes

    def _label(self, index: int) -> int:
        path = self._labels / f"{index}.npy"
        label = _read_npy(path)
        if label.size != 1 or label.min() < 0:
            raise DataError(f"{path} holds {label.tolist()}; a label is one number from 0 on")
        return int(label.item())


def _folders(source: Path) -> tuple[Path, Path]:
    """The folders of codes and of labels."""
    source = Path(source)
    if source.name.endswith(CODES):
        found = [source]
    else:
        found = sorted(path for path in source.glob(f"*{CODES}") if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{source} must hold one folder NAME{CODES}; it has {names}: give one")
    codes = found[0]
    labels = codes.with_name(codes.name.removesuffix(CODES) + LABELS)
    if not labels.is_dir():
        raise DataError(f"the folder {labels} of the labels is missing: copy it there")
    return codes, labels


def _count(*folders: Path) -> int:
    """The number of samples, N; raise unless each folder holds 0.npy to N-1.npy alone."""
    found = [_numbers(folder) for folder in folders]
    count = max(len(numbers) for numbers in found)
    if count == 0:
        raise DataError(f"{folders[0]} is empty: check the path of the latents")
    for folder, numbers in zip(folders, found, strict=True):
        missing = next((n for n in range(count) if n not in numbers), None)
        if missing is not None:
            raise DataError(
                f"{folder / f'{missing}.npy'} is missing: codes and labels are numbered from 0 "
                "without gaps"
            )
    return count


def _numbers(folder: Path) -> set[int]:
    numbers = set()
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix != ".npy" or not path.stem.isascii() or not path.stem.isdecimal():
            raise DataError(f"{path} is not a numbered .npy file: move it elsewhere")
        if path.stem != str(int(path.stem)):
            raise DataError(
                f"{path} has leading zeros: rename it to {int(path.stem)}.npy, as LlamaGen does"
            )
        numbers.add(int(path.stem))
    return numbers


def _read_npy(path: Path) -> np.ndarray:
    """The integers in a file, memory-mapped."""
    array = map_npy(path)
    if array.dtype.kind not in "iu" or array.size == 0:
        raise DataError(f"{path} holds {array.dtype} {array.shape}; it must hold integers")
    return array


# -- LightningDiT ---------------------------------------------------------------------------------

SUFFIX = ".safetensors"
STATISTICS = "latents_stats.pt"
NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
TENSORS = {"identity": "latents", "flip": "latents_flip"}
FLOATS = ("F32", "F16", "BF16", "F64")
# Largest difference between the mean of the latents and that of the tokenizer, in standard
# deviations, and largest ratio of their standard deviations. Latents of other pictures by the same
# tokenizer differ by less, latents of another tokenizer by more.
MAX_SHIFT, MAX_RATIO = 1.0, 2.0
MAX_STATISTICS = 2**22  # bytes of latents_stats.pt


class LightningDiTLatents(ForeignLatents):
    """LightningDiT's continuous latents.

    Args:
        normalised: the files contain (z - mean) / std with the statistics of latents_stats.pt, and
            the normalisation is undone. Otherwise they contain raw latents, and if latents_stats.pt
            exists, its statistics must be near those of the tokenizer.
    """

    def __init__(self, source: Path, origin: Origin, *, normalised: bool) -> None:
        if not isinstance(origin.spec, ContinuousSpec):
            raise ConfigurationError(
                "LightningDiT's latents are continuous, and the tokenizer makes codes: give the "
                "tokenizer that made them"
            )
        if origin.stored_statistics not in ((), ("mean", "std")):
            raise ConfigurationError(
                f"the tokenizer stores {', '.join(origin.stored_statistics)}; LightningDiT's "
                "latents can be stored as mean and std, or as they are: give another tokenizer"
            )
        self.folder, self._spec = source, origin.spec
        self._with_std = bool(origin.stored_statistics)
        self._files = _shard_files(source)
        self.views = _views_in(self._files[0])
        counts = [self._check(path) for path in self._files]
        self._starts = torch.tensor([0, *counts]).cumsum(0)  # of each shard, and the end
        self.labels = torch.cat([_labels_in(path) for path in self._files])
        self._mean, self._std = torch.tensor(0.0), torch.tensor(1.0)  # of the latents in the files
        statistics = source / STATISTICS
        if normalised:
            self._mean, self._std = _statistics(statistics, origin.spec.channels)
        elif statistics.is_file():
            _compare(statistics, origin)
        sizes = [f"{path.name}/{path.stat().st_size}" for path in self._files]
        unit = torch.cat([self._mean.flatten(), self._std.flatten()]).tolist()
        content = [b"lightningdit", repr(sizes).encode(), repr(unit).encode()]
        self.fingerprint = fingerprint_of([*content, self.labels.numpy().tobytes()])

    def read(self, indices: Sequence[int]) -> Tensor:
        wanted = torch.tensor(indices)
        shards = torch.searchsorted(self._starts, wanted, right=True) - 1
        parts = []
        for shard in shards.unique_consecutive().tolist():
            rows = (wanted[shards == shard] - self._starts[shard]).tolist()
            parts.append(self._rows(self._files[shard], rows))
        latents = torch.cat(parts) * self._std + self._mean  # (n, views, C, h, w)
        if not self._with_std:
            return latents
        return torch.cat([latents, torch.zeros_like(latents)], dim=2)  # (n, views, 2C, h, w)

    def _rows(self, path: Path, rows: Sequence[int]) -> Tensor:
        """Rows of a shard, (n, views, C, h, w) float32."""
        with safe_open(path, framework="pt") as shard:
            views = []
            for view in self.views:
                tensor = shard.get_slice(TENSORS[view])
                views.append(torch.stack([tensor[row].float() for row in rows]))
        stored = torch.stack(views, dim=1)
        for row, finite in zip(rows, stored.flatten(1).isfinite().all(1), strict=True):
            if not finite:
                raise DataError(
                    f"row {row} of {path} holds numbers that are not finite: extract it again"
                )
        return stored

    def _check(self, path: Path) -> int:
        """The number of samples in a shard; raise if a tensor is missing or has another shape."""
        expected = (self._spec.channels, self._spec.height, self._spec.width)
        try:
            with safe_open(path, framework="pt") as shard:
                names, promised = set(shard.keys()), (shard.metadata() or {}).get("total_size")
                missing = {"labels", *(TENSORS[v] for v in self.views)} - names
                if missing or (TENSORS["flip"] in names) != ("flip" in self.views):
                    raise DataError(
                        f"{path} holds {', '.join(sorted(names))}; it must hold the tensors "
                        f"of {self._files[0].name}, and labels"
                    )
                count = shard.get_slice("labels").get_shape()[0]
                for view in self.views:
                    tensor = shard.get_slice(TENSORS[view])
                    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                    if shape != (count, *expected) or dtype not in FLOATS or count < 1:
                        raise DataError(
                            f"{TENSORS[view]} of {path} is {dtype} {shape} with {count} labels; "
                            f"with this tokenizer each is {expected}"
                        )
        except (SafetensorError, IndexError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        if promised not in (None, str(count)):
            raise DataError(
                f"{path} holds {count} samples, but its header declares {promised}: copy it again"
            )
        return count


def _shard_files(source: Path) -> list[Path]:
    """The shards in the order in which LightningDiT reads them; raise if one is missing."""
    files = sorted(path for path in source.glob(f"*{SUFFIX}") if path.name[0] != ".")
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is not a file: move it elsewhere")
    if not files:
        raise DataError(f"{source} holds no {SUFFIX} files: check the path of the latents")
    matches = [NAME.fullmatch(path.name) for path in files]
    if not any(matches):
        return files
    numbers = {}
    for path, match in zip(files, matches, strict=True):
        if match is None:
            raise DataError(f"{path} is not named like the other shards: move it elsewhere")
        key = int(match[1]), int(match[2])
        if key in numbers:
            raise DataError(f"{path} and {numbers[key]} are the same shard: remove one")
        numbers[key] = path
    ranks, shards = max(rank for rank, _ in numbers), max(shard for _, shard in numbers)
    for key in ((rank, shard) for rank in range(ranks + 1) for shard in range(shards + 1)):
        if key not in numbers:
            name = "latents_rank{:02d}_shard{:03d}".format(*key)
            raise DataError(f"{source / name}{SUFFIX} is missing: copy or extract it")
    return [numbers[key] for key in sorted(numbers)]


def _views_in(path: Path) -> tuple[str, ...]:
    try:
        with safe_open(path, framework="pt") as shard:
            return VIEW_SETS["flip" if TENSORS["flip"] in shard.keys() else "identity"]  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _labels_in(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as shard:
        labels = shard.get_tensor("labels")
    if labels.ndim != 1 or labels.is_floating_point() or labels.min() < 0:
        raise DataError(f"the labels of {path} must be integers from 0 on, one for each latent")
    return labels.long()


def _statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and std, (C, 1, 1) each, from a file of torch.save; pickled code is never run."""
    if not path.is_file():
        raise DataError(f"{path} is missing: it holds the mean and std of normalised latents")
    if _unpacked_size(path) > MAX_STATISTICS:
        raise DataError(f"{path} is too large for the mean and std of {channels} channels")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is damaged, or holds more than tensors: {reason}") from error
    values = content if isinstance(content, dict) else {}
    mean, std = values.get("mean"), values.get("std")
    for value in (mean, std):
        if not isinstance(value, Tensor) or value.numel() != channels or not value.isfinite().all():
            raise DataError(f"{path} must hold mean and std of {channels} channels, finite numbers")
    mean, std = (torch.as_tensor(value).float().reshape(-1, 1, 1) for value in (mean, std))
    if (std <= 0).any():
        raise DataError(f"{path} has a std of {std.min():g}; each must be positive")
    return mean, std


def _unpacked_size(path: Path) -> int:
    """The bytes of a file, or of the members of a zip file, which may be compressed."""
    size = path.stat().st_size
    if size <= MAX_STATISTICS and zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            size = max(size, sum(member.file_size for member in archive.infolist()))
    return size


def _compare(path: Path, origin: Origin) -> None:
    """Raise unless the mean and std of the latents are near those of the tokenizer."""
    mean, std = (value.flatten() for value in _statistics(path, len(origin.mean)))
    shift = (mean - torch.tensor(origin.mean)).abs() / torch.tensor(origin.std)
    ratio = (std / torch.tensor(origin.std)).log().abs().exp()
    for channel in ((shift > MAX_SHIFT) | (ratio > MAX_RATIO)).nonzero().flatten().tolist():
        raise DataError(
            f"{path}: channel {channel} has mean {mean[channel]:.3g} and std {std[channel]:.3g}, "
            f"and the tokenizer normalises by {origin.mean[channel]:.3g} and "
            f"{origin.std[channel]:.3g}: give the tokenizer that made them, set latent_mean and "
            "latent_std in its config.json, or pass --normalised"
        )


# -- The import -----------------------------------------------------------------------------------

Format = Literal["llamagen", "lightningdit"]
FORMATS: dict[Format, type[ForeignLatents]] = {
    "llamagen": LlamaGenCodes,
    "lightningdit": LightningDiTLatents,
}


def open_foreign(source: Path, layout: Format, origin: Origin, normalised: bool) -> ForeignLatents:
    """Latents of other code; for `normalised` see the class of the layout."""
    if not source.is_dir():
        raise DataError(f"the folder {source} does not exist: check the path of the latents")
    return FORMATS[layout](source, origin, normalised=normalised)


@dataclass(frozen=True)
class Division:
    """How imported samples are divided and written."""

    heldout_fraction: float = 0.1  # of the samples, for validation
    split_seed: int = 0  # decides which samples are held out
    shard_size: int = 8192  # samples per file
    num_samples: int = 0  # expected number; 0 = unknown

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
    """Write the caches out/train and out/heldout; an interrupted import continues.

    Args:
        rank, world_size, barrier, progress: see `write_cache`.

    Raises:
        DataError: see `ForeignLatents` and `write_cache`; or class names or counts do not fit.
    """
    count = len(latents.labels)
    if division.num_samples not in (0, count):
        raise DataError(
            f"{latents.folder} holds {count} samples, and --num_samples is "
            f"{division.num_samples}: copy the missing samples, or correct --num_samples"
        )
    beside = latents.folder / "classes.json"
    classes, labels = numbered_classes(
        latents.labels.numpy(), names_in(beside.parent), beside.parent
    )
    groups = [str(index) for index in range(count)]
    heldout = divide(labels, groups, division.heldout_fraction, division.split_seed)
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
            stored_shape=origin.stored_shape,
            stored_statistics=origin.stored_statistics,
        )
        write_cache(
            out / split,
            info,
            _Reader(latents, labels, positions, len(views)),
            rank=rank,
            world_size=world_size,
            barrier=barrier,
            progress=progress,
        )


@dataclass
class _Reader:
    """(start, stop) -> the samples at these positions of a split."""

    latents: ForeignLatents
    labels: Tensor  # (N,) of all latents
    positions: list[int]
    num_views: int

    def __call__(self, start: int, stop: int) -> EncodedRange:
        chosen = self.positions[start:stop]
        stored = self.latents.read(chosen)[:, : self.num_views]
        return EncodedRange(stored, self.labels[torch.tensor(chosen)])
