"""What is measured of a tokenizer and of samples, put together from the single metrics."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.data.latents import rounded
from smalti.evaluation.classifier import ImageClassifier
from smalti.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance
from smalti.evaluation.features import FeatureExtractor, extract, parted, weights_sha256
from smalti.evaluation.protocol import Metric
from smalti.evaluation.reconstruction import perplexity, psnr, ssim, usage
from smalti.tokenizer.losses.perceptual import LPIPS

CHUNK = 128  # pictures per forward pass
KID_SUBSETS, KID_SUBSET_SIZE = 50, 256
SSIM_PROTOCOL = {
    "window": "Gaussian, 11 px, sigma 1.5",
    "data_range": 255,
    "positions": "where the window fits inside",
}
BEST_PSNR = 100.0  # dB; stands for the infinity of an exact copy, which no mean survives


def reconstruction_metrics(
    images: Tensor, reference: Tensor, lpips: LPIPS, protocol: dict[str, Any]
) -> dict[str, Metric]:
    """PSNR, SSIM and LPIPS of reconstructions (N, 3, S, S) in [-1, 1], means over pictures.

    Both sides are rounded to 8 bits first.
    """
    base = {**protocol, "pictures": len(images), "rounding": "uint8", "mean": "over pictures"}
    pairs = zip(rounded(images).split(CHUNK), rounded(reference).split(CHUNK), strict=True)
    device = lpips.shift.device
    with torch.no_grad():
        perceptual = torch.cat([lpips(a.to(device), b.to(device)).cpu() for a, b in pairs])
    mean_psnr = psnr(images, reference).clamp(max=BEST_PSNR).mean().item()
    trunk = {"trunk": "alex", "version": "0.1", "weights_sha256": weights_sha256(lpips)}
    return {
        "psnr": Metric(mean_psnr, {**base, "unit": "dB", "exact_copy_counts_as": BEST_PSNR}),
        "ssim": Metric(ssim(images, reference).mean().item(), {**base, **SSIM_PROTOCOL}),
        "lpips": Metric(perceptual.mean().item(), {**base, **trunk}),
    }


def codebook_metrics(
    counts: Tensor, codes_per_picture: int, pixels: int, protocol: dict[str, Any]
) -> dict[str, Metric]:
    """Usage and perplexity of code counts (V,) over a whole set, and bits per pixel: what the codes
    of a picture take without further compression, L log2(V) / (H W)."""
    base = {**protocol, "codes": int(counts.sum()), "vocab_size": len(counts)}
    bits = codes_per_picture * math.log2(len(counts)) / pixels
    return {
        "bits_per_pixel": Metric(bits, {**base, "codes_per_picture": codes_per_picture}),
        "codebook_usage": Metric(usage(counts), base),
        "codebook_perplexity": Metric(perplexity(counts), base),
    }


@dataclass(frozen=True)
class PictureSets:
    """What samples are held against; pictures (N, 3, S, S) in [-1, 1]."""

    samples: Tensor
    sample_labels: Tensor  # (N,), the classes that were asked for
    heldout: Tensor
    heldout_labels: Tensor
    train: Tensor


def distance_metrics(
    sets: PictureSets,
    extractor: FeatureExtractor,
    protocol: dict[str, Any],
    seed: Callable[[str], torch.Generator],
) -> dict[str, Metric]:
    """Frechet distance and KID between samples and training pictures, beside two real yardsticks:
    `floor`, training pictures against each other, and `heldout`, unseen against training pictures.

    Distances fall with the number of features, far above 0 when they are few: so the floor is that
    of as many pictures as there are samples, about what perfect samples would score.
    """
    train, heldout, samples = (
        extract(extractor, rounded(part).split(CHUNK))
        for part in (sets.train, sets.heldout, sets.samples)
    )
    base = {
        **protocol,
        "split": "train",
        "what": "samples against training pictures",
        "features": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "resize": f"bicubic with antialiasing to {extractor.side} px",
        "rounding": "uint8",
        "real": len(train),
        "fake": len(samples),
    }
    reference = FeatureStatistics.of(train)
    count = min(len(samples), len(train) // 2)
    among = {
        **base,
        "what": "some training pictures, as many as samples, against the others",
        "real": len(train) - count,
        "fake": count,
    }
    other = {**base, "what": "held-out against training pictures", "fake": len(heldout)}
    name = extractor.name
    size = min(KID_SUBSET_SIZE, len(samples), len(heldout), count)
    kid_base = {"subsets": KID_SUBSETS, "subset_size": size, "kernel": "(x.y / d + 1)^3"}
    some, others = parted(train, count, seed("floor"))
    floor = frechet_distance(FeatureStatistics.of(some), FeatureStatistics.of(others))

    def kid(fake: Tensor, about: dict[str, Any], real: Tensor = train) -> Metric:
        found = kernel_distance(
            real, fake, subsets=KID_SUBSETS, subset_size=size, generator=seed("kid")
        )
        return Metric(found.mean, {**about, **kid_base, "std_over_subsets": found.std})

    def frechet(fake: Tensor) -> float:
        return frechet_distance(reference, FeatureStatistics.of(fake))

    return {
        f"fd_{name}": Metric(frechet(samples), base),
        f"fd_{name}_heldout": Metric(frechet(heldout), other),
        f"fd_{name}_floor": Metric(floor, among),
        f"kid_{name}": kid(samples, base),
        f"kid_{name}_heldout": kid(heldout, other),
        f"kid_{name}_floor": kid(some, among, real=others),
    }


def classifier_metrics(
    sets: PictureSets, classifier: ImageClassifier, protocol: dict[str, Any]
) -> dict[str, Metric]:
    """How often the classifier sees the class that was asked for, and how good it is itself."""
    own = classifier.accuracy(rounded(sets.heldout), sets.heldout_labels)
    on_samples = classifier.accuracy(rounded(sets.samples), sets.sample_labels)
    base = {
        **protocol,
        "classifier": "residual network trained on the real training pictures",
        "classifier_sha256": weights_sha256(classifier),
        "training": classifier.training_record,
        "rounding": "uint8",
    }
    return {
        "classifier_accuracy_heldout": Metric(own, {**base, "pictures": len(sets.heldout)}),
        "classifier_accuracy_samples": Metric(on_samples, {**base, "pictures": len(sets.samples)}),
        "classifier_accuracy_ratio": Metric(on_samples / own if own else 0.0, base),
    }
