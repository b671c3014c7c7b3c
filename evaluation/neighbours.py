"""The nearest training picture of each sample, so that memorising is visible."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import SmaltiError

CANDIDATES = 8  # references per query whose distance is computed exactly


@dataclass(frozen=True)
class Neighbours:
    """For each query the position of the nearest reference, and its distance."""

    indices: Tensor  # (Q,) int64; the first of several equally near ones
    distances: Tensor  # (Q,) Euclidean; 0 for an exact copy


def nearest_neighbours(queries: Tensor, references: Tensor, chunk: int = 256) -> Neighbours:
    """Nearest of references (N, ...) for each of queries (Q, ...) in Euclidean distance.

    A matrix product, which is fast but rounds, picks a few candidates; the distances to these are
    taken from differences. For cosine distance pass features normalised to length 1.

    Raises:
        SmaltiError: no references, or references of another shape than the queries.
    """
    if not len(references) or queries.shape[1:] != references.shape[1:]:
        raise SmaltiError(
            f"queries have shape {tuple(queries.shape)}, references {tuple(references.shape)}: "
            "give at least one reference, of the queries' shape"
        )
    # Alike pictures far from 0 would differ by less than the rounding of a matrix product.
    centre = references.flatten(1).float().mean(0)
    flat_queries, flat_references = (p.flatten(1).float() - centre for p in (queries, references))
    found = [_nearest(part, flat_references) for part in flat_queries.split(chunk)]
    return Neighbours(
        torch.cat([f.indices for f in found]), torch.cat([f.distances for f in found])
    )


def _nearest(queries: Tensor, references: Tensor) -> Neighbours:
    """Nearest of references (N, d) for each of queries (Q, d)."""
    rough = torch.cdist(queries, references, compute_mode="use_mm_for_euclid_dist")
    candidates = rough.topk(min(CANDIDATES, len(references)), largest=False).indices
    candidates = candidates.sort(1).values  # (Q, k); of equal distances the first one wins
    exact = [(queries - references[column]).norm(dim=1) for column in candidates.unbind(1)]
    distances, choice = torch.stack(exact, 1).min(1)
    return Neighbours(candidates.gather(1, choice[:, None])[:, 0], distances)
