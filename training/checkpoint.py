"""Checkpoints that are either whole or absent, and hold no code.

    checkpoint-000300/
        model.safetensors  ema.safetensors  optimizer.safetensors  ...  one file per tracked object
        state.json      step, resolved config, versions
        MANIFEST.json   size and sha256 of every other file, written last

A checkpoint is written into a hidden folder beside its target, flushed to disk, then renamed;
older ones are removed only after that, and never this one. A folder whose manifest does not verify
is not a checkpoint.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.files import read_json, sha256_of, write_json

PREFIX = "checkpoint-"
MANIFEST = "MANIFEST.json"
STATE = "state.json"


class Stateful(Protocol):
    """Anything with a flat state dict of tensors: a module, an EMA, a wrapped optimizer."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class OptimizerState:
    """An optimizer as a flat dict of tensors, so that safetensors can hold it.

    Only what steps change is kept: hyper-parameters come from the config, the learning rate from
    the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {
            f"{index}.{name}": torch.as_tensor(value)
            for index, entries in state.items()
            for name, value in entries.items()
        }

    def load_state_dict(self, flat: dict[str, Tensor], /) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in flat.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    step: int
    state: dict[str, Any]

    def restore(self, objects: Mapping[str, Stateful]) -> None:
        """Load every tracked object from its file."""
        for name, target in objects.items():
            file = self.path / f"{name}.safetensors"
            if not file.is_file():
                raise SmaltiError(f"{self.path} has no {file.name}: it is of another kind of run")
            try:
                target.load_state_dict(load_file(file))
            except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
                first_line = str(error).splitlines()[0]
                raise SmaltiError(f"{file} does not fit this run: {first_line}") from error


def save_checkpoint(
    folder: Path,
    step: int,
    objects: Mapping[str, Stateful],
    state: Mapping[str, Any],
    *,
    keep: int,
    replaces: Sequence[Path] = (),
) -> Path:
    """Write `folder/checkpoint-{step}` whole, then prune all but the newest `keep` (0 = all).

    Args:
        replaces: checkpoints that the run went back behind, because they are damaged or by wish.
            They go as soon as this one is written, whatever `keep` is.
    """
    target = folder / f"{PREFIX}{step:06d}"
    temporary = folder / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        for name, source in objects.items():
            tensors = {k: v.detach().contiguous() for k, v in source.state_dict().items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        write_json(temporary / STATE, {"step": step, **state})
        write_json(temporary / MANIFEST, {"files": _describe(temporary)})
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if target.exists():  # a re-run of the same step after an invalid checkpoint
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in replaces:
        if path != target:
            shutil.rmtree(path, ignore_errors=True)
    prune(folder, keep, spare=target)
    return target


def verify(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`.

    Raises:
        SmaltiError: a file is missing, cut, changed or surplus; the message names it.
    """
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        raise SmaltiError(f"{path} has no {MANIFEST}: it was never finished, or is no checkpoint")
    try:
        expected = read_json(manifest_file)["files"]
        found = _describe(path)
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                raise SmaltiError(f"{path} lacks {name}: the checkpoint is incomplete")
            if name not in expected:
                raise SmaltiError(f"{path} holds {name}, which is not in its {MANIFEST}")
            if expected[name] != found[name]:
                raise SmaltiError(f"{path / name} is damaged: it differs from its {MANIFEST}")
        state = read_json(path / STATE)
        return Checkpoint(path, int(state["step"]), state)
    except SmaltiError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise SmaltiError(f"{path} is damaged: {MANIFEST} or {STATE} cannot be read") from error


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, and why newer ones were skipped."""
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return verify(path), skipped
        except SmaltiError as error:
            skipped.append(str(error))
    return None, skipped


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders below `folder`, oldest first, valid or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and step_of(p) >= 0]
    return sorted(found, key=step_of)


def prune(folder: Path, keep: int, spare: Path) -> None:
    """Remove unfinished leftovers and all but the newest `keep` checkpoints (0 keeps all).

    `spare`, the one that was just written, is never removed.
    """
    for leftover in folder.glob(f".tmp-{PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep:
        for old in checkpoints(folder)[:-keep]:
            if old != spare:
                shutil.rmtree(old, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder; -1 if the name is of something else."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if digits.isdecimal() else -1


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = [f for f in sorted(folder.iterdir()) if f.name != MANIFEST]
    return {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files}


def _flush(path: Path) -> None:
    """fsync a file or a folder; folders cannot be opened on some systems."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
