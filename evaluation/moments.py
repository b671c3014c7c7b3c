"""Mean and covariance of features that arrive a part at a time, in float64.

A Frechet distance needs nothing else of a set, so the features of a million pictures need not be
kept. Parts are joined by the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a
pairwise algorithm for computing sample variances", 1979): sums of products of differences from a
mean, which lose no digits where the mean is large, unlike sums of squares.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalti.errors import DataError


class UndefinedMetricError(DataError):
    """A number is not defined for these features, for example because there are too few: it is left
    out, with this reason."""


class Moments:
    """Count, mean and covariance of feature vectors of length `dim`.

    Results do not depend on how the features are divided into parts or into several `Moments`, up
    to rounding (1e-12 of the largest value); for the same parts in the same order they are equal to
    the bit.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)  # (d,)
        # Sum over features of (x - mean) (x - mean)^T, (d, d).
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add feature vectors (B, d), of any floating type, on any device; B may be 0.

        Raises:
            DataError: another shape, or values that are not finite.
        """
        dim = len(self.mean)
        if features.ndim != 2 or features.shape[1] != dim:
            raise DataError(f"features have shape {tuple(features.shape)}; give (B, {dim})")
        broken = int((~features.isfinite()).any(1).sum())
        if broken:
            raise DataError(
                f"{broken} of {len(features)} feature vectors are not finite: check that the "
                "images have no NaN or infinite values"
            )
        if not len(features):
            return
        rows = features.detach().to("cpu", torch.float64)
        mean = rows.mean(0)
        # The difference of the two means is one more row of the sum: one product, in place.
        rows = torch.cat([rows - mean, self._difference(mean, len(rows))])
        self._scatter.addmm_(rows.T, rows)
        self._join(mean, len(features))

    def merge(self, other: "Moments") -> None:
        """Add all features of another set of the same dimension, which stays as it is.

        Raises:
            DataError: the dimensions differ.
        """
        if len(other.mean) != len(self.mean):
            raise DataError(
                f"moments of {len(other.mean)} features cannot be merged with those of "
                f"{len(self.mean)}: use the same extractor for both"
            )
        if not other.count:
            return
        row = self._difference(other.mean, other.count)
        self._scatter += other._scatter
        self._scatter.addmm_(row.T, row)
        self._join(other.mean, other.count)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, (d, d).

        Raises:
            UndefinedMetricError: fewer than 2 features.
        """
        if self.count < 2:
            raise UndefinedMetricError(
                f"the number of pictures is {self.count}; a covariance needs at least 2: give more "
                "pictures"
            )
        return (self._scatter + self._scatter.T) / (2 * (self.count - 1))

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays that `np.savez` can write: `count` (), `mean` (d,) and `scatter`
        (d, d)."""
        return {
            "count": np.array(self.count, np.int64),
            "mean": self.mean.numpy().copy(),
            "scatter": self._scatter.numpy().copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Moments":
        """The moments of a `state`, for example of an opened npz file.

        Raises:
            DataError: an array is missing, or has another shape.
        """
        try:
            count, mean, scatter = (
                np.asarray(state[name]) for name in ("count", "mean", "scatter")
            )
        except KeyError as error:
            raise DataError(f"the stored moments have no {error}: compute them again") from error
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or count.shape != ():
            raise DataError(
                f"the stored moments have a mean of shape {mean.shape} and sums of shape "
                f"{scatter.shape}: compute them again"
            )
        made = cls(len(mean))
        made.count = int(count)
        made.mean = torch.tensor(mean, dtype=torch.float64)
        made._scatter = torch.tensor(scatter, dtype=torch.float64)
        return made

    def _difference(self, mean: Tensor, count: int) -> Tensor:
        """The row (1, d) whose product with itself joins the sums of two parts."""
        weight = self.count * count / (self.count + count)
        return (mean - self.mean)[None] * weight**0.5

    def _join(self, mean: Tensor, count: int) -> None:
        """Update count and mean for a part with this mean."""
        self.count += count
        self.mean = self.mean + (mean - self.mean) * (count / self.count)
