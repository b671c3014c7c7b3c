"""Gradients through a choice that has none: from a quantized vector back to the feature."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Estimator = Literal["straight-through", "rotation"]


def estimate(kind: Estimator, features: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` (B, d, ...), with the gradient that `kind` gives to `features`."""
    return ESTIMATORS[kind](features, quantized)


def straight_through(features: Tensor, quantized: Tensor) -> Tensor:
    """z + sg(q - z): the gradient at the quantized vector is copied to the feature.

    Bengio et al., 1308.3432; VQ-VAE, 1711.00937, section 3.1.
    """
    return features + (quantized - features).detach()


def rotation(features: Tensor, quantized: Tensor) -> Tensor:
    """q as a rotation and rescaling of z, both held constant, so that the angle between gradient
    and vector is kept (Fifty et al., 2410.06424, section 4.2).

    q = |q| / |z| (z - 2 r r'z + 2 q^ z^'z), with unit vectors z^, q^ and r = (z^ + q^) / |z^ + q^|.
    """
    z, q = features, quantized.detach()
    z_norm = z.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    unit_z = z.detach() / z_norm
    unit_q = F.normalize(q, dim=1, eps=1e-6)
    middle = F.normalize(unit_z + unit_q, dim=1, eps=1e-6)
    rotated = z - 2 * middle * _dot(middle, z) + 2 * unit_q * _dot(unit_z, z)
    return rotated * (q.norm(dim=1, keepdim=True) / z_norm)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


ESTIMATORS = {"straight-through": straight_through, "rotation": rotation}
