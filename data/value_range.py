"""Pictures with more than 8 bits per channel -> 8 bits, by the range of values they were made for.

A file tells how many bits a value has, but not which values are black and white: a 12-bit camera
stores 0 to 4095 in 16 bits, microscopes and simulations store any numbers. A range is therefore
given, measured over the set at two percentiles, or assumed to be that of the file's type, and then
refused where the picture contradicts it.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from smalti.errors import ConfigurationError, DataError

ValueRange = tuple[float, float]  # the stored values that become black (0) and white (255)
# The option of the commands: stored values, or percentiles such as "0.5%". When these have been
# measured, they are "0.5%=112", so that the next command need not measure them again.
Limit = float | str
RangeOption = tuple[Limit, Limit]

# Grey levels that a picture with more distinct values must keep; one with fewer keeps over half.
MIN_LEVELS = 64
MAX_CLIPPED = 0.001  # of the values of a picture may lie outside the range

# Common ranges, the narrowest first: floats, signed floats, and 8, 10, 12, 14 and 16 bits.
CUSTOMARY: tuple[ValueRange, ...] = (
    (0, 1),
    (-1, 1),
    *((0, 2**bits - 1) for bits in (8, 10, 12, 14, 16)),
)


class MeasuredRange(tuple[float, float]):
    """A range at two percentiles of a set: values beyond it are clipped, as was asked."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MeasuredRange) and tuple.__eq__(self, other)

    def __hash__(self) -> int:
        return hash((MeasuredRange, *self))


PERCENTILE = re.compile(r"(\d+(?:\.\d+)?)%(?:=(-?\d+(?:\.\d+)?))?")


def _percentile(limit: Limit) -> tuple[float, float | None] | None:
    """The percentile that a limit names, and its value if it was measured; None: it names none."""
    found = PERCENTILE.fullmatch(limit) if isinstance(limit, str) else None
    if found is None:
        return None
    return float(found[1]), None if found[2] is None else float(found[2])


def check_range(value_range: RangeOption | None) -> None:
    """Raise `ConfigurationError` unless a range consists of two numbers, or two percentiles, of
    which the first is below the second."""
    if value_range is None:
        return
    percentiles = [_percentile(limit) for limit in value_range]
    low, high = percentiles
    shown = " ".join(map(str, value_range))
    if low is None and high is None and not any(isinstance(limit, str) for limit in value_range):
        if not value_range[0] < value_range[1]:  # type: ignore[operator]
            raise ConfigurationError(
                f"value_range is {written(value_range)}; give the value that is black, then the "  # type: ignore[arg-type]
                "larger one that is white"
            )
    elif low is None or high is None or (low[1] is None) != (high[1] is None):
        raise ConfigurationError(
            f"value_range is {shown}; give two numbers, or two percentiles such as 0.5% 99.5%"
        )
    elif not low[0] < high[0] <= 100:
        raise ConfigurationError(
            f"value_range is {shown}; give the percentile that is black, then the larger one, at "
            "most 100%, that is white"
        )
    elif low[1] is not None and high[1] is not None and not low[1] < high[1]:
        raise ConfigurationError(
            f"value_range is {shown}; the value that is black must be below the one that is white"
        )


def limits_of(value_range: RangeOption | None) -> ValueRange | None:
    """The values of a range that was checked.

    Raises:
        ConfigurationError: it has percentiles that were not measured.
    """
    if value_range is None:
        return None
    low, high = (_percentile(limit) for limit in value_range)
    if low is None or high is None:
        return value_range  # type: ignore[return-value]
    if low[1] is None or high[1] is None:
        raise ConfigurationError(
            f"value_range is {value_range[0]} {value_range[1]}, which one picture cannot tell: "
            "give the two values"
        )
    return MeasuredRange((low[1], high[1]))


