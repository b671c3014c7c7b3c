"""The config of the next-scale prior: published sizes, and small ones that train in minutes."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from smalti.config import check_at_least
from smalti.data.latents import CodeSpec, LatentSpec
from smalti.errors import ConfigurationError
from smalti.prior.base import PriorConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig


def _spec_of(quantizer: MultiScaleConfig) -> CodeSpec:
    return CodeSpec(quantizer.codebook.vocab_size, quantizer.scales)


@dataclass(frozen=True)
class NextScaleConfig(PriorConfig):
    """Sizes of a next-scale prior; the preset var-d16 is VAR-d16."""

    # These may change without changing what saved weights compute.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "dropout",
        "drop_path",
        "label_dropout",
        "gate_init",
        "context_noise",
    )

    FROM_LATENTS: ClassVar[tuple[str, ...]] = (*PriorConfig.FROM_LATENTS, "quantizer")

    CONDITIONS: ClassVar[tuple[str, ...]] = ("class", "text")
    TAKES_VECTORS: ClassVar[bool] = True

    kind: Literal["next-scale"] = "next-scale"  # the kind of prior
    # Vocabulary size, and the code grids from coarse to fine; `fitted` sets them.
    spec: CodeSpec = field(default_factory=lambda: _spec_of(MultiScaleConfig()))
    # Config of the tokenizer's quantizer, of which the prior has a frozen copy.
    quantizer: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    num_classes: int = 1000  # without the null label; 0 without condition class
    depth: int = 16  # number of blocks
    width: int = 1024  # channels of a token
    num_heads: int = 16  # attention heads
    mlp_ratio: float = 4.0  # hidden width of the feed-forward over width
    dropout: float = 0.0  # probability, of attention and feed-forward outputs
    drop_path: float = 0.1 * 16 / 24  # drop probability of the last block; grows linearly from 0
    label_dropout: float = 0.1  # probability of training without the class
    shared_adaln: bool = False  # one adaLN projection for all blocks, and offsets for each
    qk_l2_norm: bool = True  # queries and keys of norm 1, and a learned scale for each head
    gate_init: float = 1e-3  # factor on the initial weights of the adaLN gates
    context_noise: float = 0.0  # in training, at most this share of the input codes is random
    norm_eps: float = 1e-6  # epsilon of the layer norms
    tokenizer_fingerprint: str | None = None  # of the tokenizer that made the training latents

    def __post_init__(self) -> None:
        if len(self.spec.grids) < 2:
            raise ConfigurationError(
                "the latents have one code grid, but a next-scale prior models several, coarse to "
                "fine: use a next-token prior"
            )
        if self.spec != _spec_of(self.quantizer):
            raise ConfigurationError(
                f"the latents are {self.spec}, but the quantizer makes {_spec_of(self.quantizer)}:"
                " give the quantizer of the tokenizer that made the latents"
            )
        self.check_conditions(self.num_classes)
        check_at_least(1, self, "depth", "width", "num_heads")
        if self.width % self.num_heads:
            raise ConfigurationError(
                f"width {self.width} does not divide into {self.num_heads} heads: use a multiple"
            )
        for name in ("dropout", "drop_path", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        for name in ("context_noise", "gate_init"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.mlp_ratio * self.width < 1 or not self.norm_eps >= 0:
            raise ConfigurationError(
                f"mlp_ratio is {self.mlp_ratio}, norm_eps {self.norm_eps}: mlp_ratio * width must"
                " be at least 1, and norm_eps 0 or more"
            )

    def fitted(
        self,
        spec: LatentSpec,
        num_classes: int,
        tokenizer_fingerprint: str | None,
        quantizer: object = None,
    ) -> Self:
        """This config for other latents.

        Args:
            quantizer: the config of the tokenizer's quantizer, `tokenizer.config.quantizer`.

        Raises:
            ConfigurationError: the latents are not codes of several grids, or of another quantizer.
        """
        if not isinstance(spec, CodeSpec):
            raise ConfigurationError(
                f"a next-scale prior models codes, not {spec.in_words}: use a flow prior, as in "
                "--prior.preset flow-nano"
            )
        if not isinstance(quantizer, MultiScaleConfig):
            raise ConfigurationError(
                "a next-scale prior needs a multi-scale tokenizer; this one has a "
                f"{type(quantizer).__name__}: use a next-token prior, or train a tokenizer such as"
                " var-32-tiny"
            )
        return replace(
            self,
            spec=spec,
            quantizer=quantizer,
            num_classes=self.classes_of(num_classes),
            tokenizer_fingerprint=tokenizer_fingerprint,
        )


def _var(depth: int, **changes: object) -> NextScaleConfig:
    """VAR's scaling rule: the depth gives all other sizes."""
    size = NextScaleConfig(
        depth=depth, width=64 * depth, num_heads=depth, drop_path=0.1 * depth / 24
    )
    return replace(size, **changes)  # type: ignore[arg-type]


PRESETS: dict[str, NextScaleConfig] = {
    # Published sizes (VAR, section 5 and repository), and one smaller. `fitted` sets the grids of
    # the latents: var-d36 was published for 512 px.
    "var-d12": _var(12),
    "var-d16": _var(16),
    "var-d20": _var(20),
    "var-d24": _var(24, gate_init=1e-4),
    "var-d30": _var(30, gate_init=1e-5),
    "var-d36": _var(36, gate_init=5e-6, shared_adaln=True),
    # Small ones, for a CPU or minutes on a GPU.
    "var-nano": NextScaleConfig(depth=6, width=256, num_heads=4, drop_path=0.0),
    "var-micro": NextScaleConfig(depth=8, width=384, num_heads=6, dropout=0.1, drop_path=0.0),
    "var-mini": NextScaleConfig(depth=12, width=512, num_heads=8, dropout=0.1, drop_path=0.0),
}
