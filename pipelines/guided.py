"""A pipeline whose flow prior is guided by a classifier of noisy latents (Dhariwal and Nichol,
2105.05233, section 4)."""

import inspect
from pathlib import Path
from typing import Any, Self

import torch

from smalti.config import ImageSize
from smalti.data.latents import as_image_size, resolution
from smalti.errors import ConfigurationError, GenerationError
from smalti.pipelines.conditions import Conditions, Inputs, integer, sources_of
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.flow.classifier import LatentClassifier
from smalti.prior.flow.guidance import Classifier


class GuidedPipeline(Pipeline):
    """A pipeline, and a classifier that guides its samples to their classes.

    If the prior is unconditional, class labels are those of the classifier, and the prior does not
    get them. Otherwise classifier-free guidance (`guidance_scale`) applies as well.

    Args:
        scale: factor of the gradient of log p(label | x_t); 1 is Bayes' rule, more makes samples
            more typical of their class and less diverse.

    Raises:
        GenerationError: the prior is no flow, or takes other conditions than classes; the
            classifier was trained for other latents, another path or other classes.
    """

    def __init__(
        self, pipeline: Pipeline, classifier: LatentClassifier, scale: float = 1.0
    ) -> None:
        _check_prior(pipeline, classifier)
        super().__init__(pipeline.tokenizer, pipeline.prior, pipeline.classes)
        self._continue(pipeline)
        self.classifier = classifier.to(self.device).eval()
        self._guide = Classifier.of(self.classifier, scale)
        self.classes = pipeline.classes or classifier.classes

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the guidance, for the settings of a generation job."""
        return {"classifier": self.classifier.checksum, "classifier_scale": self._guide.scale}

    def conditions(self, inputs: Inputs, each: int) -> tuple[Conditions, dict[str, Any]]:
        """The conditions of the images, and the options of `sample` that guide them."""
        guide: dict[str, Any] = {"classifier": self._guide}
        if "class" in self.prior.condition_kinds:
            found, edit = super().conditions(inputs, each)
            return found, {**edit, **guide}
        if inputs.edits:
            raise GenerationError(
                "an image is edited towards a class by a prior that knows the classes, and this "
                "one is unconditional: leave image, mask_image and strength out"
            )
        inputs.check(sources_of(["class"], self.prior.config, self.classes), each)
        assert inputs.class_labels is not None
        each = integer("num_images_per_prompt", each)
        labels = [label for label in self.label_ids(inputs.class_labels) for _ in range(each)]
        if not labels:
            raise GenerationError(
                "no images were requested: pass at least one class, num_images_per_prompt >= 1"
            )
        found = Conditions(torch.zeros(len(labels), dtype=torch.int64), labels=labels)
        return found, {**guide, "classifier_labels": torch.tensor(labels)}

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Move all models, change the precision of tokenizer and prior, or both; return self."""
        super().to(device, dtype)
        self.classifier.to(self.device)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> None:
        """As of a pipeline; the classifier, which runs with the prior, stays on the accelerator."""
        super().enable_model_cpu_offload(device)
        self.classifier.to(self.device)

    def resized(self, image_size: ImageSize) -> Self:
        """Itself at its own size; another one is refused.

        Raises:
            GenerationError: the classifier was trained for latents of images of this size alone.
        """
        size = as_image_size(image_size)
        if size != self.tokenizer.image_size:
            raise GenerationError(
                f"image_size is {resolution(size)}, but the classifier is for latents of images "
                f"of {resolution(self.tokenizer.image_size)}: leave image_size out"
            )
        return self

    def save_pretrained(self, path: str | Path, **options: Any) -> Path:
        """Refused: pipeline and classifier are saved each by itself.

        Raises:
            ConfigurationError: always.
        """
        del options
        raise ConfigurationError(
            f"a guided pipeline is not saved in {path}: save the pipeline and the classifier, each "
            "in a folder of its own, with save_pretrained"
        )


def _check_prior(pipeline: Pipeline, classifier: LatentClassifier) -> None:
    """Raise `GenerationError` unless the classifier can guide the prior of the pipeline."""
    prior, ours, theirs = pipeline.prior, classifier.classes, pipeline.classes
    if "classifier" not in inspect.signature(prior.sample).parameters:
        kind = Prior.registry.name_of(type(prior))
        raise GenerationError(
            f"a classifier guides a flow prior, and this pipeline has a {kind} prior: leave the "
            "classifier out"
        )
    classifier.check_prior(prior.config)
    if "class" not in prior.condition_kinds:
        if prior.config.conditions:
            raise GenerationError(
                "a classifier guides a prior with classes or without conditions, and this one has "
                f"the condition {prior.config.condition}: leave the classifier out"
            )
        return
    if len(ours) != len(theirs):
        raise GenerationError(
            f"the classifier has {len(ours)} classes, and the pipeline {len(theirs)}: train a "
            "classifier on the latents of its prior"
        )
    # Names alone may differ: those of converted pipelines are not those of folders.
    for number, name in enumerate(ours):
        if name in theirs and theirs.index(name) != number:
            raise GenerationError(
                f'the class "{name}" has the label {number} for the classifier, and '
                f"{theirs.index(name)} for the pipeline: train a classifier on the latents of its "
                "prior"
            )
