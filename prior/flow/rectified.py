"""Rectified flow: straighten a flow by training it on its own pairs (Liu et al., 2209.03003).

The ODE of a flow maps noise x_0 to data z_1. Trained again on the straight lines between these
pairs ("reflow"), the flow becomes straighter and needs fewer steps. The objective is that of the
prior, with the noise given:

    prior(pairs.data, pairs.labels, random_inputs={"noise": pairs.noise})
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from smalti.errors import ConfigurationError, GenerationError
from smalti.prior.base import Prior
from smalti.prior.flow.path import LinearPath
from smalti.prior.flow.prediction import Dynamics
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.flow.solvers.base import ODESolver, make_solver, shared_time
from smalti.randomness import Generators, NormalSource


@dataclass(frozen=True)
class Pairs:
    """Noise, and the data to which a flow maps it."""

    noise: Tensor  # (B, C, h, w)
    data: Tensor  # (B, C, h, w)
    labels: Tensor  # (B,)


def generate_pairs(
    prior: FlowPrior, labels: Tensor, *, generator: Generators = None, **options: Any
) -> Pairs:
    """Sample noise for labels (B,), and map it to data by the ODE.

    Args:
        options: of `FlowPrior.sample`: solver, num_inference_steps, guidance_scale, ...

    Raises:
        GenerationError: the solver is not an ODE solver, so noise does not determine the data.
    """
    solver = make_solver(options.pop("solver", "heun"))
    if not isinstance(solver, ODESolver):
        raise GenerationError(f"{solver} cannot generate pairs: use an ODE solver, like heun")
    noise = prior.initial_noise(len(labels), NormalSource(generator, len(labels)))
    data = prior.sample(labels, solver=solver, noise=noise, **options)
    return Pairs(noise, data, labels)


def check_straight(prior: Prior) -> FlowPrior:
    """The same prior, if it is a flow prior with the linear path.

    Raises:
        ConfigurationError: it is not.
    """
    if not isinstance(prior, FlowPrior):
        raise ConfigurationError(f"pairs are for a flow prior, not a {type(prior).__name__}")
    if not isinstance(prior.config.path, LinearPath):
        raise ConfigurationError(
            f"the path is {prior.config.path}; rectified flow needs the linear path"
        )
    return prior


@torch.no_grad()
def straightness(dynamics: Dynamics, noise: Tensor, times: Tensor, solver: ODESolver) -> Tensor:
    """S(Z) = integral |(z_1 - z_0) / (end - start) - v(z_t, t)|^2 dt along the trajectory z_t of
    each noise (B, ...), averaged over its elements: (B,). 0 is straight: one Euler step is exact.

    Args:
        times: (N + 1,) ascending; the integral is the trapezoidal sum over this grid.
    """
    grid = times.tolist()
    states = [noise, *solver.integrate(dynamics.velocity, noise, times)]
    mean_velocity = (states[-1] - states[0]) / (grid[-1] - grid[0])
    deviations = [
        (mean_velocity - dynamics.velocity(z, shared_time(t))).square().flatten(1).mean(1)
        for z, t in zip(states, grid, strict=True)
    ]
    widths = [stop - start for start, stop in pairwise(grid)]
    areas = [h * (a + b) / 2 for h, (a, b) in zip(widths, pairwise(deviations), strict=True)]
    return torch.stack(areas).sum(0)
