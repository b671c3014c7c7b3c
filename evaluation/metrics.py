"""The metrics of reconstructions, codes and samples, each with the protocol that produced it.

In order: the record of a metric, then metrics of reconstructions, of the codebook, and of samples.
Every function returns metrics by name; images are rounded to 8 bits before any of them. A number
that is not defined is replaced by the reason.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.data.latents import rounded
from smalti.evaluation.classifier import ImageClassifier
from smalti.evaluation.distances import (
    frechet_distance,
    frechet_of,
    frechet_ratio,
    kernel_distance,
)
from smalti.evaluation.features import (
    FeatureExtractor,
    extract,
    random_split,
    resize_of,
    weights_sha256,
)
from smalti.evaluation.moments import Moments, UndefinedMetricError
from smalti.evaluation.pictures import Images, StoredImages, as_stored
from smalti.evaluation.reconstruction import (
    SSIM_WINDOW,
    known_psnr,
    perplexity,
    psnr,
    ssim,
    usage,
)
from smalti.files import Info, read_hashed_json, write_hashed_json
from smalti.tokenizer.losses.perceptual import LPIPS, MIN_SIDE

CHUNK = 128  # images per forward pass
VERSIONED = ("smalti", "torch", "torchvision", "torchmetrics")  # packages that affect the values

# -------------------------------------------------------------------------------------------------
# A value and its protocol


@dataclass(frozen=True)
class Metric:
    """A measured value with everything needed to measure it again."""

    value: float
    protocol: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Undefined:
    """Why a number is not defined for the pictures: there is one class, or there are too few."""

    reason: str


Found = dict[str, Metric | Undefined]


def defined(found: Mapping[str, Metric | Undefined]) -> dict[str, Metric]:
    """The metrics that have a value."""
    return {name: metric for name, metric in found.items() if isinstance(metric, Metric)}


def undefined(found: Mapping[str, Metric | Undefined]) -> dict[str, str]:
    """The reasons of those that have none."""
    return {name: one.reason for name, one in found.items() if isinstance(one, Undefined)}


def table(found: Mapping[str, Metric | Undefined]) -> str:
    """The metrics, one per line, and below them those that are not defined, with the reason."""
    width = max(map(len, found))
    lines = [f"{name:{width}}  {metric.value:10.4f}" for name, metric in defined(found).items()]
    reasons = undefined(found).items()
    return "\n".join([*lines, *(f"{name:{width}}  not defined: {why}" for name, why in reasons)])


SETTINGS = "evaluation.json"  # beside a summary


def write_summary(path: Path, found: Mapping[str, Metric | Undefined], **context: Any) -> None:
    """Write {"metrics": {name: {"value", "protocol"}}, "undefined": {name: reason}, "versions",
    ...context} as JSON, with its hash."""
    content = {
        **context,
        "versions": {package: version(package) for package in VERSIONED},
        "metrics": {name: asdict(metric) for name, metric in sorted(defined(found).items())},
        "undefined": dict(sorted(undefined(found).items())),
    }
    write_hashed_json(path, content)


def of_summary(path: Path) -> Info:
    """What `smalti info` prints of a summary: every value, and whether it and the settings of its
    evaluation have their hashes."""
    try:
        if path.with_name(SETTINGS).is_file():
            read_hashed_json(path.with_name(SETTINGS))
        summary = read_hashed_json(path)
        values = [(name, f"{metric['value']:.6g}") for name, metric in summary["metrics"].items()]
        reasons = summary.get("undefined", {}).items()  # earlier versions had none
        values += [(name, f"not defined: {reason}") for name, reason in reasons]
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
) -> Found:
    """PSNR, SSIM and LPIPS of reconstructions (N, C, H, W) in [-1, 1], means over images."""
    pairs = zip(images.split(CHUNK), reference.split(CHUNK), strict=True)
    return streamed_reconstruction_metrics(pairs, lpips, protocol)


def streamed_reconstruction_metrics(
    pairs: Iterable[tuple[Tensor, Tensor]],
    lpips: LPIPS,
    protocol: dict[str, Any],
    extractors: Sequence[FeatureExtractor] = (),
) -> Found:
    """`reconstruction_metrics` of pairs: some reconstructions, and their originals; and for each
    extractor the Frechet distance between all reconstructions and all originals."""
    device = next(lpips.parameters()).device
    psnrs, ssims, distances = [], [], []
    moments: dict[str, tuple[Moments, Moments]] = {}
    size = torch.Size()
    for output, original in pairs:
        a, b = rounded(output), rounded(original)
        size = a.shape[2:]
        psnrs.append(psnr(a, b).clamp(max=BEST_PSNR))
        if min(size) >= SSIM_WINDOW:
            ssims.append(ssim(a, b))
        if min(size) >= MIN_SIDE:
            with torch.no_grad():
                distances.append(lpips(a.to(device), b.to(device)).cpu())
        for extractor in extractors:
            features = extractor(a), extractor(b)
            dim = features[0].shape[1]
            sums = moments.setdefault(extractor.name, (Moments(dim), Moments(dim)))
            for one, values in zip(sums, features, strict=True):
                one.add(values)
    base = {**protocol, "pictures": sum(map(len, psnrs)), "rounding": "uint8"}
    over_pictures = {**base, "mean": "over pictures"}
    psnr_protocol = {
        "library": "torchmetrics",
        "unit": "dB",
        "data_range": 255,
        "exact_copy_counts_as": BEST_PSNR,
    }
    trunk = {"trunk": "alex", "version": "0.1", "weights_sha256": weights_sha256(lpips)}
    pixels = f"the pictures have {size[0]} x {size[1]} pixels"
    found: Found = {
        "psnr": Metric(torch.cat(psnrs).mean().item(), {**over_pictures, **psnr_protocol}),
        "ssim": Undefined(f"{pixels}; the window of SSIM has {SSIM_WINDOW} x {SSIM_WINDOW}"),
        "lpips": Undefined(f"{pixels}; LPIPS needs at least {MIN_SIDE} x {MIN_SIDE}"),
    }
    if ssims:
        found["ssim"] = Metric(torch.cat(ssims).mean().item(), {**over_pictures, **SSIM_PROTOCOL})
    if distances:
        found["lpips"] = Metric(torch.cat(distances).mean().item(), {**over_pictures, **trunk})
    for extractor in extractors:
        about = {**base, **feature_protocol(extractor), "what": "reconstructions against originals"}
        found[f"rfd_{extractor.name}"] = _frechet_metric(*moments[extractor.name], about)
    return found


def feature_protocol(extractor: FeatureExtractor) -> dict[str, Any]:
    """What a distance of features depends on."""
    return {
        "features": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "resize": resize_of(extractor),
        "arithmetic": "float64",
    }


def _frechet_metric(a: Moments, b: Moments, protocol: dict[str, Any]) -> Metric | Undefined:
    try:
        return Metric(frechet_of(a.mean, a.covariance, b.mean, b.covariance), protocol)
    except UndefinedMetricError as error:
        return Undefined(str(error))


# -------------------------------------------------------------------------------------------------
# Samples of given pictures: super-resolution and inpainting


def enlargement_metrics(
    sets: Mapping[str, Images], originals: StoredImages, lpips: LPIPS, protocol: dict[str, Any]
) -> Found:
    """PSNR, SSIM and LPIPS to the originals (N, C, H, W) of sets of enlarged pictures, each named
    after its set, as in psnr_samples."""
    found: Found = {}
    for name, images in sets.items():
        pairs = zip(images.split(CHUNK), originals.split(CHUNK), strict=True)
        about = {**protocol, "what": f"{name} against originals"}
        metrics = streamed_reconstruction_metrics(pairs, lpips, about)
        found |= {f"{metric}_{name}": value for metric, value in metrics.items()}
    return found


def known_pixel_metrics(
    sets: Mapping[str, Images], originals: StoredImages, known: Tensor, protocol: dict[str, Any]
) -> Found:
    """PSNR at the known pixels of inpainted pictures, the mean over pictures that have some, named
    after the set, as in known_psnr_samples.

    Args:
        known: (N, 1, H, W) bool, true at the pixels that were given.
    """
    found: Found = {}
    for name, images in sets.items():
        parts = zip(*(x.split(CHUNK) for x in (images, originals, known)), strict=True)
        values = torch.cat([known_psnr(*part) for part in parts])
        values = values[~values.isnan()].clamp(max=BEST_PSNR)
        about = {
            **protocol,
            "what": f"{name} against originals, at the known pixels",
            "pictures": len(values),
            "rounding": "uint8",
            "mean": "over pictures",
            "unit": "dB",
            "data_range": 255,
            "exact_copy_counts_as": BEST_PSNR,
        }
        reason = "no picture has known pixels"
        metric = Metric(values.mean().item(), about) if len(values) else Undefined(reason)
        found[f"known_psnr_{name}"] = metric
    return found


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
) -> Found:
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
    some, others = train[:count], train[count:]
    if count >= 2:
        some, others = random_split(train, count, seed("floor"))
    shared = {**protocol, "split": "train", **feature_protocol(extractor), "rounding": "uint8"}
    sizes = [KID_SUBSET_SIZE, len(samples), len(heldout), count if count >= 2 else len(train)]
    kid_protocol = {
        "library": "torchmetrics",
        "subsets": KID_SUBSETS,
        "subset_size": min(sizes),
        "kernel": "(x.y / d + 1)^3",
    }
    frechet: Found = {}
    kids: Found = {}
    for suffix, real, fake, compared in (
        ("", train, samples, "samples against training pictures"),
        ("_heldout", train, heldout, "held-out against training pictures"),
        ("_floor", others, some, "some training pictures, as many as samples, against the others"),
    ):
        about = {**shared, "what": compared, "real": len(real), "fake": len(fake)}
        names = f"fd_{name}{suffix}", f"kid_{name}{suffix}"
        if min(len(real), len(fake)) < 2:
            few = Undefined(
                f"{compared}: {len(fake)} against {len(real)}; a distance needs at least 2 of each"
            )
            frechet[names[0]] = kids[names[1]] = few
            continue
        frechet[names[0]] = Metric(frechet_distance(real, fake), about)
        kid = kernel_distance(
            real, fake, subsets=KID_SUBSETS, subset_size=min(sizes), generator=seed("kid")
        )
        kid_about = {**about, **kid_protocol, "std_over_subsets": kid.std}
        kids[names[1]] = Metric(kid.mean, kid_about)
    return frechet | kids


def ratio_metrics(found: Found, extractors: Sequence[FeatureExtractor]) -> Found:
    """FDr^k of the `distance_metrics` of k extractors, named fdr_k: see `frechet_ratio`."""
    names = [extractor.name for extractor in extractors]
    samples, heldout = (
        defined({name: found[f"fd_{name}{suffix}"] for name in names})
        for suffix in ("", "_heldout")
    )
    try:
        if len(samples) < len(names) or len(heldout) < len(names):
            raise UndefinedMetricError("a Frechet distance is not defined")
        value = frechet_ratio(*({n: m.value for n, m in one.items()} for one in (samples, heldout)))
    except UndefinedMetricError as error:
        return {f"fdr_{len(names)}": Undefined(str(error))}
    protocol = {
        **samples[names[0]].protocol,
        "what": "Frechet distance of samples over that of held-out pictures, both from training "
        "pictures: the mean over extractors",
        "features": names,
        "weights_sha256": [extractor.weights_sha256 for extractor in extractors],
        "resize": [samples[name].protocol["resize"] for name in names],
        "heldout": heldout[names[0]].protocol["fake"],
    }
    return {f"fdr_{len(names)}": Metric(value, protocol)}


CLASSIFIER_METRICS = tuple(f"classifier_accuracy_{x}" for x in ("heldout", "samples", "ratio"))


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
