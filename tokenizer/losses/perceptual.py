"""LPIPS (Zhang et al., 1801.03924): a learned distance between pictures, the real one.

Features of an ImageNet network are normalised per position; squared differences are weighted by
learned heads and averaged. The AlexNet trunk and its v0.1 heads ship with smalti in half
precision; VGG16 is read from a file. A network with random weights is never used.
"""

import itertools
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from smalti.errors import SmaltiError

MIN_SIDE = 32  # pixels; below, the deepest features have no extent


@dataclass(frozen=True)
class Trunk:
    """Convolutions as (in, out, kernel, stride, padding), in order."""

    convolutions: tuple[tuple[int, int, int, int, int], ...]
    pools: dict[int, tuple[int, int]]  # max-pooling (kernel, stride) before a convolution
    taps: tuple[int, ...]  # convolutions after whose ReLU features are compared


_VGG_WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
TRUNKS = {
    "alex": Trunk(
        (
            (3, 64, 11, 4, 2),
            (64, 192, 5, 1, 2),
            (192, 384, 3, 1, 1),
            (384, 256, 3, 1, 1),
            (256, 256, 3, 1, 1),
        ),
        pools={1: (3, 2), 2: (3, 2)},
        taps=(0, 1, 2, 3, 4),
    ),
    "vgg": Trunk(
        tuple((i, o, 3, 1, 1) for i, o in itertools.pairwise(_VGG_WIDTHS)),
        pools={2: (2, 2), 4: (2, 2), 7: (2, 2), 10: (2, 2)},
        taps=(1, 3, 6, 9, 12),
    ),
}
# Where torchvision keeps the convolutions of its `features`, for `from_torchvision`.
_VGG_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


class LPIPS(nn.Module):
    """(images, reference), both (B, 3, H, W) in [-1, 1] -> distance (B,), 0 for equal pictures.

    Frozen, always in eval mode, always in fp32. Gradients flow to the pictures.
    """

    def __init__(self, network: Literal["alex", "vgg"]) -> None:
        super().__init__()
        self.trunk = TRUNKS[network]
        self.convs = nn.ModuleList(nn.Conv2d(*sizes) for sizes in self.trunk.convolutions)
        widths = [self.trunk.convolutions[tap][1] for tap in self.trunk.taps]
        self.lins = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in widths)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.shift: Tensor
        self.scale: Tensor
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def of(cls, network: Literal["alex", "vgg"], path: Path | None) -> Self:
        """LPIPS of a network with the weights of a file, or without one AlexNet's embedded or
        VGG16's downloaded ones.

        Raises:
            SmaltiError: the file is wrong, or nothing can be downloaded.
        """
        if path is not None:
            return cls.from_file(path, network)
        return cls.from_embedded() if network == "alex" else cls.from_torchvision()

    @classmethod
    def from_embedded(cls) -> Self:
        """LPIPS with the AlexNet trunk that ships with smalti."""
        with as_file(files("smalti.tokenizer") / "assets" / "lpips_alex.safetensors") as path:
            return cls.from_file(path, "alex")

    @classmethod
    def from_file(cls, path: str | Path, network: Literal["alex", "vgg"]) -> Self:
        """LPIPS from a safetensors file with keys convs.{i}.weight, convs.{i}.bias, lins.{i}; or,
        for VGG16, with torchvision's keys features.{i}.weight and .bias, to which the embedded
        heads are added.

        Raises:
            SmaltiError: no such file, a damaged one, or one of another network.
        """
        path = Path(path)
        if not path.is_file():
            raise SmaltiError(f"the LPIPS weights {path} do not exist: check the path")
        try:
            weights = {name: value.float() for name, value in load_file(path).items()}
        except SafetensorError as error:
            raise SmaltiError(f"the LPIPS weights {path} are damaged: {error}") from error
        if network == "vgg" and "features.0.weight" in weights:
            weights = _with_heads(
                {k.removeprefix("features."): v for k, v in weights.items() if "features." in k}
            )
        model = cls(network)
        try:
            model.load_state_dict({**weights, "shift": model.shift, "scale": model.scale})
        except RuntimeError as error:
            raise SmaltiError(f"{path} does not hold LPIPS weights for {network}") from error
        return model

    @classmethod
    def from_torchvision(cls) -> Self:
        """LPIPS with torchvision's VGG16, downloaded if need be, and the embedded v0.1 heads.

        Raises:
            SmaltiError: the trunk cannot be downloaded.
        """
        from torchvision.models import VGG16_Weights, vgg16

        try:
            trunk = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features.state_dict()
        except (OSError, RuntimeError) as error:  # no connection; a file cut short
            raise SmaltiError(
                f"torchvision's VGG16 weights cannot be downloaded ({error}): give a file of LPIPS "
                "weights, or use the embedded AlexNet trunk"
            ) from error
        model = cls("vgg")
        weights = _with_heads(trunk)
        model.load_state_dict({**weights, "shift": model.shift, "scale": model.scale})
        return model

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a distance has no training behaviour."""
        del mode
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> ReLU features (B, C, h, w) of every tap.

        Raises:
            SmaltiError: the images are smaller than the network can judge.
        """
        if min(images.shape[-2:]) < MIN_SIDE:
            raise SmaltiError(
                f"images are {images.shape[-2]} x {images.shape[-1]} pixels; LPIPS needs at least "
                f"{MIN_SIDE} x {MIN_SIDE}"
            )
        x = (images - self.shift) / self.scale
        taps = []
        for index, conv in enumerate(self.convs):
            if index in self.trunk.pools:
                x = F.max_pool2d(x, *self.trunk.pools[index])
            x = F.relu(conv(x))
            if index in self.trunk.taps:
                taps.append(x)
        return taps

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        if images.shape != reference.shape or images.ndim != 4 or images.shape[1] != 3:
            raise SmaltiError(
                f"images have shape {tuple(images.shape)}, the reference {tuple(reference.shape)}: "
                "give two equal shapes (B, 3, H, W)"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.distance(self.features(images.float()), self.features(reference.float()))

    def distance(self, features: list[Tensor], reference: list[Tensor]) -> Tensor:
        """The distance (B,) between pictures whose `features` are given, in fp32."""
        return sum(
            ((_unit(a) - _unit(b)).square() * weight).sum(1).mean((1, 2))
            for a, b, weight in zip(features, reference, self.lins, strict=True)
        )  # type: ignore[return-value]


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w) with length 1 at every position."""
    # The epsilon inside the root keeps the gradient finite where all features are 0.
    return features / (features.square().sum(1, keepdim=True) + 1e-20).sqrt().add(1e-10)


def _with_heads(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of LPIPS from torchvision's VGG16 convolutions and the embedded v0.1 heads."""
    with as_file(files("smalti.tokenizer") / "assets" / "lpips_vgg_heads.safetensors") as path:
        weights = load_file(path)
    for conv, layer in enumerate(_VGG_FEATURES):
        for part in ("weight", "bias"):
            name = f"{layer}.{part}"
            if name not in trunk:
                raise SmaltiError(
                    f"the VGG16 weights lack features.{name}: they are of another network"
                )
            weights[f"convs.{conv}.{part}"] = trunk[name]
    return weights
