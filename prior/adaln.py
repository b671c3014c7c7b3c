"""adaLN modulation: a condition sets scale and shift of a block's layer norms, and the gates of its
residual branches (FiLM, 1709.07871; DiT, 2212.09748, section 3.2; VAR, 2404.02905).

With n(x) a layer norm without weights of its own and c the embedded condition,

    (scale, shift, gate) = linear(silu(c)),    x + gate * f(n(x) * (1 + scale) + shift).

DiT and VAR compute the same, but their published weights store the parts in different orders, and
their sums round differently; each keeps its own form here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
