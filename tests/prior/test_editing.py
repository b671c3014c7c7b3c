"""Sampling that keeps parts of given latents, or starts from them, with every prior."""

from dataclasses import dataclass, field

import pytest
import torch
from chance import generators, randomised
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.prior.base import KnownCodes, Prior
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import DDPMPath
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.flow.solvers.base import SOLVERS
from smalti.prior.next_scale.decoding import KnownScales
from smalti.prior.next_scale.model import NextScaleConfig, NextScalePrior
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.prior.sampling import guide
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

LABELS = torch.tensor([0, 1, 2])
SCALES = ((1, 1), (2, 2), (3, 4))
MULTI_SCALE = MultiScaleConfig(
    codebook=CodebookConfig(16, 4, l2_normalise=False), scales=SCALES, convolutions=2
)
LENGTH = 17
CODES = torch.randint(16, (3, LENGTH), generator=torch.Generator().manual_seed(1))
SOME = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
Z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3))
HALF = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
HALF[..., :2] = True


def next_token() -> NextTokenPrior:
    config = NextTokenConfig(
        spec=CodeSpec(16, ((1, LENGTH),)), num_classes=3, depth=2, width=16, num_heads=2, hidden=32
    )
    return randomised(NextTokenPrior(config))


def next_scale() -> NextScalePrior:
    spec = CodeSpec(16, SCALES)
    config = NextScaleConfig(
        spec=spec, quantizer=MULTI_SCALE, num_classes=3, depth=2, width=16, num_heads=2
    )
    model = randomised(NextScalePrior(config))
    quantizer = MultiScaleQuantizer(MULTI_SCALE)
    torch.nn.init.normal_(quantizer.codebook.weight)
    model.bind(quantizer)
    return model


def flow(**options: object) -> FlowPrior:
    network = DiTConfig(
        in_channels=2,
        out_channels=2,
        grid=(4, 4),
        patch_size=2,
        depth=1,
        width=16,
        num_heads=1,
        num_classes=3,
        frequency_size=16,
    )
    return randomised(FlowPrior(FlowConfig(network=network, **options)), std=0.1)


@pytest.fixture(params=[next_token, next_scale])
def codes_prior(request) -> Prior:
    torch.manual_seed(0)
    return request.param()


# -- codes ---------------------------------------------------------------------------------------


def test_nothing_kept_is_sampling_without_known_codes(codes_prior) -> None:
    free = codes_prior.sample(LABELS, generator=generators(0, 1, 2))
    found = codes_prior.sample(
        LABELS, generator=generators(0, 1, 2), known=CODES, known_mask=torch.zeros_like(SOME)
    )
    assert torch.equal(found, free) and not torch.equal(free, CODES)


def test_everything_kept_is_the_known_codes(codes_prior) -> None:
    mask = torch.ones_like(SOME)
    found = codes_prior.sample(LABELS, guidance_scale=3.0, known=CODES, known_mask=mask)
    assert torch.equal(found, CODES)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_others_are_sampled_given_the_kept_ones(codes_prior, scale) -> None:
    """Greedy codes are the largest logits of the teacher-forced pass over the result."""
    found = codes_prior.sample(
        LABELS,
        temperature=0,
        guidance_scale=scale,
        guidance_schedule="constant",
        known=CODES,
        known_mask=SOME,
    )
    null = torch.full_like(LABELS, 3)
    logits = guide(codes_prior.logits(found, LABELS), codes_prior.logits(found, null), scale)
    assert torch.equal(found[~SOME], logits.argmax(-1)[~SOME])
    free = codes_prior.sample(
        LABELS, temperature=0, guidance_scale=scale, guidance_schedule="constant"
    )
    assert not torch.equal(found[~SOME], free[~SOME])
    if isinstance(codes_prior, NextTokenPrior):
        assert torch.equal(found[SOME], CODES[SOME])


def test_a_row_keeps_its_own_codes(codes_prior) -> None:
    def run(rows: slice, *seeds: int) -> Tensor:
        return codes_prior.sample(
            LABELS[rows],
            generator=generators(*seeds),
            known=CODES[rows].numpy(),
            known_mask=SOME[rows].numpy(),
        )

    assert torch.equal(run(slice(3), 0, 1, 2)[1:2], run(slice(1, 2), 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": CODES}, "known was given without known_mask"),
        ({"known_mask": SOME}, "known_mask was given without known"),
        ({"known": CODES[:2], "known_mask": SOME[:2]}, "for 3 samples give"),
        ({"known": CODES, "known_mask": SOME.float()}, "known_mask .3, 17. and type torch.float32"),
        ({"known": CODES + 9, "known_mask": SOME}, "the codes of this prior are 0 to 15"),
    ],
)
def test_wrong_known_codes_are_refused(codes_prior, options, message) -> None:
    with pytest.raises(SmaltiError, match=message):
        codes_prior.sample(LABELS, **options)


