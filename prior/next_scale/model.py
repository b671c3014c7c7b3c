"""Next-scale prior: a transformer over grids of codes from coarse to fine (VAR, 2404.02905).

All codes of a scale are predicted at once, from the condition and from the scales before: their
sum of features, downsampled to the grid of this scale. The sum is the tokenizer's, so the prior
owns a frozen copy of the tokenizer's quantizer.

A class modulates every block and is the first token. A caption does both with the mean of its
tokens, and every block attends to all of them (as in Infinity, 2412.04431, section 3.1).

Module names are those of VAR's published weights, which fit without renaming. Three of VAR's
buffers are computed and not saved (`lvl_1L`, `attn_bias_for_masking`, `blocks.*.attn.zero_k_bias`).
VAR's files do not contain `quantizer.*`: `bind` copies it. VAR's guidance `cfg` is our
guidance_scale - 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.data.latents import CodeSpec, LatentSpec, as_tensor
from smalti.errors import CheckpointError, ConfigurationError, GenerationError
from smalti.prior.adaln import (
    MODULATION_INIT,
    HeadNorm,
    Modulation,
    Modulations,
    Parts,
    adaptive_norm,
    initialise_modulation,
    shared_modulation,
)
from smalti.prior.attention import KeyValueCache, LayerCache, attend, interpolated_positions
from smalti.prior.base import CodePrior, KnownCodes, Loss, check_codes
from smalti.prior.conditions.base import (
    Condition,
    count,
    moved,
    part_of,
    vector_kinds,
    with_vectors,
)
from smalti.prior.conditions.text import CaptionEmbedding, Embedded, TextAttention
from smalti.prior.layers import DropPath, drop_path_rates
from smalti.prior.next_scale.config import PRESETS, NextScaleConfig
from smalti.prior.next_scale.decoding import ScaleDecoder
from smalti.prior.next_scale.teacher_forcing import noisy_context, true_context
from smalti.prior.packing import PackableLinear, gelu_of
from smalti.prior.sampling import OnStep, SamplingOptions, sample_uniforms
from smalti.randomness import Generators, RandomInputs
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

__all__ = ["PRESETS", "NextScaleConfig", "NextScalePrior"]

PARTS = 6  # of a block's modulation: gate, scale and shift of attention and feed-forward
HEAD_INIT = 0.02  # factor on the initial output weights: the first loss is about ln V
INITIAL_SCALE = 4.0  # of attention scores, where it is learned
MAX_LOG_SCALE = math.log(100)


class ScaleAttention(nn.Module):
    """Self-attention, by default between queries and keys of norm 1 (QK norm, 2010.04245): the
    scores of a head are e^s cos(q, k) with a learned s <= ln 100."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        # Rows q | k | v, each head-major.
        self.mat_qkv = PackableLinear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))  # a bias of keys has no effect in softmax
        self.proj = PackableLinear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.scale = 0.25 / math.sqrt(width // config.num_heads)  # VAR's, if it is not learned
        self.register_parameter("scale_mul_1H11", None)
        if config.qk_l2_norm:
            initial = torch.full((1, config.num_heads, 1, 1), math.log(INITIAL_SCALE))
            self.scale_mul_1H11 = nn.Parameter(initial)

    def forward(
        self, x: Tensor, mask: "BlockCausal | None", cache: LayerCache | None
    ) -> Tensor:  # (B, T, width)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.mat_qkv(x, bias)
        query, key, value = rearrange(
            qkv, "b t (three h d) -> three b h t d", three=3, h=self.num_heads
        ).unbind()  # (B, heads, T, head_dim)
        scale = self.scale
        if self.scale_mul_1H11 is not None:
            query = F.normalize(query.float(), dim=-1)
            query = (query * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()).to(value.dtype)
            key = F.normalize(key.float(), dim=-1).to(value.dtype)
            scale = 1.0
        if cache is not None:
            key, value = cache.write(key, value)
        attention = attend if mask is None else mask.attend
        attended = attention(query, key, value, scale=scale)
        return self.dropout(self.proj(rearrange(attended, "b h t d -> b t (h d)")))


class ScaleMLP(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh approximation of GELU."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        hidden = round(config.mlp_ratio * config.width)
        self.fc1 = PackableLinear(config.width, hidden)
        self.fc2 = PackableLinear(hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        return self.dropout(self.fc2(gelu_of(self.fc1, x)))


class ScaleBlock(nn.Module):
    """x + gate1 attention(norm1(x)), then x + gate2 feed_forward(norm2(x)), with adaptive norms.
    Between the two, with captions, x + text_attention(x)."""

    def __init__(self, config: NextScaleConfig, drop_path: float) -> None:
        super().__init__()
        width = config.width
        self.eps = config.norm_eps
        self.attn = ScaleAttention(config)
        self.ffn = ScaleMLP(config)
        self.drop_path = DropPath(drop_path)
        self.cross_attn = None if config.text is None else TextAttention(width, config.num_heads)
        # The block's own projection is a third of the parameters; `shared_adaln` replaces it by
        # offsets to a projection of the whole model.
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, PARTS, width) / math.sqrt(width))
        else:
            self.ada_lin = Modulation(width, PARTS)

    def modulation(self, condition: Tensor | Parts) -> Parts:
        """The block's adaLN modulation, from class embeddings (B, width) or the shared projection.

        A method of the block, not of the model: under FSDP2 a block's weights are gathered only
        while one of its own methods runs.
        """
        if isinstance(condition, Tensor):
            return self.ada_lin(condition)
        return shared_modulation(condition, self.ada_gss)

    def forward(
        self,
        x: Tensor,
        modulation: Parts,
        mask: "BlockCausal | None",
        cache: LayerCache | None,
        embedded: Embedded | None = None,
    ) -> Tensor:  # (B, T, width)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation  # VAR's order
        attended = self.attn(adaptive_norm(x, scale1, shift1, self.eps), mask, cache)
        x = x + self.drop_path(attended * gate1)
        if self.cross_attn is not None and embedded is not None:
            x = x + self.cross_attn(x, embedded)
        return x + self.drop_path(self.ffn(adaptive_norm(x, scale2, shift2, self.eps)) * gate2)


# -------------------------------------------------------------------------------------------------
# The block-causal mask (VAR, figure 4) of concatenated grids of codes, coarse to fine.

Grids = tuple[tuple[int, int], ...]


def scale_of_codes(grids: Grids, device: torch.device) -> Tensor:
    """The index of the scale of each code, (L,) int64."""
    return torch.cat(
        [torch.full((h * w,), scale, device=device) for scale, (h, w) in enumerate(grids)]
    )


def block_causal_mask(grids: Grids, device: torch.device) -> Tensor:
    """(L, L) bool, True where query i may attend to key j: j's scale is i's own or a coarser one.

    Within a scale all codes attend to each other: they are predicted at once, and their inputs
    contain nothing but the scales before.
    """
    scales = scale_of_codes(grids, device)
    return scales[:, None] >= scales


class BlockCausal:
    """Block-causal attention of all scales at once, for teacher forcing.

    On a CPU one call with the mask, made once for all layers: scale by scale it is not faster
    there. On other devices the queries of each scale attend to all keys so far, in a call without a
    mask: their fastest kernels take none, and nothing of L x L numbers is kept for the gradients.
    """

    def __init__(self, grids: Grids, device: torch.device) -> None:
        self.lengths = [height * width for height, width in grids]
        self.bias: Tensor | None = None  # (L, L), added to the scores
        if device.type == "cpu":
            masked = ~block_causal_mask(grids, device)
            self.bias = torch.zeros(masked.shape).masked_fill(masked, -torch.inf)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention (B, heads, L, head_dim) among tokens of all scales."""
        if self.bias is not None:
            return attend(query, key, value, mask=self.bias, scale=scale)
        return self.scale_by_scale(query, key, value, scale)

    def scale_by_scale(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The same, without a mask."""
        attended = []
        for part, stop in zip(query.split(self.lengths, 2), accumulate(self.lengths), strict=True):
            attended.append(attend(part, key[:, :, :stop], value[:, :, :stop], scale=scale))
        return torch.cat(attended, 2)


# -------------------------------------------------------------------------------------------------
# The tokenizer's quantizer, which turns codes into the inputs of the next scale.


class FrozenQuantizer(MultiScaleQuantizer):
    """A copy of a tokenizer's quantizer that is not trained and stays in fp32 when the model is
    cast. The saved buffer `bound` is True once the weights have been copied."""

    bound: Tensor  # () bool

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__(config)
        self.register_buffer("bound", torch.tensor(False))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Always in eval mode."""
        del mode
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`Module.to`, `half` and similar calls change the device alone, not the type."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def bind(self, quantizer: nn.Module | None) -> None:
        """Copy the weights of a tokenizer's quantizer. A second call must pass an equal one.

        Raises:
            SmaltiError: it is not a multi-scale quantizer of this config, or another one was bound
                before.
        """
        if not isinstance(quantizer, MultiScaleQuantizer):
            raise ConfigurationError(
                f"a next-scale prior is bound to a multi-scale quantizer, not to a "
                f"{type(quantizer).__name__}: give tokenizer.quantizer of a multi-scale tokenizer"
            )
        if quantizer.config != self.config:
            raise ConfigurationError(
                "the prior was made for another quantizer than this one "
                f"({_first_difference(self.config, quantizer.config)}): build it with "
                "quantizer=tokenizer.config.quantizer"
            )
        state = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in quantizer.state_dict().items()
            if name != "bound"
        }
        if self.bound and not _same_codebook(self.state_dict(), state):
            raise CheckpointError(
                "the prior is bound to another tokenizer's quantizer: use the tokenizer that it "
                "was trained with, or start a new prior"
            )
        self.load_state_dict({**state, "bound": torch.tensor(True)})


def _same_codebook(owned: dict[str, Tensor], given: dict[str, Tensor]) -> bool:
    """Whether both map codes to the same features; devices and training statistics may differ."""
    statistics = ("idle_steps", "mean_counts", "mean_sums")
    return all(
        torch.equal(owned[name].cpu(), tensor.cpu())
        for name, tensor in given.items()
        if not name.endswith(statistics)
    )


def _first_difference(own: MultiScaleConfig, other: MultiScaleConfig) -> str:
    """The first field that differs, with both values."""
    return next(
        f"{field.name} {getattr(own, field.name)}, not {getattr(other, field.name)}"
        for field in fields(own)
        if getattr(own, field.name) != getattr(other, field.name)
    )


class NextScalePrior(CodePrior):
    """p(codes | condition) = prod_k p(codes of scale k | condition, codes of the scales before k),
    with the codes of one scale independent of each other given those before.

    The condition is class labels (B,), a `TextCondition`, or both.
    """

    Config: ClassVar[type] = NextScaleConfig
    PRESETS: ClassVar[Mapping[str, NextScaleConfig]] = PRESETS
    no_weight_decay: ClassVar[tuple[str, ...]] = ("lvl_embed.weight",)  # like positions
    class_table: str = "class_emb.weight"
    compiled_parts: ClassVar[tuple[str, ...]] = ("blocks",)
    weight_only_parts: ClassVar[tuple[str, ...]] = ("blocks", "head")
    row_options: ClassVar[tuple[str, ...]] = ("known", "known_mask")
    config: NextScaleConfig

    @classmethod
    def supports(cls, spec: LatentSpec) -> bool:
        """Codes of several grids, from coarse to fine."""
        return isinstance(spec, CodeSpec) and len(spec.grids) > 1

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        self.config = config
        width, grids = config.width, config.spec.grids
        self.quantizer = FrozenQuantizer(config.quantizer)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)  # last row: null
        self.captions = CaptionEmbedding.of_config(config, width)
        self.vectors = vector_kinds(config.conditions, width)
        self.pos_start = nn.Parameter(torch.empty(1, config.spec.lengths[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, config.spec.length, width))
        self.lvl_embed = nn.Embedding(len(grids), width)
        self.word_embed = nn.Linear(config.quantizer.codebook.code_dim, width)
        if config.shared_adaln:
            self.shared_ada_lin = Modulation(width, PARTS)
        rates = drop_path_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(ScaleBlock(config, rate) for rate in rates)
        self.head_nm = HeadNorm(width, config.norm_eps)
        self.head = PackableLinear(width, config.spec.vocab_size)
        self._initialise()

    def _initialise(self) -> None:
        """VAR's: normal with variance 1 / (3 width), truncated to [-2, 2], and smaller in the last
        layer of each residual branch, in modulations and in the output layer."""
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
        for module in self.modules():
            if isinstance(module, TextAttention):
                module.reset_output()

    def bind(self, quantizer: nn.Module | None) -> None:
        """Copy the quantizer of the tokenizer whose codes are modelled: once, before training.

        Raises:
            SmaltiError: it is not of the kind and size in the config, or another one was bound.
        """
        self.quantizer.bind(quantizer)

    def save_pretrained(self, path: str | Path, **options: Any) -> Path:
        """Write config.json and model.safetensors, with the quantizer in it, into a folder.

        Raises:
            SmaltiError: no quantizer is bound; the folder contains other files.
        """
        self._check_bound()
        return super().save_pretrained(path, **options)

    def _check_bound(self) -> None:
        if not torch.compiler.is_compiling() and not self.quantizer.bound:
            raise ConfigurationError(
                "this next-scale prior has no quantizer yet: call bind(tokenizer.quantizer) first"
            )

    def adapt_positions(self, weights: dict[str, Tensor], source: Any) -> str:
        """Positions are interpolated within each scale, if both priors have as many scales."""
        old, new = source.config.spec, self.config.spec
        if len(old.grids) != len(new.grids):
            return f"it has {len(old.grids)} scales, and this run {len(new.grids)}"
        grids = list(zip(old.grids, new.grids, strict=True))
        for name, pairs in (("pos_start", grids[:1]), ("pos_1LC", grids)):
            parts = weights[name][0].split([h * w for (h, w), _ in pairs])
            resized = (
                interpolated_positions(part, *pair) for part, pair in zip(parts, pairs, strict=True)
            )
            weights[name] = torch.cat(list(resized))[None]
        return f"its positions are interpolated to the {len(grids)} scales of this run"

    # -- the network ----------------------------------------------------------------------------

    def embedded(self, condition: Condition) -> Embedded:
        """The embedded condition; without classes, the single row of the class table."""
        if self.config.condition == "text":
            row = self.class_emb.weight[0]
        else:
            row = self.class_emb(self.class_rows(condition))
        row = with_vectors(row, self.vectors, condition)
        if self.captions is None:
            return Embedded(row)
        caption = self.captions.embedded(part_of(condition, "text"))
        return Embedded(row + caption.vector, caption.tokens, caption.mask)

    def first_tokens(self, embedded: Tensor) -> Tensor:
        """The input of the first scale, (B, h_0 w_0, width), from class embeddings (B, width)."""
        return embedded[:, None] + self.pos_start

    def embed(self, inputs: Tensor) -> Tensor:
        """The input of later scales, (B, n, width), from downsampled sums (B, n, d) fp32."""
        return self.word_embed(inputs.to(self.word_embed.weight.dtype))

    def positions(self) -> Tensor:
        """Position and scale embeddings of all tokens, (1, L, width)."""
        scales = scale_of_codes(self.config.spec.grids, self.pos_1LC.device)
        return self.pos_1LC + self.lvl_embed(scales)

    def modulation(self, embedded: Tensor) -> Modulations:
        """The adaLN modulations of class embeddings (B, width), the same at every scale."""
        condition = self.shared_ada_lin(embedded) if self.config.shared_adaln else embedded
        blocks = [block.modulation(condition) for block in self.blocks]  # type: ignore[operator]
        return Modulations(blocks, self.head_nm.modulation(embedded))

    def transform(
        self,
        tokens: Tensor,
        modulation: Modulations,
        mask: "BlockCausal | None",
        cache: KeyValueCache | None,
        embedded: Embedded | None = None,
    ) -> Tensor:
        """All blocks, (B, T, width) to (B, T, width); `embedded` is needed for captions."""
        x = tokens
        for layer, block in enumerate(self.blocks):
            own = None if cache is None else cache.layers[layer]
            x = block(x, modulation.blocks[layer], mask, own, embedded)
        return x

    def read(self, hidden: Tensor, modulation: Modulations) -> Tensor:
        """Logits (B, T, V) from the output of the last block, (B, T, width)."""
        normed = self.head_nm(hidden, modulation.head)
        return self.head(normed.to(self.word_embed.weight.dtype))

    def logits(self, codes: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced logits (B, L, V) of codes (B, L) given their conditions."""
        codes, condition = as_tensor(codes), as_tensor(condition)
        self._check(codes, condition)
        return self._logits(true_context(self.quantizer, codes).inputs, condition)

    def _logits(self, inputs: Tensor, condition: Condition) -> Tensor:
        embedded = self.embedded(condition)
        first = self.first_tokens(embedded.vector)
        tokens = torch.cat([first, self.embed(inputs)], 1)  # (B, L, width)
        mask = BlockCausal(self.config.spec.grids, tokens.device)
        modulation = self.modulation(embedded.vector)
        hidden = self.transform(tokens + self.positions(), modulation, mask, None, embedded)
        return self.read(hidden, modulation)

    def _check(self, codes: Tensor, condition: Condition) -> None:
        self._check_bound()
        self.check_condition(condition, len(codes))
        check_codes(codes, self.config.spec)

    # -- training -------------------------------------------------------------------------------

    def forward(
        self, latents: Tensor, condition: Condition, random_inputs: RandomInputs | None = None
    ) -> Loss:
        """Cross-entropy of codes (B, L) given their conditions, in nats per code.

        In training with `context_noise`, some input codes are random and the targets correct the
        error.

        Args:
            random_inputs: unused; random numbers come from torch's global generator.
        """
        del random_inputs
        latents, condition = as_tensor(latents), as_tensor(condition)
        self._check(latents, condition)
        condition = self.drop(condition, self.config.label_dropout)
        noise = self.config.context_noise if self.training else 0.0
        context = (
            noisy_context(self.quantizer, latents, noise)
            if noise
            else true_context(self.quantizer, latents)
        )
        logits = self._logits(context.inputs, condition).float()  # (B, L, V)
        loss = F.cross_entropy(logits.flatten(0, 1), context.targets.flatten())
        correct = (logits.detach().argmax(-1) == context.targets).float().mean()
        return Loss(loss, {"accuracy": correct})

    # -- sampling -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        *,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        negative_condition: Condition | None = None,
        guidance_schedule: str = "linear",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        smooth: bool = False,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample codes (B, L) for labels (B,), captions or both.

        Args:
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass.
            generator: one, or a list with one per sample: sample i then depends on its own only;
                on any device. None is a new one with a random seed. (Matrix products round
                differently at other batch sizes, which can change a code in bf16 and rarely does in
                fp32.)
            negative_condition: what guidance leads away from, a condition for each sample; None is
                the null condition.
            guidance_schedule: how s_i grows over the scales: constant, linear (VAR's), cosine,
                power-cosine.
            guidance_interval: shares of the sampling, from 0, the first scale, to 1, the last,
                between which s_i applies; after it there is no second pass.
            temperature: logits are divided by it; 0 is greedy.
            top_k: keep the k likeliest codes; 0 keeps all.
            top_p: keep the likeliest codes with this total probability.
            smooth: the input of later scales is mixtures of codebook vectors instead of sampled
                codes; a mixture is sharper at a later scale (VAR's "more smooth"). The result is
                the codes nearest to the final features. Images look smoother, the Frechet distance
                is worse.
            known: codes (B, L) of given images, of which those in `known_mask` are kept, each
                corrected for what the scales before it differ from those of `known`.
            known_mask: (B, L) bool, True where the code of `known` is kept.
            on_step: called after every scale with the number of scales sampled, their number, and
                codes (B, L), -1 in the scales that are not sampled yet (with `smooth` the codes
                nearest to the features so far); what it returns replaces the sampled codes.

        Raises:
            SmaltiError: a label or an option is out of its range; the model's logits are not
                finite; no quantizer is bound.
        """
        self._check_bound()
        condition, negative = as_tensor(condition), as_tensor(negative_condition)
        self.check_condition(condition)
        self.check_guidance(guidance_scale)
        options = SamplingOptions(
            temperature, top_k, top_p, guidance_scale, guidance_schedule, guidance_interval
        )
        if smooth and temperature == 0:
            raise GenerationError("smooth sampling needs a temperature above 0; it is 0, greedy")
        samples, device = count(condition), self.word_embed.weight.device
        negative = self.unconditional(condition, negative)
        length = self.config.spec.length
        kept = KnownCodes.checked(known, known_mask, samples, self.config.spec, device)
        if smooth and kept is not None:
            raise GenerationError("smooth sampling mixes codes, and keeps none: leave out smooth")
        if not samples:
            return torch.empty(0, length, dtype=torch.int64, device=device)
        with self.evaluating():
            both = moved(condition, device), moved(negative, device)
            decoder = ScaleDecoder(self, *both, options)
            if smooth:
                return decoder.smooth_codes(generator, on_step)
            uniforms = sample_uniforms(samples, length, generator).to(device)
            return decoder.codes(uniforms, on_step, kept)
