"""What the network computes from conditions and times alone, kept while a sample is drawn.

A sampler evaluates the network at many times under the same conditions. Classes and captions are
embedded once, and so are the keys and values of a caption. adaLN modulations depend on the time as
well; where a solver's times are the same for all samples and known in advance, the modulations of
many steps are one matrix product, which reads their weights once: a third of the weights of a DiT.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smalti.prior.adaln import Parts
from smalti.prior.conditions.base import Condition, count
from smalti.prior.conditions.text import Embedded, KeysValues

# Rows (times x conditions) of a product of modulations: enough to use a processor well, and 50 MB
# for DiT-XL.
ROWS = 64


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a DiT has computed from a batch of B conditions."""

    condition: Condition
    embedded: Embedded
    # Of the caption, for each block; (): there is none, or they are computed in the block.
    keys_values: tuple[KeysValues, ...] = ()
    # Of each block and of the final layer, at the time of the pass; (): computed from the time.
    modulations: tuple[Parts, ...] = ()


@dataclass(eq=False)
class KeptConditions:
    """A batch of B conditions that a network is given at many times.

    Args:
        times: the network's times that are known in advance, in their order.
    """

    network: Any  # a `DiT`
    condition: Condition
    times: Sequence[float] = ()
    _kept: Conditioning | None = None
    _steps: dict[float, tuple[Parts, ...]] = field(default_factory=dict)

    def at(self, times: Tensor) -> Conditioning:
        """The conditioning at times (B,) of the network, or at one for all, (1,)."""
        if self._kept is None:
            self._kept = self.network.conditioning(self.condition, keep_text=True)
        if len(times) != 1:
            return self._kept
        time = times.item()
        if time not in self._steps:
            self._steps = self._modulations(time)
        return replace(self._kept, modulations=self._steps[time])

    def _modulations(self, time: float) -> dict[float, tuple[Parts, ...]]:
        """Those at a time, and at as many of the next times as one product is made for."""
        assert self._kept is not None
        rows, coming = count(self.condition), [time]
        if time in self.times:
            coming = list(dict.fromkeys(self.times[self.times.index(time) :]))
            coming = coming[: max(1, ROWS // rows)]
        vector = self._kept.embedded.vector  # (B, width)
        steps = torch.tensor(coming, dtype=torch.float64).to(vector.device, torch.float32)
        c = (self.network.t_embedder(steps)[:, None] + vector).flatten(0, 1)  # (steps B, width)
        of_steps = [
            zip(*(part.unflatten(0, (-1, rows)).unbind(0) for part in parts), strict=True)
            for parts in self.network.modulations(c)
        ]
        return dict(zip(coming, zip(*of_steps, strict=True), strict=True))
