"""Flags that commands share: those of captions, and the sampling flags, taken from the priors.

A prior owns the options of its `sample`: each keyword of a type that a flag can have is a
flag, with its type, its default, and the help text of its docstring.
"""

import inspect
import itertools
import re
import typing
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from docstring_parser import parse
from tyro.conf import arg

from smalti.config import first_difference
from smalti.errors import ConfigurationError, GenerationError
from smalti.hub import named_options
from smalti.pipelines.conditions import CONDITION_SOURCES
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.conditions.byte_encoder import BYTES
from smalti.prior.flow.solvers.base import SOLVERS
from smalti.prior.flow.solvers.schedules import SCHEDULES
from smalti.prior.registry import PRIORS

# The part of a docstring that says how an object of a registry is given in Python.
IN_PYTHON = re.compile(r"a name in `(\w+)`,.*? or an? \w+")
REGISTRIES = {"SOLVERS": SOLVERS, "SCHEDULES": SCHEDULES}

# The precision while models sample, see pipelines/precision.py: names of `smalti.weights`.
Precision = Literal["float32", "bfloat16", "float16", "int8", "int4"]
ShortPrecision = Literal["fp32", "bf16", "fp16"]
DType = Literal[Precision, ShortPrecision, "auto"]


@dataclass(frozen=True)
class TextOptions:
    """Captions as a condition."""

    # bytes: a byte-level encoder that is trained with the prior; or a folder or Hub id of a T5 or
    # CLIP model of transformers
    encoder: str = BYTES
    length: int = 64  # tokens of a caption at most; a longer one is refused
    dim: int = 256  # channels of the features of the byte-level encoder

    def refuse_unless(self, used: bool) -> None:
        """Raise `ConfigurationError` if options were given and captions are not used."""
        given = first_difference(self, TextOptions(), "text") if not used else None
        if given:
            raise ConfigurationError(
                f"--{given.name} is for a prior of captions: add --condition text, or leave it out"
            )


@dataclass(frozen=True)
class SamplingBase:
    """Options of a prior's `sample`. An option that is left out has the prior's default; one that
    the prior does not have is an error."""

    # The classes made from this one have no source, in which a comment would be found.
    guidance_scale: Annotated[
        float | None,
        arg(help="s in uncond + s (cond - uncond); 1 is off. Default: that of the pipeline, or 2."),
    ] = None

    def guided_like(self, pipeline: Pipeline) -> Self:
        """With the sampling defaults of the pipeline, guidance among them, where none was given."""
        missing = {
            name: as_flag(value)
            for name, value in pipeline.sampling.items()
            if getattr(self, name, ...) is None
        }
        return replace(self, **missing)

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, as keyword arguments of a pipeline."""
        given = {part.name: getattr(self, part.name) for part in fields(Sampling)}
        return {
            name: named_options(value) if isinstance(value, str) and ":" in value else value
            for name, value in given.items()
            if value is not None
        }


def as_flag(value: Any) -> Any:
    """A sampling default as a flag has it: {"kind": "ddim", "eta": 0.5} as "ddim:eta=0.5"."""
    if isinstance(value, dict) and "kind" in value:
        options = ",".join(f"{k}={v}" for k, v in value.items() if k != "kind")
        return f"{value['kind']}:{options}" if options else value["kind"]
    return tuple(value) if isinstance(value, list) else value


@dataclass
class SampleOption:
    """A keyword of one prior's `sample`."""

    prior: str
    name: str
    type: Any
    default: Any
    help: str


def sample_options() -> Iterator[SampleOption]:
    """Every option of every registered prior that can be a flag."""
    for prior in PRIORS:
        function = PRIORS.resolve(prior).sample
        elsewhere = PRIORS.resolve(prior).editing_options
        hints = typing.get_type_hints(function)
        texts = {p.arg_name: p.description or "" for p in parse(function.__doc__ or "").params}
        for name, parameter in inspect.signature(function).parameters.items():
            kind = _flag_type(hints.get(name))
            if parameter.kind is parameter.KEYWORD_ONLY and kind and name not in elsewhere:
                text = IN_PYTHON.sub(_names, " ".join(texts.get(name, "").split()))
                yield SampleOption(prior, name, kind, parameter.default, text)


