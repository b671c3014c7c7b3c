"""Checkpoints: written atomically, verified when read, without code.

    checkpoint-000300/
        model.safetensors  ema.safetensors  optimizer.safetensors  ...  one file per tracked object
        state.json      step, resolved config, versions
        MANIFEST.json   size and sha256 of every other file, written last

A checkpoint is written into a hidden folder beside its target, flushed to disk, then renamed;
older ones are removed only after that, and never this one. If the loss has risen far above that of
an older one, that one is not removed either, so a run that diverges keeps its last good state. A
folder whose files do not match its manifest is not a checkpoint.

Written here rather than taken from a library (torch.distributed.checkpoint, Accelerate's
`save_state`): those unpickle what they load, do not verify it, and may leave a damaged checkpoint
if the process is killed while it saves.
"""

import errno
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from smalti.checkpoints import MANIFEST, STATE
from smalti.errors import CheckpointError, SmaltiError
from smalti.files import flush, read_json, sha256_of, unfinished, write_errors, write_json
from smalti.folders import remove_leftovers
from smalti.training.divergence import LossLevel

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"

# -------------------------------------------------------------------------------------------------
# Sharded tensors (FSDP2). Checkpoints always contain full tensors: a run that shards its model can
# resume one that did not, and vice versa.


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters of a module are sharded over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; every process of its mesh must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, target: Tensor) -> Tensor:
    """This process's shard, placed like `target`, of a full tensor that is on all processes."""
    if not isinstance(target, DTensor):
        return tensor
    mesh = target.device_mesh
    local = tensor.to(device=target.device, dtype=target.dtype)
    return distribute_tensor(local, mesh, target.placements, src_data_rank=None)


# -------------------------------------------------------------------------------------------------
# State as flat dicts of tensors.


