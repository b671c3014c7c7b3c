"""One run in a folder at a time: a lock that tells who holds it, and outlives no run for long.

    .lock   {"pid": 4711, "host": "node1", "machine": "node1 <boot> <namespace>", "started": 8823}

On the same machine the lock is stale as soon as its process is gone. Of another machine all that
can be seen is the file's age: the holder touches it every few seconds.
"""

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from smalti.errors import SmaltiError

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds between two touches
LAPSE = 120.0  # seconds without one after which the holder on another machine counts as gone


class RunLock:
    """The lock of one folder; `acquire` before writing there, `release` when done."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._own = _identity()
        self._held = False
        self._beaten = 0.0

    def acquire(self) -> None:
        """Take the lock; that of a process that is gone is taken over.

        Raises:
            SmaltiError: another run is active in the folder; the message says where.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            holder = self._read()
            if holder == self._own:  # a run before this one, in the same process
                break
            if self._is_alive(holder):
                raise SmaltiError(
                    f"another run is active in {self.path.parent} (process "
                    f"{holder.get('pid', 'unknown')} on {holder.get('host', 'unknown')}): wait for "
                    f"it, or choose another --output_dir; if it is over, remove {self.path}"
                )
            self._discard(holder)
        self._held = True

    def beat(self) -> None:
        """Show other machines that the holder is alive."""
        now = time.monotonic()
        if self._held and now - self._beaten > HEARTBEAT:
            self._beaten = now
            try:
                os.utime(self.path)
            except OSError:  # removed by hand, or the disk is away: no reason to stop
                return

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._held and self._read() == self._own:
            self.path.unlink(missing_ok=True)
        self._held = False

    def holder(self) -> dict[str, Any] | None:
        """Who holds the lock; None if nobody does, or a process that is gone."""
        holder = self._read()
        return holder if "pid" in holder and self._is_alive(holder) else None

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(self._own, stream)
        return True

    def _read(self) -> dict[str, Any]:
        """What the lock says of its holder; empty while it is being written or if it is damaged."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        here = os.name == "posix" and holder.get("machine") == self._own["machine"]
        if here and isinstance(holder.get("pid"), int):
            return _started(holder["pid"]) == holder.get("started") and _exists(holder["pid"])
        try:
            return time.time() - self.path.stat().st_mtime < LAPSE
        except FileNotFoundError:  # released meanwhile
            return False

    def _discard(self, holder: dict[str, Any]) -> None:
        """Remove the lock of a process that is gone, unless a third one was quicker."""
        aside = self.path.with_name(f"{LOCK}-{uuid.uuid4().hex[:8]}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        taken = RunLock(self.path.parent)
        taken.path = aside
        if taken._read() == holder or self.path.exists():
            aside.unlink()
        else:
            os.rename(aside, self.path)


def _identity() -> dict[str, Any]:
    host = socket.gethostname()
    # Process numbers mean something only within a boot and a namespace (a container).
    parts = [host, _first_line("/proc/sys/kernel/random/boot_id")]
    try:
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        parts.append("")
    pid = os.getpid()
    return {"pid": pid, "host": host, "machine": " ".join(parts), "started": _started(pid)}


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty where that is not told.

    A number that was given to another process since then is so told from the first.
    """
    fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours to signal, but there
        return True
    return True


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
