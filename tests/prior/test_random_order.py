"""Random-order annealing: the schedule, causality in any order, and raster order as one of them."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from chance import randomised
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.prior.base import Prior
from smalti.prior.conditions.text import TextCondition
from smalti.prior.next_scale.model import NextScalePrior
from smalti.prior.next_token.model import (
    NextTokenConfig,
    NextTokenPrior,
    random_order_probability,
    sample_orders,
)

TINY = NextTokenConfig(
    spec=CodeSpec(16, ((3, 5),)),
    num_classes=3,
    depth=2,
    width=16,
    num_heads=2,
    hidden=32,
    dropout=0.0,
    label_dropout=0.0,
    random_order=(0.5, 0.75),
)
CODES = torch.randint(16, (4, 15), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])
RASTER = torch.arange(15).expand(4, -1)
ORDER = torch.stack(
    [torch.randperm(15, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
)


def make_prior(config: NextTokenConfig = TINY) -> NextTokenPrior:
    torch.manual_seed(0)
    return randomised(NextTokenPrior(config), vector_mean=1.0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()


# -- the schedule ----------------------------------------------------------------------------------


def test_the_probability_falls_from_one_to_zero() -> None:
    def at(*progress: float) -> list[float]:
        return [random_order_probability(p, (0.5, 0.75)) for p in progress]

    assert at(0, 0.3, 0.5) == [1, 1, 1]
    assert at(0.5625, 0.625, 0.6875) == [0.75, 0.5, 0.25]
    assert at(0.75, 0.9, 1.0) == [0, 0, 0]


@pytest.mark.parametrize("progress", [0.0, 0.4999, 0.5, 1.0])
def test_a_schedule_may_be_a_step_or_constant(progress: float) -> None:
    assert random_order_probability(progress, (0.5, 0.5)) == (progress < 0.5)
    assert random_order_probability(progress, (0.0, 0.0)) == 0
    assert random_order_probability(progress, (1.0, 1.0)) == (progress < 1)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_orders_are_permutations_and_as_often_random_as_said(probability: float) -> None:
    orders = sample_orders(4000, 4, torch.tensor(probability))
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand(4000, -1))
    raster = (orders == torch.arange(4)).all(1).float().mean().item()
    assert raster == pytest.approx(1 - probability * 23 / 24, abs=0.03)
    if probability == 1:  # all 24 alike
        counts = torch.bincount(orders @ torch.tensor([64, 16, 4, 1]))
        counts = counts[counts > 0]
        assert len(counts) == 24
        assert ((counts - 4000 / 24) ** 2 / (4000 / 24)).sum() < 50  # 23 degrees, 0.1 %


# -- the objective ---------------------------------------------------------------------------------


def test_the_identity_is_raster_order() -> None:
    model = make_prior()
    raster = model.logits(CODES, LABELS)
    torch.testing.assert_close(model.logits(CODES, LABELS, RASTER), raster)
    model.train().set_progress(1.0)  # the training loss, too
    torch.testing.assert_close(model(CODES, LABELS).total, cross_entropy(raster, CODES))


def test_a_training_step_predicts_the_codes_of_its_order(monkeypatch) -> None:
    model = make_prior().train()
    model.set_progress(0.0)
    monkeypatch.setattr("smalti.prior.next_token.model.sample_orders", lambda *args: ORDER)
    loss = model(CODES, LABELS)
    logits, targets = model.logits(CODES, LABELS, ORDER), CODES.gather(1, ORDER)
    torch.testing.assert_close(loss.total, cross_entropy(logits, targets))
    assert loss.parts["accuracy"] == (logits.argmax(-1) == targets).float().mean()
    assert not torch.allclose(loss.total, model.eval()(CODES, LABELS).total)


def test_corrupted_inputs_are_no_targets_in_any_order(monkeypatch) -> None:
    model = make_prior(replace(TINY, token_corruption=0.5)).train()
    model.set_progress(0.0)
    shown = CODES.flip(1)
    monkeypatch.setattr("smalti.prior.next_token.model.sample_orders", lambda *args: ORDER)
    monkeypatch.setattr("smalti.prior.next_token.model.corrupted", lambda *args: shown)
    logits = model.logits(shown, LABELS, ORDER)
    expected = cross_entropy(logits, CODES.gather(1, ORDER))
    torch.testing.assert_close(model(CODES, LABELS).total, expected)


def test_logits_see_the_codes_before_them_in_their_order_and_no_others() -> None:
    model = make_prior()
    before = model.logits(CODES, LABELS, ORDER)
    for k in (0, 6, 13):
        changed = CODES.clone()
        where = ORDER[:, k : k + 1]
        changed.scatter_(1, where, (changed.gather(1, where) + 1) % 16)
        after = model.logits(changed, LABELS, ORDER)
        assert torch.equal(before[:, : k + 1], after[:, : k + 1])
        assert ((before - after)[:, k + 1 :].abs().amax((1, 2)) > 1e-3).all()


def test_logits_depend_on_the_position_that_they_predict() -> None:
    """Two orders that differ in what comes next, after the same codes."""
    model = make_prior()
    swapped = ORDER.clone()
    swapped[:, [6, 7]] = ORDER[:, [7, 6]]
    one, other = model.logits(CODES, LABELS, ORDER), model.logits(CODES, LABELS, swapped)
    assert torch.equal(one[:, :6], other[:, :6])
    assert not torch.allclose(one[:, 6], other[:, 6])
    with torch.no_grad():
        model.target_positions.zero_()
    one, other = model.logits(CODES, LABELS, ORDER), model.logits(CODES, LABELS, swapped)
    assert torch.equal(one[:, 6], other[:, 6])


def test_codes_are_rotated_by_their_own_positions_in_any_order() -> None:
    """The last logits depend on a set of codes with their positions, not on their order."""
    model = make_prior(replace(TINY, depth=1))
    with torch.no_grad():
        model.target_positions.zero_()
        model.layers[0].feed_forward.w2.weight.zero_()
    shuffled = ORDER.clone()
    shuffled[:, :13] = ORDER[:, torch.randperm(13)]  # the last two stay
    one, other = model.logits(CODES, LABELS, ORDER), model.logits(CODES, LABELS, shuffled)
    torch.testing.assert_close(one[:, -1], other[:, -1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[:, 5], other[:, 5])
    turned = CODES.flip(1)  # other codes at the same positions are another set
    assert not torch.allclose(model.logits(turned, LABELS, ORDER)[:, -1], one[:, -1])


def test_captions_come_before_codes_in_any_order() -> None:
    config = replace(TINY, condition="text", num_classes=0, text_length=4, text_dim=6)
    model = make_prior(config)
    text = TextCondition(
        torch.randn(4, 4, 6), torch.arange(4) >= torch.tensor([[0], [1], [2], [3]])
    )
    raster = model.logits(CODES, text)
    torch.testing.assert_close(model.logits(CODES, text, RASTER), raster)
    changed = CODES.scatter(1, ORDER[:, 6:7], (CODES.gather(1, ORDER[:, 6:7]) + 1) % 16)
    before, after = model.logits(CODES, text, ORDER), model.logits(changed, text, ORDER)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7], after[:, 7])


# -- progress --------------------------------------------------------------------------------------


def test_the_share_of_random_orders_follows_the_progress(monkeypatch) -> None:
    model, seen = make_prior().train(), []
    monkeypatch.setattr(
        "smalti.prior.next_token.model.sample_orders",
        lambda rows, length, p: seen.append(p.item()) or sample_orders(rows, length, p),
    )
    for progress in (0.0, 0.625, 0.75):
        model.set_progress(progress)
        model(CODES, LABELS)
    assert seen == [1.0, 0.5, 0.0]
    model.eval()(CODES, LABELS)
    assert len(seen) == 3  # evaluation is in raster order


def test_progress_is_no_part_of_the_state() -> None:
    """It follows from the step: a resumed run sets it again."""
    model = make_prior()
    raster = NextTokenPrior(replace(TINY, random_order=None))
    model.set_progress(0.7)
    assert set(model.state_dict()) - set(raster.state_dict()) == {"target_positions"}
    resumed = NextTokenPrior(TINY)
    resumed.load_state_dict(model.state_dict())
    resumed.set_progress(0.7)
    losses = []
    for each in (model.train(), resumed.train(), copy.deepcopy(model)):
        torch.manual_seed(5)
        losses.append(each(CODES, LABELS).total)
    assert losses[0] == losses[1] == losses[2]


def test_a_new_progress_compiles_nothing_anew() -> None:
    model = make_prior().train()
    model.set_progress(0.0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(CODES, LABELS)
    with torch.compiler.set_stance("fail_on_recompile"):
        for progress in (0.55, 0.7, 0.9):
            model.set_progress(progress)
            torch.manual_seed(2)
            loss = compiled(CODES, LABELS).total
            torch.manual_seed(2)
            torch.testing.assert_close(loss, model(CODES, LABELS).total)


def test_training_without_the_progress_is_refused() -> None:
    model = make_prior().train()
    with pytest.raises(SmaltiError, match=r"call prior.set_progress\(step / max_train_steps\)"):
        model(CODES, LABELS)
    model.eval()(CODES, LABELS)


def test_every_prior_accepts_the_progress() -> None:
    """It changes nothing for one without random orders."""
    plain = make_prior(replace(TINY, random_order=None)).train()
    before = plain(CODES, LABELS).total
    plain.set_progress(0.5)
    assert torch.equal(plain(CODES, LABELS).total, before)
    assert NextScalePrior.set_progress is Prior.set_progress
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(SmaltiError, match="a share of the training, 0 to 1"):
            plain.set_progress(wrong)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (ORDER[:, :14], r"shape \(4, 14\) .* give \(4, 15\) int64"),
        (ORDER.int(), "int32"),
        (ORDER.clamp(max=13), "no permutation of 0 to 14"),
        (ORDER + 1, "no permutation of 0 to 14"),
    ],
)
def test_an_invalid_order_is_refused(order: Tensor, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make_prior().logits(CODES, LABELS, order)


def test_a_prior_of_raster_order_accepts_no_other() -> None:
    plain = NextTokenPrior(replace(TINY, random_order=None)).eval()
    assert "target_positions" not in plain.state_dict()
    with pytest.raises(SmaltiError, match="raster order only: train with random_order"):
        plain.logits(CODES, LABELS, ORDER)


@pytest.mark.parametrize("shares", [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
def test_impossible_schedules_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(SmaltiError, match=r"random_order is .* 0 <= from <= to <= 1"):
        replace(TINY, random_order=shares)


@pytest.mark.slow
def test_a_prior_of_all_orders_knows_every_conditional_distribution() -> None:
    """Two codes with a joint distribution; sampling in both orders gives it."""
    joint = torch.tensor([[0.3, 0.1, 0.0], [0.0, 0.2, 0.1], [0.2, 0.0, 0.1]])
    config = replace(
        TINY, spec=CodeSpec(3, ((1, 2),)), num_classes=1, width=32, hidden=64, random_order=(1, 1)
    )
    torch.manual_seed(0)
    model = NextTokenPrior(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(500):
        sampled = torch.multinomial(joint.flatten(), 512, True)
        codes = torch.stack([sampled // 3, sampled % 3], 1)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 500)
        model.set_progress(step / 500)
        loss = model(codes, torch.zeros(512, dtype=torch.int64)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    labels = torch.zeros(9, dtype=torch.int64)
    for order in ([0, 1], [1, 0]):
        rows = torch.tensor(order).expand(9, -1)
        logs = model.eval().logits(pairs, labels, rows).log_softmax(-1)
        found = logs.gather(-1, pairs.gather(1, rows)[..., None]).sum((1, 2)).exp()
        torch.testing.assert_close(found, joint.flatten(), rtol=0, atol=0.03)
