"""What is watched beside the steps: that the launcher lives, and that the lock shows life.

A launcher that is killed leaves its processes behind as orphans. Those of torchrun and `accelerate
launch` notice it here: they finish their step, save, and end. One that cannot, because it waits
for a process that is gone, is ended after `GRACE` seconds; its last checkpoint is whole.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

# -------------------------------------------------------------------------------------------------
# SIGINT and SIGTERM ask a run to stop after the current step; a second one stops it at once.


class InterruptGuard:
    """Context in which `requested` turns true on the first signal instead of raising."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "InterruptGuard":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


# -------------------------------------------------------------------------------------------------
# What is watched beside the steps: that the launcher lives, and that the lock shows life.

# Set by torchrun and by `accelerate launch` for what they start. Without one of them the parent is
# a shell, which may well end before the run does.
LAUNCHED_BY = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")
EXIT_FAILURE = 1  # as of a command whose machine failed
INTERVAL = 1.0  # seconds between two looks
GRACE = 60.0  # seconds from the launcher's end to the process's


class Watch(threading.Thread):
    """Context with a thread that asks `guard` to stop when the launcher is gone.

    Args:
        beat: called at every look.
        parent: the process that launched this one, or None to watch none.
    """

    def __init__(self, guard: InterruptGuard, beat: Callable[[], None], parent: int | None) -> None:
        super().__init__(name="smalti-watch", daemon=True)
        self.guard, self.beat, self.parent = guard, beat, parent
        self._over = threading.Event()

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def run(self) -> None:
        """Look until the context ends."""
        while not self._over.wait(INTERVAL):
            self.beat()
            if self.parent is not None and os.getppid() != self.parent:
                self.guard.requested = True
                if not self._over.wait(GRACE):
                    end_at_once()
                return


def launcher() -> int | None:
    """The process that launched this one, if it was torchrun or `accelerate launch`."""
    return os.getppid() if any(name in os.environ for name in LAUNCHED_BY) else None


def end_at_once() -> None:
    """End this process though its main thread is stuck."""
    print(
        f"error: the launcher ended and the step did not finish within {GRACE:.0f} s: stopped"
        " without saving; the last checkpoint is whole",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_FAILURE)
