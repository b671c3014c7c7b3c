"""Quantization: continuous features -> codes.

    nearest_codes    search for the nearest codebook vector
    estimators       a gradient for that choice, which is not differentiable
    entropy_loss     low entropy of each feature's code, high entropy of the codes of a batch
    Quantizer        what every quantizer provides

No file of this folder imports an encoder or a decoder, so a prior may contain a quantizer.
Shapes: B batch, d numbers per feature, h w latent grid, L codes per image, V vocabulary, N = B h w.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.distributed import mean_over_processes
from smalti.errors import DataError

CHUNK_ELEMENTS = 2**24  # elements of a (N, V) matrix in memory at once: 64 MB in fp32
TINY = 1e-20  # smaller probabilities count as 0

# -------------------------------------------------------------------------------------------------
# Rows and maps


def as_rows(features: Tensor) -> Tensor:
    """(B, d, h, w) -> (B h w, d), in raster order."""
    return rearrange(features, "b d h w -> (b h w) d")


def as_maps(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    """(B h w, d) -> (B, d, h, w)."""
    return rearrange(rows, "(b h w) d -> b d h w", b=batch, h=height, w=width)


# -------------------------------------------------------------------------------------------------
# Nearest-neighbour search: argmin_k |z - e_k|^2 (VQ-VAE, 1711.00937, eq. 1)


def nearest_codes(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook vector with the least Euclidean distance to each feature.

    Args:
        features: (N, d).
        codebook: (V, d).

    Returns:
        (N,) int64.

    Raises:
        DataError: features and codes differ in d.
    """
    if features.shape[-1] != codebook.shape[-1]:
        raise DataError(
            f"features have {features.shape[-1]} numbers each but codes have {codebook.shape[-1]}"
        )
    # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all codes.
    half_norms = codebook.square().sum(-1) / 2  # (V,)
    # Memory is bounded whatever N and V are.
    chunk = max(1, CHUNK_ELEMENTS // len(codebook))
    return torch.cat(
        [
            torch.addmm(half_norms, rows, codebook.T, alpha=-1).argmin(-1)  # (n, V) -> (n,)
            for rows in features.split(chunk)
        ]
    )


# -------------------------------------------------------------------------------------------------
# Gradient estimators: from the quantized vector back to the feature

Estimator = Literal["straight-through", "rotation"]


def straight_through(features: Tensor, quantized: Tensor) -> Tensor:
    """z + sg(q - z): the gradient at the quantized vector is copied to the feature.

    Bengio et al., 1308.3432; VQ-VAE, 1711.00937, section 3.2.
    """
    return features + (quantized - features).detach()


def rotation(features: Tensor, quantized: Tensor) -> Tensor:
    """The rotation trick (Fifty et al., 2410.06424, section 4.2).

    q is written as a rotation and rescaling of z, both held constant, so that the angle between
    gradient and vector is kept: q = |q| / |z| (z - 2 r r'z + 2 q^ z^'z), with the unit vectors
    z^, q^ and r = (z^ + q^) / |z^ + q^|.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1, keepdim=True)  # (B, 1, ...)

    z, q = features, quantized.detach()
    z_norm = z.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    unit_z = z.detach() / z_norm
    unit_q = F.normalize(q, dim=1, eps=1e-6)
    r = F.normalize(unit_z + unit_q, dim=1, eps=1e-6)
    rotated = z - 2 * r * dot(r, z) + 2 * unit_q * dot(unit_z, z)
    return rotated * (q.norm(dim=1, keepdim=True) / z_norm)


ESTIMATORS = {"straight-through": straight_through, "rotation": rotation}


def estimate(kind: Estimator, features: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` (B, d, ...), with the gradient that `kind` gives to `features`."""
    return ESTIMATORS[kind](features, quantized)


# -------------------------------------------------------------------------------------------------
# Entropy regularisation: E[H(p(. | z))] - gamma H(E[p(. | z)]) (MAGVIT-v2, 2310.05737, eq. 6)


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; its gradient is finite where p is 0."""
    return -(probabilities * probabilities.clamp_min(TINY).log()).sum(-1)


def entropy_loss(
    features: Tensor, codebook: Tensor, temperature: float, diversity: float = 1.0
) -> Tensor:
    """E[H(p(. | z))] - gamma H(E[p(. | z)]) with p(k | z) ~ exp(-|z - e_k|^2 / T), in nats.

    Low if each feature has one probable code and the batch uses all codes evenly. The outer mean is
    over all processes.

    Args:
        features: (N, d).
        codebook: (V, d).
        temperature: T.
        diversity: gamma.

    Returns:
        A scalar.
    """

    def entropy_and_sum(rows: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        scores = (2 * rows @ vectors.T - vectors.square().sum(-1)) / temperature  # (n, V)
        p = scores.softmax(-1)
        return entropy(p).sum(), p.sum(0)

    # The (N, V) probabilities are computed in chunks, and recomputed in the backward pass.
    chunk = max(1, CHUNK_ELEMENTS // len(codebook))
    each = features.new_zeros(())
    mean = features.new_zeros(len(codebook))  # (V,)
    for rows in features.split(chunk):
        entropies, probabilities = checkpoint(entropy_and_sum, rows, codebook, use_reentrant=False)
        each, mean = each + entropies, mean + probabilities
    mean = mean_over_processes(mean / len(features))
    return each / len(features) - diversity * entropy(mean)


# -------------------------------------------------------------------------------------------------
# What every quantizer provides

Grids = tuple[tuple[int, int], ...]


@dataclass
class Quantized:
    """One pass through a quantizer."""

    latents: Tensor  # (B, d, h, w): input of the decoder; gradients reach the features
    codes: Tensor  # (B, L) int64, the grids concatenated, each in raster order
    losses: dict[str, Tensor] = field(default_factory=dict)  # scalars, already weighted


class Quantizer(nn.Module, ABC):
    """Features (B, d, h, w) <-> codes (B, L) in [0, vocab_size).

    All arithmetic is in fp32, also under autocast: in bf16 6 % of the features change their code.
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
        """The (h, w) grids of codes of features of this size, coarse to fine."""
        return ((height, width),)

    @abstractmethod
    def _quantize(self, features: Tensor) -> Quantized:
        """`forward` of fp32 features, without autocast."""

    @abstractmethod
    def _search(self, features: Tensor) -> Tensor:
        """`search` of fp32 features, without autocast and gradients."""

    @abstractmethod
    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        """`lookup` without autocast."""

    def sample_random_inputs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs of `forward` for a training pass over `count` images, by argument name.

        Each has one row per image. Most quantizers have none.
        """
        del count, generator
        return {}

    def forward(self, features: Tensor) -> Quantized:
        """The differentiable pass over features (B, d, h, w).

        A quantizer with random inputs takes them as optional keyword arguments, under the names
        that `sample_random_inputs` uses; without them it samples from torch's global generators.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self._quantize(features.float())

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
        """Discard what `forward` collected, because the optimizer step was skipped."""
