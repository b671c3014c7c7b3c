"""The share of a run's time that validation and previews may take.

Whether they are made depends on the time that they take; what they show does not, nor does anything
that is trained. The first ones and those after the last step are always made.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

FREE_SECONDS = 60.0  # they may take this much time in any case


class Budget:
    """Seconds spent on validation and previews, compared with the time of the rest.

    Args:
        share: seconds that they may take for each second of training.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.spent = 0.0  # seconds, by this process
        self.last = 0.0  # seconds of the last time
        self._start = time.monotonic()

    @property
    def training(self) -> float:
        """Seconds since the start that were not spent on validation and previews."""
        return time.monotonic() - self._start - self.spent

    def allows(self) -> bool:
        """Whether the next ones are within the budget, if they take as long as the last ones."""
        return self.spent + self.last <= FREE_SECONDS + self.share * self.training

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Context of validation and previews: measures their time."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.last = time.monotonic() - start
            self.spent += self.last
