"""What the figures of docs/methods show is true."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smalti.tokenizer.losses.perceptual import LPIPS

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


def test_the_linear_vae_minimises_its_loss() -> None:
    std, weight = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64), 0.06
    best = [part.clone().requires_grad_() for part in figures.linear_vae(std, weight)]

    def loss(gain: Tensor, tau: Tensor, back: Tensor) -> Tensor:
        variance = std**2
        error = (back * gain - 1) ** 2 * variance + (back * tau) ** 2
        kl = ((gain**2 * variance + tau**2 - 1) / 2 - tau.log()).sum()
        return error.sum() + weight * kl

    gradients = torch.autograd.grad(least := loss(*best), best)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)
    assert best[1].tolist()[2] == 1  # given up: 2 * 0.1^2 < 0.06
    assert all(best[1][:2] < 1)
    rate, error = figures.rate_and_error(std, weight)
    assert abs(error + weight * rate - least.item()) < 1e-9
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = [part * (1 + 0.3 * torch.randn(3, generator=generator)) for part in best]
        other[1] = other[1].abs()
        assert loss(*other) >= least


def test_changes_of_a_picture_are_equal_to_l2_alone() -> None:
    images = figures.heldout("emoji", figures.EMOJI, 64, 3)
    versions = figures.changed(images)
    errors = [(x - images).square().mean().item() for x in versions.values()]
    assert errors[0] == 0 and all(abs(error / errors[1] - 1) < 1e-3 for error in errors[1:])
    lpips = LPIPS.from_embedded()
    distances = {name: lpips(x, images).item() for name, x in versions.items()}
    assert sorted(distances, key=distances.__getitem__) == [
        "picture",
        "darker",
        "shift",
        "noise",
        "blur",
    ]


def test_cells_are_those_of_the_codes() -> None:
    features = figures.features_of_two_numbers()
    errors = {}
    for name, quantizer in figures.quantizers(features).items():
        count = quantizer.vocab_size
        vectors = figures.code_vectors(quantizer)  # (V, 2)
        codes = quantizer.search(vectors[..., None, None])
        assert codes.flatten().tolist() == list(range(count)), name  # each in its own cell
        chosen = vectors[quantizer.search(features[..., None, None]).flatten()]
        errors[name] = (chosen - features).square().sum(1).mean()
    learned, *others = errors.values()
    assert learned < min(others) / 2
    plane = figures.cells(quantizer, reach=2.0, side=4)  # of LFQ: x is bit 0, y is bit 1
    assert plane.tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2


def test_each_scale_adds_to_a_picture() -> None:
    *columns, images = figures.scales_of(figures.heldout("fashion", figures.FASHION, 32, 1))
    assert len(images) == len(figures.FASHION)
    errors = [(column - images).square().mean().item() for column in columns]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 5
