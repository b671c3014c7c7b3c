"""Signals that ask a command to end: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (a closed terminal).

Outside the loop of a training run, which saves first, a command ends at once with the status of an
interruption. SIGHUP stays ignored where it was ignored before, as it is under `nohup`.
"""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # unknown on Windows
TERMINATING: tuple[int, ...] = (signal.SIGTERM, *(() if HANGUP is None else (HANGUP,)))
OUTPUTS = (1, 2)  # file descriptors of stdout and stderr


@contextmanager
def handling(
    numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    """Context in which signals are handled by a function; only the main thread can set it."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        shown = [number for number in OUTPUTS if _is_terminal(number)]

        def handle(number: int, frame: FrameType | None) -> None:
            if number == HANGUP:
                _leave_terminal(shown)
            handler(number, frame)

        for number in numbers:
            if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def ending_the_command() -> Any:
    """Context in which SIGTERM and SIGHUP end a command as SIGINT does, by `KeyboardInterrupt`."""
    return handling(TERMINATING, _end)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _leave_terminal(shown: list[int]) -> None:
    """Discard what is printed from now on, where printing would fail: to a terminal that is gone,
    and to a pipe, whose reader (such as `tee`) was asked to end as well."""
    for descriptor in OUTPUTS:
        if _is_pipe(descriptor) or (descriptor in shown and not _is_terminal(descriptor)):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            os.close(null)
