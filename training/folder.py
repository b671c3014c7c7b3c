"""The folder of a run: who may write there, what to resume, and what must not be overwritten.

    config.yaml        the resolved config, valid as --config
    metrics.jsonl      losses and other metrics
    timing.jsonl       seconds per step, images per second
    report.html        both, with the images, as a page
    checkpoint-000300/ see checkpoint.py
    exported.json      where the finished model was saved, and its hashes
    .lock              the process that is writing here

A run writes nothing into its folder before its first step is done, so a run that fails earlier does
not block the next one. Hidden files (names that begin with a dot) are ignored.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import OwnerRecord, SoftFileLease, Timeout

from smalti.config import read_recipe, without_words
from smalti.errors import CheckpointError, SmaltiError
from smalti.files import read_json, sha256_of, write_json
from smalti.training.checkpoint import (
    STATE,
    Checkpoint,
    checkpoints,
    newest_valid,
    step_of,
    verify,
)
from smalti.training.config import FREE_TO_CHANGE, GUARDED_PATHS

logger = logging.getLogger(__name__)

RECIPE = "config.yaml"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
REPORT = "report.html"
EXPORTED = "exported.json"

# All that a run may leave before its first checkpoint, with its images and the trackers' files.
BEFORE_A_CHECKPOINT = {RECIPE, METRICS, TIMING, REPORT, "reconstructions", "samples", "smalti"}


# -------------------------------------------------------------------------------------------------
# The lock: one run in a folder at a time.

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds between two touches of the lock by its holder
LAPSE = 120.0  # seconds without a touch after which a holder on another machine has lapsed


def _this_machine() -> str:
    """The name of this machine, and of the container on it, as filelock records it."""
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


class RunLock:
    """The lock of one folder; `acquire` before writing there, `release` when done.

    A file of filelock that names its holder, on any file system that all machines share. On the
    holder's machine it is stale as soon as the process has ended. On another machine only the age
    of the file is known, and the holder touches it every few seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        # One lease for each path: a later run in the same process takes over an earlier run's.
        self._lease = SoftFileLease(
            self.path, lease_duration=LAPSE, heartbeat_interval=HEARTBEAT, is_singleton=True
        )

    def acquire(self) -> None:
        """Acquire the lock; if its holder has ended, take it over.

        Raises:
            CheckpointError: another run is active in the folder; the message names its process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._has_lapsed():
                self._lease.force_break()
            self._lease.acquire(blocking=False)
        except Timeout as error:
            owner = self._lease.owner
            process = f"process {owner.pid} on {_host(owner)}" if owner else "an unknown process"
            raise CheckpointError(
                f"another run is active in {self.path.parent} ({process}): wait for it, or choose "
                f"another --output_dir; if it is over, remove {self.path}"
            ) from error

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lease.release(force=True)

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
        return age > LAPSE and (owner is None or owner.hostname != _this_machine())


def _host(owner: OwnerRecord) -> str:
    """The name of an owner's machine, without what filelock adds for containers."""
    return owner.hostname.partition("?")[0]


# -------------------------------------------------------------------------------------------------
# What may be resumed.


def find_checkpoint(
    folder: Path, wanted: str | None, settings: Mapping[str, Any]
) -> Checkpoint | None:
    """The checkpoint to resume from; None for a run that starts at the first step.

    Args:
        wanted: None for a new run, "latest", the path of a checkpoint, or its name in `folder`.
        settings: the config of this run, in plain values.

    Raises:
        CheckpointError: the run would overwrite another one, or files that are not its own.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder: choose another --output_dir")
    if wanted is None:
        _refuse_contents(folder)
        return None
    if wanted == "latest":
        return _latest(folder, settings)
    path = Path(wanted)
    if not path.exists() and (folder / path).is_dir():  # its name alone, as Diffusers takes it
        path = folder / path
    found = check_state(verify(path))
    if found.path.resolve().parent != folder.resolve() and contents(folder):
        _refuse_unless_same_run(folder, settings)
    return found


def check_state(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if its state.json has all entries that this version of smalti needs.

    Raises:
        CheckpointError: an entry is missing.
    """
    for name in ("kind", "config", "data_fingerprint", "precision", "num_processes"):
        if name not in checkpoint.state:
            raise CheckpointError(
                f"{checkpoint.path / STATE} has no entry {name}: another version of smalti wrote "
                "it; continue with that version, or choose another --output_dir"
            )
    return checkpoint


