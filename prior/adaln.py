"""adaLN modulation: a condition sets scale and shift of a block's layer norms, and the gates of its
residual branches (FiLM, 1709.07871; DiT, 2212.09748, section 3.2; VAR, 2404.02905).

With n(x) a layer norm without weights of its own and c the embedded condition,

    (scale, shift, gate) = linear(silu(c)),    x + gate * f(n(x) * (1 + scale) + shift).

DiT and VAR compute the same, but their published weights store the parts in different orders, and
their sums round differently; each keeps its own form here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.prior.conditions.base import Condition, count
from smalti.prior.conditions.text import Embedded, KeysValues

Parts = tuple[Tensor, ...]  # scales, shifts and gates, each (B, 1, width): the same for all tokens

MODULATION_INIT = 0.5  # VAR: factor on the initial weights of scales and shifts


class Modulation(nn.Sequential):
    """linear(silu(c)), split into `parts` tensors (B, 1, width)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, input: Tensor) -> Parts:  # (B, width)
        return super().forward(input).unflatten(-1, (self.parts, 1, -1)).unbind(1)


# -------------------------------------------------------------------------------------------------
# DiT. In a new network its modulations are zero ("adaLN-zero", initialised in prior/flow/dit.py):
# every block is the identity.


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; x (B, T, width), shift and scale (B, 1, width)."""
    return torch.addcmul(shift, x, 1 + scale)


# -------------------------------------------------------------------------------------------------
# VAR. Module names are VAR's.


def adaptive_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """n(x) (1 + scale) + shift; x (B, T, width), scale and shift (B, 1, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class HeadNorm(nn.Module):
    """The norm before the output layer; the parts of its modulation are scale and shift."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = Modulation(width, 2)

    def modulation(self, embedded: Tensor) -> Parts:  # (B, width)
        """Scale and shift from class embeddings. A method, as in a block: FSDP2 gathers the weights
        of a module only while one of its own methods runs."""
        return self.ada_lin(embedded)

    def forward(self, x: Tensor, modulation: Parts) -> Tensor:  # (B, T, width), returned in fp32
        scale, shift = modulation
        return adaptive_norm(x.float(), scale, shift, self.eps)


def shared_modulation(shared: Parts, offsets: Tensor) -> Parts:
    """VAR's shared variant: the modulation of a block is one projection that all blocks share, plus
    learned offsets (1, 1, parts, width) of the block. It saves a third of the parameters."""
    return tuple(part + own for part, own in zip(shared, offsets.unbind(2), strict=True))


def initialise_modulation(parts: Tensor, gate_init: float) -> None:
    """Shrink the initial weights of a block's modulation, whose first dimension is the parts: the
    two gates by gate_init, so that a new block hardly changes its input, scales and shifts by
    `MODULATION_INIT`."""
    with torch.no_grad():
        parts[:2] *= gate_init
        parts[2:] *= MODULATION_INIT


@dataclass
class Modulations:
    """The modulations of all norms and gates of a model, from one batch of conditions."""

    blocks: list[Parts]
    head: Parts

    def first(self, rows: int) -> "Modulations":
        """The modulations of the first rows of the batch."""
        blocks = [tuple(part[:rows] for part in parts) for parts in self.blocks]
        return Modulations(blocks, tuple(part[:rows] for part in self.head))


# -------------------------------------------------------------------------------------------------
# What a DiT computes from conditions and times alone, kept while a sample is drawn.
#
# A sampler evaluates the network at many times under the same conditions. Classes and captions are
# embedded once, and so are the keys and values of a caption. Modulations depend on the time as
# well; where a solver's times are the same for all samples and known in advance, those of many
# steps are one matrix product, which reads their weights once: a third of the weights of a DiT.

# Rows (times x conditions) of such a product: enough to use a processor well, and 50 MB for DiT-XL.
KEPT_ROWS = 64


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
        kept: Conditioning | None = self._kept
        if kept is None:
            kept = self._kept = self.network.conditioning(self.condition, keep_text=True)
        assert kept is not None
        if len(times) != 1:
            return kept
        time = times.item()
        if time not in self._steps:
            self._steps = self._modulations(time)
        return replace(kept, modulations=self._steps[time])

    def _modulations(self, time: float) -> dict[float, tuple[Parts, ...]]:
        """Those at a time, and at as many of the next times as one product is made for."""
        assert self._kept is not None
        rows, coming = count(self.condition), [time]
        if time in self.times:
            coming = list(dict.fromkeys(self.times[self.times.index(time) :]))
            coming = coming[: max(1, KEPT_ROWS // rows)]
        vector = self._kept.embedded.vector  # (B, width)
        steps = torch.tensor(coming, dtype=torch.float64).to(vector.device, torch.float32)
        c = (self.network.t_embedder(steps)[:, None] + vector).flatten(0, 1)  # (steps B, width)
        of_steps = [
            zip(*(part.unflatten(0, (-1, rows)).unbind(0) for part in parts), strict=True)
            for parts in self.network.modulations(c)
        ]
        return dict(zip(coming, zip(*of_steps, strict=True), strict=True))
