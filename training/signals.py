"""Requests to stop a run: a signal, or the end of the process that launched it.

The first SIGINT or SIGTERM lets the current step finish and be saved; the second one stops at once.
A launcher that is killed leaves its processes behind. Those of torchrun and `accelerate launch`
notice it here: they finish their step, save and end. One that cannot, because it waits for a
process that no longer exists, is ended after `GRACE` seconds; its last checkpoint is complete.
"""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

# Set by torchrun and by `accelerate launch` for the processes that they start. Without one of them
# the parent is a shell, which may end before the run does.
LAUNCHED_BY = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")
EXIT_FAILURE = 1  # a machine error, the same status as for a full disk
INTERVAL = 1.0  # seconds between two checks of the launcher
GRACE = 60.0  # seconds from the launcher's end to the process's


class InterruptGuard:
    """Context in which the first SIGINT or SIGTERM sets `requested` instead of raising."""

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


class LauncherWatch(threading.Thread):
    """Context with a thread that sets `guard.requested` when the launcher has ended.

    Args:
        parent: process number of the launcher; None watches none.
    """

    def __init__(self, guard: InterruptGuard, parent: int | None) -> None:
        super().__init__(name="smalti-launcher-watch", daemon=True)
        self.guard, self.parent = guard, parent
        self._over = threading.Event()

    def __enter__(self) -> "LauncherWatch":
        if self.parent is not None:
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
        """Check every `INTERVAL` seconds until the context ends."""
        while not self._over.wait(INTERVAL):
            if os.getppid() != self.parent:
                self.guard.requested = True
                if not self._over.wait(GRACE):
                    end_at_once()
                return


def launcher() -> int | None:
    """Process number of torchrun or `accelerate launch`, if one of them started this process."""
    return os.getppid() if any(name in os.environ for name in LAUNCHED_BY) else None


def end_at_once() -> None:
    """End this process, although its main thread is blocked, without saving."""
    print(
        f"error: the launcher ended and the step did not finish within {GRACE:.0f} s: stopped"
        " without saving; the last checkpoint is complete, continue with --resume_from_checkpoint"
        " latest",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_FAILURE)
