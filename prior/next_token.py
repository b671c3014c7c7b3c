"""Next-token prior: a Llama-style transformer over codes in raster order (LlamaGen, 2406.06525).

The class is a prefix token; position j predicts code j from the class and the codes before it.
Module names are LlamaGen's, whose published weights fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import CodeSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.prior.attention import CausalAttention, KeyValueCache
from smalti.prior.base import Loss, Prior, check_codes
from smalti.prior.layers import RMSNorm, SwiGLU, rotary_table
from smalti.prior.sampling import SamplingOptions, draw, draw_uniforms, guide

PREFIX = 1  # class tokens before the codes


@dataclass(frozen=True)
class NextTokenConfig:
    """Defaults: LlamaGen GPT-B for 256 px ImageNet codes."""

    kind: Literal["next-token"] = "next-token"
    spec: CodeSpec = field(default_factory=lambda: CodeSpec(16384, ((16, 16),)))
    num_classes: int = 1000
    depth: int = 12
    width: int = 768
    num_heads: int = 12
    hidden: int = 0  # of the feed-forward; 0 = 8/3 width, rounded up to a multiple of 256
    dropout: float = 0.1  # of embeddings, attention and feed-forward outputs
    label_dropout: float = 0.1  # probability of training without the class
    norm_eps: float = 1e-5
    rotary_base: float = 10000.0
    prefix_rotary: Literal["identity", "zero"] = "identity"  # zero: as LlamaGen's weights expect
    tokenizer_fingerprint: str | None = None  # of the tokenizer that made the training latents

    def __post_init__(self) -> None:
        if len(self.spec.grids) != 1:
            raise SmaltiError(
                f"a next-token prior models one code grid; the latents have {len(self.spec.grids)}:"
                " use a next-scale prior"
            )
        if min(self.num_classes, self.depth, self.width, self.num_heads) < 1:
            raise SmaltiError("num_classes, depth, width and num_heads must be at least 1")
        if self.width % self.num_heads or (self.width // self.num_heads) % 4:
            raise SmaltiError(
                f"width {self.width} with {self.num_heads} heads: each head needs a multiple of 4"
            )
        if self.hidden < 0 or not (self.norm_eps >= 0 and self.rotary_base > 1):
            raise SmaltiError("hidden and norm_eps must be 0 or more, and rotary_base more than 1")
        for name in ("dropout", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SmaltiError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")

    @property
    def feed_forward_hidden(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return self.hidden or -(-int(8 * self.width / 3) // 256) * 256

    def fitted(self, spec: LatentSpec, num_classes: int, tokenizer_fingerprint: str | None) -> Self:
        """This size of model for other latents.

        Raises:
            SmaltiError: the latents are not codes of one grid.
        """
        if not isinstance(spec, CodeSpec):
            raise SmaltiError(f"a next-token prior models codes, not {spec}: use a flow prior")
        fingerprint = tokenizer_fingerprint
        return replace(self, spec=spec, num_classes=num_classes, tokenizer_fingerprint=fingerprint)


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


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = CausalAttention(config.width, config.num_heads, config.dropout)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config.width, config.feed_forward_hidden, config.dropout)

    def forward(self, x: Tensor, table: Tensor, layer: int, cache: KeyValueCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, layer, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class NextTokenPrior(Prior):
    """p(codes | class) = prod_j p(code_j | class, codes before j)."""

    Config: ClassVar[type] = NextTokenConfig
    config: NextTokenConfig

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.width)  # last row: null
        self.tok_embeddings = nn.Embedding(config.spec.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = nn.Linear(config.width, config.spec.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """N(0, 0.02) everywhere; a head of zeros, so that the first loss is exactly ln V."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    # -- training -----------------------------------------------------------------------------

    def forward(self, latents: Tensor, condition: Tensor) -> Loss:
        """Cross-entropy of codes (B, L) given labels (B,), in nats per code."""
        labels = self.drop_labels(condition, self.config.label_dropout)
        logits = self.logits(latents, labels).float()
        loss = F.cross_entropy(logits.flatten(0, 1), latents.flatten())
        correct = (logits.detach().argmax(-1) == latents).float().mean()
        return Loss(loss, {"accuracy": correct})

    def logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, V) of codes (B, L) given labels (B,)."""
        self.check_labels(condition)
        check_codes(codes, self.config.spec)
        tokens = torch.cat(
            [self.cls_embedding(condition)[:, None], self.tok_embeddings(codes[:, :-1])], dim=1
        )
        return self.output(self._transform(tokens, self._table(tokens.device), None))

    def _transform(self, tokens: Tensor, table: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = self.dropout(tokens)  # (B, T, width)
        for layer, block in enumerate(self.layers):
            x = block(x, table, layer, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def _table(self, device: torch.device) -> Tensor:
        """Rotary table of the prefix and all codes but the last, which is never an input."""
        config = self.config
        zero = config.prefix_rotary == "zero"
        head_dim = config.width // config.num_heads
        table = rotary_table(config.spec.grids[0], head_dim, config.rotary_base, PREFIX, zero)
        return table[: config.spec.length].to(device)

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        *,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw codes (B, L) for labels (B,).

        Args:
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass.
            generator: one, or a list with one per sample: sample i then depends on its own only;
                on any device. None is a new one with a random seed. (In bf16 a matrix product
                rounds differently for other batch sizes, which can turn a draw; fp32 is safe.)
            guidance_schedule: how s_i grows over the codes: constant, linear, cosine, power-cosine.
            temperature: logits are divided by it; 0 is greedy.
            top_k: keep the k likeliest codes; 0 keeps all.
            top_p: keep the likeliest codes with this total probability.
            on_step: called with (codes drawn, L) after every code.

        Raises:
            SmaltiError: a label or an option out of its range; the model's logits are not finite.
        """
        self.check_labels(condition)
        options = SamplingOptions(temperature, top_k, top_p, guidance_scale, guidance_schedule)
        labels = condition.to(self.output.weight.device)
        rows, length = len(labels), self.config.spec.length
        uniforms = draw_uniforms(rows, length, generator).to(labels.device)
        scales = options.guidance_scales(length)
        codes = torch.empty(rows, length, dtype=torch.int64, device=labels.device)
        with self.evaluating():
            decoder = _Decoder(self, labels, guided=any(scale != 1 for scale in scales))
            for step, scale in enumerate(scales):
                logits = decoder.logits(scale)
                codes[:, step] = draw(logits, uniforms[:, step], options)
                decoder.append(codes[:, step])
                if on_step is not None:
                    on_step(step + 1, length)
            decoder.check_finite()
        return codes


