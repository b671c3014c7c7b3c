"""What `smalti info` reports about runs and their checkpoints."""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from smalti.config import read_recipe, without_words
from smalti.errors import CheckpointError, SmaltiError
from smalti.files import Info, checked_lines, command, read_hashed_json, read_lines
from smalti.folders import FolderLock
from smalti.training.checkpoint import Checkpoint, checkpoints, verify
from smalti.training.folder import EXPORTED, METRICS, RECIPE, REPORT, TIMING, check_state

# The settings that are shown, in this order; a run has some of them.
SHOWN = ("data", "latents", "train_batch_size", "learning_rate", "max_train_steps", "seed")


def is_run(path: Path) -> bool:
    """Whether a folder contains a run, or a run is about to write into it."""
    begun = all((path / name).is_file() for name in (RECIPE, METRICS))
    return begun or bool(checkpoints(path)) or bool(_active(path))


def of_checkpoint(path: Path) -> Info:
    """Lines about a checkpoint of a run."""
    try:
        found = check_state(verify(path))
    except SmaltiError as error:
        return Info([("kind", "checkpoint"), ("verified", f"no: {error}")], whole=False)
    how = [("kind", f"checkpoint of a {found.state['kind']} run"), *_state_lines(found)]
    active = _active(path.parent)
    next_step = ("active", active) if active else ("next", _resume(path.parent, found, str(path)))
    return Info([*how, next_step])


def of_run(path: Path) -> Info:
    """Lines about a run, finished or not."""
    lines, newest, damaged = [("kind", "training run")], None, []
    for folder in reversed(checkpoints(path)):
        try:
            found = check_state(verify(folder))
            newest = newest or found
        except SmaltiError as error:
            damaged.append(("damaged", str(error)))
    if newest is not None:
        lines = [("kind", f"{newest.state['kind']} run"), *_state_lines(newest)]
    else:
        lines.append(("step", "no checkpoint to resume from"))
    for name in (METRICS, TIMING):
        if (path / name).is_file():
            damaged += [("damaged", problem) for problem in checked_lines(path / name)[1]]
    lines += [("last logged", _last(path / METRICS)), ("speed", _last(path / TIMING))]
    if newest is not None and (different := _edited_settings(path / RECIPE, newest)):
        lines.append(("recipe", f"{RECIPE} differs from the checkpoint in {different}"))
    report, exported = path / REPORT, path / EXPORTED
    lines += [("report", str(report))] if report.is_file() else []
    lines.append(("result", _result(exported)))
    active = _active(path)
    if active:
        lines.append(("active", active))
    elif newest is not None:
        lines.append(("next", _resume(path, newest, "latest")))
    return Info([*[line for line in lines if line[1]], *damaged], whole=not damaged)


def _edited_settings(recipe: Path, checkpoint: Checkpoint) -> str:
    """The settings of a run whose values in its recipe are not those that its newest checkpoint was
    trained with; empty if there are none."""
    stored = checkpoint.state["config"]
    found = without_words(read_recipe(recipe)) if recipe.is_file() else stored
    return ", ".join(sorted(key for key in stored | found if found.get(key) != stored.get(key)))


def _active(path: Path) -> str:
    """The process that is training a run; empty if there is none."""
    holder = FolderLock(path).holder()
    return f"yes: process {holder[0]} on {holder[1]}" if holder else ""


def _result(exported: Path) -> str:
    """The folder in which the finished model of a run was saved, if it is there."""
    if not exported.is_file():
        return "not made yet"
    record = read_hashed_json(exported)
    if "folder" not in record:
        raise CheckpointError(f"{exported} is damaged: it does not name a folder; remove it")
    folder = Path(str(record["folder"]))
    return str(folder) if folder.is_dir() else f"not made yet: {folder} does not exist"


def _state_lines(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    state, config = checkpoint.state, checkpoint.state["config"]
    files = sorted(checkpoint.path.glob("*.safetensors"))
    given = {name: config[name] for name in SHOWN if config.get(name, "") != ""}
    if "data" in given:  # a run on pictures reads no cache
        given.pop("latents", None)
    settings = ", ".join(f"{name} {value}" for name, value in given.items())
    model = checkpoint.path / "model.safetensors"
    return [
        ("step", f"{checkpoint.step} of {config['max_train_steps']}"),
        ("config", settings),
        ("numbers", f"{_count(model):,} in {model.name}" if model.is_file() else ""),
        ("files", ", ".join(file.stem for file in files)),
        ("trained on", f"{state['num_processes']} process(es), precision {state['precision']}"),
        ("verified", "yes: all files have the hashes of their manifest"),
    ]


def _resume(run: Path, checkpoint: Checkpoint, wanted: str) -> str:
    options = ("--config", run / RECIPE, "--output_dir", run, "--resume_from_checkpoint", wanted)
    return command(checkpoint.state["kind"], *options)


def _last(path: Path) -> str:
    """The last line of a log, with rounded values."""
    lines = read_lines(path) if path.is_file() else []
    return ", ".join(f"{k} {_short(v)}" for k, v in lines[-1].items()) if lines else ""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(file: Path) -> int:
    """The number of values in a file of weights; only its header is read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return sum(map(math.prod, shapes))
