"""Every prior by name: the published sizes, and small ones that train in minutes.

Each prior defines its presets beside its configuration; `PRESETS` collects them.
"""

from smalti.hub import Presets
from smalti.prior.base import PriorConfig
from smalti.prior.registry import PRIORS

__all__ = ["PRESETS", "PriorConfig"]

PRESETS = Presets(PRIORS, latents=lambda prior: f"with {prior.spec.in_words}")
