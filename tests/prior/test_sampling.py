"""Filters, guidance and sampling against closed forms."""

import pytest
import torch

from smalti.errors import SmaltiError
from smalti.prior.sampling import (
    SamplingOptions,
    guide,
    keep_top_k,
    keep_top_p,
    sample_codes,
    sample_uniforms,
)

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = PROBABILITIES.log()[None]


def test_guidance_is_its_formula() -> None:
    cond, uncond = torch.randn(2, 3, 5)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 3.0), 3 * cond - 2 * uncond)


def test_top_k_keeps_the_k_likeliest_and_ties() -> None:
    assert keep_top_k(LOGITS, 2).isfinite().tolist() == [[False, True, False, True]]
    assert torch.equal(keep_top_k(LOGITS, 0), LOGITS)
    assert torch.equal(keep_top_k(LOGITS, 99), LOGITS)
    assert keep_top_k(torch.tensor([[1.0, 1.0, 0.0]]), 1).isfinite().sum() == 2


@pytest.mark.parametrize(
    ("p", "kept"),
    [(0.05, {1}), (0.39, {1}), (0.41, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: set[int]) -> None:
    left = keep_top_p(LOGITS, p)[0].isfinite().nonzero().flatten().tolist()
    assert set(left) == kept


def test_sampling_inverts_the_cumulative_distribution() -> None:
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.6999, 0.7001, 0.9999999])
    codes = sample_codes(LOGITS.expand(8, -1), uniforms, SamplingOptions())
    assert codes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_samples_have_the_right_frequencies() -> None:
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    codes = sample_codes(LOGITS.expand(20000, -1), uniforms, SamplingOptions())
    frequencies = torch.bincount(codes, minlength=4) / 20000
    chi_square = 20000 * ((frequencies - PROBABILITIES).square() / PROBABILITIES).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, 0.1 %


def test_a_filtered_code_is_never_sampled() -> None:
    uniforms = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64)
    codes = sample_codes(LOGITS.expand(1001, -1), uniforms, SamplingOptions(top_k=2))
    assert set(codes.tolist()) == {1, 3}
    assert (codes == 1).double().mean().item() == pytest.approx(4 / 7, abs=2e-3)


def test_temperature_sharpens_and_zero_is_greedy() -> None:
    uniforms = torch.linspace(0, 0.999, 1000)
    cold = sample_codes(LOGITS.expand(1000, -1), uniforms, SamplingOptions(temperature=0.5))
    squared = PROBABILITIES.square() / PROBABILITIES.square().sum()
    torch.testing.assert_close(torch.bincount(cold, minlength=4) / 1000, squared, atol=3e-3, rtol=0)
    assert sample_codes(LOGITS, torch.zeros(1), SamplingOptions(temperature=0)).item() == 1


def test_a_temperature_next_to_zero_is_greedy() -> None:
    uniforms = torch.linspace(0, 1, 100)
    for temperature in (1e-45, 1e-320, 1e-9):
        options = SamplingOptions(temperature=temperature, top_k=3, top_p=0.9)
        assert set(sample_codes(LOGITS.expand(100, -1), uniforms, options).tolist()) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "row",
    [[0.0, torch.nan, 0.0], [0.0, torch.inf, 0.0], [-torch.inf] * 3],
    ids=["nan", "infinity", "nothing"],
)
def test_logits_without_a_finite_maximum_are_refused(row: list[float], temperature: float) -> None:
    logits = torch.stack([torch.zeros(3), torch.tensor(row)])
    with pytest.raises(SmaltiError, match="the model gives NaN or infinity"):
        sample_codes(logits, torch.full((2,), 0.5), SamplingOptions(temperature=temperature))


def test_a_code_may_be_impossible() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(100, -1)
    assert set(sample_codes(logits, torch.linspace(0, 1, 100), SamplingOptions()).tolist()) == {
        0,
        2,
    }


def test_the_largest_uniform_gives_the_last_code_that_is_left() -> None:
    """1 is what rounding may make of the largest number below it."""
    assert sample_codes(LOGITS, torch.ones(1), SamplingOptions()).item() == 3
    assert sample_codes(LOGITS, torch.ones(1), SamplingOptions(top_k=1)).item() == 1
    assert sample_codes(LOGITS, torch.zeros(1), SamplingOptions(top_k=1)).item() == 1


def test_codes_that_tie_are_kept_by_top_p_in_their_order() -> None:
    left = keep_top_p(torch.zeros(1, 64), 0.25)[0].isfinite().nonzero().flatten()
    assert left.tolist() == list(range(16))


def test_samples_agree_with_torch_multinomial_after_both_filters() -> None:
    """Chi-square of two samples, one drawn by torch from the filtered distribution."""
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 40, generator=rng)
    options = SamplingOptions(temperature=0.8, top_k=20, top_p=0.9)
    kept = keep_top_p(keep_top_k(logits / 0.8, 20), 0.9).softmax(-1)[0]
    uniforms = torch.rand(30000, generator=rng, dtype=torch.float64)
    ours = torch.bincount(sample_codes(logits.expand(30000, -1), uniforms, options), minlength=40)
    theirs = torch.bincount(kept.multinomial(30000, True, generator=rng), minlength=40)
    both = ours + theirs
    assert torch.equal(both > 0, kept > 0)
    chi_square = ((ours - theirs).square() / both.clamp(min=1)).sum()
    freedom = int((kept > 0).sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_schedules_begin_at_one_and_end_at_the_scale() -> None:
    for name in ("linear", "cosine", "power-cosine"):
        options = SamplingOptions(guidance_scale=4.0, guidance_schedule=name)
        scales = options.guidance_scales(11)
        assert len(scales) == 11 and scales == sorted(scales)
        assert scales[0] == 1 and scales[-1] == pytest.approx(4.0)
        assert options.guidance_scales(1) == [pytest.approx(4.0)]
    assert SamplingOptions(guidance_scale=4.0).guidance_scales(3) == [4.0] * 3
    halfway = SamplingOptions(guidance_scale=3.0, guidance_schedule="linear").guidance_scales(11)[5]
    assert halfway == 2.0


def test_rows_of_uniforms_come_from_their_own_generators() -> None:
    def fresh(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    rows = sample_uniforms(2, 5, [fresh(1), fresh(2)])
    assert torch.equal(rows[1], sample_uniforms(1, 5, [fresh(2)])[0])
    assert rows.min() >= 0 and rows.max() < 1
    with pytest.raises(SmaltiError, match="3 generators were given for 2 samples"):
        sample_uniforms(2, 5, [fresh(1)] * 3)
