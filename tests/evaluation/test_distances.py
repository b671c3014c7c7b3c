"""Numbers of sets of features, against torchmetrics, torch-fidelity and plain formulas."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from smalti.errors import DataError
from smalti.evaluation import distances
from smalti.evaluation.distances import (
    cmmd,
    density_coverage,
    frechet_distance,
    frechet_of,
    frechet_ratio,
    inception_score,
    precision_recall,
)
from smalti.evaluation.moments import Moments, UndefinedMetricError


def features(count: int = 300, dim: int = 16, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


REAL, FAKE = features(), features(257, seed=1, shift=0.2) * 1.2


# -- moments --------------------------------------------------------------------------------------


def moments_of(*parts: Tensor) -> Moments:
    found = Moments(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found


def test_moments_are_those_of_the_whole_set_for_any_division() -> None:
    x = features(1000, 24, shift=5.0).double()
    for size in (1, 7, 256, 1000):
        found = moments_of(*x.split(size))
        assert found.count == 1000
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)


def test_the_order_of_merging_does_not_matter() -> None:
    x = features(999, 24, shift=-3.0)
    cut = x.split([1, 500, 0, 398, 100])
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 4, 1, 0, 2)):
        found = Moments(24)
        for i in order:
            found.merge(moments_of(cut[i]))
        torch.testing.assert_close(found.mean, x.double().mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            found.covariance, torch.cov(x.double().T), rtol=1e-12, atol=1e-12
        )
    assert found.count == 999


def test_a_large_mean_costs_no_digits() -> None:
    """Sums of squares in float64 would have no digit of the variance left."""
    x = features(500, 4).double()
    found = moments_of(*(x + 2.0**27).split(50))
    torch.testing.assert_close(found.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-6)
    squares = (x + 2.0**27).square().mean(0) - (x + 2.0**27).mean(0).square()
    assert (squares - x.var(0)).abs().max() > 0.1


def test_a_stored_state_continues_to_the_bit(tmp_path) -> None:
    first, second = features(100), features(50, seed=1)
    at_once = moments_of(first, second)
    np.savez(tmp_path / "part.npz", **moments_of(first).state())
    with np.load(tmp_path / "part.npz", allow_pickle=False) as state:
        continued = Moments.from_state(state)
    continued.add(second)
    assert continued.count == 150
    assert torch.equal(continued.mean, at_once.mean)
    assert torch.equal(continued.covariance, at_once.covariance)


def test_wrong_moments_are_refused() -> None:
    found = moments_of(features(10, 4))
    broken = features(10, 4)
    broken[3, 1] = torch.nan
    state = found.state()
    for call, message in (
        (lambda: found.add(features(10, 5)), r"shape \(10, 5\); give \(B, 4\)"),
        (lambda: found.add(broken), "1 of 10 feature vectors are not finite"),
        (lambda: found.merge(Moments(5)), "5 features cannot be merged with those of 4"),
        (lambda: moments_of(features(1, 4)).covariance, "is 1; a covariance needs at least 2"),
        (lambda: Moments.from_state({"count": 1}), "have no 'mean'"),
        (lambda: Moments.from_state({**state, "mean": np.zeros(3)}), "compute them again"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    assert found.count == 10


# -- Frechet distance -----------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_of_known_distance() -> None:
    """Commuting covariances: |m_a - m_b|^2 + sum (s_a - s_b)^2; also where one is singular."""
    rotation = torch.linalg.qr(features(6, 6).double()).Q
    a, b = torch.tensor([1.0, 2, 3, 0, 0, 0.5]), torch.tensor([4.0, 2, 0.1, 0, 7, 0.5])
    mean_a, mean_b = torch.zeros(6), torch.tensor([1.0, -2, 0, 0, 2, 0])

    def covariance(deviations: Tensor) -> Tensor:
        return rotation @ torch.diag(deviations.double() ** 2) @ rotation.T

    found = frechet_of(mean_a, covariance(a), mean_b, covariance(b))
    assert found == pytest.approx(9 + (a - b).square().sum().item(), rel=1e-6)
    assert frechet_of(mean_a, covariance(a), mean_a, covariance(a)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("count", "dim"), [(300, 16), (64, 64), (40, 64)])
def test_oracle_frechet_distance_of_torchmetrics_and_torch_fidelity(count: int, dim: int) -> None:
    from torch_fidelity import metric_fid
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = features(count, dim).relu(), features(count + 9, dim, 1, 0.1).relu()

    class Features(torch.nn.Identity):
        num_features = dim

    metric = FrechetInceptionDistance(feature=Features(), sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    found = frechet_distance(real, fake)
    assert found == pytest.approx(metric.compute().item(), rel=1e-6)
    statistics = [metric_fid.fid_features_to_statistics(x.double()) for x in (real, fake)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert found == pytest.approx(expected[metric_fid.KEY_METRIC_FID], rel=1e-6)


def test_statistics_of_other_features_are_refused() -> None:
    one, two = (moments_of(features(10, dim)) for dim in (4, 5))
    with pytest.raises(DataError, match="of features of one extractor"):
        frechet_of(one.mean, one.covariance, two.mean, two.covariance)
    with pytest.raises(DataError, match="not finite"):
        frechet_of(one.mean * torch.nan, one.covariance, one.mean, one.covariance)


def test_the_ratio_of_frechet_distances_is_a_mean_over_extractors() -> None:
    assert frechet_ratio({"a": 3.0, "b": 10.0}, {"a": 1.5, "b": 2.0}) == 3.5
    assert frechet_ratio({"a": 0.04}, {"a": 0.04}) == 1
    for samples, heldout, message in (
        ({}, {}, "no extractor"),
        ({"a": 1.0}, {"b": 1.0}, "measured with a, held-out pictures with b"),
        ({"a": 1.0}, {"a": 0.0}, "distance of 0 in the features of a"),
    ):
        with pytest.raises(DataError, match=message):
            frechet_ratio(samples, heldout)


# -- Inception Score ------------------------------------------------------------------------------


def test_inception_score_of_known_predictions() -> None:
    uniform, certain = torch.zeros(100, 5), 1e4 * torch.eye(5).repeat(20, 1)
    assert inception_score(uniform) == pytest.approx((1, 0))
    assert inception_score(certain, splits=1) == pytest.approx((5, 0))
    same = 1e4 * torch.eye(5)[:1].repeat(100, 1)
    assert inception_score(same) == pytest.approx((1, 0))
    with pytest.raises(UndefinedMetricError, match="is 9; an Inception Score over 10 parts"):
        inception_score(uniform[:9])


@pytest.mark.parametrize("splits", [1, 10])
def test_oracle_inception_score_of_torch_fidelity(splits: int, monkeypatch) -> None:
    from torch_fidelity import metric_isc

    logits = features(1003, 30) * 3
    expected = metric_isc.isc_features_to_metric(logits, splits)
    oracle = expected[metric_isc.KEY_METRIC_ISC_MEAN], expected[metric_isc.KEY_METRIC_ISC_STD]
    assert inception_score(logits, splits) == pytest.approx(oracle, rel=1e-10, abs=1e-12)
    monkeypatch.setattr(distances, "BLOCK_COLUMNS", 37)
    assert inception_score(logits, splits) == pytest.approx(oracle, rel=1e-10, abs=1e-12)


# -- precision, recall, density, coverage ---------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_oracle_precision_and_recall_of_torch_fidelity(k: int) -> None:
    from torch_fidelity import metric_prc

    options = {"prc_neighborhood": k, "prc_batch_size": 100, "save_cpu_ram": False}
    expected = metric_prc.prc_features_to_metric(
        FAKE.double(), REAL.double(), verbose=False, **options
    )
    found = precision_recall(REAL, FAKE, k)
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-4)
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1]


def plain_density_coverage(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Equations 4 and 5 of Naeem et al. (2002.09797), by matrices of all distances."""
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    reach = torch.cdist(real, real, **exact).sort(1).values[:, k]
    between = torch.cdist(real, fake, **exact)
    density = (between < reach[:, None]).double().sum(0).mean() / k
    return density.item(), (between.min(1).values < reach).double().mean().item()


