"""Programs and jobs in forked children: as `python` and torchrun start them, without the seconds in
which every new interpreter imports torch.

Tests of the launchers themselves, and of what is imported when, start real processes.
"""

import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

SECONDS = 240  # that a job may take on a busy machine
GRACE = 5  # seconds that processes have to end by themselves after one has failed


def program(path: Path, *arguments: object) -> Callable[[], None]:
    """What `python PATH ARGUMENTS` does."""

    def work() -> None:
        sys.argv = [str(path), *map(str, arguments)]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    return work


def forked(work: Callable[[], object], processes: int = 0) -> subprocess.CompletedProcess[str]:
    """Let a child do some work, or as many `processes` as the ranks of one job on CPUs (gloo).

    Returns:
        What they printed, and the status: 0, or that of the first which failed. As under torchrun,
        a failure ends those that still run.

    Raises:
        TimeoutError: they took longer than `SECONDS`; all are killed.
    """
    with socket.socket() as free, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        children = []
        for rank in range(max(processes, 1)):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            place |= {
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            child = os.fork()
            if child == 0:
                _become(place if processes else {}, out, err)
                _end_with(work)
            children.append(child)
        status = _status(children)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([], status, out.read().decode(), err.read().decode())


def _become(variables: dict[str, object], out: IO[bytes], err: IO[bytes]) -> None:
    """Make this forked child what a new process is: its group, output, log and place in a job."""
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", 1, "utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, "utf-8", closefd=False)
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    torch.set_num_threads(1)
    if variables:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ |= {name: str(value) for name, value in variables.items()}
        os.environ["ACCELERATE_USE_CPU"] = "1"
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()


def _end_with(work: Callable[[], object]) -> None:
    """Do the work, then end this process as the interpreter would."""
    status = 0
    try:
        work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status(children: list[int]) -> int:
    """Wait for all; the status of the first that failed, or 0. What is left of their groups is
    killed."""
    running, failed = list(children), 0
    deadline = time.monotonic() + SECONDS
    try:
        while running:
            for child in list(running):
                ended, code = os.waitpid(child, os.WNOHANG)
                if ended:
                    running.remove(child)
                    if code and not failed:
                        failed = os.waitstatus_to_exitcode(code)
                        deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                if failed:
                    break
                raise TimeoutError(f"a job took longer than {SECONDS} s")
            time.sleep(0.01)
    finally:
        for child in children:
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended
        for child in running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return failed
