"""The nearest training image of each sample, which shows whether a model memorised its data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import DataError

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
        chunk: queries per matrix product; a (chunk, N) matrix is held in memory.

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
