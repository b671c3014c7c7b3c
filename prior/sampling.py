"""From logits to codes: guidance, temperature, top-k, top-p, and a draw. Pure functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.config import nearest
from smalti.errors import SmaltiError

# progress in [0, 1] -> share of the way from no guidance (1) to the full scale
GUIDANCE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    # RAR (2411.00776); its power varies by model size around 2.5
    "power-cosine": lambda progress: (1 - math.cos(math.pi * progress**2.5)) / 2,
}


@dataclass(frozen=True)
class SamplingOptions:
    """How codes are drawn from logits.

    Raises:
        SmaltiError: a value out of its range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest codes; 0 keeps all
    top_p: float = 1.0  # keep the likeliest codes with this total probability
    guidance_schedule: str = "constant"

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise SmaltiError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise SmaltiError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise SmaltiError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise SmaltiError(
                f'no guidance schedule is called "{self.guidance_schedule}"; '
                f"{nearest(self.guidance_schedule, GUIDANCE_SCHEDULES)}"
            )

    def scale(self, guidance_scale: float, step: int, steps: int) -> float:
        """s_i: the guidance scale at step i of n, from 1 to `guidance_scale`."""
        progress = step / max(1, steps - 1)
        return 1 + (guidance_scale - 1) * GUIDANCE_SCHEDULES[self.guidance_schedule](progress)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: uncond + s (cond - uncond) (2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) with all but the k largest at -inf; codes that tie with the k-th stay."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) with all at -inf but the smallest set of likeliest codes whose probabilities
    reach p in total (nucleus sampling, 1904.09751)."""
    if p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # total of all likelier codes
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """One code per row.

    Args:
        logits: (B, V).
        uniforms: (B,) in [0, 1), one number per row: the inverse of the cumulative distribution
            turns it into a code, so a row depends on nothing but its own logits and number.

    Returns:
        (B,) int64.
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    logits = keep_top_p(
        keep_top_k(logits.float() / options.temperature, options.top_k), options.top_p
    )
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniforms.double()[:, None] * cumulative[:, -1:]  # rounding: the total is not quite 1
    return (
        torch.searchsorted(cumulative, target, right=True)
        .squeeze(-1)
        .clamp(max=logits.shape[-1] - 1)
    )


def draw_uniforms(
    rows: int, length: int, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """All random numbers of a sampling call, (rows, length) in [0, 1).

    With a list of generators row i comes from generators[i] alone. They are drawn where the
    generator lives, so a CPU generator gives the same codes on any device.

    Raises:
        SmaltiError: the list has another length than there are rows.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.rand(rows, length, generator=generator, device=device, dtype=torch.float64)
    if len(generator) != rows:
        raise SmaltiError(
            f"{len(generator)} generators were given for {rows} samples: give one each"
        )
    drawn = [
        torch.rand(length, generator=g, device=g.device, dtype=torch.float64).cpu()
        for g in generator
    ]
    return torch.stack(drawn)
