"""The configuration of a flow prior, and its presets: SiT and DiT in their published sizes, and
small models.

What can be chosen, and where each choice is defined:

    path         linear, trigonometric, vp-linear, vp-cosine, ddpm, ve            path.py
    prediction   velocity, noise, score, data                                     prediction.py
    times        uniform, logit-normal                                            times.py
    loss_weight  constant, velocity, noise, data, score, min-snr, likelihood      times.py
    network      dit-s, dit-b, dit-l, dit-xl, dit-nano, dit-micro                 dit.py

When sampling:

    solver       euler, midpoint, heun, rk4, dopri5, ddpm, ddim, euler-maruyama, langevin   solvers/
    schedule     uniform, shifted, karras, ddpm                               solvers/schedules.py
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from smalti.config import added
from smalti.data.latents import ContinuousSpec, LatentSpec
from smalti.errors import ConfigurationError
from smalti.prior.base import PriorConfig
from smalti.prior.flow.dit import PRESETS as NETWORKS
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import DDPMPath, GaussianPath, LinearPath
from smalti.prior.flow.prediction import Prediction
from smalti.prior.flow.times import LogitNormalTimes, LossWeight, TrainingTimes, UniformTimes

LATENTS = ContinuousSpec(4, 32, 32)  # of 256 px ImageNet; `fitted` adapts a preset to others


@dataclass(frozen=True)
class FlowConfig(PriorConfig):
    """A flow or diffusion prior; the preset sit-b/2 is SiT-B/2, which predicts the velocity on the
    linear path."""

    # Fields that may change without changing what saved weights compute.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "times",
        "loss_weight",
        "label_dropout",
        "guided_channels",
        "buckets",
    )
    FROM_LATENTS: ClassVar[tuple[str, ...]] = (*PriorConfig.FROM_LATENTS, "buckets")

    CONDITIONS: ClassVar[tuple[str, ...]] = ("class", "text", "image")
    TAKES_VECTORS: ClassVar[bool] = True

    kind: Literal["flow"] = "flow"  # the kind of prior
    network: DiTConfig = field(default_factory=lambda: NETWORKS["dit-b/2"])  # sizes of the DiT
    path: GaussianPath = field(
        default_factory=LinearPath
    )  # the path from noise to data: kinds in PATHS
    prediction: Prediction = "velocity"  # the meaning of the network's output
    times: TrainingTimes = field(
        default_factory=UniformTimes
    )  # distribution of training times: TIMES
    loss_weight: LossWeight = "constant"  # weight of the squared error at each time
    label_dropout: float = 0.1  # probability of the null label in training
    guided_channels: int | None = None  # guides only the first ones; None: all; published DiT: 3
    # The network's time input is time_shift + time_scale t: SiT: t, DiT: 999 - 1000 t, index k.
    time_scale: float = 1.0
    time_shift: float = 0.0  # the network's time input at t = 0, see time_scale
    tokenizer_fingerprint: str | None = None  # of the tokenizer that made the training latents
    # (h, w) of the latents of each aspect-ratio bucket that the prior was trained on; (): one size.
    buckets: tuple[tuple[int, int], ...] = added(())

    def __post_init__(self) -> None:
        self.check_conditions(self.num_classes)
        for grid in self.buckets:
            replace(self.network, grid=grid)  # raises if it cannot be cut into patches
        channels, outputs = self.network.in_channels, self.network.out_channels
        if outputs not in (channels, 2 * channels):
            raise ConfigurationError(
                f"the network has {outputs} output channels for latents of {channels}: use "
                f"{channels}, or {2 * channels} with a variance"
            )
        if not 0 <= self.label_dropout < 1:
            raise ConfigurationError(
                f"label_dropout is {self.label_dropout}; it must lie in [0, 1)"
            )
        if self.guided_channels is not None and not 1 <= self.guided_channels <= channels:
            raise ConfigurationError(
                f"guided_channels is {self.guided_channels}; there are {channels} channels"
            )
        if not (math.isfinite(self.time_shift) and 0 < abs(self.time_scale) < math.inf):
            raise ConfigurationError(
                f"time_scale and time_shift are {self.time_scale} and {self.time_shift}; "
                "both must be finite, and the scale must not be 0"
            )

    @property
    def spec(self) -> ContinuousSpec:
        """The specification of the latents that this prior models."""
        return ContinuousSpec(self.network.in_channels, *self.network.grid)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of all latents that the network takes, those of `spec` first."""
        return tuple(dict.fromkeys([self.network.grid, *self.buckets]))

    def bucketed(self, grids: Sequence[tuple[int, int]]) -> Self:
        """This configuration for latents on several grids, or on that of `spec` alone."""
        return replace(self, buckets=tuple(grids))

    @property
    def predicts_variance(self) -> bool:
        """Whether the network has channels for the variance of a DDPM step."""
        return self.network.out_channels == 2 * self.network.in_channels

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null label."""
        return self.network.num_classes

    def _with_classes(self, num_classes: int) -> dict[str, Any]:
        return {"network": replace(self.network, num_classes=num_classes)}

    def fitted(
        self,
        spec: LatentSpec,
        num_classes: int,
        tokenizer_fingerprint: str | None,
        quantizer: object = None,
    ) -> Self:
        """This configuration, with the same size of network, for other latents.

        Args:
            quantizer: the config of the tokenizer's quantizer, which this prior does not use.

        Raises:
            ConfigurationError: the latents are codes, or cannot be cut into the network's patches.
        """
        if not isinstance(spec, ContinuousSpec):
            raise ConfigurationError(
                f"a flow prior models continuous latents, not {spec}: use a next-token prior, or "
                "a tokenizer with continuous latents"
            )
        del quantizer
        network = self.network.fitted(spec, self.classes_of(num_classes))
        return replace(
            self, network=network, tokenizer_fingerprint=tokenizer_fingerprint, buckets=()
        )


def _published() -> dict[str, FlowConfig]:
    """SiT (2401.08740) and DiT (2212.09748) in all their sizes."""
    presets = {}
    for name, network in NETWORKS.items():
        if "/" in name:
            presets[name.replace("dit", "sit")] = FlowConfig(network=network)
            presets[name] = FlowConfig(
                network=network,
                path=DDPMPath(),
                prediction="noise",
                time_scale=-1000.0,
                time_shift=999.0,
            )
    return presets


def _small(network: str) -> FlowConfig:
    """With the inexpensive improvements of LightningDiT (2501.01423)."""
    small = NETWORKS[network].fitted(LATENTS, 1000)
    return FlowConfig(network=small, times=LogitNormalTimes(), time_scale=1000.0)


PRESETS: dict[str, FlowConfig] = {
    **_published(),
    # For a CPU, or for minutes on a GPU
    "flow-nano": _small("dit-nano"),
    "flow-micro": _small("dit-micro"),
}
