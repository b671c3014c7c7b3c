"""Sampling options of a pipeline's calls: those of the prior's `sample`, `guidance_scale` among
them.

The ones that are used when a call gives none, its sampling defaults, are saved beside the models in
sampling.json, whose hash model_index.json records.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.config import nearest, plain
from smalti.data.latents import as_tensor
from smalti.errors import CheckpointError, ConfigurationError, GenerationError, SmaltiError
from smalti.files import read_config_file
from smalti.pipelines.conditions import FILLED_BY_PIPELINE, check_options
from smalti.prior.base import Prior

SAMPLING = "sampling.json"
DEFAULT_GUIDANCE = 2.0  # guidance_scale of a pipeline that does not say otherwise
OF_A_CALL = {"on_step", "classifier"}  # options that are objects of the caller


def default_sampling(prior: Prior) -> dict[str, Any]:
    """The sampling defaults of a pipeline that sets none. A prior without a null condition cannot
    be guided."""
    return {"guidance_scale": DEFAULT_GUIDANCE if prior.has_null_class else 1.0}


def sampling_of_run(run: Mapping[str, Any], prior: Prior) -> dict[str, Any]:
    """The sampling defaults of the pipeline that a train-prior run makes: the options of its
    previews.

    Args:
        run: its configuration, as plain values.

    Raises:
        SmaltiError: the prior does not take them.
    """
    found = default_sampling(prior)
    if run["prior"].get("label_dropout") == 0 and not run.get("initial"):
        found["guidance_scale"] = 1.0  # the null label, against which to guide, is never trained
    return checked_sampling(prior, {**found, **explicit(run.get("preview", {}))})


def checked_sampling(prior: Prior, options: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults as plain values that JSON can hold; without a `guidance_scale` with that of
    `default_sampling`. An option that is None is left out.

    Raises:
        SmaltiError: the prior has no such option, or refuses the value; an option belongs to given
            images, or is no number, text, list or mapping.
    """
    kind = Prior.registry.name_of(type(prior))
    elsewhere = {*FILLED_BY_PIPELINE, *OF_A_CALL, *prior.row_options, *prior.editing_options}
    known = set(inspect.signature(prior.sample).parameters) - elsewhere
    found = default_sampling(prior)
    for name, given in options.items():
        if name not in known:
            raise ConfigurationError(
                f'"{name}" is not a sampling default of a {kind} prior; {nearest(name, known)}'
            )
        value = plain(given)
        if value is None:
            continue
        try:
            found[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the sampling default {name} is {given!r}, which JSON does not hold: give a number"
                ' or a text, such as "ddim:eta=0.5"'
            ) from error
    check_options(prior, found)
    return found


def explicit(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None; numbers of numpy and torch as Python's."""
    return {
        name: plain(value) if getattr(value, "ndim", None) == 0 else value
        for name, value in options.items()
        if value is not None
    }


def read_sampling(folder: Path, prior: Prior) -> dict[str, Any]:
    """The sampling defaults in the folder of a pipeline, or those of a pipeline that sets none.

    Raises:
        CheckpointError: the file holds no options, or options that the prior does not take.
    """
    path = folder / SAMPLING
    if not path.is_file():
        return default_sampling(prior)
    content = read_config_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold sampling options by name")
    try:
        return checked_sampling(prior, content)
    except SmaltiError as error:
        raise CheckpointError(f"{path}: {error}") from error


def sampling_words(options: Mapping[str, Any]) -> str:
    """Options in one line: guidance_scale 2.0, solver heun."""
    return ", ".join(f"{name} {_text(value)}" for name, value in options.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def row_options(prior: Prior, options: Mapping[str, Any], images: int) -> dict[str, Tensor]:
    """The options of a call that have a row for each image, as tensors.

    Raises:
        GenerationError: one has another number of rows.
    """
    found = {}
    for name in prior.row_options:
        if options.get(name) is None:
            continue
        found[name] = torch.as_tensor(as_tensor(options[name]))
        if found[name].ndim < 1 or len(found[name]) != images:
            raise GenerationError(
                f"{name} has shape {tuple(found[name].shape)} for {images} images: give one row "
                "for each image"
            )
    return found
