"""Continuous batching: a sample has the codes of a call of `sample`, whoever shares its batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from chance import randomised
from conftest import TINY_PRIOR
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import GenerationError
from smalti.pipelines import continuous
from smalti.pipelines.continuous import ContinuousBatch
from smalti.prior.conditions.base import Combination, repeated
from smalti.prior.conditions.text import TextCondition
from smalti.prior.next_token import decoding
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior

SLOTS, LENGTH, TOKENS, DIM = 3, 20, 5, 6
TINY = replace(TINY_PRIOR, spec=CodeSpec(16, ((4, 5),)))


def caption(label: int) -> TextCondition:
    """Features of a caption that is padded on the left."""
    generator = torch.Generator().manual_seed(label)
    mask = torch.arange(TOKENS)[None] >= label
    return TextCondition(torch.randn(1, TOKENS, DIM, generator=generator), mask)


def labels(label: int) -> Tensor:
    return torch.tensor([label])


def both(label: int) -> Combination:
    return Combination({"class": labels(label), "text": caption(label)})


TEXT = {"text_length": TOKENS, "text_dim": DIM}
CASES: dict[str, tuple[NextTokenConfig, Callable[[int], Any]]] = {
    "class": (TINY, labels),
    "fewer key heads": (replace(TINY, num_kv_heads=1), labels),
    "random order": (replace(TINY, random_order=(0.5, 0.75), qk_norm=True), labels),
    "text": (replace(TINY, condition="text", num_classes=0, **TEXT), caption),
    "class and text": (replace(TINY, condition="class+text", **TEXT), both),
}
GUIDANCE: dict[str, dict[str, Any]] = {
    "none": {"guidance_scale": 1.0, "top_k": 5, "top_p": 0.9},
    "all steps": {"guidance_scale": 3.0, "temperature": 0.0},
    "some steps": {"guidance_scale": 2.0, "guidance_interval": [0.2, 0.6]},
    "growing": {"guidance_scale": 2.5, "guidance_schedule": "linear"},
}
Request = tuple[int, int, Any, dict[str, Any]]  # from which step on, slot, condition, options


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def requests(condition: Callable[[int], Any], given: dict[str, Any]) -> list[Request]:
    other = {"guidance_scale": 1.5, "temperature": 0.7}  # of a row with options of its own
    return [
        (0, 0, condition(0), given),
        (0, 1, condition(1), given),
        (3, 2, condition(2), other),
        (9, 0, condition(1), given),  # waits until the first leaves
        (25, 1, condition(2), given),
    ]


def in_turns(batch: ContinuousBatch, wanted: list[Request]) -> list[Any]:
    """The codes of requests, which join as soon as they may and their slot is empty."""
    found: dict[int, Any] = {}
    waiting, inside, step = dict(enumerate(wanted)), dict[int, int](), 0
    while waiting or inside:
        for number, (start, slot, condition, options) in list(waiting.items()):
            if start <= step and slot not in inside:
                batch.join(slot, condition, seeded(number), **options)
                inside[slot] = number
                del waiting[number]
        for slot, codes in batch.step().items():
            found[inside.pop(slot)] = codes
        step += 1
    return [found[number] for number in range(len(wanted))]


def alone(prior: NextTokenPrior, slot: int, condition: Any, seed: int, options: dict) -> Tensor:
    """In row `slot` of a call, as generation jobs and the server sample."""
    filled = repeated(condition, SLOTS)
    generators = [seeded(seed if row == slot else 99) for row in range(SLOTS)]
    return prior.sample(filled, generator=generators, **options)[slot]


@pytest.fixture
def logits(monkeypatch) -> dict[str, list[Tensor]]:
    """The logits from which codes are sampled, by the module that does it."""
    found: dict[str, list[Tensor]] = {"continuous": [], "decoding": []}
    for module in (continuous, decoding):

        def noted(logits, *others, sample=module.sample_codes, name=module.__name__):
            found[name.rpartition(".")[2]].append(logits)
            return sample(logits, *others)

        monkeypatch.setattr(module, "sample_codes", noted)
    return found


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_join_and_leave_have_the_codes_that_they_have_alone(
    case: str, guidance: str, logits
) -> None:
    """And the same logits, to the bit."""
    config, condition = CASES[case]
    prior = randomised(NextTokenPrior(config)).eval()
    wanted = requests(condition, GUIDANCE[guidance])
    found = in_turns(ContinuousBatch(prior, SLOTS), wanted)
    in_batch = {tuple(row.tolist()) for rows in logits["continuous"] for row in rows}
    assert sum(map(len, logits["continuous"])) == len(wanted) * LENGTH
    for number, (_, slot, value, options) in enumerate(wanted):
        logits["decoding"].clear()
        assert torch.equal(found[number], alone(prior, slot, value, number, options))
        assert {tuple(rows[slot].tolist()) for rows in logits["decoding"]} <= in_batch


@pytest.mark.parametrize("case", CASES)
def test_codes_are_the_same_where_all_slots_attend_in_one_kernel(case: str, monkeypatch) -> None:
    """As on a GPU."""
    config, condition = CASES[case]
    prior = randomised(NextTokenPrior(config)).eval()
    wanted = requests(condition, GUIDANCE["some steps"])
    expected = in_turns(ContinuousBatch(prior, SLOTS), wanted)
    monkeypatch.setattr(continuous, "in_one_kernel", lambda device: True)
    found = in_turns(ContinuousBatch(prior, SLOTS), wanted)
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_codes_on_a_gpu(case: str) -> None:
    config, condition = CASES[case]
    prior = randomised(NextTokenPrior(config)).eval().cuda()
    wanted = requests(condition, GUIDANCE["some steps"])
    found = in_turns(ContinuousBatch(prior, SLOTS), wanted)
    for number, (_, slot, value, options) in enumerate(wanted):
        assert torch.equal(found[number], alone(prior, slot, value, number, options))


def test_in_half_precision_codes_are_in_range() -> None:
    prior = randomised(NextTokenPrior(TINY)).eval().cast(torch.bfloat16)
    found = in_turns(ContinuousBatch(prior, SLOTS), requests(labels, GUIDANCE["all steps"]))
    assert all(codes.shape == (LENGTH,) and 0 <= codes.min() <= codes.max() < 16 for codes in found)


def test_infinite_logits_are_an_error_of_their_sample_alone() -> None:
    prior = randomised(NextTokenPrior(TINY)).eval()
    batch = ContinuousBatch(prior, SLOTS)
    batch.join(0, labels(0), seeded(0), guidance_scale=2.0)
    batch.join(1, labels(1), seeded(1), guidance_scale=3e38, temperature=0.5)
    found = batch.step()
    assert list(found) == [1] and isinstance(found[1], GenerationError)
    while 0 not in found:
        found = batch.step()
    assert torch.equal(found[0], alone(prior, 0, labels(0), 0, {"guidance_scale": 2.0}))


@pytest.mark.parametrize(
    ("condition", "options", "message"),
    [
        (labels(9), {}, "label"),
        (torch.tensor([0, 1]), {}, "1"),
        (labels(0), {"top_p": 2.0}, "top_p is 2"),
    ],
)
def test_a_sample_that_is_refused_does_not_join(condition, options, message: str) -> None:
    batch = ContinuousBatch(NextTokenPrior(TINY).eval(), SLOTS)
    with pytest.raises(GenerationError, match=message):
        batch.join(0, condition, seeded(0), **options)
    assert not batch.rows and batch.step() == {}
