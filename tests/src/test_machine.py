"""Failures of the machine: one line, with what to do."""

import errno
import os
from pathlib import Path

import pytest

from smalti.cli import run_command
from smalti.machine import REMEDIES, failure_of


@pytest.mark.parametrize("number", sorted(REMEDIES))
def test_a_system_error_is_told_with_its_remedy(number: int) -> None:
    told = failure_of(OSError(number, os.strerror(number), "place"))
    assert told == f"{os.strerror(number)}: place: {REMEDIES[number]}"
    worker = (
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        f"last):\n  ...\nOSError: [Errno {number}] {os.strerror(number)}: 'x.png'\n"
    )
    assert failure_of(OSError(worker)) == (
        f"{os.strerror(number)}: in a loader worker: {REMEDIES[number]}"
    )


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (MemoryError(), "memory ran out", "--train_batch_size"),
        (MemoryError("Unable to allocate 9 TiB"), "9 TiB", "--train_batch_size"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                         "allocate memory: you tried to allocate 8000000000000 bytes."),
            "memory ran out", "--gradient_accumulation_steps",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."), "2 GiB", "--batch_size"),
        (
            RuntimeError("unable to write to file </torch_77_1_0>: No space left on device (28)"),
            "shared memory (/dev/shm)", "--dataloader_num_workers 0",
        ),
        (
            RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:"
                         "\n...\nRuntimeError: unable to open shared memory object </torch_1> in "
                         "read-write mode: Read-only file system (30)"),
            "shared memory (/dev/shm)", "--dataloader_num_workers 0",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible "
                         "that dataloader's workers are out of shared memory."),
            "shared memory (/dev/shm)", "docker run --shm-size 8g",
        ),
        (RuntimeError("received 0 items of ancdata"), "too many open files", "ulimit -n 65536"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "pid 7", "lower --dataloader_num_workers",
        ),
    ],
)  # fmt: skip
def test_what_torch_reports_is_told_in_one_line(
    error: Exception, what: str, remedy: str, capsys
) -> None:
    def command(argv):
        raise error

    assert run_command(command, []) == 1
    told = capsys.readouterr().err
    assert what in told and remedy in told and len(told.splitlines()) == 1


def test_a_defect_is_not_taken_for_a_failure() -> None:
    assert failure_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert failure_of(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert failure_of(OSError("no number")) is None


def test_too_many_open_files_and_links_in_a_circle_are_one_line(tmp_path: Path, capsys) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert run_command(lambda _: (tmp_path / "a").read_bytes() and 0, []) == 1
    assert "a link leads back to itself" in capsys.readouterr().err
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = []

    def many(argv) -> None:
        while True:
            files.append((tmp_path / f"{len(files)}.txt").open("w"))

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert run_command(many, []) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()
    assert "raise the limit with ulimit -n 65536" in capsys.readouterr().err
