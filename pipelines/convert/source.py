"""What every source of published weights provides, and how sizes are read from its files.

A source is one code base and one kind of model. `convert` calls, in this order:

    recognises(checkpoint)          do the names of the tensors look like this source?
    infer(checkpoint, options)      the config of our model, from the shapes of the tensors
    layout(config)                  which of their tensors is which of ours

`export` calls `fits(config)`, which returns whether the layout applies, and `layout`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from torch import Tensor

from smalti.config import ImageSize
from smalti.errors import ConfigurationError, ConversionError
from smalti.hub import Registry
from smalti.pipelines.convert.layout import Layout
from smalti.pipelines.convert.reader import CONFIG, WRAPPERS, PublishedCheckpoint
from smalti.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Options:
    """What the shapes of tensors do not determine; None means the published default.

    Raises:
        ConfigurationError: a number is not positive.
    """

    heads: int | None = None  # attention heads of a prior
    # Sides of the code grids, coarse to fine; one number for a single grid.
    scales: tuple[int, ...] | None = None
    image_size: ImageSize | None = None  # pixels, of a tokenizer: a side, or (height, width)
    num_classes: int | None = None  # classes of a prior, without the null class
    scaling_factor: float | None = None  # by which continuous latents are multiplied
    tokenizer: Tokenizer | None = None  # the one whose latents a prior models

    def __post_init__(self) -> None:
        for name in ("heads", "image_size", "num_classes"):
            value = getattr(self, name)
            sides = value if isinstance(value, tuple) else (value,)
            if value is not None and min(sides) < 1:
                raise ConfigurationError(f"{name} is {value}; it must be at least 1")
        if self.scales is not None and (not self.scales or min(self.scales) < 1):
            raise ConfigurationError(
                f"scales is {self.scales}; give at least one side, each 1 or more"
            )
        if self.scaling_factor is not None and self.scaling_factor <= 0:
            raise ConfigurationError(
                f"scaling_factor is {self.scaling_factor}; it must be positive"
            )

    @property
    def given(self) -> set[str]:
        """Names of the options that were set."""
        return {f.name for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class Inferred:
    """The config of our model, and where its values come from, to print."""

    config: Any
    facts: Mapping[str, object] = field(default_factory=dict)  # read from the file
    assumed: Mapping[str, object] = field(default_factory=dict)  # options or published defaults


class Source(ABC):
    """Published weights of one kind; without state.

    `layout` follows from our config alone, so that it serves both import and export.
    """

    title: ClassVar[str]  # "LlamaGen tokenizer", for messages
    registry: ClassVar[Registry]  # TOKENIZERS or PRIORS: builds the model from the config
    options: ClassVar[frozenset[str]]  # the fields of `Options` that apply
    wrappers: ClassVar[tuple[str, ...]] = WRAPPERS  # keys under which the state dict may be saved
    # The prefix that `prepare` gives to tensors of other models in the same file.
    aside: ClassVar[str] = ""
    # The key around the state dict in files that the original code reads; empty for none.
    export_wrapper: ClassVar[str] = ""

    # -- import -------------------------------------------------------------------------------

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        """The checkpoint with older names of its tensors replaced by the current ones."""
        return checkpoint

    @abstractmethod
    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        """Whether the names of the tensors look like this source, even if some are missing."""

    @abstractmethod
    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        """The config of our model.

        Raises:
            ConversionError: a tensor that determines a size is missing, or the sizes contradict
                each other.
        """

    def stated(self, config: Any) -> Mapping[str, object]:
        """The settings that a matching config.json beside the tensors has, see `check_stated`."""
        del config
        return {}

    @abstractmethod
    def layout(self, config: Any) -> Layout:
        """Where each of their tensors goes in the model of this config."""

    def own_tensors(self, config: Any, options: Options) -> dict[str, Tensor]:
        """Values of our tensors that theirs does not have (`Layout.own`)."""
        del config, options
        return {}

    # -- export -------------------------------------------------------------------------------

    def fits(self, config: Any) -> bool:
        """Whether a model of this config can be written in this layout."""
        del config
        return False

    def example(self, config_class: type) -> Any:
        """A config that fits, if the class is that of this layout: its nearest published one."""
        return config_class()

    def flags(self, config: Any) -> dict[str, object]:
        """The options, other than defaults, that are needed to read an exported file again."""
        del config
        return {}

    def remarks(self, config: Any) -> list[str]:
        """What users of the original code should know about an exported file, one line each."""
        del config
        return []

    def export_config(self, config: Any) -> dict[str, Any] | None:
        """The config.json of a Diffusers folder; None for code bases that save a single file."""
        del config
        return None


# -------------------------------------------------------------------------------------------------
# Settings in the config.json of a Diffusers folder, checked as they are read. A setting that is
# missing or null has its default.


def config_path(checkpoint: PublishedCheckpoint) -> Path:
    """The config.json beside a checkpoint, whether it exists or not."""
    return checkpoint.path.parent / CONFIG


def wrong_setting(checkpoint: PublishedCheckpoint, key: str, expected: str) -> ConversionError:
    """The error for a setting that is not as expected."""
    value = checkpoint.config.get(key)
    return ConversionError(f"{config_path(checkpoint)}: {key} is {value!r}; expected {expected}")


def number(
    checkpoint: PublishedCheckpoint, key: str, default: float, *, positive: bool = False
) -> float:
    """A finite number."""
    value = checkpoint.config.get(key)
    value = default if value is None else value
    if not _is_number(value) or (positive and value <= 0):
        raise wrong_setting(checkpoint, key, "a positive number" if positive else "a number")
    return value


def numbers(checkpoint: PublishedCheckpoint, key: str, count: int) -> tuple[float, ...] | None:
    """A list of `count` finite numbers, or None."""
    value = checkpoint.config.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or not all(map(_is_number, value)):
        raise wrong_setting(checkpoint, key, f"{count} numbers")
    return tuple(map(float, value))


def positive_integer(checkpoint: PublishedCheckpoint, key: str) -> int | None:
    """An integer from 1, or None."""
    value = checkpoint.config.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise wrong_setting(checkpoint, key, "a positive integer")
    return value


def check_stated(checkpoint: PublishedCheckpoint, stated: Mapping[str, object]) -> None:
    """Raise `ConversionError` if config.json has other sizes than the tensors.

    Args:
        stated: the settings that follow from the tensors.
    """
    for key, expected in stated.items():
        found = checkpoint.config.get(key)
        if found is not None and found != expected:
            raise ConversionError(
                f"{config_path(checkpoint)}: {key} is {found!r}, but the tensors of "
                f"{checkpoint.path.name} give {expected!r}: the weights file is incomplete, or "
                "config.json belongs to another model"
            )


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


# -------------------------------------------------------------------------------------------------
# Sizes of published transformers. Where a size is not in the file, the second value that a function
# returns names its origin, to print.

PUBLISHED_HEAD_DIM = 64  # width of a head, in most published sizes


def layers(checkpoint: PublishedCheckpoint, template: str) -> int:
    """The number of blocks, whose names start with `template` ("blocks.{}.").

    Raises:
        ConversionError: there is none.
    """
    count = checkpoint.count(template)
    if not count:
        raise ConversionError(f"{checkpoint.path} lacks the tensors {template.format(0)}*")
    return count


def square_side(count: int) -> int | None:
    """The side of a square of `count` cells; None if `count` is not a square."""
    side = math.isqrt(count)
    return side if side * side == count else None


def head_count(
    options: Options, width: int, exceptions: Mapping[int, int], in_file: int | None = None
) -> tuple[int, dict[str, object]]:
    """The number of attention heads, and its origin.

    Args:
        exceptions: heads by width, of published sizes whose heads are not 64 wide.
        in_file: the number that the file states, if it does.

    Raises:
        ConversionError: the flag contradicts the file, or the width is no multiple of the heads.
    """
    if in_file is not None:
        if options.heads not in (None, in_file):
            raise ConversionError(
                f"--heads is {options.heads}, but the file has {in_file}: leave it out"
            )
        return in_file, {}
    if options.heads is not None:
        if width % options.heads:
            raise ConversionError(
                f"--heads is {options.heads}, which does not divide width {width}"
            )
        return options.heads, {"heads": f"{options.heads}, as given"}
    heads = exceptions.get(width, width // PUBLISHED_HEAD_DIM)
    if width not in exceptions and width % PUBLISHED_HEAD_DIM:
        raise ConversionError(
            f"width {width} is no multiple of {PUBLISHED_HEAD_DIM}, the published width of a head: "
            "give the number of heads with --heads"
        )
    return heads, {"heads": f"{heads}, the default of --heads for width {width}"}


def head_flags(heads: int, width: int, exceptions: Mapping[int, int]) -> dict[str, object]:
    """The flag that gives this number of heads; empty where it is the default."""
    default = exceptions.get(width, width / PUBLISHED_HEAD_DIM)
    return {} if heads == default else {"heads": heads}


@dataclass(frozen=True)
class ClassCount:
    """The number of classes, without the null class, and whether the file has a null class."""

    classes: int
    has_null: bool
    facts: dict[str, object]
    assumed: dict[str, object]  # empty where the file or --num_classes decides

    @property
    def label_dropout(self) -> dict[str, Any]:
        """The field of the config of a prior that was trained without class dropout."""
        return {} if self.has_null else {"label_dropout": 0.0}


def class_count(checkpoint: PublishedCheckpoint, table: str, options: Options) -> ClassCount:
    """The number of rows of a class table, less the null class, which is the last one.

    A table does not state whether it has a null class: models that were trained without class
    dropout have none. --num_classes tells; a single row and a last row of zeros tell as well.

    Raises:
        ConversionError: --num_classes is neither the number of rows nor one less.
    """
    rows, stated = checkpoint.shape(table, 2)[0], options.num_classes
    if stated not in (None, rows, rows - 1):
        raise ConversionError(
            f"--num_classes is {stated}, but {table} in {checkpoint.path} has {rows} rows: give "
            f"{rows - 1}, where the last row is the null class, or {rows}, where there is none"
        )
    zero_row = rows > 1 and not checkpoint.tensors[table][-1].any()  # written by our own export
    has_null = rows > 1 and stated != rows and not zero_row
    classes = stated or (rows - 1 if has_null or zero_row else rows)
    facts: dict[str, object] = {"classes": classes, "null class": "yes" if has_null else "none"}
    if stated is None and has_null:
        origin = f"the last of {rows} rows; if it is a class, give --num_classes {rows}"
        return ClassCount(classes, True, {"classes": classes}, {"null class": origin})
    return ClassCount(classes, has_null, facts, {})


def class_flags(label_dropout: float, num_classes: int) -> dict[str, object]:
    """The flag that states the number of classes; empty where there is a null class."""
    return {"num_classes": num_classes} if label_dropout == 0 else {}


def single_side(options: Options, default: int) -> tuple[int, dict[str, object]]:
    """The side of the only grid of latents, from --scales or its default, and its origin.

    Raises:
        ConversionError: several sides are given.
    """
    if options.scales is None:
        return default, {"grid": f"{default} x {default}, the default of --scales"}
    if len(options.scales) != 1:
        raise ConversionError(
            f"--scales is {listed(options.scales)}; this prior has one grid: give its side alone"
        )
    (side,) = options.scales
    return side, {"grid": f"{side} x {side}, as given"}


def listed(sides: tuple[int, ...] | None, separator: str = ", ") -> str:
    """Sides as text: "1, 2, 3"."""
    return separator.join(map(str, sides or ()))


def tokenizer_fingerprint(options: Options) -> str | None:
    """The fingerprint of the tokenizer that was given, if one was."""
    return options.tokenizer.fingerprint if options.tokenizer is not None else None