class _Decoder:
    """Reads one token at a time; with guidance, the second half of the rows has no class."""

    def __init__(self, prior: NextTokenPrior, labels: Tensor, guided: bool) -> None:
        self.prior, self.guided = prior, guided
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, prior.num_classes)])
        config = prior.config
        self.next_input = prior.cls_embedding(labels)[:, None]  # (rows, 1, width)
        self.hidden = self.next_input  # after the last layer
        self.table = prior._table(labels.device)
        self.cache = KeyValueCache(
            config.depth,
            len(labels),
            config.num_heads,
            config.spec.length,
            config.width // config.num_heads,
            like=self.next_input,
        )

    def logits(self, scale: float) -> Tensor:
        """Guided logits (B, V) of the next code, fp32."""
        position = self.cache.length
        table = self.table[position : position + 1]
        self.hidden = self.prior._transform(self.next_input, table, self.cache)
        logits = self.prior.output(self.hidden[:, -1]).float()
        if not self.guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, scale)

    def check_finite(self) -> None:
        """Once, at the end: what is not finite stays in the cache and reaches the last token."""
        if not self.hidden.isfinite().all():
            raise SmaltiError("the model gives NaN: its weights are damaged or overflow their type")

    def append(self, codes: Tensor) -> None:
        """The code just drawn for every sample, (B,), is the next input."""
        embedded = self.prior.tok_embeddings(codes)[:, None]
        self.next_input = torch.cat([embedded, embedded]) if self.guided else embedded
