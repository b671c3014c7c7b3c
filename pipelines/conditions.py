"""The inputs of a pipeline: the condition of every image, and the options of the prior.

label_ids        classes by name or number -> class labels
Conditions       the condition of each image of a call: class labels or captions
check_options    whether a prior's `sample` takes these options, before any work is done
"""

import difflib
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from smalti.config import nearest
from smalti.data.classes import class_number, shown
from smalti.errors import GenerationError
from smalti.prior.base import Prior
from smalti.prior.conditions.text import Condition, TextCondition

# -- class labels ---------------------------------------------------------------------------------

ClassLabels = int | str | Sequence[int | str] | Tensor


def integer(name: str, value: Any) -> int:
    """`value` as an int; 1.9, True and None are refused.

    Raises:
        GenerationError: it is not an integer.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise GenerationError(f"{name} is {value!r}; it must be an integer")


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


# -- conditions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """The condition of each image of a call."""

    labels: list[int] = field(default_factory=list)  # empty where captions are given
    captions: TextCondition | None = None

    def __len__(self) -> int:
        return len(self.labels) if self.captions is None else len(self.captions)

    def part(self, rows: slice, device: torch.device) -> Condition:
        """The conditions of some images, in the form that a prior takes."""
        if self.captions is None:
            return torch.tensor(self.labels[rows], dtype=torch.int64, device=device)
        return self.captions[rows].to(device)

    @classmethod
    def of_classes(cls, labels: ClassLabels, classes: Sequence[str], each: int) -> Self:
        """`each` images of every class, in the order of `labels`.

        Raises:
            GenerationError: there is no such class; `each` is not an integer; or there are no
                images to generate.
        """
        each = integer("num_images_per_prompt", each)
        found = [label for label in label_ids(labels, classes) for _ in range(each)]
        if not found:
            raise GenerationError(
                "no images were requested: pass at least one class, num_images_per_prompt >= 1"
            )
        return cls(found)

    @classmethod
    def of_captions(cls, features: Tensor, mask: Tensor | None, each: int) -> Self:
        """`each` images of every caption, in order.

        Args:
            features: (B, T, D), padded anywhere.
            mask: (B, T), nonzero at tokens; None where nothing is padding.

        Raises:
            GenerationError: `each` is not an integer, or there are no images to generate.
            SmaltiError: shapes or types are wrong, see `TextCondition`.
        """
        each = integer("num_images_per_prompt", each)
        if each < 1 or not len(features):
            raise GenerationError(
                "no images were requested: pass at least one caption, num_images_per_prompt >= 1"
            )
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return cls(captions=TextCondition.left_padded(features, mask.bool()).repeat(each))


# -- options of a prior's `sample` ----------------------------------------------------------------

FILLED_BY_PIPELINE = {"condition", "generator"}


class UnknownOption(GenerationError, TypeError):
    """A keyword that a prior's `sample` does not take."""


def check_names(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `UnknownOption` if `prior.sample` does not have one of these options."""
    known = set(inspect.signature(prior.sample).parameters) - FILLED_BY_PIPELINE
    for name in options:
        if name not in known:
            kind = Prior.registry.name_of(type(prior))
            raise UnknownOption(
                f'a {kind} prior has no sampling option "{name}"; {nearest(name, known)}'
            )


def check_options(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `SmaltiError` if `prior.sample` refuses an option; calls it with no conditions."""
    check_names(prior, options)
    prior.sample(prior.no_conditions(), **options)
