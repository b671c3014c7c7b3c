"""Numbers of sets of feature vectors: distances between two sets, and what else is computed of
features alone.

In order: Frechet distance and its ratio FDr^k, kernel distances (KID and CMMD), Inception Score,
precision and recall, density and coverage, nearest neighbours. All are computed in float64, a block
at a time where all vectors of one set are compared with all of another, and are pure functions of
the features: an extractor, and so the name under which a number may be published, is the caller's.

torchmetrics computes the kernel of KID. Ours, each compared with torchmetrics or torch-fidelity by
the tests, are the Frechet distance of means and covariances, which torchmetrics computes of
features only; subsets that a generator chooses instead of the global random state; and statistics
of nearest neighbours, for which torch-fidelity holds the distances of all pairs in memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smalti.errors import DataError
from smalti.evaluation.moments import Moments, UndefinedMetricError
from smalti.evaluation.pictures import StoredImages

# torchmetrics is imported inside a function: importing it takes several seconds.

BLOCK_ROWS, BLOCK_COLUMNS = 1024, 2048  # of a block of distances, 16 MiB


def check_features(features: Tensor) -> None:
    """Raise `DataError` unless features are (N, d), N >= 2, and finite."""
    if features.ndim != 2:
        raise DataError(f"features have shape {tuple(features.shape)}; give (N, d), N >= 2")
    if len(features) < 2:
        raise UndefinedMetricError(
            f"features have shape {tuple(features.shape)}; give (N, d), N >= 2"
        )
    broken = sum(int((~part.isfinite()).any(1).sum()) for part in features.split(BLOCK_COLUMNS))
    if broken:
        raise DataError(
            f"{broken} of {len(features)} feature vectors are not finite: check that the images "
            "have no NaN or infinite values"
        )


# -------------------------------------------------------------------------------------------------
# Frechet distance between Gaussians fitted to the features (Heusel et al., 1706.08500)


def frechet_of(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), at least 0 (1706.08500, eq. 6).

    The trace of the root is that of (C_a^1/2 C_b C_a^1/2)^1/2, the sum of the roots of the
    eigenvalues of a symmetric matrix: these are real, also where a covariance is singular.

    Args:
        mean_a, mean_b: (d,).
        covariance_a, covariance_b: (d, d), symmetric.

    Raises:
        DataError: the shapes do not fit, or a value is not finite.
    """
    parts = [x.detach().cpu().double() for x in (mean_a, covariance_a, mean_b, covariance_b)]
    mean_a, covariance_a, mean_b, covariance_b = parts
    dim = len(mean_a)
    if [tuple(x.shape) for x in parts] != [(dim,), (dim, dim)] * 2:
        raise DataError(
            f"means have shapes {tuple(mean_a.shape)} and {tuple(mean_b.shape)}, covariances "
            f"{tuple(covariance_a.shape)} and {tuple(covariance_b.shape)}: give (d,) and (d, d) of "
            "features of one extractor"
        )
    if not all(x.isfinite().all() for x in parts):
        raise DataError(
            "a mean or a covariance has values that are not finite: compute the statistics again"
        )
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ covariance_b @ root)
    trace_of_root = product.clamp(min=0).sqrt().sum()
    means = (mean_a - mean_b).square().sum()
    distance = means + covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root
    return max(0.0, distance.item())  # rounding can give less than 0


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """`frechet_of` the means and covariances of features (N, d) and (M, d).

    The metric is called `fd_<features>`, never FID: that name belongs to one particular Inception
    network.

    Raises:
        DataError: a wrong shape, fewer than 2 features on either side, or one that is not finite.
    """
    moments = []
    for features in (real, fake):
        check_features(features)
        moments.append(Moments(features.shape[1]))
        for rows in features.split(BLOCK_ROWS):
            moments[-1].add(rows)
    a, b = moments
    return frechet_of(a.mean, a.covariance, b.mean, b.covariance)


