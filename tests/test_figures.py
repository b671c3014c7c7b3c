"""What the figures of docs/methods show is true."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import figures  # noqa: E402


@pytest.mark.parametrize("name", figures.PATHS)
def test_the_expected_data_are_the_mean_of_data_near_a_point(name: str) -> None:
    path = figures.PATHS[name]
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    data = figures.MEANS[torch.randint(4, (400_000,), generator=generator)]
    data = data + figures.STD * torch.randn(data.shape, **draw)
    t = torch.tensor([0.7], dtype=torch.float64)
    mixed = path.mix(data, torch.randn(data.shape, **draw), t.expand(len(data)))
    at = mixed[:1]
    near = (mixed - at).norm(dim=1) < 0.05
    assert near.sum() > 100
    expected = figures.expected_data(path, at, t)[0]
    assert (data[near].mean(0) - expected).abs().max() < 0.15


def test_errors_of_the_solvers_have_their_orders() -> None:
    coarse, fine = (figures.solver_errors((count,)) for count in (64, 128))
    for solver, order in (("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)):
        ratio = coarse[solver][0] / fine[solver][0]
        assert 2 ** (order - 0.8) < ratio < 2 ** (order + 0.9), solver


def test_reflow_straightens() -> None:
    path, start = figures.PATHS["linear"], figures.noise(20)
    before = figures.straightness(figures.trajectories(path, start))
    straight = figures.rectified(path, pairs=4000)
    after = figures.straightness(figures.trajectories(path, start, output=straight))
    assert 1 <= after < 1 + (before - 1) / 2


def test_guidance_moves_samples_away_from_the_other_class() -> None:
    def end(scale: float) -> torch.Tensor:
        output = figures.guided(figures.PATHS["linear"], 0, scale)
        return figures.trajectories(figures.PATHS["linear"], figures.noise(50), output=output)[-1]

    assert end(4.0)[:, 1].mean() > end(1.0)[:, 1].mean() + 0.05
    assert end(4.0)[:, 1].std() < end(1.0)[:, 1].std()


def test_orders_are_random_first_and_raster_last() -> None:
    raster = torch.arange(36).reshape(6, 6)
    begin, middle, end = (figures.ranks(progress, 200) for progress in (0.25, 0.625, 0.9))
    assert all(torch.equal(grid.flatten().sort().values, raster.flatten()) for grid in begin)
    is_raster = [(grids == raster).all((1, 2)).float().mean() for grids in (begin, middle, end)]
    assert is_raster[0] == 0 and 0.35 < is_raster[1] < 0.65 and is_raster[2] == 1
