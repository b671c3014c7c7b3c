"""Frozen backbones against transformers and torchvision, and what is refused."""

from pathlib import Path

import pytest
import torch
from backbones import CONFIGS, write_file, write_folder
from safetensors.torch import load_file, save_file
from torchvision.models.vision_transformer import VisionTransformer
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPTextConfig, ViTConfig, ViTModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from smalti.errors import SmaltiError
from smalti.tokenizer.backbone import FrozenBackbone

STATISTICS = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "registers": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def normalised(images: torch.Tensor, kind: str) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS[kind])
    return ((images + 1) / 2 - mean) / std


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_file(tmp_path / "vit.safetensors")


# -- folders of transformers --------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 24])  # 24: positions are interpolated
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_oracle_features_are_the_hidden_states_of_transformers(
    kind: str, side: int, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, kind)
    images = torch.rand(2, 3, side, side) * 2 - 1
    found = FrozenBackbone.load(folder, (0, 2), side)(images)
    model = AutoModel.from_pretrained(folder).eval()
    options = {} if kind in ("dinov2", "registers") else {"interpolate_pos_encoding": True}
    out = model(pixel_values=normalised(images, kind), output_hidden_states=True, **options)
    norm = model.layernorm if hasattr(model, "layernorm") else model.post_layernorm
    skipped = {"dinov2": 1, "registers": 4, "clip": 1, "siglip": 0}[kind]
    for features, depth in zip(found, (0, 2), strict=True):
        hidden = norm(out.hidden_states[depth + 1])[:, skipped:]  # (B, N, D)
        expected = hidden.mT.unflatten(2, (side // 4, side // 4))
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    if kind != "clip":  # whose last_hidden_state has no norm
        last = out.last_hidden_state[:, skipped:].mT.unflatten(2, (side // 4, side // 4))
        torch.testing.assert_close(found[1], last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_is_frozen_and_lets_second_derivatives_through(kind: str, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    backbone = FrozenBackbone.load(write_folder(tmp_path, kind), (1,), 16).train()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    (features,) = backbone(images)
    (gradient,) = torch.autograd.grad(features.square().sum(), images, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), images)
    assert gradient.any() and second.isfinite().all() and second.any()
    assert len(backbone.model.encoder.state_dict()) < 0.7 * len(
        AutoModel.from_pretrained(tmp_path).encoder.state_dict()
    )  # the third block is dropped


@torch.no_grad()
def test_the_vision_tower_of_a_whole_clip_is_taken(tmp_path: Path) -> None:
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    whole = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=CONFIGS["clip"].to_dict())
    )
    whole.save_pretrained(tmp_path / "whole")
    whole.vision_model.save_pretrained(tmp_path / "vision")
    images = torch.rand(2, 3, 16, 16)
    one, other = (FrozenBackbone.load(tmp_path / n, (1,), 16) for n in ("whole", "vision"))
    assert torch.equal(one(images)[0], other(images)[0]) and one.digest == other.digest


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "dinov2", "dinov2")
    with pytest.raises(SmaltiError, match=r"block 3 is requested, but .* has blocks 0 to 2"):
        FrozenBackbone.load(folder, (3,), 16)
    with pytest.raises(SmaltiError, match="image_size is 18, not a multiple of the patch size 4"):
        FrozenBackbone.load(folder, (0,), 18)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.norm1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SmaltiError, match=r"lacks the tensor encoder\.layer\.1\.norm1\.weight"):
        FrozenBackbone.load(folder, (0,), 16)
    weights["encoder.layer.1.norm1.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SmaltiError, match="cannot be loaded"):
        FrozenBackbone.load(folder, (0,), 16)
    (folder / "model.safetensors").rename(folder / "gone")
    torch.save(weights, folder / "pytorch_model.bin")  # a pickle is never read
    with pytest.raises(SmaltiError, match="cannot be loaded"):
        FrozenBackbone.load(folder, (0,), 16)


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, intermediate_size=16, image_size=16, patch_size=4)).save_pretrained(
        tmp_path
    )
    with pytest.raises(SmaltiError, match="is a vit; a backbone is one of dinov2"):
        FrozenBackbone.load(tmp_path, (0,), 16)


