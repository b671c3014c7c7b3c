"""From logits to codes: guidance, temperature, top-k, top-p, and sampling. Pure functions.

Also what a caller may do after each step of sampling, of any prior: `OnStep`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from smalti.config import nearest, plain
from smalti.errors import GenerationError
from smalti.randomness import Generators, given_or_new

# progress in [0, 1] -> weight w of the guidance; the scale at this step is 1 + w (s - 1)
GUIDANCE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    # RAR (2411.00776): its power is 1.2 to 2.75, depending on the size of the model; 2.5 is RAR-L's
    "power-cosine": lambda progress: (1 - math.cos(math.pi * progress**2.5)) / 2,
}


# -------------------------------------------------------------------------------------------------
# After each step: a code, a scale, or an interval of the solver

# Called with the number of steps done, from 1, the number of all steps, and a copy of the latents
# so far; what it returns, unless that is None, replaces them.
OnStep = Callable[[int, int, Tensor], Tensor | None]
UNSAMPLED = -1  # stands for a code that is not sampled yet


class StopSampling(Exception):
    """Raised by an `OnStep`: the remaining steps are skipped, and `sample` returns what there is.

    Codes that are not sampled yet are `UNSAMPLED`; latents of a flow still contain noise.

    Args:
        latents: what replaces the latents so far; None keeps them.
    """

    def __init__(self, latents: Tensor | None = None) -> None:
        super().__init__("sampling was stopped after a step")
        self.latents = latents


def after_step(
    on_step: OnStep, step: int, total: int, latents: Tensor
) -> tuple[Tensor | None, bool]:
    """Call an `OnStep`: what replaces the latents, if anything, and whether sampling goes on.

    Raises:
        GenerationError: the replacement has another shape, or is no tensor.
    """
    try:
        given, goes_on = on_step(step, total, latents), True
    except StopSampling as stop:
        given, goes_on = stop.latents, False
    if given is None:
        return None, goes_on
    shape = getattr(given, "shape", None)
    if shape != latents.shape:
        found = type(given).__name__ if shape is None else f"shape {tuple(shape)}"
        raise GenerationError(
            f"the callback after step {step} returned {found}; it must return latents of shape "
            f"{tuple(latents.shape)}, or None to keep them"
        )
    return given.to(latents), goes_on


def check_replacement(codes: Tensor, vocab_size: int) -> None:
    """Raise `GenerationError` unless codes that a callback returned are 0 to vocab_size - 1."""
    if codes.numel() and (codes.min() < 0 or codes.max() >= vocab_size):
        raise GenerationError(
            f"the callback returned codes in [{codes.min().item()}, {codes.max().item()}]; the "
            f"codes that are sampled so far must be 0 to {vocab_size - 1}"
        )


# -------------------------------------------------------------------------------------------------
# From logits to codes


@dataclass(frozen=True)
class SamplingOptions:
    """How codes are sampled from logits.

    Raises:
        GenerationError: a value is out of its range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest codes; 0 keeps all
    top_p: float = 1.0  # keep the likeliest codes with this total probability
    guidance_scale: float = 1.0  # s in uncond + s (cond - uncond); 1 is off
    guidance_schedule: str = "constant"  # a name in GUIDANCE_SCHEDULES
    # Steps with guidance, as shares: 0 is the first step, 1 the last (2404.07724).
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for part in fields(self):
            object.__setattr__(self, part.name, plain(getattr(self, part.name)))
        if not (is_number(self.guidance_scale) and math.isfinite(self.guidance_scale)):
            raise GenerationError(f"guidance_scale is {self.guidance_scale}; it must be finite")
        if not (is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise GenerationError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or more, and finite"
            )
        if type(self.top_k) is not int or self.top_k < 0:
            raise GenerationError(
                f"top_k is {self.top_k}; it must be a whole number, 0 (off) or more"
            )
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise GenerationError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise GenerationError(
                f'there is no guidance schedule "{self.guidance_schedule}"; '
                f"{nearest(self.guidance_schedule, GUIDANCE_SCHEDULES)}"
            )
        if not is_interval(self.guidance_interval):
            raise GenerationError(
                f"guidance_interval is {self.guidance_interval}; give two shares of the sampling "
                "steps, 0 <= from <= to <= 1"
            )

    def guidance_scales(self, steps: int) -> list[float]:
        """s_i of every step: constant, or growing from 1 at the first step to guidance_scale at the
        last; 1 outside the interval."""
        share = GUIDANCE_SCHEDULES[self.guidance_schedule]
        begin, end = self.guidance_interval
        progress = [step / (steps - 1) for step in range(steps)] if steps > 1 else [1.0]
        return [
            1 + (self.guidance_scale - 1) * share(p) if begin <= p <= end else 1.0 for p in progress
        ]

    def guided_steps(self, steps: int) -> range:
        """The steps with guidance, s_i != 1: consecutive, because every schedule is monotonic."""
        guided = [step for step, scale in enumerate(self.guidance_scales(steps)) if scale != 1]
        return range(guided[0], guided[-1] + 1) if guided else range(0)


