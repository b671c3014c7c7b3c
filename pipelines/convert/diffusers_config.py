"""config.json of a Diffusers folder: settings, checked as they are read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from smalti.errors import SmaltiError
from smalti.pipelines.convert.reader import CONFIG, Checkpoint


def config_path(checkpoint: Checkpoint) -> Path:
    """Where the file lies, or would."""
    return checkpoint.path.parent / CONFIG


def refusal(checkpoint: Checkpoint, key: str, expected: str) -> SmaltiError:
    """What is said of a setting that is not as expected."""
    value = checkpoint.config.get(key)
    return SmaltiError(f"{config_path(checkpoint)}: {key} is {value!r}; expected {expected}")


def number(checkpoint: Checkpoint, key: str, default: float, *, positive: bool = False) -> float:
    """A number; what the file lacks, or has as null, is the default."""
    value = checkpoint.config.get(key)
    value = default if value is None else value
    if not _is_number(value) or (positive and value <= 0):
        raise refusal(checkpoint, key, "a positive number" if positive else "a number")
    return value


def numbers(checkpoint: Checkpoint, key: str, count: int) -> tuple[float, ...] | None:
    """A list of so many numbers; None where there is none."""
    value = checkpoint.config.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or not all(map(_is_number, value)):
        raise refusal(checkpoint, key, f"{count} numbers")
    return tuple(map(float, value))


def whole(checkpoint: Checkpoint, key: str) -> int | None:
    """A whole number from 1; None where there is none."""
    value = checkpoint.config.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(checkpoint, key, "a whole number from 1")
    return value


def check_stated(checkpoint: Checkpoint, stated: Mapping[str, object]) -> None:
    """Raise `SmaltiError` if config.json speaks of other sizes than the tensors have.

    Args:
        stated: what it says if it belongs to them; what it lacks, or has as null, says nothing.
    """
    for key, told in stated.items():
        said = checkpoint.config.get(key)
        if said is not None and said != told:
            raise SmaltiError(
                f"{config_path(checkpoint)}: {key} is {said!r}, but the tensors of "
                f"{checkpoint.path.name} say {told!r}: they were cut short, or it is another "
                "model's file"
            )


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)