def test_a_hub_id_that_cannot_be_reached_is_explained(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SmaltiError, match="nobody/nothing does not exist here and cannot be"):
        FrozenBackbone.load(Path("nobody/nothing"), (0,), 16)


def test_a_missing_package_is_named(monkeypatch, file: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(SmaltiError, match=r"pip install 'smalti\[vision\]'"):
        FrozenBackbone.load(file, (0,), 16)


# -- a single file with the keys of DINO or timm ------------------------------------------------


def torchvision_vit(weights: dict[str, torch.Tensor]) -> VisionTransformer:
    """torchvision's ViT with the same weights under its own names."""
    model = VisionTransformer(16, 4, 3, 2, 16, 32).eval()
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


def test_oracle_a_single_file_is_a_vision_transformer(file: Path) -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    (found,) = FrozenBackbone.load(file, (2,), 16, num_heads=2)(images)
    theirs = torchvision_vit(load_file(file))
    with torch.no_grad():
        patches = theirs._process_input(normalised(images, "dinov2"))
        tokens = torch.cat([theirs.class_token.expand(3, -1, -1), patches], 1)
        expected = theirs.encoder(tokens)[:, 1:].mT.unflatten(2, (4, 4))  # (B, D, h, w)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_number_of_attention_heads_matters(file: Path) -> None:
    images = torch.rand(2, 3, 16, 16)
    one, two = (FrozenBackbone.load(file, (2,), 16, heads)(images) for heads in (1, 2))
    assert not torch.allclose(one[0], two[0])


def test_layer_scale_is_read_from_the_file(tmp_path: Path) -> None:
    file = write_file(tmp_path / "dinov2.safetensors", layer_scale=True)
    images = torch.rand(1, 3, 16, 16)
    before = FrozenBackbone.load(file, (0,), 16, 2)(images)
    gamma = {"blocks.0.ls1.gamma": torch.zeros(16)}
    write_file(file, layer_scale=True, **gamma)
    assert not torch.allclose(before[0], FrozenBackbone.load(file, (0,), 16, 2)(images)[0])


def test_loading_uses_no_random_numbers(file: Path) -> None:
    before = torch.random.get_rng_state()
    FrozenBackbone.load(file, (2,), 16, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"cls_token": None}, {}, "lacks the tensor cls_token"),
        ({"head.weight": torch.ones(2)}, {}, "has a tensor head.weight that the backbone"),
        ({"norm.bias": torch.ones(3)}, {}, r"norm.bias has shape \(3,\), not \(16,\)"),
        ({"patch_embed.proj.weight": None}, {}, "holds no vision transformer"),
        ({"pos_embed": torch.ones(1, 12, 16)}, {}, "pos_embed has shape"),
        ({"blocks.0.mlp.fc1.weight": torch.ones(40, 16)}, {}, "40 wide, not a multiple of 16"),
        ({}, {"num_heads": 3}, "num_heads is 3, which does not divide the width 16"),
        ({}, {"image_size": 18}, "image_size is 18, not a multiple of the patch size 4"),
        ({}, {"depths": (0, 3)}, "block 3 is requested"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, changes, options, message: str) -> None:
    file = write_file(tmp_path / "vit.safetensors", **changes)
    given = {"depths": (0, 2), "image_size": 16, "num_heads": 2} | options
    with pytest.raises(SmaltiError, match=message):
        FrozenBackbone.load(file, **given)


def test_a_missing_or_damaged_backbone_is_never_replaced_by_a_random_one(tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match=r"nowhere.safetensors does not exist: give a"):
        FrozenBackbone.load(tmp_path / "nowhere.safetensors", (0,), 16)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(SmaltiError, match="damaged"):
        FrozenBackbone.load(tmp_path / "cut.safetensors", (0,), 16)
