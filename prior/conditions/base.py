"""What all conditions of a prior share: a batch of them as values with rows, and the kinds.

A batch of conditions is one of

    labels (B,) int64                    classes, or no condition            classes.py, none.py
    TextCondition                        captions                            text.py
    ImageCondition                       pictures                            image.py
    Combination({"class": ..., ...})     several kinds, by name

`count`, `rows`, `joined`, `repeated` and `moved` work on any of them. A `ConditionKind` is what a
prior knows about one kind: which values fit, what stands for "no condition", and how a condition is
dropped in training (classifier-free guidance, 2207.12598). A kind of one's own is a `VectorKind`,
which all priors take.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from smalti.errors import GenerationError
from smalti.prior.conditions.registry import CONDITIONS

# Labels, a frozen dataclass of tensors with a row for each sample, or a `Combination`.
Condition = Any


@dataclass(frozen=True, eq=False)
class Combination:
    """Conditions of several kinds for the same samples, by the name of the kind.

    Raises:
        GenerationError: the kinds have different numbers of rows.
    """

    parts: Mapping[str, Condition]

    def __post_init__(self) -> None:
        counts = {name: count(part) for name, part in self.parts.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{number} of {name}" for name, number in counts.items())
            raise GenerationError(
                f"a combination has conditions for different numbers of samples ({listed}): give "
                "one of each kind for every sample"
            )


def _tensors(value: Condition) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Combination):
        for part in value.parts.values():
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _mapped(function: Callable[..., Tensor], *values: Condition) -> Condition:
    """The same kind of value, whose tensors are the function of the tensors of all values."""
    first: Any = values[0]
    if isinstance(first, Combination):
        return Combination(
            {name: _mapped(function, *(v.parts[name] for v in values)) for name in first.parts}
        )
    if is_dataclass(first):
        return type(first)(
            *(_mapped(function, *(getattr(v, f.name) for v in values)) for f in fields(first))
        )
    return None if first is None else function(*values)


def count(value: Condition) -> int:
    """The number of samples B."""
    return len(next(_tensors(value)))


def rows(value: Condition, chosen: slice | Tensor) -> Condition:
    """The conditions of some samples."""
    return _mapped(lambda tensor: tensor[chosen], value)


def joined(*values: Condition) -> Condition:
    """Conditions of the same kinds one after the other."""
    return _mapped(lambda *tensors: torch.cat(tensors), *values)


def repeated(value: Condition, each: int) -> Condition:
    """Every condition `each` times, copies next to each other."""
    return _mapped(lambda tensor: tensor.repeat_interleave(each, 0), value)


def moved(value: Condition, device: torch.device | str) -> Condition:
    """The same conditions on another device."""
    return _mapped(lambda tensor: tensor.to(device), value)


def where(which: Tensor, first: Condition, second: Condition) -> Condition:
    """The rows of the first value where `which` (B,) bool is True, else those of the second."""

    def choose(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(which.view(-1, *[1] * (ours.ndim - 1)), ours, theirs)

    return _mapped(choose, first, second)


def part_of(value: Condition, kind: str) -> Condition:
    """The condition of one kind: that of a combination, or the value itself."""
    return value.parts[kind] if isinstance(value, Combination) else value


class ConditionKind(ABC):
    """One kind of condition of a prior: which values fit, its null, and how it is dropped."""

    WITHOUT_NULL: ClassVar[str] = ""  # why a prior that could have a null has none, in words

    @classmethod
    @abstractmethod
    def of(cls, prior: Any, name: str) -> "ConditionKind":
        """This kind of a `Prior`, in which it has this name."""

    @classmethod
    def check_config(cls, config: Any, used: bool, num_classes: int) -> None:
        """Raise `ConfigurationError` unless the fields of a `PriorConfig` fit.

        Args:
            used: whether this kind is among its conditions.
        """
        del config, used, num_classes

    @abstractmethod
    def check(self, value: Condition) -> None:
        """Raise `GenerationError` unless the prior takes this value."""

    @abstractmethod
    def empty(self, device: torch.device) -> Condition:
        """A value for no samples."""

    @abstractmethod
    def null(self, value: Condition) -> Condition:
        """The null condition for as many samples; the value itself if this kind has none."""

    @property
    def has_null(self) -> bool:
        """Whether a sample without this condition differs from one with it."""
        return True

    def dropped(self, value: Condition, which: Tensor) -> Condition:
        """The value, with the null condition in the rows where `which` (B,) bool is True."""
        return where(which, self.null(value), value)


class VectorKind(nn.Module, ConditionKind):
    """A kind of condition that is embedded as one vector. All priors take it: they add the vector
    to the row of the class table, which is the prefix of a next-token prior and what modulates the
    blocks of the others (adaLN).

    Args:
        width: channels of the prior.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @classmethod
    def of(cls, prior: Any, name: str) -> Self:
        """The module of the prior."""
        return prior.vectors[name]

    @abstractmethod
    def forward(self, value: Condition) -> Tensor:
        """The vectors (B, width) of conditions, also of null ones."""


def vector_kinds(conditions: Iterable[str], width: int) -> nn.ModuleDict:
    """New embeddings of those of a prior's conditions that are `VectorKind`s, by name."""
    kinds = {name: CONDITIONS.resolve(name) for name in conditions}
    vectors = {name: kind for name, kind in kinds.items() if issubclass(kind, VectorKind)}
    return nn.ModuleDict({name: kind(width) for name, kind in vectors.items()})


def with_vectors(row: Tensor, vectors: nn.ModuleDict, condition: Condition) -> Tensor:
    """Rows of a class table (B, width), and what the `vector_kinds` add to them."""
    for name, kind in vectors.items():
        row = row + kind(part_of(condition, name))
    return row