@pytest.mark.parametrize("k", [1, 5])
def test_oracle_density_and_coverage(k: int) -> None:
    expected = plain_density_coverage(REAL.double(), FAKE.double(), k)
    assert density_coverage(REAL, FAKE, k) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[1] < 1


def test_identical_and_disjoint_sets() -> None:
    assert precision_recall(REAL, REAL) == (1, 1)
    assert density_coverage(REAL, REAL) == (1, 1)
    assert cmmd(REAL, REAL) == pytest.approx(0, abs=1e-9)
    far = REAL + 1000
    assert precision_recall(REAL, far) == (0, 0)
    assert density_coverage(REAL, far) == (0, 0)


def test_copies_of_one_picture_are_covered_by_it_alone() -> None:
    """Balls of radius 0 contain their centre for precision, and nothing for density."""
    same = REAL[:1].repeat(10, 1)
    assert precision_recall(REAL, same) == (1, 1 / len(REAL))
    assert precision_recall(same, REAL) == (1 / len(REAL), 1)
    assert density_coverage(same, same) == (0, 0)


def test_samples_of_one_mode_are_precise_and_recall_nothing_else() -> None:
    modes = torch.cat([features(100, 8), features(100, 8, seed=1, shift=50.0)])
    fake = features(100, 8, seed=2)
    precision, recall = precision_recall(modes, fake)
    assert precision > 0.8 and recall < 0.5
    density, coverage = density_coverage(modes, fake)
    assert density > 0.8 and 0.3 < coverage <= 0.5


