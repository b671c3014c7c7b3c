"""A classifier of noisy latents, for classifier guidance (Dhariwal and Nichol, 2105.05233, section
4): p(label | x_t) at every time t of a path from noise to data.

The network is the trunk of a DiT that receives the time alone, and a linear layer on the mean of
its tokens (global average pooling, 2205.01580). It is trained with the cross-entropy at random
times; `guidance.Classifier` uses the gradient of log p(label | x_t) in a sampler.

The network sees the linear estimate of the data, alpha x_t / (alpha^2 + sigma^2) (for data of unit
variance; c_skip of EDM, 2206.00364, table 1). So the gradient vanishes with alpha, as that of the
exact classifier does. Guidance of a velocity divides it by alpha, and would be infinite at the
noise end of a path if the gradient were not 0 there.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import ContinuousSpec, LatentSpec, as_tensor
from smalti.errors import ConfigurationError, DataError, GenerationError
from smalti.hub import Pretrained, Registry
from smalti.prior.adaln import Modulation
from smalti.prior.attention import FixedTable
from smalti.prior.base import Loss
from smalti.prior.flow.dit import (
    NORM_EPS,
    DiTBlock,
    DiTConfig,
    PatchEmbedder,
    TimestepEmbedder,
)
from smalti.prior.flow.path import GaussianPath, LinearPath, expand_like
from smalti.prior.flow.prediction import exact_times
from smalti.prior.flow.times import TrainingTimes, UniformTimes, times_and_noise
from smalti.prior.layers import RMSNorm
from smalti.randomness import RandomInputs

CLASSIFIERS = Registry(
    "classifier", {"noisy-latents": "smalti.prior.flow.classifier:LatentClassifier"}
)
TIME_SCALE = 1000.0  # the network's time input is 1000 t


@dataclass(frozen=True)
class LatentClassifierConfig:
    """A classifier of noisy latents: its network, and the path on which the noise was added."""

    registry: ClassVar[Registry] = CLASSIFIERS
    # Fields that `fitted` takes from the latents: help texts do not offer them.
    FROM_LATENTS: ClassVar[tuple[str, ...]] = ("spec", "classes", "tokenizer_fingerprint")

    kind: Literal["noisy-latents"] = "noisy-latents"  # the kind of classifier
    spec: ContinuousSpec = field(default_factory=lambda: ContinuousSpec(4, 32, 32))
    classes: tuple[str, ...] = ()  # their names, in the order of the labels
    path: GaussianPath = field(
        default_factory=LinearPath
    )  # the path from noise to data: kinds in PATHS
    times: TrainingTimes = field(
        default_factory=UniformTimes
    )  # distribution of training times: TIMES
    patch_size: int = 1  # side of the square of latent positions that becomes one token
    width: int = 192  # channels of a token
    depth: int = 4  # number of blocks
    num_heads: int = 3  # attention heads
    tokenizer_fingerprint: str | None = None  # of the tokenizer that made the training latents

    @property
    def network(self) -> DiTConfig:
        """The sizes of the blocks."""
        return DiTConfig(
            in_channels=self.spec.channels,
            grid=(self.spec.height, self.spec.width),
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            num_heads=self.num_heads,
            positions="both",
            feed_forward="swiglu",
            norm="rms",
        )

    def fitted(
        self, spec: LatentSpec, classes: tuple[str, ...], tokenizer_fingerprint: str
    ) -> Self:
        """This configuration, with the same size of network, for other latents.

        Raises:
            ConfigurationError: the latents are codes, cannot be cut into patches, or have no
                classes.
        """
        if not isinstance(spec, ContinuousSpec):
            raise ConfigurationError(
                f"classifier guidance is for flow priors, whose latents are continuous, not {spec}"
            )
        if len(classes) < 2:
            raise ConfigurationError(
                f"the latents have {len(classes)} classes, and a classifier needs at least 2: "
                "encode pictures with classes"
            )
        own = replace(self, spec=spec, classes=classes, tokenizer_fingerprint=tokenizer_fingerprint)
        _ = own.network  # raises
        return own


class LatentClassifier(nn.Module, Pretrained):
    """p(label | x_t) of noisy latents x_t = alpha(t) x_1 + sigma(t) x_0."""

    registry: ClassVar[Registry] = CLASSIFIERS
    Config: ClassVar[type] = LatentClassifierConfig
    config: LatentClassifierConfig

    def __init__(self, config: LatentClassifierConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.network
        self.x_embedder = PatchEmbedder(sizes.in_channels, sizes.patch_size, sizes.width)
        self.t_embedder = TimestepEmbedder(sizes.frequency_size, sizes.width)
        self.pos_embed = FixedTable.sin_cos(sizes.token_grid, sizes.width)
        self.rope_freqs = FixedTable.rotary(sizes.token_grid, sizes.head_dim)
        self.blocks = nn.ModuleList(DiTBlock(sizes) for _ in range(sizes.depth))
        self.norm = RMSNorm(sizes.width, NORM_EPS)
        self.head = nn.Linear(sizes.width, len(config.classes))
        for module in self.modules():
            if isinstance(module, Modulation):  # every block is the identity: adaLN-zero
                nn.init.zeros_(module[1].weight)  # type: ignore[arg-type]
                nn.init.zeros_(module[1].bias)  # type: ignore[arg-type]

    @property
    def spec(self) -> ContinuousSpec:
        """The specification of the latents that this classifier takes."""
        return self.config.spec

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self.config.classes

    # -- training -----------------------------------------------------------------------------

    def sample_random_inputs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Uniforms in [0, 1) for times, (B,), and noise (B, C, h, w)."""
        spec, options = self.spec, {"generator": generator, "device": generator.device}
        shape = (count, spec.channels, spec.height, spec.width)
        return {"times": torch.rand(count, **options), "noise": torch.randn(shape, **options)}

    def forward(
        self, latents: Tensor, labels: Tensor, random_inputs: RandomInputs | None = None
    ) -> Loss:
        """The cross-entropy of the labels given x_t, averaged over times.

        In eval mode times and noise are the same at every call.

        Args:
            latents: x_1, (B, C, h, w).
            labels: (B,) int64.
            random_inputs: rows of what `sample_random_inputs` returns, one per latent; None samples
                them from torch's global generators.
        """
        latents = as_tensor(latents).float()
        inputs = random_inputs or times_and_noise(latents, fixed=not self.training)
        t = self.config.times.quantile(inputs["times"])
        logits = self.logits(self.config.path.mix(latents, inputs["noise"].float(), t), t)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return Loss(F.cross_entropy(logits, labels), {"accuracy": accuracy})

    @torch.no_grad()
    def recognised(self, latents: Tensor, labels: Tensor, bands: int) -> Tensor:
        """Whether each of the latents (B, C, h, w) is given its label (B,) at a time in each of
        `bands` equal parts of [0, 1], from noise to data: (bands, B). Times within a part, and the
        noise, are the same at every call."""
        inputs = times_and_noise(latents, fixed=True)
        rows = []
        for band in range(bands):
            t = (band + inputs["times"]) / bands
            logits = self.logits(self.config.path.mix(latents, inputs["noise"], t), t)
            rows.append(logits.argmax(1) == labels)
        return torch.stack(rows)

    # -- the classifier -----------------------------------------------------------------------

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """Class logits (B, classes) fp32 of x_t (B, C, h, w) at times t (B,) from 0, noise, to 1.

        Raises:
            DataError: x has another shape.
        """
        spec = self.spec
        if tuple(x.shape[1:]) != (spec.channels, spec.height, spec.width):
            raise DataError(
                f"latents have shape {tuple(x.shape)}; this classifier takes (B, {spec.channels}, "
                f"{spec.height}, {spec.width})"
            )
        t, path = exact_times(t), self.config.path
        scale = path.alpha(t) / path.marginal_std(t).square()
        tokens = self.x_embedder(expand_like(scale, x) * x)
        tokens = tokens + self.pos_embed.table.to(tokens.dtype)  # (B, N, width)
        freqs = torch.view_as_complex(self.rope_freqs.table)  # (N, head_dim / 2)
        time = self.t_embedder((TIME_SCALE * t).float())  # (B, width)
        for block in self.blocks:
            tokens = block(tokens, time, freqs)
        return self.head(self.norm(tokens).mean(1)).float()

    def log_probability(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """log p(label | x_t), (B,), differentiable in x (B, C, h, w); t (B,), labels (B,)."""
        return self.logits(x, t).log_softmax(1).gather(1, labels[:, None])[:, 0]

    def check_labels(self, labels: Tensor) -> None:
        """Raise `GenerationError` unless labels (B,) are those of classes."""
        count = len(self.classes)
        wrong = labels[(labels < 0) | (labels >= count)]
        if len(wrong):
            raise GenerationError(
                f"the classifier has no class {int(wrong[0])}: use labels from 0 to {count - 1}"
            )

    def check_prior(self, config: Any) -> None:
        """Raise `GenerationError` unless it classifies the noisy latents of a flow prior.

        Args:
            config: of the prior.
        """
        own = self.config
        if own.spec != config.spec:
            raise GenerationError(
                f"the classifier takes {own.spec.in_words}, and the prior models "
                f"{config.spec.in_words}: train a classifier on the latents of this prior"
            )
        ours, theirs = own.tokenizer_fingerprint, config.tokenizer_fingerprint
        if ours is not None and theirs is not None and ours != theirs:
            raise GenerationError(
                f"the classifier is for latents of tokenizer {ours[:12]}, and the prior for those "
                f"of {theirs[:12]}: train a classifier on the latents of this prior"
            )
        if own.path != config.path:
            raise GenerationError(
                f"the classifier was trained on the path {own.path}, and the prior on "
                f"{config.path}: train a classifier with --prior set to this pipeline"
            )
