"""Decoding of a next-token prior: token by token, with a cache of keys and values."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smalti.prior.attention import KeyValueCache
from smalti.prior.conditions.text import Condition, TextCondition
from smalti.prior.sampling import SamplingOptions, guide, sample_codes

if TYPE_CHECKING:
    from smalti.prior.next_token.model import NextTokenPrior


class TokenDecoder:
    """One call of `sample`.

    Guided steps read a second half of rows, without a condition. It comes to be at the first of
    them, where it reads all tokens so far at once, and ends with the last: a step without guidance
    costs one pass over the samples alone.
    """

    def __init__(
        self, prior: "NextTokenPrior", condition: Condition, options: SamplingOptions
    ) -> None:
        self.prior, self.condition, self.options = prior, condition, options
        config, self.batch = prior.config, len(condition)
        self.scales = options.guidance_scales(config.spec.length)
        self.guided = options.guided_steps(config.spec.length)
        device = prior.output.weight.device
        shape = (self.batch, config.spec.length)
        self.codes = torch.empty(shape, dtype=torch.int64, device=device)
        self.next_input = prior.tokens(condition, self.codes[:, :0])  # (B, P, width)
        self.table = prior.rotary(device)
        self.both = KeyValueCache(
            config.depth,
            self.batch * (2 if self.guided else 1),
            config.kv_heads,
            config.prefix_length + config.spec.length - 1,
            config.head_dim,
            like=self.next_input,
        )
        self.cache = self.both.part(slice(self.batch))  # of the rows that are read

    def sample(self, uniforms: Tensor, on_step: Callable[[int, int], None] | None) -> Tensor:
        """Codes (B, L), drawn with one number in [0, 1) each, (B, L)."""
        uniforms = uniforms.to(self.codes.device)
        for step in range(len(self.scales)):
            self.append(sample_codes(self.logits(step), uniforms[:, step], self.options), step)
            if on_step is not None:
                on_step(step + 1, len(self.scales))
        return self.codes

    def logits(self, step: int) -> Tensor:
        """Logits (B, V) fp32 of the code to come, guided where the step is; steps in their order,
        with `append` between them."""
        if step not in self.guided:
            return self._read(self.next_input, self.cache)
        if step == self.guided.start:
            conditional = self._read(self.next_input, self.cache)
            unconditional = self._catch_up(step)
        else:
            tokens = torch.cat([self.next_input, self.next_input])
            conditional, unconditional = self._read(tokens, self.cache).chunk(2)
        if step + 1 == self.guided.stop:
            self.cache = self.both.part(slice(self.batch))
        return guide(conditional, unconditional, self.scales[step])

    def append(self, codes: Tensor, step: int) -> None:
        """The code drawn at a step for every sample, (B,), is the next input."""
        self.codes[:, step] = codes
        if step + 1 < len(self.scales):
            self.next_input = self.prior.next_token(codes, step + 1)

    def _catch_up(self, step: int) -> Tensor:
        """Begin the rows without a condition; their logits (B, V)."""
        tokens = self.prior.tokens(self.prior.null(self.condition), self.codes[:, :step])
        unconditional = self.both.part(slice(self.batch, None))
        logits = self._read(tokens, unconditional)
        self.both.length = unconditional.length
        self.cache = self.both
        return logits

    def _read(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (rows, V) fp32 after new tokens (rows, n, width)."""
        start, stop = cache.length, cache.length + tokens.shape[1]
        mask = None
        if isinstance(self.condition, TextCondition):
            mask = self.condition.attention_mask(start, stop)  # no text has the same padding
            mask = mask.repeat(len(tokens) // self.batch, 1, 1, 1)
        hidden = self.prior.transform(tokens, self.table[start:stop], mask, cache)
        return self.prior.output(hidden[:, -1]).float()