@pytest.mark.parametrize("measure", [precision_recall, density_coverage, cmmd])
def test_the_size_of_blocks_does_not_matter(measure: Callable, monkeypatch) -> None:
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)  # most distances are equal to others
    pairs = [(REAL, FAKE), (grid, grid + torch.tensor([1.0, 0, 0])), (REAL + 100, REAL + 100)]
    whole = [measure(*pair) for pair in pairs]
    for rows, columns in ((1, 1000), (64, 7), (100, 100)):
        monkeypatch.setattr(distances, "BLOCK_ROWS", rows)
        monkeypatch.setattr(distances, "BLOCK_COLUMNS", columns)
        found = [measure(*pair) for pair in pairs]
        if measure is cmmd:
            assert found == pytest.approx(whole, abs=1e-9)
        else:
            assert found == whole


def test_one_block_of_distances_exists_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(distances, "BLOCK_ROWS", 32)
    monkeypatch.setattr(distances, "BLOCK_COLUMNS", 64)
    sizes, compute = set(), distances._squared_distances
    monkeypatch.setattr(
        distances,
        "_squared_distances",
        lambda a, b: sizes.add((len(a), len(b))) or compute(a, b),
    )
    for measure in (precision_recall, density_coverage, cmmd):
        measure(REAL.half(), FAKE.half())
    assert max(rows for rows, _ in sizes) == 32 and max(columns for _, columns in sizes) == 64


def test_sets_that_are_too_small_or_of_other_features_are_refused() -> None:
    for call, message in (
        (lambda: precision_recall(REAL[:3], FAKE), "is 3; a nearest neighbour of order 3 needs"),
        (lambda: precision_recall(REAL, FAKE[:3]), "needs at least 4: give more pictures"),
        (lambda: density_coverage(REAL[:5], FAKE), "needs at least 6"),
        (lambda: cmmd(REAL[:1], FAKE), "N >= 2"),
    ):
        with pytest.raises(UndefinedMetricError, match=message):
            call()
    with pytest.raises(DataError, match="16 and 8 dimensions"):
        precision_recall(REAL, features(20, 8))
    density, _ = density_coverage(REAL, FAKE[:2])
    assert math.isfinite(density)


# -- CMMD -----------------------------------------------------------------------------------------


def plain_cmmd(x: Tensor, y: Tensor) -> float:
    """The authors' `distance.mmd` on embeddings of length 1, written down again."""

    def kernel(a: Tensor, b: Tensor) -> float:
        squares = a.square().sum(1)[:, None] + b.square().sum(1)[None]
        return torch.exp(-(squares - 2 * a @ b.T) / (2 * 10.0**2)).mean().item()

    x, y = (z.double() / z.double().norm(dim=1, keepdim=True) for z in (x, y))
    return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def test_oracle_cmmd_of_the_authors_and_of_torch_fidelity() -> None:
    from torch_fidelity import metric_kid

    assert cmmd(REAL, FAKE) == pytest.approx(plain_cmmd(REAL, FAKE), rel=1e-9)
    assert cmmd(REAL, FAKE) > cmmd(REAL, features(seed=2)) > 0
    x, y = (torch.nn.functional.normalize(z[:257].double(), dim=1).numpy() for z in (REAL, FAKE))
    kernels = [
        metric_kid.kernel_rbf(a, b, kid_kernel_rbf_sigma=10.0) for a, b in ((x, x), (x, y), (y, y))
    ]
    expected = 1000 * metric_kid.mmd2(*kernels, mmd_est="biased")
    assert cmmd(REAL[:257], FAKE) == pytest.approx(expected, rel=1e-6)
