"""What every source of published weights promises: one code base, one kind of model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from smalti.errors import SmaltiError
from smalti.hub import Registry
from smalti.pipelines.convert.layout import Layout
from smalti.pipelines.convert.reader import WRAPPERS, PublishedCheckpoint
from smalti.tokenizer.base import Tokenizer

# -------------------------------------------------------------------------------------------------
# What every source of published weights promises: one code base, one kind of model.


@dataclass(frozen=True)
class Options:
    """What the shapes of tensors cannot tell; None stands for the published default."""

    heads: int | None = None  # attention heads of a prior
    # Sides of the code grids, coarse to fine; one number for a single grid.
    scales: tuple[int, ...] | None = None
    image_size: int | None = None  # pixels per side of a tokenizer
    scaling_factor: float | None = None  # of continuous latents: they are multiplied by it
    tokenizer: Tokenizer | None = None  # that a prior belongs to

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("image_size", self.image_size)):
            if value is not None and value < 1:
                raise SmaltiError(f"{name} is {value}; it must be at least 1")
        if self.scales is not None and (not self.scales or min(self.scales) < 1):
            raise SmaltiError(f"scales is {self.scales}; give at least one side, each 1 or more")
        if self.scaling_factor is not None and self.scaling_factor <= 0:
            raise SmaltiError(f"scaling_factor is {self.scaling_factor}; it must be positive")

    @property
    def given(self) -> set[str]:
        """Names of the options that were set."""
        return {f.name for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class Inferred:
    """What a checkpoint says about its model."""

    config: Any  # of our model
    facts: Mapping[str, object] = field(default_factory=dict)  # read from the tensors, to print
    assumed: Mapping[str, object] = field(default_factory=dict)  # options or published defaults


class Source(ABC):
    """Published weights of one kind: how they are recognised, measured and laid out.

    A source keeps no state. `infer` looks at shapes, `layout` follows from our config alone, so
    that it serves import and export alike.
    """

    title: ClassVar[str]  # "LlamaGen tokenizer", for messages
    registry: ClassVar[Registry]  # TOKENIZERS or PRIORS: builds the model from the config
    options: ClassVar[frozenset[str]]  # names in `Options` that it takes
    wrappers: ClassVar[tuple[str, ...]] = WRAPPERS  # keys under which its state dict may lie
    # What `prepare` puts before the names of tensors of other models in the same file.
    aside: ClassVar[str] = ""
    # Of a file that original code reads: the key around the state dict, empty for none.
    export_wrapper: ClassVar[str] = ""

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        """The checkpoint with older spellings of its names made current."""
        return checkpoint

    @abstractmethod
    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        """Whether the names of the tensors look like this source, though some may be missing."""

    @abstractmethod
    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        """The config of our model.

        Raises:
            SmaltiError: a tensor that tells a size is missing, or the sizes are impossible.
        """

    def stated(self, config: Any) -> Mapping[str, object]:
        """What config.json beside the tensors says if it is theirs: their sizes, once more."""
        del config
        return {}

    @abstractmethod
    def layout(self, config: Any) -> Layout:
        """Where every tensor of theirs belongs in the model that `config` describes."""

    def own_tensors(self, config: Any, options: Options) -> dict[str, Tensor]:
        """Values of the tensors of ours that theirs does not have (`Layout.own`)."""
        del config, options
        return {}

    def fits(self, config: Any) -> bool:
        """Whether a model of this config can be written in this layout."""
        del config
        return False

    def flags(self, config: Any) -> dict[str, object]:
        """The options that are needed to read an exported file again, beside the defaults."""
        del config
        return {}

    def remarks(self, config: Any) -> list[str]:
        """What those should know who give an exported file to its code base, one line each."""
        del config
        return []

    def export_config(self, config: Any) -> dict[str, Any] | None:
        """The config.json of a Diffusers folder; None for code bases that keep a file alone."""
        del config
        return None


# -------------------------------------------------------------------------------------------------
# Sizes of published transformers: what shapes tell, and what flags and defaults tell instead.

PUBLISHED_HEAD_DIM = 64


def dims(checkpoint: PublishedCheckpoint, name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor with so many dimensions.

    Raises:
        SmaltiError: it is missing, has another number of dimensions, or is empty.
    """
    shape = checkpoint.shape(name)
    if len(shape) != count or 0 in shape:
        raise SmaltiError(
            f"{checkpoint.path}: {name} has shape {shape}; expected {count} dimensions, none empty"
        )
    return shape


def layers(checkpoint: PublishedCheckpoint, template: str) -> int:
    """How many blocks there are, called "blocks.{}.".

    Raises:
        SmaltiError: none.
    """
    count = checkpoint.count(template)
    if not count:
        raise SmaltiError(f"{checkpoint.path} lacks the tensors {template.format(0)}*")
    return count


def square_side(count: int) -> int | None:
    """The side of a square of so many places, if there is one."""
    side = math.isqrt(count)
    return side if side * side == count else None


def head_count(
    options: Options, width: int, exceptions: Mapping[int, int], told: int | None = None
) -> tuple[int, dict[str, object]]:
    """Attention heads, and if the file does not tell them, where they come from, to print.

    Args:
        exceptions: heads by width, of published sizes whose heads are not 64 wide.
        told: what the file says, if it does.

    Raises:
        SmaltiError: the flag contradicts the file, or the width cannot be cut so.
    """
    if told is not None:
        if options.heads not in (None, told):
            raise SmaltiError(f"--heads is {options.heads}, but the file has {told}: leave it out")
        return told, {}
    if options.heads is not None:
        if width % options.heads:
            raise SmaltiError(f"--heads is {options.heads}, which does not divide width {width}")
        return options.heads, {"heads": f"{options.heads}, as given"}
    heads = exceptions.get(width, width // PUBLISHED_HEAD_DIM)
    if width not in exceptions and width % PUBLISHED_HEAD_DIM:
        raise SmaltiError(
            f"width {width} is no multiple of {PUBLISHED_HEAD_DIM}, the published width of a head: "
            "give their number with --heads"
        )
    return heads, {"heads": f"{heads}, the default of --heads for width {width}"}


def head_flags(heads: int, width: int, exceptions: Mapping[int, int]) -> dict[str, object]:
    """The flag that gives this number of heads, where the default does not."""
    default = exceptions.get(width, width / PUBLISHED_HEAD_DIM)
    return {} if heads == default else {"heads": heads}


def single_side(options: Options, default: int) -> tuple[int, dict[str, object]]:
    """Side of the one square grid of latents, and where it comes from, to print: flag or default.

    Raises:
        SmaltiError: several sides are given.
    """
    if options.scales is None:
        return default, {"grid": f"{default} x {default}, the default of --scales"}
    if len(options.scales) != 1:
        raise SmaltiError(
            f"--scales is {', '.join(map(str, options.scales))}; this prior has one grid: give its "
            "side alone"
        )
    (side,) = options.scales
    return side, {"grid": f"{side} x {side}, as given"}


def fingerprint(options: Options) -> str | None:
    """Of the tokenizer that was given."""
    return options.tokenizer.fingerprint if options.tokenizer is not None else None
