"""Rectified flow: straighten a flow by training it on its own pairs (Liu et al., 2209.03003).

A flow carries noise x_0 to data z_1. Trained again on the straight lines between these pairs, it
becomes straighter, and the fewer steps it needs. The objective is the prior's own, with the noise
given: `prior(pairs.data, pairs.labels, pairs.noise)`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.prior.base import Prior
from smalti.prior.flow.path import LinearPath
from smalti.prior.flow.prediction import Dynamics
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.flow.solvers.base import ODESolver, make_solver, times_of
from smalti.randomness import Generators, NormalSource


@dataclass(frozen=True)
class Pairs:
    """Noise and what a flow makes of it."""

    noise: Tensor  # (B, C, h, w)
    data: Tensor  # (B, C, h, w)
    labels: Tensor  # (B,)


def generate_pairs(
    prior: FlowPrior, labels: Tensor, *, generator: Generators = None, **options: Any
) -> Pairs:
    """Draw noise for labels (B,), and carry it to data by the ODE.

    Args:
        options: of `FlowPrior.sample`: solver, num_inference_steps, guidance_scale, ...

    Raises:
        SmaltiError: the solver is not one of the ODE: noise would not decide the data.
    """
    solver = make_solver(options.pop("solver", "heun"))
    if not isinstance(solver, ODESolver):
        raise SmaltiError(f"{solver} makes no pairs: use an ODE solver, like heun")
    noise = prior.initial_noise(len(labels), NormalSource(generator, len(labels)))
    data = prior.sample(labels, solver=solver, noise=noise, **options)
    return Pairs(noise, data, labels)


def check_straight(prior: Prior) -> None:
    """Raise `SmaltiError` unless it is a flow whose path is a straight line."""
    if not isinstance(prior, FlowPrior):
        raise SmaltiError(f"pairs are for a flow prior, not a {type(prior).__name__}")
    if not isinstance(prior.config.path, LinearPath):
        raise SmaltiError(f"the path is {prior.config.path}; rectified flow needs the linear path")


@torch.no_grad()
def straightness(dynamics: Dynamics, noise: Tensor, times: Tensor, solver: ODESolver) -> Tensor:
    """integral |(z_1 - z_0) / (end - start) - v(z_t, t)|^2 dt along the flow z of each noise
    (B, ...), averaged over its numbers: (B,). 0 is straight, and then one Euler step is exact.

    Args:
        times: (N + 1,) ascending; the integral is the trapezoidal sum over this grid.
    """
    grid = times.tolist()
    states = [noise, *solver.integrate(dynamics.velocity, noise, times)]
    mean = (states[-1] - states[0]) / (grid[-1] - grid[0])
    bends = [
        (mean - dynamics.velocity(z, times_of(t, z))).square().flatten(1).mean(1)
        for z, t in zip(states, grid, strict=True)
    ]
    widths = [stop - start for start, stop in pairwise(grid)]
    areas = [h * (a + b) / 2 for h, (a, b) in zip(widths, pairwise(bends), strict=True)]
    return torch.stack(areas).sum(0)
