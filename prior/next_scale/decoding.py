"""Decoding of a next-scale prior: scale by scale, with a cache of keys and values."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smalti.prior.attention import KeyValueCache
from smalti.prior.sampling import SamplingOptions, filtered, guide, sample_codes, sample_uniforms

if TYPE_CHECKING:
    from smalti.prior.next_scale.model import NextScalePrior

LOGITS_AT_ONCE = 2**24  # held while drawing: 128 MB in fp64, whatever batch, grid and vocabulary
Progress = Callable[[int, int], None] | None


class ScaleDecoder:
    """One call of `sample`. Until the last guided scale, a second half of the rows has no class.

    What the class says to norms and gates is computed here, once for all scales.
    """

    def __init__(self, prior: "NextScalePrior", labels: Tensor, options: SamplingOptions) -> None:
        self.prior, self.options = prior, options
        config = prior.config
        self.scales = options.guidance_scales(len(config.spec.grids))
        self.guided = options.guided_steps(len(config.spec.grids))
        self.batch = len(labels)
        if self.guided:
            labels = torch.cat([labels, torch.full_like(labels, prior.num_classes)])
        embedded = prior.class_emb(labels)  # (rows, width)
        self.modulation = prior.modulation(embedded)
        self.lengths = config.spec.lengths
        self.positions = prior.positions().split(self.lengths, 1)
        self.tokens = prior.first_tokens(embedded)  # input of the scale to come
        height, width = config.spec.grids[-1]
        shape = (self.batch, prior.quantizer.dim, height, width)
        self.total = torch.zeros(shape, device=labels.device)  # what the scales so far say, fp32
        self.cache = KeyValueCache(
            config.depth,
            len(labels),
            config.num_heads,
            config.spec.length,
            config.width // config.num_heads,
            like=torch.empty(0, dtype=_matmul_dtype(prior, labels.device), device=labels.device),
        )

    # -- drawing all scales ---------------------------------------------------------------------

    def codes(self, uniforms: Tensor, on_step: Progress) -> Tensor:
        """Codes (B, L), drawn with one number in [0, 1) each, (B, L)."""
        parts = []
        for scale, numbers in enumerate(uniforms.split(self.lengths, 1)):
            hidden = self.hidden(scale)
            parts.append(self._sample(hidden, numbers, scale))
            if scale + 1 < len(self.lengths):
                self.append(self.prior.quantizer.contribution(parts[-1], scale), scale)
            self._report(scale, on_step)
        return torch.cat(parts, 1)

    def smooth_codes(
        self, generator: torch.Generator | Sequence[torch.Generator] | None, on_step: Progress
    ) -> Tensor:
        """Codes (B, L) of the picture that mixtures of codes tell."""
        quantizer = self.prior.quantizer
        for scale, length in enumerate(self.lengths):
            hidden = self.hidden(scale)
            numbers = sample_uniforms(self.batch, length * quantizer.vocab_size, generator)
            numbers = numbers.to(self.total.device).view(self.batch, length, -1)  # (B, n, V)
            self.append(quantizer.place(self._mix(hidden, numbers, scale), scale), scale)
            self._report(scale, on_step)
        return quantizer.search(self.total)

    def _report(self, scale: int, on_step: Progress) -> None:
        if on_step is not None:
            on_step(sum(self.lengths[: scale + 1]), sum(self.lengths))

    # -- one scale ------------------------------------------------------------------------------

    def hidden(self, scale: int) -> Tensor:
        """What the last block gives for the tokens of a scale, (rows, n, width); they stay in the
        cache."""
        tokens = self.tokens + self.positions[scale]
        return self.prior.transform(tokens, self.modulation, None, self.cache)

    def logits(self, hidden: Tensor, scale: int) -> Tensor:
        """Guided logits (B, n, V) fp32 of tokens (rows, n, width) of a scale."""
        logits = self.prior.read(hidden, self.modulation).float()
        if scale not in self.guided:
            return logits[: self.batch]
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self.scales[scale])

    def append(self, added: Tensor, scale: int) -> None:
        """Add what a scale says, (B, d, H, W), and look at the sum as the next scale does."""
        self.total = self.total + added
        if scale + 1 < len(self.lengths):
            seen = self.prior.embed(self.prior.quantizer.scale_input(self.total, scale + 1))
            if scale + 1 == self.guided.stop:
                self._end_guidance()
            self.tokens = torch.cat([seen, seen]) if scale + 1 < self.guided.stop else seen

    def _end_guidance(self) -> None:
        """Leave the rows that have no class."""
        rows = slice(self.batch)
        self.cache = self.cache.part(rows)
        blocks = [parts[rows] for parts in self.modulation.blocks]
        self.modulation = replace(self.modulation, blocks=blocks, head=self.modulation.head[rows])

    def _sample(self, hidden: Tensor, numbers: Tensor, scale: int) -> Tensor:
        """Codes (B, n) of tokens (rows, n, width), drawn with numbers (B, n)."""
        return torch.cat(
            [
                sample_codes(
                    self.logits(tokens, scale).flatten(0, 1), part.flatten(), self.options
                ).view(part.shape)
                for tokens, part in self._in_turn(hidden, numbers)
            ],
            1,
        )

    def _mix(self, hidden: Tensor, numbers: Tensor, scale: int) -> Tensor:
        """Vectors (B, n, d): sum over codes of softmax((logits (1 + r) + g) / tau) times their
        vectors, with g Gumbel noise made of numbers (B, n, V), r the progress in [0, 1], and
        tau = 0.27 (1 - 0.95 r) (VAR's published code; Gumbel-softmax, 1611.01144)."""
        progress = scale / max(len(self.lengths) - 1, 1)
        tau = 0.27 * (1 - 0.95 * progress)
        vectors, mixtures = self.prior.quantizer.codebook.vectors, []
        for tokens, part in self._in_turn(hidden, numbers):
            logits = filtered(self.logits(tokens, scale).flatten(0, 1), self.options)
            gumbel = -(-part.flatten(0, 1).log()).log()
            shares = ((logits * (1 + progress) + gumbel) / tau).softmax(-1)
            mixtures.append((shares.to(vectors.dtype) @ vectors).unflatten(0, part.shape[:2]))
        return torch.cat(mixtures, 1)

    def _in_turn(self, hidden: Tensor, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens (rows, n, width) and their numbers (B, n, ...), as many as memory should hold."""
        per_token = max(1, len(hidden)) * self.prior.config.spec.vocab_size
        chunk = max(1, LOGITS_AT_ONCE // per_token)
        return zip(hidden.split(chunk, 1), numbers.split(chunk, 1), strict=True)


def _matmul_dtype(prior: "NextScalePrior", device: torch.device) -> torch.dtype:
    """Of keys and values, so that the cache is no larger than it needs to be."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return prior.head.weight.dtype
