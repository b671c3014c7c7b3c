"""The next-token prior (LlamaGen, Sun et al., 2406.06525)."""

from smalti.prior.next_token.config import PRESETS, NextTokenConfig
from smalti.prior.next_token.model import NextTokenPrior

__all__ = ["PRESETS", "NextTokenConfig", "NextTokenPrior"]
