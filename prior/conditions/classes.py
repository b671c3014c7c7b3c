"""Class labels as a condition: one learned row for each class, and one for the null label."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from smalti.errors import ConfigurationError, GenerationError
from smalti.prior.conditions.base import ConditionKind


class ClassKind(ConditionKind):
    """Labels (B,) int64 in [0, num_classes); `num_classes` itself is the null label.

    Args:
        has_null: whether the null label has an embedding, see `Prior.class_table_has_null`.
    """

    WITHOUT_NULL: ClassVar[str] = (
        "was trained without class dropout and has no null class to guide against"
    )

    def __init__(self, num_classes: int, has_null: bool) -> None:
        self.num_classes, self._has_null = num_classes, has_null

    @classmethod
    def of(cls, prior: Any, name: str) -> Self:
        del name
        return cls(prior.num_classes, prior.class_table_has_null)

    @classmethod
    def check_config(cls, config: Any, used: bool, num_classes: int) -> None:
        """Raise `ConfigurationError` unless there are classes if they are used, and none if not."""
        given = f"num_classes is {num_classes}, but a prior with condition {config.condition} has"
        if used and num_classes < 1:
            raise ConfigurationError(f"{given} classes: give their number, or condition none")
        if not used and num_classes:
            raise ConfigurationError(f"{given} no classes: set it to 0")

    def check(self, value: Tensor) -> None:
        """Raise `GenerationError` unless labels are (B,) integers in [0, num_classes]."""
        if not isinstance(value, Tensor):
            raise GenerationError(f"labels are a {type(value).__name__}; give a tensor (B,) int64")
        if value.ndim != 1 or value.dtype not in (torch.int64, torch.int32):
            raise GenerationError(
                f"labels have shape {tuple(value.shape)} and type {value.dtype}; give (B,) int64"
            )
        if torch.compiler.is_compiling():  # a branch on values would break the graph
            return
        if not value.numel():
            return
        lowest, highest, null = int(value.min()), int(value.max()), self.num_classes
        if lowest < 0 or highest > null or (highest == null and not self.has_null):
            wrong = lowest if lowest < 0 else highest
            no_class = f", or {null} for no class" if self.has_null else ""
            raise GenerationError(
                f"class label {wrong} is out of range: use 0 to {null - 1}{no_class}"
            )

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=device)

    def null(self, value: Tensor) -> Tensor:
        return torch.full_like(value, self.num_classes)

    @property
    def has_null(self) -> bool:
        return self._has_null
