"""Guidance: what is asked of the network besides the condition.

Velocity, noise, score and data at the same x_t are affine functions of each other, so a guided one
converted is the other guided: guidance is applied to whatever the network predicts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.prior.flow.path import GaussianPath, expand_like
from smalti.prior.flow.prediction import Field, Prediction, per_score
from smalti.prior.sampling import is_interval, is_number

# x (B, C, h, w), times (B,), labels (B,) -> (B, C_out, h, w)
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
# The same, but -> log p(label | x_t) (B,), differentiable in x
LogProbability = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClassifierFree:
    """uncond + s (cond - uncond) inside an interval of times (2207.12598; 2404.07724)."""

    scale: float = 1.0  # s; 1 is off
    interval: tuple[float, float] = (0.0, 1.0)  # t, from noise to data
    channels: int | None = None  # the first so many are guided, the others stay conditional

    def __post_init__(self) -> None:
        if not (is_number(self.scale) and math.isfinite(self.scale)):
            raise SmaltiError(f"guidance_scale is {self.scale}; it must be finite")
        if not is_interval(self.interval):
            raise SmaltiError(
                f"guidance_interval is {self.interval}; give two times, 0 <= from <= to <= 1"
            )

    def scales(self, t: Tensor) -> Tensor:
        """s at times (B,): 1 outside the interval."""
        start, stop = self.interval
        inside = (t >= start) & (t <= stop)
        return torch.where(inside, torch.full_like(t, self.scale), 1.0)


def classifier_free(network: Network, labels: Tensor, null: int, options: ClassifierFree) -> Field:
    """A network with its labels (B,), guided against the null label.

    Where no sample is guided the network runs once, on B samples; else once on 2B, conditional
    first.
    """

    def field(x: Tensor, t: Tensor) -> Tensor:
        if options.scale == 1:
            return network(x, t, labels)
        scales = options.scales(t)
        if not (scales != 1).any():
            return network(x, t, labels)
        both = torch.cat([labels, torch.full_like(labels, null)])
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        count = x.shape[1] if options.channels is None else options.channels
        without = unconditional[:, :count]
        guided = without + expand_like(scales, x) * (conditional[:, :count] - without)
        return torch.cat([guided, conditional[:, count:]], 1)

    return field


@dataclass(frozen=True)
class Classifier:
    """score + s grad log p(label | x_t), with a classifier of noisy latents (2105.05233, sec. 4).

    `log_probability` takes x_t (B, C, h, w), t (B,) from 0, noise, to 1, data, and labels (B,).
    """

    log_probability: LogProbability
    scale: float = 1.0

    def gradient(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """s grad_x log p(label | x), like x."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            total = self.log_probability(leaf, t, labels).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
        return self.scale * gradient


def with_classifier(
    field: Field, labels: Tensor, classifier: Classifier, path: GaussianPath, prediction: Prediction
) -> Field:
    """A field whose score, and so whatever it predicts, is guided by a classifier."""

    def guided(x: Tensor, t: Tensor) -> Tensor:
        output, channels = field(x, t), x.shape[1]
        shift = expand_like(per_score(prediction, path, t), x) * classifier.gradient(x, t, labels)
        return torch.cat([output[:, :channels] + shift, output[:, channels:]], 1)

    return guided
