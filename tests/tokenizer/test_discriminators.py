"""The critics: shapes, sizes, spectral norms, second derivatives, and the frozen backbone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

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
from smalti.tokenizer.vit import FrozenViT, ViTSizes

SIZES = ViTSizes(width=16, depth=3, hidden=32, patch_size=4, grid=4, layer_scale=False)


def write_backbone(path: Path, sizes: ViTSizes = SIZES, **changes) -> Path:
    """A tiny ViT with random weights, in a file such as a user would give."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        weights = {
            name: torch.randn_like(value) * (0.3 if value.ndim > 1 else 0.1)
            for name, value in FrozenViT(sizes, 2).state_dict().items()
        }
    weights |= changes
    save_file({k: v for k, v in weights.items() if v is not None}, path)
    return path


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return write_backbone(tmp_path / "vit.safetensors")


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


# -- what holds for every critic ----------------------------------------------------------------


def test_all_critics_are_tested() -> None:
    assert set(KINDS) == {*DISCRIMINATORS, "spectral"}


def test_every_critic_judges_each_picture_for_itself(config) -> None:
    discriminator, images = build_discriminator(config, 32), torch.rand(4, 3, 32, 32) * 2 - 1
    logits = discriminator(images)
    assert len(logits) == 4 and logits.numel() >= 4
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(discriminator(images), logits)  # asking changes nothing
    assert torch.equal(discriminator.eval()(images), logits)


def test_every_critic_learns_to_tell_dark_from_bright(config) -> None:
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


def test_every_critic_has_second_derivatives(config) -> None:
    discriminator = build_discriminator(config, 32)
    r1_penalty(discriminator, torch.rand(2, 3, 32, 32)).backward()
    learning = [p for p in discriminator.parameters() if p.requires_grad and p.ndim > 1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    assert any(p.grad.abs().max() > 0 for p in learning if p.grad is not None)


def test_every_critic_works_in_bf16(config) -> None:
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
def test_mistakes_in_a_recipe_are_named(data, message: str) -> None:
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
def test_patchgan_judges_patches(layers: int, side: int) -> None:
    config, least = PatchGANConfig(8, layers), 3 * 2**layers
    discriminator = PatchGAN(config, 64)
    assert discriminator(torch.zeros(1, 3, 64, 64)).shape == (1, 1, side, side)
    assert discriminator(torch.zeros(1, 3, least, least)).shape == (1, 1, 1, 1)
    assert discriminator(torch.zeros(1, 3, 5, 5)).shape == (1, 1, 1, 1)  # enlarged
    with pytest.raises(SmaltiError, match=f"at least {least} px"):
        PatchGAN(config, least - 1)


def test_a_patch_of_three_layers_sees_70_pixels() -> None:
    discriminator = PatchGAN(
        PatchGANConfig(8, 3, "spectral"), 128
    )  # no norm that looks at the whole
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


def test_halving_keeps_constants_and_kills_the_finest_pattern() -> None:
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
def test_impossible_critics_are_refused(make, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make()


# -- the frozen backbone ------------------------------------------------------------------------


def torchvision_vit(weights: dict[str, torch.Tensor]) -> VisionTransformer:
    """torchvision's ViT with the same weights under its own names."""
    model = VisionTransformer(16, 4, SIZES.depth, 2, SIZES.width, SIZES.hidden).eval()
    names = {
        "cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj", "norm.": "encoder.ln.",
        "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2",
        "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3",
    }  # fmt: skip
    renamed = {}
    for name, value in weights.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    missing = model.load_state_dict(renamed, strict=False)
    assert not missing.unexpected_keys and all("heads" in k for k in missing.missing_keys)
    return model


def test_oracle_the_backbone_is_a_vision_transformer(backbone: Path) -> None:
    ours = FrozenViT.from_file(backbone, 2, 16)
    theirs = torchvision_vit(ours.state_dict())
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normed = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        tokens = torch.cat([theirs.class_token.expand(3, -1, -1), theirs._process_input(normed)], 1)
        expected = theirs.encoder(tokens)[:, 1:].mT.unflatten(2, (4, 4))  # (B, D, h, w)
    (found,) = ours.features(images, (2,))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_backbone_is_frozen_and_lets_gradients_through(backbone: Path) -> None:
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


def test_the_number_of_attention_heads_matters(backbone: Path) -> None:
    images = torch.rand(2, 3, 16, 16)
    one, two = (FrozenViT.from_file(backbone, heads, 16).features(images, (2,)) for heads in (1, 2))
    assert not torch.allclose(one[0], two[0])


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
    wrapped = nn.ModuleDict({"critic": again})  # as an objective holds it
    wrapped.load_state_dict(nn.ModuleDict({"critic": discriminator}).state_dict())
    other = write_backbone(tmp_path / "other.safetensors", cls_token=torch.ones(1, 1, 16))
    with pytest.raises(SmaltiError, match="not the backbone that this critic was trained on"):
        FrozenFeatureDiscriminator(feature_config(other), 16).load_state_dict(state)


def test_layer_scale_is_read_from_the_file(tmp_path: Path) -> None:
    sizes = replace(SIZES, layer_scale=True)
    file = write_backbone(tmp_path / "dinov2.safetensors", sizes)
    images = torch.rand(1, 3, 16, 16)
    before = FrozenViT.from_file(file, 2, 16)
    gamma = {"blocks.0.ls1.gamma": torch.zeros(16)}
    after = FrozenViT.from_file(write_backbone(file, sizes, **gamma), 2, 16)
    assert after.sizes.layer_scale
    assert not torch.allclose(before.features(images, (0,))[0], after.features(images, (0,))[0])


def test_building_draws_no_random_numbers_for_the_backbone(backbone: Path) -> None:
    before = torch.random.get_rng_state()
    FrozenViT.from_file(backbone, 2, 16)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"cls_token": None}, {}, "lacks the tensor cls_token"),
        ({"head.weight": torch.ones(2)}, {}, "has a tensor head.weight that the backbone"),
        ({"norm.bias": torch.ones(3)}, {}, r"norm.bias has shape \(3,\), not \(16,\)"),
        ({"patch_embed.proj.weight": None}, {}, "holds no vision transformer"),
        ({"pos_embed": torch.ones(1, 12, 16)}, {}, "pos_embed has shape"),
        ({}, {"num_heads": 3}, "num_heads is 3, which does not divide the width 16"),
        ({}, {"image_size": 18}, "image_size is 18, no multiple of the patch size 4"),
        ({}, {"depths": (0, 3)}, "depths names block 3"),
    ],
)
def test_a_wrong_backbone_is_refused(tmp_path: Path, changes, options, message: str) -> None:
    file = write_backbone(tmp_path / "vit.safetensors", **changes)
    with pytest.raises(SmaltiError, match=message):
        build_discriminator(feature_config(file, **options), 32)


def test_a_missing_or_damaged_backbone_is_never_replaced_by_chance(tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match=r"nowhere.safetensors does not exist: give a"):
        build_discriminator(feature_config(tmp_path / "nowhere.safetensors"), 32)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(SmaltiError, match="damaged"):
        build_discriminator(feature_config(tmp_path / "cut.safetensors"), 32)
