"""Finite scalar quantization: every number is rounded to one of a few levels; no codebook, no loss
(Mentzer et al., 2309.15505)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.randomness import RandomInputs
from smalti.tokenizer.quantizers.base import (
    Quantized,
    Quantizer,
    as_maps,
    as_rows,
    straight_through,
)

EDGE = 1e-3  # the bound reaches this much beyond the outermost level


@dataclass(frozen=True)
class FSQConfig:
    """The paper's levels for about 2^16 codes: 8 * 8 * 8 * 5 * 5 * 5."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)  # per number; their product is the vocabulary

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise SmaltiError(f"levels is {self.levels}; give at least one number, each 2 or more")
        if math.prod(self.levels) >= 2**31:
            raise SmaltiError(f"levels {self.levels} make {math.prod(self.levels)} codes: too many")


class FSQuantizer(Quantizer):
    """d numbers rounded to L_1 ... L_d levels, scaled to [-1, 1]; the code is their mixed-radix
    number."""

    Config: ClassVar[type] = FSQConfig

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.config = config
        levels = torch.tensor(config.levels)
        radix = torch.cat([torch.ones(1, dtype=torch.long), levels.cumprod(0)[:-1]])
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("radix", radix, persistent=False)
        self.levels: Tensor
        self.radix: Tensor

    @property
    def vocab_size(self) -> int:
        return math.prod(self.config.levels)

    @property
    def dim(self) -> int:
        return len(self.config.levels)

    @property
    def _half(self) -> Tensor:
        """Steps from the middle level to the outermost, L // 2, (d,)."""
        return self.levels // 2

    def bounded(self, rows: Tensor) -> Tensor:
        """Rows (N, d) of any size -> numbers that round to the levels, one unit apart (eq. 1).

        An even number of levels is centred between two of them, so zero lies on a level.
        """
        reach = (self.levels - 1) * (1 + EDGE) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(rows + torch.atanh(offset / reach)) * reach - offset

    def _quantize(self, features: Tensor, random_inputs: RandomInputs | None) -> Quantized:
        del random_inputs
        shape = (len(features), *features.shape[2:])
        bounded = self.bounded(as_rows(features))
        rounded = straight_through(bounded, bounded.round())
        return Quantized(
            latents=as_maps(rounded / self._half, *shape),
            codes=self._number(rounded).view(len(features), -1),
        )

    def _number(self, rounded: Tensor) -> Tensor:
        """Level numbers (N, d), centred on zero -> codes (N,)."""
        digits = rounded.detach().round().long() + self._half
        return (digits * self.radix).sum(-1)

    def _search(self, features: Tensor) -> Tensor:
        rounded = self.bounded(as_rows(features)).round()
        return self._number(rounded).view(len(features), -1)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        digits = codes.flatten()[:, None] // self.radix % self.levels
        rows = (digits - self._half).float() / self._half
        return as_maps(rows, len(codes), height, width)
