"""Tokenizer and prior as one object: class labels or captions in, images out.

A saved pipeline is a folder:

    model_index.json     which models, and the class names; written last
    tokenizer/ prior/    config.json and model.safetensors each
    README.md            the model card
    samples.png          the grid that the card shows, if there is one
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from smalti.config import config_from_dict, config_to_dict
from smalti.data.classes import check_class_names
from smalti.data.image_io import save_png, to_pil
from smalti.errors import CheckpointError, ConfigurationError, GenerationError
from smalti.files import read_json, replacing, write_json, write_text
from smalti.hub import chosen_dtype, resolve_folder, upload
from smalti.pipelines.card import SAMPLES, model_card
from smalti.pipelines.conditions import (
    ClassLabels,
    Conditions,
    check_names,
    integer,
    label_ids,
)
from smalti.prior.base import Prior
from smalti.randomness import Generators, check_generators
from smalti.tokenizer.base import Tokenizer

OutputType = Literal["pil", "np", "pt", "latent"]

# -- model_index.json -----------------------------------------------------------------------------

FORMAT_VERSION = 1
INDEX = "model_index.json"


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
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise CheckpointError(f"{path} has no list of class names: it is not a smalti pipeline")
    found = content.get("format_version")
    if found != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {found}; this smalti reads {FORMAT_VERSION}")
    return config_from_dict(PipelineIndex, content, str(path))


# -- the pipeline ---------------------------------------------------------------------------------


@dataclass
class PipelineOutput:
    """The result of calling a pipeline."""

    images: Any  # "pil": list; "np": (B, H, W, 3) in [0, 1]; "pt": (B, 3, H, W) in [0, 1]; or None
    latents: Tensor  # what the prior sampled
    labels: list[int]  # class label of each image; empty where captions were given


class Pipeline:
    """A tokenizer and a prior that was trained on its latents, with the names of the classes.

    Raises:
        ConfigurationError: the specs differ; the prior was trained on the latents of another
            tokenizer; there are more or fewer names than classes.
        DataError: two names are the same, or one cannot be printed.
    """

    def __init__(self, tokenizer: Tokenizer, prior: Prior, classes: Sequence[str]) -> None:
        if tokenizer.spec != prior.spec:
            raise ConfigurationError(
                f"the tokenizer makes {tokenizer.spec}, the prior models {prior.spec}: "
                "they do not belong together"
            )
        _check_pair(tokenizer, prior)
        if len(classes) != prior.num_classes:
            raise ConfigurationError(
                f"{len(classes)} class names were given; the prior has {prior.num_classes} classes"
            )
        check_class_names(classes, "the pipeline")
        self.tokenizer = tokenizer.eval()
        self.prior = prior.eval()
        self.classes = tuple(classes)
        self.notes = ""  # Markdown for the model card
        self.training_pictures = ""  # fingerprint of the prior's training data, if known
        self._samples: Path | None = None  # file of the grid that the model card shows

    # -- loading and saving -------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a folder written by `save_pretrained`, or a model repository on the Hub.

        Loading a local folder does not use the network. Only JSON and safetensors are read.

        Args:
            dtype: precision of both models, a type or its name, such as "bfloat16"; "auto" keeps
                the one that each was saved in; None is fp32.
            torch_dtype: another name of `dtype`.

        Raises:
            SmaltiError: the folder does not exist, or a file is missing, damaged or does not fit;
                there is no such precision.
        """
        precision = chosen_dtype(dtype, torch_dtype)
        folder = resolve_folder(
            path_or_hub_id, revision=revision, token=token, local_files_only=local_files_only
        )
        index = read_index(folder)
        tokenizer = Tokenizer.from_pretrained(folder / "tokenizer", dtype=precision)
        prior = Prior.from_pretrained(folder / "prior", dtype=precision)
        if _components(tokenizer, prior) != index.components:
            raise CheckpointError(
                f"{folder / INDEX} names {index.components}; the folder holds "
                f"{_components(tokenizer, prior)}: it was put together from different pipelines"
            )
        pipeline = cls(tokenizer, prior, index.classes)
        pipeline.notes = index.notes
        pipeline.training_pictures = index.training_pictures
        pipeline._samples = folder / SAMPLES
        return pipeline.to(device)

    def save_pretrained(
        self, path: str | Path, *, samples: Image.Image | None = None, notes: str | None = None
    ) -> Path:
        """Write tokenizer/, prior/, a model card, and last `model_index.json`.

        Args:
            samples: a grid of samples for the card, saved as samples.png; None keeps the one that
                the pipeline was loaded with or last saved with.
            notes: Markdown for the card, for example measurements; None keeps the current notes.

        Raises:
            CheckpointError: `path` exists and is not a saved pipeline.
            ConfigurationError: the tokenizer was changed since it was paired with the prior.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: choose a folder")
        if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
            raise CheckpointError(f"{folder} exists and is not a pipeline: choose another folder")
        _check_pair(self.tokenizer, self.prior)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.prior.save_pretrained(folder / "prior")
        self.notes = self.notes if notes is None else notes
        has_grid = self._save_grid(folder / SAMPLES, samples)
        card = model_card(self.tokenizer, self.prior, self.classes, has_grid, self.notes)
        write_text(folder / "README.md", card)
        index = PipelineIndex(
            components=_components(self.tokenizer, self.prior),
            classes=self.classes,
            notes=self.notes,
            training_pictures=self.training_pictures,
        )
        write_json(folder / INDEX, config_to_dict(index))  # last: marks it complete
        return folder

    def _save_grid(self, path: Path, samples: Image.Image | None) -> bool:
        """Write a new grid, or copy the current one; return whether there is one."""
        if samples is not None:
            save_png(path, samples)
            self._samples = path
        elif self._samples is None or not self._samples.is_file():
            path.unlink(missing_ok=True)  # left by the pipeline that was saved here before
        elif not (path.is_file() and path.samefile(self._samples)):
            with replacing(path) as temporary:
                shutil.copyfile(self._samples, temporary)
        return path.is_file()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload smalti pipeline",
        create_pr: bool = False,
    ) -> str:
        """Upload the folder that `save_pretrained` writes, in one commit; return its address."""
        return upload(
            self.save_pretrained,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move both models, change their precision, or both; return self."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for model in (self.tokenizer, self.prior):
            if dtype is not None:
                model.cast(dtype)
            model.to(device=device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        output_type: OutputType = "pil",
        batch_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> PipelineOutput:
        """Generate images of classes, or of captions if the prior is text-conditional.

        Args:
            class_labels: a class, or several, by number or name; `num_images_per_prompt` images
                are generated of each, in order.
            prompt_embeds: instead of classes, the output of a text encoder for captions, (B, T, D)
                with the T and D that the prior was trained with, padded anywhere.
            prompt_attention_mask: (B, T), nonzero at tokens; None: nothing is padding.
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass.
            generator: one generator, or a list with one per image; with a list, image i does not
                depend on its neighbours or on `batch_size`.
            output_type: "pil", "np", "pt" or "latent" (nothing is decoded).
            batch_size: images per batch; None is one batch of all images.
            options: keyword options of the prior's `sample`: `temperature`, `solver`, ...

        Raises:
            GenerationError: an unknown class, output type or option, or a wrong number of
                generators.
        """
        check_names(self.prior, options)
        conditions = self._conditions(
            class_labels, prompt_embeds, prompt_attention_mask, num_images_per_prompt
        )
        if output_type not in get_args(OutputType):
            raise GenerationError(
                f'output_type is "{output_type}"; choose one of {", ".join(get_args(OutputType))}'
            )
        if batch_size is not None and integer("batch_size", batch_size) < 1:
            raise GenerationError(f"batch_size is {batch_size}; it must be at least 1")
        check_generators(generator, len(conditions))
        chunk = batch_size or len(conditions)
        latents, images = [], []
        for start in tqdm(range(0, len(conditions), chunk), disable=not progress, unit="batch"):
            part = slice(start, start + chunk)
            sampled = self.prior.sample(
                conditions.part(part, self.device),
                guidance_scale=guidance_scale,
                generator=generator[part] if isinstance(generator, Sequence) else generator,
                **options,
            )
            latents.append(sampled)
            if output_type != "latent":
                images.append(self.tokenizer.decode(sampled).float().clamp(-1, 1).cpu())
        decoded = _as_output(torch.cat(images), output_type) if images else None
        return PipelineOutput(decoded, torch.cat(latents), conditions.labels)

    def _conditions(
        self, labels: ClassLabels | None, features: Tensor | None, mask: Tensor | None, each: int
    ) -> Conditions:
        """Class labels or captions, whichever the prior was trained with."""
        if self.classes:
            if labels is None or features is not None or mask is not None:
                raise GenerationError(
                    "this pipeline is class-conditional: pass class_labels, and no prompt_embeds"
                )
            return Conditions.of_classes(labels, self.classes, each)
        if features is None or labels is not None:
            raise GenerationError(
                "this pipeline is text-conditional: pass prompt_embeds, and no class_labels"
            )
        return Conditions.of_captions(features, mask, each)

    def label_ids(self, class_labels: ClassLabels) -> list[int]:
        """The labels of classes that are given by number or name.

        Raises:
            GenerationError: there is no such class; the message lists similar names.
        """
        return label_ids(class_labels, self.classes)


def _check_pair(tokenizer: Tokenizer, prior: Prior) -> None:
    """Raise `ConfigurationError` if the prior was trained on latents of another tokenizer."""
    expected = prior.tokenizer_fingerprint
    if expected is not None and expected != tokenizer.fingerprint:
        raise ConfigurationError(
            f"the prior was trained on the latents of tokenizer {expected[:12]}, this one is "
            f"{tokenizer.fingerprint[:12]}: pair it with its own tokenizer, and change the "
            "precision with dtype= or cast()"
        )


def _components(tokenizer: Tokenizer, prior: Prior) -> Components:
    return Components(
        tokenizer=Tokenizer.registry.name_of(type(tokenizer)),
        prior=Prior.registry.name_of(type(prior)),
    )


def _as_output(images: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> the requested output type."""
    if output_type == "pil":
        return to_pil(images)
    unit = (images + 1) / 2
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()