def contents(folder: Path) -> list[str]:
    """The names in a folder, without hidden ones; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def later_checkpoints(folder: Path, step: int) -> list[Path]:
    """Checkpoints after a step: a run that resumes at it replaces them."""
    return [path for path in checkpoints(folder) if step_of(path) > step]


def refuse_other_settings(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], where: Path | str
) -> None:
    """Raise `CheckpointError` if `where` was made with settings that must not change."""
    for name in sorted(ours.keys() | theirs.keys()):
        before, now = theirs.get(name), ours.get(name)
        if before == now or may_change(name, now):
            continue
        while isinstance(before, dict) and isinstance(now, dict):  # down to the part that differs
            part = next(p for p in sorted(before | now) if before.get(p) != now.get(p))
            name, before, now = f"{name}.{part}", before.get(part), now.get(part)
        raise CheckpointError(
            f"{where} was made with {name} = {before}, this run has {now}: use the same value, or "
            "another --output_dir"
        )


def may_change(name: str, value: Any) -> bool:
    """Whether a run may be resumed with another value of a setting."""
    return name in FREE_TO_CHANGE or (name in GUARDED_PATHS and isinstance(value, str))


def changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """A line for the log for each setting that a resumed run changes."""
    not_logged = {"output_dir", "resume_from_checkpoint"}
    return [
        f"{name} was {theirs.get(name)}, now it is {ours.get(name)}"
        for name in sorted(ours.keys() - not_logged)
        if may_change(name, ours[name]) and ours[name] != theirs.get(name)
    ]


def _refuse_contents(folder: Path) -> None:
    held = contents(folder)
    if checkpoints(folder) or {RECIPE, METRICS} & set(held):
        raise CheckpointError(
            f"{folder} already holds a run: continue it with "
            "--resume_from_checkpoint latest, or choose another --output_dir"
        )
    if held:
        raise CheckpointError(
            f"{folder} is not empty and holds no run (it contains {held[0]}): "
            "choose another --output_dir"
        )


def _latest(folder: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    found, skipped = newest_valid(folder)
    for reason in skipped:
        logger.warning("skipped a checkpoint: %s", reason)
    if found is None and skipped:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read ({skipped[0]}): restore a copy of one, "
            "or choose another --output_dir"
        )
    if found is None and contents(folder):
        _refuse_unless_same_run(folder, settings)
    return check_state(found) if found else None


def _refuse_unless_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if a folder without a checkpoint contains files of another run."""
    held = contents(folder)
    unknown = [name for name in held if name not in BEFORE_A_CHECKPOINT]
    if unknown:
        raise CheckpointError(
            f"{folder} contains {unknown[0]}, but no checkpoint of this run: choose another "
            "--output_dir"
        )
    recipe = folder / RECIPE
    try:
        theirs = without_words(read_recipe(recipe))
    except (OSError, SmaltiError) as error:
        raise CheckpointError(
            f"{folder} is not empty (it contains {held[0]}), and it has no readable {RECIPE} of "
            "this run: choose another --output_dir"
        ) from error
    refuse_other_settings(settings, theirs, recipe)
    for change in changes(settings, theirs):
        logger.info("%s", change)
    logger.warning("the run in %s has no checkpoint yet: it starts at the first step", folder)


# -------------------------------------------------------------------------------------------------
# Where the finished model goes.


def refuse_target(folder: Path, target: Path) -> None:
    """Raise `CheckpointError` if the result of the run in `folder` must not be saved in `target`.

    The run may write anywhere below `folder`. Elsewhere it replaces only what it exported itself.
    """
    run, place = folder.resolve(), target.resolve()
    if run.is_relative_to(place):
        raise CheckpointError(
            f"the result cannot be saved in {target}, which contains the run's folder {folder}: "
            "choose another folder"
        )
    if place.is_relative_to(run) or not (place.is_file() or contents(place)):
        return
    record = read_json(folder / EXPORTED) if (folder / EXPORTED).is_file() else None
    if isinstance(record, dict):
        weights = record.get("weights")
        if weights is None and record.get("folder") == str(place):
            return
        if weights and weights == _weights(place):
            return
    raise CheckpointError(
        f"{target} exists and was not saved by this run: choose another folder, or remove it"
    )


def export(folder: Path, target: Path, save: Callable[[Path], Any]) -> None:
    """Write a finished model by `save(target)`, and record in `folder` what was written."""
    record: dict[str, Any] = {"folder": str(target.resolve()), "weights": None}
    write_json(folder / EXPORTED, record)  # killed while saving, the run may save again
    save(target)
    write_json(folder / EXPORTED, {**record, "weights": _weights(target)})


def _weights(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights below a folder; cards and images may be edited."""
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}
