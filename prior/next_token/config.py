"""The config of the next-token prior: published sizes, and small ones that train in minutes."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from smalti.config import check_at_least
from smalti.data.latents import CodeSpec, LatentSpec
from smalti.errors import ConfigurationError
from smalti.prior.base import PriorConfig


@dataclass(frozen=True)
class NextTokenConfig(PriorConfig):
    """Sizes of a next-token prior; the preset gpt-b is LlamaGen's GPT-B."""

    # These may change without changing what saved weights compute.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "dropout",
        "token_dropout",
        "attention_dropout",
        "drop_path",
        "label_dropout",
        "token_corruption",
        "random_order",
    )

    CONDITIONS: ClassVar[tuple[str, ...]] = ("class", "text")
    TAKES_VECTORS: ClassVar[bool] = True

    kind: Literal["next-token"] = "next-token"  # the kind of prior
    # Vocabulary size, and the code grid; `fitted` sets both.
    spec: CodeSpec = field(default_factory=lambda: CodeSpec(16384, ((16, 16),)))
    num_classes: int = 1000  # without the null label; 0 without condition class
    # Saved since 0.1.0; the sizes of captions are LlamaGen's.
    condition: str = "class"  # none, class, text, or class+text
    text_length: int = 120  # tokens of a caption, padded
    text_dim: int = 2048  # channels of the features of a caption token
    depth: int = 12  # number of blocks
    width: int = 768  # channels of a token
    num_heads: int = 12  # attention heads of queries
    num_kv_heads: int = 0  # heads of keys and values; 0 = num_heads, fewer make the cache smaller
    hidden: int = 0  # width of the feed-forward; 0 = 8/3 width, rounded up to a multiple of 256
    qk_norm: bool = False  # RMS norm of every head's queries and keys
    dropout: float = 0.1  # probability, of attention and feed-forward outputs
    token_dropout: float | None = None  # of embeddings; None = dropout
    attention_dropout: float = 0.0  # of attention weights
    drop_path: float = 0.0  # drop probability of the last block; grows linearly from 0
    label_dropout: float = 0.1  # probability of training without the condition
    token_corruption: float = 0.0  # in training, this share of the input codes is random
    # Random-order annealing: until the first share of the training every order is random, from the
    # second on every order is raster; (0.5, 0.75) in RAR. None trains in raster order only.
    random_order: tuple[float, float] | None = None
    norm_eps: float = 1e-5  # epsilon of the RMS norms
    rotary_base: float = 10000.0  # base of the rotary frequencies
    prefix_rotary: Literal["identity", "zero"] = "identity"  # LlamaGen's weights expect "zero"
    tokenizer_fingerprint: str | None = None  # of the tokenizer that made the training latents

    def __post_init__(self) -> None:
        if len(self.spec.grids) != 1:
            raise ConfigurationError(
                f"the latents have {len(self.spec.grids)} code grids, but a next-token prior models"
                " one: use a next-scale prior"
            )
        check_at_least(1, self, "depth", "width", "num_heads")
        if self.width % self.num_heads or self.head_dim % 4:
            raise ConfigurationError(
                f"width {self.width} with {self.num_heads} heads: the width of each head must be a"
                " multiple of 4"
            )
        if self.num_kv_heads < 0 or self.num_heads % self.kv_heads:
            raise ConfigurationError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads {self.num_heads}, "
                "or be 0, which means num_heads"
            )
        if self.hidden < 0 or not (self.norm_eps >= 0 and self.rotary_base > 1):
            raise ConfigurationError(
                f"hidden is {self.hidden}, norm_eps {self.norm_eps}, rotary_base "
                f"{self.rotary_base}; hidden and norm_eps must be 0 or more, and rotary_base more"
                " than 1"
            )
        self.check_conditions(self.num_classes)
        self._check_training()

    def _check_training(self) -> None:
        for name in ("dropout", "token_dropout", "attention_dropout", "drop_path", "label_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigurationError(f"{name} is {value}; it must lie in [0, 1)")
        if not 0 <= self.token_corruption <= 1:
            raise ConfigurationError(
                f"token_corruption is {self.token_corruption}; it must lie in [0, 1]"
            )
        if self.random_order is not None:
            begin, end = self.random_order
            if not 0 <= begin <= end <= 1:
                raise ConfigurationError(
                    f"random_order is {self.random_order}; give two shares of the training, "
                    "0 <= from <= to <= 1"
                )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def feed_forward_hidden(self) -> int:
        """Width of the feed-forward's hidden layer (LlamaGen rounds it up to a multiple of 256)."""
        return self.hidden or -(-int(8 * self.width / 3) // 256) * 256

    @property
    def prefix_length(self) -> int:
        """Number of condition tokens P before the codes: one for a class, or for no condition, and
        those of a caption."""
        captions = self.text_length if "text" in self.conditions else 0
        return captions + (self.condition != "text")

    def fitted(
        self,
        spec: LatentSpec,
        num_classes: int,
        tokenizer_fingerprint: str | None,
        quantizer: object = None,
    ) -> Self:
        """This config for other latents.

        Args:
            quantizer: the config of the tokenizer's quantizer, which this prior does not need.

        Raises:
            ConfigurationError: the latents are not codes of one grid.
        """
        if not isinstance(spec, CodeSpec):
            raise ConfigurationError(
                f"a next-token prior models codes, not {spec.in_words}: use a flow prior, as in "
                "--prior.preset flow-nano"
            )
        del quantizer
        return replace(
            self,
            spec=spec,
            num_classes=self.classes_of(num_classes),
            tokenizer_fingerprint=tokenizer_fingerprint,
        )


PRESETS: dict[str, NextTokenConfig] = {
    # Published sizes (LlamaGen, table 1 and repository).
    "gpt-b": NextTokenConfig(),
    "gpt-l": NextTokenConfig(depth=24, width=1024, num_heads=16),
    "gpt-xl": NextTokenConfig(depth=36, width=1280, num_heads=20),
    "gpt-xxl": NextTokenConfig(depth=48, width=1536, num_heads=24),
    "gpt-xxxl": NextTokenConfig(depth=48, width=2560, num_heads=40),
    "gpt-1b": NextTokenConfig(depth=22, width=2048, num_heads=32),
    "gpt-3b": NextTokenConfig(depth=24, width=3200, num_heads=32),
    "gpt-7b": NextTokenConfig(depth=32, width=4096, num_heads=32),
    # Small ones, for a CPU or minutes on a GPU.
    "gpt-nano": NextTokenConfig(depth=6, width=256, num_heads=4, dropout=0.0),
    "gpt-micro": NextTokenConfig(depth=8, width=384, num_heads=6),
    "gpt-mini": NextTokenConfig(depth=12, width=512, num_heads=8),
}
