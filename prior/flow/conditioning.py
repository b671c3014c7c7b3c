"""What a denoising network is told beside its input: the time and the class."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PERIOD = 10000.0


def sinusoids(t: Tensor, size: int, shift: int = 0) -> Tensor:
    """cos(t w_i), then sin(t w_i), with w_i = 10000^(-i / (size / 2 - shift)): (B,) -> (B, size)
    fp32.

    The embedding of DDPM (2006.11239) as in guided diffusion and DiT (2212.09748), where shift is
    0; in DDPM's own code and in Diffusers' DiT it is 1. `t` is taken as it is: steps from 0 to 999
    in DiT, times from 0 to 1 in SiT (2401.08740).
    """
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """linear(silu(linear(sinusoids(t)))).

    Computed in fp32 whatever the precision of the model: the sinusoids of neighbouring times in
    [0, 1] differ by less than bf16 resolves.
    """

    def __init__(self, frequency_size: int, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, width)
        weight1, bias1, weight2, bias2 = self.mlp.parameters()
        with torch.autocast(t.device.type, enabled=False):
            waves = sinusoids(t, self.frequency_size, self.frequency_shift)
            hidden = F.linear(waves, weight1.float(), bias1.float())
            embedded = F.linear(F.silu(hidden), weight2.float(), bias2.float())
        return embedded.to(weight2.dtype)


class LabelEmbedder(nn.Module):
    """One learned row per class, and a last one, `num_classes`, for no class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:  # (B,) in [0, num_classes] -> (B, width)
        return self.embedding_table(labels)


class Modulation(nn.Sequential):
    """linear(silu(c)), cut into `parts` vectors, each (B, 1, width); zero in a new network."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:  # (B, width)
        return super().forward(input).unflatten(-1, (self.parts, 1, -1)).unbind(1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; x (B, N, width), the others (B, 1, width)."""
    return torch.addcmul(shift, x, 1 + scale)
