"""Gumbel-softmax quantization (Jang et al., 1611.01144; DALL-E, 2102.12092, section 2.1).

A linear map gives each feature a categorical distribution over codes. Training samples from it with
the Gumbel-softmax; the Gumbel variant of VQGAN (2012.09841) is this quantizer.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import ConfigurationError
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.base import (
    CHUNK_ELEMENTS,
    Quantized,
    Quantizer,
    as_maps,
    as_rows,
    entropy,
)


@dataclass(frozen=True)
class GumbelConfig(QuantizerConfig):
    """Sizes of a Gumbel quantizer; the published VQGAN f8 has 8192 codes of 256 numbers."""

    # May change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = ("temperature", "kl_weight")

    kind: Literal["gumbel"] = "gumbel"  # the kind of quantizer
    vocab_size: int = 8192  # codes, V
    code_dim: int = 256  # numbers per code, d
    temperature: float = 1.0  # of the softmax over noisy scores, in training
    kl_weight: float = 1e-8  # of the divergence from the uniform distribution over codes

    def __post_init__(self) -> None:
        if self.vocab_size < 2 or self.code_dim < 1:
            raise ConfigurationError(
                f"vocab_size {self.vocab_size} and code_dim {self.code_dim}: need at least 2 and 1"
            )
        if self.temperature <= 0 or self.kl_weight < 0:
            raise ConfigurationError("temperature must be positive, kl_weight 0 or more")


class GumbelQuantizer(Quantizer):
    """A linear map scores all codes; the best one is the code, and a table has its vector.

    In training Gumbel noise is added to the scores, and gradients are those of the softmax.
    """

    Config: ClassVar[type] = GumbelConfig

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(config.code_dim, config.vocab_size, 1)
        self.embed = nn.Embedding(config.vocab_size, config.code_dim)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def dim(self) -> int:
        return self.config.code_dim

    def scores(self, rows: Tensor) -> Tensor:
        """Features (N, d) -> unnormalised log-probabilities of the codes, (N, V)."""
        bias = None if self.proj.bias is None else self.proj.bias.float()
        return F.linear(rows, self.proj.weight.float().flatten(1), bias)

    def _quantize(self, features: Tensor) -> Quantized:
        shape = (len(features), *features.shape[2:])  # B, h, w
        scores = self.scores(as_rows(features))  # (N, V)
        if self.training:  # one-hot (N, V), with the gradient of softmax((scores + noise) / T)
            chosen = F.gumbel_softmax(scores, tau=self.config.temperature, hard=True)
        else:
            chosen = F.one_hot(scores.argmax(-1), self.vocab_size).float()
        # KL(p || uniform) = log V - H(p), in nats, mean over features
        divergence = math.log(self.vocab_size) - entropy(scores.softmax(-1)).mean()
        return Quantized(
            latents=as_maps(chosen @ self.embed.weight.float(), *shape),
            codes=chosen.argmax(-1).view(len(features), -1),
            losses={"uniformity": self.config.kl_weight * divergence},
        )

    def _search(self, features: Tensor) -> Tensor:
        chunk = max(1, CHUNK_ELEMENTS // self.vocab_size)
        codes = [self.scores(rows).argmax(-1) for rows in as_rows(features).split(chunk)]
        return torch.cat(codes).view(len(features), -1)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        rows = F.embedding(codes.flatten(), self.embed.weight).float()
        return as_maps(rows, len(codes), height, width)
