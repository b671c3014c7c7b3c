"""Quantization: continuous features -> codes. What every quantizer promises.

Pure: no encoder, no decoder; a prior may own a copy.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.randomness import Drawn

Grids = tuple[tuple[int, int], ...]
SEARCH_ELEMENTS = 2**24  # scores held at once in the nearest-code search: 64 MB in fp32


@dataclass
class Quantized:
    """One pass through a quantizer."""

    latents: Tensor  # (B, d, h, w): what the decoder sees; gradients reach the features
    codes: Tensor  # (B, L) int64, the grids laid end to end, each in raster order
    losses: dict[str, Tensor] = field(default_factory=dict)  # scalars, already weighted


class Quantizer(nn.Module, ABC):
    """Features (B, d, h, w) <-> codes (B, L) in [0, vocab_size).

    All arithmetic is in fp32, also under autocast: in bf16 6 % of features change their code.
    """

    Config: ClassVar[type]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of codes, V."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Numbers per feature, d."""

    def grids(self, height: int, width: int) -> Grids:
        """The (h, w) code grids of features of this size, coarse to fine."""
        return ((height, width),)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers for a training pass over `count` pictures, a row for each."""
        del count, generator
        return {}

    @abstractmethod
    def _quantize(self, features: Tensor, drawn: Drawn | None) -> Quantized:
        """`forward` of fp32 features, without autocast."""

    @abstractmethod
    def _search(self, features: Tensor) -> Tensor:
        """`search` of fp32 features, without autocast and gradients."""

    @abstractmethod
    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        """`lookup` without autocast."""

    def forward(self, features: Tensor, drawn: Drawn | None = None) -> Quantized:
        """The differentiable pass over features (B, d, h, w).

        Args:
            drawn: rows of what `draw` returned; None draws from torch's global generators.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self._quantize(features.float(), drawn)

    @torch.no_grad()
    def search(self, features: Tensor) -> Tensor:
        """Features (B, d, h, w) -> codes (B, L)."""
        with torch.autocast(features.device.type, enabled=False):
            return self._search(features.float())

    def lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        """Codes (B, L) -> latents (B, d, height, width), fp32."""
        with torch.autocast(codes.device.type, enabled=False):
            return self._lookup(codes, height, width)

    def after_step(self, generator: torch.Generator) -> None:
        """Update what gradients do not, once after every accepted optimizer step.

        `generator` is a CPU generator, equal on all processes.
        """
        del generator

    def discard_step(self) -> None:
        """Forget what `forward` collected: the optimizer step was skipped."""


def nearest_codes(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook vector with the least Euclidean distance to each feature.

    Args:
        features: (N, d).
        codebook: (V, d).

    Returns:
        (N,) int64. |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 does not matter; features are
        taken in chunks so that memory is bounded whatever N and V.

    Raises:
        SmaltiError: features and codes differ in d.
    """
    if features.shape[-1] != codebook.shape[-1]:
        raise SmaltiError(
            f"features have {features.shape[-1]} numbers each but codes have {codebook.shape[-1]}"
        )
    half_norms = codebook.square().sum(-1) / 2  # (V,)
    chunk = max(1, SEARCH_ELEMENTS // len(codebook))
    return torch.cat(
        [
            torch.addmm(half_norms, part, codebook.T, alpha=-1).argmin(-1)
            for part in features.split(chunk)
        ]
    )


def as_rows(features: Tensor) -> Tensor:
    """(B, d, h, w) -> (B h w, d), raster order."""
    return features.movedim(1, -1).flatten(0, -2)


def as_maps(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    """(B h w, d) -> (B, d, h, w)."""
    return rows.unflatten(0, (batch, height, width)).movedim(-1, 1)
