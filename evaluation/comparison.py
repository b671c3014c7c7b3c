"""Metrics of two sets of pictures, of what `streaming.py` keeps of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.data.latents import resolution, to_float
from smalti.evaluation.classifier import train_classifier
from smalti.evaluation.distances import (
    cmmd,
    density_coverage,
    frechet_of,
    frechet_ratio,
    kernel_distance,
    precision_recall,
)
from smalti.evaluation.features import FeatureExtractor, resize_of
from smalti.evaluation.image_sets import Gaussian, ImageSet, Statistics
from smalti.evaluation.metrics import (
    CLASSIFIER_METRICS,
    Found,
    ImageSets,
    Metric,
    Undefined,
    classifier_metrics,
)
from smalti.evaluation.moments import Moments, UndefinedMetricError
from smalti.evaluation.pictures import StoredImages, stored
from smalti.evaluation.retrieval import (
    RETRIEVAL_METRICS,
    CaptionedImages,
    ImageFeatures,
    retrieval_metrics,
    train_scorer,
)
from smalti.evaluation.streaming import BLOCK_PICTURES, SPLITS, Gathered, ScoreSums
from smalti.randomness import generator
from smalti.tokenizer.losses.perceptual import LPIPS

ENOUGH = 10_000  # pictures of either set, below which a distance is no FID
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as in torch-fidelity
BATCH, RETRIEVAL_BATCH = 128, 256  # of the training of the classifier and of the scorer
NO_HELDOUT = (
    "it needs held-out real pictures: give a data set as --reference, and add "
    "--reference_split train"
)

# -------------------------------------------------------------------------------------------------
# Metrics of two sets


@dataclass(frozen=True)
class Side:
    """What is known of one of two sets, in the features of one extractor."""

    moments: dict[str, Moments | Gaussian]  # of "features" and "spatial", as far as they are known
    count: int | None  # pictures; None: statistics whose file does not say
    subset: Tensor | None = None  # features (n, d); None: there are no pictures
    scores: ScoreSums | None = None

    @classmethod
    def of(cls, name: str, gathered: Gathered | None, statistics: Statistics | None) -> "Side":
        """The side of an extractor `name`: statistics, where they are given, replace moments."""
        kept = gathered.kept[name] if gathered is not None else None
        moments: dict[str, Moments | Gaussian] = dict(kept.moments) if kept is not None else {}
        count = kept.moments["features"].count if kept is not None else None
        if statistics is not None:
            moments.clear()
            moments["features"] = statistics.features
            count = statistics.features.count
            if statistics.spatial is not None:
                moments["spatial"] = statistics.spatial
        scores = kept.scores if kept is not None else None
        return cls(moments, count, kept.subset if kept is not None else None, scores)

    @property
    def enough(self) -> bool:
        """Whether a distance to this set may be called FID."""
        return self.count is None or self.count >= ENOUGH


def record_of(
    images: ImageSet | None, statistics: Statistics | None, gathered: Gathered | None
) -> dict[str, Any]:
    """A set, for the protocol."""
    found: dict[str, Any] = {}
    if images is not None and gathered is not None:
        found |= {
            "name": images.name,
            "kind": images.kind,
            "pictures": len(images),
            "size": resolution((images.shape[1], images.shape[2])),
            "channels": images.shape[0],
            "sha256_of_pixels": gathered.fingerprint,
            **({"copies": gathered.copies} if gathered.copies else {}),
            **({"lossy": images.lossy} if images.lossy else {}),
            **images.protocol,
        }
    if statistics is not None:
        found["statistics"] = {
            "name": statistics.name,
            "sha256": statistics.sha256,
            "pictures": statistics.features.count or "not recorded",
            **({"record": statistics.record} if statistics.record else {}),
        }
    return found


def cautions(samples: dict[str, Any], reference: dict[str, Any], shared: int) -> list[str]:
    """What makes numbers of two sets hard to compare with others, each in one sentence.

    Args:
        samples, reference: see `record_of`.
        shared: how many samples are equal to a picture of the reference.
    """
    found = []
    # Statistics that smalti wrote have the record of their pictures.
    samples, real = (
        one.get("statistics", {}).get("record", {}).get("set", {}) or one
        for one in (samples, reference)
    )
    sizes = [one.get("size") for one in (samples, real)]
    if None not in sizes and sizes[0] != sizes[1]:
        found.append(
            f"the samples have {sizes[0]} pixels and the reference {sizes[1]}, and networks see "
            "either resized: give --image_size, or pictures of one size"
        )
    channels = [one.get("channels") for one in (samples, real)]
    if None not in channels and channels[0] != channels[1]:
        found.append(
            f"the samples have {channels[0]} channels and the reference {channels[1]}: networks "
            "see grey as RGB, and alpha on white"
        )
    if samples.get("lossy") and samples["lossy"] != real.get("lossy"):
        found.append(
            f"the samples are compressed ({samples['lossy']}), which changes distances: generate "
            "them as PNG"
        )
    for name, one in (("samples", samples), ("pictures of the reference", real)):
        if one.get("copies"):
            found.append(
                f"{one['copies']:,} of {one['pictures']:,} {name} are equal to another: each counts"
            )
    if shared:
        found.append(
            f"{shared:,} of {samples['pictures']:,} samples are equal to a picture of the "
            "reference: distances of a set to itself say nothing of new pictures"
        )
    return found


def compare(
    samples: Side,
    reference: Side,
    extractor: FeatureExtractor,
    protocol: dict[str, Any],
    seed: int,
) -> Found:
    """All metrics of two sets in the features of one extractor."""
    name = extractor.name
    base = {
        **protocol,
        "features": name,
        "weights_sha256": extractor.weights_sha256,
        "resize": resize_of(extractor),
        "rounding": "uint8",
        "arithmetic": "float64",
        "seed": seed,
    }
    official = bool(getattr(extractor, "published", False)) and samples.enough and reference.enough
    names = {
        "features": "fid" if official else f"fd_{name}",
        "spatial": "sfid" if official else f"fd_{name}_spatial",
    }
    found: Found = {}
    for output, called in names.items():
        if output in samples.moments or output == "features":
            found[called] = frechet_metric(samples, reference, output, base)
    if samples.scores is not None:
        scored = official and samples.scores.counts.sum() >= ENOUGH  # statistics may be of more
        called = "inception_score" if scored else f"score_{name}"
        found |= _defined([called], lambda: _score(samples, base, called))
    subset_names = [f"{kind}_{name}" for kind in ("kid", "precision", "recall")]
    subset_names += [f"{kind}_{name}" for kind in ("density", "coverage")]
    is_clip = str(getattr(extractor, "family", "")).startswith("clip")
    subset_names += [f"cmmd_{name}"] if is_clip else []
    fake, real = samples.subset, reference.subset
    if fake is None or real is None:
        which = "samples" if fake is None else "reference"
        reason = f"only statistics of the {which} are given: give the pictures"
        return found | {called: Undefined(reason) for called in subset_names}
    chosen = {"samples_used": len(fake), "reference_used": len(real), "chosen": "random subset"}
    return found | _subset_metrics(real, fake, name, is_clip, {**base, **chosen}, seed)


def _defined(names: Iterable[str], compute: Callable[[], dict[str, Metric]]) -> Found:
    """Metrics, or why they are not defined."""
    try:
        return dict(compute())
    except UndefinedMetricError as error:
        return {name: Undefined(str(error)) for name in names}


def frechet_metric(
    samples: Side, reference: Side, output: str, base: dict[str, Any]
) -> Metric | Undefined:
    """The Frechet distance of two sets."""
    if output not in reference.moments:
        return Undefined("the statistics of the reference have no mu_s and sigma_s")
    a, b = samples.moments[output], reference.moments[output]
    counts = [count for count in (samples.count, reference.count) if count is not None]
    about = {**base, "dimension": len(a.mean)}
    if counts and min(counts) <= len(a.mean):
        about["note"] = (
            f"{min(counts)} pictures for {len(a.mean)} dimensions: a covariance is singular, and "
            "the value is comparable only with values of the same numbers of pictures"
        )
    try:
        return Metric(frechet_of(a.mean, a.covariance, b.mean, b.covariance), about)
    except UndefinedMetricError as error:
        return Undefined(str(error))


def _score(samples: Side, base: dict[str, Any], name: str) -> dict[str, Metric]:
    assert samples.scores is not None
    mean, std = samples.scores.score()
    about = {**base, "splits": SPLITS, "order": "shuffled as in torch-fidelity", "std": std}
    return {name: Metric(mean, about)}


def _subset_metrics(
    real: Tensor, fake: Tensor, name: str, is_clip: bool, base: dict[str, Any], seed: int
) -> Found:
    """Metrics that compare features with features."""
    size = min(KID_SUBSET_SIZE, len(real), len(fake))

    def kid() -> dict[str, Metric]:
        draws = generator(seed, "evaluate", "kid")
        found = kernel_distance(real, fake, subsets=KID_SUBSETS, subset_size=size, generator=draws)
        about = {"subsets": KID_SUBSETS, "subset_size": size, "kernel": "(x.y / d + 1)^3"}
        return {f"kid_{name}": Metric(found.mean, {**base, **about, "std": found.std})}

    def pair(names: tuple[str, str], values: tuple[float, float], k: int) -> dict[str, Metric]:
        about = {**base, "neighbours": k}
        return {f"{n}_{name}": Metric(v, about) for n, v in zip(names, values, strict=True)}

    first, second = ("precision", "recall"), ("density", "coverage")
    found = _defined([f"kid_{name}"], kid)
    found |= _defined(
        [f"{n}_{name}" for n in first], lambda: pair(first, precision_recall(real, fake), 3)
    )
    found |= _defined(
        [f"{n}_{name}" for n in second], lambda: pair(second, density_coverage(real, fake), 5)
    )
    if is_clip:
        about = {**base, "kernel": "Gaussian, sigma 10, times 1000"}
        found |= _defined(
            [f"cmmd_{name}"], lambda: {f"cmmd_{name}": Metric(cmmd(real, fake), about)}
        )
    return found


def ratio_metric(
    sides: dict[str, tuple[Side, Side, Side | None]], protocol: dict[str, Any]
) -> Found:
    """FDr^k of k extractors, named fdr_k: see `frechet_ratio`.

    Args:
        sides: samples, reference, and held-out pictures, by the name of the extractor.
    """
    called = f"fdr_{len(sides)}"
    distances: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for name, (samples, reference, heldout) in sides.items():
        if heldout is None:
            return {called: Undefined(NO_HELDOUT)}
        for side, values in zip((samples, heldout), distances, strict=True):
            metric = frechet_metric(side, reference, "features", {})
            if isinstance(metric, Undefined):
                return {called: metric}
            values[name] = metric.value
    about = {**protocol, "features": sorted(sides), "heldout_distances": distances[1]}
    return _defined([called], lambda: {called: Metric(frechet_ratio(*distances), about)})


# -------------------------------------------------------------------------------------------------
# Classes and captions


def classification(
    samples: ImageSet,
    reference: ImageSet,
    heldout: ImageSet | None,
    protocol: dict[str, Any],
    *,
    epochs: int,
    limit: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
) -> Found:
    """Accuracy on samples of a classifier that is trained on the reference.

    Args:
        limit: it is trained on at most so many pictures of the reference, evenly spaced.
        dtype: arithmetic of the training.
    """
    reason = ""
    unknown = sorted({*samples.classes} - {*reference.classes})
    if not samples.classes or not reference.classes or samples.labels is None:
        reason = f"the {'reference has' if samples.classes else 'samples have'} no classes"
    elif unknown:
        reason = f'the samples have a class "{unknown[0]}", which the reference does not have'
    elif len(reference.classes) < 2:
        reason = "there is one class"
    elif heldout is None:
        reason = NO_HELDOUT
    elif samples.shape != reference.shape:
        reason = "the pictures of the two sets have different sizes: give --image_size"
    if reason or heldout is None or heldout.labels is None or reference.labels is None:
        return dict.fromkeys(CLASSIFIER_METRICS, Undefined(reason))
    rows = torch.linspace(0, len(reference) - 1, min(limit, len(reference))).long()
    train = _stored(reference, rows, folder)
    classifier = train_classifier(
        train,
        reference.labels[rows],
        len(reference.classes),
        generator=generator(seed, "evaluate", "classifier"),
        epochs=epochs,
        batch_size=BATCH,
        device=device,
        dtype=dtype,
    )
    numbers = torch.tensor([reference.classes.index(name) for name in samples.classes])
    theirs = torch.tensor([reference.classes.index(name) for name in heldout.classes])
    sets = ImageSets(
        _stored(samples, torch.arange(len(samples)), folder),
        numbers[samples.labels],
        _stored(heldout, torch.arange(len(heldout)), folder),
        theirs[heldout.labels],
        train,
    )
    return dict(classifier_metrics(sets, classifier, protocol))


def _stored(images: ImageSet, rows: Tensor, folder: Path) -> StoredImages:
    parts = (images.levels(part.tolist()) for part in rows.split(BLOCK_PICTURES))
    return stored((to_float(levels) for levels in parts), folder)


def retrieval(
    samples: ImageSet,
    reference: ImageSet,
    heldout: ImageSet | None,
    protocol: dict[str, Any],
    *,
    epochs: int,
    limit: int,
    seed: int,
    lpips: LPIPS,
) -> Found:
    """How often a scorer, trained on the captioned pictures of the reference, finds the caption of
    a sample; for the arguments see `classification`."""
    reason = ""
    if not samples.captions or not reference.captions:
        reason = f"the {'reference has' if samples.captions else 'samples have'} no captions"
    elif heldout is None:
        reason = NO_HELDOUT
    if reason or heldout is None:
        return dict.fromkeys(RETRIEVAL_METRICS, Undefined(reason))
    extractor = ImageFeatures(lpips)

    def captioned(images: ImageSet, rows: Tensor) -> CaptionedImages:
        parts = [part.tolist() for part in rows.split(BLOCK_PICTURES)]
        batches = (
            (to_float(images.levels(part)), [(str(images.captions[row]),) for row in part])
            for part in parts
        )
        return CaptionedImages.of(batches, extractor)

    rows = torch.linspace(0, len(reference) - 1, min(limit, len(reference))).long()
    scorer = train_scorer(
        captioned(reference, rows),
        generator=generator(seed, "evaluate", "retrieval"),
        epochs=epochs,
        batch_size=RETRIEVAL_BATCH,
        device=next(lpips.parameters()).device,
    )
    asked, real = (captioned(s, torch.arange(len(s))) for s in (samples, heldout))
    wrong = generator(seed, "evaluate", "wrong captions")
    return dict(retrieval_metrics(scorer, asked, real, protocol, generator=wrong))
