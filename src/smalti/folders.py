"""Folders of results: one process writes at a time, and a result is complete or not there.

    replacing_folder(target)    a result that is made in one go (a model, a conversion, an export):
    replacing_file(target)      written beside its place and swapped in whole
    FolderLock(folder)          a job that fills its folder over hours (a run, a cache, pictures)
                                works in place; it continues where it stopped

Both clear what killed processes left: names that begin with `.tmp-`, or `.old-`.
"""

import ctypes
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from smalti.errors import BusyError, ConfigurationError
from smalti.files import UNFINISHED, flush, replacing, unfinished

if TYPE_CHECKING:
    from filelock import OwnerRecord

UNREPORTED = ".tmp-unreported"  # in a folder that was swapped in by a process that did not end yet
SET_ASIDE = ".old-"  # what is being replaced, on systems that cannot exchange two folders at once


def remove_leftovers(folder: Path) -> None:
    """Remove the files and folders in `folder` that a killed process had not finished.

    The caller holds the lock of the folder.
    """
    for leftover in folder.iterdir():
        name, _, _ = leftover.name.removeprefix(UNFINISHED).rpartition("-")
        being_written = (folder / f".{name}{LOCK}").exists()  # by a process with a lock of its own
        if leftover.name.startswith(UNFINISHED) and not being_written:
            _remove(leftover)


def contents(folder: Path) -> list[str]:
    """The names in a folder, without hidden ones; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# The lock: one process in a folder at a time.

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds between two touches of the lock by its holder
BEGINNING = 10.0  # seconds after which a lock that names no holder was left by a killed process
LAPSE = 120.0  # seconds without a touch after which a holder elsewhere is taken to have ended


class FolderLock:
    """The lock of one folder; `acquire` before writing there and `release` when done, or `with`.

    A file of filelock that names its holder, on any file system that all machines share. On the
    holder's machine it is stale as soon as the process has ended. On another machine only the age
    of the file is known, and the holder touches it every few seconds. A thread that holds the lock
    may take it again.

    Args:
        beside: the lock is beside the folder, not in it, because the folder will be swapped.
    """

    def __init__(self, folder: Path, *, beside: bool = False) -> None:
        from filelock import SoftFileLease

        self.folder = folder
        self.path = folder.with_name(f".{folder.name}{LOCK}") if beside else folder / LOCK
        # One lease for each path: a later run in the same process takes over an earlier run's.
        self._lease = SoftFileLease(
            self.path, lease_duration=LAPSE, heartbeat_interval=HEARTBEAT, is_singleton=True
        )

    def acquire(self) -> None:
        """Acquire the lock; if its holder has ended, take it over.

        Raises:
            BusyError: another process is writing into the folder; the message names it.
        """
        from filelock import Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._has_lapsed():
                self._lease.force_break()
            self._lease.acquire(blocking=False)
        except Timeout as error:
            owner = self._lease.owner
            process = f"process {owner.pid} on {_host(owner)}" if owner else "an unknown process"
            raise BusyError(
                f"another run is active in {self.folder} ({process}): wait for it, or choose "
                f"another folder; if it is over, remove {self.path}"
            ) from error

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lease.release(force=True)

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.release()  # it stays held where this thread held it before the `with`

    def holder(self) -> tuple[int, str] | None:
        """Process number and host of the holder; None if the lock is free or its holder has
        ended."""
        owner = self._lease.owner
        if owner is None or self._has_lapsed():
            return None
        if owner.hostname == _this_machine() and not _is_running(owner.pid):
            return None
        return owner.pid, _host(owner)

    def _has_lapsed(self) -> bool:
        """Whether the holder on another machine, or an unknown one, has not touched the lock."""
        try:
            age = time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return False
        owner = self._lease.owner
        if owner is None:  # being written, or its process was killed then
            return age > BEGINNING
        return age > LAPSE and owner.hostname != _this_machine()


def _this_machine() -> str:
    """The name of this machine, and of the container on it, as filelock records it."""
    from tempfile import TemporaryDirectory

    from filelock import SoftFileLease

    with TemporaryDirectory() as folder, SoftFileLease(Path(folder) / LOCK) as lease:
        assert lease.owner is not None, "a held lease has an owner"
        return lease.owner.hostname


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, but belongs to another user
        return True
    return True


def _host(owner: "OwnerRecord") -> str:
    """The name of an owner's machine, without what filelock adds for containers."""
    return owner.hostname.partition("?")[0]


@contextmanager
def locked(folder: Path, *, deep: bool = False) -> Iterator[None]:
    """Hold the lock of a folder that is filled in place, and clear what killed processes left.

    Args:
        deep: also in its sub-folders.

    Raises:
        BusyError: another process is writing into the folder.
    """
    is_new = not folder.exists()
    try:
        with FolderLock(folder):
            remove_leftovers(folder)
            for inside in folder.iterdir() if deep else ():
                if inside.is_dir() and not (inside / LOCK).exists():
                    remove_leftovers(inside)
            yield
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # nothing was written


# -------------------------------------------------------------------------------------------------
# A result that is swapped in whole.


_being_written: set[Path] = set()  # the new folders of this process


