"""Latents as LightningDiT's extraction leaves them (2501.01423): shards of safetensors.

    source/
        latents_rank00_shard000.safetensors, ...   latents, latents_flip (n, C, h, w); labels (n,)
        latents_stats.pt                           mean and std per channel, (1, C, 1, 1)

Each latent is one draw from the tokenizer's posterior. A cache stores mean and standard deviation:
the draw is taken for the mean, with a deviation of 0, so that a prior sees this very draw.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smalti.data.latent_cache.imports import ForeignLatents, Origin
from smalti.data.latents import ContinuousSpec
from smalti.data.sources.base import fingerprint_of
from smalti.data.transforms import VIEW_SETS
from smalti.errors import SmaltiError

SUFFIX = ".safetensors"
STATISTICS = "latents_stats.pt"
NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
TENSORS = {"identity": "latents", "flip": "latents_flip"}
FLOATS = ("F32", "F16", "BF16", "F64")
# How far the statistics of the latents may be from the tokenizer's, in standard deviations and as
# a ratio: pictures of another kind differ by less, another tokenizer by more.
MAX_SHIFT, MAX_RATIO = 1.0, 2.0


class LightningDiTLatents(ForeignLatents):
    """See `ForeignLatents`.

    Args:
        normalised: the files hold (z - mean) / std by latents_stats.pt, which is undone; else raw
            latents, whose statistics, where they are there, must be near the tokenizer's.
    """

    def __init__(self, source: Path, origin: Origin, *, normalised: bool) -> None:
        if not isinstance(origin.spec, ContinuousSpec):
            raise SmaltiError(
                "LightningDiT's latents are continuous, and the tokenizer makes codes: give the "
                "tokenizer that made them"
            )
        self.folder, self._spec = source, origin.spec
        self._files = _shards(source)
        self.views = _views(self._files[0])
        counts = [self._check(path) for path in self._files]
        self._starts = torch.tensor([0, *counts]).cumsum(0)  # of each shard, and the end
        self.labels = torch.cat([_labels(path) for path in self._files])
        self._mean, self._std = torch.tensor(0.0), torch.tensor(1.0)  # of what the files hold
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
        draws = torch.cat(parts) * self._std + self._mean
        return torch.cat([draws, torch.zeros_like(draws)], dim=2)  # (n, views, 2C, h, w)

    def _rows(self, path: Path, rows: Sequence[int]) -> Tensor:
        """(n, views, C, h, w) float32 of a shard."""
        with safe_open(path, framework="pt") as shard:
            views = []
            for view in self.views:
                tensor = shard.get_slice(TENSORS[view])
                views.append(torch.stack([tensor[row].float() for row in rows]))
        stored = torch.stack(views, dim=1)
        for row, finite in zip(rows, stored.flatten(1).isfinite().all(1), strict=True):
            if not finite:
                raise SmaltiError(f"row {row} of {path} holds numbers that are not finite")
        return stored

    def _check(self, path: Path) -> int:
        """How many samples a shard holds; raise `SmaltiError` unless it is as it should be."""
        expected = (self._spec.channels, self._spec.height, self._spec.width)
        try:
            with safe_open(path, framework="pt") as shard:
                names, promised = set(shard.keys()), (shard.metadata() or {}).get("total_size")
                missing = {"labels", *(TENSORS[v] for v in self.views)} - names
                if missing or (TENSORS["flip"] in names) != ("flip" in self.views):
                    raise SmaltiError(
                        f"{path} holds {', '.join(sorted(names))}; it must hold labels and what "
                        f"{self._files[0].name} does"
                    )
                count = shard.get_slice("labels").get_shape()[0]
                for view in self.views:
                    tensor = shard.get_slice(TENSORS[view])
                    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                    if shape != (count, *expected) or dtype not in FLOATS or count < 1:
                        raise SmaltiError(
                            f"{TENSORS[view]} of {path} is {dtype} {shape} with {count} labels; "
                            f"with this tokenizer each is {expected}"
                        )
        except (SafetensorError, IndexError) as error:
            raise SmaltiError(f"{path} is damaged: {error}") from error
        if promised not in (None, str(count)):
            raise SmaltiError(f"{path} holds {count} samples, and says it has {promised}")
        return count


def _shards(source: Path) -> list[Path]:
    """The shards in the order that LightningDiT reads them; none may be missing in between."""
    files = sorted(path for path in source.glob(f"*{SUFFIX}") if path.name[0] != ".")
    if not files:
        raise SmaltiError(f"{source} holds no {SUFFIX} files: check where the latents are")
    matches = [NAME.fullmatch(path.name) for path in files]
    if not any(matches):
        return files
    numbers = {}
    for path, match in zip(files, matches, strict=True):
        if match is None:
            raise SmaltiError(f"{path} is not named as the other shards are: move it elsewhere")
        key = int(match[1]), int(match[2])
        if key in numbers:
            raise SmaltiError(f"{path} and {numbers[key]} are the same shard: remove one")
        numbers[key] = path
    ranks, shards = max(rank for rank, _ in numbers), max(shard for _, shard in numbers)
    for key in ((rank, shard) for rank in range(ranks + 1) for shard in range(shards + 1)):
        if key not in numbers:
            name = "latents_rank{:02d}_shard{:03d}".format(*key)
            raise SmaltiError(f"{source / name}{SUFFIX} is missing: other processes wrote theirs")
    return [numbers[key] for key in sorted(numbers)]


def _views(path: Path) -> tuple[str, ...]:
    try:
        with safe_open(path, framework="pt") as shard:
            return VIEW_SETS["flip" if TENSORS["flip"] in shard.keys() else "identity"]  # noqa: SIM118
    except SafetensorError as error:
        raise SmaltiError(f"{path} is damaged: {error}") from error


def _labels(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as shard:
        labels = shard.get_tensor("labels")
    if labels.ndim != 1 or labels.is_floating_point() or labels.min() < 0:
        raise SmaltiError(f"the labels of {path} must be integers from 0 on, one for each latent")
    return labels.long()


def _statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and std, (C, 1, 1) each, from a file of torch; what it pickles is never run."""
    if not path.is_file():
        raise SmaltiError(f"{path} is missing: it says how the latents were normalised")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SmaltiError(f"{path} is damaged, or not tensors alone: {reason}") from error
    values = content if isinstance(content, dict) else {}
    mean, std = values.get("mean"), values.get("std")
    for value in (mean, std):
        if not isinstance(value, Tensor) or value.numel() != channels or not value.isfinite().all():
            raise SmaltiError(
                f"{path} must hold mean and std of {channels} channels, finite numbers"
            )
    mean, std = (torch.as_tensor(value).float().reshape(-1, 1, 1) for value in (mean, std))
    if (std <= 0).any():
        raise SmaltiError(f"{path} has a std of {std.min():g}; each must be positive")
    return mean, std


def _compare(path: Path, origin: Origin) -> None:
    """Raise `SmaltiError` unless the statistics could be those of the tokenizer's latents."""
    mean, std = (value.flatten() for value in _statistics(path, len(origin.mean)))
    shift = (mean - torch.tensor(origin.mean)).abs() / torch.tensor(origin.std)
    ratio = (std / torch.tensor(origin.std)).log().abs().exp()
    for channel in ((shift > MAX_SHIFT) | (ratio > MAX_RATIO)).nonzero().flatten().tolist():
        raise SmaltiError(
            f"{path}: channel {channel} has mean {mean[channel]:.3g} and std {std[channel]:.3g}, "
            f"and the tokenizer normalises by {origin.mean[channel]:.3g} and "
            f"{origin.std[channel]:.3g}: give the tokenizer that made them, set latent_mean and "
            "latent_std in its config.json, or pass --normalised"
        )
