"""The nearest training picture of each sample, so that memorising is visible."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """For each query the position of the nearest reference, and its distance."""

    indices: Tensor  # (Q,) int64
    distances: Tensor  # (Q,) Euclidean; 0 for an exact copy


def nearest_neighbours(queries: Tensor, references: Tensor, chunk: int = 1024) -> Neighbours:
    """Nearest of references (N, ...) for each of queries (Q, ...) in Euclidean distance."""
    flat_queries, flat_references = queries.flatten(1).float(), references.flatten(1).float()
    found = [
        torch.cdist(part, flat_references, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        for part in flat_queries.split(chunk)
    ]
    return Neighbours(torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]))
