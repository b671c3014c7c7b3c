"""The multi-scale quantizer against a plain loop of VAR's algorithm, and what a prior needs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from smalti.errors import SmaltiError
from smalti.tokenizer.quantizers.base import as_rows
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

SCALES = ((1, 1), (1, 2), (2, 3), (4, 6))  # not square, too
CONFIG = MultiScaleConfig(
    codebook=CodebookConfig(32, 4, l2_normalise=False, revive_after=0),
    scales=SCALES,
    convolutions=2,
)
LENGTHS = [1, 2, 6, 24]


@pytest.fixture
def q() -> MultiScaleQuantizer:
    torch.manual_seed(1)
    model = MultiScaleQuantizer(CONFIG)
    torch.nn.init.normal_(model.codebook.weight)
    return model


def plain(q: MultiScaleQuantizer, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """VAR, algorithm 1, written out: codes and the sum."""
    rest, total, codes = f.clone(), torch.zeros_like(f), []
    for k, (h, w) in enumerate(SCALES):
        small = F.interpolate(rest, (h, w), mode="area")
        distance = torch.cdist(as_rows(small), q.codebook.vectors)
        index = distance.argmin(1).view(len(f), h * w)
        codes.append(index)
        vectors = q.codebook.vectors[index].mT.reshape(len(f), 4, h, w)
        up = vectors if (h, w) == SCALES[-1] else F.interpolate(vectors, SCALES[-1], mode="bicubic")
        phi = q.residual_convs[k * 2 // 4]
        added = 0.5 * up + 0.5 * phi.conv(up)
        total, rest = total + added, rest - added
    return torch.cat(codes, 1), total


def test_codes_and_sum_are_those_of_the_plain_algorithm(q) -> None:
    f = torch.randn(2, 4, 4, 6)
    codes, total = plain(q, f)
    out = q(f)
    assert torch.equal(out.codes, codes) and torch.equal(q.search(f), codes)
    torch.testing.assert_close(out.latents, total)
    torch.testing.assert_close(q.lookup(codes, 4, 6), total)


def test_contributions_of_the_scales_telescope(q) -> None:
    codes = q.search(torch.randn(2, 4, 4, 6))
    parts = codes.split(LENGTHS, 1)
    total = torch.zeros(2, 4, 4, 6)
    for k, part in enumerate(parts):
        torch.testing.assert_close(q.lookup_first(codes, k), total)
        total = total + q.contribution(part, k)
    torch.testing.assert_close(q.lookup_first(codes, 4), q.lookup(codes, 4, 6))


def test_teacher_forcing_equals_decoding_step_by_step(q) -> None:
    codes = q.search(torch.randn(2, 4, 4, 6))
    forced = q.next_scale_inputs(codes)
    assert forced.shape == (2, sum(LENGTHS[1:]), 4)
    total, start = torch.zeros(2, 4, 4, 6), 0
    for k, part in enumerate(codes.split(LENGTHS, 1)[:-1]):
        total = total + q.contribution(part, k)
        met = q.scale_input(total, k + 1)
        torch.testing.assert_close(forced[:, start : start + LENGTHS[k + 1]], met)
        start += LENGTHS[k + 1]


def test_gradients_reach_features_straight_and_the_convolutions_through_the_loss(q) -> None:
    f = torch.randn(2, 4, 4, 6, requires_grad=True)
    out, weight = q(f), torch.randn(2, 4, 4, 6)
    (out.latents * weight).sum().backward(retain_graph=True)
    torch.testing.assert_close(f.grad, weight)
    assert q.codebook.weight.grad is None
    out.losses["codebook"].backward()
    assert q.codebook.weight.grad.any()
    assert all(c.conv.weight.grad.any() for c in q.residual_convs)
    torch.testing.assert_close(f.grad, weight)


def test_losses_are_means_over_the_scales_of_both_distances(q) -> None:
    f = torch.randn(2, 4, 4, 6)
    out = q(f)
    expected = torch.stack([F.mse_loss(q.lookup_first(out.codes, k), f) for k in range(1, 5)])
    torch.testing.assert_close(out.losses["codebook"], expected.mean())
    torch.testing.assert_close(out.losses["commitment"], 0.25 * expected.mean())


def test_dropped_scales_add_nothing_and_learn_nothing() -> None:
    dropping = replace(CONFIG, scale_dropout=1.0, scale_dropout_keeps=2)
    q = MultiScaleQuantizer(dropping)
    torch.nn.init.normal_(q.codebook.weight)
    f = torch.randn(64, 4, 4, 6)
    torch.manual_seed(3)
    kept = q.sample_random_inputs(64, None)["kept_scales"]
    assert set(kept.tolist()) == {2, 3}
    torch.manual_seed(3)
    out = q(f)
    assert torch.equal(q(f, kept_scales=kept).latents, out.latents)
    q.discard_step()
    q(f, kept_scales=kept)
    for n in range(8):
        expected = q.lookup_first(out.codes[n : n + 1], int(kept[n]))
        torch.testing.assert_close(out.latents[n : n + 1], expected)
    used = torch.cat(q.codebook._used)
    assert used.sum() == sum(sum(LENGTHS[:k]) for k in kept.tolist())
    q.eval()
    expected = q.lookup(q.search(f), 4, 6)
    torch.testing.assert_close(q(f, kept_scales=kept).latents, expected)  # all scales are kept


def test_codes_used_at_any_scale_are_not_dead() -> None:
    book = CodebookConfig(8, 4, l2_normalise=False, revive_after=1)
    q = MultiScaleQuantizer(replace(CONFIG, codebook=book))
    for _ in range(3):
        hit = q(torch.randn(1, 4, 4, 6)).codes.unique()
        q.after_step(torch.Generator().manual_seed(0))
        assert (q.codebook.idle_steps[hit] == 0).all()


def test_published_sharing_of_the_convolutions() -> None:
    assert MultiScaleConfig().shared_out == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert CONFIG.shared_out == (0, 0, 1, 1)
    assert replace(CONFIG, convolutions=1).shared_out == (0,) * 4
    assert replace(CONFIG, convolutions=4).shared_out == (0, 1, 2, 3)
    assert replace(CONFIG, sharing=(1, 0, 0, 1)).shared_out == (1, 0, 0, 1)


@pytest.mark.parametrize("learning", ["ema", "simvq"])
@pytest.mark.parametrize("l2", [True, False])
def test_any_codebook_serves_all_scales(learning: str, l2: bool) -> None:
    book = CodebookConfig(32, 4, l2_normalise=l2, learning=learning, revive_after=0)
    q = MultiScaleQuantizer(replace(CONFIG, codebook=book, estimator="rotation"))
    f = torch.randn(2, 4, 4, 6)
    out = q(f)
    torch.testing.assert_close(out.latents, q.lookup(out.codes, 4, 6), rtol=1e-4, atol=1e-5)
    assert torch.equal(out.codes, q.search(f))
    before = q.codebook.vectors.detach().clone()
    q.after_step(torch.Generator())
    assert torch.equal(before, q.codebook.vectors) == (learning == "simvq")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": ()}, "at least one"),
        ({"scales": ((1, 1), (0, 2))}, "sides >= 1"),
        ({"scales": ((4, 4), (2, 2))}, "must be the largest"),
        ({"convolutions": 5}, "convolutions is 5; use 1 to 4"),
        ({"sharing": (0, 1)}, "one number below 2 for each of the 4 scales"),
        ({"sharing": (0, 1, 2, 0)}, "one number below 2"),
        ({"scale_dropout": 1.5}, r"must lie in \[0, 1\]"),
        ({"scale_dropout_keeps": 0}, "must be 1 or more"),
    ],
)
def test_impossible_configs_are_refused(changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        replace(CONFIG, **changes)


def test_the_last_scale_must_be_the_grid_of_the_encoder(q) -> None:
    assert q.grids(4, 6) == SCALES
    with pytest.raises(SmaltiError, match="encoder makes a 8 x 8 grid"):
        q.grids(8, 8)
