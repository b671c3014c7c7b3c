"""The folder of a run: who may write there, what to resume, and what must not be overwritten.

    config.yaml        the resolved config, valid as --config
    metrics.jsonl      losses and other metrics
    timing.jsonl       seconds per step, images per second
    report.html        both, with the images, as a page
    checkpoint-000300/ see checkpoint.py
    exported.json      where the finished model was saved, and its hashes
    .lock              the process that is writing here, see `smalti.folders`

A run writes nothing into its folder before its first step is done, so a run that fails earlier does
not block the next one. Hidden files (names that begin with a dot) are ignored.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smalti.config import config_from_dict, config_to_dict, read_recipe, without_words
from smalti.errors import CheckpointError, SmaltiError
from smalti.files import read_hashed_json, sha256_of, write_hashed_json
from smalti.folders import contents, replacing_folder, swappable
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
# What may be resumed.


def find_checkpoint(folder: Path, wanted: str | None, config: Any) -> Checkpoint | None:
    """The checkpoint to resume from; None for a run that starts at the first step.

    Args:
        wanted: None for a new run, "latest", the path of a checkpoint, or its name in `folder`.
        config: of this run, a dataclass.

    Raises:
        CheckpointError: the run would overwrite another one, or files that are not its own.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder: choose another --output_dir")
    if wanted is None:
        _refuse_contents(folder)
        return None
    if wanted == "latest":
        return _latest(folder, config)
    path = Path(wanted)
    if not path.exists() and (folder / path).is_dir():  # its name alone, as Diffusers takes it
        path = folder / path
    found = check_state(verify(path))
    if found.path.resolve().parent != folder.resolve() and contents(folder):
        _refuse_unless_same_run(folder, config)
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


def later_checkpoints(folder: Path, step: int) -> list[Path]:
    """Checkpoints after a step: a run that resumes at it replaces them."""
    return [path for path in checkpoints(folder) if step_of(path) > step]


def completed(stored: Mapping[str, Any], config: Any) -> Mapping[str, Any]:
    """The stored settings of a run like that of `config`; one that an earlier version did not store
    has its default."""
    try:
        return config_to_dict(config_from_dict(type(config), stored, "the stored settings"))
    except SmaltiError:  # of another kind of run, or of a later version
        return stored


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


def _latest(folder: Path, config: Any) -> Checkpoint | None:
    found, skipped = newest_valid(folder)
    for reason in skipped:
        logger.warning("skipped a checkpoint: %s", reason)
    if found is None and skipped:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read ({skipped[0]}): restore a copy of one, "
            "or choose another --output_dir"
        )
    if found is None and contents(folder):
        _refuse_unless_same_run(folder, config)
    return check_state(found) if found else None


def _refuse_unless_same_run(folder: Path, config: Any) -> None:
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
    settings, theirs = config_to_dict(config), completed(theirs, config)
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
    run, place = folder.resolve(), swappable(target)
    if run.is_relative_to(place):
        raise CheckpointError(
            f"the result cannot be saved in {target}, which contains the run's folder {folder}: "
            "choose another folder"
        )
    if place.is_relative_to(run) or not (place.is_file() or contents(place)):
        return
    record = read_hashed_json(folder / EXPORTED) if (folder / EXPORTED).is_file() else None
    if record is not None:
        weights = record.get("weights")
        if weights is None and record.get("folder") == str(place):
            return  # smalti 0.1.0 was killed while it saved here
        if _weights(place) in [known for known in (weights, record.get("replaces")) if known]:
            return
    raise CheckpointError(
        f"{target} exists and was not saved by this run: choose another folder, or remove it"
    )


def export(folder: Path, target: Path, save: Callable[[Path], Any]) -> None:
    """Write a finished model by `save(new folder)`, swap it in for `target`, and record its hashes.

    The record is written before the swap, with what is replaced, so the run knows its own result
    wherever it is killed.

    Raises:
        CheckpointError: `target` holds something that this run did not save.
        BusyError: another process is writing `target`.
    """
    with replacing_folder(target, check=lambda: refuse_target(folder, target)) as new:
        save(new)
        record = {"folder": str(target.resolve()), "weights": _weights(new)}
        write_hashed_json(folder / EXPORTED, {**record, "replaces": _weights(target)})


def _weights(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights below a folder; cards and images may be edited."""
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}
