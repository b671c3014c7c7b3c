"""Failures of the machine, not of the input: each is reported in one line, with what to do.

Any other error keeps its traceback, because it is a defect of smalti.
"""

import errno
import os
import re

LIMIT = "raise the limit with ulimit -n 65536, or lower --dataloader_num_workers"
MEMORY = (
    "use a smaller batch (--train_batch_size or --batch_size), or raise "
    "--gradient_accumulation_steps, which divides the batch of a training step"
)
SHARED_MEMORY = (
    "use --dataloader_num_workers 0, or make it larger (docker run --shm-size 8g), and continue a "
    "run with --resume_from_checkpoint latest"
)
WORKERS = "lower --dataloader_num_workers, and continue a run with --resume_from_checkpoint latest"

REMEDIES = {
    getattr(errno, name): remedy
    for name, remedy in (
        ("ENOSPC", "free some space, or choose another disk"),
        ("EDQUOT", "free some space, or choose another disk"),
        ("EACCES", "check the permissions, or choose another path"),
        ("EPERM", "check the permissions, or choose another path"),
        ("ENOENT", "check the path"),
        ("EROFS", "choose a path that can be written"),
        ("ENAMETOOLONG", "choose a shorter name"),
        ("EEXIST", "a file exists where a folder is expected: choose another path"),
        ("ENOTDIR", "a file exists where a folder is expected: choose another path"),
        ("EISDIR", "a folder exists where a file is expected: choose another path"),
        ("ELOOP", "a link leads back to itself: remove it, or choose another path"),
        ("EFBIG", "raise the limit with ulimit -f unlimited, or choose another disk"),
        ("EMFILE", LIMIT),
        ("ENFILE", "close other programs, or lower --dataloader_num_workers"),
        ("ENOMEM", MEMORY),
        ("EIO", "check the disk, or choose another one"),
        ("ESTALE", "the network drive was remounted: start the command again"),
    )
    if hasattr(errno, name)  # EDQUOT is unknown on Windows
}

# torch reports most failures as a RuntimeError: what its message contains -> what has failed, and
# what to do. The first that fits.
OF_TORCH = (
    (r"shared memory|</torch_|Bus error", "shared memory (/dev/shm) is full or cannot be written",
     SHARED_MEMORY),
    (r"ancdata|Too many open files", "too many open files", LIMIT),
    (r"^DataLoader worker.* was stopped", "", "do not stop single processes of a run (SIGSTOP); "
     "continue it with --resume_from_checkpoint latest"),
    (r"^DataLoader worker", "", f"perhaps memory ran out; {WORKERS}"),
    (r"out of memory|can't allocate memory", "memory ran out", MEMORY),
)  # fmt: skip


def first_cause(text: str) -> str:
    """The message of an error; torch puts the traceback of a loader worker before it."""
    if text.startswith("Caught "):
        return text.rstrip().splitlines()[-1].partition(": ")[2]
    return text


def failure_of(error: Exception) -> str | None:
    """What has failed and what to do, if an error is a failure of the machine; else None."""
    text = first_cause(str(error))
    if isinstance(error, OSError):
        number = error.errno or _number_in(text)
        if number not in REMEDIES:
            return None
        place = error.filename or ("while writing" if error.errno else "in a loader worker")
        return f"{error.strerror or os.strerror(number)}: {place}: {REMEDIES[number]}"
    if isinstance(error, MemoryError):
        return f"memory ran out{f' ({text})' if text else ''}: {MEMORY}"
    text = " ".join(text.split())
    for pattern, what, remedy in OF_TORCH:
        if re.search(pattern, text):
            shown = text if len(text) <= 200 else f"{text[:200]}..."
            return f"{what} ({shown}): {remedy}" if what else f"{shown}: {remedy}"
    return None


def _number_in(text: str) -> int:
    """The number of a system error in a message, "[Errno 24] Too many open files"; 0 if none."""
    found = re.search(r"\[Errno (\d+)\]", text)
    return int(found[1]) if found else 0
