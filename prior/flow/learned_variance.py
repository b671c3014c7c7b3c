"""Training the variances of DDPM's steps (improved DDPM, 2102.09672, section 3.1).

A network with twice the channels of the latents says, beside its prediction, where between beta~
and beta the variance of the next step lies. The squared error does not reach these channels; a term
of the variational bound does: KL(q(x_s | x_t, x_1) || p(x_s | x_t)), where s is one step of the
chain beyond t. Its gradient is kept from the prediction, which the squared error trains alone.
"""

import math

import torch
from torch import Tensor

from smalti.prior.flow.dynamics import Estimate
from smalti.prior.flow.path import DDPMPath, spread
from smalti.prior.flow.prediction import exact_times
from smalti.prior.flow.transition import log_variance, transitions

WEIGHT_OF_CHAIN = 1e-3  # lambda of the bound, a sum over the steps of the chain (eq. 16)


def bound_weight(path: DDPMPath) -> float:
    """What the mean bound of a step is multiplied by beside the squared error."""
    return WEIGHT_OF_CHAIN * path.num_train_timesteps


def variance_bound(path: DDPMPath, estimate: Estimate, data: Tensor, noise: Tensor) -> Tensor:
    """The bound on the steps from x_t (B, C, h, w), in bits per number: (B,).

    0 where the step would end beyond index 0 of the chain: that to the data draws nothing.
    """
    t, step = exact_times(estimate.t), 1 / path.num_train_timesteps
    last = 1 - 2 * step  # index 1, which steps to index 0
    start = t.clamp_max(last)
    to = transitions(path, start, start + step)
    log_small, log_large = (spread(v.log(), data) for v in (to.small, to.large))
    claimed = log_variance(estimate.surplus.float(), log_small, log_large)
    missed = spread(to.alpha, data) * (data - estimate.data.detach())
    missed = missed + spread(to.kept, data) * (noise - estimate.noise.detach())
    nats = (claimed - log_small + (log_small - claimed).exp() - 1) / 2
    nats = nats + missed.square() * (-claimed).exp() / 2
    return torch.where(t < last + 1e-9, nats.flatten(1).mean(1) / math.log(2), 0.0)
