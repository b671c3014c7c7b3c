"""Guidance in a part of the sampling: which steps, what it computes, and what it costs."""

import math

import pytest
import torch
from chance import generators, randomised
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.prior.next_scale.decoding import ScaleDecoder
from smalti.prior.next_scale.model import NextScaleConfig, NextScalePrior
from smalti.prior.next_token.decoding import TokenDecoder
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.prior.sampling import SamplingOptions
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

LABELS = torch.tensor([0, 1, 2])
NULL = torch.full((3,), 3)
CODES = torch.randint(16, (3, 15), generator=torch.Generator().manual_seed(1))
SCALES = ((1, 1), (1, 2), (2, 2), (2, 3))
LENGTHS = [1, 2, 4, 6]


@pytest.fixture
def next_token() -> NextTokenPrior:
    config = NextTokenConfig(
        spec=CodeSpec(16, ((3, 5),)), num_classes=3, depth=2, width=16, num_heads=2, hidden=32
    )
    return randomised(NextTokenPrior(config))


@pytest.fixture
def next_scale() -> NextScalePrior:
    quantizer = MultiScaleConfig(
        codebook=CodebookConfig(16, 4, l2_normalise=False), scales=SCALES, convolutions=2
    )
    config = NextScaleConfig(
        spec=CodeSpec(16, SCALES),
        quantizer=quantizer,
        num_classes=3,
        depth=2,
        width=16,
        num_heads=2,
    )
    model = randomised(NextScalePrior(config))
    bound = MultiScaleQuantizer(quantizer)
    torch.nn.init.normal_(bound.codebook.weight)
    model.bind(bound)
    return model


def test_outside_the_interval_the_scale_is_one() -> None:
    options = SamplingOptions(guidance_scale=3.0, guidance_interval=(0.25, 0.5))
    assert options.guidance_scales(9) == [1, 1, 3, 3, 3, 1, 1, 1, 1]
    assert options.guided_steps(9) == range(2, 5)
    everywhere = SamplingOptions(guidance_scale=3.0, guidance_schedule="linear")
    assert everywhere.guided_steps(5) == range(1, 5)  # s_0 is 1
    for scale, interval in ((1.0, (0.0, 1.0)), (3.0, (0.26, 0.27))):
        options = SamplingOptions(guidance_scale=scale, guidance_interval=interval)
        assert not options.guided_steps(9) and options.guidance_scales(9) == [1] * 9


@pytest.mark.parametrize("schedule", ["linear", "cosine", "power-cosine"])
def test_a_schedule_is_cut_and_not_moved_by_the_interval(schedule: str) -> None:
    whole = SamplingOptions(guidance_scale=3.0, guidance_schedule=schedule).guidance_scales(11)
    cut = SamplingOptions(
        guidance_scale=3.0, guidance_schedule=schedule, guidance_interval=(0.3, 1.0)
    ).guidance_scales(11)
    assert cut == [1, 1, 1, *whole[3:]]


@pytest.mark.parametrize(
    "interval", [(0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.5,), 0.5, (math.nan, 1.0), ("0", 1.0)]
)
def test_an_impossible_interval_is_refused(next_token, next_scale, interval) -> None:
    for prior in (next_token, next_scale):
        with pytest.raises(SmaltiError, match=r"guidance_interval is .* 0 <= from <= to <= 1"):
            prior.sample(LABELS, guidance_interval=interval)


# -- next-token ------------------------------------------------------------------------------------


def guided(prior: NextTokenPrior | NextScalePrior, codes: Tensor, scales: Tensor) -> Tensor:
    """Teacher-forced logits (B, L, V), guided with a scale for every code."""
    conditional, unconditional = prior.logits(codes, LABELS), prior.logits(codes, NULL)
    mixed = unconditional + scales[:, None] * (conditional - unconditional)
    return torch.where(scales[:, None] == 1, conditional, mixed)


