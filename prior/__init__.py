"""Stage two: a distribution over latents, given a condition."""

from smalti.prior.base import Loss, Prior
from smalti.prior.registry import PRIORS

__all__ = ["PRIORS", "Loss", "Prior"]
