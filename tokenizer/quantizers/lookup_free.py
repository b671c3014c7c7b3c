"""Lookup-free quantization: the signs of d numbers are the d bits of a code.

LFQ (MAGVIT-v2, 2310.05737) takes the signs of the features, binary spherical quantization (BSQ,
2406.07548) those of the features scaled to unit length.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.distributed import mean_over_processes
from smalti.errors import ConfigurationError
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.base import (
    Quantized,
    Quantizer,
    as_maps,
    as_rows,
    entropy,
    straight_through,
)

MAX_GROUP_BITS = 12  # 2^12 joint probabilities per feature


@dataclass(frozen=True)
class LookupFreeConfig(QuantizerConfig):
    """Bits and losses; MAGVIT-v2 has 18 bits, which are 2^18 codes."""

    # May change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "commitment_weight",
        "entropy_weight",
        "entropy_diversity",
        "entropy_temperature",
        "group_bits",
    )

    kind: Literal["lookup-free"] = "lookup-free"  # the kind of quantizer
    bits: int = 18  # numbers per feature; 2^bits codes
    spherical: bool = False  # quantize unit vectors: codes are +-1/sqrt(d), the error is bounded
    commitment_weight: float = 0.25  # of the distance of features to their codes
    entropy_weight: float = 0.1  # of the entropy loss, which rewards using all codes
    entropy_diversity: float = 1.0  # gamma: weight of the batch's entropy relative to a feature's
    entropy_temperature: float = 0.01  # T in softmax(-distance / T)
    # Bits whose joint distribution enters the batch's entropy; groups count as independent.
    group_bits: int = 9

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 30:
            raise ConfigurationError(f"bits is {self.bits}; use 1 to 30")
        if not 1 <= self.group_bits <= MAX_GROUP_BITS:
            raise ConfigurationError(f"group_bits is {self.group_bits}; use 1 to {MAX_GROUP_BITS}")
        if min(self.commitment_weight, self.entropy_weight, self.entropy_diversity) < 0:
            raise ConfigurationError(
                "commitment_weight, entropy_weight and entropy_diversity must not be negative"
            )
        if self.entropy_temperature <= 0:
            raise ConfigurationError(
                f"entropy_temperature is {self.entropy_temperature}; it must be positive"
            )


def joint_probabilities(p: Tensor) -> Tensor:
    """Probabilities (N, g) of g independent bits -> of all their 2^g values (N, 2^g)."""
    joint = p.new_ones(len(p), 1)
    for bit in p.unbind(-1):
        pair = torch.stack([1 - bit, bit], -1)  # (N, 2)
        joint = (pair[:, :, None] * joint[:, None, :]).flatten(1)
    return joint


class LookupFreeQuantizer(Quantizer):
    """d numbers become their signs; bit i of a code is 1 where number i is positive."""

    Config: ClassVar[type] = LookupFreeConfig

    def __init__(self, config: LookupFreeConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("radix", 2 ** torch.arange(config.bits), persistent=False)
        self.radix: Tensor

    @property
    def vocab_size(self) -> int:
        return 2**self.config.bits

    @property
    def dim(self) -> int:
        return self.config.bits

    @property
    def magnitude(self) -> float:
        """Absolute value of every number of a quantized vector."""
        return 1 / math.sqrt(self.config.bits) if self.config.spherical else 1.0

    def _rows(self, features: Tensor) -> Tensor:
        rows = as_rows(features)
        return F.normalize(rows, dim=-1) if self.config.spherical else rows

    def _quantize(self, features: Tensor) -> Quantized:
        shape = (len(features), *features.shape[2:])  # B, h, w
        rows = self._rows(features)  # (N, d)
        positive = rows > 0
        signs = torch.where(positive, self.magnitude, -self.magnitude)
        config, losses = self.config, {}
        if config.commitment_weight:
            losses["commitment"] = config.commitment_weight * F.mse_loss(rows, signs)
        if config.entropy_weight:
            losses["entropy"] = config.entropy_weight * self.entropy_loss(rows)
        return Quantized(
            latents=as_maps(straight_through(rows, signs), *shape),
            codes=(positive * self.radix).sum(-1).view(len(features), -1),
            losses=losses,
        )

    def entropy_loss(self, rows: Tensor) -> Tensor:
        """E[H(p(. | z))] - gamma H(E[p(. | z)]) of rows (N, d), p ~ exp(-|z - e|^2 / T), in nats.

        The scalar of MAGVIT-v2, eq. 6, without its 2^d probabilities: the bits of one feature are
        independent, so the first term is exactly the sum over bits. The second is exact within a
        group of bits, and an upper bound if there are several groups.
        """
        # P(bit = 1 | z) of codes +-m: the two squared distances differ by 4 m z.
        p = torch.sigmoid(4 * self.magnitude * rows / self.config.entropy_temperature)  # (N, d)
        each = entropy(torch.stack([p, 1 - p], -1)).sum(-1).mean()  # (N, d, 2) -> scalar
        batch = torch.stack(
            [
                entropy(mean_over_processes(joint_probabilities(part).mean(0)))
                for part in p.split(self.config.group_bits, dim=-1)  # (N, g)
            ]
        ).sum()
        return each - self.config.entropy_diversity * batch

    def _search(self, features: Tensor) -> Tensor:
        positive = self._rows(features) > 0
        return (positive * self.radix).sum(-1).view(len(features), -1)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        bits = codes.flatten()[:, None] // self.radix % 2
        rows = (2.0 * bits - 1) * self.magnitude
        return as_maps(rows, len(codes), height, width)