def is_number(value: object) -> bool:
    """Whether value is an int or a float, and not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_interval(value: object) -> bool:
    """Whether value is a pair 0 <= from <= to <= 1."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(map(is_number, value)) and 0 <= value[0] <= value[1] <= 1


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: uncond + s (cond - uncond) (2207.12598, eq. 6 with s = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) with all but the k largest at -inf; logits equal to the k-th are kept."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (1904.09751): logits (B, V) with all at -inf except the smallest set of
    likeliest codes whose total probability reaches p; of equal logits the lower code is first."""
    if p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # total of all likelier codes
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -torch.inf)


def filtered(logits: Tensor, options: SamplingOptions, check: bool = True) -> Tensor:
    """Logits (B, V) divided by the temperature, with those that top-k and top-p exclude at -inf, in
    the most exact type of the device; the largest of every row is 0.

    Args:
        check: see `sample_codes`.

    Raises:
        GenerationError: the largest logit of a row is not finite.
    """
    dtype = exact_dtype(logits.device)
    # Relative to the largest, all are 0 or less: a temperature near 0 makes them -inf, not NaN.
    below = logits.to(dtype) - _largest(logits, check)
    logits = below / max(options.temperature, torch.finfo(dtype).tiny)
    return keep_top_p(keep_top_k(logits, options.top_k), options.top_p)


def _largest(logits: Tensor, check: bool) -> Tensor:
    """The largest logit of every row, (B, 1), which must be finite."""
    largest = logits.amax(dim=-1, keepdim=True)  # NaN if any logit of the row is
    if check and not torch.compiler.is_compiling():
        check_finite(largest.isfinite().all())
    return largest


def are_finite(logits: Tensor) -> Tensor:
    """Whether the largest logit of every row is finite, () bool."""
    return logits.amax(dim=-1).isfinite().all()


def check_finite(finite: Tensor) -> None:
    """Raise `GenerationError` unless `finite`, which `are_finite` made. The host waits for it."""
    if not finite:
        raise GenerationError(
            "the model gives NaN or infinity: its weights are damaged or overflow their type (use"
            " fp32), or guidance_scale is too large"
        )


def sample_codes(
    logits: Tensor, uniforms: Tensor, options: SamplingOptions, check: bool = True
) -> Tensor:
    """One code per row, by the inverse of the row's cumulative distribution.

    Args:
        logits: (B, V).
        uniforms: (B,) in [0, 1], one per row: a row depends only on its own logits and uniform.

    Returns:
        (B,) int64.

    Raises:
        GenerationError: the largest logit of a row is not finite.
    """
    if options.temperature == 0:
        _largest(logits, check)  # raises on NaN and infinity
        return logits.argmax(dim=-1)
    logits = filtered(logits, options, check)
    dtype = logits.dtype
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    total = cumulative[:, -1:]  # not exactly 1, by rounding
    below = total.nextafter(torch.zeros_like(total))  # excludes codes of probability 0 at the end
    target = torch.minimum(uniforms[:, None].to(logits.device, dtype) * total, below)
    found = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return found.clamp(max=logits.shape[-1] - 1)


def exact_dtype(device: torch.device) -> torch.dtype:
    """The most exact type of a device: float64, except on Apple's GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def sample_uniforms(rows: int, length: int, generator: Generators) -> Tensor:
    """Uniform random numbers in [0, 1) of a sampling call, (rows, length).

    With a list of generators, row i comes from generators[i] alone. They are generated on the
    generator's device, so a CPU generator gives the same codes on any device. None is a new
    generator with a random seed: sampling does not change torch's global random state.

    Raises:
        GenerationError: the list does not have one generator per row.
    """
    generator = given_or_new(generator, rows)
    if isinstance(generator, torch.Generator):
        return _uniforms((rows, length), generator)
    uniforms = [_uniforms((length,), own).cpu() for own in generator]
    return torch.stack(uniforms) if uniforms else torch.empty(0, length)


def _uniforms(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype = exact_dtype(generator.device)
    return torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)
