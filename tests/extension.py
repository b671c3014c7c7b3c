"""A quantizer, a tokenizer and a prior that smalti does not know: one class and one line each.

    python tests/extension.py COMMAND ...    the console command, with the three registered

This is what a file of one's own looks like; CONTRIBUTING.md explains it piece by piece.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.cli import main
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.errors import ConfigurationError
from smalti.prior.base import Loss, Prior, PriorConfig
from smalti.prior.registry import PRIORS
from smalti.prior.sampling import sample_uniforms
from smalti.randomness import Generators, RandomInputs
from smalti.tokenizer.base import Reconstruction, Tokenizer, TokenizerConfig
from smalti.tokenizer.quantizers import QUANTIZERS, QuantizerConfig
from smalti.tokenizer.quantizers.base import Quantized, Quantizer, straight_through
from smalti.tokenizer.registry import TOKENIZERS

# -- a quantizer: the sign of each number is one bit of the code ----------------------------------


@dataclass(frozen=True)
class SignConfig(QuantizerConfig):
    """The number of bits decides the vocabulary."""

    kind: Literal["sign"] = "sign"
    bits: int = 4


class SignQuantizer(Quantizer):
    """d numbers -> d bits."""

    Config: ClassVar[type] = SignConfig

    def __init__(self, config: SignConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("radix", 2 ** torch.arange(config.bits), persistent=False)
        self.radix: Tensor

    @property
    def vocab_size(self) -> int:
        return 2**self.config.bits

    @property
    def dim(self) -> int:
        return self.config.bits

    def _search(self, features: Tensor) -> Tensor:  # (B, d, h, w) -> codes (B, h w)
        bits = rearrange(features > 0, "b d h w -> b (h w) d")
        return (bits * self.radix).sum(-1)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:  # (B, h w) -> (B, d, h, w)
        bits = (codes[..., None] // self.radix) % 2
        return rearrange(bits.float() * 2 - 1, "b (h w) d -> b d h w", h=height, w=width)

    def _quantize(self, features: Tensor) -> Quantized:
        codes = self._search(features)
        signs = self._lookup(codes, *features.shape[2:])
        return Quantized(straight_through(features.tanh(), signs), codes)


QUANTIZERS.register("sign", SignQuantizer)

# -- a tokenizer: continuous latents without a posterior ------------------------------------------


@dataclass(frozen=True)
class PatchConfig(TokenizerConfig):
    """Square patches, each projected to a few numbers."""

    kind: Literal["patch"] = "patch"
    image_size: int = 32
    patch_size: int = 4
    channels: int = 4


class PatchTokenizer(Tokenizer):
    """One convolution to latents (B, C, h, w), one transposed convolution back."""

    Config: ClassVar[type] = PatchConfig
    PRESETS: ClassVar[Mapping[str, PatchConfig]] = {"patch-tiny": PatchConfig()}
    config: PatchConfig

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config
        side = config.patch_size
        self.encoder = nn.Conv2d(3, config.channels, side, stride=side)
        self.decoder = nn.ConvTranspose2d(config.channels, 3, side, stride=side)

    @property
    def spec(self) -> ContinuousSpec:
        side = self.config.image_size // self.config.patch_size
        return ContinuousSpec(self.config.channels, side, side)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.weight

    def store(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.encoder(images)

    def vectors(self, latents: Tensor) -> Tensor:
        return latents

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors.to(self.decoder.weight.dtype))

    def forward(self, images: Tensor, random_inputs: RandomInputs | None = None) -> Reconstruction:
        latents = self.store(images)
        return Reconstruction(self.decode_vectors(latents), images, losses={}, latents=latents)


TOKENIZERS.register("patch", PatchTokenizer)

# -- a prior: every place of the grid has its own histogram of codes, given the class -------------


@dataclass(frozen=True)
class HistogramConfig(PriorConfig):
    """Nothing but the latents decides its size."""

    kind: Literal["histogram"] = "histogram"
    spec: CodeSpec = field(default_factory=lambda: CodeSpec(16, ((8, 8),)))
    num_classes: int = 10
    tokenizer_fingerprint: str | None = None

    def fitted(
        self,
        spec: LatentSpec,
        num_classes: int,
        tokenizer_fingerprint: str | None,
        quantizer: object = None,
    ) -> Self:
        if not HistogramPrior.supports(spec):
            raise ConfigurationError(f"a histogram prior models codes of one grid, not {spec}")
        return replace(
            self,
            spec=spec,
            num_classes=num_classes,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )


class HistogramPrior(Prior):
    """p(codes | class) = prod_i softmax(logits[class, i]); it does not state a likelihood."""

    Config: ClassVar[type] = HistogramConfig
    PRESETS: ClassVar[Mapping[str, HistogramConfig]] = {"histogram": HistogramConfig()}
    class_table: str = "table.weight"
    config: HistogramConfig

    def __init__(self, config: HistogramConfig) -> None:
        super().__init__()
        self.config = config
        size = config.spec.length * config.spec.vocab_size
        self.table = nn.Embedding(config.num_classes + 1, size)
        nn.init.zeros_(self.table.weight)

    @classmethod
    def supports(cls, spec: LatentSpec) -> bool:
        return isinstance(spec, CodeSpec) and len(spec.grids) == 1

    def logits(self, labels: Tensor) -> Tensor:  # (B,) -> (B, L, V)
        return rearrange(self.table(labels), "b (l v) -> b l v", v=self.config.spec.vocab_size)

    def forward(
        self, latents: Tensor, condition: Any, random_inputs: RandomInputs | None = None
    ) -> Loss:
        labels = self.drop_labels(condition, 0.1)
        loss = F.cross_entropy(rearrange(self.logits(labels), "b l v -> b v l"), latents)
        return Loss(loss, {"nats": loss.detach()})

    @torch.no_grad()
    def sample(
        self,
        condition: Any,
        *,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        sharpness: float = 1.0,
    ) -> Tensor:
        """Sample codes (B, L) for labels (B,).

        Args:
            sharpness: logits are multiplied by it.
        """
        self.check_labels(condition)
        logits = self.logits(condition)
        if guidance_scale != 1:
            uncond = self.logits(torch.full_like(condition, self.num_classes))
            logits = uncond + guidance_scale * (logits - uncond)
        uniforms = sample_uniforms(len(condition), self.config.spec.length, generator)
        cumulative = (logits * sharpness).softmax(-1).cumsum(-1)  # (B, L, V)
        codes = (cumulative < uniforms.to(cumulative)[..., None]).sum(-1)
        return codes.clamp(max=self.config.spec.vocab_size - 1)


PRIORS.register("histogram", HistogramPrior)

if __name__ == "__main__":
    raise SystemExit(main())
