"""Who may see whom when grids of codes, coarse to fine, lie end to end."""

import torch
from torch import Tensor

Grids = tuple[tuple[int, int], ...]


def lengths_of(grids: Grids) -> list[int]:
    """Codes per grid."""
    return [height * width for height, width in grids]


def scale_of_codes(grids: Grids, device: torch.device) -> Tensor:
    """Number of the grid that each code lies in, (L,) int64."""
    return torch.cat(
        [torch.full((n,), scale, device=device) for scale, n in enumerate(lengths_of(grids))]
    )


def block_causal_mask(grids: Grids, device: torch.device) -> Tensor:
    """(L, L) bool, True where query i may see key j: j's scale is i's own or a coarser one.

    VAR, 2404.02905, figure 4: within a scale all codes see each other, for all are predicted at
    once; their inputs know nothing but the scales before.
    """
    scales = scale_of_codes(grids, device)
    return scales[:, None] >= scales
