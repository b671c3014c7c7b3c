"""Decoding of the next-scale prior: scale by scale, with a cache of keys and values."""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.prior.adaln import Modulations
from smalti.prior.attention import KeyValueCache
from smalti.prior.base import KnownCodes
from smalti.prior.conditions.base import Condition, count, joined
from smalti.prior.conditions.text import Embedded
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.sampling import (
    UNSAMPLED,
    OnStep,
    SamplingOptions,
    after_step,
    check_replacement,
    filtered,
    guide,
    sample_codes,
    sample_uniforms,
)
from smalti.randomness import Generators
from smalti.tokenizer.quantizers.multi_scale import MultiScaleQuantizer

# Most logits in memory while sampling: 128 MB in fp64. On a CPU so few that the passes over them
# stay in its cache.
LOGITS_AT_ONCE = 2**24
LOGITS_AT_ONCE_ON_CPU = 2**20


class ScaleModel(Protocol):
    """The parts of the model that decoding uses. B samples; n tokens of a scale, L of all."""

    config: NextScaleConfig

    @property
    def word_embed(self) -> nn.Linear: ...
    @property
    def quantizer(self) -> MultiScaleQuantizer: ...
    def embedded(self, condition: Condition) -> Embedded: ...
    def modulation(self, embedded: Tensor) -> Modulations: ...  # of (B, width)
    def positions(self) -> Tensor: ...  # (1, L, width)
    def first_tokens(self, embedded: Tensor) -> Tensor: ...  # (B, width) -> (B, n, width)
    def embed(self, inputs: Tensor) -> Tensor: ...  # (B, n, d) -> (B, n, width)
    def transform(
        self,
        tokens: Tensor,
        modulation: Modulations,
        mask: None,
        cache: KeyValueCache | None,
        embedded: Embedded | None = None,
    ) -> Tensor: ...  # (B, n, width) -> (B, n, width)
    def read(self, hidden: Tensor, modulation: Modulations) -> Tensor: ...  # -> (B, n, V)


class KnownScales:
    """Known codes, scale by scale, while others are sampled (VAR, 2404.02905, zero-shot editing).

    A code stands for the residual that the scales before it left. Sampled codes of coarse scales
    change the sum in the known region too, by up-sampling and convolution, and then the known
    residuals no longer fit. So a known code is quantized again, as in `noisy_context`: it is the
    code nearest to its vector plus the difference of the two sums. Without a difference that is the
    known code. VAR's demonstration keeps the codes themselves, which leaves up to three times the
    error.
    """

    def __init__(self, quantizer: MultiScaleQuantizer, known: KnownCodes) -> None:
        self.quantizer, lengths = quantizer, quantizer.lengths
        self.codes, self.masks = known.codes.split(lengths, 1), known.mask.split(lengths, 1)
        self.total = quantizer.lookup_first(known.codes, 0)  # of the known codes so far, from 0

    def held(self, sampled: Tensor, total: Tensor, scale: int) -> Tensor:
        """Sampled codes (B, n) of a scale, or known ones where they are kept. To be called for
        each scale in order.

        Args:
            total: the sum over the scales before, (B, d, H, W).
        """
        quantizer, codes = self.quantizer, self.codes[scale]
        error = quantizer.scale_input(self.total - total, scale)  # (B, n, d)
        corrected = quantizer.nearest(quantizer.codebook.lookup(codes) + error)
        self.total = self.total + quantizer.contribution(codes, scale)
        return torch.where(self.masks[scale], corrected, sampled)