def frechet_ratio(samples: Mapping[str, float], heldout: Mapping[str, float]) -> float:
    """FDr^k (Yang et al., 2604.28190): the mean over k feature extractors of the Frechet distance
    of samples divided by that of held-out real pictures, each from the training pictures. Distances
    of extractors have scales of their own; ratios are comparable, and 1 is that of real pictures.

    Args:
        samples: Frechet distance of samples from training pictures, by the name of the extractor.
        heldout: that of held-out pictures, of the same extractors. As a distance is biased upwards
            when there are few pictures, their number should be that of the samples.

    Raises:
        DataError: there is no extractor, or the extractors differ.
        UndefinedMetricError: a held-out distance is 0.
    """
    if not samples or samples.keys() != heldout.keys():
        raise DataError(
            f"samples were measured with {', '.join(samples) or 'no extractor'}, held-out pictures "
            f"with {', '.join(heldout) or 'none'}: measure both with the same extractors"
        )
    equal = [name for name, distance in heldout.items() if distance <= 0]
    if equal:
        raise UndefinedMetricError(
            f"the held-out pictures have a distance of 0 in the features of {equal[0]}, by which "
            "nothing can be divided: take held-out pictures that are not the training pictures"
        )
    return sum(samples[name] / heldout[name] for name in samples) / len(samples)


# -------------------------------------------------------------------------------------------------
# Kernel distances: squared maximum mean discrepancies


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over random subsets; unbiased, so the mean may be below 0."""

    mean: float
    std: float


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, generator: torch.Generator
) -> KernelDistance:
    """KID (Binkowski et al., 1801.01401) of features (N, d) and (M, d): the unbiased estimate of
    eq. 4 with the kernel k(a, b) = (a.b / d + 1)^3, averaged over random subsets of both, which the
    generator chooses.

    Raises:
        DataError: fewer features than `subset_size`, or `subset_size` below 2.
    """
    from torchmetrics.image.kid import poly_mmd

    smallest = min(len(real), len(fake))
    if not 2 <= subset_size <= smallest:
        raise UndefinedMetricError(f"subset_size is {subset_size}; it must lie in [2, {smallest}]")
    estimates = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=generator)[:subset_size]]
        y = fake[torch.randperm(len(fake), generator=generator)[:subset_size]]
        estimates.append(poly_mmd(x.double(), y.double(), degree=3, coef=1.0))
    values = torch.stack(estimates)  # (subsets,)
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def cmmd(real: Tensor, fake: Tensor) -> float:
    """CMMD (Jayasumana et al., 2401.09603) of features (N, d) and (M, d): 1000 times the squared
    maximum mean discrepancy with the kernel exp(-|a - b|^2 / (2 sigma^2)), sigma = 10, of features
    that are divided by their length.

    As in the authors' code it is the biased estimate, whose means include each vector with itself.
    The name belongs to features of CLIP ViT-L/14 at 336 px.

    Raises:
        DataError: a wrong shape, fewer than 2 features on either side, or one that is not finite.
    """
    _check_pair(real, fake, 1, 1)

    def mean(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for x in a.split(BLOCK_ROWS):
            x = torch.nn.functional.normalize(x.double(), dim=1)
            for y in b.split(BLOCK_COLUMNS):
                y = torch.nn.functional.normalize(y.double(), dim=1)
                distances = _squared_distances(x, y)
                total += (-distances / (2 * CMMD_SIGMA**2)).exp_().sum().item()
        return total / (len(a) * len(b))

    return CMMD_SCALE * (mean(real, real) + mean(fake, fake) - 2 * mean(real, fake))


# -------------------------------------------------------------------------------------------------
# Inception Score (Salimans et al., 1606.03498)

SPLIT_SEED = 2020  # of the order in which torch-fidelity divides samples


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(mean_x KL(p(y|x) | p(y))) of class logits (N, C): mean and standard deviation over
    `splits` parts of the samples, which are shuffled as in torch-fidelity. In [1, C].

    Raises:
        DataError: a wrong shape, fewer samples than splits, or a logit that is not finite.
    """
    check_features(logits)
    if len(logits) < splits:
        raise UndefinedMetricError(
            f"the number of pictures is {len(logits)}; an Inception Score over {splits} parts "
            f"needs at least {splits}: give more pictures"
        )
    count = len(logits)
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(count))
    scores = []
    for i in range(splits):
        part = order[i * count // splits : (i + 1) * count // splits]
        marginal = torch.zeros(logits.shape[1], dtype=torch.float64)
        entropies = 0.0  # of p(y|x), summed over x
        for rows in part.split(BLOCK_COLUMNS):
            chances = logits[rows].double().softmax(1).cpu()
            marginal += chances.sum(0)
            entropies += torch.special.entr(chances).sum().item()
        divergence = torch.special.entr(marginal / len(part)).sum().item() - entropies / len(part)
        scores.append(np.exp(divergence))
    return float(np.mean(scores)), float(np.std(scores))


# -------------------------------------------------------------------------------------------------
# Fidelity and diversity by nearest neighbours. A ball around each vector reaches to its k-th
# nearest neighbour in its own set.


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al., 1904.06991, eqs. 1 and 2) of features (N, d) and
    (M, d): the share of fake vectors in the ball of a real one, and of real in that of a fake one.

    Raises:
        DataError: a wrong shape, k or fewer features on either side, or one that is not finite.
    """
    _check_pair(real, fake, k, k)

    # The surface of a ball belongs to it.
    of_real, of_fake = (_neighbour_distances(x, k) * (1 + TIE) for x in (real, fake))
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, distances in _blocks(real, fake):
        precise[columns] |= (distances <= of_real[rows, None]).any(0)
        recalled[rows] |= (distances <= of_fake[columns]).any(1)
    return precise.double().mean().item(), recalled.double().mean().item()


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al., 2002.09797, eqs. 4 and 5) of features (N, d) and (M, d):
    in how many balls of real vectors a fake one lies, divided by k, which can exceed 1; and the
    share of the balls of real vectors in which a fake one lies.

    Raises:
        DataError: a wrong shape, k or fewer real features, or one that is not finite.
    """
    _check_pair(real, fake, k, 1)
    reach = _neighbour_distances(real, k) * (1 - TIE)  # its surface does not belong to a ball
    inside, is_covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, distances in _blocks(real, fake):
        del columns
        within = distances < reach[rows, None]
        inside += int(within.sum())
        is_covered[rows] |= within.any(1)
    return inside / (k * len(fake)), is_covered.double().mean().item()


