"""Next-token prior: a Llama-style transformer over codes in raster order (LlamaGen, 2406.06525).

A class is one prefix token, a caption several; an unconditional prior has one that is always the
same. The last prefix token predicts the first code; every
later code is predicted from the condition and the codes before it. Module names are LlamaGen's,
whose published weights load without renaming.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import CodeSpec, LatentSpec, as_tensor
from smalti.errors import ConfigurationError, GenerationError
from smalti.prior.attention import (
    KeyValueCache,
    LayerCache,
    attend,
    interpolated_positions,
    rotary_frequencies,
    rotate,
)
from smalti.prior.base import CodePrior, KnownCodes, Loss, check_codes
from smalti.prior.conditions.base import (
    Condition,
    count,
    moved,
    part_of,
    vector_kinds,
    with_vectors,
)
from smalti.prior.conditions.text import CaptionEmbedding, causal_mask, without_common_padding
from smalti.prior.layers import DropPath, RMSNorm, SwiGLU, drop_path_rates
from smalti.prior.next_token.config import PRESETS, NextTokenConfig
from smalti.prior.next_token.decoding import TokenDecoder
from smalti.prior.packing import PackableLinear, is_called_plainly, is_plain_linear
from smalti.prior.sampling import OnStep, SamplingOptions, sample_uniforms
from smalti.randomness import Generators, RandomInputs

__all__ = ["PRESETS", "NextTokenConfig", "NextTokenPrior"]

INIT_STD = 0.02


class CausalAttention(nn.Module):
    """Each token attends to itself and to earlier ones.

    With fewer key and value heads than query heads, neighbouring heads share them (grouped-query
    attention, 2305.13245).
    """

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        kv_dim = config.kv_heads * config.head_dim
        # rows q | k | v, each head-major
        self.wqkv = PackableLinear(config.width, config.width + 2 * kv_dim, bias=False)
        self.wo = PackableLinear(config.width, config.width, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm:  # of every head (2302.05442): keeps attention scores in range
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.weight_dropout = config.attention_dropout
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope_freqs: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:  # (B, T, width)
        batch, length, width = x.shape
        heads = self.num_heads + self.kv_heads  # of queries and keys, which are rotated together
        qkv = self.wqkv(x).view(batch, length, heads + self.kv_heads, -1).transpose(1, 2)
        both, value = qkv[:, :heads], qkv[:, heads:]  # (B, heads, T, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = both[:, : self.num_heads], both[:, self.num_heads :]
            both = torch.cat([self.q_norm(query), self.k_norm(key)], 1)
        rotated = rotate(both, rope_freqs)
        query, key = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        # One new token attends to all tokens; several tokens have an empty cache, or none.
        causal = mask is None and query.shape[2] > 1
        if cache is not None:
            attended = cache.attend(query, key, value, causal, mask)
        else:
            dropout = self.weight_dropout if self.training else 0.0
            attended = attend(query, key, value, causal, mask, dropout=dropout)
        return self.dropout(self.wo(attended.transpose(1, 2).reshape(batch, length, width)))


class CausalBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: NextTokenConfig, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = CausalAttention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config.width, config.feed_forward_hidden, config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        rope_freqs: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:  # (B, T, width)
        attended = self.attention(self.attention_norm(x), rope_freqs, mask, cache)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


Block = Callable[[Tensor, Tensor, Tensor | None, LayerCache], Tensor]


class BlockStep:
    """A `CausalBlock` in eval mode for one new token of each sample, to the same bits where weights
    are not arranged: its parts are looked up once for all tokens.

    Between two large products the processor's caches hold nothing but weights, so that each call of
    a module, or look-up of one of its parts, takes as long as the arithmetic beside the products.
    """

    def __init__(self, block: CausalBlock) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.heads, self.kv_heads = attention.num_heads, attention.kv_heads
        self.attention_norm, self.ffn_norm = block.attention_norm.weight, block.ffn_norm.weight
        self.shape, self.eps = block.ffn_norm.normalized_shape, block.ffn_norm.eps
        self.wqkv, self.wo = _product(attention.wqkv), _product(attention.wo)
        self.w1, self.w3 = _product(feed_forward.w1), _product(feed_forward.w3)
        self.w2, self.w1_and_w3 = _product(feed_forward.w2), feed_forward.joined_weights()
        self.feed_forward = feed_forward

    @staticmethod
    def of(block: nn.Module) -> Block:
        """The step of a block; the block itself if someone has changed how it is called, such as by
        compiling it."""
        if not isinstance(block, CausalBlock) or block.attention.q_norm is not None:
            return block
        plain = all(map(is_called_plainly, (block, *block.children())))
        return BlockStep(block) if plain else block

    def __call__(
        self, x: Tensor, rope_freqs: Tensor, mask: Tensor | None, cache: LayerCache
    ) -> Tensor:  # (B, 1, width)
        rows, rotated_heads = len(x), self.heads + self.kv_heads
        normed = torch.rms_norm(x, self.shape, self.attention_norm, self.eps)
        qkv = self.wqkv(normed).view(rows, rotated_heads + self.kv_heads, 1, -1)
        rotated = rotate(qkv[:, :rotated_heads], rope_freqs)
        key, value = cache.write(rotated[:, self.heads :], qkv[:, rotated_heads:])
        attended = attend(rotated[:, : self.heads], key, value, mask=mask)
        x = x + self.wo(attended.reshape(rows, 1, -1))
        normed = torch.rms_norm(x, self.shape, self.ffn_norm, self.eps)
        if self.w1_and_w3 is None or self.feed_forward.is_packed_for(rows):
            return x + self.w2(F.silu(self.w1(normed)) * self.w3(normed))
        gate, other = F.linear(normed, self.w1_and_w3).chunk(2, -1)
        return x + self.w2(F.silu(gate) * other)


def _product(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a linear layer computes, without the call of a module if nothing else depends on it."""
    if not is_plain_linear(layer):
        return layer
    if isinstance(layer, PackableLinear) and layer.has_packed_copy:
        return layer.forward
    return partial(F.linear, weight=layer.weight, bias=layer.bias)


