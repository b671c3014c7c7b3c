"""The folder of a run: what to resume in it, and what must not be overwritten there.

    config.yaml        the resolved config, valid as --config
    metrics.jsonl      what was measured
    timing.jsonl       how fast it went
    report.html        both, and the pictures, as a page
    checkpoint-000300/ see checkpoint.py
    exported.json      where the finished model went, and its hashes

A run writes nothing into its folder before it has done a step, so one that fails earlier does not
stand in the way of the next. Names that begin with a dot do not count as contents.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smalti.errors import SmaltiError
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

# All that a run may leave before its first checkpoint: pictures, and what trackers write, too.
BEFORE_A_CHECKPOINT = {RECIPE, METRICS, TIMING, REPORT, "reconstructions", "samples", "smalti"}


def find_checkpoint(
    folder: Path, wanted: str | None, settings: Mapping[str, Any]
) -> Checkpoint | None:
    """The checkpoint to go on from; None for a run that starts at the first step.

    Args:
        wanted: None for a new run, "latest", or the path of a checkpoint, or its name in `folder`.
        settings: the config of this run, in plain values.

    Raises:
        SmaltiError: the run would overwrite another one, or files that are not its own.
    """
    if folder.exists() and not folder.is_dir():
        raise SmaltiError(f"{folder} is a file, not a folder: choose another --output_dir")
    if wanted is None:
        _refuse_contents(folder)
        return None
    if wanted == "latest":
        return _latest(folder, settings)
    path = Path(wanted)
    if not path.exists() and (folder / path).is_dir():  # its name alone, as Diffusers takes it
        path = folder / path
    found = told_by_run(verify(path))
    if found.path.resolve().parent != folder.resolve() and contents(folder):
        _refuse_unless_begun_alike(folder, settings)
    return found


def told_by_run(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, which says all of its run that this version of smalti asks for.

    Raises:
        SmaltiError: it does not.
    """
    for name in ("kind", "config", "data_fingerprint", "precision", "num_processes"):
        if name not in checkpoint.state:
            raise SmaltiError(
                f"{checkpoint.path / STATE} does not tell {name}: another version of smalti wrote "
                "it; go on with that one, or choose another --output_dir"
            )
    return checkpoint


def contents(folder: Path) -> list[str]:
    """The names in a folder, hidden ones left out; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def later_checkpoints(folder: Path, step: int) -> list[Path]:
    """Checkpoints after a step: a run that goes on from it replaces them."""
    return [path for path in checkpoints(folder) if step_of(path) > step]


def refuse_other_settings(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], where: Path | str
) -> None:
    """Raise `SmaltiError` if a run with other settings made `where`."""
    for name in sorted(ours.keys() | theirs.keys()):
        before, now = theirs.get(name), ours.get(name)
        if before == now or may_change(name, now):
            continue
        while isinstance(before, dict) and isinstance(now, dict):  # down to what differs
            part = next(p for p in sorted(before | now) if before.get(p) != now.get(p))
            name, before, now = f"{name}.{part}", before.get(part), now.get(part)
        raise SmaltiError(
            f"{where} was made with {name} = {before}, this run has {now}: use the same value, or "
            "another --output_dir"
        )


def may_change(name: str, value: Any) -> bool:
    """Whether a run may go on with another value of a setting."""
    return name in FREE_TO_CHANGE or (name in GUARDED_PATHS and isinstance(value, str))


def changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What is told of the settings that a run changes when it goes on, a line for each."""
    untold = {"output_dir", "resume_from_checkpoint"}
    return [
        f"{name} was {theirs.get(name)}, now it is {ours.get(name)}"
        for name in sorted(ours.keys() - untold)
        if may_change(name, ours[name]) and ours[name] != theirs.get(name)
    ]


def _refuse_contents(folder: Path) -> None:
    held = contents(folder)
    if checkpoints(folder) or {RECIPE, METRICS} & set(held):
        raise SmaltiError(
            f"{folder} already holds a run: continue it with "
            "--resume_from_checkpoint latest, or choose another --output_dir"
        )
    if held:
        raise SmaltiError(
            f"{folder} is not empty and holds no run (it holds {held[0]}): "
            "choose another --output_dir"
        )


def _latest(folder: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    found, skipped = newest_valid(folder)
    for reason in skipped:
        logger.warning("skipped a checkpoint: %s", reason)
    if found is None and skipped:
        raise SmaltiError(
            f"no checkpoint in {folder} can be read ({skipped[0]}): put back a copy of one, "
            "or choose another --output_dir"
        )
    if found is None and contents(folder):
        _refuse_unless_begun_alike(folder, settings)
    return told_by_run(found) if found else None


def _refuse_unless_begun_alike(folder: Path, settings: Mapping[str, Any]) -> None:
    """Let pass what this very run left when it was killed before its first checkpoint."""
    import yaml

    held = contents(folder)
    strangers = [name for name in held if name not in BEFORE_A_CHECKPOINT]
    if strangers:
        raise SmaltiError(
            f"{folder} holds {strangers[0]}, but no checkpoint to go on from was asked for or "
            "found there: choose another --output_dir"
        )
    recipe = folder / RECIPE
    try:
        theirs = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SmaltiError(
            f"{folder} is not empty (it holds {held[0]}), and no readable {RECIPE} says that it "
            "is of this run: choose another --output_dir"
        ) from error
    refuse_other_settings(settings, theirs if isinstance(theirs, dict) else {}, recipe)
    logger.warning("the run in %s has no checkpoint yet: it starts at the first step", folder)


# -- the finished model -----------------------------------------------------------------------


def refuse_target(folder: Path, target: Path) -> None:
    """Raise `SmaltiError` if the result of the run in `folder` must not go to `target`.

    Below `folder` all is the run's own. Elsewhere it replaces nothing but what it exported itself.
    """
    run, place = folder.resolve(), target.resolve()
    if run.is_relative_to(place):
        raise SmaltiError(f"the result cannot go to {target}: the run in {folder} stands there")
    if place.is_relative_to(run) or not (place.is_file() or contents(place)):
        return
    record = read_json(folder / EXPORTED) if (folder / EXPORTED).is_file() else None
    if isinstance(record, dict):
        weights = record.get("weights")
        if weights is None and record.get("folder") == str(place):
            return
        if weights and weights == _weights(place):
            return
    raise SmaltiError(
        f"{target} exists and was not saved by this run: choose another folder, or remove it"
    )


def export(folder: Path, target: Path, save: Callable[[Path], Any]) -> None:
    """Write a finished model by `save(target)`, and note in `folder` what was written."""
    record: dict[str, Any] = {"folder": str(target.resolve()), "weights": None}
    write_json(folder / EXPORTED, record)  # killed while saving, the run may save again
    save(target)
    write_json(folder / EXPORTED, {**record, "weights": _weights(target)})


def _weights(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights below a folder; cards and pictures may be edited."""
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}
