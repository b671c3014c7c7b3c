"""Continuous batching: samples join a running batch of the next-token prior between two codes, and
leave it when they are finished (iteration-level scheduling; Orca, Yu et al., OSDI 2022).

A batch has N slots. Every pass through the network has a row for each slot, or two with guidance,
also for those that are empty. So in fp32 a sample has the same codes as in row `slot` of a call of
`sample` for N samples, to the bit of its logits on a CPU, whichever others are in the batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.errors import GenerationError
from smalti.prior.attention import LayerCache, attend
from smalti.prior.conditions.base import Condition, moved, repeated, where
from smalti.prior.next_token.model import NextTokenPrior
from smalti.prior.sampling import SamplingOptions, guide, sample_codes, sample_uniforms

CONDITIONAL, UNCONDITIONAL = 0, 1  # the first N rows of the cache, and the last N


@dataclass
class RunningSample:
    """A sample in a slot."""

    options: SamplingOptions
    scales: list[float]  # of guidance, at every step
    guided: range  # steps with guidance
    step: int = 0  # codes sampled so far


@dataclass
class Pass:
    """One evaluation of the network: which slots take part, and with which tokens."""

    halves: tuple[int, ...]  # of the cache
    step: int | None  # the tokens are all before this step; None: one new token, at any step
    slots: list[int]

    def rows(self, slots: int) -> list[int]:
        """The rows of the slots that take part, of `slots` in each half."""
        return [half * slots + slot for half in range(len(self.halves)) for slot in self.slots]


class SlotLayer(LayerCache):
    """Keys and values of one layer in one pass, in which slots have tokens of their own number.

    Args:
        rows: those that take part, which are written.
        stops: tokens of each slot after the pass, by slot.
        new: (rows that take part, n), the positions of the new tokens.
        seen: (rows, 1, 1, most tokens) bool, where the new token may attend to; None: to all
            tokens of its slot.
    """

    def __init__(
        self,
        layer: LayerCache,
        slots: int,
        rows: Tensor,
        stops: dict[int, int],
        new: Tensor,
        seen: Tensor | None,
    ) -> None:
        super().__init__(layer.keys, layer.values)
        self.slots, self.rows, self.stops, self.new, self.seen = slots, rows, stops, new, seen

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None
    ) -> Tensor:
        """Write the keys and values of new tokens, and attend to those of all tokens of a slot."""
        stops = {*self.stops.values()}
        for cache, values in ((self.keys, key), (self.values, value)):
            written = values[self.rows].transpose(1, 2).to(cache.dtype)
            cache[self.rows[:, None], :, self.new] = written  # (rows, n, heads, head_dim)
        if stops == {key.shape[2]}:  # there are no tokens before
            return attend(query, key, value, causal, mask)
        if in_one_kernel(query.device):
            return attend(query, self.keys, self.values, mask=self._seen())
        if len(self.stops) > 1 and len(stops) == 1:
            return self._attend_rows(query, slice(None), stops.pop())
        attended = torch.zeros_like(query)
        for slot, stop in self.stops.items():
            rows = slice(slot, None, self.slots)
            attended[rows] = self._attend_rows(query[rows], rows, stop)
        return attended

    def _attend_rows(self, query: Tensor, rows: slice, stop: int) -> Tensor:
        mask = None if self.seen is None else self.seen[rows, :, :, :stop]
        return attend(query, self.keys[rows, :, :stop], self.values[rows, :, :stop], mask=mask)

    def _seen(self) -> Tensor:
        """(rows, 1, 1, most tokens) bool: the tokens that a slot has."""
        last = torch.zeros(len(self.keys), dtype=self.new.dtype, device=self.new.device)
        last[self.rows] = self.new[:, -1]
        there = torch.arange(self.keys.shape[2], device=last.device) <= last[:, None, None, None]
        return there if self.seen is None else there & self.seen


def in_one_kernel(device: torch.device) -> bool:
    """Whether slots with different numbers of tokens attend in one call, to all tokens that there
    may be, with a mask. On a CPU each reads its own tokens alone, in a call of its own: the bits
    are those of a batch whose rows have the same number."""
    return device.type != "cpu"


class ContinuousBatch:
    """Samples of a next-token prior, each at a step of its own.

    Args:
        slots: N, samples at a time; the cache is of this size.
    """

    def __init__(self, prior: NextTokenPrior, slots: int) -> None:
        self.prior, self.slots = prior, slots
        self.rows: dict[int, RunningSample] = {}  # by slot
        config, weight = prior.config, prior.tok_embeddings.weight
        self.device, self.prefix = weight.device, config.prefix_length
        self.codes = torch.zeros(slots, config.spec.length, dtype=torch.int64, device=self.device)
        self.uniforms = torch.zeros(self.codes.shape, dtype=torch.float64, device=self.device)
        self.conditions: list[Condition] = [None, None]  # of each half, N rows
        self.rope_freqs = prior.rope_freqs(self.device)
        self.cache = prior.empty_cache(2 * slots, like=weight)

    def join(
        self,
        slot: int,
        condition: Condition,
        generator: torch.Generator | None,
        negative_condition: Condition | None = None,
        **options: Any,
    ) -> None:
        """Put a sample into an empty slot; the next step samples its first code.

        Args:
            condition: of one sample, as of `NextTokenPrior.sample`, like the other arguments.
            options: of `SamplingOptions`.

        Raises:
            SmaltiError: a condition or an option is out of its range.
        """
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
        }
        sampling = SamplingOptions(**values)
        self.prior.check_condition(condition, 1)
        self.prior.check_guidance(sampling.guidance_scale)
        length, here = self.codes.shape[1], torch.arange(self.slots, device=self.device) == slot
        both = condition, self.prior.unconditional(condition, negative_condition)
        for half, given in enumerate(both):
            value, others = repeated(moved(given, self.device), self.slots), self.conditions[half]
            self.conditions[half] = value if others is None else where(here, value, others)
        for kept in (self.cache.keys, self.cache.values):
            kept[:, slot :: self.slots] = 0  # a masked value has the weight 0, but 0 NaN is NaN
        self.uniforms[slot] = sample_uniforms(1, length, generator and [generator])[0]
        scales, guided = sampling.guidance_scales(length), sampling.guided_steps(length)
        self.rows[slot] = RunningSample(sampling, scales, guided)

    def leave(self, slot: int) -> None:
        """Empty a slot."""
        del self.rows[slot]

    @torch.no_grad()
    def step(self) -> dict[int, Tensor | GenerationError]:
        """Sample one code of every sample in the batch.

        Returns:
            The codes (L,) of samples that are finished, which leave, by slot; an error where the
            logits are not finite.
        """
        if not self.rows:
            return {}
        with self.prior.evaluating():
            logits = self._logits()
        finished: dict[int, Tensor | GenerationError] = {}
        alike: dict[SamplingOptions, list[int]] = {}
        for slot, row in self.rows.items():
            alike.setdefault(row.options, []).append(slot)
        for options, slots in alike.items():
            steps = [self.rows[slot].step for slot in slots]
            try:
                codes = sample_codes(logits[slots], self.uniforms[slots, steps], options)
            except GenerationError as error:
                finished |= dict.fromkeys(slots, error)
            else:
                self.codes[slots, steps] = codes
        for slot, row in self.rows.items():
            row.step += 1
            if row.step == self.codes.shape[1]:
                finished.setdefault(slot, self.codes[slot].clone())
        for slot in finished:
            self.leave(slot)
        return finished

    def _logits(self) -> Tensor:
        """Logits (N, V) fp32 of the next code, with guidance where it applies."""
        found = dict[int, Tensor]()
        for turn in self._passes():
            for half, logits in zip(turn.halves, self._read(turn), strict=True):
                found.setdefault(half, torch.zeros_like(logits))[turn.slots] = logits[turn.slots]
        logits = found[CONDITIONAL]
        guided = [slot for slot, row in self.rows.items() if row.step in row.guided]
        if guided:
            scales = [self.rows[slot].scales[self.rows[slot].step] for slot in guided]
            scale = torch.tensor(scales, dtype=logits.dtype, device=self.device)[:, None]
            logits[guided] = guide(logits[guided], found[UNCONDITIONAL][guided], scale)
        return logits

    def _passes(self) -> list[Pass]:
        """The passes of a step: those that `TokenDecoder` makes for each slot, together where they
        are the same."""
        found: dict[tuple[tuple[int, ...], int | None], list[int]] = {}
        for slot, row in self.rows.items():
            step, guided = row.step, row.guided
            if step in guided and step > guided.start:
                found.setdefault(((CONDITIONAL, UNCONDITIONAL), None), []).append(slot)
                continue
            found.setdefault(((CONDITIONAL,), None if step else 0), []).append(slot)
            if step in guided:
                found.setdefault(((UNCONDITIONAL,), step), []).append(slot)
        return [Pass(*kind, slots) for kind, slots in found.items()]

    def _read(self, turn: Pass) -> tuple[Tensor, ...]:
        """Logits (N, V) fp32 of each half of a pass; of its slots alone they have a meaning."""
        prior, conditions = self.prior, [self.conditions[half] for half in turn.halves]
        stops = {slot: self.prefix + self.rows[slot].step for slot in turn.slots}
        mask = seen = None
        if turn.step is not None:
            tokens = prior.tokens(conditions[0], self.codes[:, : turn.step])
            rope_freqs = self.rope_freqs[: tokens.shape[1]]
            mask = prior.mask(conditions[0], 0, tokens.shape[1])
        else:
            steps = torch.ones(self.slots, dtype=torch.int64, device=self.device)
            steps[turn.slots] = torch.tensor(
                [self.rows[slot].step for slot in turn.slots], device=self.device
            )
            before = self.codes.gather(1, steps[:, None] - 1)[:, 0]
            token = prior.next_token(before, steps[:, None])
            tokens = torch.cat([token] * len(conditions))
            rope_freqs = self.rope_freqs[self.prefix + steps - 1][:, None, None]
            rope_freqs = torch.cat([rope_freqs] * len(conditions))
            most = len(self.rope_freqs)
            masks = [prior.mask(condition, most - 1, most) for condition in conditions]
            seen = None if masks[0] is None else torch.cat(masks)  # type: ignore[arg-type]
        first, last = turn.halves[0] * self.slots, (turn.halves[-1] + 1) * self.slots
        cache = self.cache.part(slice(first, last))
        rows = torch.tensor(turn.rows(self.slots), device=self.device)
        ends = torch.tensor([*stops.values()] * len(conditions), device=self.device)
        new = ends[:, None] - torch.arange(tokens.shape[1], 0, -1, device=self.device)
        layers: list[LayerCache] = [
            SlotLayer(layer, self.slots, rows, stops, new, seen) for layer in cache.layers
        ]
        cache.layers = layers
        hidden = prior.transform(tokens, rope_freqs, mask, cache)
        return prior.output(hidden[:, -1]).float().chunk(len(conditions))
