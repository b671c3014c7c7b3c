"""Frozen vision transformers whose features compare images: DINOv2, CLIP, SigLIP.

The models are those of the package `transformers`, loaded from a folder that `save_pretrained`
wrote, from a Hub id, or from one safetensors file with the keys of DINO (2104.14294) or timm, as
`vit_small_patch16_224.dino`. Only safetensors and JSON are read, no remote code runs, and a local
path never uses the network.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from smalti.config import nearest
from smalti.errors import CheckpointError, ConfigurationError
from smalti.pretrained import import_transformers, load_model, load_part, loading_errors
from smalti.weights import hash_weights

# Mean and standard deviation of the pixels, in [0, 1], that each kind of model was trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PIXEL_STATISTICS = {  # by `model_type` in config.json
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": HALF,
    "siglip_vision_model": HALF,
}


class FrozenBackbone(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> features (B, D, h, w) of the patches after some blocks.

    Frozen and always in eval mode; gradients flow to the images.
    """

    def __init__(self, model: nn.Module, kind: str, depths: Sequence[int]) -> None:
        super().__init__()
        self.model: Any = model
        self.depths = tuple(depths)
        self.width: int = self.model.config.hidden_size  # D
        self.patch_size: int = self.model.config.patch_size
        # DINOv2 always interpolates its position embedding, the others only with this option.
        self.options = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in PIXEL_STATISTICS[kind])
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.digest = int(hash_weights(sorted(model.state_dict().items()))[:16], 16) >> 1  # 63 bits
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def load(
        cls, source: str | Path, depths: Sequence[int], image_size: int, num_heads: int = 1
    ) -> Self:
        """The backbone in a folder, at a Hub id, or in a single file.

        Args:
            depths: blocks, counted from 0, whose features are taken; later blocks are dropped.
            image_size: side of its input images, in pixels.
            num_heads: attention heads, for a single file only; a folder has them in its config.

        Raises:
            SmaltiError: `transformers` is missing; there is no such model, it is damaged, of
                another kind, or lacks a tensor; heads, depths or image size do not fit it.
        """
        path = Path(source)
        with torch.random.fork_rng(devices=[]):  # leave the global generator unchanged
            if path.is_file() or path.suffix == ".safetensors":
                model, kind = _from_file(path, num_heads), "dinov2"
            else:
                model, kind = _from_pretrained(source)
        name, blocks = next(
            (name, child)
            for name, child in model.encoder.named_children()
            if isinstance(child, nn.ModuleList)
        )
        if max(depths) >= len(blocks):
            raise ConfigurationError(
                f"block {max(depths)} is requested, but {source} has blocks 0 to {len(blocks) - 1}"
            )
        backbone = cls(model, kind, depths)
        if path.is_file():  # checkpoints of smalti 0.1 contain the digest of the file
            digest = hashlib.sha256(path.read_bytes()).digest()
            backbone.digest = int.from_bytes(digest[:8], "big") >> 1
        if image_size % backbone.patch_size:
            raise ConfigurationError(
                f"the backbone's image_size is {image_size}, not a multiple of the patch size "
                f"{backbone.patch_size} of {source}"
            )
        setattr(model.encoder, name, blocks[: max(depths) + 1])
        return backbone

    @property
    def norm(self) -> nn.Module:
        """The model's final layer norm."""
        dino = hasattr(self.model, "layernorm")
        return self.model.layernorm if dino else self.model.post_layernorm

    def train(self, mode: bool = True) -> Self:
        """Keep eval mode, whatever `mode` is."""
        del mode
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised features (B, D, h, w) of the patches, for each of `depths`."""
        pixels = (images / 2 + 0.5 - self.mean) / self.std
        output = self.model(pixel_values=pixels, output_hidden_states=True, **self.options)
        h, w = (side // self.patch_size for side in images.shape[2:])
        # hidden_states[0] is the embedding; class and register tokens precede the patches.
        patches = [output.hidden_states[depth + 1][:, -h * w :] for depth in self.depths]
        # As DINOv2 does, the final norm is applied to the features of every block.
        return [rearrange(self.norm(rows), "b (h w) d -> b d h w", h=h) for rows in patches]


# -------------------------------------------------------------------------------------------------
# Loading


def _transformers() -> Any:
    return import_transformers("a vision backbone")


def _from_pretrained(source: str | Path) -> tuple[Any, str]:
    """The vision model of a folder or a Hub id, and its `model_type`."""
    transformers = _transformers()
    remedy = "give a folder with config.json and model.safetensors, a Hub id, or a safetensors file"
    with loading_errors("the backbone", source, remedy):
        kind = load_part(transformers.AutoConfig, source).model_type
        if kind not in PIXEL_STATISTICS:
            raise ConfigurationError(
                f"{source} is a {kind}; a backbone is one of {', '.join(PIXEL_STATISTICS)}"
            )
        # The fused attention kernels have no second derivative, which gradient penalties need.
        model = load_model(transformers.AutoModel, source, attn_implementation="eager")
    return getattr(model, "vision_model", model), kind  # of CLIP and SigLIP with a text model


def _from_file(path: Path, num_heads: int) -> Any:
    """A ViT in one safetensors file with the keys of DINO or timm, as a `Dinov2Model`.

    All sizes but the number of heads are inferred from the shapes of the tensors. A ViT without
    layer scale is a DINOv2 whose factors are 1.
    """
    weights = _read(path)
    try:
        width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
        hidden = len(weights["blocks.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no vision transformer with the keys of DINO or timm ({error}): give a "
            "folder that the package transformers can load"
        ) from error
    if num_heads < 1 or width % num_heads:
        raise ConfigurationError(
            f"num_heads is {num_heads}, which does not divide the width {width} of {path}"
        )
    if hidden % width:
        raise CheckpointError(
            f"the MLPs of {path} are {hidden} wide, not a multiple of {width}: give a folder that "
            "the package transformers can load"
        )
    scaled = "blocks.0.ls1.gamma" in weights
    table = _key_table(width, hidden, patch_size, grid, depth, scaled)
    _check_same(table, weights, path)
    state = {"embeddings.mask_token": torch.zeros(1, width)}  # never used
    for old, (new, _) in table.items():
        names = [new.format(part) for part in ("query", "key", "value")] if "{" in new else [new]
        state |= dict(zip(names, weights[old].chunk(len(names)), strict=True))
    if not scaled:
        for i in range(depth):
            for part in (1, 2):
                state[f"encoder.layer.{i}.layer_scale{part}.lambda1"] = torch.ones(width)
    config = _transformers().Dinov2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        mlp_ratio=hidden // width,
        image_size=grid * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
    config._attn_implementation = "eager"  # see `_from_pretrained`
    # Through `from_pretrained`, which reads the published key names whatever the module names are.
    return _transformers().Dinov2Model.from_pretrained(None, config=config, state_dict=state)


def _key_table(
    width: int, hidden: int, patch_size: int, grid: int, depth: int, scaled: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key in the file -> published key of DINOv2 in transformers, and shape."""
    projection = "embeddings.patch_embeddings.projection"
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "cls_token": ("embeddings.cls_token", (1, 1, width)),
        "pos_embed": ("embeddings.position_embeddings", (1, 1 + grid**2, width)),
        "patch_embed.proj.weight": (f"{projection}.weight", (width, 3, patch_size, patch_size)),
        "patch_embed.proj.bias": (f"{projection}.bias", (width,)),
        "norm.weight": ("layernorm.weight", (width,)),
        "norm.bias": ("layernorm.bias", (width,)),
    }
    linear = {
        "attn.qkv": ("attention.attention.{}", 3 * width, width),  # query, key and value in one
        "attn.proj": ("attention.output.dense", width, width),
        "mlp.fc1": ("mlp.fc1", hidden, width),
        "mlp.fc2": ("mlp.fc2", width, hidden),
    }
    for i in range(depth):
        old, new = f"blocks.{i}", f"encoder.layer.{i}"
        for key, (name, rows, columns) in linear.items():
            table[f"{old}.{key}.weight"] = (f"{new}.{name}.weight", (rows, columns))
            table[f"{old}.{key}.bias"] = (f"{new}.{name}.bias", (rows,))
        for part in (1, 2):
            for kind in ("weight", "bias"):
                table[f"{old}.norm{part}.{kind}"] = (f"{new}.norm{part}.{kind}", (width,))
            if scaled:
                table[f"{old}.ls{part}.gamma"] = (f"{new}.layer_scale{part}.lambda1", (width,))
    return table


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"the backbone {path} does not exist: give a folder of the package transformers, a Hub "
            "id, or a safetensors file with the weights of a vision transformer"
        )
    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise CheckpointError(
            f"the backbone {path} is damaged or not a safetensors file: {error}"
        ) from error


def _check_same(
    table: dict[str, tuple[str, tuple[int, ...]]], found: dict[str, Tensor], path: Path
) -> None:
    """Refuse any difference in names and shapes."""
    for name in sorted(table.keys() - found):
        raise CheckpointError(f"{path} lacks the tensor {name}")
    for name in sorted(found.keys() - table):
        hint = nearest(name, table)
        raise CheckpointError(f"{path} has a tensor {name} that the backbone does not have; {hint}")
    for name, (_, shape) in table.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, not {shape}"
            )
