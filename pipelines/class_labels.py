"""Classes as the condition of a pipeline, or none.

label_ids      classes by name or number -> class labels
ClassSource    classes
Unconditional  no condition: a number of images
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.data.classes import class_number, shown
from smalti.data.latent_cache.cache import LatentBatch
from smalti.data.latent_cache.on_the_fly import Latents
from smalti.errors import ConfigurationError, GenerationError
from smalti.pipelines.conditions import ClassLabels, ConditionSource, Inputs, integer, refuse_none
from smalti.prior.conditions.base import ConditionKind
from smalti.prior.conditions.classes import ClassKind
from smalti.prior.conditions.none import NoneKind


def label_ids(class_labels: ClassLabels, classes: Sequence[str]) -> list[int]:
    """The labels of one or several classes, each given by its name or its number.

    Text is looked up as a name, in any Unicode form of its letters; it is read as a number only if
    no class name is a number.

    Raises:
        GenerationError: there is no such class (the message lists similar names), or a label is
            neither a name nor a number.
    """
    if isinstance(class_labels, Tensor):
        class_labels = class_labels.flatten().tolist()
    if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
        class_labels = [class_labels]
    return [_label_id(label, classes) for label in class_labels]


def _label_id(label: int | str, classes: Sequence[str]) -> int:
    if isinstance(label, str):
        if (number := class_number(label, classes)) is not None:
            return number
        if not label.isdecimal() or any(name.isdecimal() for name in classes):
            near = difflib.get_close_matches(label, classes, n=3, cutoff=0.3) or classes[:10]
            raise GenerationError(
                f"no class is named {shown(label)}; known are for example {', '.join(near)}"
            )
        label = int(label)
    number = integer("class label", label)
    if not 0 <= number < len(classes):
        named = f', or "{number}", the name of a class' if str(number) in classes else ""
        raise GenerationError(
            f"class label {number} is out of range: use 0 to {len(classes) - 1}{named}"
        )
    return number


class ClassSource(ConditionSource):
    """The labels of a data set; `class_labels` of a call."""

    Kind: ClassVar[type[ConditionKind]] = ClassKind
    ARGUMENTS: ClassVar[tuple[str, ...]] = ("class_labels",)
    FLAGS: ClassVar[tuple[str, ...]] = ("class_labels", "class_weights")
    HAS_NAMES: ClassVar[bool] = True

    @classmethod
    def prior_options(cls, options: Any, latents: Latents, condition: str) -> None:
        """Nothing: the number of classes is that of the latents.

        Raises:
            ConfigurationError: they have none.
        """
        del options
        if not latents.classes:
            others = "+".join(kind for kind in condition.split("+") if kind != "class")
            raise ConfigurationError(
                f"condition is {condition}, but the pictures of {latents.place} have no classes: "
                f"give --condition {others or 'none'}"
            )

    def of_batch(self, batch: LatentBatch) -> Tensor:
        return batch.labels

    def is_needed(self, kinds: Iterable[str]) -> bool:
        """No class may be given where a picture is."""
        return "image" not in kinds

    def of_call(self, inputs: Inputs) -> Tensor:
        """The labels (B,); the null label without classes."""
        null = [self.config.num_classes]
        labels = null if inputs.class_labels is None else self.rows(inputs)
        return torch.tensor(labels, dtype=torch.int64)

    def rows(self, inputs: Inputs) -> list[int]:
        given = inputs.class_labels
        return [] if given is None else label_ids(given, self.classes)

    def chosen(self, options: Any) -> list[int]:
        """The classes of --class_labels, or all."""
        return label_ids(options.class_labels or range(len(self.classes)), self.classes)

    @property
    def example(self) -> str:
        return f"class_labels=[{self.classes[0]!r}]"

    @property
    def in_words(self) -> str:
        return f"Classes: {', '.join(self.classes)}."


class Unconditional(ConditionSource):
    """No condition: `num_images` of a call."""

    Kind: ClassVar[type[ConditionKind]] = NoneKind
    ARGUMENTS: ClassVar[tuple[str, ...]] = ("num_images",)
    HAS_NAMES: ClassVar[bool] = True

    def of_batch(self, batch: LatentBatch) -> Tensor:
        return torch.zeros_like(batch.labels)

    def is_needed(self, kinds: Iterable[str]) -> bool:
        """Without a number there is one image."""
        return False

    def check(self, inputs: Inputs, each: int) -> None:
        """Raise `GenerationError` if images are requested as of a prompt."""
        if each != 1:
            raise GenerationError(
                "num_images_per_prompt is for prompts and classes, and this pipeline is "
                "unconditional: pass num_images"
            )

    def of_call(self, inputs: Inputs) -> Tensor:
        """Labels (B,) of zeros."""
        wanted = 1 if inputs.num_images is None else integer("num_images", inputs.num_images)
        refuse_none(wanted, "num_images >= 1")
        return torch.zeros(wanted, dtype=torch.int64)
