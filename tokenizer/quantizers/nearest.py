"""Vector quantization by nearest neighbour (VQ-VAE, van den Oord et al., 1711.00937)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from smalti.errors import ConfigurationError
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.base import (
    Estimator,
    Quantized,
    as_maps,
    as_rows,
    entropy_loss,
    estimate,
)
from smalti.tokenizer.quantizers.codebook import CodebookConfig, CodebookQuantizer


@dataclass(frozen=True)
class NearestConfig(QuantizerConfig):
    """The codebook, and how it is trained."""

    # May change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "commitment_weight",
        "estimator",
        "entropy_weight",
        "entropy_temperature",
    )

    kind: Literal["nearest"] = "nearest"  # the kind of quantizer
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    commitment_weight: float = 0.25  # beta of VQ-VAE, eq. 3
    estimator: Estimator = "straight-through"  # how gradients pass the quantization
    entropy_weight: float = 0.0  # of `entropy_loss`, which rewards using all codes
    entropy_temperature: float = 0.01  # T of `entropy_loss`

    def __post_init__(self) -> None:
        if self.commitment_weight < 0 or self.entropy_weight < 0:
            raise ConfigurationError("commitment_weight and entropy_weight must not be negative")
        if self.entropy_temperature <= 0:
            raise ConfigurationError(
                f"entropy_temperature is {self.entropy_temperature}; it must be positive"
            )


class NearestQuantizer(CodebookQuantizer):
    """Each feature becomes the nearest vector of one codebook."""

    Config: ClassVar[type] = NearestConfig

    def __init__(self, config: NearestConfig) -> None:
        super().__init__(config.codebook)
        self.config = config

    def _search(self, features: Tensor) -> Tensor:
        rows = self.codebook.normalise(as_rows(features))
        return self.codebook.search(rows).view(len(features), -1)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        return as_maps(self.codebook.lookup(codes.flatten()), len(codes), height, width)

    def _quantize(self, features: Tensor) -> Quantized:
        shape = (len(features), *features.shape[2:])  # B, h, w
        rows = self.codebook.normalise(as_rows(features))  # (N, d)
        codes = self.codebook.search(rows)  # (N,)
        vectors = self.codebook.lookup(codes)  # (N, d)
        if self.training:
            self.codebook.collect(rows, codes)
        maps = as_maps(rows, *shape), as_maps(vectors, *shape)
        return Quantized(
            latents=estimate(self.config.estimator, *maps),
            codes=codes.view(len(features), -1),
            losses=self._losses(rows, vectors),
        )

    def _losses(self, rows: Tensor, vectors: Tensor) -> dict[str, Tensor]:
        config = self.config
        # beta |z - sg e|^2: the encoder moves its features towards the codes (eq. 3).
        losses = {"commitment": config.commitment_weight * F.mse_loss(rows, vectors.detach())}
        if self.codebook.learns_by_gradient:
            # |sg z - e|^2: the codes move towards the features. Running means do the same.
            losses["codebook"] = F.mse_loss(vectors, rows.detach())
        if config.entropy_weight:
            losses["entropy"] = config.entropy_weight * entropy_loss(
                rows, self.codebook.vectors, config.entropy_temperature
            )
        return losses