# -------------------------------------------------------------------------------------------------
# Random-order annealing (RAR, 2411.00776): early in training the prior predicts codes in random
# orders, later increasingly in raster order, which is the order of sampling. So it learns from
# context on both sides. The position of the code to predict is given with the code before it,
# because a permuted sequence does not determine which code is next.


def random_order_probability(progress: float, annealing: tuple[float, float]) -> float:
    """The probability of a random order: 1 until the first share of the training is done, then
    falling linearly to 0 at the second."""
    begin, end = annealing
    if progress >= end:
        return 0.0
    return 1.0 if progress < begin else (end - progress) / (end - begin)


def sample_orders(rows: int, length: int, probability: Tensor) -> Tensor:
    """An order for every sample, (rows, length) int64: random with a probability (), else raster.

    The codes in this order are codes.gather(1, order).
    """
    device = probability.device
    shuffled = torch.rand(rows, length, device=device).argsort(1)
    is_random = torch.rand(rows, 1, device=device) < probability
    return torch.where(is_random, shuffled, torch.arange(length, device=device))


def check_order(order: Tensor, rows: int, length: int) -> None:
    """Raise `GenerationError` unless every row of an order is a permutation of 0 to length - 1."""
    if order.shape != (rows, length) or order.dtype != torch.int64:
        raise GenerationError(
            f"the order has shape {tuple(order.shape)} and type {order.dtype}; "
            f"give ({rows}, {length}) int64"
        )
    if torch.compiler.is_compiling():  # a branch on values would break the graph
        return
    if not (order.sort(1).values == torch.arange(length, device=order.device)).all():
        raise GenerationError(
            f"a row of the order is no permutation of 0 to {length - 1}: give each position once"
        )


# -------------------------------------------------------------------------------------------------
# Input corruption (the code of taming transformers): some input codes are replaced by random ones,
# the targets are unchanged. A prior that was trained on true codes only does not recover from its
# own errors in sampling (exposure bias).


def corrupted(codes: Tensor, vocab_size: int, probability: float) -> Tensor:
    """Codes (B, L) int64, each replaced by a uniformly random one with a probability, which is
    1 - `pkeep` of taming transformers."""
    is_random = torch.rand(codes.shape, device=codes.device) < probability
    return torch.where(is_random, torch.randint_like(codes, vocab_size), codes)


