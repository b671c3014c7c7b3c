"""The folder of a pipeline: model_index.json, which says which models it has, the class names and
hashes, and what lies beside it."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from smalti.checkpoints import Weights, state_of
from smalti.config import added, config_from_dict, saved_fields
from smalti.data.latent_cache.manifest import CacheInfo, read_manifest, training_cache
from smalti.errors import CheckpointError, ConfigurationError
from smalti.files import (
    HASHES,
    check_hashes,
    read_config_file,
    recorded_hashes,
    write_hashed_json,
    write_json,
    write_text,
)
from smalti.folders import contents, replacing_folder
from smalti.pipelines.card import SAMPLES, model_card
from smalti.pipelines.sampling import (
    SAMPLING,
    checked_sampling,
    read_sampling,
    sampling_of_run,
)
from smalti.prior.base import Prior
from smalti.repository import files_of_model
from smalti.shards import weight_names
from smalti.tokenizer.base import Tokenizer
from smalti.weights import AS_SAVED

FORMAT_VERSION = 1
Precision = torch.dtype | Literal["auto"] | None
INDEX = "model_index.json"
CONFIGS = ("tokenizer/config.json", "prior/config.json")  # whose hashes the index records


@dataclass(frozen=True)
class Components:
    """The registry names of the models in tokenizer/ and prior/."""

    tokenizer: str
    prior: str


@dataclass(frozen=True)
class PipelineIndex:
    """The content of model_index.json."""

    components: Components
    classes: tuple[str, ...]
    notes: str = ""  # Markdown for the model card
    training_pictures: str = ""  # fingerprint of the prior's training data; empty if unknown
    # Of a call that gives none, for versions that do not read sampling.json; None: the default
    guidance_scale: float | None = None
    # Precision that dtype="auto" chooses on a type of device: {"cpu": "int8"}, as sweep measured it
    auto_dtype: dict[str, str] | None = added(None)  # noqa: RUF009
    _class_name: Literal["Pipeline"] = "Pipeline"
    format_version: int = FORMAT_VERSION


def read_index(folder: Path) -> PipelineIndex:
    """Read model_index.json, strictly.

    Raises:
        CheckpointError: there is none, or it is of another format.
        SmaltiError: it is damaged; a key is missing, unknown or of the wrong type.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {INDEX}: it is not a saved pipeline")
    content = read_config_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise CheckpointError(f"{path} has no list of class names: it is not a smalti pipeline")
    found = content.get("format_version")
    if found != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {found}; this smalti reads {FORMAT_VERSION}")
    content.pop(HASHES, None)
    return config_from_dict(PipelineIndex, content, str(path))


def components_of(tokenizer: Tokenizer, prior: Prior) -> Components:
    """The names of two models."""
    return Components(
        tokenizer=Tokenizer.registry.name_of(type(tokenizer)),
        prior=Prior.registry.name_of(type(prior)),
    )


@dataclass(frozen=True)
class SavedPipeline:
    """What a pipeline is saved as."""

    tokenizer: Tokenizer
    prior: Prior
    classes: Sequence[str]
    notes: str  # Markdown for the model card
    training_pictures: str  # fingerprint of the prior's training data; empty if unknown
    sampling: Mapping[str, Any]  # options of a call that gives none
    grid: bytes | None = None  # PNG of samples for the card
    auto_dtype: Mapping[str, str] = field(default_factory=dict)  # precision by type of device


def weights_of_parts(variant: str | None) -> list[tuple[str, ...]]:
    """The files of weights of both models: of each the file, or the index of shards."""
    names = weight_names(variant)
    return [tuple(f"{part}/{name}" for name in names) for part in ("tokenizer", "prior")]


def files_of_pipeline(weights: Weights, variant: str | None) -> list[str]:
    """What loading a pipeline reads, as patterns."""
    of_models = (files_of_model(part, weights, variant) for part in ("tokenizer", "prior"))
    return [SAMPLING, SAMPLES, *dict.fromkeys(chain(*of_models))]


def write_pipeline(folder: Path, saved: SavedPipeline, replaces: Path, **weights: Any) -> None:
    """Write the files of a pipeline into a new folder.

    Args:
        replaces: the old folder, whose other variants of the weights are kept.
        weights: options of `Tokenizer.save_pretrained`.

    Raises:
        SmaltiError: the prior does not take the sampling defaults; a model cannot be saved.
    """
    for name, model in (("tokenizer", saved.tokenizer), ("prior", saved.prior)):
        model.save_pretrained(folder / name, replaces=replaces / name, **weights)
    write_description(folder, saved)


def write_description(folder: Path, saved: SavedPipeline) -> None:
    """Write the files of a pipeline that lie beside its models, whose config.json are there.

    Raises:
        SmaltiError: the prior does not take the sampling defaults.
    """
    tokenizer, prior, grid = saved.tokenizer, saved.prior, saved.grid
    defaults = checked_sampling(prior, saved.sampling)
    if grid is not None:
        (folder / SAMPLES).write_bytes(grid)
    card = model_card(tokenizer, prior, saved.classes, grid is not None, saved.notes, defaults)
    write_text(folder / "README.md", card)
    write_json(folder / SAMPLING, defaults)
    index = PipelineIndex(
        components=components_of(tokenizer, prior),
        classes=tuple(saved.classes),
        notes=saved.notes,
        training_pictures=saved.training_pictures,
        guidance_scale=defaults["guidance_scale"],
        auto_dtype=dict(saved.auto_dtype) or None,
    )
    write_hashed_json(folder / INDEX, saved_fields(index), (*CONFIGS, SAMPLING))


