"""Zero-shot editing with a flow prior: sampling that starts from given latents z, or keeps parts of
them.

Image-to-image (SDEdit, Meng et al., 2108.01073): sampling starts at the time t = 1 - strength, from
alpha(t) z + sigma(t) x_0. In-painting by replacement (Song et al., 2011.13456, appendix I.2;
RePaint, 2201.09865, without its resampling): after every step, to a time t, the kept part becomes
alpha(t) z + sigma(t) x_0. x_0 is the noise that sampling starts from, the same at all times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from smalti.config import plain
from smalti.data.latents import as_tensor
from smalti.errors import GenerationError
from smalti.prior.flow.path import GaussianPath
from smalti.prior.flow.prediction import Dynamics
from smalti.prior.flow.solvers.base import SOLVERS, Solver, shared_time
from smalti.prior.sampling import is_number
from smalti.randomness import NormalSource

SHORTEST = 1e-9  # time: a shorter first step is left out


@dataclass(frozen=True)
class KnownLatents:
    """Latents of given images, how much noise they get, and which of them stay."""

    latents: Tensor  # z, (B, C, h, w)
    mask: Tensor | None  # (B, 1, h, w) bool, True where latents are kept; None: nowhere
    strength: float  # in (0, 1]; 1 starts from noise alone

    @classmethod
    def checked(cls, latents: Any, mask: Any, strength: Any, solver: Solver) -> Self | None:
        """The options `known`, `known_mask` and `strength` of `sample`; None if all are left out.

        Raises:
            GenerationError: a value is out of its range, or one is without influence; the solver
                has no steps after which latents can be replaced.
        """
        latents, mask, strength = as_tensor(latents), as_tensor(mask), plain(strength)
        if not is_number(strength) or not 0 < strength <= 1:
            raise GenerationError(
                f"strength is {strength}; it must lie in (0, 1]: 1 starts from noise alone"
            )
        if latents is None:
            if mask is None and strength == 1:
                return None
            given = f"strength is {strength}" if mask is None else "known_mask was given"
            raise GenerationError(f"{given}, but no latents to start from or to keep: give known")
        if mask is None:
            if strength == 1:
                raise GenerationError(
                    "known has no influence at strength 1: give known_mask, or a strength below 1"
                )
            return cls(latents, None, strength)
        expected = (len(latents), 1, *latents.shape[2:])
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise GenerationError(
                f"known_mask has shape {tuple(mask.shape)} and type {mask.dtype}; for these latents"
                f" give {expected} bool, True where they are kept"
            )
        if not solver.memoryless:
            allowed = [name for name in SOLVERS if SOLVERS.resolve(name).memoryless]
            raise GenerationError(
                f"{SOLVERS.name_of(type(solver))} has no fixed steps after which known latents can "
                f"be put back: in-paint with one of {', '.join(allowed)}"
            )
        return cls(latents, mask, strength)

    def to(self, device: torch.device) -> Self:
        """On the device of a model, in fp32, in which sampling computes."""
        mask = None if self.mask is None else self.mask.to(device)
        return type(self)(self.latents.to(device, torch.float32), mask, self.strength)

    def times(self, times: Tensor) -> Tensor:
        """The rest of a time grid (N + 1,) from t = 1 - strength on.

        Raises:
            GenerationError: no step is left.
        """
        start, end = 1 - self.strength, times[-1].item()
        if start <= times[0]:
            return times
        later = times[times > start + SHORTEST]
        if not len(later):
            raise GenerationError(
                f"strength is {self.strength}, which leaves no step, because sampling ends at time "
                f"{end:.4g}: use more than {1 - end:.4g}"
            )
        return torch.cat([times.new_tensor([start]), later])

    def start(self, path: GaussianPath, x: Tensor, time: float, noise: Tensor) -> Tensor:
        """The samples (B, C, h, w) at the first time.

        Args:
            x: where sampling starts without known latents.
            noise: x_0.
        """
        if self.strength < 1:
            return self._noisy(path, time, noise)
        return x if self.mask is None else self._kept(path, x, time, noise)

    def states(
        self,
        solver: Solver,
        dynamics: Dynamics,
        x: Tensor,
        times: Tensor,
        normal: NormalSource,
        noise: Tensor,
    ) -> Iterator[Tensor]:
        """`solver.states`, with the kept latents put back after every step."""
        if self.mask is None:
            yield from solver.states(dynamics, x, times, normal)
            return
        for pair in pairwise(times):
            x = solver.solve(dynamics, x, torch.stack(pair), normal)
            x = self._kept(dynamics.path, x, pair[1].item(), noise)
            yield x

    def finished(self, x: Tensor) -> Tensor:
        """Samples x (B, C, h, w) with exactly the given latents where they are kept."""
        return x if self.mask is None else torch.where(self.mask, self.latents, x)

    def _noisy(self, path: GaussianPath, time: float, noise: Tensor) -> Tensor:
        return path.mix(self.latents, noise, shared_time(time))

    def _kept(self, path: GaussianPath, x: Tensor, time: float, noise: Tensor) -> Tensor:
        return torch.where(self.mask, self._noisy(path, time, noise), x)  # type: ignore[arg-type]
