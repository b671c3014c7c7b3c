"""Requests to stop a run: a signal, or the end of the process that launched it.

The first SIGINT or SIGTERM, and any SIGHUP, lets the current step finish and be saved; work that
does not change the state of the run, such as a validation, is abandoned at once. The second SIGINT
or SIGTERM stops at once. (A closed terminal may send SIGHUP twice: it never counts as the second.)
A launcher that is killed leaves its processes behind. Those of torchrun and `accelerate launch`
notice it here: they finish their step, save and end. One that cannot, because it waits for a
process that no longer exists, is ended after `GRACE` seconds; its last checkpoint is complete.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType

from smalti.errors import EXIT_FAILURE
from smalti.signals import HANGUP, TERMINATING, handling

# Set by torchrun and by `accelerate launch` for the processes that they start. Without one of them
# the parent is a shell, which may end before the run does.
LAUNCHED_BY = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")
INTERVAL = 1.0  # seconds between two checks of the launcher
SAID = b"\nstopping after this step, then saving; a second signal stops at once\n"
GRACE = 60.0  # seconds from the launcher's end to the process's


class Abandoned(BaseException):
    """A stop was requested during work that may be abandoned."""


class InterruptGuard:
    """Context in which the first signal sets `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self._counted = False  # whether a SIGINT or SIGTERM was received
        self._from_thread = False
        self._abandoning = False
        self._handlers: AbstractContextManager[None] | None = None

    def __enter__(self) -> "InterruptGuard":
        self._handlers = handling((signal.SIGINT, *TERMINATING), self._handle)
        self._handlers.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._handlers is not None
        self._handlers.__exit__(kind, error, trace)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Context of work that a request to stop ends at once.

        Raises:
            Abandoned: a stop is, or was, requested.
        """
        self._abandoning = True
        try:
            if self.requested:
                raise Abandoned
            yield
        finally:
            self._abandoning = False

    def request(self) -> None:
        """Ask the run to stop, from another thread."""
        self.requested = True
        if self._abandoning:
            self._from_thread = True
            _thread.interrupt_main(signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._from_thread:
            self._from_thread = False
        elif number != HANGUP:
            if self._counted:
                raise KeyboardInterrupt
            self._counted = True
        if not self.requested and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # not print: it may be what the signal interrupts
                os.write(2, SAID)
        self.requested = True
        if self._abandoning:
            self._abandoning = False
            raise Abandoned


class LauncherWatch(threading.Thread):
    """Context with a thread that asks `guard` to stop the run when the launcher has ended.

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
                self.guard.request()
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
