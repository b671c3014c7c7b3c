"""Frechet distance between two sets of features, seen as Gaussians (Heusel et al., 1706.08500).

Called `fd_<features>`, never FID: that name belongs to one particular Inception network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import SmaltiError


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
