"""Frechet distance between two sets of features, seen as Gaussians (Heusel et al., 1706.08500).

Called `fd_<features>`, never FID: that name belongs to one particular Inception network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import SmaltiError

# -------------------------------------------------------------------------------------------------
# KID: squared maximum mean discrepancy with a cubic kernel (Binkowski et al., 1801.01401).


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over random subsets; unbiased, so it may fall below 0."""

    mean: float
    std: float


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, generator: torch.Generator
) -> KernelDistance:
    """KID of features (N, d) and (M, d).

    Raises:
        SmaltiError: fewer features than `subset_size`, or `subset_size` below 2.
    """
    smallest = min(len(real), len(fake))
    if not 2 <= subset_size <= smallest:
        raise SmaltiError(f"subset_size is {subset_size}; it must lie in [2, {smallest}]")
    estimates = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=generator)[:subset_size]]
        y = fake[torch.randperm(len(fake), generator=generator)[:subset_size]]
        estimates.append(squared_mmd(x.double(), y.double()))
    values = torch.stack(estimates)
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate from (m, d) and (m, d), eq. 4, with k(a, b) = (a.b / d + 1)^3."""
    m = len(x)
    k_xx, k_yy, k_xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return within - 2 * k_xy.mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


# -------------------------------------------------------------------------------------------------
# Frechet distance between two sets of features, seen as Gaussians (Heusel et al., 1706.08500).


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (d,) and covariance (d, d) of features, in float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of features (N, d), N >= 2.

        Raises:
            SmaltiError: another shape, too few features, or one that is not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise SmaltiError(f"features have shape {tuple(features.shape)}; give (N, d), N >= 2")
        broken = int((~features.isfinite()).any(1).sum())
        if broken:
            raise SmaltiError(
                f"{broken} of {len(features)} feature vectors are not finite: check the pictures"
            )
        covariance = torch.atleast_2d(torch.cov(features.double().T))  # a number if d is 1
        return cls(features.double().mean(0), covariance, len(features))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), at least 0.

    By symmetric eigen-decompositions, which stay real where a matrix square root turns complex.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * product.sqrt().sum()
    return max(0.0, ((a.mean - b.mean).square().sum() + trace).item())