def _names(match: re.Match[str]) -> str:
    """What a flag takes instead of an object: the registered names."""
    return f"{', '.join(REGISTRIES[match[1]])}, or with options, as in name:option=value"


def _flag_type(hint: Any) -> Any:
    """The member of a union that can be a flag: a number, a word or two numbers."""
    members = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    for candidate in (bool, int, float, str, tuple[float, float]):
        if hint == candidate or candidate in members:
            return candidate
    return None


def _flags() -> list[tuple[str, Any, Any]]:
    """A field for each option: where priors share one, its help names each of them."""
    owners: dict[str, list[SampleOption]] = {}
    for option in sample_options():
        if option.name not in {part.name for part in fields(SamplingBase)}:
            owners.setdefault(option.name, []).append(option)
    flags = []
    for name, options in owners.items():
        texts: dict[tuple[str, str], list[str]] = {}  # (help, default) -> priors
        for option in options:
            texts.setdefault((option.help, str(option.default)), []).append(option.prior)
        text = " ".join(
            f"{', '.join(priors)}: {what} Default: {default}."
            for (what, default), priors in texts.items()
        )
        flags.append((name, Annotated[options[0].type | None, arg(help=text)], field(default=None)))
    return flags


def _condition_flags() -> list[tuple[str, Any, Any]]:
    """A field for the flag of each kind of condition that has one of its own."""
    return [
        (source.FLAGS[0], Annotated[tuple[str, ...], arg(help=source.FLAG_HELP)], field(default=()))
        for source in CONDITION_SOURCES.classes.values()
        if source.FLAG_HELP
    ]


def refuse_other_conditions(config: Any, kinds: Container[str], described: str) -> None:
    """Raise `GenerationError` if the flag of a condition is given that is not one of `kinds`.

    Args:
        described: the pipeline, and what it is conditional on.
    """
    for name, source in CONDITION_SOURCES.classes.items():
        for flag in source.FLAGS if name not in kinds else ():
            if getattr(config, flag, None):
                raise GenerationError(f"--{flag} is given, but {described}: leave it out")


if TYPE_CHECKING:
    Sampling = SamplingBase
    ConditionFlags = object
else:
    ConditionFlags = make_dataclass(
        "ConditionFlags",
        _condition_flags(),
        frozen=True,
        namespace={"__doc__": "The flags of registered conditions.", "__module__": __name__},
    )
    Sampling = make_dataclass(
        "Sampling",
        _flags(),
        bases=(SamplingBase,),
        frozen=True,
        namespace={"__doc__": SamplingBase.__doc__, "__module__": __name__},
    )


# -------------------------------------------------------------------------------------------------
# Grids of sampling options: every flag takes several values


@dataclass(frozen=True)
class SamplingGridBase:
    """Options of a prior's `sample`, with several values each. An option that is left out has the
    default of the pipeline."""

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the values that were given; empty if there are none."""
        given = {part.name: getattr(self, part.name) for part in fields(SamplingGrid)}
        given = {name: values for name, values in given.items() if values}
        rows = itertools.product(*given.values()) if given else ()
        return [dict(zip(given, row, strict=True)) for row in rows]


def _grid_flags() -> list[tuple[str, Any, Any]]:
    """A field for each sampling flag, for a tuple of its values."""
    hints = typing.get_type_hints(Sampling, include_extras=True)
    flags = []
    for part in fields(Sampling):
        optional, *about = typing.get_args(hints[part.name])
        one = next(kind for kind in typing.get_args(optional) if kind is not type(None))
        flags.append((part.name, Annotated[tuple[one, ...], *about], field(default=())))
    return flags


if TYPE_CHECKING:
    SamplingGrid = SamplingGridBase
else:
    SamplingGrid = make_dataclass(
        "SamplingGrid",
        _grid_flags(),
        bases=(SamplingGridBase,),
        frozen=True,
        namespace={"__doc__": SamplingGridBase.__doc__, "__module__": __name__},
    )
