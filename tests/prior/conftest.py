"""Data whose every marginal, score and velocity is known in closed form."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from smalti.prior.flow.path import GaussianPath
from smalti.prior.flow.prediction import Dynamics, Prediction, prediction_target


@dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, diag(stds_k^2)) in D dimensions, float64."""

    means: Tensor  # (K, D)
    stds: Tensor  # (K, D)
    weights: Tensor  # (K,)

    @classmethod
    def gaussian(cls, mean: list[float], std: list[float]) -> "Mixture":
        double = torch.float64
        return cls(
            torch.tensor([mean], dtype=double),
            torch.tensor([std], dtype=double),
            torch.ones(1, dtype=double),
        )

    @classmethod
    def two(cls) -> "Mixture":
        """A wide and a narrow component in the plane, not symmetric."""
        double = torch.float64
        return cls(
            torch.tensor([[-1.5, 0.5], [1.0, -0.5]], dtype=double),
            torch.tensor([[0.3, 0.6], [0.2, 0.1]], dtype=double),
            torch.tensor([0.3, 0.7], dtype=double),
        )

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D)."""
        k = torch.multinomial(self.weights, count, True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k] * noise

    def _parts(self, path: GaussianPath, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """alpha, sigma (B, 1, 1), whitened offsets and log densities of every component."""
        alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
        variance = alpha**2 * self.stds**2 + sigma**2  # (B, K, D)
        offset = (x[:, None] - alpha * self.means) / variance
        log_density = -(offset * (x[:, None] - alpha * self.means)).sum(-1) / 2
        log_density = log_density - (2 * math.pi * variance).log().sum(-1) / 2
        return alpha, sigma, offset, log_density + self.weights.log()

    def log_density(self, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x), (B,)."""
        return self._parts(path, x, t)[3].logsumexp(-1)

    def expected(self, path: GaussianPath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_1 | x_t] and E[x_0 | x_t], each (B, D)."""
        alpha, sigma, offset, log_density = self._parts(path, x, t)
        share = log_density.softmax(-1)[..., None]
        data = (share * (self.means + alpha * self.stds**2 * offset)).sum(1)
        return data, (share * sigma * offset).sum(1)

    def predict(self, prediction: Prediction, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
        """The prediction of a perfect network, (B, D)."""
        return prediction_target(prediction, path, *self.expected(path, x, t), t)

    def dynamics(self, path: GaussianPath, prediction: Prediction = "velocity") -> Dynamics:
        """The dynamics of a perfect network."""
        return Dynamics(path, prediction, lambda x, t: self.predict(prediction, path, x, t))


@pytest.fixture
def mixtures() -> type[Mixture]:
    return Mixture
