"""The metrics of reconstructions, codes and samples, each with the protocol that produced it.

In order: the record of a metric, then metrics of reconstructions, of the codebook, and of samples.
Every function returns metrics by name; images are rounded to 8 bits before any of them.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.data.latents import rounded
from smalti.evaluation.classifier import ImageClassifier
from smalti.evaluation.distances import frechet_distance, kernel_distance
from smalti.evaluation.features import FeatureExtractor, extract, random_split, weights_sha256
from smalti.evaluation.pictures import Images, StoredImages, as_stored
from smalti.evaluation.reconstruction import perplexity, psnr, ssim, usage
from smalti.files import Info, read_hashed_json, write_hashed_json
from smalti.tokenizer.losses.perceptual import LPIPS

CHUNK = 128  # images per forward pass
VERSIONED = ("smalti", "torch", "torchvision", "torchmetrics")  # packages that affect the values

# -------------------------------------------------------------------------------------------------
# A value and its protocol


@dataclass(frozen=True)
class Metric:
    """A measured value with everything needed to measure it again."""

    value: float
    protocol: dict[str, Any] = field(default_factory=dict)


SETTINGS = "evaluation.json"  # beside a summary


def write_summary(path: Path, metrics: dict[str, Metric], **context: Any) -> None:
    """Write {"metrics": {name: {"value", "protocol"}}, "versions", ...context} as JSON, with its
    hash."""
    content = {name: asdict(metric) for name, metric in sorted(metrics.items())}
    versions = {package: version(package) for package in VERSIONED}
    write_hashed_json(path, {**context, "versions": versions, "metrics": content})


def of_summary(path: Path) -> Info:
    """What `smalti info` prints of a summary: every value, and whether it and the settings of its
    evaluation have their hashes."""
    try:
        if path.with_name(SETTINGS).is_file():
            read_hashed_json(path.with_name(SETTINGS))
        metrics = read_hashed_json(path)["metrics"]
        values = [(name, f"{metric['value']:.6g}") for name, metric in metrics.items()]
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # also SmaltiError
        return Info([("kind", "evaluation"), ("verified", f"no: {error}")], whole=False)
    return Info(
        [
            ("kind", "evaluation"),
            *values,
            ("verified", "yes: summary and settings have their hashes"),
        ]
    )


# -------------------------------------------------------------------------------------------------
# Reconstructions: PSNR, SSIM and LPIPS

BEST_PSNR = 100.0  # dB; replaces the infinity of an exact copy, which would make the mean infinite
SSIM_PROTOCOL = {
    "library": "torchmetrics",
    "window": "Gaussian, 11 px, sigma 1.5",
    "data_range": 255,
    "positions": "where the window fits inside",
    "arithmetic": "float64",
}


def reconstruction_metrics(
    images: Tensor, reference: Tensor, lpips: LPIPS, protocol: dict[str, Any]
) -> dict[str, Metric]:
    """PSNR, SSIM and LPIPS of reconstructions (N, C, H, W) in [-1, 1], means over images."""
    pairs = zip(images.split(CHUNK), reference.split(CHUNK), strict=True)
    return streamed_reconstruction_metrics(pairs, lpips, protocol)


def streamed_reconstruction_metrics(
    pairs: Iterable[tuple[Tensor, Tensor]], lpips: LPIPS, protocol: dict[str, Any]
) -> dict[str, Metric]:
    """`reconstruction_metrics` of pairs: some reconstructions, and their originals."""
    device = next(lpips.parameters()).device
    psnrs, ssims, distances = [], [], []
    for output, original in pairs:
        a, b = rounded(output), rounded(original)
        psnrs.append(psnr(a, b).clamp(max=BEST_PSNR))
        ssims.append(ssim(a, b))
        with torch.no_grad():
            distances.append(lpips(a.to(device), b.to(device)).cpu())
    count = sum(map(len, psnrs))
    base = {**protocol, "pictures": count, "rounding": "uint8", "mean": "over pictures"}
    psnr_protocol = {
        "library": "torchmetrics",
        "unit": "dB",
        "data_range": 255,
        "exact_copy_counts_as": BEST_PSNR,
    }
    trunk = {"trunk": "alex", "version": "0.1", "weights_sha256": weights_sha256(lpips)}
    return {
        "psnr": Metric(torch.cat(psnrs).mean().item(), {**base, **psnr_protocol}),
        "ssim": Metric(torch.cat(ssims).mean().item(), {**base, **SSIM_PROTOCOL}),
        "lpips": Metric(torch.cat(distances).mean().item(), {**base, **trunk}),
    }


# -------------------------------------------------------------------------------------------------
# Codes: bits per pixel, usage and perplexity


def codebook_metrics(
    counts: Tensor, codes_per_image: int, pixels: int, protocol: dict[str, Any]
) -> dict[str, Metric]:
    """Usage and perplexity of code counts (V,) over a complete set, and bits per pixel: the size of
    the codes of an image without further compression, L log2(V) / (H W)."""
    base = {**protocol, "codes": int(counts.sum()), "vocab_size": len(counts)}
    bits = codes_per_image * math.log2(len(counts)) / pixels
    return {
        "bits_per_pixel": Metric(bits, {**base, "codes_per_picture": codes_per_image}),
        "codebook_usage": Metric(usage(counts), base),
        "codebook_perplexity": Metric(perplexity(counts), base),
    }


# -------------------------------------------------------------------------------------------------
# Samples: Frechet distance, KID, and the accuracy of a classifier

KID_SUBSETS, KID_SUBSET_SIZE = 50, 256


@dataclass(frozen=True)
class ImageSets:
    """Samples and the real images that they are compared with: (N, C, H, W) in [-1, 1]; tensors
    are rounded to 8 bits."""

    samples: Images
    sample_labels: Tensor  # (N,), the classes that were requested
    heldout: Images
    heldout_labels: Tensor
    train: Images

    def stored(self) -> tuple[StoredImages, StoredImages, StoredImages]:
        """Samples, held-out images and training images with 8 bits per value."""
        return as_stored(self.samples), as_stored(self.heldout), as_stored(self.train)


def distance_metrics(
    sets: ImageSets,
    extractor: FeatureExtractor,
    protocol: dict[str, Any],
    seed: Callable[[str], torch.Generator],
) -> dict[str, Metric]:
    """Frechet distance and KID between samples and training images, beside two reference values
    from real images: `floor`, training images against other training images, and `heldout`,
    held-out against training images.

    A Frechet distance is biased upwards when there are few features. The floor therefore uses as
    many images as there are samples: it estimates the distance of perfect samples.

    Args:
        seed: the generator for a purpose, "floor" or "kid".
    """
    samples, heldout, train = (
        extract(extractor, images.split(CHUNK)) for images in sets.stored()
    )  # (N, d) each
    name = extractor.name
    count = min(len(samples), len(train) // 2)
    some, others = random_split(train, count, seed("floor"))
    subset_size = min(KID_SUBSET_SIZE, len(samples), len(heldout), count)
    shared = {
        **protocol,
        "split": "train",
        "features": name,
        "weights_sha256": extractor.weights_sha256,
        "resize": f"bicubic with antialiasing to {extractor.side} px",
        "rounding": "uint8",
        "library": "torchmetrics",
        "arithmetic": "float64",
    }
    kid_protocol = {
        "subsets": KID_SUBSETS,
        "subset_size": subset_size,
        "kernel": "(x.y / d + 1)^3",
    }
    frechet, kids = {}, {}
    for suffix, real, fake, compared in (
        ("", train, samples, "samples against training pictures"),
        ("_heldout", train, heldout, "held-out against training pictures"),
        ("_floor", others, some, "some training pictures, as many as samples, against the others"),
    ):
        about = {**shared, "what": compared, "real": len(real), "fake": len(fake)}
        frechet[f"fd_{name}{suffix}"] = Metric(frechet_distance(real, fake), about)
        kid = kernel_distance(
            real, fake, subsets=KID_SUBSETS, subset_size=subset_size, generator=seed("kid")
        )
        kid_about = {**about, **kid_protocol, "std_over_subsets": kid.std}
        kids[f"kid_{name}{suffix}"] = Metric(kid.mean, kid_about)
    return frechet | kids


def classifier_metrics(
    sets: ImageSets, classifier: ImageClassifier, protocol: dict[str, Any]
) -> dict[str, Metric]:
    """Accuracy of the classifier on held-out images and on samples, whose label is the requested
    class, and the ratio of the two."""
    samples, heldout, _ = sets.stored()
    on_heldout = classifier.accuracy(heldout, sets.heldout_labels)
    on_samples = classifier.accuracy(samples, sets.sample_labels)
    base = {
        **protocol,
        "classifier": "residual network trained on the real training pictures",
        "classifier_sha256": weights_sha256(classifier),
        "training": classifier.training_record,
        "rounding": "uint8",
    }
    ratio = on_samples / on_heldout if on_heldout else 0.0
    return {
        "classifier_accuracy_heldout": Metric(on_heldout, {**base, "pictures": len(sets.heldout)}),
        "classifier_accuracy_samples": Metric(on_samples, {**base, "pictures": len(sets.samples)}),
        "classifier_accuracy_ratio": Metric(ratio, base),
    }
