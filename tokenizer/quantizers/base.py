"""Quantization: continuous features -> codes. What every quantizer promises.

Pure: no encoder, no decoder; a prior may own a copy.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.distributed import mean_over_processes
from smalti.errors import SmaltiError
from smalti.randomness import RandomInputs

# -------------------------------------------------------------------------------------------------
# Gradients through a choice that has none: from a quantized vector back to the feature.

Estimator = Literal["straight-through", "rotation"]


def estimate(kind: Estimator, features: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` (B, d, ...), with the gradient that `kind` gives to `features`."""
    return ESTIMATORS[kind](features, quantized)


def straight_through(features: Tensor, quantized: Tensor) -> Tensor:
    """z + sg(q - z): the gradient at the quantized vector is copied to the feature.

    Bengio et al., 1308.3432; VQ-VAE, 1711.00937, section 3.1.
    """
    return features + (quantized - features).detach()


def rotation(features: Tensor, quantized: Tensor) -> Tensor:
    """q as a rotation and rescaling of z, both held constant, so that the angle between gradient
    and vector is kept (Fifty et al., 2410.06424, section 4.2).

    q = |q| / |z| (z - 2 r r'z + 2 q^ z^'z), with unit vectors z^, q^ and r = (z^ + q^) / |z^ + q^|.
    """
    z, q = features, quantized.detach()
    z_norm = z.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    unit_z = z.detach() / z_norm
    unit_q = F.normalize(q, dim=1, eps=1e-6)
    middle = F.normalize(unit_z + unit_q, dim=1, eps=1e-6)
    rotated = z - 2 * middle * _dot(middle, z) + 2 * unit_q * _dot(unit_z, z)
    return rotated * (q.norm(dim=1, keepdim=True) / z_norm)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


ESTIMATORS = {"straight-through": straight_through, "rotation": rotation}


# -------------------------------------------------------------------------------------------------
# Entropy regularisation: each feature should be sure of its code, the batch should use them all.
#
# L = E[H(p(. | z))] - gamma H(E[p(. | z)]), with p(k | z) ~ exp(-|z - e_k|^2 / T) (MAGVIT-v2,
# 2310.05737, eq. 6). The mean is over all processes.

TINY = 1e-20  # below this, probabilities count as 0
CHUNK_ELEMENTS = 2**24  # probabilities held at once: 64 MB in fp32


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; its gradient is finite where p is 0."""
    return -(probabilities * probabilities.clamp_min(TINY).log()).sum(-1)


def entropy_loss(
    features: Tensor, codebook: Tensor, temperature: float, diversity: float = 1.0
) -> Tensor:
    """The loss above for features (N, d) and a codebook (V, d), a scalar in nats.

    The (N, V) probabilities are made chunk by chunk, again in the backward pass.
    """

    def part(rows: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        scores = (2 * rows @ vectors.T - vectors.square().sum(-1)) / temperature
        p = scores.softmax(-1)
        return entropy(p).sum(), p.sum(0)

    chunk = max(1, CHUNK_ELEMENTS // len(codebook))
    own = features.new_zeros(())
    mean = features.new_zeros(len(codebook))
    for rows in features.split(chunk):
        entropies, probabilities = checkpoint(part, rows, codebook, use_reentrant=False)
        own, mean = own + entropies, mean + probabilities
    mean = mean_over_processes(mean / len(features))
    return own / len(features) - diversity * entropy(mean)


# -------------------------------------------------------------------------------------------------
# Quantization: continuous features -> codes. What every quantizer promises.

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

    def sample_random_inputs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers for a training pass over `count` pictures, a row for each."""
        del count, generator
        return {}

    @abstractmethod
    def _quantize(self, features: Tensor, random_inputs: RandomInputs | None) -> Quantized:
        """`forward` of fp32 features, without autocast."""

    @abstractmethod
    def _search(self, features: Tensor) -> Tensor:
        """`search` of fp32 features, without autocast and gradients."""

    @abstractmethod
    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        """`lookup` without autocast."""

    def forward(self, features: Tensor, random_inputs: RandomInputs | None = None) -> Quantized:
        """The differentiable pass over features (B, d, h, w).

        Args:
            drawn: rows of what `draw` returned; None draws from torch's global generators.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self._quantize(features.float(), random_inputs)

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
