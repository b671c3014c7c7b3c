"""SiT's weights (Ma et al., 2401.08740), which are laid out as DiT's."""

from smalti.pipelines.convert.dit import DiTNetwork
from smalti.prior.flow.prior import FlowConfig


class SiT(DiTNetwork):
    """A velocity on straight paths, told a time from 0, noise, to 1, data.

    The second half of the output channels is not used, as in SiT.
    """

    title = "SiT"
    objective = FlowConfig()
