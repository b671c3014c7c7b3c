"""Every prior by name: the published sizes, and small ones that train in minutes."""

from smalti.prior.flow.config import PRESETS as FLOW
from smalti.prior.flow.config import FlowConfig
from smalti.prior.next_scale.config import PRESETS as NEXT_SCALE
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_token.model import PRESETS as NEXT_TOKEN
from smalti.prior.next_token.model import NextTokenConfig

PriorConfig = NextTokenConfig | NextScaleConfig | FlowConfig

PRESETS: dict[str, PriorConfig] = {**NEXT_TOKEN, **NEXT_SCALE, **FLOW}
