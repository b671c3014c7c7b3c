"""Decoding of the next-token prior: token by token, with a cache of keys and values."""

from collections.abc import Callable, Iterable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.prior.attention import KeyValueCache
from smalti.prior.base import KnownCodes
from smalti.prior.conditions.base import Condition, count
from smalti.prior.next_token.config import NextTokenConfig
from smalti.prior.sampling import (
    UNSAMPLED,
    OnStep,
    SamplingOptions,
    after_step,
    are_finite,
    check_finite,
    check_replacement,
    guide,
    sample_codes,
)


class TokenModel(Protocol):
    """The parts of the model that decoding uses. B samples, P prefix tokens, n codes."""

    config: NextTokenConfig
    tok_embeddings: nn.Embedding

    @property
    def output(self) -> nn.Module: ...  # hidden states (..., width) -> logits (..., V)
    @property
    def uses_graphs(self) -> bool: ...  # whether steps are recorded as CUDA graphs
    def tokens(self, condition: Condition, codes: Tensor) -> Tensor: ...  # (B, P + n, width)
    def next_token(self, codes: Tensor, position: int) -> Tensor: ...  # (B, 1, width)
    # (B, 1, stop - start, stop) bool, or None
    def mask(self, condition: Condition, start: int, stop: int) -> Tensor | None: ...
    def empty_cache(self, rows: int, like: Tensor) -> KeyValueCache: ...
    def rope_freqs(self, device: torch.device) -> Tensor: ...  # (P + L - 1, head_dim / 2)
    def steps(self) -> list[Callable[..., Tensor]]: ...  # `blocks` of `transform`, for one token
    def transform(
        self,
        tokens: Tensor,
        rope_freqs: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache | None,
        blocks: Iterable[Callable[..., Tensor]] | None = None,
    ) -> Tensor: ...  # (B, n, width) -> (B, n, width)


