"""Folders of Diffusers' autoencoders, with Diffusers itself as the reference."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.pipelines.convert.convert import convert, export, read_published
from smalti.pipelines.convert.source import Options
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def randomised(model: nn.Module) -> nn.Module:
    """Weights unlike any initialisation, of outputs about 1."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
        parameter.data = noise / fan_in**0.5 if fan_in else 0.3 * noise
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.data += 1
        if isinstance(module, nn.Embedding):
            module.weight.data = torch.randn(module.weight.shape, generator=generator)
    return model.eval()


def blocks(widths: tuple[int, ...], attention: tuple[int, ...] = ()) -> dict:
    down = ["AttnDown" if i in attention else "Down" for i in range(len(widths))]
    up = ["AttnUp" if i in attention else "Up" for i in range(len(widths))][::-1]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(f"{name}EncoderBlock2D" for name in down),
        "up_block_types": tuple(f"{name}DecoderBlock2D" for name in up),
    }


KL = {
    "stable-diffusion": {**blocks((32, 64, 64)), "layers_per_block": 2},
    "shifted": {
        **blocks((16, 32), attention=(1,)),
        "norm_num_groups": 4,
        "latent_channels": 7,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "without-convolutions": {
        **blocks((24, 24, 72)),
        "norm_num_groups": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    "by-channel": {
        **blocks((32, 32)),
        "latent_channels": 2,
        "latents_mean": [0.5, -0.25],
        "latents_std": [2.0, 0.75],
        "scaling_factor": 1.0,
    },
}


def autoencoder(name: str) -> nn.Module:
    return randomised(diffusers.AutoencoderKL(**KL[name], sample_size=32))


def pictures(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(9)) * 2 - 1


def close(found: Tensor, expected: Tensor) -> None:
    """Within 2e-4, relative to the largest number."""
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def converted(source: str, folder: Path, out: Path) -> Tokenizer:
    convert(source, folder, out, Options(image_size=32))
    return Tokenizer.from_pretrained(out)


@torch.no_grad()
@pytest.mark.parametrize("name", KL)
def test_kl_autoencoders_agree_with_diffusers(name: str, tmp_path: Path) -> None:
    reference, images = autoencoder(name), pictures()
    reference.save_pretrained(tmp_path / "theirs")
    model = converted("diffusers-kl", tmp_path / "theirs", tmp_path / "ours")
    expected = reference.encode(images).latent_dist
    mean, logvar = model.posterior(images)
    close(mean, expected.mean)
    close(logvar, expected.logvar)
    close(model.decode(model.encode(images)), reference.decode(expected.mean).sample)
    options = reference.config
    shift = options.shift_factor or 0.0
    scaled = (expected.mean - shift) * options.scaling_factor
    if options.latents_mean:
        m, s = (
            torch.tensor(v).view(1, -1, 1, 1) for v in (options.latents_mean, options.latents_std)
        )
        scaled = (expected.mean - m) / s
    close(model.encode(images), scaled)


@pytest.mark.parametrize("name", KL)
def test_exported_folders_are_diffusers_own(name: str, tmp_path: Path) -> None:
    reference = autoencoder(name)
    reference.save_pretrained(tmp_path / "theirs")
    model = converted("diffusers-kl", tmp_path / "theirs", tmp_path / "ours")
    export(model, tmp_path / "back")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back")
    before, after = reference.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    public = [key for key in reference.config if not key.startswith("_")]
    assert {k: _plain(back.config[k]) for k in public} == {
        k: _plain(reference.config[k]) for k in public
    }
    again = converted("diffusers-kl", tmp_path / "back", tmp_path / "again")
    assert again.config == model.config and again.checksum == model.checksum


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


VQ = {
    "plain": {**blocks((32, 64)), "num_vq_embeddings": 40, "latent_channels": 5},
    "attention": {
        **blocks((16, 32), attention=(1,)),
        "norm_num_groups": 8,
        "layers_per_block": 2,
        "vq_embed_dim": 3,
        "num_vq_embeddings": 20,
        "mid_block_add_attention": False,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", VQ)
def test_vq_models_agree_with_diffusers(name: str, tmp_path: Path) -> None:
    reference = randomised(diffusers.VQModel(**VQ[name], sample_size=32))
    images = pictures()
    features = reference.encode(images).latents
    table = reference.quantize.embedding.weight
    some = features.permute(0, 2, 3, 1).flatten(0, 2)[: 7 * len(table) : 7]
    table.data = some + 0.1 * torch.randn(some.shape)
    reference.save_pretrained(tmp_path / "theirs")
    model = converted("diffusers-vq", tmp_path / "theirs", tmp_path / "ours")
    _, _, (_, _, codes) = reference.quantize(features)
    codes = codes.view(2, -1)
    assert codes.unique().numel() > 5
    assert torch.equal(model.encode(images), codes)
    close(model.decode(codes), reference.decode(features).sample)
    export(model, tmp_path / "back", "diffusers-vq")
    back = diffusers.VQModel.from_pretrained(tmp_path / "back")
    before, after = reference.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_older_names_of_attention_are_read(tmp_path: Path) -> None:
    reference = autoencoder("stable-diffusion")
    reference.save_pretrained(tmp_path / "new")
    reference.save_pretrained(tmp_path / "old")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def spelt(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        return name

    tensors = {spelt(n): t for n, t in load_file(tmp_path / "new" / WEIGHTS).items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    models = [read_published("diffusers-kl", tmp_path / name)[0] for name in ("old", "new")]
    assert models[0].checksum == models[1].checksum


def test_a_scaling_factor_can_be_given(tmp_path: Path) -> None:
    autoencoder("stable-diffusion").save_pretrained(tmp_path)
    model, _ = read_published("diffusers-kl", tmp_path, Options(scaling_factor=0.25))
    assert model.config.latent_std == (4.0,) * 4 and model.config.latent_mean == (0.0,) * 4
    model, lines = read_published("diffusers-kl", tmp_path)
    assert model.config.latent_std == (1 / 0.18215,) * 4
    assert model.image_size == 256 and any(
        "config.json has sample_size 32" in line for line in lines
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "describes a AutoencoderTiny"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; only 'silu'"),
        ({"scaling_factor": 0}, "scaling_factor is 0; expected a positive number"),
        ({"scaling_factor": "large"}, "expected a positive number"),
        ({"shift_factor": [1]}, r"shift_factor is \[1\]; expected a number"),
        ({"latents_mean": [1.0]}, "expected 4 numbers"),
        ({"norm_num_groups": 4.5}, "norm_num_groups is 4.5; expected a positive integer"),
        ({"norm_num_groups": 5}, "multiple of norm_groups 5"),
    ],
)
def test_unsupported_settings_are_refused(change: dict, message: str, tmp_path) -> None:
    autoencoder("stable-diffusion").save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        convert("diffusers-kl", tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def edited(folder: Path, change: dict) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))


def saved(source: str, folder: Path) -> None:
    model = (
        autoencoder("stable-diffusion")
        if source == "diffusers-kl"
        else randomised(diffusers.VQModel(**VQ["plain"]))
    )
    model.save_pretrained(folder)


SHARED_SIZES = {
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 3,
    "latent_channels": 8,
    "in_channels": 1,
    "out_channels": 4,
    "mid_block_add_attention": False,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}
SOURCE_SIZES = {
    "diffusers-kl": {**SHARED_SIZES, "use_quant_conv": False, "use_post_quant_conv": False},
    "diffusers-vq": {**SHARED_SIZES, "num_vq_embeddings": 64, "vq_embed_dim": 8},
}


@pytest.mark.parametrize("source", SOURCE_SIZES)
def test_sizes_other_than_those_of_the_tensors_are_refused(source: str, tmp_path: Path) -> None:
    saved(source, tmp_path / "theirs")
    before = (tmp_path / "theirs" / "config.json").read_text()
    for key, value in SOURCE_SIZES[source].items():
        (tmp_path / "theirs" / "config.json").write_text(before)
        edited(tmp_path / "theirs", {key: value})
        with pytest.raises(SmaltiError, match=rf"{key} is .*, but the tensors of {WEIGHTS} give"):
            convert(source, tmp_path / "theirs", tmp_path / "ours")
        edited(tmp_path / "theirs", {key: None})
        read_published(source, tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_a_truncated_or_missing_codebook_is_refused(tmp_path: Path) -> None:
    saved("diffusers-vq", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["quantize.embedding.weight"] = tensors["quantize.embedding.weight"][:30].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(SmaltiError, match=r"num_vq_embeddings is 40, but .* give 30"):
        read_published("diffusers-vq", tmp_path)
    del tensors["quantize.embedding.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(SmaltiError, match=r"lacks the tensor quantize\.embedding\.weight"):
        read_published("diffusers-vq", tmp_path)


SCALES = {  # lines by what config.json has and by options
    "both": (
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        None,
        ["scaling_factor: 1.5305, from config.json", "shift_factor: 0.0609, from config.json"],
    ),
    "null": (
        {"scaling_factor": 1.5305, "shift_factor": None},
        None,
        ["scaling_factor: 1.5305, from config.json", "shift_factor: 0.0 (not in the file)"],
    ),
    "lists": (
        {"scaling_factor": 0.5, "latents_mean": [1, 2, 3, 4.5], "latents_std": [1, 1, 2, 3]},
        None,
        [
            "scaling_factor: 0.5, from config.json",
            "latents_mean: 1, 2, 3, 4.5, from config.json",
            "latents_std: 1, 1, 2, 3, from config.json",
        ],
    ),
    "given": (
        {"scaling_factor": 0.5, "shift_factor": None},
        0.25,
        ["scaling_factor: 0.25, as given (not in the file)", "shift_factor: 0.0 (not in the file)"],
    ),
    "nothing": (
        {"scaling_factor": None, "shift_factor": None},
        None,
        ["scaling_factor: 0.18215 (not in the file)", "shift_factor: 0.0 (not in the file)"],
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_only_assumed_values_are_reported_as_assumed(case: str, tmp_path: Path) -> None:
    change, scaling, expected = SCALES[case]
    saved("diffusers-kl", tmp_path)
    edited(tmp_path, change)
    _, lines = read_published("diffusers-kl", tmp_path, Options(scaling_factor=scaling))
    words = ("scaling_factor", "shift_factor", "latents_")
    told = sorted(line.strip() for line in lines if line.strip().startswith(words))
    assert told == sorted(expected)


def test_a_kl_autoencoder_of_ours_becomes_a_diffusers_folder(tmp_path: Path) -> None:
    conv = ConvConfig(128, (1, 1), 1, attention_levels=(1,), z_channels=2)
    model = randomised(KLTokenizer(KLConfig(image_size=32, conv=conv, latent_std=(0.5, 3.0))))
    export(model, tmp_path / "theirs")
    reference = diffusers.AutoencoderKL.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        mean = reference.encode(pictures()).latent_dist.mean
        close(model.posterior(pictures())[0], mean)
    assert reference.config.latents_std == [0.5, 3.0]


def test_what_diffusers_cannot_build_is_not_exported(tmp_path: Path) -> None:
    conv = ConvConfig(32, (1, 2), 1, attention_levels=(), z_channels=2, patch_size=2)
    model = KLTokenizer(KLConfig(image_size=32, conv=conv))
    why = "conv.channels is 32 instead of 128, conv.patch_size is 2 instead of 1"
    with pytest.raises(ValueError, match=f"no published layout fits this tokenizer: .*{why}"):
        export(model, tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"is no Diffusers AutoencoderKL: {why}"):
        export(model, tmp_path / "theirs", "diffusers-kl")
    assert not (tmp_path / "theirs").exists()
