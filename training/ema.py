"""Exponential moving average (EMA) of a model's weights: the weights that are saved and sampled.

Written here instead of torch's `AveragedModel` or Diffusers' `EMAModel`: it averages the shards of
a model under FSDP2 and gathers them on one process, and its state is a flat dict with the names of
the model.
"""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from smalti.training.checkpoint import full_tensor, is_sharded, sharded_like

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """theta_ema <- d theta_ema + (1 - d) theta, with d = min(decay, (1 + n) / (10 + n)), n updates.

    The warm-up of d quickly removes the random initial weights from the average. Buffers (an EMA
    codebook, counters) are copied, not averaged. `model` is the averaged module, in eval mode,
    ready to use.

    If the model is sharded after this object was created (FSDP2), so is the average: then `gather`
    updates `model` on process 0, and the other processes keep no full copy of it.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self._shards: list[Tensor] = []

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Move the average towards `model`; call once after every accepted optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, current in zip(self._averages(model), model.parameters(), strict=True):
            average.lerp_(current, 1 - decay)
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current)

    @torch.no_grad()
    def gather(self) -> None:
        """Update `model` on process 0; every process must call this."""
        for average, shard in zip(self.model.parameters(), self._shards, strict=False):
            average.copy_(full_tensor(shard))

    def _averages(self, model: Model) -> list[Tensor]:
        """The tensors that this process averages: all parameters, or its shards of them."""
        if not is_sharded(model):
            return list(self.model.parameters())
        if not self._shards:
            pairs = zip(self.model.parameters(), model.parameters(), strict=True)
            self._shards = [sharded_like(average, current).clone() for average, current in pairs]
            if torch.distributed.get_rank() > 0:
                self.model.to("meta")
        return self._shards

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged model as a flat dict; every process of a sharded run must call this."""
        self.gather()
        return {**self.model.state_dict(), "ema.updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; before the first update."""
        state = dict(state)
        self.updates = int(state.pop("ema.updates"))
        self.model.load_state_dict(state)
