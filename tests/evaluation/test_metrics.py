"""Metrics against closed forms and independent implementations."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchmetrics.functional.image as oracle

from smalti.data.latents import rounded, to_float, to_levels
from smalti.errors import DataError
from smalti.evaluation.distances import frechet_distance, kernel_distance, nearest_neighbours
from smalti.evaluation.features import random_split
from smalti.evaluation.metrics import (
    Found,
    ImageSets,
    Metric,
    Undefined,
    defined,
    distance_metrics,
    ratio_metrics,
    streamed_reconstruction_metrics,
    table,
    undefined,
    write_summary,
)
from smalti.evaluation.reconstruction import (
    code_counts,
    known_psnr,
    perplexity,
    psnr,
    ssim,
    usage,
)
from smalti.tokenizer.losses.perceptual import LPIPS


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    reference = torch.rand(3, 3, 32, 40, generator=rng) * 2 - 1
    return reference + 0.2 * torch.randn(reference.shape, generator=rng), reference


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    reference = torch.zeros(2, 3, 16, 16)
    off_by_ten = reference + 2 * 10 / 255
    expected = 20 * math.log10(255 / 10)
    assert psnr(off_by_ten, reference).tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert psnr(reference, reference).isinf().all()


def blurred(x: torch.Tensor) -> torch.Tensor:
    """Means under a Gaussian window of 11 px, sigma 1.5, where it fits: (B, C, H - 10, W - 10)."""
    kernel = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(kernel, kernel) / kernel.sum() ** 2
    return F.conv2d(x, window.expand(x.shape[1], 1, 11, 11), groups=x.shape[1])


def plain_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Equation 13 of Wang et al. (2004), written down again, in float64."""
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def test_oracle_psnr_and_ssim_of_each_image() -> None:
    images, reference = pair()
    a, b = to_levels(images), to_levels(reference)
    for i in range(3):
        one = oracle.peak_signal_noise_ratio(a[i : i + 1], b[i : i + 1], data_range=255.0)
        assert psnr(images, reference)[i].item() == pytest.approx(one.item(), rel=1e-5)
    expected = plain_ssim(a.double(), b.double()).float()
    torch.testing.assert_close(ssim(images, reference), expected, rtol=1e-6, atol=1e-6)
    assert ssim(reference, reference).tolist() == pytest.approx([1.0] * 3)


def test_ssim_leaves_out_the_border_where_torchmetrics_reflects_the_image() -> None:
    images, reference = pair()
    changed = images.clone()
    changed[..., 0, 0] = -changed[..., 0, 0].sign()  # a corner is inside of one window only
    a, b = to_levels(images), to_levels(reference)
    full = oracle.structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
    assert (full - ssim(images, reference)).abs().max() > 1e-3
    assert (ssim(changed, reference) - ssim(images, reference)).abs().max() < 1e-3


def test_psnr_does_not_see_what_an_8_bit_file_cannot_hold() -> None:
    images = to_float(torch.arange(256).view(1, 1, 16, 16)).expand(1, 3, -1, -1)
    assert psnr(images + 0.3 / 127.5, images).isinf()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="give two equal shapes"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8))
    with pytest.raises(DataError, match="at least 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_psnr_of_known_pixels_sees_no_others() -> None:
    images, reference = pair()
    known = torch.zeros(3, 1, 32, 40, dtype=torch.bool)
    known[0], known[1, :, :16] = True, True  # all, half, none
    found = known_psnr(images, reference, known)
    assert found[0].item() == pytest.approx(psnr(images, reference)[0].item(), rel=1e-5)
    top = psnr(images[1:2, :, :16], reference[1:2, :, :16])
    assert found[1].item() == pytest.approx(top.item(), rel=1e-5) and found[2].isnan()
    assert known_psnr(reference, reference, known)[0].isinf()


def test_usage_and_perplexity_of_known_codebooks() -> None:
    uniform = code_counts(torch.arange(64).view(2, 32), 64)
    assert usage(uniform) == 1.0 and perplexity(uniform) == pytest.approx(64)
    collapsed = code_counts(torch.zeros(100, dtype=torch.int64), 64)
    assert usage(collapsed) == 1 / 64 and perplexity(collapsed) == pytest.approx(1)
    half = code_counts(torch.arange(32), 64)
    assert usage(half) == 0.5 and perplexity(half) == pytest.approx(32)


def test_codes_of_another_codebook_are_refused() -> None:
    with pytest.raises(DataError, match="range from 0 to 64; a codebook of 64 ends at 63"):
        code_counts(torch.arange(65), 64)
    with pytest.raises(DataError, match="range from -1"):
        code_counts(torch.tensor([-1, 3]), 64)
    with pytest.raises(DataError, match="no codes to count"):
        code_counts(torch.zeros(0, dtype=torch.int64), 64)


def gaussian(mean: list[float], variances: list[float]) -> torch.Tensor:
    """100 features whose sample mean and covariance are exactly these."""
    noise = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    noise -= noise.mean(0)
    white = noise @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T))).T
    return white * torch.tensor(variances).double().sqrt() + torch.tensor(mean)


