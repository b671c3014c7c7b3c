"""No condition: an unconditional prior."""

from typing import Any, Self

import torch
from torch import Tensor

from smalti.errors import GenerationError
from smalti.prior.conditions.base import ConditionKind


class NoneKind(ConditionKind):
    """The value is labels (B,) of zeros, the null label of a prior without classes: its class table
    has one row."""

    @classmethod
    def of(cls, prior: Any, name: str) -> Self:
        del prior, name
        return cls()

    def check(self, value: object) -> None:
        """Raise `GenerationError` unless these are labels (B,) of zeros."""
        if not isinstance(value, Tensor) or value.ndim != 1 or value.dtype != torch.int64:
            raise GenerationError(
                "this prior is unconditional: give torch.zeros(B, dtype=torch.int64), a row for "
                f"each sample, not {_described(value)}"
            )
        if torch.compiler.is_compiling():  # a branch on values would break the graph
            return
        if value.any():
            raise GenerationError(
                f"class label {int(value[value != 0][0])} was given to an unconditional prior: "
                "give zeros"
            )

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=device)

    def null(self, value: Tensor) -> Tensor:
        return value

    @property
    def has_null(self) -> bool:
        """False: there is nothing to guide."""
        return False


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"