def needs_measuring(value_range: RangeOption | None) -> bool:
    """Whether a range has percentiles that were not measured."""
    return value_range is not None and any(
        (found := _percentile(limit)) is not None and found[1] is None for limit in value_range
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
    distinct: int = 0  # how many values occur in the picture
    kept: int = 0  # how many grey levels a measured range leaves of them; 0: there is none


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
        """What the conversion by a range would lose, or None if the range fits. A measured one
        always does: it clips what it was asked to, and few grey levels are counted and named."""
        if isinstance(limits, MeasuredRange):
            return None
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

    def extent_within(self, limits: ValueRange) -> Extent:
        """Which ranges fit, and, for a measured range, how many grey levels it leaves."""
        if not isinstance(limits, MeasuredRange):
            return self.extent
        kept = len(np.unique(to_eight_bits(self.values, limits)))
        return replace(self.extent, distinct=len(self.values), kept=kept)

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


# -- Percentiles of a set -------------------------------------------------------------------------

SMALL = 2**16  # integers from 0 to this are counted exactly
BITS = 20  # of other values as float32: they are counted to within 0.05 %


class ValueCounts:
    """How often each stored value occurs in the deep pictures of a set, in 9 MiB; safe in threads.

    The values of 16-bit pictures are counted exactly. Others are counted by sign, exponent and 11
    bits of their mantissa, so that their percentiles are within 0.05 % of the value.
    """

    def __init__(self) -> None:
        self.pictures = 0
        self._small = np.zeros(SMALL, np.int64)
        self._others = np.zeros(2**BITS, np.int64)
        self._lock = threading.Lock()

    def add(self, values: np.ndarray) -> None:
        """Count the values, of any shape, of one picture."""
        if values.dtype == np.uint16:
            counts = np.bincount(values.ravel(), minlength=SMALL)
            with self._lock:
                self._small += counts
                self.pictures += 1
            return
        bits = values.astype(np.float32).ravel().view(np.uint32)
        # As in a radix sort of floats: the order of these integers is that of the values.
        ordered = bits ^ np.where(bits >> 31, np.uint32(2**32 - 1), np.uint32(2**31))
        bins, counts = np.unique(ordered >> np.uint32(32 - BITS), return_counts=True)
        with self._lock:
            self._others[bins] += counts
            self.pictures += 1

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """The values that occur, ascending, and their counts."""
        small, bins = self._small.nonzero()[0], self._others.nonzero()[0]
        # The value of a bin that is nearest to 0, which has the fewest digits.
        ordered = bins.astype(np.uint32) << np.uint32(32 - BITS)
        ordered |= np.where(ordered >> 31, np.uint32(0), np.uint32(2 ** (32 - BITS) - 1))
        bits = ordered ^ np.where(ordered >> 31, np.uint32(2**31), np.uint32(2**32 - 1))
        values = np.concatenate([small, bits.view(np.float32).astype(np.float64)])
        counts = np.concatenate([self._small[small], self._others[bins]])
        order = values.argsort(kind="stable")
        return values[order], counts[order]

    def measured(self, value_range: RangeOption) -> tuple[RangeOption, str, int]:
        """The percentiles with their values, "0.5%=112", a remark on what they clip and keep, and
        the number of grey levels that they leave.

        Raises:
            DataError: there are no deep pictures, or both percentiles are the same value.
        """
        shown = " ".join(map(str, value_range))
        if not self.pictures:
            raise DataError(
                f"value_range is {shown}, but no picture has more than 8 bits per channel: leave "
                "it out"
            )
        values, counts = self._sorted()
        rank, total = counts.cumsum(), counts.sum()
        low, high = (
            float(values[np.searchsorted(rank, float(str(limit).rstrip("%")) / 100 * total)])
            for limit in value_range
        )
        if not low < high:
            raise DataError(
                f"value_range is {shown}, and both are the value {low:.9g}: choose percentiles "
                "further apart, or give two values"
            )
        numbers = written((low, high)).split()
        exact = float(numbers[0]), float(numbers[1])
        clipped = counts[(values < exact[0]) | (values > exact[1])].sum() / total
        levels = len(np.unique(to_eight_bits(values, exact)))
        found = f"{value_range[0]}={numbers[0]}", f"{value_range[1]}={numbers[1]}"
        remark = (
            f"value_range {shown} of {self.pictures} deep pictures: {numbers[0]} is black and "
            f"{numbers[1]} white; {clipped:.2%} of the values are clipped, and {levels} grey "
            f"levels remain of {len(values)} values"
        )
        return found, remark, levels
