"""Guidance of a flow: classifier-free, in an interval of times, and by a classifier of noisy
latents.

Velocity, noise, score and data at the same x_t are affine functions of each other, so a guided
prediction of one kind converts into the guided prediction of any other: guidance is applied to
whatever the network predicts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from smalti.config import plain
from smalti.errors import GenerationError
from smalti.prior.conditions.base import Condition, joined
from smalti.prior.flow.classifier import LatentClassifier
from smalti.prior.flow.path import GaussianPath, expand_like
from smalti.prior.flow.prediction import Field, Prediction, derivative_by_score, times_of_samples
from smalti.prior.sampling import is_interval, is_number

# x (B, C, h, w), times (B,), conditions (B,) -> (B, C_out, h, w)
Network = Callable[[Tensor, Tensor, Condition], Tensor]
# x (B, C, h, w), times (B,), labels (B,) -> log p(label | x_t) (B,), differentiable in x
LogProbability = Callable[[Tensor, Tensor, Tensor], Tensor]

# -------------------------------------------------------------------------------------------------
# Classifier-free guidance: uncond + s (cond - uncond) (Ho and Salimans, 2207.12598, eq. 6)


@dataclass(frozen=True)
class ClassifierFree:
    """The scale s, and the interval of times in which it applies (2404.07724)."""

    scale: float = 1.0  # s; 1 is off
    interval: tuple[float, float] = (0.0, 1.0)  # t, from noise to data
    channels: int | None = None  # guides only the first ones; None: all

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", plain(self.scale))
        object.__setattr__(self, "interval", plain(self.interval))
        if not (is_number(self.scale) and math.isfinite(self.scale)):
            raise GenerationError(f"guidance_scale is {self.scale}; it must be finite")
        if not is_interval(self.interval):
            raise GenerationError(
                f"guidance_interval is {self.interval}; give two times, 0 <= from <= to <= 1"
            )

    def scales(self, t: Tensor) -> Tensor:
        """s at times (B,): 1 outside the interval."""
        start, stop = self.interval
        inside = (t >= start) & (t <= stop)
        return torch.where(inside, torch.full_like(t, self.scale), 1.0)


def classifier_free(
    network: Network,
    condition: Condition,
    negative: Condition,
    options: ClassifierFree,
    kept: Callable[[Condition], Condition] = lambda condition: condition,
) -> Field:
    """A network given conditions (B,) and guided away from others (B,), usually the null condition.

    If no sample is guided at its time, the network runs on B samples; otherwise once on 2 B, the
    conditional ones first.

    Args:
        kept: applied once to the conditions of each kind of pass, before they go to the network.
    """
    both = condition if options.scale == 1 else kept(joined(condition, negative))  # (2 B,)
    condition = kept(condition)

    def field(x: Tensor, t: Tensor) -> Tensor:
        if options.scale == 1:
            return network(x, t, condition)
        scales = options.scales(t)
        if not (scales != 1).any():
            return network(x, t, condition)
        twice = t if len(t) == 1 else torch.cat([t, t])
        conditional, unconditional = network(torch.cat([x, x]), twice, both).chunk(2)
        # The remaining channels, variances among them, stay conditional.
        count = x.shape[1] if options.channels is None else options.channels
        uncond = unconditional[:, :count]
        guided = uncond + expand_like(scales, x) * (conditional[:, :count] - uncond)
        return torch.cat([guided, conditional[:, count:]], 1)

    return field


# -------------------------------------------------------------------------------------------------
# Classifier guidance: score + s grad log p(label | x_t) (2105.05233, section 4; 2011.13456, eq. 14)


@dataclass(frozen=True)
class Classifier:
    """A classifier of noisy latents and its scale s.

    `log_probability` takes x_t (B, C, h, w), times t (B,) from 0, noise, to 1, data, and labels
    (B,).
    """

    log_probability: LogProbability
    scale: float = 1.0
    model: LatentClassifier | None = None  # compared with the prior that it guides

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", plain(self.scale))
        if not (is_number(self.scale) and math.isfinite(self.scale)):
            raise GenerationError(f"classifier_scale is {self.scale}; it must be finite")

    @classmethod
    def of(cls, model: LatentClassifier, scale: float = 1.0) -> Self:
        """Guidance by a trained classifier."""
        return cls(model.log_probability, scale, model)

    def gradient(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """s grad_x log p(label | x), like x."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            # Samples are independent, so the gradient of the sum contains that of each sample.
            total = self.log_probability(leaf, times_of_samples(t, x), labels).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
        return self.scale * gradient


def with_classifier(
    field: Field, labels: Tensor, classifier: Classifier, path: GaussianPath, prediction: Prediction
) -> Field:
    """A field whose score, and so its prediction of any kind, is guided by a classifier."""

    def guided(x: Tensor, t: Tensor) -> Tensor:
        output, channels = field(x, t), x.shape[1]
        factor = expand_like(derivative_by_score(prediction, path, t), x)
        shift = factor * classifier.gradient(x, t, labels)
        return torch.cat([output[:, :channels] + shift, output[:, channels:]], 1)

    return guided