class NextTokenPrior(CodePrior):
    """p(codes | condition) = prod_j p(code_j | condition, codes before j).

    The condition is class labels (B,), a `TextCondition`, or both.
    """

    Config: ClassVar[type] = NextTokenConfig
    PRESETS: ClassVar[Mapping[str, NextTokenConfig]] = PRESETS
    class_table: str = "cls_embedding.weight"
    compiled_parts: ClassVar[tuple[str, ...]] = ("layers",)
    weight_only_parts: ClassVar[tuple[str, ...]] = ("layers", "output")
    row_options: ClassVar[tuple[str, ...]] = ("known", "known_mask")
    config: NextTokenConfig
    order_probability: Tensor | None  # () fp32, of a random order in the next training steps

    @classmethod
    def supports(cls, spec: LatentSpec) -> bool:
        """Codes of one grid."""
        return isinstance(spec, CodeSpec) and len(spec.grids) == 1

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.config = config
        width, spec = config.width, config.spec
        # LlamaGen's names. Captions take that of the classes, which move where there are both.
        table = None if config.condition == "text" else nn.Embedding(config.num_classes + 1, width)
        self.cls_embedding = CaptionEmbedding.of_config(config, width) or table
        if config.text is not None and table is not None:
            self.label_embedding = table  # last row: null
            self.class_table = "label_embedding.weight"
        self.vectors = vector_kinds(config.conditions, width)
        self.tok_embeddings = nn.Embedding(spec.vocab_size, width)
        self.register_parameter("target_positions", None)
        if config.random_order is not None:  # added to a token: the position that it predicts
            self.target_positions = nn.Parameter(torch.empty(spec.length, width))
        token_dropout = config.dropout if config.token_dropout is None else config.token_dropout
        self.dropout = nn.Dropout(token_dropout)
        rates = drop_path_rates(config.drop_path, config.depth)
        self.layers = nn.ModuleList(CausalBlock(config, rate) for rate in rates)
        self.norm = RMSNorm(width, config.norm_eps)
        self.output = PackableLinear(width, spec.vocab_size, bias=False)
        # A tensor, so that its new values do not recompile the model.
        order_probability = None if config.random_order is None else torch.ones(())
        self.register_buffer("order_probability", order_probability, persistent=False)
        self._progress_is_set = False
        self._graph_cache: KeyValueCache | None = None
        self._initialise()

    def _initialise(self) -> None:
        """N(0, 0.02^2) everywhere; an output layer of zeros: the first loss is exactly ln V."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
        if self.target_positions is not None:
            nn.init.normal_(self.target_positions, std=INIT_STD)
        nn.init.zeros_(self.output.weight)

    def adapt_positions(self, weights: dict[str, Tensor], source: Any) -> str:
        """Rotary positions are computed; those of random orders are learned."""
        old, new = (prior.config.spec.grids[0] for prior in (source, self))
        done = f"its rotary positions are extended to {new[0]} x {new[1]} codes"
        if "target_positions" in weights:
            table = weights["target_positions"]
            weights["target_positions"] = interpolated_positions(table, old, new)
            done += ", and its target positions are interpolated"
        return done

    @property
    def positions_are_computed(self) -> bool:
        """Rotary positions are; the target positions of random orders are learned."""
        return self.target_positions is None

    # -- the network ----------------------------------------------------------------------------

    def tokens(self, condition: Condition, codes: Tensor, order: Tensor | None = None) -> Tensor:
        """Inputs (B, P + n, width): the condition, then the first n codes (B, n) of an order
        (B, L), or of raster order."""
        tokens = torch.cat([*self._prefix(condition), self.tok_embeddings(codes)], 1)
        if self.target_positions is None:
            return tokens
        length = codes.shape[1] + 1  # the last prefix token also predicts a code
        targets = self.target_positions[:length]  # (n + 1, width)
        if order is not None:
            targets = F.embedding(order[:, :length], self.target_positions)  # (B, n + 1, width)
        before = tokens.shape[1] - codes.shape[1] - 1  # of the prefix
        return tokens + F.pad(targets, (0, 0, before, 0))

    def _prefix(self, condition: Condition) -> list[Tensor]:
        """The prefix tokens of the class, (B, 1, width), and of the caption, (B, T, width)."""
        prefix = []
        if self.config.condition != "text":
            row = self._class_table(self.class_rows(condition))
            prefix.append(with_vectors(row, self.vectors, condition)[:, None])
        if self.config.text is not None:
            prefix.append(self.captions(part_of(condition, "text")))
        return prefix

    def mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        """Where the tokens start to stop may attend to all tokens until stop, (B, 1, stop - start,
        stop) bool; None where each attends to itself and to all earlier ones."""
        if self.config.text is None:
            return None
        captions = part_of(condition, "text").mask
        if self.config.condition != "text":  # the class token is never padding
            captions = F.pad(captions, (1, 0), value=True)
        return causal_mask(captions, start, stop)

    def next_token(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """The input (B, 1, width) from codes (B,) that predicts `position` in raster order, one or
        (B, 1) of them."""
        token = self.tok_embeddings(codes)[:, None]
        return token if self.target_positions is None else token + self.target_positions[position]

    def rope_freqs(self, device: torch.device, order: Tensor | None = None) -> Tensor:
        """Rotary frequencies of the prefix and of all codes but the last, which is never an input:
        (P + L - 1, head_dim / 2), or for an order (B, L) (B, 1, P + L - 1, head_dim / 2)."""
        config, prefix = self.config, self.config.prefix_length
        zero = config.prefix_rotary == "zero"
        grid = config.spec.grids[0]
        rope_freqs = rotary_frequencies(grid, config.head_dim, config.rotary_base, prefix, zero)
        rope_freqs = rope_freqs.to(device)
        if order is None:
            return rope_freqs[:-1]
        before = torch.arange(prefix, device=device).expand(len(order), -1)  # (B, P)
        positions = torch.cat([before, prefix + order[:, :-1]], 1)
        return rope_freqs[positions][:, None]

    @property
    def uses_graphs(self) -> bool:
        """Whether steps of one token are compiled to CUDA graphs: `compile(mode=...)` says so."""
        return (self.compiled_with or {}).get("mode") in ("reduce-overhead", "max-autotune")

    def empty_cache(self, rows: int, like: Tensor) -> KeyValueCache:
        """A cache for all tokens but the last code, which is never an input.

        With CUDA graphs, calls of `sample` use the same one, because a graph has its addresses:
        then no two calls may run at once.
        """
        config, kept = self.config, self._graph_cache
        length = config.prefix_length + config.spec.length - 1
        shape = (config.depth, rows, config.kv_heads, length, config.head_dim)
        if not self.uses_graphs:
            return KeyValueCache(*shape, like=like)
        if kept is None or kept.keys.shape != shape or kept.made_like != (like.dtype, like.device):
            kept = self._graph_cache = KeyValueCache(*shape, like=like, static=True)
        kept.restart()
        return kept

    def steps(self) -> list[Block]:
        """The blocks for passes of one new token, with the weights as they are now."""
        return [BlockStep.of(block) for block in self.layers]

    def transform(
        self,
        tokens: Tensor,
        rope_freqs: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache | None,
        blocks: Iterable[Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        """All blocks and the last norm, (B, T, width) to (B, T, width).

        Args:
            blocks: what `steps` returned, for one token with a cache; None: the layers.
        """
        x = self.dropout(tokens)
        for layer, block in enumerate(self.layers if blocks is None else blocks):
            own = None if cache is None else cache.layers[layer]
            x = block(x, rope_freqs, mask, own)
        return self.norm(x)

    def logits(self, codes: Tensor, condition: Condition, order: Tensor | None = None) -> Tensor:
        """Teacher-forced logits (B, L, V) of codes (B, L) given their conditions.

        Args:
            order: (B, L) int64, a permutation in every row: logits [b, k] are those of the code at
                order[b, k], given the codes at order[b, :k]. None is raster order.

        Raises:
            SmaltiError: codes, condition or order do not fit; an order is given to a prior that was
                made without `random_order`.
        """
        codes, condition = as_tensor(codes), as_tensor(condition)
        self._check(codes, condition)
        if order is not None:
            order = cast(Tensor, as_tensor(order))
            check_order(order, *codes.shape)
            if self.target_positions is None:
                raise ConfigurationError(
                    "this prior has raster order only: train with random_order, or give no order"
                )
        return self._logits(codes, condition, order)

    def _logits(self, codes: Tensor, condition: Condition, order: Tensor | None) -> Tensor:
        if order is not None:
            codes = codes.gather(1, order)
        tokens = self.tokens(condition, codes[:, :-1], order)  # (B, P + L - 1, width)
        mask = self.mask(condition, 0, tokens.shape[1])
        rope_freqs = self.rope_freqs(tokens.device, order)
        missing = rope_freqs.shape[-2] - tokens.shape[1]  # columns of padding that were left out
        if missing:
            first = 0 if self.config.condition == "text" else 1  # the class stays before them
            rope_freqs = torch.cat(
                [rope_freqs[..., :first, :], rope_freqs[..., first + missing :, :]], -2
            )
        hidden = self.transform(tokens, rope_freqs, mask, None)
        return self.output(hidden[:, self.config.prefix_length - missing - 1 :])

    # -- the condition --------------------------------------------------------------------------

    @property
    def captions(self) -> CaptionEmbedding:
        """The embedding of captions; only with condition text."""
        return cast(CaptionEmbedding, self.cls_embedding)

    @property
    def _class_table(self) -> nn.Embedding:
        """The embedding of classes, or the single row of an unconditional prior."""
        table = self.cls_embedding if self.config.text is None else self.label_embedding
        return cast(nn.Embedding, table)

    def _check(self, codes: Tensor, condition: Condition) -> None:
        self.check_condition(condition, len(codes))
        check_codes(codes, self.config.spec)

    # -- training -------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Set the share of the training that is done, which random-order annealing follows."""
        super().set_progress(progress)
        annealing = self.config.random_order
        if self.order_probability is not None and annealing is not None:
            self.order_probability.fill_(random_order_probability(progress, annealing))
            self._progress_is_set = True

    def forward(
        self, latents: Tensor, condition: Condition, random_inputs: RandomInputs | None = None
    ) -> Loss:
        """Cross-entropy of codes (B, L) given their conditions, in nats per code.

        In training with `token_corruption`, some input codes are random; with `random_order`, the
        order of the prediction is sampled for every sample.

        Args:
            random_inputs: unused; random numbers come from torch's global generator.

        Raises:
            SmaltiError: codes or condition do not fit; `set_progress` was not called before a
                training step with random orders.
        """
        del random_inputs
        latents, condition = as_tensor(latents), as_tensor(condition)
        self._check(latents, condition)
        inputs, order = latents, self._sample_orders(latents)
        if self.training and self.config.token_corruption:
            inputs = corrupted(latents, self.config.spec.vocab_size, self.config.token_corruption)
        condition = self.drop(condition, self.config.label_dropout)
        if self.training and self.config.text is not None and not torch.compiler.is_compiling():
            condition = without_common_padding(condition)
        logits = self._logits(inputs, condition, order).float()  # (B, L, V)
        targets = latents if order is None else latents.gather(1, order)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        correct = (logits.detach().argmax(-1) == targets).float().mean()
        return Loss(loss, {"accuracy": correct})

    def _sample_orders(self, codes: Tensor) -> Tensor | None:
        """Orders (B, L) of codes (B, L); None is raster order."""
        if not self.training or self.order_probability is None:
            return None
        if not self._progress_is_set:
            raise ConfigurationError(
                "random_order changes with the progress of training: call "
                "prior.set_progress(step / max_train_steps) before every step"
            )
        rows, length = codes.shape
        return sample_orders(rows, length, self.order_probability)

    # -- sampling -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        *,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        negative_condition: Condition | None = None,
        guidance_schedule: str = "constant",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample codes (B, L) for labels (B,), captions or both, in raster order.

        Args:
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass.
            generator: one, or a list with one per sample: sample i then depends on its own only;
                on any device. None is a new one with a random seed. (Matrix products round
                differently at other batch sizes, which can change a code in bf16 and rarely does in
                fp32.)
            negative_condition: what guidance leads away from, a condition for each sample; None is
                the null condition.
            guidance_schedule: how s_i grows over the codes: constant, linear, cosine, power-cosine.
            guidance_interval: shares of the sampling, from 0, the first code, to 1, the last,
                between which s_i applies; elsewhere there is no guidance and no second pass.
            temperature: logits are divided by it; 0 is greedy.
            top_k: keep the k likeliest codes; 0 keeps all.
            top_p: keep the likeliest codes with this total probability.
            known: codes (B, L) of given images, of which those in `known_mask` are kept. A sampled
                code depends on the kept and sampled codes before it, not on kept ones after it.
            known_mask: (B, L) bool, True where the code of `known` is kept.
            on_step: called after every code with the number of codes sampled, L, and codes (B, L),
                -1 where none is sampled yet; what it returns replaces the sampled codes.

        Raises:
            SmaltiError: a condition or an option is out of its range; the model's logits are not
                finite.
        """
        condition, negative = as_tensor(condition), as_tensor(negative_condition)
        self.check_condition(condition)
        self.check_guidance(guidance_scale)
        options = SamplingOptions(
            temperature, top_k, top_p, guidance_scale, guidance_schedule, guidance_interval
        )
        samples = count(condition)
        negative = self.unconditional(condition, negative)
        device, length = self.tok_embeddings.weight.device, self.config.spec.length
        kept = KnownCodes.checked(known, known_mask, samples, self.config.spec, device)
        uniforms = sample_uniforms(samples, length, generator)
        if not samples:
            return torch.empty(0, length, dtype=torch.int64, device=device)
        with self.evaluating():
            both = moved(condition, device), moved(negative, device)
            return TokenDecoder(self, *both, options).sample(uniforms, on_step, kept)
