"""Random-order annealing (RAR, 2411.00776): early in training a prior learns to
predict codes in any order, later ever more often in raster order, in which it samples.

Seen in every order, each code is predicted from both sides; a permuted sequence does not say which
code is next, so its position is given to the prior with the code before it.
"""

import torch
from torch import Tensor

from smalti.errors import SmaltiError


def random_order_probability(progress: float, annealing: tuple[float, float]) -> float:
    """The probability of a random order: 1 until the first share of the training is done, then
    linearly to 0 at the second."""
    begin, end = annealing
    if progress >= end:
        return 0.0
    return 1.0 if progress < begin else (end - progress) / (end - begin)


def draw_orders(rows: int, length: int, probability: Tensor) -> Tensor:
    """An order for every sample, (rows, length) int64: random with a probability (), else raster.

    Codes are to be read as codes.gather(1, order).
    """
    device = probability.device
    shuffled = torch.rand(rows, length, device=device).argsort(1)
    chosen = torch.rand(rows, 1, device=device) < probability
    return torch.where(chosen, shuffled, torch.arange(length, device=device))


def check_order(order: Tensor, rows: int, length: int) -> None:
    """Raise `SmaltiError` unless every row of an order is a permutation of 0 to length - 1."""
    if order.shape != (rows, length) or order.dtype != torch.int64:
        raise SmaltiError(
            f"the order has shape {tuple(order.shape)} and type {order.dtype}; "
            f"give ({rows}, {length}) int64"
        )
    if torch.compiler.is_compiling():  # a branch on values would break the graph
        return
    if not (order.sort(1).values == torch.arange(length, device=order.device)).all():
        raise SmaltiError(f"the order is no permutation of 0 to {length - 1} in every row")
