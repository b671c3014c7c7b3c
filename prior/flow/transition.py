"""The exact Gaussian steps between two times of a path (Kingma et al., 2107.00630, appendix A).

From t to a later time s, with r = alpha_t / alpha_s:

    q(x_t | x_s) = N(r x_s, beta),  beta = sigma_t^2 - r^2 sigma_s^2
    q(x_s | x_t, x_1) = N(alpha_s x_1 + sqrt(sigma_s^2 - beta~) x_0, beta~),
        beta~ = beta sigma_s^2 / sigma_t^2

On the discrete chain these are DDPM's beta and beta~ (2006.11239, eq. 7).
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.prior.flow.path import GaussianPath

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Transition(Generic[Number]):
    """The coefficients of a step from t to s > t, or of many."""

    alpha: Number  # at s
    sigma: Number  # at s
    large: Number  # beta
    small: Number  # beta~
    kept: Number  # what the posterior mean keeps of the noise: sqrt(sigma_s^2 - beta~)


def transitions(path: GaussianPath, t: Tensor, s: Tensor) -> Transition[Tensor]:
    """Of steps from t to s, float64 of any shape."""
    sigma_t, sigma = path.sigma(t), path.sigma(s)
    # sigma_t^2 (1 - SNR_t / SNR_s), which loses no digits where both are near 1.
    large = -sigma_t.square() * torch.expm1(path.log_snr(t) - path.log_snr(s))
    small = large * sigma.square() / sigma_t.square()
    kept = (sigma.square() - small).clamp_min(0).sqrt()
    return Transition(path.alpha(s), sigma, large, small, kept)


def transition(path: GaussianPath, start: float, stop: float) -> Transition[float]:
    """Of one step, computed on the CPU, wherever the samples are.

    Raises:
        SmaltiError: the times descend: these steps only go towards data.
    """
    if stop < start:
        raise SmaltiError(
            f"times go from {start:.4g} down to {stop:.4g}; use an ODE solver to go back"
        )
    to = transitions(path, *torch.tensor([start, stop], dtype=torch.float64))
    return Transition(
        to.alpha.item(), to.sigma.item(), to.large.item(), to.small.item(), to.kept.item()
    )


def log_variance(surplus: Tensor, log_small: Tensor | float, log_large: Tensor | float) -> Tensor:
    """Of a step whose variance lies between beta~ and beta, on a log scale, where the network says:
    at beta~ for -1, at beta for 1 (2102.09672, eq. 15)."""
    share = (surplus + 1) / 2
    return share * log_large + (1 - share) * log_small
