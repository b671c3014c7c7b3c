"""The next-scale prior (VAR, Tian et al., 2404.02905)."""

from smalti.prior.next_scale.config import PRESETS, NextScaleConfig
from smalti.prior.next_scale.model import NextScalePrior

__all__ = ["PRESETS", "NextScaleConfig", "NextScalePrior"]
