"""Steps that must not be taken: their loss or their gradient is not finite on some process."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from smalti.errors import SmaltiError

logger = logging.getLogger(__name__)


class StepGuard:
    """Decides on every optimizer step, alike on all processes, and counts those refused.

    Args:
        limit: refused steps in a row, of one model, that end the run.
        sum_over_processes: of a tensor.
    """

    def __init__(self, limit: int, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        self.limit = limit
        self.in_a_row: dict[str, int] = {}  # by model
        self.total = 0
        self._sum = sum_over_processes
        self._losses: list[Tensor] = []

    def observe(self, loss: Tensor) -> None:
        """Remember the loss of a micro-batch, a scalar, until the step is decided on."""
        self._losses.append(loss.detach())

    def accepts(self, gradient_norm: Tensor) -> bool:
        """Whether losses and gradient are finite on all processes; every process must call this."""
        numbers = torch.stack([*(loss.float() for loss in self._losses), gradient_norm.float()])
        self._losses = []
        return self._sum((~numbers.isfinite()).sum()).item() == 0

    def count(self, gradient_norm: float, step: int, model: str) -> bool:
        """Whether a step of `model` was taken.

        Args:
            gradient_norm: what `Run.apply` returned.

        Raises:
            SmaltiError: too many in a row were not.
        """
        accepted = math.isfinite(gradient_norm)
        self.in_a_row[model] = 0 if accepted else self.in_a_row.get(model, 0) + 1
        self.total += not accepted
        if self.in_a_row[model] == 1:
            logger.warning("step %d of the %s is skipped: not finite", step, model)
        if self.in_a_row[model] >= self.limit:
            raise SmaltiError(
                f"the loss or the gradient of the {model} was not finite in {self.limit} steps in a"
                f" row, up to step {step}: lower --learning_rate or use --mixed_precision no; the"
                " last checkpoint is untouched"
            )
        return accepted

    def state(self) -> dict[str, Any]:
        """The counters, for state.json."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.in_a_row = dict(state.get("in_a_row", {}))
        self.total = int(state.get("total", 0))