TIE = 1e-9  # two squared distances that differ by less, relatively, are equal
ROUNDING = 1e-12  # of a squared distance, relative to the squares of the lengths


def _check_pair(real: Tensor, fake: Tensor, k_real: int, k_fake: int) -> None:
    """Raise `DataError` unless both are features of one dimension, more than k of each."""
    for features, k in ((real, k_real), (fake, k_fake)):
        check_features(features)
        if len(features) <= k:
            raise UndefinedMetricError(
                f"the number of pictures is {len(features)}; a nearest neighbour of order {k} "
                f"needs at least {k + 1}: give more pictures"
            )
    if real.shape[1] != fake.shape[1]:
        raise DataError(
            f"features have {real.shape[1]} and {fake.shape[1]} dimensions: use the same extractor "
            "for both sets"
        )


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of float64 vectors (A, d) and (B, d), (A, B). What cannot be told from a rounding
    error of the product is 0, so that the distance of equal vectors is."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = torch.addmm(lengths, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= ROUNDING * lengths, 0.0)


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances between all of (N, d) and all of (M, d), a block of rows and columns at a
    time. The vectors are moved by the mean of the first block of `b`, as the smaller their lengths
    are, the smaller is the rounding error."""
    centre = b[:BLOCK_COLUMNS].double().mean(0)
    for row in range(0, len(a), BLOCK_ROWS):
        rows = slice(row, min(row + BLOCK_ROWS, len(a)))
        x = a[rows].double() - centre
        for column in range(0, len(b), BLOCK_COLUMNS):
            columns = slice(column, min(column + BLOCK_COLUMNS, len(b)))
            yield rows, columns, _squared_distances(x, b[columns].double() - centre)


def _neighbour_distances(features: Tensor, k: int) -> Tensor:
    """Squared distance of each of (N, d) to its k-th nearest neighbour, not to itself, (N,)."""
    shape = len(features), k + 1
    nearest = torch.full(shape, torch.inf, dtype=torch.float64, device=features.device)
    for rows, columns, distances in _blocks(features, features):
        del columns
        both = torch.cat([nearest[rows], distances], 1)
        nearest[rows] = both.topk(k + 1, largest=False).values
    return nearest.amax(1)  # one of the k + 1 is the vector itself


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
