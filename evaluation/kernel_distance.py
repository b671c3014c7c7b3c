"""KID: squared maximum mean discrepancy with a cubic kernel (Binkowski et al., 1801.01401)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import SmaltiError


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over random subsets; unbiased, so it may fall below 0."""

    mean: float
    std: float


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, generator: torch.Generator
) -> KernelDistance:
    """KID of features (N, d) and (M, d).

    Raises:
        SmaltiError: fewer features than `subset_size`, or `subset_size` below 2.
    """
    smallest = min(len(real), len(fake))
    if not 2 <= subset_size <= smallest:
        raise SmaltiError(f"subset_size is {subset_size}; it must lie in [2, {smallest}]")
    estimates = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=generator)[:subset_size]]
        y = fake[torch.randperm(len(fake), generator=generator)[:subset_size]]
        estimates.append(squared_mmd(x.double(), y.double()))
    values = torch.stack(estimates)
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate from (m, d) and (m, d), eq. 4, with k(a, b) = (a.b / d + 1)^3."""
    m = len(x)
    k_xx, k_yy, k_xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return within - 2 * k_xy.mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
