"""Tiny frozen backbones and text encoders with random weights, in the files that a user would
give."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


# -------------------------------------------------------------------------------------------------
# Text encoders


def _t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    letters = [(letter, -4.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    words = [(f"\u2581{word}", -3.0) for word in ("red", "apple", "a", "the")]
    return T5Tokenizer(vocab=[*special, *letters, *words], extra_ids=0)


def _clip_tokenizer() -> CLIPTokenizer:
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def write_text_encoder(folder: Path, kind: str, seed: int = 7) -> Path:
    """A folder of the package transformers: a "t5", "byt5" or "clip" text encoder of width 16 with
    its tokenizer. That of "clip" takes at most 12 tokens."""
    makers = {"t5": _t5_tokenizer, "byt5": ByT5Tokenizer, "clip": _clip_tokenizer}
    tokenizer = makers[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "clip":
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
            config = CLIPTextConfig(
                **sizes,
                num_attention_heads=2,
                vocab_size=len(tokenizer),
                max_position_embeddings=12,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            model = CLIPTextModel(config)
        else:
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            model = T5EncoderModel(T5Config(**sizes, vocab_size=len(tokenizer)))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------
# The Inception network of FID


def write_inception(path: Path) -> Path:
    """A weight file in torch-fidelity's format, with random weights that keep the scale."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    module = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module, lambda *args, **options: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = FeatureExtractorInceptionV3("random", ["2048"])
        for part in network.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path
