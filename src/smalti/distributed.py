"""Sums and means over all processes, so that statistics are those of the whole batch.

The differentiable sum is written here because torch.distributed.nn.functional.all_reduce, whose
values and gradients are the same, is deprecated (torch 2.14), and its successor is private.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum over all processes, in place, without gradients."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


class _DifferentiableSum(torch.autograd.Function):
    """`sum_over_processes` with gradients. The values are copied because it works in place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_processes(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_processes(gradients[0].clone())


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean over all processes, the same on each; differentiable.

    The gradient of each process's values is the sum of the gradients of all processes' means.
    """
    if not dist.is_initialized():
        return values
    return _DifferentiableSum.apply(values) / dist.get_world_size()  # type: ignore[operator]


def uniform_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, uniformly sampled with replacement from those of all processes.

    Args:
        rows: (N, d); N is equal on all processes.
        generator: a CPU generator, equal on all processes.

    Returns:
        (count, d), the same on each process.
    """
    distributed = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    size = len(rows)
    # Indices into the concatenated rows of all processes; each process fills in its own rows.
    choice = torch.randint(world * size, (count,), generator=generator).to(rows.device)
    mine = choice // size == rank
    return sum_over_processes(torch.where(mine[:, None], rows[choice % size], 0.0))
