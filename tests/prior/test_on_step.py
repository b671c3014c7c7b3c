"""After every step of sampling, of every prior: latents are seen and replaced, sampling stopped."""

from collections.abc import Callable

import pytest
import torch
from chance import generators, randomised
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.prior.base import Prior
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prediction import exact_times
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_scale.model import NextScalePrior
from smalti.prior.next_token.config import NextTokenConfig
from smalti.prior.next_token.model import NextTokenPrior
from smalti.prior.registry import PRIORS
from smalti.prior.sampling import UNSAMPLED, StopSampling
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

SIZES = {"num_classes": 3, "depth": 2, "width": 16, "num_heads": 2}
LABELS = torch.tensor([0, 2, 1])
GUIDED = {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)}  # begins late, and ends early
ENDS = (1, 5, 14)  # codes of the first 1, 2, 3 scales of the next-scale prior


def next_token() -> Prior:
    return NextTokenPrior(NextTokenConfig(spec=CodeSpec(16, ((2, 3),)), hidden=32, **SIZES))


def next_scale() -> Prior:
    scales = ((1, 1), (2, 2), (3, 3))
    quantizer = MultiScaleConfig(codebook=CodebookConfig(16, 4), scales=scales, convolutions=2)
    spec = CodeSpec(16, scales)
    prior = NextScalePrior(NextScaleConfig(spec=spec, quantizer=quantizer, **SIZES))
    prior.bind(MultiScaleQuantizer(quantizer))
    return prior


def flow() -> FlowPrior:
    sizes = {"in_channels": 2, "out_channels": 2, "grid": (4, 4), "frequency_size": 16}
    return FlowPrior(FlowConfig(network=DiTConfig(patch_size=2, **sizes, **SIZES)))


# The prior, how many steps it makes, and its options for that
CASES: dict[str, tuple[Callable[[], Prior], int, dict]] = {
    "next-token": (next_token, 6, {}),
    "next-scale": (next_scale, 3, {}),
    "flow": (flow, 4, {"num_inference_steps": 4}),
}


def test_every_registered_prior_is_tested_here() -> None:
    assert set(CASES) == set(PRIORS)


@pytest.fixture(params=list(CASES))
def name(request) -> str:
    return request.param


@pytest.fixture
def prior(name: str) -> Prior:
    return randomised(CASES[name][0]())


@pytest.fixture
def steps(name: str) -> int:
    return CASES[name][1]


@pytest.fixture
def sample(prior, name) -> Callable[..., Tensor]:
    def call(on_step=None, **options) -> Tensor:
        options = {**CASES[name][2], **options}
        return prior.sample(LABELS, generator=generators(4, 5, 6), on_step=on_step, **options)

    return call


@pytest.mark.parametrize("options", [{}, GUIDED], ids=["plain", "guided"])
def test_it_is_called_after_every_step_with_the_latents(sample, steps, options) -> None:
    seen, counts = [], []

    def on_step(step: int, total: int, latents: Tensor) -> None:
        counts.append((step, total))
        seen.append(latents.clone())
        latents.zero_()  # a copy: this changes nothing

    found, plain = sample(on_step, **options), sample(**options)
    assert torch.equal(found, plain)
    assert counts == [(step, steps) for step in range(1, steps + 1)]
    assert all(latents.shape == plain.shape and latents.dtype == plain.dtype for latents in seen)
    assert torch.equal(seen[-1], plain)


def test_codes_that_are_not_sampled_yet_are_marked(sample, name, steps) -> None:
    if name == "flow":
        pytest.skip("no codes")
    seen = []
    final = sample(lambda step, total, latents: seen.append(latents))
    ends = ENDS if name == "next-scale" else range(1, steps + 1)
    for end, codes in zip(ends, seen, strict=True):
        assert torch.equal(codes[:, :end], final[:, :end])
        assert (codes[:, end:] == UNSAMPLED).all()