class TokenDecoder:
    """The state of one call of `sample`.

    A step with guidance processes twice the rows: the samples, then the same samples with the
    condition that guidance leads away from. The second half starts at the first guided step, where
    it processes all tokens so far at once, and ends with the last one: a step without guidance is
    one pass over the samples. After a replacement of earlier codes both halves start again.
    """

    def __init__(
        self,
        model: TokenModel,
        condition: Condition,
        unconditional: Condition,
        options: SamplingOptions,
    ) -> None:
        self.model, self.options = model, options
        self.condition, self.unconditional = condition, unconditional
        config, self.batch = model.config, count(condition)
        self.scales = options.guidance_scales(config.spec.length)
        self.guided = options.guided_steps(config.spec.length)
        device = model.tok_embeddings.weight.device
        shape = (self.batch, config.spec.length)
        self.codes = torch.empty(shape, dtype=torch.int64, device=device)
        self.next_input = model.tokens(condition, self.codes[:, :0])  # (B, P, width)
        self.rope_freqs, self.steps = model.rope_freqs(device), model.steps()
        rows = self.batch * (2 if self.guided else 1)
        self.full_cache = model.empty_cache(rows, like=self.next_input)
        self.cache = self.full_cache.part(slice(self.batch))  # the rows of the next step

    def sample(
        self,
        uniforms: Tensor,
        on_step: OnStep | None,
        known: KnownCodes | None = None,
    ) -> Tensor:
        """Codes (B, L), each sampled with one of the uniforms (B, L) in [0, 1), or known."""
        uniforms, finite = uniforms.to(self.codes.device), None
        # A GPU is given the next step before it has finished this one: the host waits for nothing.
        waits = on_step is not None or not (self.model.uses_graphs or self.codes.is_cuda)
        if on_step is not None:
            self.codes.fill_(UNSAMPLED)
        for step in range(len(self.scales)):
            logits = self.logits(step)
            if not waits:
                finite = are_finite(logits) if finite is None else finite & are_finite(logits)
            codes = sample_codes(logits, uniforms[:, step], self.options, waits)
            if known is not None:
                codes = torch.where(known.mask[:, step], known.codes[:, step], codes)
            self.append(codes, step)
            if on_step is not None and not self._goes_on(step, on_step):
                break
        if finite is not None:
            check_finite(finite)
        return self.codes

    def _goes_on(self, step: int, on_step: OnStep) -> bool:
        """Call `on_step` and make what it returns the codes so far; whether sampling goes on."""
        given, goes_on = after_step(on_step, step + 1, len(self.scales), self.codes.clone())
        if given is not None:
            check_replacement(given[:, : step + 1], self.model.config.spec.vocab_size)
            same_context = torch.equal(given[:, :step], self.codes[:, :step])
            self.codes[:, :step] = given[:, :step]
            self.append(given[:, step], step)
            if not same_context and step + 1 < len(self.scales):
                self._read_again(step + 1)
        return goes_on

    def _read_again(self, step: int) -> None:
        """Empty the cache: the next input is all tokens before a step, some of which changed."""
        self.full_cache.length = 0
        self.cache = self.full_cache.part(slice(self.batch))
        self.next_input = self.model.tokens(self.condition, self.codes[:, :step])

    def logits(self, step: int) -> Tensor:
        """Logits (B, V) fp32 of the next code, with guidance if the step is guided. To be called
        for each step in order, with `append` between two calls."""
        if step not in self.guided:
            return self._read(self.next_input, self.cache, self.condition)
        if self.cache is not self.full_cache:  # the second half is not in it
            conditional = self._read(self.next_input, self.cache, self.condition)
            unconditional = self._start_guidance(step)
        else:
            tokens = torch.cat([self.next_input, self.next_input])  # (2B, 1, width)
            both = self._read(tokens, self.cache, self.condition, self.unconditional)
            conditional, unconditional = both.chunk(2)
        if step + 1 == self.guided.stop:
            self.cache = self.full_cache.part(slice(self.batch))
        return guide(conditional, unconditional, self.scales[step])

    def append(self, codes: Tensor, step: int) -> None:
        """Store the codes (B,) of a step and make them the next input."""
        self.codes[:, step] = codes
        if step + 1 < len(self.scales):
            self.next_input = self.model.next_token(codes, step + 1)

    def _start_guidance(self, step: int) -> Tensor:
        """Fill the cache rows without condition; return their logits (B, V) of this step."""
        tokens = self.model.tokens(self.unconditional, self.codes[:, :step])
        cache = self.full_cache.part(slice(self.batch, None))
        logits = self._read(tokens, cache, self.unconditional)
        self.full_cache.length = cache.length
        self.cache = self.full_cache
        return logits

    def _read(self, tokens: Tensor, cache: KeyValueCache, *conditions: Condition) -> Tensor:
        """Logits (rows, V) fp32 after new tokens (rows, n, width) of these conditions."""
        start, stop = cache.length, cache.length + tokens.shape[1]
        masks = [self.model.mask(condition, start, stop) for condition in conditions]
        mask = None if masks[0] is None else torch.cat(masks)  # type: ignore[arg-type]
        if stop - start > 1:
            hidden = self.model.transform(tokens, self.rope_freqs[start:stop], mask, cache)
        elif cache.position is None:
            rope_freqs = self.rope_freqs[start:stop]
            hidden = self.model.transform(tokens, rope_freqs, mask, cache, self.steps)
        else:
            hidden = self._replay(tokens, mask, cache)
        return self.model.output(hidden[:, -1]).float()

    def _replay(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache) -> Tensor:
        """`transform` of one token with a static cache: what the blocks are given has the same
        shapes in every step, and no number of the host."""
        start, most, position = cache.length, cache.keys.shape[3], cast(Tensor, cache.position)
        position.fill_(start)
        if mask is None:
            mask = (torch.arange(most, device=position.device) <= position)[None, None, None]
        else:
            mask = F.pad(mask, (0, most - mask.shape[-1]))  # False
        if tokens.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        rope_freqs = self.rope_freqs.index_select(0, position)
        hidden = self.model.transform(tokens, rope_freqs, mask, cache, self.steps)
        cache.length = start + 1
        return hidden
