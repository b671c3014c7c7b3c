"""Tokenizer and prior as one object: labels in, pictures out."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from smalti.data.image_io import to_pil
from smalti.errors import SmaltiError
from smalti.files import write_json
from smalti.hub import resolve_folder
from smalti.pipelines.card import model_card
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

FORMAT_VERSION = 1
INDEX = "model_index.json"

OutputType = Literal["pil", "np", "pt", "latent"]
Generators = torch.Generator | Sequence[torch.Generator] | None
ClassLabels = int | str | Sequence[int | str] | Tensor


@dataclass
class PipelineOutput:
    """What a pipeline returns."""

    images: Any  # "pil": list; "np": (B, H, W, 3) in [0, 1]; "pt": (B, 3, H, W) in [0, 1]; or None
    latents: Tensor  # what the prior sampled
    labels: list[int]  # class of each image


class Pipeline:
    """A tokenizer and a prior that belong together, with the names of the classes.

    Raises:
        SmaltiError: the specs differ, the prior was trained on latents of another tokenizer, or
            the number of names is not the prior's number of classes.
    """

    def __init__(self, tokenizer: Tokenizer, prior: Prior, classes: Sequence[str]) -> None:
        if tokenizer.spec != prior.spec:
            raise SmaltiError(
                f"the tokenizer makes {tokenizer.spec}, the prior models {prior.spec}: "
                "they do not belong together"
            )
        expected = prior.tokenizer_fingerprint
        if expected is not None and expected != tokenizer.fingerprint:
            raise SmaltiError(
                f"the prior was trained on the latents of tokenizer {expected[:12]}, "
                f"this one is {tokenizer.fingerprint[:12]}: pair it with its own tokenizer"
            )
        if len(classes) != prior.num_classes:
            raise SmaltiError(
                f"{len(classes)} class names were given; the prior has {prior.num_classes} classes"
            )
        self.tokenizer = tokenizer.eval()
        self.prior = prior.eval()
        self.classes = tuple(classes)

    # -- loading and saving -------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a folder written by `save_pretrained`, or a model repository on the Hub.

        A local folder never touches the network. Only JSON and safetensors are read.

        Raises:
            SmaltiError: nothing there, or a file is missing, damaged or does not fit.
        """
        folder = resolve_folder(
            path_or_hub_id, revision=revision, token=token, local_files_only=local_files_only
        )
        index = _read_index(folder)
        tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
        prior = Prior.from_pretrained(folder / "prior")
        return cls(tokenizer, prior, index["classes"]).to(device, dtype)

    def save_pretrained(
        self, path: str | Path, *, samples: Image.Image | None = None, notes: str = ""
    ) -> Path:
        """Write tokenizer/, prior/, a model card, and last `model_index.json`.

        Args:
            samples: a grid of samples for the card, saved as samples.png.
            notes: Markdown to stand in the card, for example measured numbers.

        Raises:
            SmaltiError: `path` exists and holds something that is not a pipeline.
        """
        folder = Path(path)
        if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
            raise SmaltiError(f"{folder} exists and is not a pipeline: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.prior.save_pretrained(folder / "prior")
        if samples is not None:
            samples.save(folder / "samples.png")
        card = model_card(self.tokenizer, self.prior, self.classes, samples is not None, notes)
        (folder / "README.md").write_text(card)
        index = {
            "_class_name": "Pipeline",
            "format_version": FORMAT_VERSION,
            "components": {
                "tokenizer": Tokenizer.registry.name_of(type(self.tokenizer)),
                "prior": Prior.registry.name_of(type(self.prior)),
            },
            "classes": list(self.classes),
        }
        write_json(folder / INDEX, index)
        return folder

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
        from smalti.hub import upload

        return upload(
            self.save_pretrained,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move both models; returns self."""
        self.tokenizer.to(device=device, dtype=dtype)
        self.prior.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        output_type: OutputType = "pil",
        batch_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> PipelineOutput:
        """Sample pictures of the given classes.

        Args:
            class_labels: a class, or several, by number or name; each gives
                `num_images_per_prompt` pictures, in order.
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass.
            generator: one generator, or a list with one per picture; with a list, picture i does
                not depend on its neighbours or on `batch_size`.
            output_type: "pil", "np", "pt" or "latent" (nothing is decoded).
            batch_size: pictures sampled at once; None takes all at once.
            options: what the prior's `sample` takes: `temperature`, `top_k`, ...

        Raises:
            SmaltiError: an unknown class or output type, or a wrong number of generators.
        """
        labels = self.label_ids(class_labels)
        labels = [label for label in labels for _ in range(num_images_per_prompt)]
        if output_type not in get_args(OutputType):
            raise SmaltiError(
                f'output_type is "{output_type}"; choose one of {", ".join(get_args(OutputType))}'
            )
        if batch_size is not None and batch_size < 1:
            raise SmaltiError(f"batch_size is {batch_size}; it must be at least 1")
        if not labels:
            raise SmaltiError("no pictures were asked for: give a class and at least one per class")
        if _is_list(generator) and len(generator) != len(labels):
            raise SmaltiError(
                f"{len(generator)} generators were given for {len(labels)} pictures: give one each"
            )
        chunk = batch_size or len(labels)
        latents, images = [], []
        for start in tqdm(range(0, len(labels), chunk), disable=not progress, unit="batch"):
            part = slice(start, start + chunk)
            condition = torch.tensor(labels[part], device=self.device)
            drawn = self.prior.sample(
                condition,
                guidance_scale=guidance_scale,
                generator=generator[part] if _is_list(generator) else generator,
                **options,
            )
            latents.append(drawn)
            if output_type != "latent":
                images.append(self.tokenizer.decode(drawn).float().clamp(-1, 1).cpu())
        decoded = _as_output(torch.cat(images), output_type) if images else None
        return PipelineOutput(decoded, torch.cat(latents), labels)

    def label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class numbers of numbers or names.

        Raises:
            SmaltiError: no such class; the message lists near names.
        """
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.flatten().tolist()
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, str):
            if label in self.classes:
                return self.classes.index(label)
            near = difflib.get_close_matches(label, self.classes, n=3, cutoff=0.3) or self.classes
            raise SmaltiError(
                f'no class is named "{label}"; known are for example {", ".join(near)}'
            )
        number = int(label)
        if not 0 <= number < len(self.classes):
            raise SmaltiError(
                f"class label {number} is out of range: use 0 to {len(self.classes) - 1}"
            )
        return number


def _is_list(generator: Generators) -> TypeGuard[Sequence[torch.Generator]]:
    return generator is not None and not isinstance(generator, torch.Generator)


def _as_output(images: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> what the caller asked for."""
    if output_type == "pil":
        return to_pil(images)
    unit = (images + 1) / 2
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise SmaltiError(f"{folder} has no {INDEX}: it is not a saved pipeline")
    try:
        index = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SmaltiError(f"{path} is damaged: {error}") from error
    classes = index.get("classes") if isinstance(index, dict) else None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise SmaltiError(f"{path} has no list of class names: it is not a smalti pipeline")
    if index.get("format_version") != FORMAT_VERSION:
        raise SmaltiError(
            f"{path} has format {index.get('format_version')}; this smalti reads {FORMAT_VERSION}"
        )
    return index
