"""LPIPS (Zhang et al., 1801.03924): a learned perceptual distance between images.

    d(x, y) = sum_l mean_hw sum_c w_lc (f_l(x) - f_l(y))^2,   f_l(x) = features / |features|

The networks and the v0.1 heads w are those of the package `lpips`. Its trunks would be downloaded
as pickles, so AlexNet's ships with smalti (in half precision, heads included) and VGG16's is read
from a safetensors file or taken from torchvision. A network with random weights is never used.
"""

import warnings
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from smalti.data.latents import MODES, rgb_views
from smalti.errors import CheckpointError, DataError

MIN_SIDE = 32  # pixels; in smaller images the deepest feature maps are empty


class LPIPS(nn.Module):
    """(images, reference), both (B, C, H, W) in [-1, 1] -> distance (B,), 0 for equal images.

    The network sees RGB: grey is repeated; for images with alpha the distance is the mean over a
    black and a white background, see `rgb_views`. Frozen, always in eval mode, always
    in fp32. Gradients flow to the images.
    """

    def __init__(self, network: Literal["alex", "vgg"], weights: dict[str, Tensor]) -> None:
        """Load `weights` into a network.

        Args:
            weights: convs.{i}.weight, convs.{i}.bias and lins.{i}; without the latter, the heads of
                the package are used.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: a tensor has another shape, or there are others.
        """
        super().__init__()
        import lpips  # imported here, because it imports scipy

        with warnings.catch_warnings(), torch.device("meta"):  # no memory, no random numbers
            warnings.simplefilter("ignore")  # torchvision's, on how lpips calls it
            self.model = lpips.LPIPS(net=network, pretrained=False, pnet_rand=True, verbose=False)
        for module in self.model.net.modules():
            if isinstance(module, nn.ReLU):
                # In place, it would keep the strides of the convolution, which are unusual for maps
                # of one position in channels-last; sums over them would round in another order.
                module.inplace = False
        convolutions = [
            (name, module)
            for name, module in self.model.net.named_modules()
            if isinstance(module, nn.Conv2d)
        ]
        state = {f"scaling_layer.{k}": v for k, v in self.model.scaling_layer.state_dict().items()}
        rest = dict(weights)
        for i, (name, _) in enumerate(convolutions):
            for part in ("weight", "bias"):
                state[f"net.{name}.{part}"] = rest.pop(f"convs.{i}.{part}").float()
        heads = _package_heads(network) if "lins.0" not in rest else rest
        for i in range(self.model.L):
            head = heads.pop(f"lins.{i}").float()
            # The package registers every head under two names.
            state |= {f"lin{i}.model.1.weight": head, f"lins.{i}.model.1.weight": head}
        if rest:
            raise RuntimeError(f"unknown tensors: {', '.join(sorted(rest))}")
        self.model.load_state_dict(state, assign=True)
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def of(cls, network: Literal["alex", "vgg"], path: Path | None) -> Self:
        """LPIPS with the weights of a file; without one, AlexNet is embedded and VGG16 downloaded.

        Raises:
            CheckpointError: the file is wrong, or nothing can be downloaded.
        """
        if path is not None:
            return cls.from_file(path, network)
        return cls.from_embedded() if network == "alex" else cls.from_torchvision()

    @classmethod
    def from_embedded(cls) -> Self:
        """LPIPS with the AlexNet that ships with smalti."""
        with as_file(files("smalti.tokenizer") / "assets" / "lpips_alex.safetensors") as path:
            return cls.from_file(path, "alex")

    @classmethod
    def from_file(cls, path: str | Path, network: Literal["alex", "vgg"]) -> Self:
        """LPIPS from a safetensors file.

        Its keys are convs.{i}.weight, convs.{i}.bias and lins.{i}, or torchvision's
        features.{i}.weight and features.{i}.bias. Without lins.{i} the heads are the package's.

        Raises:
            CheckpointError: no such file, a damaged one, or one of another network.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"the LPIPS weights {path} do not exist: check the path")
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"the LPIPS weights {path} are damaged: {error}") from error
        if "features.0.weight" in weights:
            weights = _numbered(weights)
        try:
            return cls(network, weights)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} does not hold LPIPS weights for {network} ({error}): give its trunk and"
                " heads, or torchvision's weights of the trunk"
            ) from error

    @classmethod
    def from_torchvision(cls) -> Self:
        """LPIPS with torchvision's VGG16, downloaded if necessary, and the package's heads.

        Raises:
            CheckpointError: the trunk cannot be downloaded.
        """
        from torchvision.models import VGG16_Weights, vgg16

        try:
            trunk = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features.state_dict()
        except (OSError, RuntimeError) as error:  # no connection; a file cut short
            raise CheckpointError(
                f"torchvision's VGG16 weights cannot be downloaded ({error}): give a file of LPIPS "
                "weights, or use the embedded AlexNet"
            ) from error
        return cls("vgg", _numbered({f"features.{k}": v for k, v in trunk.items()}))

    def train(self, mode: bool = True) -> Self:
        """Keep eval mode, whatever `mode` is."""
        del mode
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> ReLU features (B, C, h, w) of the five compared layers.

        Raises:
            DataError: the images are too small for the network.
        """
        if min(images.shape[-2:]) < MIN_SIDE:
            raise DataError(
                f"images are {images.shape[-2]} x {images.shape[-1]} pixels; LPIPS needs at least "
                f"{MIN_SIDE} x {MIN_SIDE}"
            )
        return list(self.model.net(self.model.scaling_layer(images)))

    def distance(self, features: list[Tensor], reference: list[Tensor]) -> Tensor:
        """The distance (B,) between images whose `features` are given, in fp32.

        Not the package's `forward`, which computes the features again, and whose gradient is not
        finite at positions where all features are 0.
        """
        weights: list[Any] = [head.model[1].weight for head in self.model.lins]  # type: ignore[index]
        return sum(
            ((_unit(a) - _unit(b)).square() * weight).sum(1).mean((1, 2))
            for a, b, weight in zip(features, reference, weights, strict=True)
        )  # type: ignore[return-value]

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        if images.shape != reference.shape or images.ndim != 4 or images.shape[1] not in MODES:
            raise DataError(
                f"images have shape {tuple(images.shape)}, the reference {tuple(reference.shape)}: "
                "give two equal shapes (B, 3, H, W), or with 1 or 4 channels"
            )
        with torch.autocast(images.device.type, enabled=False):
            views = (rgb_views(x.float()) for x in (images, reference))
            distances = self.distance(*(self.features(view) for view in views))
        return distances.view(-1, len(images)).mean(0) if images.shape[1] == 4 else distances


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w) with length 1 at every position."""
    # The epsilon inside the root keeps the gradient finite where all features are 0.
    return features / (features.square().sum(1, keepdim=True) + 1e-20).sqrt().add(1e-10)


def _package_heads(network: str) -> dict[str, Tensor]:
    """The v0.1 heads in the package `lpips`, as lins.{i}."""
    import lpips

    path = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{network}.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
    return {f"lins.{i}": heads[f"lin{i}.model.1.weight"] for i in range(len(heads))}


def _numbered(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's features.{layer}.weight and .bias as convs.{i}.weight and .bias."""
    layers = sorted({int(key.split(".")[1]) for key in weights if key.startswith("features.")})
    numbered = {}
    for i, layer in enumerate(layers):
        for part in ("weight", "bias"):
            name = f"features.{layer}.{part}"
            if name not in weights:
                raise CheckpointError(
                    f"the weights of the trunk lack {name}: they are of another network"
                )
            numbered[f"convs.{i}.{part}"] = weights[name]
    return numbered