@contextmanager
def replacing_folder(
    target: Path,
    *,
    products: Collection[str] = (),
    check: Callable[[], object] = lambda: None,
    retry: bool = False,
) -> Iterator[Path]:
    """Yield a new folder beside `target`, which replaces `target` at the end in one operation.

    A process that ends at any moment leaves the old `target` or the new one. If the block
    raises, `target` stays as it was. A lock beside `target` is held all the time.

    Args:
        products: names in `target` that are replaced, or removed if the new folder lacks them.
            Everything with another name, such as notes or .git, is kept.
        check: called before the block and again before the swap, under the lock; raises if
            `target` must not be replaced.
        retry: do not check a result that a killed process swapped in and could not report: the
            same command, repeated, replaces it.

    Raises:
        BusyError: another process is writing `target`.
        ConfigurationError: `target` cannot be swapped, or is a file.
    """
    target = swappable(target)
    if any(target.is_relative_to(folder) for folder in _being_written):
        check()  # a part of a result that this process is writing: the whole will be swapped in
        target.mkdir(exist_ok=True)
        yield target
        return
    with claimed(target, check, retry=retry) as unreported:
        if target.exists() and not target.is_dir():
            raise ConfigurationError(f"{target} is a file: choose a folder")
        new = unfinished(target)
        try:
            new.mkdir()
            _being_written.add(new)
            yield new
            if not unreported:
                check()
            _flush_tree(new)
            if target.is_dir():
                shutil.copymode(target, new)
                _keep_others(target, new, products)
            (new / UNREPORTED).touch()
            flush(new)
            _swap(new, target)
            flush(target.parent)
        finally:
            _being_written.discard(new)
            shutil.rmtree(new, ignore_errors=True)
    (target / UNREPORTED).unlink(missing_ok=True)  # last, so that a kill before it is known


@contextmanager
def replacing_file(
    target: Path, *, check: Callable[[], object] = lambda: None, retry: bool = False
) -> Iterator[Path]:
    """Like `replacing_folder`, for a single file that is named by the user."""
    link = unfinished(target)
    try:
        with claimed(target, check, retry=retry), replacing(target) as new:
            yield new
            with suppress(OSError):  # a file system without links
                os.link(new, link)  # the same file as `target` until it is reported
    finally:
        link.unlink(missing_ok=True)


@contextmanager
def claimed(
    target: Path, check: Callable[[], object] = lambda: None, *, retry: bool = False
) -> Iterator[bool]:
    """Hold the lock beside a new file or folder, and clear what killed processes left of it.

    Args:
        check: called under the lock; raises if `target` must not be written.
        retry: see `replacing_folder`.

    Yields:
        Whether `target` is a result that was not reported, and so was not checked.

    Raises:
        BusyError: another process is writing `target`.
    """
    with FolderLock(Path(os.path.abspath(target)), beside=True):
        unreported = retry and is_unreported(target)
        _clear_attempts(target)
        if not unreported:
            check()
        yield unreported


def swappable(target: Path) -> Path:
    """The absolute path of a folder that may be swapped for another one.

    Raises:
        ConfigurationError: it is a mount point, or contains the current folder.
    """
    place = Path(os.path.realpath(target))
    if os.path.ismount(place) or Path(os.path.realpath(".")).is_relative_to(place):
        raise ConfigurationError(
            f"{target} is a mount point or contains the current folder, and a result replaces its "
            "folder as a whole: choose a new folder in it"
        )
    return place


def _attempts(target: Path) -> list[Path]:
    """What processes left beside `target` that were killed while they replaced it."""
    name = re.compile(rf"({UNFINISHED}|{SET_ASIDE}){re.escape(target.name)}-[0-9a-f]+")
    return sorted(path for path in target.parent.iterdir() if name.fullmatch(path.name))


def _clear_attempts(target: Path) -> None:
    """Remove the attempts; a folder that was set aside is put back if nothing took its place."""
    for path in _attempts(target):
        if path.name.startswith(SET_ASIDE) and not target.exists():
            os.rename(path, target)
        else:
            _remove(path)


def is_unreported(target: Path) -> bool:
    """Whether a process was killed between the swap and the end of its work on `target`."""
    if target.is_dir():
        return (target / UNREPORTED).exists()
    links = [path for path in _attempts(target) if path.is_file()]
    return target.is_file() and any(path.samefile(target) for path in links)


def _keep_others(old: Path, new: Path, products: Collection[str]) -> None:
    """Link, or copy, into `new` what `old` has besides the products and what `new` has itself."""
    for path in old.iterdir():
        place = new / path.name
        if path.name in products or path.name.startswith((UNFINISHED, SET_ASIDE)):
            continue
        if path.is_dir() and not path.is_symlink():
            if place.is_dir() or not place.exists():
                place.mkdir(exist_ok=True)
                _keep_others(path, place, ())
        elif not os.path.lexists(place):
            try:
                os.link(path, place, follow_symlinks=False)
            except (OSError, NotImplementedError):  # a file system without links
                shutil.copy2(path, place, follow_symlinks=False)


def _flush_tree(folder: Path) -> None:
    """fsync every file and folder below a folder."""
    for root, _, files in os.walk(folder):
        for name in files:
            flush(Path(root) / name)
        flush(Path(root))


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; what was replaced is then at `new`, or removed.

    Where the system cannot exchange two names at once, `target` is set aside for a moment;
    `_clear_attempts` puts it back if the process ends then.
    """
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        aside = target.with_name(f"{SET_ASIDE}{target.name}-{uuid.uuid4().hex[:8]}")
        os.rename(target, aside)
        os.rename(new, target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange the names of two folders in one system call; False where there is none for it."""
    exchange, here = 2, -100  # RENAME_EXCHANGE or RENAME_SWAP; AT_FDCWD of Linux
    names = os.fsencode(one), os.fsencode(two)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return library.renamex_np(*names, exchange) == 0
        return library.renameat2(here, names[0], here, names[1], exchange) == 0
    except (OSError, TypeError, AttributeError):  # Windows, or another C library
        return False
