"""Timing on any device: passes in turns in one process, and the table of their ratios."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(device: torch.device, rounds: int, *passes: Callable[[], object]) -> list[list[float]]:
    """Seconds of each pass in every round, in turns, so that other load on the machine affects all
    of them; the first round warms up and is not counted."""
    seconds: list[list[float]] = [[] for _ in passes]
    for round_ in range(rounds + 1):
        for taken, call in zip(seconds, passes, strict=True):
            start = now(device)
            call()
            if round_:
                taken.append(now(device) - start)
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass(frozen=True)
class Row:
    """Seconds of smalti and of what it is compared with, a peer or a limit, in the same rounds."""

    what: str
    beside: str
    theirs: Sequence[float]
    ours: Sequence[float]

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Their time over ours: lower quartile, median and upper quartile over the rounds. Of a
        peer, above 1 smalti is faster; of a limit, it is the share that is reached."""
        return quartiles([a / b for a, b in zip(self.theirs, self.ours, strict=True)])

    @property
    def line(self) -> str:
        """The row in Markdown, under `HEADER`."""
        low, middle, high = self.ratios
        milliseconds = 1000 * statistics.median(self.ours)
        return (
            f"| {self.what} | {self.beside} | {middle:.2f} | {low:.2f} to {high:.2f} | "
            f"{milliseconds:,.1f} |"
        )


HEADER = (
    "| what | beside | theirs / ours | quartiles | smalti, ms |\n| --- | --- | --- | --- | --- |"
)


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    return "\n".join([HEADER, *(row.line for row in rows)])
