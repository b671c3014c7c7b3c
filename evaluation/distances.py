"""Distances between sets of feature vectors: Frechet distance, KID, and nearest neighbours.

torchmetrics computes the first two. Ours are the checks of the features, and the choice of KID's
subsets by a generator that the caller passes: torchmetrics' own class takes them from the global
random state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smalti.errors import DataError
from smalti.evaluation.pictures import StoredImages

# torchmetrics is imported inside the functions: importing it takes several seconds.

# -------------------------------------------------------------------------------------------------
# Frechet distance between Gaussians fitted to the features (Heusel et al., 1706.08500)


class _PrecomputedFeatures(nn.Identity):
    """Replaces the Inception network in torchmetrics: its input is the features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """|m_r - m_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^1/2) of features (N, d) and (M, d), at least 0.

    m and C are mean and covariance, in float64. The metric is called `fd_<features>`, never FID:
    that name belongs to one particular Inception network.

    Raises:
        DataError: a wrong shape, fewer than 2 features on either side, or one that is not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_features(real)
    check_features(fake)
    metric = FrechetInceptionDistance(
        feature=_PrecomputedFeatures(real.shape[1]), sync_on_compute=False
    )
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, metric.compute().item())  # rounding can give less than 0


def check_features(features: Tensor) -> None:
    """Raise `DataError` unless features are (N, d), N >= 2, and finite."""
    if features.ndim != 2 or len(features) < 2:
        raise DataError(f"features have shape {tuple(features.shape)}; give (N, d), N >= 2")
    broken = int((~features.isfinite()).any(1).sum())
    if broken:
        raise DataError(
            f"{broken} of {len(features)} feature vectors are not finite: check that the images "
            "have no NaN or infinite values"
        )


# -------------------------------------------------------------------------------------------------
# KID: squared maximum mean discrepancy with a cubic kernel (Binkowski et al., 1801.01401)


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over random subsets; unbiased, so the mean may be below 0."""

    mean: float
    std: float


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, generator: torch.Generator
) -> KernelDistance:
    """KID of features (N, d) and (M, d): the unbiased estimate of eq. 4 with the kernel
    k(a, b) = (a.b / d + 1)^3, in float64, averaged over random subsets of both.

    Raises:
        DataError: fewer features than `subset_size`, or `subset_size` below 2.
    """
    from torchmetrics.image.kid import poly_mmd

    smallest = min(len(real), len(fake))
    if not 2 <= subset_size <= smallest:
        raise DataError(f"subset_size is {subset_size}; it must lie in [2, {smallest}]")
    estimates = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=generator)[:subset_size]]
        y = fake[torch.randperm(len(fake), generator=generator)[:subset_size]]
        estimates.append(poly_mmd(x.double(), y.double(), degree=3, coef=1.0))
    values = torch.stack(estimates)  # (subsets,)
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


# -------------------------------------------------------------------------------------------------
# Nearest neighbours: whether a sample copies a training image


CANDIDATES = 8  # references per query whose distance is computed exactly


@dataclass(frozen=True)
class Neighbours:
    """For each query the position of the nearest reference, and its distance."""

    indices: Tensor  # (Q,) int64; the first one of references at the same distance
    distances: Tensor  # (Q,) Euclidean; 0 for an exact copy


def nearest_neighbours(queries: Tensor, references: Tensor, chunk: int = 256) -> Neighbours:
    """Nearest of references (N, ...) for each of queries (Q, ...) in Euclidean distance.

    A matrix product, which is fast but inexact, selects a few candidates; the distances to these
    are computed from differences. For cosine distance pass features normalised to length 1.

    Args:
        chunk: queries per matrix product; a (chunk, N) matrix is in memory.

    Raises:
        DataError: no references, or references of another shape than the queries.
    """
    if not len(references) or queries.shape[1:] != references.shape[1:]:
        raise DataError(
            f"queries have shape {tuple(queries.shape)}, references {tuple(references.shape)}: "
            "give at least one reference, with the shape of the queries"
        )
    # Images that are similar and far from 0 differ by less than a matrix product's rounding error.
    centre = references.flatten(1).float().mean(0)
    flat_queries, flat_references = (p.flatten(1).float() - centre for p in (queries, references))
    found = [_nearest(part, flat_references) for part in flat_queries.split(chunk)]
    return Neighbours(
        torch.cat([f.indices for f in found]), torch.cat([f.distances for f in found])
    )


def _nearest(queries: Tensor, references: Tensor) -> Neighbours:
    """Nearest of references (N, d) for each of queries (Q, d)."""
    rough = torch.cdist(queries, references, compute_mode="use_mm_for_euclid_dist")  # (Q, N)
    candidates = rough.topk(min(CANDIDATES, len(references)), largest=False).indices
    candidates = candidates.sort(1).values  # (Q, k); min below takes the first of equal distances
    exact = [(queries - references[column]).norm(dim=1) for column in candidates.unbind(1)]
    distances, choice = torch.stack(exact, 1).min(1)  # (Q,)
    return Neighbours(candidates.gather(1, choice[:, None])[:, 0], distances)


class NeighbourSearch:
    """`nearest_neighbours` of pictures among references that are given a block at a time.

    The result is that for all blocks together, up to rounding of the distances (1e-6).

    Args:
        queries: read once per block, a part at a time.
    """

    def __init__(self, queries: StoredImages) -> None:
        self.queries = queries
        self.indices = torch.full((len(queries),), torch.iinfo(torch.int64).max)
        self.distances = torch.full((len(queries),), torch.inf)

    def add(self, references: Tensor, positions: Tensor) -> None:
        """Compare all queries with a block of references (B, C, H, W) in [-1, 1].

        Args:
            positions: (B,) ascending, the numbers of these references in the whole set.
        """
        first = 0
        for part in self.queries.split(self.queries.per_block):
            rows = slice(first, first + len(part))
            found = nearest_neighbours(part, references)
            indices, before = positions[found.indices], self.distances[rows]
            nearer = (found.distances < before) | (
                (found.distances == before) & (indices < self.indices[rows])
            )
            self.distances[rows] = torch.where(nearer, found.distances, before)
            self.indices[rows] = torch.where(nearer, indices, self.indices[rows])
            first += len(part)
