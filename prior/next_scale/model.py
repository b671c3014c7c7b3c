"""Next-scale prior: a transformer over maps of codes from coarse to fine (VAR, 2404.02905).

All codes of a scale are predicted at once, from the class and from the sum of what the scales
before it say, looked at through the cells of this scale. The sum is the tokenizer's: the prior owns
a frozen copy of its quantizer.

Module names are those of VAR's published weights, which fit without renaming. Three of their
buffers are derived and left out (`lvl_1L`, `attn_bias_for_masking`, `blocks.*.attn.zero_k_bias`);
`quantizer.*`, which they lack, is filled by `bind`. VAR's guidance `cfg` is our scale 1 + cfg.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import CodeSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.prior.adaln import HeadNorm, adaptive_norm, as_parts, condition_projection
from smalti.prior.attention import KeyValueCache, attend
from smalti.prior.base import CodePrior, Loss, check_codes
from smalti.prior.layers import DropPath, drop_path_rates
from smalti.prior.next_scale.config import PRESETS, NextScaleConfig
from smalti.prior.next_scale.decoding import ScaleDecoder
from smalti.prior.next_scale.quantizer import FrozenQuantizer
from smalti.prior.sampling import SamplingOptions, sample_uniforms

# -------------------------------------------------------------------------------------------------
# A transformer block of the next-scale prior: attention between scales, feed-forward, and adaptive
# norms (VAR, 2404.02905). Module names are VAR's.

PARTS = 6  # of a block's modulation: gate, scale and shift of attention and feed-forward
MAX_LOG_SCALE = math.log(100)  # of attention, where it is learned
INITIAL_SCALE = 4.0
MODULATION_INIT = 0.5  # scales and shifts begin this much smaller than other projections


class ScaleAttention(nn.Module):
    """Self-attention, by default between queries and keys of length 1 (QK norm, 2010.04245):
    a head's scores are e^s cos(q, k) with a learned s <= ln 100."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)  # rows q | k | v, each head-major
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))  # keys have none: softmax would not see it
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.scale = 0.25 / math.sqrt(width // config.num_heads)  # VAR's, if it is not learned
        self.register_parameter("scale_mul_1H11", None)
        if config.qk_l2_norm:
            initial = torch.full((1, config.num_heads, 1, 1), math.log(INITIAL_SCALE))
            self.scale_mul_1H11 = nn.Parameter(initial)

    def forward(
        self, x: Tensor, mask: Tensor | None, layer: int, cache: KeyValueCache | None
    ) -> Tensor:  # (B, T, width)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
            for part in F.linear(x, self.mat_qkv.weight, bias).chunk(3, dim=-1)
        )
        scale = self.scale
        if self.scale_mul_1H11 is not None:
            query = F.normalize(query.float(), dim=-1)
            query = (query * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()).to(value.dtype)
            key = F.normalize(key.float(), dim=-1).to(value.dtype)
            scale = 1.0
        if cache is not None:
            key, value = cache.write(layer, key, value)
        attended = attend(query, key, value, mask=mask, scale=scale)
        return self.dropout(self.proj(attended.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh approximation of GELU."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        hidden = round(config.mlp_ratio * config.width)
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = nn.Linear(hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        return self.dropout(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class ScaleBlock(nn.Module, ABC):
    """x + gate1 attention(norm1(x)), then x + gate2 feed_forward(norm2(x))."""

    def __init__(self, config: NextScaleConfig, drop_path: float) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn = ScaleAttention(config)
        self.ffn = FeedForward(config)
        self.drop_path = DropPath(drop_path)

    @abstractmethod
    def modulation(self, condition: Tensor) -> Tensor:
        """What the class says to this block, (B, 1, 6, width): gate1, gate2, scale1, scale2,
        shift1, shift2. It is the same at every scale."""

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        mask: Tensor | None,
        layer: int,
        cache: KeyValueCache | None,
    ) -> Tensor:  # (B, T, width)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        attended = self.attn(adaptive_norm(x, scale1, shift1, self.eps), mask, layer, cache)
        x = x + self.drop_path(attended * gate1)
        return x + self.drop_path(self.ffn(adaptive_norm(x, scale2, shift2, self.eps)) * gate2)


class OwnBlock(ScaleBlock):
    """A block with a condition projection of its own: a third of the model's parameters."""

    def __init__(self, config: NextScaleConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)
        self.ada_lin = condition_projection(config.width, PARTS)

    def modulation(self, condition: Tensor) -> Tensor:
        """Of the class embedding (B, width)."""
        return as_parts(self.ada_lin(condition), condition.shape[-1])


class SharedBlock(ScaleBlock):
    """A block that adds an offset of its own to the projection that all blocks share."""

    def __init__(self, config: NextScaleConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)
        width = config.width
        self.ada_gss = nn.Parameter(torch.randn(1, 1, PARTS, width) / math.sqrt(width))

    def modulation(self, condition: Tensor) -> Tensor:
        """Of the shared projection (B, 6 width)."""
        return as_parts(condition, self.ada_gss.shape[-1]) + self.ada_gss


def initialise_modulation(parts: Tensor, gate_init: float) -> None:
    """Shrink the first values of a modulation, whose first dimension is its six parts: the gates by
    gate_init, so that a new block hardly changes its input, scales and shifts by a half."""
    with torch.no_grad():
        parts[:2] *= gate_init
        parts[2:] *= MODULATION_INIT


# -------------------------------------------------------------------------------------------------
# Who may see whom when grids of codes, coarse to fine, lie end to end.

Grids = tuple[tuple[int, int], ...]


def scale_of_codes(grids: Grids, device: torch.device) -> Tensor:
    """Number of the grid that each code lies in, (L,) int64."""
    return torch.cat(
        [torch.full((h * w,), scale, device=device) for scale, (h, w) in enumerate(grids)]
    )


def block_causal_mask(grids: Grids, device: torch.device) -> Tensor:
    """(L, L) bool, True where query i may see key j: j's scale is i's own or a coarser one.

    VAR, 2404.02905, figure 4: within a scale all codes see each other, for all are predicted at
    once; their inputs know nothing but the scales before.
    """
    scales = scale_of_codes(grids, device)
    return scales[:, None] >= scales


# -------------------------------------------------------------------------------------------------
# Teacher forcing for a next-scale prior, with or without mistakes in what it is shown.


@dataclass
class Context:
    """One training example per row."""

    inputs: Tensor  # (B, L - h_0 w_0, d): what is shown before each scale but the first
    targets: Tensor  # (B, L) int64: what is to be predicted


@torch.no_grad()
def true_context(quantizer: FrozenQuantizer, codes: Tensor) -> Context:
    """Teacher forcing with the true codes (B, L)."""
    return Context(quantizer.next_scale_inputs(codes), codes)


@torch.no_grad()
def noisy_context(quantizer: FrozenQuantizer, codes: Tensor, most: float) -> Context:
    """Codes (B, L) with mistakes, and targets that mend them.

    A prior that never saw its own mistakes cannot mend them (exposure bias). Of every picture a
    share p ~ U(0, most) of the codes shown is random; what is to be predicted next is quantized
    again, against the sum that was shown (bitwise self-correction of Infinity, 2412.04431, section
    3.3, here for a codebook).

    Infinity quantizes f - s' at scale k, with features f and the sum s' shown so far. The cache
    keeps no f, but f - s' = (f - s) + (s - s') with the sum s of the true codes, and the cells of
    f - s are about the vector of the true code k. So the target is the code nearest to that vector
    plus the cells of s - s': without mistakes the true code.
    """
    parts = codes.split_with_sizes(quantizer.lengths, 1)
    share = torch.rand(len(codes), 1, device=codes.device) * most
    true = shown = quantizer.lookup_first(codes, 0)  # both sums begin at 0, (B, d, H, W)
    inputs = [codes.new_zeros(len(codes), 0, quantizer.dim).float()]
    targets = []
    for scale, part in enumerate(parts):
        if scale:
            inputs.append(quantizer.scale_input(shown, scale))
        missing = quantizer.scale_input(true - shown, scale)
        wanted = quantizer.nearest(quantizer.codebook.lookup(part) + missing)
        targets.append(wanted)
        mistaken = torch.rand(part.shape, device=codes.device) < share
        given = torch.where(mistaken, torch.randint_like(part, quantizer.vocab_size), wanted)
        true = true + quantizer.contribution(part, scale)
        shown = shown + quantizer.contribution(given, scale)
    return Context(torch.cat(inputs, 1), torch.cat(targets, 1))


# -------------------------------------------------------------------------------------------------
# Next-scale prior: a transformer over maps of codes from coarse to fine (VAR, 2404.02905).

__all__ = ["PRESETS", "NextScaleConfig", "NextScalePrior"]

HEAD_INIT = 0.02  # a new head is this much smaller than other layers: the first loss is about ln V


@dataclass
class SharedModulation:
    """What the class says to every norm and gate; the same at every scale."""

    blocks: list[Tensor]  # (B, 1, 6, width) each
    head: Tensor  # (B, 1, 2, width)


class NextScalePrior(CodePrior):
    """p(codes | class) = prod_k p(codes of scale k | class, codes of the scales before k), with the
    codes of one scale independent of each other."""

    Config: ClassVar[type] = NextScaleConfig
    PRESETS: ClassVar[Mapping[str, NextScaleConfig]] = PRESETS
    no_weight_decay: ClassVar[tuple[str, ...]] = (
        "lvl_embed.weight",
    )  # positions do not decay, either
    class_table: ClassVar[str] = "class_emb.weight"
    config: NextScaleConfig

    @classmethod
    def models(cls, spec: LatentSpec) -> bool:
        """Codes of several grids, from coarse to fine."""
        return isinstance(spec, CodeSpec) and len(spec.grids) > 1

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        self.config = config
        width, grids = config.width, config.spec.grids
        self.quantizer = FrozenQuantizer(config.quantizer)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)  # last row: null
        self.pos_start = nn.Parameter(torch.empty(1, config.spec.lengths[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, config.spec.length, width))
        self.lvl_embed = nn.Embedding(len(grids), width)
        self.word_embed = nn.Linear(config.quantizer.codebook.code_dim, width)
        shared = config.shared_adaln
        self.shared_ada_lin = condition_projection(width, PARTS) if shared else nn.Identity()
        rates = drop_path_rates(config.drop_path, config.depth)
        block = SharedBlock if shared else OwnBlock
        self.blocks = nn.ModuleList(block(config, rate) for rate in rates)
        self.head_nm = HeadNorm(width, config.norm_eps)
        self.head = nn.Linear(width, config.spec.vocab_size)
        self._initialise()

    def _initialise(self) -> None:
        """VAR's: N(0, 1 / (3 width)) within two deviations, smaller where a branch ends."""
        config = self.config
        std = math.sqrt(1 / (3 * config.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std)
        with torch.no_grad():
            self.head.weight *= HEAD_INIT
            for name, parameter in self.named_parameters():
                if name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                    parameter /= math.sqrt(2 * config.depth)
                elif name.endswith(".ada_gss"):
                    initialise_modulation(parameter[0, 0], config.gate_init)
                elif name == "head_nm.ada_lin.1.weight":
                    parameter *= MODULATION_INIT
                elif name.endswith("ada_lin.1.weight"):
                    initialise_modulation(parameter.view(PARTS, config.width, -1), config.gate_init)

    # -- the tokenizer's quantizer --------------------------------------------------------------

    def bind(self, quantizer: nn.Module | None) -> None:
        """Copy the quantizer of the tokenizer whose codes are modelled: once, before training.

        Raises:
            SmaltiError: it is not of the kind and size in the config, or another one was bound.
        """
        self.quantizer.bind(quantizer)

    def save_pretrained(self, path: str | Path) -> Path:
        """Write config.json and model.safetensors, with the quantizer in it, into a folder.

        Raises:
            SmaltiError: no quantizer is bound; the folder holds something else.
        """
        self._check_bound()
        return super().save_pretrained(path)

    def _check_bound(self) -> None:
        if not torch.compiler.is_compiling() and not self.quantizer.bound:
            raise SmaltiError(
                "this next-scale prior has no quantizer yet: call bind(tokenizer.quantizer) first"
            )

    # -- training -------------------------------------------------------------------------------

    def forward(self, latents: Tensor, condition: Tensor) -> Loss:
        """Cross-entropy of codes (B, L) given labels (B,), in nats per code.

        In training with `context_noise`, the codes that are shown have mistakes and the targets
        mend them.
        """
        self._check(latents, condition)
        labels = self.drop_labels(condition, self.config.label_dropout)
        noise = self.config.context_noise if self.training else 0.0
        context = (
            noisy_context(self.quantizer, latents, noise)
            if noise
            else true_context(self.quantizer, latents)
        )
        logits = self._logits(context.inputs, labels).float()
        loss = F.cross_entropy(logits.flatten(0, 1), context.targets.flatten())
        correct = (logits.detach().argmax(-1) == context.targets).float().mean()
        return Loss(loss, {"accuracy": correct})

    def logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, V) of codes (B, L) given labels (B,)."""
        self._check(codes, condition)
        return self._logits(true_context(self.quantizer, codes).inputs, condition)

    def _logits(self, inputs: Tensor, labels: Tensor) -> Tensor:
        embedded = self.class_emb(labels)
        tokens = torch.cat([self.first_tokens(embedded), self.embed(inputs)], 1)
        mask = block_causal_mask(self.config.spec.grids, tokens.device)
        modulation = self.modulation(embedded)
        hidden = self.transform(tokens + self.positions(), modulation, mask, None)
        return self.read(hidden, modulation)

    def _check(self, codes: Tensor, labels: Tensor) -> None:
        self._check_bound()
        self.check_labels(labels)
        check_codes(codes, self.config.spec)
        if len(codes) != len(labels):
            raise SmaltiError(
                f"{len(labels)} conditions were given for {len(codes)} samples: give one each"
            )

    # -- the network, part by part --------------------------------------------------------------

    def first_tokens(self, embedded: Tensor) -> Tensor:
        """Input of the first scale, (B, h_0 w_0, width), from the class embedding (B, width)."""
        return embedded[:, None] + self.pos_start

    def embed(self, inputs: Tensor) -> Tensor:
        """Input of later scales, (B, n, width), from the sums seen through their cells, (B, n, d)
        fp32."""
        return self.word_embed(inputs.to(self.word_embed.weight.dtype))

    def positions(self) -> Tensor:
        """What is added to the tokens for their place and their scale, (1, L, width)."""
        scales = scale_of_codes(self.config.spec.grids, self.pos_1LC.device)
        return self.pos_1LC + self.lvl_embed(scales)

    def modulation(self, embedded: Tensor) -> SharedModulation:
        """All condition projections of class embeddings (B, width)."""
        condition = self.shared_ada_lin(embedded)
        blocks = [block.modulation(condition) for block in self.blocks]  # type: ignore[operator]
        return SharedModulation(blocks, self.head_nm.modulation(embedded))

    def transform(
        self,
        tokens: Tensor,
        modulation: SharedModulation,
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """All blocks, (B, T, width) to (B, T, width)."""
        x = tokens
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation.blocks[layer], mask, layer, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return x

    def read(self, hidden: Tensor, modulation: SharedModulation) -> Tensor:
        """Logits (B, T, V) from what the last block gave, (B, T, width)."""
        normed = self.head_nm(hidden, modulation.head)
        return self.head(normed.to(self.head.weight.dtype))

    # -- sampling -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        *,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_schedule: str = "linear",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        smooth: bool = False,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw codes (B, L) for labels (B,).

        Args:
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass.
            generator: one, or a list with one per sample: sample i then depends on its own only;
                on any device. None is a new one with a random seed. (In bf16 a matrix product
                rounds differently for other batch sizes, which can turn a draw; fp32 is safe.)
            guidance_schedule: how s_i grows over the scales: constant, linear (VAR's), cosine,
                power-cosine.
            guidance_interval: shares of the sampling, from 0, the first scale, to 1, the last,
                between which s_i applies; after it there is no second pass.
            temperature: logits are divided by it; 0 is greedy.
            top_k: keep the k likeliest codes; 0 keeps all.
            top_p: keep the likeliest codes with this total probability.
            smooth: instead of drawn codes let later scales see mixtures of their vectors, which
                grow sharper from scale to scale (VAR's "more smooth"); the codes returned are those
                that tell the resulting picture best. Better to look at, worse in Frechet distance.
            on_step: called with (codes drawn, L) after every scale.

        Raises:
            SmaltiError: a label or an option out of its range; the model's logits are not finite;
                no quantizer is bound.
        """
        self._check_bound()
        self.check_labels(condition)
        options = SamplingOptions(
            temperature, top_k, top_p, guidance_scale, guidance_schedule, guidance_interval
        )
        if smooth and temperature == 0:
            raise SmaltiError("smooth sampling needs a temperature above 0; it is 0, greedy")
        labels = condition.to(self.head.weight.device)
        length = self.config.spec.length
        if not len(labels):
            return torch.empty(0, length, dtype=torch.int64, device=labels.device)
        with self.evaluating():
            decoder = ScaleDecoder(self, labels, options)
            if smooth:
                return decoder.smooth_codes(generator, on_step)
            uniforms = sample_uniforms(len(labels), length, generator).to(labels.device)
            return decoder.codes(uniforms, on_step)