# -- codes of several scales ---------------------------------------------------------------------


def test_smooth_sampling_keeps_no_codes() -> None:
    with pytest.raises(SmaltiError, match="smooth sampling mixes codes, and keeps none"):
        next_scale().sample(LABELS, smooth=True, known=CODES, known_mask=SOME)


def test_a_known_code_is_corrected_for_the_scales_before_it() -> None:
    """The code nearest to the vector of the known one plus the difference of the sums, averaged
    over its cell."""
    quantizer = next_scale().quantizer
    others = CODES.flip(0)
    mask = torch.ones_like(SOME)
    known, total = KnownScales(quantizer, KnownCodes(CODES, mask)), torch.zeros(3, 4, 3, 4)
    starts = (0, 1, 5)
    for scale, (start, length) in enumerate(zip(starts, (1, 4, 12), strict=True)):
        own = CODES[:, start : start + length]
        difference = quantizer.lookup_first(CODES, scale) - total
        cells = torch.nn.functional.interpolate(difference, SCALES[scale], mode="area")
        wanted = quantizer.codebook.weight[own] + cells.flatten(2).transpose(1, 2)
        distances = torch.cdist(wanted, quantizer.codebook.weight.expand(3, -1, -1))
        found = known.held(torch.zeros_like(own), total, scale)
        assert torch.equal(found, distances.argmin(-1))
        assert torch.equal(found, own) == (scale == 0)
        total = total + quantizer.contribution(others[:, start : start + length], scale)


def test_correction_keeps_the_known_features_better_than_the_codes_themselves() -> None:
    """The coarse scales are another image's; the finest is known on the left."""
    torch.manual_seed(0)
    scales = ((1, 1), (2, 2), (4, 4), (8, 8))
    config = MultiScaleConfig(
        codebook=CodebookConfig(512, 2, l2_normalise=False), scales=scales, residual_ratio=0.1
    )
    quantizer = MultiScaleQuantizer(config).eval()
    torch.nn.init.normal_(quantizer.codebook.weight, std=2)
    features = torch.randn(8, 2, 8, 8) + 2 * torch.randn(8, 2, 1, 1)
    with torch.no_grad():
        codes = quantizer.search(features)
        wanted = quantizer.lookup_first(codes, 4)
        mask = torch.zeros(8, 85, dtype=torch.bool)
        mask[:, 21:] = (torch.arange(8) < 4).repeat(8)
        known, total = KnownScales(quantizer, KnownCodes(codes, mask)), torch.zeros_like(wanted)
        for scale, others in enumerate(codes.roll(1, 0).split(quantizer.lengths, 1)):
            total = total + quantizer.contribution(known.held(others, total, scale), scale)
        plain = quantizer.lookup_first(torch.where(mask, codes, codes.roll(1, 0)), 4)
    corrected, uncorrected = ((x - wanted)[..., :4].square().mean() for x in (total, plain))
    assert corrected < uncorrected / 2


# -- continuous latents --------------------------------------------------------------------------


@dataclass
class Recorder:
    """The network's inputs at every evaluation, instead of a network."""

    times: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.times.append(t[0].item())
        self.states.append(x)
        return torch.ones_like(x)


@pytest.fixture
def recorded(monkeypatch) -> tuple[FlowPrior, Recorder]:
    prior, recorder = flow(), Recorder()
    monkeypatch.setattr(prior, "_network_at", recorder)
    return prior, recorder


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_solvers_that_can_put_known_latents_back(solver: str) -> None:
    torch.manual_seed(0)
    prior = flow()
    given = {"solver": solver, "num_inference_steps": 4}
    free = prior.sample(LABELS, generator=generators(0, 1, 2), **given)
    given |= {"known": Z, "known_mask": torch.zeros_like(HALF)}
    if solver == "dopri5":
        with pytest.raises(
            SmaltiError, match=r"dopri5 has no fixed steps.* euler, midpoint, heun,"
        ):
            prior.sample(LABELS, **given)
        return
    assert torch.equal(prior.sample(LABELS, generator=generators(0, 1, 2), **given), free)
    kept = prior.sample(LABELS, generator=generators(0, 1, 2), **{**given, "known_mask": HALF})
    assert torch.equal(kept[..., :2], Z[..., :2]) and not torch.equal(kept[..., 2:], free[..., 2:])


