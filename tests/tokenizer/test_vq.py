"""The VQ tokenizer as a whole: shapes, published sizes, gradients, refusals."""

from dataclasses import replace

import diffusers
import pytest
import torch

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig, Decoder, Encoder
from smalti.tokenizer.presets import PRESETS
from smalti.tokenizer.vq import VQConfig


def test_verbs_agree_with_one_another(tokenizer) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 64) and codes.dtype == torch.int64
    assert torch.equal(tokenizer.latents(tokenizer.store(images)), codes)
    decoded = tokenizer.decode(codes)
    torch.testing.assert_close(tokenizer(images).images, decoded)
    assert torch.equal(tokenizer.reconstruct(images), decoded.clamp(-1, 1))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vq-f16", 71.88),
        ("vq-f8", 70.11),
        ("vqgan-f16-1024", 72.14),
        ("var-f16", 108.95),
        ("kl-f8", 83.65),
    ],
)
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = Tokenizer.registry.build(PRESETS[name])
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    assert model.image_size == 256


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_image_size(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        spec = Tokenizer.registry.build(config).spec
    height, width = spec.grids[-1] if isinstance(spec, CodeSpec) else (spec.height, spec.width)
    assert (
        height * config.conv.downsampling == width * config.conv.downsampling == config.image_size
    )


def test_encoder_and_decoder_are_those_of_diffusers() -> None:
    """diffusers' VQModel halves have the same architecture under other names."""
    config = ConvConfig(32, (1, 2), 1, (), True, 4)
    ours = (Encoder(config), Decoder(config))
    theirs = diffusers.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=True,
    )
    copy_from_diffusers(ours[0], theirs.encoder, reverse=False)
    copy_from_diffusers(ours[1], theirs.decoder, reverse=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        # 16 channels of group norm at width 64 differ in groups: set as the published models have
        for module in [*ours[0].modules(), *ours[1].modules()]:
            if isinstance(module, torch.nn.GroupNorm):
                module.num_groups = 8
        latents = ours[0](images)
        torch.testing.assert_close(latents, theirs.encoder(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1](latents), theirs.decoder(latents), rtol=1e-4, atol=1e-5)


def copy_from_diffusers(ours, theirs, *, reverse: bool) -> None:
    """Fill ours by diffusers' names, each tensor exactly once."""
    source = dict(theirs.state_dict())
    target = {}
    for name, value in ours.state_dict().items():
        value_from = source.pop(diffusers_name(name, reverse))
        target[name] = value_from.reshape(value.shape)
    assert not source, sorted(source)
    ours.load_state_dict(target)


def diffusers_name(name: str, reverse: bool) -> str:
    parts = name.split(".")
    rest = ".".join(parts[-2:])
    if parts[0] in ("down", "up"):
        level = int(parts[1])
        level = 1 - level if reverse else level
        block = f"{parts[0]}_blocks.{level}"
        if parts[2] == "block":
            inner = rest.replace("nin_shortcut", "conv_shortcut")
            return f"{block}.resnets.{parts[3]}.{inner}"
        return f"{block}.{parts[2]}rs.0.{rest}"
    if parts[0] == "mid":
        if parts[1] == "attn_1":
            layer = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"}.get(
                parts[2], "to_out.0"
            )
            return f"mid_block.attentions.0.{layer}.{parts[3]}"
        return f"mid_block.resnets.{0 if parts[1] == 'block_1' else 1}.{rest}"
    return name.replace("norm_out", "conv_norm_out")


def test_every_parameter_learns(tokenizer) -> None:
    tokenizer.train()
    out = tokenizer(torch.rand(2, 3, 16, 16) * 2 - 1)
    (out.images.square().mean() + sum(out.losses.values())).backward()
    silent = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_patches_fold_and_unfold() -> None:
    config = ConvConfig(8, (1, 2), 1, (), False, 4, patch_size=2)
    images = torch.randn(1, 3, 16, 16)
    features = Encoder(config)(images)
    assert features.shape == (1, 4, 4, 4) and config.downsampling == 4
    assert Decoder(config)(features).shape == images.shape


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.int64), r"\(1, 5\).*takes \(B, 64\)"),
        (torch.zeros(1, 64), "torch.float32"),
        (torch.full((1, 64), 16), r"\[16, 16\]; the codebook has 0 to 15"),
        (torch.full((1, 64), -1), r"\[-1, -1\]"),
    ],
)
def test_wrong_codes_are_refused(tokenizer, codes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        tokenizer.decode(codes)


def test_images_of_the_largest_size_are_described() -> None:
    config = VQConfig(image_size=2**14, conv=ConvConfig(8, (1, 2, 2), 1, ()))
    assert config.grid == (4096, 4096)


def test_wrong_images_are_refused(tokenizer) -> None:
    with pytest.raises(SmaltiError, match="resize and crop"):
        tokenizer.encode(torch.zeros(1, 3, 20, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "not a multiple of the down-sampling factor"),
        ({"image_size": 2**33}, "image_size is 8589934592; it must be at most 16384"),
        ({"quant_kernel": 2}, "use an odd number"),
    ],
)
def test_impossible_configs_are_refused(changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        replace(VQConfig(conv=ConvConfig(8, (1, 2, 2), 1, ())), **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 7}, "channels is 7"),
        ({"channels": 24, "norm_groups": 5}, "multiple of norm_groups 5"),
        ({"norm_groups": 0}, "multiple of norm_groups 0"),
        ({"channels": 0, "norm_groups": 5}, "channels is 0; it must be at least 1"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"attention_levels": (9,)}, "names level 9"),
        ({"z_channels": 0}, "at least 1"),
    ],
)
def test_impossible_convolutions_are_refused(options, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        ConvConfig(**options)
