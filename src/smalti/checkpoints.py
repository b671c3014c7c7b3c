"""The model in a checkpoint of a training run, for readers that only want the model.

`training/checkpoint.py` writes checkpoints, and resumes runs from them. A checkpoint has two sets
of weights: the average over the run ("ema"), which a finished run exports, and those that the
optimizer changes ("raw").
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from smalti.errors import CheckpointError, ConfigurationError, SmaltiError
from smalti.files import read_json, sha256_of

MANIFEST = "MANIFEST.json"
STATE = "state.json"

Weights = Literal["ema", "raw"]
FILES: Mapping[str, str] = {"ema": "ema.safetensors", "raw": "model.safetensors"}
UPDATES = "ema.updates"  # in ema.safetensors: the number of updates, which is not of the model


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a training run, complete or not."""
    return (folder / STATE).is_file() and (folder / MANIFEST).is_file()


def file_of(weights: str) -> str:
    """The name of the file with a set of weights.

    Raises:
        ConfigurationError: there is no such set.
    """
    if weights not in FILES:
        raise ConfigurationError(f"weights is {weights!r}; choose one of {', '.join(FILES)}")
    return FILES[weights]


def check_weights(folder: Path, weights: str, variant: str | None = None) -> None:
    """Raise `ConfigurationError` unless a folder has this set of weights. Of a saved model, "ema"
    is the only one; a checkpoint has no variants, such as "fp16"."""
    if variant is not None and is_checkpoint(folder):
        raise ConfigurationError(
            f'variant is "{variant}", but {folder} is a checkpoint, which has none: leave it out'
        )
    file_of(weights)
    if weights != "ema" and not is_checkpoint(folder):
        raise ConfigurationError(
            f'weights is "{weights}", but {folder} is no checkpoint and holds one set of weights: '
            "leave it out, or give a checkpoint of the run"
        )


def has_prior(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run that trains a prior."""
    run = state_of(folder).get("config") if is_checkpoint(folder) else None
    return isinstance(run, dict) and isinstance(run.get("prior"), dict)


def state_of(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json.

    Raises:
        CheckpointError: it is damaged.
    """
    _check(folder, STATE)
    content = read_json(folder / STATE)
    return content if isinstance(content, dict) else {}


def model_settings(folder: Path, kind: str) -> dict[str, Any]:
    """The settings of the model in a checkpoint, with its registry name under "kind".

    Args:
        kind: "tokenizer" or "prior".

    Raises:
        CheckpointError: the checkpoint is damaged, or is of another kind of model.
    """
    state = state_of(folder)
    settings, run = state.get("model"), state.get("config")
    configured = run.get(kind) if isinstance(run, dict) else None
    if not isinstance(configured, dict):  # of a train-prior run, "tokenizer" is a path
        raise CheckpointError(
            f"{folder} is a checkpoint of a {state.get('kind')} run: it has no {kind}"
        )
    if isinstance(settings, dict) and "kind" in settings:
        return settings
    if kind == "prior":  # its spec and its classes are those of the latents
        raise CheckpointError(
            f"{folder} was written by smalti 0.1, which did not record the latents of its prior: "
            "continue its run with --resume_from_checkpoint latest, and give a newer checkpoint"
        )
    return configured


def weight_file(folder: Path, weights: Weights) -> Path:
    """The verified file with one of the two sets of weights.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    _check(folder, FILES[weights])
    return folder / FILES[weights]


def _check(folder: Path, name: str) -> None:
    """Raise `CheckpointError` unless a file has the hash of the manifest."""
    try:
        expected = read_json(folder / MANIFEST)["files"][name]["sha256"]
    except (SmaltiError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: its {MANIFEST} has no {name}") from error
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder} lacks {name}: the checkpoint is incomplete")
    if sha256_of(folder / name) != expected:
        raise CheckpointError(f"{folder / name} is damaged: it differs from its {MANIFEST}")
