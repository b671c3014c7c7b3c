"""A frozen vision transformer (Dosovitskiy et al., 2010.11929), read from the user's file.

Keys are those of DINO (2104.14294) and of timm, so `vit_small_patch16_224.dino` and its relatives
load as they are; with `ls1.gamma` and `ls2.gamma` in every block it is timm's DINOv2. All sizes
are inferred from the shapes, but the number of attention heads, which no shape tells.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from smalti.config import nearest
from smalti.errors import SmaltiError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1]


@dataclass(frozen=True)
class ViTSizes:
    """What the shapes of a file say."""

    width: int
    depth: int
    hidden: int  # of the MLPs
    patch_size: int
    grid: int  # patches per side that the position embedding was made for
    layer_scale: bool

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Self:
        """Sizes of the weights of a ViT; `KeyError` or `ValueError` if they are of no such."""
        width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
        blocks = {int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}
        positions = weights["pos_embed"].shape[1] - 1
        return cls(
            width=width,
            depth=max(blocks) + 1,
            hidden=weights["blocks.0.mlp.fc1.weight"].shape[0],
            patch_size=patch_size,
            grid=round(positions**0.5),
            layer_scale="blocks.0.ls1.gamma" in weights,
        )


class FrozenViT(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> features of some depths.

    Frozen and always in eval mode; gradients flow to the pictures.
    """

    def __init__(self, sizes: ViTSizes, num_heads: int) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.grid**2, width))
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size)}
        )
        self.blocks = nn.ModuleList(ViTBlock(sizes, num_heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.digest = 0  # of the file, 63 bits
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def from_file(cls, path: Path, num_heads: int, image_size: int) -> Self:
        """The ViT in a safetensors file, its position embedding resized for images of
        `image_size` px.

        Raises:
            SmaltiError: no such file, a damaged one, one that holds no ViT or another, a number of
                heads or an image size that does not divide.
        """
        weights = _read(path)
        try:
            sizes = ViTSizes.of(weights)
        except (KeyError, ValueError) as error:
            raise SmaltiError(
                f"{path} holds no vision transformer with the keys of DINO or timm ({error})"
            ) from error
        if num_heads < 1 or sizes.width % num_heads:
            raise SmaltiError(
                f"num_heads is {num_heads}, which does not divide the width {sizes.width} of {path}"
            )
        if image_size % sizes.patch_size:
            raise SmaltiError(
                f"the backbone's image_size is {image_size}, no multiple of the patch size "
                f"{sizes.patch_size} of {path}"
            )
        with torch.random.fork_rng(devices=[]):  # what is overwritten must cost no random numbers
            model = cls(sizes, num_heads)
        _check_same({k: v.shape for k, v in model.state_dict().items()}, weights, path)
        model.load_state_dict(weights)
        model.digest = int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:8], "big") >> 1
        model._resize_positions(image_size // sizes.patch_size)
        return model

    def _resize_positions(self, grid: int) -> None:
        """Interpolate the position embedding to grid x grid patches."""
        if grid == self.sizes.grid:
            return
        first, rest = self.pos_embed.data[:, :1], self.pos_embed.data[:, 1:]  # (1, 1 + N, D)
        maps = rest.mT.unflatten(2, (self.sizes.grid, self.sizes.grid))
        maps = F.interpolate(maps, (grid, grid), mode="bicubic", align_corners=False)
        resized = torch.cat([first, maps.flatten(2).mT], dim=1)
        self.pos_embed = nn.Parameter(resized, requires_grad=False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        del mode
        return super().train(False)

    def features(self, images: Tensor, depths: tuple[int, ...]) -> list[Tensor]:
        """Normalised features (B, D, h, w) of the patches after each of the blocks `depths`."""
        mean = images.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
        std = images.new_tensor(IMAGENET_STD).view(3, 1, 1)
        patches = self.patch_embed["proj"]((images / 2 + 0.5 - mean) / std)  # (B, D, h, w)
        tokens = patches.flatten(2).mT  # (B, N, D)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.pos_embed
        found = []
        for index, block in enumerate(self.blocks[: max(depths) + 1]):
            tokens = block(tokens)
            if index in depths:
                found.append(self.norm(tokens)[:, 1:].mT.unflatten(2, patches.shape[2:]))
        return found


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, sizes: ViTSizes, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.attn = ViTAttention(sizes.width, num_heads)
        self.ls1 = LayerScale(sizes.width) if sizes.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(sizes.width, sizes.hidden),
                "fc2": nn.Linear(sizes.hidden, sizes.width),
            }
        )
        self.ls2 = LayerScale(sizes.width) if sizes.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class ViTAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: the fused kernels have no second derivative, which penalties need.
        weights = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1)  # (B, heads, N, N)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SmaltiError(
            f"the backbone {path} does not exist: give a safetensors file with the weights of a "
            "vision transformer as discriminator.backbone"
        )
    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise SmaltiError(
            f"the backbone {path} is damaged or no safetensors file: {error}"
        ) from error


def _check_same(
    expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse any difference in names and shapes."""
    for name in sorted(expected.keys() - found):
        raise SmaltiError(f"{path} lacks the tensor {name}")
    for name in sorted(found.keys() - expected):
        hint = nearest(name, expected)
        raise SmaltiError(f"{path} has a tensor {name} that the backbone does not know; {hint}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise SmaltiError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, not {tuple(shape)}"
            )
