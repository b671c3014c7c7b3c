"""The exact likelihood of a flow, by the instantaneous change of variables (neural ODEs, Chen et
al., 1806.07366, eq. 8; Song et al., 2011.13456, section 4.3):

    log p_end(x_end) = log p_start(x_start) - integral from start to end of div v(x_t, t) dt

The ODE is integrated from data back to noise, for the samples and the divergence together.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from smalti.prior.flow.prediction import Dynamics, Field
from smalti.prior.flow.solvers.base import ODESolver
from smalti.randomness import NormalSource

# velocity field, x (B, ...), t (B,) -> velocity (B, ...) and its divergence (B,)
Divergence = Callable[[Field, Tensor, Tensor], tuple[Tensor, Tensor]]

# -------------------------------------------------------------------------------------------------
# Divergence: exact, or Hutchinson's trace estimate E[e^T J e] (FFJORD, 1810.01367; 2011.13456)


def exact_divergence(velocity: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The trace of the Jacobian; one backward pass per dimension, so for small samples only."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = velocity(leaf, t)
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for index, component in enumerate(value.flatten(1).unbind(1)):
            row = _gradient(component.sum(), leaf)  # row `index` of every sample's Jacobian
            trace = trace + row.flatten(1)[:, index]
    return value.detach(), trace.detach()


def hutchinson_divergence(probes: Tensor) -> Divergence:
    """Hutchinson's unbiased estimate, the mean of e^T J e over probes e (K, B, ...) of zero mean
    and unit covariance. The probes are the same at all times; one backward pass per probe."""

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
    if not total.requires_grad:  # the field does not depend on x
        return torch.zeros_like(leaf)
    return torch.autograd.grad(total, leaf, retain_graph=True, materialize_grads=True)[0]


def rademacher_probes(count: int, like: Tensor, normal: NormalSource) -> Tensor:
    """Probes (count, B, ...) of random signs, which give the estimate the least variance."""
    noise = torch.stack([normal(like) for _ in range(count)])
    return torch.where(noise >= 0, 1.0, -1.0).to(like.dtype)


# -------------------------------------------------------------------------------------------------
# Instantaneous change of variables (1806.07366, eq. 8)


def log_likelihood(
    dynamics: Dynamics, x: Tensor, times: Tensor, solver: ODESolver, divergence: Divergence
) -> Tensor:
    """log p of samples x (B, ...) at the last of `times`, (B,), in nats.

    Args:
        times: from noise to data, ascending; at the first, p_t is taken to be normal with the
            variance of x_t for data of unit variance.
        divergence: `exact_divergence` or `hutchinson_divergence(...)`.
    """
    shape, size = x.shape, x[0].numel() if len(x) else 1

    # The state (B, size + 1) is a sample and the integral of the divergence.
    def joint(state: Tensor, t: Tensor) -> Tensor:
        velocity, divergence_at_t = divergence(dynamics.velocity, state[:, :-1].view(shape), t)
        return torch.cat([velocity.flatten(1), -divergence_at_t[:, None]], 1)

    state = torch.cat([x.flatten(1), torch.zeros_like(x.flatten(1)[:, :1])], 1)
    for next_state in solver.integrate(joint, state, times.flip(0)):
        state = next_state
    start, integral = state[:, :-1], state[:, -1]  # noise, and the integral of the divergence
    variance = dynamics.path.marginal_std(times[:1]).square().item()
    log_start = -(start.square().sum(1) / variance + size * math.log(2 * math.pi * variance)) / 2
    return log_start - integral


def bits_per_dimension(log_likelihood: Tensor, size: int) -> Tensor:
    """-log2 p per element, from log p in nats (B,) of samples of `size` elements."""
    return -log_likelihood / (size * math.log(2))
