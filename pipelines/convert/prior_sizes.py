"""Sizes of published transformers: what shapes tell, and what flags and defaults tell instead."""

import math
from collections.abc import Mapping

from smalti.errors import SmaltiError
from smalti.pipelines.convert.reader import Checkpoint
from smalti.pipelines.convert.source import Options

PUBLISHED_HEAD_DIM = 64


def dims(checkpoint: Checkpoint, name: str, count: int) -> tuple[int, ...]:
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


def layers(checkpoint: Checkpoint, template: str) -> int:
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