class ScaleDecoder:
    """The state of one call of `sample`.

    Until the last guided scale every pass has twice the rows: the samples, then the same samples
    with the condition that guidance leads away from. adaLN modulations depend on the condition
    alone, so they are computed once for all scales.
    """

    def __init__(
        self,
        model: ScaleModel,
        condition: Condition,
        unconditional: Condition,
        options: SamplingOptions,
    ) -> None:
        self.model, self.options = model, options
        config = model.config
        self.scales = options.guidance_scales(len(config.spec.grids))
        self.guided = options.guided_steps(len(config.spec.grids))
        self.batch = count(condition)
        self.rows = joined(condition, unconditional) if self.guided else condition
        self.lengths = config.spec.lengths
        self.positions = model.positions().split(self.lengths, 1)
        self._start()

    def _start(self) -> None:
        """The state before the first scale."""
        model, config = self.model, self.model.config
        self.embedded = model.embedded(self.rows)
        self.modulation = model.modulation(self.embedded.vector)
        device = self.embedded.vector.device
        self.tokens = model.first_tokens(
            self.embedded.vector
        )  # input of the next scale, (rows, n, width)
        height, width = config.spec.grids[-1]
        shape = (self.batch, model.quantizer.dim, height, width)
        self.total = torch.zeros(shape, device=device)  # the sum over scales so far, fp32
        self.cache = KeyValueCache(
            config.depth,
            count(self.rows),
            config.num_heads,
            config.spec.length,
            config.width // config.num_heads,
            like=torch.empty(0, dtype=_matmul_dtype(model, device), device=device),
        )

    # -- all scales -----------------------------------------------------------------------------

    def codes(
        self, uniforms: Tensor, on_step: OnStep | None, known: KnownCodes | None = None
    ) -> Tensor:
        """Codes (B, L), each sampled with one of the uniforms (B, L) in [0, 1), or known."""
        codes: list[Tensor] = []
        kept = None if known is None else KnownScales(self.model.quantizer, known)
        for scale, scale_uniforms in enumerate(uniforms.split(self.lengths, 1)):
            hidden = self.hidden(scale)
            codes.append(self._sample(hidden, scale_uniforms, scale))
            if kept is not None:
                codes[-1] = kept.held(codes[-1], self.total, scale)
            if scale + 1 < len(self.lengths):
                self.append(self.model.quantizer.contribution(codes[-1], scale), scale)
            if on_step is not None and not self._goes_on(codes, on_step):
                return self._with_unsampled(codes)
        return torch.cat(codes, 1)

    def _goes_on(self, codes: list[Tensor], on_step: OnStep) -> bool:
        """Call `on_step` and make what it returns the codes (B, n) of the scales so far; whether
        sampling goes on."""
        done, lengths = len(codes), self.lengths[: len(codes)]
        so_far = self._with_unsampled(codes)
        given, goes_on = after_step(on_step, done, len(self.lengths), so_far.clone())
        if given is None:
            return goes_on
        given = given[:, : sum(lengths)]
        check_replacement(given, self.model.config.spec.vocab_size)
        before = sum(lengths[:-1])
        same_context = torch.equal(given[:, :before], so_far[:, :before])
        codes[:] = given.split(lengths, 1)
        if done < len(self.lengths) and goes_on:
            quantizer = self.model.quantizer
            if not same_context:
                self._start()
                for scale, part in enumerate(codes[:-1]):
                    self.hidden(scale)
                    self.append(quantizer.contribution(part, scale), scale)
                self.hidden(done - 1)
            self.total = quantizer.lookup_first(given, done - 1)
            self.append(quantizer.contribution(codes[-1], done - 1), done - 1)
        return goes_on

    def _with_unsampled(self, codes: list[Tensor]) -> Tensor:
        """Codes (B, L) of the scales so far, and `UNSAMPLED` in the others."""
        done = torch.cat(codes, 1)
        missing = sum(self.lengths) - done.shape[1]
        return F.pad(done, (0, missing), value=UNSAMPLED)

    def smooth_codes(self, generator: Generators, on_step: OnStep | None) -> Tensor:
        """Codes (B, L) of the features that are the sum over scales of codebook mixtures."""
        quantizer = self.model.quantizer
        for scale, length in enumerate(self.lengths):
            hidden = self.hidden(scale)
            uniforms = sample_uniforms(self.batch, length * quantizer.vocab_size, generator)
            uniforms = uniforms.to(self.total.device).view(self.batch, length, -1)  # (B, n, V)
            self.append(quantizer.place(self._mix(hidden, uniforms, scale), scale), scale)
            if on_step is None:
                continue
            codes = quantizer.search(self.total)
            given, goes_on = after_step(on_step, scale + 1, len(self.lengths), codes.clone())
            if given is not None:
                check_replacement(given, quantizer.vocab_size)
                self.total = quantizer.lookup_first(given, len(self.lengths))
                self.append(torch.zeros_like(self.total), scale)  # makes the next input
            if scale + 1 == len(self.lengths) or not goes_on:
                return codes if given is None else given
        return quantizer.search(self.total)

    # -- one scale ------------------------------------------------------------------------------

    def hidden(self, scale: int) -> Tensor:
        """Output of the last block for the tokens of a scale, (rows, n, width); their keys and
        values stay in the cache."""
        tokens = self.tokens + self.positions[scale]
        return self.model.transform(tokens, self.modulation, None, self.cache, self.embedded)

    def logits(self, hidden: Tensor, scale: int) -> Tensor:
        """Guided logits (B, n, V) fp32 of tokens (rows, n, width) of a scale."""
        logits = self.model.read(hidden, self.modulation).float()
        if scale not in self.guided:
            return logits[: self.batch]
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self.scales[scale])

    def append(self, added: Tensor, scale: int) -> None:
        """Add the contribution of a scale to the sum, (B, d, H, W); the input of the next scale is
        the sum, downsampled to its resolution."""
        self.total = self.total + added
        if scale + 1 < len(self.lengths):
            tokens = self.model.embed(self.model.quantizer.scale_input(self.total, scale + 1))
            if scale + 1 == self.guided.stop:  # no unconditional row from here on
                self.cache = self.cache.part(slice(self.batch))
                self.modulation = self.modulation.first(self.batch)
                self.embedded = self.embedded.first(self.batch)
            self.tokens = torch.cat([tokens, tokens]) if scale + 1 < self.guided.stop else tokens

    def _sample(self, hidden: Tensor, uniforms: Tensor, scale: int) -> Tensor:
        """Codes (B, n) of tokens (rows, n, width), sampled with uniforms (B, n)."""
        codes = []
        for tokens, part in self._portions(hidden, uniforms):
            logits = self.logits(tokens, scale).flatten(0, 1)  # (B n, V)
            codes.append(sample_codes(logits, part.flatten(), self.options).view(part.shape))
        return torch.cat(codes, 1)

    def _mix(self, hidden: Tensor, uniforms: Tensor, scale: int) -> Tensor:
        """Mixtures of codebook vectors, (B, n, d), for tokens (rows, n, width).

        The weights of the codes are softmax((logits (1 + r) + g) / tau) with Gumbel noise g from
        uniforms (B, n, V), the progress r in [0, 1] and tau = 0.27 (1 - 0.95 r) (VAR's published
        code; Gumbel-softmax, 1611.01144).
        """
        progress = scale / max(len(self.lengths) - 1, 1)
        tau = 0.27 * (1 - 0.95 * progress)
        vectors, mixtures = self.model.quantizer.codebook.vectors, []
        for tokens, part in self._portions(hidden, uniforms):
            logits = filtered(self.logits(tokens, scale).flatten(0, 1), self.options)  # (B n, V)
            gumbel = -(-part.flatten(0, 1).log()).log()
            weights = ((logits * (1 + progress) + gumbel) / tau).softmax(-1)
            mixture = weights.to(vectors.dtype) @ vectors
            mixtures.append(rearrange(mixture, "(b n) d -> b n d", b=self.batch))
        return torch.cat(mixtures, 1)

    def _portions(self, hidden: Tensor, uniforms: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens (rows, n, width) with their uniforms (B, n, ...), a few at a time: logits of all
        at once could exceed the memory."""
        per_token = max(1, len(hidden)) * self.model.config.spec.vocab_size
        on_cpu = hidden.device.type == "cpu"
        portion = max(1, (LOGITS_AT_ONCE_ON_CPU if on_cpu else LOGITS_AT_ONCE) // per_token)
        return zip(hidden.split(portion, 1), uniforms.split(portion, 1), strict=True)


def _matmul_dtype(model: ScaleModel, device: torch.device) -> torch.dtype:
    """The type of keys and values: that of autocast if it is on, else that of the weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.word_embed.weight.dtype
