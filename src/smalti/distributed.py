"""Sums and means over all processes, so that statistics are those of the whole batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _DifferentiableSum(torch.autograd.Function):
    """The sum over all processes; every term's gradient is the sum of the gradients of all sums."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_processes(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_processes(gradients[0].clone())


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean over all processes, the same on each; differentiable."""
    if not dist.is_initialized():
        return values
    return _DifferentiableSum.apply(values) / dist.get_world_size()  # type: ignore[operator]


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum over all processes, in place, without gradients."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def uniform_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random ones of the rows (N, d) of all processes laid end to end, the same on each.

    Args:
        generator: a CPU generator, equal on all processes; N is equal on all, too.
    """
    distributed = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    size = len(rows)
    choice = torch.randint(world * size, (count,), generator=generator).to(rows.device)
    mine = choice // size == rank
    return sum_over_processes(torch.where(mine[:, None], rows[choice % size], 0.0))
