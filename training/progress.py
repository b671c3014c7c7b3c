"""Progress of long work: bars on a terminal and in a notebook, lines in a log.

A log in a file gets whole lines: one whenever values of a training run are logged, and one for long
work every `INTERVAL` seconds.
"""

import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, TextIO

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm  # `tqdm_asyncio`, except in a notebook

INTERVAL = 30.0  # seconds between two lines about long work
IN_WORDS = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} so far, {remaining} left"


def is_interactive() -> bool:
    """Whether bars can be redrawn: on a terminal and in a notebook."""
    return sys.stderr.isatty() or tqdm is not tqdm_asyncio


class _Lines:
    """A file for tqdm that ends each state of a bar with a line break."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(
    total: int, title: str, *, unit: str = "it", shown: bool = True, part: bool = False
) -> tqdm:
    """A bar on a terminal; in a log, a line every `INTERVAL` seconds.

    Args:
        unit: what is counted.
        shown: False on all processes but one.
        part: of other work that has its own bar or lines: it leaves nothing behind, and needs no
            lines unless it is long.
    """
    if is_interactive():
        return tqdm(total=total, desc=title, unit=unit, disable=not shown, leave=not part)
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        disable=not shown,
        file=_Lines(sys.stderr),
        bar_format=IN_WORDS,
        mininterval=INTERVAL,
        delay=INTERVAL if part else 0,
    )


class RunProgress:
    """The steps of a training run, with its loss, learning rate and speed.

    Args:
        title: the kind of run.
        start, total: steps that are done, and steps in all.
        shown: False on all processes but one.
    """

    def __init__(self, title: str, start: int, total: int, shown: bool) -> None:
        self.title, self.start, self.total, self.shown = title, start, total, shown
        self._bar: Any = None

    def steps(self) -> Iterator[int]:
        """The steps that are not done, counted from 0."""
        if not (self.shown and is_interactive()):
            yield from range(self.start, self.total)
            return
        with tqdm(total=self.total, initial=self.start, desc=self.title, unit="step") as self._bar:
            for step in range(self.start, self.total):
                yield step
                self._bar.update()
        self._bar = None

    def training(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Show the loss after a number of finished steps.

        Args:
            speed: a line of timing.jsonl; empty if nothing was measured.
        """
        loss, rate = values.get("loss"), values.get("learning_rate")
        parts = [f"loss {loss:.4g}"] if loss is not None else []
        parts += [f"learning rate {rate:.3g}"] if rate is not None else []
        parts += [f"{values['skipped_steps']:.0f} skipped"] if "skipped_steps" in values else []
        if speed:
            parts.append(f"{speed['images_per_second']:,.4g} images/s")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            return
        if speed:
            left = (self.total - step) * speed["seconds_per_step"]
            parts.append(f"{timedelta(seconds=round(left))} left")
        self._say(f"{self.title}: step {step} of {self.total}: {', '.join(parts)}")

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Show what was measured on held-out data after a number of finished steps."""
        parts = ", ".join(f"{name.removeprefix('val_')} {v:.4g}" for name, v in values.items())
        self._say(f"{self.title}: step {step} of {self.total}: validation: {parts}")

    def _say(self, line: str) -> None:
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