def test_kept_latents_get_the_noise_of_every_time(recorded) -> None:
    """alpha(t) z + sigma(t) x_0 at each evaluation, here t z + (1 - t) x_0; the rest is free."""
    prior, seen = recorded
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    found = prior.sample(
        LABELS, solver="euler", num_inference_steps=4, noise=noise, known=Z, known_mask=HALF
    )
    assert seen.times == [0, 0.25, 0.5, 0.75]
    for t, x in zip(seen.times, seen.states, strict=True):
        torch.testing.assert_close(x[..., :2], (t * Z + (1 - t) * noise)[..., :2])
        torch.testing.assert_close(x[..., 2:], (noise + t)[..., 2:])  # the velocity is 1
    assert torch.equal(found[..., :2], Z[..., :2])


@pytest.mark.parametrize(
    ("strength", "times"), [(0.5, [0.5, 0.75]), (0.6, [0.4, 0.5, 0.75]), (0.1, [0.9])]
)
def test_image_to_image_starts_at_an_intermediate_time(recorded, strength, times) -> None:
    prior, seen = recorded
    noise, steps = torch.randn_like(Z), []
    prior.sample(
        LABELS,
        solver="euler",
        num_inference_steps=4,
        noise=noise,
        known=Z,
        strength=strength,
        on_step=lambda done, total, _: steps.append((done, total)),
    )
    assert seen.times == pytest.approx(times, abs=1e-7)
    torch.testing.assert_close(seen.states[0], (1 - strength) * Z + strength * noise)
    assert steps[-1] == (len(times), len(times))


def test_less_strength_stays_closer_to_the_image() -> None:
    torch.manual_seed(0)
    prior = flow()
    distances = [
        (prior.sample(LABELS, generator=generators(0, 1, 2), known=Z, strength=s) - Z).norm().item()
        for s in (0.01, 0.3, 0.6, 0.9)
    ]
    assert distances == sorted(distances) and distances[0] < 0.2 < distances[-1]


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dopri5", "euler-maruyama"])
def test_image_to_image_on_a_chain(solver: str) -> None:
    """The network is evaluated at no time before the start, and at those of the chain after it."""
    torch.manual_seed(0)
    prior = flow(path=DDPMPath(), prediction="noise")
    seen: list[float] = []
    network = prior._network_at
    prior._network_at = lambda x, t, labels: (seen.append(t.min().item()), network(x, t, labels))[1]  # type: ignore[method-assign]
    found = prior.sample(
        LABELS, solver=solver, num_inference_steps=10, known=Z, strength=0.5, known_mask=None
    )
    assert found.isfinite().all() and min(seen) == pytest.approx(0.5)
    if solver in ("ddpm", "ddim"):
        assert seen == pytest.approx([0.5, 0.599, 0.699, 0.799, 0.899, 0.999])


def test_strength_and_a_mask_together(recorded) -> None:
    prior, seen = recorded
    noise = torch.randn_like(Z)
    options = {"solver": "euler", "num_inference_steps": 2, "noise": noise}
    found = prior.sample(LABELS, **options, known=Z, known_mask=HALF, strength=0.5)
    torch.testing.assert_close(seen.states[0], (Z + noise) / 2)
    assert torch.equal(found[..., :2], Z[..., :2])
    torch.testing.assert_close(found[..., 2:], ((Z + noise) / 2 + 0.5)[..., 2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": Z, "strength": 0}, r"strength is 0; it must lie in \(0, 1\]"),
        ({"known": Z, "strength": 1.2}, "strength is 1.2; it must lie"),
        ({"known": Z, "strength": float("nan")}, "strength is nan"),
        ({"strength": 0.5}, "strength is 0.5, but no latents to start from"),
        ({"known_mask": HALF}, "known_mask was given, but no latents"),
        ({"known": Z}, "known has no influence at strength 1"),
        ({"known": Z[:2], "known_mask": HALF}, r"this prior takes \(3, 2, 4, 4\)"),
        ({"known": Z, "known_mask": HALF[:, 0]}, r"known_mask .* give \(3, 1, 4, 4\) bool"),
        ({"known": Z, "known_mask": HALF.float()}, "known_mask .* bool, True where"),
        ({"known": Z, "strength": 1e-12}, "which leaves no step.* use more than"),
    ],
)
def test_wrong_known_latents_are_refused(options, message) -> None:
    with pytest.raises(SmaltiError, match=message):
        flow().sample(LABELS, num_inference_steps=2, **options)
