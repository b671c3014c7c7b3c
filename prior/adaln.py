"""Adaptive layer norm: what a block does depends on the class (FiLM, 1709.07871; DiT, 2212.09748;
VAR, 2404.02905). The parts of a projection lie in VAR's order, which is not DiT's."""

import torch.nn.functional as F
from torch import Tensor, nn


def condition_projection(width: int, parts: int) -> nn.Sequential:
    """linear(silu(condition)): (B, width) -> (B, parts * width)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def as_parts(projected: Tensor, width: int) -> Tensor:
    """(B, parts * width) -> (B, 1, parts, width): `unbind(2)` gives parts that fit tokens."""
    return projected.unflatten(-1, (-1, width))[:, None]


def adaptive_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """norm(x) * (1 + scale) + shift, with a layer norm that has no weights of its own.

    Args:
        x: (B, T, width).
        scale, shift: (B, 1, width).
    """
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class HeadNorm(nn.Module):
    """The norm before the head; parts: scale, shift."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = condition_projection(width, 2)

    def modulation(self, condition: Tensor) -> Tensor:
        """Condition (B, width) -> (B, 1, 2, width)."""
        return as_parts(self.ada_lin(condition), condition.shape[-1])

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:  # (B, T, width) fp32
        scale, shift = modulation.unbind(2)
        return adaptive_norm(x.float(), scale, shift, self.eps)
