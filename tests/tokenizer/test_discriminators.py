"""Discriminators: shapes, sizes, spectral norms, second derivatives, frozen features."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbones import CONFIGS, write_file, write_folder
from torch import nn

from smalti.config import config_from_dict, config_to_dict
from smalti.errors import SmaltiError
from smalti.tokenizer.discriminators import DISCRIMINATORS, build_discriminator
from smalti.tokenizer.discriminators.frozen_features import (
    FrozenFeatureDiscriminator,
    FrozenFeatureDiscriminatorConfig,
)
from smalti.tokenizer.discriminators.patchgan import PatchGAN, PatchGANConfig
from smalti.tokenizer.discriminators.regularisers import (
    SpectralConv2d,
    advance_spectral_norms,
    r1_penalty,
)
from smalti.tokenizer.discriminators.stylegan import (
    StyleGANDiscriminator,
    StyleGANDiscriminatorConfig,
    halve,
)
from smalti.tokenizer.losses.objective import ObjectiveConfig


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return write_file(tmp_path / "vit.safetensors")


KINDS = ["patchgan", "spectral", "stylegan", "features"]


@pytest.fixture(params=KINDS)
def config(request, backbone: Path):
    return {
        "patchgan": PatchGANConfig(8, 2),
        "spectral": PatchGANConfig(8, 2, "spectral"),
        "stylegan": StyleGANDiscriminatorConfig(8, 16),
        "features": feature_config(backbone),
    }[request.param]


def feature_config(backbone: Path, **changes) -> FrozenFeatureDiscriminatorConfig:
    base = FrozenFeatureDiscriminatorConfig(
        backbone, num_heads=2, depths=(0, 2), image_size=16, channels=8
    )
    return replace(base, **changes)


# -- every discriminator ------------------------------------------------------------------------


def test_all_discriminators_are_tested() -> None:
    assert set(KINDS) == {*DISCRIMINATORS, "spectral"}


def test_logits_of_an_image_do_not_depend_on_the_others(config) -> None:
    discriminator, images = build_discriminator(config, 32), torch.rand(4, 3, 32, 32) * 2 - 1
    logits = discriminator(images)
    assert len(logits) == 4 and logits.numel() >= 4
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(discriminator(images), logits)  # a forward pass changes nothing
    assert torch.equal(discriminator.eval()(images), logits)


def test_every_discriminator_learns_to_tell_dark_from_bright(config) -> None:
    discriminator = build_discriminator(config, 32)
    optimizer = torch.optim.Adam(
        [p for p in discriminator.parameters() if p.requires_grad], lr=1e-2
    )
    images = torch.full((4, 3, 32, 32), 0.5) + 0.1 * torch.randn(4, 3, 32, 32)
    fakes = images - 1
    for _ in range(60):
        loss = F.relu(1 - discriminator(images)).mean() + F.relu(1 + discriminator(fakes)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance_spectral_norms(discriminator)
    assert discriminator(images).mean() > 0.3 > -0.3 > discriminator(fakes).mean()


def test_every_discriminator_has_second_derivatives(config) -> None:
    discriminator = build_discriminator(config, 32)
    r1_penalty(discriminator, torch.rand(2, 3, 32, 32)).backward()
    learning = [p for p in discriminator.parameters() if p.requires_grad and p.ndim > 1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    assert any(p.grad.abs().max() > 0 for p in learning if p.grad is not None)


def test_every_discriminator_works_in_bf16(config) -> None:
    discriminator, images = (
        build_discriminator(config, 32),
        torch.rand(2, 3, 32, 32, requires_grad=True),
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(images)
    logits.float().mean().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    torch.testing.assert_close(logits.float(), discriminator(images), rtol=0.1, atol=0.05)


def test_every_config_goes_through_a_recipe(config) -> None:
    objective = ObjectiveConfig(discriminator=config)
    again = config_from_dict(ObjectiveConfig, config_to_dict(objective), "recipe")
    assert again == objective
    assert DISCRIMINATORS.resolve(config.kind).Config is type(config)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "stylgan"}, 'did you mean "stylegan"'),
        ({"kind": "features"}, 'the key "backbone" is missing'),
        ({"kind": "stylegan", "num_layers": 2}, 'unknown key "num_layers"'),
    ],
)
def test_errors_in_a_recipe_are_named(data, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        config_from_dict(ObjectiveConfig, {"discriminator": data}, "recipe", ObjectiveConfig())


# -- spectral norm ------------------------------------------------------------------------------


def test_a_spectral_convolution_has_norm_one() -> None:
    conv = SpectralConv2d(6, 10, 3, stride=2, padding=1)
    for _ in range(100):
        conv.advance()
    norm = torch.linalg.matrix_norm(conv.normalised_weight().flatten(1), 2)
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-4, atol=0)
    images = torch.randn(2, 6, 8, 8)
    expected = F.conv2d(images, conv.weight, None, 2, 1) / torch.linalg.matrix_norm(
        conv.weight.flatten(1), 2
    ) + conv.bias.view(1, -1, 1, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(conv(images), expected, rtol=1e-4, atol=1e-5)


def test_the_scale_of_a_spectral_weight_gets_no_gradient() -> None:
    """W / sigma(W) does not change when W grows, so its gradient is orthogonal to W."""
    conv = SpectralConv2d(3, 4, 2)
    conv(torch.randn(2, 3, 5, 5)).square().sum().backward()
    gradient = conv.weight.grad
    assert gradient is not None
    cosine = F.cosine_similarity(gradient.flatten(), conv.weight.flatten(), dim=0)
    assert gradient.norm() > 0 and cosine.abs() < 1e-5


def test_an_iteration_may_come_between_forward_and_backward() -> None:
    conv, images = SpectralConv2d(3, 4, 2), torch.randn(2, 3, 5, 5)
    (expected,) = torch.autograd.grad(conv(images).square().sum(), conv.weight)
    loss = conv(images).square().sum()
    conv.advance()
    assert torch.equal(torch.autograd.grad(loss, conv.weight)[0], expected)


def test_patchgan_normalises_every_layer() -> None:
    discriminator = PatchGAN(PatchGANConfig(8, 2, "spectral"), 32)
    assert len([m for m in discriminator.modules() if isinstance(m, SpectralConv2d)]) == 4
    assert not [m for m in discriminator.modules() if type(m) is nn.Conv2d]


# -- patchgan and stylegan ----------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "side"), [(1, 30), (2, 14), (3, 6), (4, 2)])
def test_patchgan_gives_a_logit_per_patch(layers: int, side: int) -> None:
    config, least = PatchGANConfig(8, layers), 3 * 2**layers
    discriminator = PatchGAN(config, 64)
    assert discriminator(torch.zeros(1, 3, 64, 64)).shape == (1, 1, side, side)
    assert discriminator(torch.zeros(1, 3, least, least)).shape == (1, 1, 1, 1)
    assert discriminator(torch.zeros(1, 3, 5, 5)).shape == (1, 1, 1, 1)  # enlarged
    with pytest.raises(SmaltiError, match=f"at least {least} px"):
        PatchGAN(config, least - 1)


def test_a_patch_of_three_layers_sees_70_pixels() -> None:
    discriminator = PatchGAN(PatchGANConfig(8, 3, "spectral"), 128)  # no norm over the whole image
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images)[0, 0, 7, 7], images)
    rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


@pytest.mark.parametrize("side", [8, 16, 24, 32, 96])
def test_stylegan_takes_sizes_that_can_be_halved(side: int) -> None:
    discriminator = StyleGANDiscriminator(StyleGANDiscriminatorConfig(4, 8), side)
    assert discriminator(torch.rand(2, 3, side, side)).shape == (2, 1)
    assert discriminator(torch.rand(2, 3, side + 3, side + 3)).shape == (2, 1)  # resized


@pytest.mark.parametrize("side", [4, 7, 9, 30, 100])
def test_stylegan_refuses_other_sizes(side: int) -> None:
    with pytest.raises(SmaltiError, match=rf"{side} px cannot be halved"):
        StyleGANDiscriminator(StyleGANDiscriminatorConfig(4, 8), side)


def test_stylegan_begins_with_logits_of_about_unit_size() -> None:
    discriminator = StyleGANDiscriminator(StyleGANDiscriminatorConfig(32, 64), 32)
    logits = discriminator(torch.randn(64, 3, 32, 32))
    assert 0.05 < logits.square().mean().sqrt() < 3


def test_halving_keeps_constants_and_removes_the_finest_pattern() -> None:
    flat = halve(torch.ones(1, 2, 8, 8))
    torch.testing.assert_close(flat[..., 1:-1, 1:-1], torch.ones(1, 2, 2, 2))
    board = torch.tensor([1.0, -1.0]).repeat(4).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    assert halve(board)[..., 1:-1, 1:-1].abs().max() < 1e-6
    picture, kernel = torch.randn(1, 1, 8, 8), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    whole = F.conv2d(picture, torch.outer(kernel, kernel).view(1, 1, 4, 4), stride=2, padding=1)
    torch.testing.assert_close(halve(picture), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchGANConfig(num_layers=9), "num_layers is 9"),
        (lambda: PatchGANConfig(channels=12), "channels is 12"),
        (lambda: StyleGANDiscriminatorConfig(64, 32), "channels is 64 and max_channels 32"),
        (lambda: FrozenFeatureDiscriminatorConfig(Path("x"), depths=()), "depths is"),
        (lambda: FrozenFeatureDiscriminatorConfig(Path("x"), depths=(1, 1)), "depths is"),
        (lambda: FrozenFeatureDiscriminatorConfig(Path("x"), channels=0), "channels 0"),
    ],
)
def test_impossible_discriminators_are_refused(make, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make()


# -- frozen features ----------------------------------------------------------------------------


def test_only_the_heads_on_a_frozen_backbone_learn(backbone: Path) -> None:
    discriminator = FrozenFeatureDiscriminator(feature_config(backbone), 16).train()
    assert not any(m.training for m in discriminator.backbone.modules())
    assert not any(p.requires_grad for p in discriminator.backbone.parameters())
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    discriminator(images).mean().backward()
    assert all(p.grad is None for p in discriminator.backbone.parameters())
    assert all(p.grad is not None for p in discriminator.heads.parameters())
    assert images.grad is not None and images.grad.abs().max() > 0


def test_every_depth_has_its_head(backbone: Path) -> None:
    discriminator = FrozenFeatureDiscriminator(feature_config(backbone, depths=(0, 1, 2)), 16)
    assert discriminator(torch.rand(2, 3, 16, 16)).shape == (2, 3 * 16)
    other = FrozenFeatureDiscriminator(
        feature_config(backbone, image_size=24), 16
    )  # positions interpolated
    assert other(torch.rand(2, 3, 16, 16)).shape == (2, 2 * 36)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_of_transformers_is_a_backbone(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / kind, kind)
    discriminator = FrozenFeatureDiscriminator(feature_config(folder), 16)
    assert discriminator(torch.rand(2, 3, 16, 16)).shape == (2, 2 * 16)
    r1_penalty(discriminator, torch.rand(2, 3, 16, 16)).backward()
    assert all(p.grad is not None for p in discriminator.heads.parameters() if p.ndim > 1)
    again = FrozenFeatureDiscriminator(feature_config(folder), 16)
    again.load_state_dict(discriminator.state_dict())
    other = write_folder(tmp_path / "other", "siglip" if kind == "clip" else "clip")
    with pytest.raises(SmaltiError, match="not the backbone"):
        FrozenFeatureDiscriminator(feature_config(other), 16).load_state_dict(
            discriminator.state_dict()
        )


def test_a_checkpoint_holds_the_heads_and_wants_the_same_backbone(
    backbone: Path, tmp_path: Path
) -> None:
    discriminator = FrozenFeatureDiscriminator(feature_config(backbone), 16)
    state = discriminator.state_dict()
    assert not [key for key in state if "backbone" in key]
    again = FrozenFeatureDiscriminator(feature_config(backbone), 16)
    again.load_state_dict(state)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again(images), discriminator(images))
    wrapped = nn.ModuleDict({"discriminator": again})  # as an objective holds it
    wrapped.load_state_dict(nn.ModuleDict({"discriminator": discriminator}).state_dict())
    other = write_file(tmp_path / "other.safetensors", cls_token=torch.ones(1, 1, 16))
    with pytest.raises(SmaltiError, match="not the backbone that this discriminator was trained"):
        FrozenFeatureDiscriminator(feature_config(other), 16).load_state_dict(state)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_rectangles_of_any_channels_have_logits(config, channels: int) -> None:
    discriminator = build_discriminator(config, (32, 48), channels).eval()
    images = torch.rand(2, channels, 32, 48) * 2 - 1
    images.requires_grad_(True)
    logits = discriminator(images)
    assert len(logits) == 2
    assert torch.allclose(discriminator(images[:1]), logits[:1], atol=1e-5)
    logits.sum().backward()
    assert images.grad is not None and images.grad.flatten(2).abs().sum((0, 2)).gt(0).all()


def test_stylegan_halves_the_shorter_side_to_4_to_7_pixels() -> None:
    discriminator = StyleGANDiscriminator(StyleGANDiscriminatorConfig(8), (32, 48))
    assert discriminator.blocks(torch.zeros(1, 8, 32, 48)).shape[2:] == (4, 6)
    with pytest.raises(SmaltiError, match="50 px cannot be halved"):
        StyleGANDiscriminator(StyleGANDiscriminatorConfig(8), (32, 50))


def test_a_discriminator_for_rgb_alone_refuses_other_channels(monkeypatch) -> None:
    class ForRGB(nn.Module):
        Config = PatchGANConfig

        def __init__(self, config: PatchGANConfig, image_size: int) -> None:
            super().__init__()

    monkeypatch.setitem(DISCRIMINATORS._entries, "patchgan", ForRGB)
    with pytest.raises(SmaltiError, match="the patchgan discriminator takes RGB images only"):
        build_discriminator(PatchGANConfig(), 32, 1)
