"""Pictures with more than 8 bits per channel -> 8 bits, by the range of values they were made for.

A file tells how many bits a value has, but not which values are black and white: a 12-bit camera
stores 0 to 4095 in 16 bits, microscopes and simulations store any numbers. A range is therefore
given, or assumed to be that of the file's type and refused where the picture contradicts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smalti.errors import ConfigurationError

ValueRange = tuple[float, float]  # the stored values that become black (0) and white (255)

# Grey levels that a picture with more distinct values must keep; one with fewer keeps over half.
MIN_LEVELS = 64
MAX_CLIPPED = 0.001  # of the values of a picture may lie outside the range

# Common ranges, the narrowest first: floats, signed floats, and 8, 10, 12, 14 and 16 bits.
CUSTOMARY: tuple[ValueRange, ...] = (
    (0, 1),
    (-1, 1),
    *((0, 2**bits - 1) for bits in (8, 10, 12, 14, 16)),
)


def check_range(value_range: ValueRange | None) -> None:
    """Raise `ConfigurationError` unless the first value of a range is below the second."""
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ConfigurationError(
            f"value_range is {written(value_range)}; give the value that is black, then the "
            "larger one that is white"
        )


def written(limits: ValueRange) -> str:
    """A range as two numbers that a command line takes: no exponents."""
    low, high = (
        np.format_float_positional(limit, precision=9, unique=False, fractional=False, trim="-")
        for limit in limits
    )
    return f"{low} {high}"


def to_eight_bits(values: np.ndarray, limits: ValueRange) -> np.ndarray:
    """Stored values, of any shape -> uint8: scaled from the range to 0 to 255, and rounded."""
    if values.dtype == np.uint16:  # a table of all values takes less time and memory
        return _scaled(np.arange(2**16), limits)[values]
    return _scaled(values, limits)


def _scaled(values: np.ndarray, limits: ValueRange) -> np.ndarray:
    scaled = (values.astype(np.float64) - limits[0]) * (255 / (limits[1] - limits[0]))
    return np.clip(np.floor(scaled + 0.5), 0, 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Extent:
    """Which ranges fit one picture; small, so that it can be kept for each picture of a set."""

    low: float  # smallest value of the picture
    high: float  # largest value of the picture
    customary: frozenset[ValueRange]  # those of `CUSTOMARY` that fit
    # The range of the values themselves, if it fits; without 0.05 % at either end if only that does
    own: ValueRange | None


class Histogram:
    """The distinct values of a picture, sorted, and how often each occurs."""

    def __init__(self, values: np.ndarray) -> None:
        if values.dtype == np.uint16:
            counts = np.bincount(values.ravel(), minlength=1)
            self.values = counts.nonzero()[0]
            self.counts = counts[self.values]
        else:
            self.values, self.counts = np.unique(values, return_counts=True)

    def problem(self, limits: ValueRange) -> str | None:
        """What the conversion by a range would lose, or None if the range fits."""
        half = (limits[1] - limits[0]) / 510  # half a grey level: is rounded, not clipped
        outside = (self.values < limits[0] - half) | (self.values > limits[1] + half)
        clipped = self.counts[outside].sum() / self.counts.sum()
        if clipped > MAX_CLIPPED:
            return f"{clipped:.1%} of them lie outside the range {written(limits)}"
        distinct, kept = len(self.values), len(np.unique(to_eight_bits(self.values, limits)))
        if kept < (MIN_LEVELS if distinct > MIN_LEVELS else distinct // 2 + 1):
            return f"the range {written(limits)} would leave {kept} grey levels of {distinct}"
        return None

    @property
    def extent(self) -> Extent:
        """Which ranges fit."""
        low, high = float(self.values[0]), float(self.values[-1])
        fitting = frozenset(limits for limits in CUSTOMARY if self.problem(limits) is None)
        own = next((r for r in ((low, high), self._middle()) if self._fits(r)), None)
        return Extent(low, high, fitting, own)

    def _fits(self, limits: ValueRange) -> bool:
        return limits[0] < limits[1] and self.problem(limits) is None

    def _middle(self) -> ValueRange:
        """The range without 0.05 % of the values at either end: a few pixels may be defective."""
        share = self.counts.cumsum() / self.counts.sum()
        first, last = np.searchsorted(share, (MAX_CLIPPED / 2, 1 - MAX_CLIPPED / 2))
        return float(self.values[first]), float(self.values[last])


def common_range(extents: Sequence[Extent]) -> ValueRange | None:
    """The range that fits all pictures: a customary one, or that of their values; None = none."""
    for limits in CUSTOMARY:
        if all(limits in extent.customary for extent in extents):
            return limits
    own = [extent.own for extent in extents if extent.own is not None]
    if len(own) < len(extents):
        return None
    low, high = min(low for low, _ in own), max(high for _, high in own)
    # A picture that spans this part of the range keeps `MIN_LEVELS`.
    narrowest = min(high - low for low, high in own)
    return (low, high) if narrowest * 255 >= MIN_LEVELS * (high - low) else None


def remedy(extents: Sequence[Extent]) -> str:
    """What to do with pictures that were not converted, given the extents of all deep pictures."""
    limits = common_range(extents)
    count = "" if len(extents) == 1 else f" of all {len(extents)} deep pictures"
    if limits is None:
        return f"no range fits the values{count}: save it as 8-bit RGB, or remove it"
    return (
        f"save it as 8-bit RGB, or pass --value_range {written(limits)}, which fits the values"
        f"{count}"
    )