def save_sampling(folder: Path, sampling: Mapping[str, Any]) -> None:
    """Change the sampling defaults of a saved pipeline, and its card, see `save_changed`."""
    save_changed(folder, lambda saved: replace(saved, sampling=sampling))


def save_auto_dtype(folder: Path, device: torch.device, dtype: str) -> None:
    """Change the precision that dtype="auto" chooses on a type of device, see `save_changed`."""
    save_changed(
        folder, lambda saved: replace(saved, auto_dtype={**saved.auto_dtype, device.type: dtype})
    )


def save_changed(folder: Path, change: Callable[[SavedPipeline], SavedPipeline]) -> None:
    """Change what lies beside the models of a saved pipeline. Its models, and what else its folder
    has, stay as they are, to the byte.

    Raises:
        SmaltiError: it is not a saved pipeline; its prior does not take the options of `sampling`.
    """
    with replacing_folder(folder, check=lambda: check_target(folder)) as new:
        saved = change(read_pipeline(folder, AS_SAVED, True, None))
        for config in CONFIGS:
            (new / config).parent.mkdir()
            shutil.copy2(folder / config, new / config)
        write_description(new, saved)


def read_pipeline(
    folder: Path, precision: Precision, verify: bool, variant: str | None
) -> SavedPipeline:
    """What is in the folder of a pipeline.

    Args:
        verify: compare the files of both models with their hashes; `check_pipeline` does that for
            the others.

    Raises:
        SmaltiError: a file is missing, damaged or does not fit.
    """
    index = read_index(folder)
    options: dict[str, Any] = {"dtype": precision, "verify": verify, "variant": variant}
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer", **options)
    prior = Prior.from_pretrained(folder / "prior", **options)
    if components_of(tokenizer, prior) != index.components:
        raise CheckpointError(
            f"{folder / INDEX} names {index.components}; the folder holds "
            f"{components_of(tokenizer, prior)}: it was put together from different pipelines"
        )
    sampling = read_sampling(folder, prior)
    if not (folder / SAMPLING).is_file() and index.guidance_scale is not None:
        sampling["guidance_scale"] = index.guidance_scale  # of an earlier version
    grid = (folder / SAMPLES).read_bytes() if (folder / SAMPLES).is_file() else None
    about = (index.classes, index.notes, index.training_pictures, sampling, grid)
    return SavedPipeline(tokenizer, prior, *about, index.auto_dtype or {})


def check_pipeline(folder: Path) -> None:
    """Compare all files of a pipeline, but those of its models, with their hashes.

    Raises:
        CheckpointError: one was changed; there are sampling defaults that were not saved with it.
    """
    recorded = recorded_hashes(folder / INDEX)
    is_there = (folder / SAMPLING).is_file()
    if SAMPLING in recorded and not is_there:
        raise CheckpointError(f"{folder} has no {SAMPLING}, which {INDEX} records: copy it again")
    check_hashes(folder / INDEX, (*CONFIGS, SAMPLING) if is_there else CONFIGS)


def read_run(folder: Path, weights: Weights, precision: Precision) -> SavedPipeline:
    """The prior in a checkpoint of a train-prior run with the tokenizer, and the class names, of
    the run."""
    prior = Prior.from_pretrained(folder, dtype=precision, weights=weights)
    state = state_of(folder)
    run = state["config"]
    if "latents" in state:  # without a cache
        info = config_from_dict(CacheInfo, state["latents"], str(folder))
    else:
        info = read_manifest(training_cache(Path(run["latents"])))
    as_saved = precision if precision == AS_SAVED else None
    given = Tokenizer.from_pretrained(Path(run["tokenizer"]), dtype=as_saved)
    tokenizer = given.for_latents(info.spec, info.tokenizer_fingerprint) or given
    if isinstance(precision, torch.dtype):  # last: a rounded copy cannot be resized
        tokenizer.cast(precision)
    classes = info.classes if "class" in prior.condition_kinds else ()
    sampling = sampling_of_run(run, prior)
    return SavedPipeline(tokenizer, prior, classes, "", info.dataset_fingerprint, sampling)


def check_pair(tokenizer: Tokenizer, prior: Prior) -> None:
    """Raise `ConfigurationError` if the prior was trained on latents of another tokenizer."""
    if tokenizer.spec != prior.spec:
        same = tokenizer.for_latents(prior.spec, prior.tokenizer_fingerprint or "")
        if same is not None:
            size, grids = same.image_size, getattr(prior.spec, "grids", ())
            scales = f", {grids}" if len(grids) > 1 else ""
            raise ConfigurationError(
                f"the prior models latents of images of {size} pixels, and the tokenizer is "
                f"for images of {tokenizer.image_size}: pass "
                f"tokenizer.resized({size}{scales})"
            )
        raise ConfigurationError(
            f"the tokenizer makes {tokenizer.spec}, the prior models {prior.spec}: "
            "they do not belong together"
        )
    expected = prior.tokenizer_fingerprint
    if expected is not None and expected != tokenizer.fingerprint:
        raise ConfigurationError(
            f"the prior was trained on the latents of tokenizer {expected[:12]}, this one is "
            f"{tokenizer.fingerprint[:12]}: pair it with its own tokenizer, and change the "
            "precision with dtype= or cast()"
        )


def check_target(folder: Path) -> None:
    """Raise `CheckpointError` if a folder contains anything but a pipeline."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: choose a folder")
    if contents(folder) and not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} exists and is not a pipeline: choose another folder")
