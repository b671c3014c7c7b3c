"""The style loss of Gatys et al. (1508.06576): texture as correlations between features."""

import torch
from torch import Tensor


def gram_matrices(features: Tensor) -> Tensor:
    """Features (B, C, h, w) -> mean products of channels over positions (B, C, C)."""
    rows = features.flatten(2)
    return rows @ rows.mT / rows.shape[2]


def gram_distance(features: list[Tensor], reference: list[Tensor]) -> Tensor:
    """Distance of two pictures by the Gram matrices of their features at several layers.

    Args:
        features, reference: one (B, C, h, w) per layer.

    Returns:
        (B,): the mean over layers of sum((G - A)^2) / (4 C^2) (eq. 4 and 5; G and A already
        divided by the number of positions, M in the paper).
    """
    distances = [
        (gram_matrices(a) - gram_matrices(b)).square().mean((1, 2)) / 4
        for a, b in zip(features, reference, strict=True)
    ]
    return torch.stack(distances).mean(0)