def test_frechet_distance_of_commuting_gaussians_is_its_closed_form() -> None:
    a, b = gaussian([0.0, 0.0], [1.0, 4.0]), gaussian([3.0, 4.0], [9.0, 1.0])
    expected = 25 + (1 - 3) ** 2 + (2 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_oracle_scipy_matrix_square_root() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 200, 12))
    y = y @ np.diag(np.linspace(0.5, 2, 12)) + 0.3
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    expected = np.square(x.mean(0) - y.mean(0)).sum()
    expected += np.trace(np.cov(x.T) + np.cov(y.T) - 2 * np.real(root))
    ours = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("count", "width"), [(512, 64), (256, 256), (64, 256)])
def test_oracle_symmetric_square_root(count: int, width: int) -> None:
    """tr (A B)^1/2 is tr (A^1/2 B A^1/2)^1/2, whose eigenvalues are real; A may be singular."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=rng).relu()
    y = torch.randn(count, width, generator=rng).relu() * 1.1 + 0.05
    a, b = torch.cov(x.double().T), torch.cov(y.double().T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0)
    means = (x.double().mean(0) - y.double().mean(0)).square().sum()
    expected = means + a.trace() + b.trace() - 2 * product.sqrt().sum()
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_stays_real_with_fewer_samples_than_features() -> None:
    features = torch.randn(20, 64)
    value = frechet_distance(features[:10], features[10:])
    assert value > 0 and math.isfinite(value)
    with pytest.raises(DataError, match="N >= 2"):
        frechet_distance(features[:1], features)
    with pytest.raises(DataError, match="N >= 2"):
        frechet_distance(features, features[:1])


def floor(features: torch.Tensor, count: int, seed: int = 0) -> float:
    """The distance of some real features from the others."""
    return frechet_distance(*random_split(features, count, torch.Generator().manual_seed(seed)))


def test_the_floor_of_real_features_shrinks_with_their_number() -> None:
    features = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert 0 < floor(features, 2000) < floor(features, 200) < floor(features, 20)
    with pytest.raises(DataError, match=r"count is 3999; it must lie in \[2, 3998\]"):
        floor(features, 3999)


def test_the_floor_compares_two_parts_that_share_nothing() -> None:
    far_apart = torch.tensor([[0.0], [0.0], [10.0], [10.0]])
    floors = {round(floor(far_apart, 2, seed), 6) for seed in range(20)}
    # {0, 0} against {10, 10}: the means differ by 10; {0, 10} against {0, 10}: nothing differs
    assert floors == {0.0, 100.0}


def test_features_that_are_not_finite_are_refused() -> None:
    features = torch.randn(10, 4)
    features[3, 1] = float("nan")
    with pytest.raises(DataError, match="1 of 10 feature vectors are not finite"):
        frechet_distance(features, torch.randn(10, 4))


def test_kid_is_unbiased_and_grows_with_the_difference() -> None:
    rng = torch.Generator().manual_seed(0)
    real, same = torch.randn(2, 1000, 16, generator=rng)

    def kid(fake: torch.Tensor) -> float:
        return kernel_distance(
            real, fake, subsets=50, subset_size=200, generator=torch.Generator().manual_seed(0)
        ).mean

    assert abs(kid(same)) < 0.01
    assert kid(same) < kid(same + 0.2) < kid(same + 0.5)
    with pytest.raises(DataError, match=r"it must lie in \[2, 1000\]"):
        kernel_distance(real, same, subsets=1, subset_size=2000, generator=rng)


def plain_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Equation 4 of Binkowski et al. (1801.01401) as sums over pairs, in float64."""
    m, d = x.shape

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / d + 1) ** 3

    pairs = [(i, j) for i in range(m) for j in range(m)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j)
    between = sum(kernel(x[i], y[j]) for i, j in pairs)
    return within / (m * (m - 1)) - 2 * between / m**2


def test_oracle_kid_of_a_subset_that_is_the_whole_set() -> None:
    x, y = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    kid = kernel_distance(x, y, subsets=3, subset_size=20, generator=rng)
    assert kid.mean == pytest.approx(plain_mmd(x.double(), y.double()), rel=1e-9)
    assert kid.std == pytest.approx(0, abs=1e-12)


def test_nearest_neighbours_find_copies() -> None:
    references = torch.rand(50, 3, 4, 4)
    queries = torch.cat([references[[7, 3]], references[[9]] + 0.01])
    found = nearest_neighbours(queries, references, chunk=2)
    assert found.indices.tolist() == [7, 3, 9]
    assert found.distances[:2].tolist() == [0, 0]
    assert found.distances[2].item() == pytest.approx(0.01 * 48**0.5, rel=1e-4)