@pytest.mark.parametrize("options", [{}, GUIDED], ids=["plain", "guided"])
def test_latents_that_are_returned_replace_those_of_the_sampler(sample, steps, options) -> None:
    """Wrong latents for some steps, then the right ones: the rest is as if nothing had happened, so
    that all that the sampler remembers of them is replaced."""
    right = []
    expected = sample(lambda step, total, latents: right.append(latents), **options)

    def other(latents: Tensor) -> Tensor:
        if latents.is_floating_point():
            return latents + 1
        return torch.where(latents == UNSAMPLED, latents, (latents + 1) % 16)

    for first in range(1, steps):
        for restored in range(first + 1, steps):

            def on_step(step: int, total: int, latents: Tensor) -> Tensor | None:
                if step == first:  # noqa: B023
                    return other(right[step - 1])
                return right[step - 1] if step == restored else None  # noqa: B023

            torch.testing.assert_close(sample(on_step, **options), expected)
        changed = sample(
            lambda step, total, latents: other(latents) if step == first else None,  # noqa: B023
            **options,
        )
        assert not torch.equal(changed, expected)
    last = sample(lambda step, total, latents: other(latents) if step == steps else None, **options)
    assert torch.equal(last, other(expected))


def test_latents_that_are_returned_as_they_are_change_nothing(sample) -> None:
    assert torch.equal(sample(lambda step, total, latents: latents), sample())


def test_sampling_is_stopped_early(sample, name, steps) -> None:
    right, calls = [], []
    sample(lambda step, total, latents: right.append(latents))

    def stop(step: int, total: int, latents: Tensor) -> None:
        calls.append(step)
        if step == steps - 1:
            raise StopSampling

    assert torch.equal(sample(stop), right[steps - 2])
    assert calls == list(range(1, steps))

    def replace_and_stop(step: int, total: int, latents: Tensor) -> None:
        raise StopSampling(right[0] if name == "flow" else torch.zeros_like(latents))

    found = sample(replace_and_stop)
    assert torch.equal(found[:, :1], right[0][:, :1] if name == "flow" else found[:, :1] * 0)


def test_latents_that_do_not_fit_are_refused(sample, name) -> None:
    for wrong, message in (
        (lambda latents: latents[:1], "step 1 returned shape .* it must return latents of shape"),
        (lambda latents: "noise", "step 1 returned str"),
        (lambda latents: latents * 0 + 16, "the callback returned codes in .16, 16."),
    ):
        if name == "flow" and "codes" in message:
            continue
        with pytest.raises(SmaltiError, match=message):
            sample(lambda step, total, latents, wrong=wrong: wrong(latents))


def test_smooth_sampling_reports_the_codes_nearest_to_its_features() -> None:
    prior, seen = randomised(next_scale()), []

    def sample(on_step=None) -> Tensor:
        return prior.sample(LABELS, smooth=True, generator=generators(0, 1, 2), on_step=on_step)

    def replaced(step: int, total: int, latents: Tensor) -> Tensor:
        return torch.zeros_like(latents)

    def stop(step: int, total: int, latents: Tensor) -> None:
        raise StopSampling

    plain = sample()
    assert torch.equal(sample(lambda step, total, latents: seen.append(latents)), plain)
    assert len(seen) == 3 and all((codes >= 0).all() for codes in seen)
    assert torch.equal(seen[-1], plain) and torch.equal(sample(stop), seen[0])
    assert not sample(replaced).any()


@pytest.mark.parametrize("solver", ["heun", "dopri5", "ddim", "euler-maruyama"])
def test_the_estimate_of_a_flow_is_the_expected_data(solver: str) -> None:
    """On the default path x_1 = x_t + (1 - t) v with the velocity v of the network."""
    prior, found = randomised(flow(), std=0.1), []
    options = {"num_inference_steps": 4, "solver": solver}

    def on_step(step: int, total: int, latents: Tensor) -> None:
        t = torch.full((len(LABELS),), step / total)
        velocity = prior.velocity(latents, exact_times(t), LABELS)
        found.append((prior.estimated(latents), latents + (1 - step / total) * velocity))

    final = prior.sample(LABELS, generator=generators(0, 1, 2), on_step=on_step, **options)
    for estimate, expected in found:
        torch.testing.assert_close(estimate, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[-1][0], final)
    assert torch.equal(prior.estimated(final), final)  # outside a step there is no time
