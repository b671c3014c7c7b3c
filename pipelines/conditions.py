"""What the pictures of one call are of: classes, or captions as a text encoder gives them."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from smalti.config import nearest
from smalti.errors import SmaltiError
from smalti.pipelines.labels import ClassLabels, label_ids, whole_number
from smalti.prior.base import Prior
from smalti.prior.conditions.text import Condition, TextCondition

# -------------------------------------------------------------------------------------------------
# The options of a prior's `sample`, checked before any work is done or any folder is claimed.

OUR_OWN = {"condition", "generator"}  # parameters of `sample` that a pipeline fills


class UnknownOption(SmaltiError, TypeError):
    """A keyword that a prior's `sample` does not take."""


def check_names(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `UnknownOption` if `prior.sample` has no option of a name."""
    known = set(inspect.signature(prior.sample).parameters) - OUR_OWN
    for name in options:
        if name not in known:
            kind = Prior.registry.name_of(type(prior))
            raise UnknownOption(
                f'a {kind} prior is not sampled with the option "{name}"; {nearest(name, known)}'
            )


def check_options(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `SmaltiError` if `prior.sample` would refuse an option: it is asked for no samples."""
    check_names(prior, options)
    prior.sample(prior.no_conditions(), **options)


# -------------------------------------------------------------------------------------------------
# What the pictures of one call are of: classes, or captions as a text encoder gives them.


@dataclass(frozen=True)
class Conditions:
    """The condition of each picture."""

    labels: list[int] = field(default_factory=list)  # classes; empty where captions are given
    captions: TextCondition | None = None

    def __len__(self) -> int:
        return len(self.labels) if self.captions is None else len(self.captions)

    def part(self, rows: slice, device: torch.device) -> Condition:
        """Those of some pictures, as a prior takes them."""
        if self.captions is None:
            return torch.tensor(self.labels[rows], dtype=torch.int64, device=device)
        return self.captions[rows].to(device)

    @classmethod
    def of_classes(cls, labels: ClassLabels, classes: Sequence[str], each: int) -> Self:
        """`each` pictures of every class that is named, in order.

        Raises:
            SmaltiError: no such class; `each` is no whole number, or nothing is asked for.
        """
        each = whole_number("num_images_per_prompt", each)
        found = [label for label in label_ids(labels, classes) for _ in range(each)]
        if not found:
            raise SmaltiError("no pictures were asked for: give a class and at least one per class")
        return cls(found)

    @classmethod
    def of_captions(cls, features: Tensor, mask: Tensor | None, each: int) -> Self:
        """`each` pictures of every caption, in order.

        Args:
            features: (B, T, D), padded anywhere.
            mask: (B, T), not 0 at tokens; None where nothing is padding.

        Raises:
            SmaltiError: shapes or types are wrong; nothing is asked for.
        """
        each = whole_number("num_images_per_prompt", each)
        if each < 1 or not len(features):
            raise SmaltiError("no pictures were asked for: give a caption and at least one for it")
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return cls(captions=TextCondition.left_padded(features, mask.bool()).repeat(each))
