"""How pictures are drawn: the flags that every command that samples has in common."""

from dataclasses import dataclass, fields
from typing import Any

from smalti.errors import SmaltiError


@dataclass(frozen=True)
class Sampling:
    """Options of a prior's `sample`. Those left out are the prior's own defaults; one that a prior
    does not have is refused."""

    guidance_scale: float = 2.0  # s in uncond + s (cond - uncond); 1 is off
    guidance_interval: tuple[float, float] | None = None  # the part of sampling that is guided
    # Of next-token and next-scale priors.
    guidance_schedule: str | None = None  # constant, linear, cosine or power-cosine
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None  # keep the k likeliest codes; 0 is off
    top_p: float | None = None  # keep the likeliest codes with this total probability
    smooth: bool | None = None  # next-scale: mixtures of codes instead of draws
    # Of flow priors.
    num_inference_steps: int | None = None
    solver: str | None = None  # by name: heun, or with options: ddim:eta=1.0
    schedule: str | None = None  # of the steps; by name, or with options: shifted:shift=3.0

    @property
    def options(self) -> dict[str, Any]:
        """What was given, as keyword arguments of a pipeline."""
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        options = {name: value for name, value in given.items() if value is not None}
        for name in ("solver", "schedule"):
            if name in options:
                options[name] = with_options(options[name])
        return options


def with_options(text: str) -> str | dict[str, Any]:
    """ "ddim:eta=1.0,..." as {"kind": "ddim", "eta": 1.0, ...}; a bare name as it is.

    Raises:
        SmaltiError: what follows the colon is not option=value, or gives an option twice.
    """
    import yaml

    kind, colon, rest = text.partition(":")
    if not colon:
        return text
    options: dict[str, Any] = {"kind": kind}
    for part in rest.split(","):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise SmaltiError(f'"{part}" in "{text}" is no option: write {kind}:option=value,...')
        if name in options:
            raise SmaltiError(f'"{name}" stands twice in "{text}": give each option once')
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SmaltiError(
                f'"{value}" in "{text}" is no value: write {kind}:{name}=1.0'
            ) from error
    return options
