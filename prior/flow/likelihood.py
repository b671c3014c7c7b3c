"""The exact likelihood of a flow, by the instantaneous change of variables (Chen et al.,
1806.07366; Song et al., 2011.13456, section 4.3):

    log p_end(x_end) = log p_start(x_start) - integral from start to end of div v(x_t, t) dt

The samples are carried back to noise by the ODE, and the divergence along with them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from smalti.prior.flow.prediction import Dynamics, Field
from smalti.prior.flow.solvers.base import ODESolver
from smalti.randomness import NormalSource

# velocity, x (B, ...), t (B,) -> velocity (B, ...) and its divergence (B,)
Divergence = Callable[[Field, Tensor, Tensor], tuple[Tensor, Tensor]]


def exact_divergence(velocity: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The trace of the Jacobian, by one backward pass per dimension: for small samples."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = velocity(leaf, t)
        columns = value.flatten(1).unbind(1)
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for index, column in enumerate(columns):
            row = _gradient(column.sum(), leaf)
            trace = trace + row.flatten(1)[:, index]
    return value.detach(), trace.detach()


def hutchinson_divergence(probes: Tensor) -> Divergence:
    """Hutchinson's unbiased estimate E[e^T J e], for probes e (K, B, ...) of zero mean and unit
    covariance, which stay the same along the whole path; one backward pass per probe."""

    def divergence(velocity: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = velocity(leaf, t)
            total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            for probe in probes:
                product = _gradient((value * probe).sum(), leaf)
                total = total + (product * probe).flatten(1).sum(1)
        return value.detach(), total.detach() / len(probes)

    return divergence


def _gradient(total: Tensor, leaf: Tensor) -> Tensor:
    if not total.requires_grad:  # a field that does not depend on x
        return torch.zeros_like(leaf)
    return torch.autograd.grad(total, leaf, retain_graph=True, materialize_grads=True)[0]


def signs(count: int, like: Tensor, normal: NormalSource) -> Tensor:
    """Probes (count, B, ...) of random signs, which have the least variance."""
    random_inputs = torch.stack([normal(like) for _ in range(count)])
    return torch.where(random_inputs >= 0, 1.0, -1.0).to(like.dtype)


def log_likelihood(
    dynamics: Dynamics, x: Tensor, times: Tensor, solver: ODESolver, divergence: Divergence
) -> Tensor:
    """log p of samples x (B, ...) at the last of `times`, (B,), in nats.

    Args:
        times: from noise to data, ascending; at the first x_t counts as normal with the variance
            that data of unit variance have there.
        divergence: `exact_divergence` or `hutchinson_divergence(...)`.
    """
    shape, size = x.shape, x[0].numel() if len(x) else 1

    def joint(state: Tensor, t: Tensor) -> Tensor:  # (B, size + 1): sample and its log density
        velocity, change = divergence(dynamics.velocity, state[:, :-1].view(shape), t)
        return torch.cat([velocity.flatten(1), -change[:, None]], 1)

    state = torch.cat([x.flatten(1), torch.zeros_like(x.flatten(1)[:, :1])], 1)
    for later in solver.integrate(joint, state, times.flip(0)):
        state = later
    start, growth = state[:, :-1], state[:, -1]  # growth: the integral of the divergence
    variance = dynamics.path.marginal_std(times[:1]).square().item()
    base = -(start.square().sum(1) / variance + size * math.log(2 * math.pi * variance)) / 2
    return base - growth


def bits_per_dimension(log_likelihood: Tensor, size: int) -> Tensor:
    """Of samples of `size` numbers, from nats."""
    return -log_likelihood / (size * math.log(2))
