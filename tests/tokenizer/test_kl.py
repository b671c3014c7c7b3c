"""The KL-VAE: its posterior, its normalised latents, its equivariance."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from smalti.data.latents import ContinuousSpec
from smalti.errors import SmaltiError
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import DiagonalGaussian, KLConfig, KLTokenizer, transformed

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
CONFIG = KLConfig(image_size=16, conv=CONV)


@pytest.fixture
def kl() -> KLTokenizer:
    torch.manual_seed(0)
    return KLTokenizer(CONFIG).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_divergence_is_that_of_torch_distributions() -> None:
    gaussian = DiagonalGaussian.of(torch.randn(3, 8, 2, 2))
    oracle = kl_divergence(Normal(gaussian.mean, gaussian.std), Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian.kl(), oracle.flatten(1).sum(1))


def test_oracle_posterior_of_diffusers() -> None:
    moments = 20 * torch.randn(2, 8, 3, 3)
    ours, theirs = DiagonalGaussian.of(moments), DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(ours.kl(), theirs.kl())
    torch.testing.assert_close(ours.std, theirs.std)
    noise = torch.randn(ours.mean.shape, generator=torch.Generator().manual_seed(3))
    a = ours.sample(noise)
    b = theirs.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(a, b)


def test_samples_have_the_moments_and_carry_gradients() -> None:
    moments = torch.zeros(1, 2, 100, 100)
    moments[:, 0], moments[:, 1] = 3.0, -2.0
    moments.requires_grad_()
    noise = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    sample = DiagonalGaussian.of(moments).sample(noise)
    assert sample.mean().item() == pytest.approx(3.0, abs=0.02)
    assert sample.std().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.05)
    sample.sum().backward()
    assert moments.grad[:, 0].eq(1).all() and moments.grad[:, 1].any()


def test_verbs_agree_with_one_another(kl, images) -> None:
    stored = kl.store(images)
    assert stored.shape == (3, 8, 8, 8)
    mean, logvar = kl.posterior(images)
    torch.testing.assert_close(stored, torch.cat([mean, (0.5 * logvar).exp()], 1))
    z = kl.encode(images)
    assert kl.spec == ContinuousSpec(4, 8, 8) and z.shape == (3, 4, 8, 8)
    assert torch.equal(z, kl.latents(stored))
    with torch.no_grad():  # `reconstruct` needs no gradient, which changes the last bits
        assert torch.equal(kl.reconstruct(images), kl.decode(kl.encode(images)).clamp(-1, 1))
    sampled = kl.latents(stored, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, mean + (0.5 * logvar).exp() * noise)


def test_a_list_samples_image_i_from_generator_i(kl, images) -> None:
    stored = kl.store(images).detach()
    sampled = kl.latents(stored, generator=[torch.Generator().manual_seed(s) for s in (5, 6, 7)])
    for i, seed in enumerate((5, 6, 7)):
        alone = kl.latents(stored[i : i + 1], generator=torch.Generator().manual_seed(seed))
        assert torch.equal(sampled[i : i + 1], alone)
    for wrong, message in (
        ([torch.Generator()] * 2, "2 generators were given for 3 samples: give one each"),
        ([torch.Generator(), 1, 2], "generator contains 1: give a torch.Generator"),
        (7, "generator contains 7: give a torch.Generator"),
    ):
        with pytest.raises(SmaltiError, match=message):
            kl.encode(images, generator=wrong)


def test_calibrated_latents_have_zero_mean_and_unit_variance(kl, images) -> None:
    before = kl.fingerprint
    reconstructed = kl.reconstruct(images)
    kl.calibrate(iter([images[:2], images[2:]]))
    stored = kl.store(images)
    samples = torch.cat(
        [kl.latents(stored, generator=torch.Generator().manual_seed(s)) for s in range(200)]
    )
    torch.testing.assert_close(samples.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(samples.std((0, 2, 3)), torch.ones(4), rtol=0.02, atol=0)
    torch.testing.assert_close(kl.reconstruct(images), reconstructed, rtol=1e-4, atol=1e-5)
    assert kl.fingerprint != before
    with pytest.raises(SmaltiError, match="no images"):
        kl.calibrate(iter([]))


def test_statistics_are_saved_in_the_config(kl, images, tmp_path) -> None:
    kl.calibrate(iter([images]))
    kl.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.config == kl.config and len(again.config.latent_std) == 4
    assert torch.equal(again.encode(images), kl.encode(images))


def test_every_parameter_learns(kl, images) -> None:
    kl.train()
    out = kl(images)
    (out.images.square().mean() + 1e3 * out.losses["kl"]).backward()
    assert [n for n, p in kl.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_weight_scales_the_divergence(images) -> None:
    torch.manual_seed(0)
    model = KLTokenizer(replace(CONFIG, kl_weight=0.5))
    expected = 0.5 * model.gaussian(images).kl().mean()
    torch.testing.assert_close(model(images).losses["kl"], expected)


def test_equivariance_transforms_latents_and_targets_alike() -> None:
    images = torch.nn.functional.interpolate(torch.randn(2, 3, 2, 2), (64, 64), mode="bilinear")
    z = torch.nn.functional.interpolate(images, (16, 16), mode="area")
    shapes = set()
    for seed in range(20):
        turn, size = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        moved, target = transformed(z, images, turn, size)
        assert target.shape[2] == 4 * moved.shape[2] and target.shape[3] == 4 * moved.shape[3]
        assert target.shape[2] >= 32
        small = torch.nn.functional.interpolate(target, moved.shape[2:], mode="area")
        assert (small - moved).abs().mean() < 0.1 * z.abs().mean()
        shapes.add(tuple(moved.shape[2:]))
    assert len(shapes) > 3


def test_equivariance_is_for_training_only(images) -> None:
    torch.manual_seed(0)
    large = torch.nn.functional.interpolate(images, (64, 64))
    model = KLTokenizer(replace(CONFIG, image_size=64, equivariance=1.0))
    changed = 0
    for seed in range(6):
        torch.manual_seed(seed)
        out = model.train()(large)
        assert out.images.shape == out.targets.shape
        changed += not torch.equal(out.targets, large)
    assert changed > 3
    assert torch.equal(model.eval()(large).targets, large)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18 + 1}, "not a multiple"),
        ({"image_size": 2**33}, "image_size is 8589934592; it must be at most 16384"),
        ({"kl_weight": -1.0}, "must not be negative"),
        ({"equivariance": 2.0}, r"in \[0, 1\]"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"latent_channels": 3, "quant_convs": False}, "without quant_convs the 4"),
        ({"latent_channels": 3, "latent_std": (1.0,) * 4}, "there are 3 latent channels"),
        ({"latent_mean": (0.0,)}, "has 1 values; there are 4 latent channels"),
        ({"latent_std": (1.0, 1.0, 0.0, 1.0)}, "must be positive"),
    ],
)
def test_impossible_configs_are_refused(changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("shape", [(1, 4, 8), (1, 3, 8, 8), (1, 4, 4, 8)])
def test_wrong_latents_are_refused(kl, shape) -> None:
    with pytest.raises(SmaltiError, match=r"takes \(B, 4, 8, 8\)"):
        kl.decode(torch.zeros(shape))


@pytest.mark.parametrize("grid", [(8, 24), (24, 8), (12, 16)])
def test_transformed_rectangles_keep_sides_for_lpips(grid: tuple[int, int]) -> None:
    height, width = grid
    z, images = torch.randn(1, 2, *grid), torch.rand(1, 3, 8 * height, 8 * width)
    for size in (0.0, 0.5, 0.99):
        small, target = transformed(z, images, 0.3, size)
        assert target.shape[2] == 8 * small.shape[2] and target.shape[3] == 8 * small.shape[3]
        assert min(target.shape[2:]) >= 32
        assert small.shape[2] / small.shape[3] == pytest.approx(width / height, rel=0.2)


def test_bfloat16_costs_reconstructions_less_than_0_02_db() -> None:
    """Of a tokenizer that was trained for a second, to about 16 dB."""

    def psnr(pictures: torch.Tensor) -> float:
        return float(-10 * ((pictures.float() - images) / 2).square().mean().log10())

    conv = replace(CONV, channels=16, mid_attention=False)
    model = KLTokenizer(KLConfig(image_size=16, conv=conv))
    images = F.interpolate(torch.rand(32, 3, 4, 4) * 2 - 1, (16, 16), mode="bilinear")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (model(images).images - images).square().mean().backward()
        optimizer.step()
    model.eval()
    exact = psnr(model.reconstruct(images))
    half = psnr(copy.deepcopy(model).cast(torch.bfloat16).reconstruct(images.bfloat16()))
    assert exact > 15 and abs(half - exact) < 0.02
