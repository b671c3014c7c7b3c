"""Tiny frozen backbones with random weights, in the files that a user would give."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CONFIGS = {
    "dinov2": Dinov2Config(**SIZES, mlp_ratio=2),
    "registers": Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3),
    "clip": CLIPVisionConfig(**SIZES, intermediate_size=32),
    "siglip": SiglipVisionConfig(**SIZES, intermediate_size=32),
}


def write_folder(folder: Path, kind: str) -> Path:
    """A folder of the package transformers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModel.from_config(CONFIGS[kind])
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def write_file(
    path: Path, *, depth: int = 3, patch_size: int = 4, layer_scale: bool = False, **changes
) -> Path:
    """A safetensors file with the keys of timm: width 16, 4 x 4 patches.

    A change of None leaves a tensor out.
    """
    width, hidden = 16, 32
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for part in (1, 2):
            shapes[f"blocks.{i}.norm{part}.weight"] = (width,)
            shapes[f"blocks.{i}.norm{part}.bias"] = (width,)
            if layer_scale:
                shapes[f"blocks.{i}.ls{part}.gamma"] = (width,)
    generator = torch.Generator().manual_seed(7)
    weights: dict[str, Tensor | None] = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        for name, shape in shapes.items()
    }
    weights |= changes
    save_file({k: v for k, v in weights.items() if v is not None}, path)
    return path
