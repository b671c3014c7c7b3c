"""What sampling with a flow prior computes once: embeddings, keys and values, modulations."""

import pytest
import torch
from chance import generators, randomised

from smalti.prior.adaln import KeptConditions
from smalti.prior.conditions.base import Combination
from smalti.prior.conditions.text import TextCondition, TextConfig
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.flow.solvers.base import SOLVERS, make_solver

NETWORK = DiTConfig(
    in_channels=2,
    out_channels=4,
    grid=(4, 4),
    width=16,
    depth=2,
    num_heads=2,
    num_classes=3,
    frequency_size=16,
)
STEPS = 5


@pytest.fixture
def prior() -> FlowPrior:
    config = FlowConfig(network=NETWORK, label_dropout=0.1)
    return randomised(FlowPrior(config.conditioned("class+text", TextConfig(4, 6))), std=0.2)


def condition() -> Combination:
    mask = torch.tensor([[False, True, True, True], [True] * 4])
    features = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    return Combination({"class": torch.tensor([0, 2]), "text": TextCondition(features, mask)})


def counted(modules) -> list[int]:
    """A list that grows by the number of rows at each call of one of the modules."""
    rows: list[int] = []
    for module in modules:
        module.register_forward_hook(lambda m, inputs, output: rows.append(len(inputs[0])))
    return rows


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "dopri5"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6)])
def test_samples_are_those_of_a_network_that_keeps_nothing(prior, solver, interval, monkeypatch):
    def sampled() -> torch.Tensor:
        return prior.sample(
            condition(),
            guidance_scale=3.0,
            guidance_interval=interval,
            generator=generators(0, 1),
            solver=solver,
            num_inference_steps=STEPS,
        )

    ours = sampled()
    monkeypatch.setattr(FlowPrior, "_kept", lambda self, times, condition: condition)
    torch.testing.assert_close(ours, sampled(), rtol=1e-4, atol=1e-5)


def test_captions_are_projected_once_and_modulations_of_all_steps_are_one_product(prior) -> None:
    captions = counted(block.cross_attn.kv_linear for block in prior.network.blocks)
    modulations = counted([prior.network.blocks[0].adaLN_modulation])
    options = {"num_inference_steps": STEPS, "solver": "heun", "guidance_scale": 2.0}
    prior.sample(condition(), generator=generators(0, 1), **options)
    assert captions == [4, 4]  # guided: two samples, twice; once in each of the two blocks
    assert modulations == [4 * (STEPS + 1)]  # Heun's slopes are at the times of the grid
    modulations.clear()
    prior.sample(condition(), generator=generators(0, 1), **{**options, "solver": "dopri5"})
    assert len(modulations) > STEPS  # times that are not known in advance


def test_modulations_are_computed_in_chunks_of_bounded_size(prior, monkeypatch) -> None:
    monkeypatch.setattr("smalti.prior.adaln.KEPT_ROWS", 6)
    rows = counted([prior.network.blocks[0].adaLN_modulation])
    kept = KeptConditions(prior.network, condition(), [0.0, 0.25, 0.25, 0.5, 0.75, 1.0])
    with torch.no_grad():
        for time in (0.0, 0.25, 0.25, 0.5, 0.75, 1.0, 0.1, 0.75):
            given = kept.at(torch.tensor([time], dtype=torch.float64))
            x = torch.randn(2, 2, 4, 4)
            out = prior.network(x, torch.full((2,), time), given)
            expected = prior.network(x, torch.full((2,), time), condition())
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    # Three times of two samples, the other two, one that was not known (as many rows as a pass that
    # keeps nothing), and the last two again.
    assert [count for count in rows if count > 2] == [6, 4, 4]
    assert rows.count(2) == 8 + 1


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_the_known_times_are_those_at_which_a_solver_evaluates(prior, solver) -> None:
    seen: list[float] = []
    network = prior._network_at
    prior._network_at = lambda x, t, given: (seen.extend(t.tolist()[:1]), network(x, t, given))[1]
    made = make_solver(solver)
    prior.sample(condition(), generator=generators(0, 1), num_inference_steps=STEPS, solver=made)
    known = made.evaluation_times(prior.time_grid(STEPS, made))
    assert known == [] if solver == "dopri5" else set(seen) <= set(known)