def test_oracle_nearest_neighbours_in_a_crowd_far_from_the_origin() -> None:
    """Where the rounding of a matrix product is larger than the distances of similar images."""
    rng = torch.Generator().manual_seed(0)
    references = 1 + 1e-3 * torch.randn(300, 3, 8, 8, generator=rng)
    references[200] = references[17]
    queries = torch.cat([references[[200]], references[:40] + 1e-4])
    found = nearest_neighbours(queries, references, chunk=16)
    differences = queries.flatten(1).double()[:, None] - references.flatten(1).double()
    exact = differences.norm(dim=2).min(1)
    assert found.indices.tolist() == [17, *range(40)]  # of two equal ones the first
    assert torch.equal(found.indices[1:], exact.indices[1:])
    torch.testing.assert_close(found.distances.double(), exact.values, rtol=1e-3, atol=0)


def test_neighbours_need_references_of_the_same_shape() -> None:
    for references in (torch.zeros(0, 3, 4, 4), torch.zeros(5, 3, 8, 8)):
        with pytest.raises(DataError, match="give at least one reference"):
            nearest_neighbours(torch.zeros(2, 3, 4, 4), references)


def test_a_summary_keeps_the_protocol(tmp_path) -> None:
    write_summary(tmp_path / "s.json", {"psnr": Metric(20.5, {"split": "heldout"})}, model="m")
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["versions"].keys() == {"smalti", "torch", "torchvision", "torchmetrics"}
    assert summary["model"] == "m"
    assert summary["metrics"] == {"psnr": {"value": 20.5, "protocol": {"split": "heldout"}}}


def test_what_is_not_defined_is_listed_with_its_reason(tmp_path) -> None:
    found = {"lpips": Undefined("the pictures are small"), "psnr": Metric(20.5)}
    write_summary(tmp_path / "s.json", found)
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["metrics"].keys() == {"psnr"} == defined(found).keys()
    assert summary["undefined"] == {"lpips": "the pictures are small"}
    assert table(found).splitlines() == [
        "psnr      20.5000",
        "lpips  not defined: the pictures are small",
    ]


class Means:
    """Features (B, 3): the mean of each channel."""

    name, side, weights_sha256 = "means", 8, "none"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def distances_of(train: int) -> Found:
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sets = ImageSets(
        images[:16], torch.zeros(16), images[16:20], torch.zeros(4), images[20:][:train]
    )
    found = distance_metrics(sets, Means(), {}, lambda purpose: torch.Generator().manual_seed(0))
    return found | ratio_metrics(found, [Means()])


def test_distances_of_too_few_pictures_are_left_out_one_by_one() -> None:
    names = {f"{kind}_means{suffix}" for kind in ("fd", "kid") for suffix in ("", "_heldout")}
    floors = {"fd_means_floor", "kid_means_floor"}
    assert defined(distances_of(4)).keys() == names | floors | {"fdr_1"}
    three, one = distances_of(3), distances_of(1)
    assert defined(three).keys() == names | {"fdr_1"} and undefined(three).keys() == floors
    assert undefined(one).keys() == names | floors | {"fdr_1"}
    assert "16 against 1; a distance needs at least 2 of each" in undefined(one)["fd_means"]
    ratio = three["fd_means"].value / three["fd_means_heldout"].value
    assert three["fdr_1"].value == pytest.approx(ratio)
    assert three["fdr_1"].protocol["features"] == ["means"]
    assert three["fdr_1"].protocol["heldout"] == 4


def test_reconstructions_and_originals_have_a_frechet_distance() -> None:
    rng = torch.Generator().manual_seed(0)
    originals = torch.rand(20, 3, 8, 8, generator=rng) * 2 - 1
    outputs = originals * 0.5 + 0.1
    pairs = zip(outputs.split(7), originals.split(7), strict=True)
    lpips = LPIPS.from_embedded()
    found = streamed_reconstruction_metrics(pairs, lpips, {"data": "x"}, [Means()])
    features = [Means()(rounded(images)) for images in (originals, outputs)]
    assert found["rfd_means"].value == pytest.approx(frechet_distance(*features), rel=1e-9)
    assert found["rfd_means"].protocol["pictures"] == 20
    assert found["rfd_means"].protocol["features"] == "means"
    assert undefined(found).keys() == {"ssim", "lpips"}
    assert (
        undefined(found)["ssim"] == "the pictures have 8 x 8 pixels; the window of SSIM has 11 x 11"
    )
    alone = streamed_reconstruction_metrics([(outputs[:1], originals[:1])], lpips, {}, [Means()])
    assert "a covariance needs at least 2" in undefined(alone)["rfd_means"]