INTERVALS = [(0.0, 1.0), (0.25, 0.6), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0), (0.0, 0.0), (0.5, 0.5)]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("interval", INTERVALS)
def test_every_step_of_decoding_is_guided_as_teacher_forcing(
    next_token, interval, schedule
) -> None:
    options = SamplingOptions(
        guidance_scale=2.5, guidance_schedule=schedule, guidance_interval=interval
    )
    with torch.no_grad():
        expected = guided(next_token, CODES, torch.tensor(options.guidance_scales(15)))
        decoder = TokenDecoder(next_token, LABELS, next_token.null(LABELS), options)
        for j in range(15):
            torch.testing.assert_close(decoder.logits(j), expected[:, j], rtol=1e-4, atol=1e-5)
            decoder.append(CODES[:, j], j)


@pytest.mark.parametrize(
    ("interval", "passes"),
    [
        ((0.0, 1.0), [3, 3] + 14 * [6]),
        ((0.25, 0.6), 4 * [3] + [3, 3] + 4 * [6] + 6 * [3]),  # 4/14 to 8/14
        ((0.5, 0.5), 7 * [3] + [3, 3] + 7 * [3]),
        ((0.51, 0.52), 15 * [3]),
    ],
)
def test_only_guided_codes_cost_a_second_pass(next_token, interval, passes) -> None:
    """The rows of every pass; the first guided code costs one more, of all codes so far."""
    seen = []
    next_token.output.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    next_token.sample(LABELS, guidance_scale=2.0, guidance_interval=interval)
    assert seen == passes


def test_an_interval_changes_nothing_before_it(next_token) -> None:
    options = {"guidance_scale": 6.0, "temperature": 0}
    late = next_token.sample(LABELS, guidance_interval=(0.5, 1.0), **options)
    assert torch.equal(late[:, :7], next_token.sample(LABELS, temperature=0)[:, :7])
    assert not torch.equal(late, next_token.sample(LABELS, temperature=0))
    assert not torch.equal(late, next_token.sample(LABELS, **options))


def test_with_an_interval_a_sample_does_not_see_its_neighbours(next_token) -> None:
    options = {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)}
    together = next_token.sample(LABELS, generator=generators(5, 6, 7), **options)
    alone = next_token.sample(LABELS[1:2], generator=generators(6), **options)
    assert torch.equal(together[1], alone[0])


# -- next-scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "stop"), [((0.0, 0.4), 2), ((0.3, 0.7), 3), ((0.9, 1.0), 4)])
def test_every_scale_is_guided_as_teacher_forcing(next_scale, interval, stop) -> None:
    options = SamplingOptions(guidance_scale=2.5, guidance_interval=interval)
    codes = CODES[:, :13]
    scales = torch.tensor(options.guidance_scales(4)).repeat_interleave(torch.tensor(LENGTHS))
    assert (scales != 1).any() and (scales == 1).any()
    with torch.no_grad():
        expected = guided(next_scale, codes, scales).split(LENGTHS, 1)
        decoder = ScaleDecoder(next_scale, LABELS, next_scale.null(LABELS), options)
        for k, part in enumerate(codes.split(LENGTHS, 1)):
            hidden = decoder.hidden(k)
            assert len(hidden) == (6 if k < stop else 3)  # after the last: a single pass
            torch.testing.assert_close(decoder.logits(hidden, k), expected[k], rtol=1e-4, atol=1e-5)
            decoder.append(next_scale.quantizer.contribution(part, k), k)


@pytest.mark.parametrize("smooth", [False, True])
def test_an_empty_interval_is_no_guidance(next_scale, smooth: bool) -> None:
    options = {"smooth": smooth, "guidance_schedule": "constant"}
    plain = next_scale.sample(LABELS, generator=generators(1, 2, 3), **options)
    options |= {"guidance_scale": 4.0, "guidance_interval": (0.5, 0.6)}  # between two scales
    assert torch.equal(next_scale.sample(LABELS, generator=generators(1, 2, 3), **options), plain)
