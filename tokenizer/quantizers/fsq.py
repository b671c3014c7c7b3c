"""Finite scalar quantization (FSQ, Mentzer et al., 2309.15505).

Each number of a feature is rounded to one of a few levels. There is no codebook and no loss.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from smalti.errors import ConfigurationError
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.base import (
    Quantized,
    Quantizer,
    as_maps,
    as_rows,
    straight_through,
)

MARGIN = 1e-3  # the bound lies this fraction beyond the outermost level
MAX_MARGIN = 0.25  # steps


@dataclass(frozen=True)
class FSQConfig(QuantizerConfig):
    """Levels; the paper's for about 2^16 codes are 8 8 8 5 5 5."""

    kind: Literal["fsq"] = "fsq"  # the kind of quantizer
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)  # per number; their product is the vocabulary

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ConfigurationError(
                f"levels is {self.levels}; give at least one level count, each 2 or more"
            )
        if (codes := math.prod(self.levels)) >= 2**31:
            raise ConfigurationError(
                f"levels {self.levels} make {codes} codes, too many: use fewer than 2^31"
            )


class FSQuantizer(Quantizer):
    """d numbers rounded to L_1 ... L_d levels and scaled to [-1, 1].

    The code is the mixed-radix number whose digits are the levels.
    """

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
        """Rows (N, d) of any magnitude -> numbers that round to the levels, one apart (app. A.1).

        f(z) = b tanh(z + atanh(o / b)) - o, with b a little above (L - 1) / 2. For an even L the
        offset o is 1/2, so that zero is one of the levels.
        """
        # The margin stays below half a step, or the outermost numbers of many levels would round
        # to levels that do not exist.
        half = (self.levels - 1) / 2
        bound = torch.minimum((self.levels - 1) * (1 + MARGIN) / 2, half + MAX_MARGIN)
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(rows + torch.atanh(offset / bound)) * bound - offset

    def _quantize(self, features: Tensor) -> Quantized:
        shape = (len(features), *features.shape[2:])  # B, h, w
        bounded = self.bounded(as_rows(features))  # (N, d)
        rounded = straight_through(bounded, bounded.round())
        return Quantized(
            latents=as_maps(rounded / self._half, *shape),
            codes=self._codes_of(rounded).view(len(features), -1),
        )

    def _codes_of(self, rounded: Tensor) -> Tensor:
        """Level numbers (N, d), centred on zero -> codes (N,)."""
        digits = rounded.detach().round().long() + self._half
        return (digits * self.radix).sum(-1)

    def _search(self, features: Tensor) -> Tensor:
        rounded = self.bounded(as_rows(features)).round()
        return self._codes_of(rounded).view(len(features), -1)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        digits = codes.flatten()[:, None] // self.radix % self.levels  # (N, d), from 0 to L - 1
        rows = (digits - self._half).float() / self._half
        return as_maps(rows, len(codes), height, width)