class Stateful(Protocol):
    """Anything with a flat state dict of tensors: a module, an EMA, a wrapped optimizer."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class OptimizerState:
    """An optimizer as a flat dict of tensors, so that safetensors can store it.

    Only the moments and step counts are kept: hyper-parameters come from the config, the learning
    rate from the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {
            f"{index}.{name}": part
            for index, entries in state.items()
            for entry, value in entries.items()
            for name, part in _plain(entry, torch.as_tensor(value)).items()
        }

    def load_state_dict(self, flat: dict[str, Tensor], /) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in flat.items():
            index, name, *part = key.split(".", 2)
            parameter, entries = parameters[int(index)], state.setdefault(int(index), {})
            if part:  # of moments in 8 bits, whose tables follow from the sign
                if name not in entries:
                    entries[name] = self.optimizer._new_buffer(parameter, name == "exp_avg")  # type: ignore[attr-defined]
                getattr(entries[name], part[0]).copy_(value)
                continue
            if value.shape == parameter.shape:
                value = sharded_like(value, parameter)
            entries[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _plain(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of an optimizer's state, by name; of one in 8 bits the plain tensors."""
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        return {name: value}
    inner, _ = cast(Any, value).__tensor_flatten__()
    return {f"{name}.{part}": getattr(value, part) for part in inner}


def collect(objects: Mapping[str, Stateful], *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """The full tensors of every object; every process must call this.

    Args:
        keep: whether this process keeps them; the others only send their shards.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for name, source in objects.items():
        states[name] = {}
        for key, value in source.state_dict().items():
            tensor = full_tensor(value.detach())
            if keep:
                states[name][key] = tensor.contiguous()
    return states


# -------------------------------------------------------------------------------------------------
# Reading: only verified files are loaded.


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
                raise CheckpointError(
                    f"{self.path} has no {file.name}: it belongs to another kind of run"
                )
            try:
                tensors = load_file(file)
                if isinstance(target, torch.nn.Module):
                    own = target.state_dict()
                    tensors = {k: sharded_like(v, own.get(k, v)) for k, v in tensors.items()}
                target.load_state_dict(tensors)
            except (RuntimeError, LookupError, ValueError, SafetensorError) as error:
                first_line = str(error).splitlines()[0]
                raise CheckpointError(f"{file} does not fit this run: {first_line}") from error


def _describe(file: Path) -> dict[str, Any]:
    """The entry of a file in the manifest."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def verify(path: Path) -> Checkpoint:
    """The checkpoint in a folder, all of whose files have the hashes of the manifest.

    Raises:
        CheckpointError: a file is missing, truncated, changed or unexpected; the message names it.
    """
    manifest_file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"folder not found: {path}")
    if not manifest_file.is_file():
        raise CheckpointError(
            f"{path} has no {MANIFEST}: it was never finished, or is not a checkpoint"
        )
    try:
        expected = read_json(manifest_file)["files"]
        files = [f for f in sorted(path.iterdir()) if f.name != MANIFEST]
        # Hidden files are left by desktops and file systems (.DS_Store, .nfs...).
        found = {f.name: _describe(f) for f in files if not f.name.startswith(".")}
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                raise CheckpointError(f"{path} lacks {name}: the checkpoint is incomplete")
            if name not in expected:
                raise CheckpointError(f"{path} holds {name}, which is not in its {MANIFEST}")
            if expected[name] != found[name]:
                raise CheckpointError(f"{path / name} is damaged: it differs from its {MANIFEST}")
        state = read_json(path / STATE)
        return Checkpoint(path, int(state["step"]), state)
    except SmaltiError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} or {STATE} cannot be read") from error


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder; -1 for any other name."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if digits.isdecimal() else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a folder, oldest first, valid or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and step_of(p) >= 0]
    return sorted(found, key=step_of)


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint in a folder, and for each newer one what is wrong."""
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return verify(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


# -------------------------------------------------------------------------------------------------
# Writing: at every moment the folder contains the previous checkpoint or the new one.


def check_free_space(folder: Path, name: str, size: int) -> None:
    """Raise `OSError` if `size` bytes do not fit on the disk; the message has both sizes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        kept = checkpoints(folder)
        raise OSError(
            errno.ENOSPC,
            f"{name} takes {size / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
            + (f"; {kept[-1].name} is kept" if kept else ""),
            str(folder),
        )


def _write_tensors(
    folder: Path, states: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Write a file for each object; return their entries in the manifest.

    While one file is written, those before it are hashed and flushed to disk.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        flushed, described = [], {}
        for name, tensors in states.items():
            file = folder / f"{name}.safetensors"
            with write_errors(file):
                save_file(dict(tensors), file)
            flushed.append(pool.submit(flush, file))
            described[file.name] = pool.submit(_describe, file)
        for job in flushed:
            job.result()
        return {name: job.result() for name, job in described.items()}


def refuse_not_finite(states: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Raise `CheckpointError` if a tensor contains NaN or infinity; the message names it."""
    for name, tensors in states.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CheckpointError(
                    f"{key} of the {name} is not finite after step {step}, so nothing was saved: "
                    "repeat the command with --resume_from_checkpoint latest and a lower "
                    "--learning_rate; the last checkpoint is untouched"
                )


def loss_level(path: Path) -> LossLevel | None:
    """The level of the loss when a checkpoint was written, if that is known."""
    try:
        levels = read_json(path / STATE)["skipped"]["levels"]
        return LossLevel.read(next(iter(levels.values()), None))  # the model's, the first
    except (SmaltiError, OSError, LookupError, TypeError, AttributeError):
        return None


def best_of_diverged(found: Sequence[Path], keep: int) -> Path | None:
    """The checkpoint with the lowest loss, if the loss of the newest `keep` is far above it."""
    levels = [(path, level) for path in found if (level := loss_level(path)) is not None]
    if not levels:
        return None
    best, lowest = min(levels, key=lambda pair: pair[1].mean)
    newest = [level for path, level in levels if path in found[-keep:]]
    return best if newest and all(level.is_ruined_beside(lowest) for level in newest) else None


def prune(folder: Path, keep: int, spare: Path) -> None:
    """Remove unfinished files and all but the newest `keep` checkpoints (0 keeps all).

    `spare`, the one that was just written, is never removed, nor the best one of a run that has
    diverged since.
    """
    remove_leftovers(folder)
    if not keep:
        return
    found = checkpoints(folder)
    best = best_of_diverged(found, keep)
    if best is not None:
        logger.warning(
            "the loss is far above that of %s, which is kept: continue from it with a lower "
            "--learning_rate and --resume_from_checkpoint %s",
            best.name,
            best.name,
        )
    for old in found[:-keep]:
        if old not in (spare, best):
            shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    step: int,
    states: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    replaces: Sequence[Path] = (),
) -> Path:
    """Write `folder/checkpoint-{step}`, then remove all but the newest `keep` (0 keeps all).

    Args:
        states: the tensors of each file, see `collect`.
        state: plain values for state.json, beside the step.
        replaces: checkpoints later than the one that the run resumed from, because they are damaged
            or the user chose an earlier one. They are removed once this one is written, whatever
            `keep` is.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"{PREFIX}{step:06d}"
    temporary = unfinished(target)
    try:
        temporary.mkdir(parents=True)
        size = sum(tensor.nbytes for tensors in states.values() for tensor in tensors.values())
        check_free_space(folder, target.name, size)
        described = _write_tensors(temporary, states)
        write_json(temporary / STATE, {"step": step, **state})
        described[STATE] = _describe(temporary / STATE)
        write_json(temporary / MANIFEST, {"files": dict(sorted(described.items()))})
        flush(temporary)
        if target.exists():  # damaged, or later than the one that the run resumed from
            shutil.rmtree(target)
        os.replace(temporary, target)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in replaces:
        if path != target:
            shutil.rmtree(path, ignore_errors=True)
    prune(folder, keep, spare=target)
    return target
