"""The evaluators behind `smalti evaluate`: of a tokenizer, and of samples.

They use images and features only. `scripts/evaluate.py` passes what is measured: a tokenizer as
an `Autoencoder`, the samples of a pipeline as images, a prior as the function that gives the bits
of latents. Sets of pictures of any size are read a part at a time, see `evaluation/pictures.py`;
what is kept of them are features, distances and counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smalti.config import ImageSize
from smalti.data.dataset import ImageDataset
from smalti.data.image_io import image_grid, save_png
from smalti.data.latents import CodeSpec, LatentSpec, height_and_width, rounded
from smalti.errors import DataError
from smalti.evaluation.classifier import ImageClassifier, train_classifier
from smalti.evaluation.distances import NeighbourSearch
from smalti.evaluation.features import FeatureExtractor
from smalti.evaluation.metrics import (
    CLASSIFIER_METRICS,
    Found,
    ImageSets,
    Metric,
    Undefined,
    classifier_metrics,
    codebook_metrics,
    distance_metrics,
    enlargement_metrics,
    known_pixel_metrics,
    ratio_metrics,
    streamed_reconstruction_metrics,
)
from smalti.evaluation.pictures import Images, StoredImages, stored, stored_pictures
from smalti.evaluation.reconstruction import code_counts
from smalti.evaluation.retrieval import (
    RETRIEVAL_METRICS,
    CaptionedImages,
    ImageFeatures,
    retrieval_metrics,
    train_scorer,
)
from smalti.randomness import generator
from smalti.tokenizer.losses.perceptual import LPIPS

SHOWN_RECONSTRUCTIONS = 12
SHOWN_GIVEN = 8  # given pictures in the strip of their samples
SHOWN_CLASSES, SHOWN_PER_CLASS = 12, 2  # samples shown above their nearest training images
BATCH = 128  # of the classifier's training and of likelihoods: both depend on it
RETRIEVAL_BATCH = 256  # captions that a picture is compared with in the scorer's training
LIKELIHOOD_IMAGES = 128
NEAR_COPY = 2.0  # root mean square difference in grey levels of 255

# -------------------------------------------------------------------------------------------------
# Choice of images


def evenly_spaced(count: int, total: int) -> Tensor:
    """`count` positions in range(total), evenly spaced from the first to the last."""
    return torch.linspace(0, total - 1, count).long()


def reference_rows(dataset: ImageDataset, limit: int) -> Tensor | None:
    """The positions of at most `limit` evenly spaced images of a set; None: all of them."""
    return None if len(dataset) <= limit else evenly_spaced(limit, len(dataset))


def captioned(
    dataset: ImageDataset, rows: Sequence[int], extractor: ImageFeatures
) -> CaptionedImages:
    """The features of some samples, with their captions."""
    batches = dataset.batches_of(rows, BATCH)
    return CaptionedImages.of(((b.images, b.captions or ()) for b in batches), extractor)


def first_of_each(labels: Tensor, count: int, classes: int = SHOWN_CLASSES) -> Tensor:
    """Positions of the first `count` samples of each of the first classes."""
    shown = labels.unique()[:classes]
    return torch.cat([(labels == c).nonzero().flatten()[:count] for c in shown])


# -------------------------------------------------------------------------------------------------
# A tokenizer


class Autoencoder(Protocol):
    """The parts of a tokenizer that the evaluation uses."""

    @property
    def spec(self) -> LatentSpec: ...

    @property
    def image_size(self) -> ImageSize: ...

    def encode(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Tensor]: ...


class TokenizerEvaluator:
    """Measures the reconstruction of held-out images.

    Args:
        autoencoder: in eval mode, on `device`.
        heldout: images that were not in its training set, of its image size.
        protocol: recorded with every metric.
        batch_size: images encoded and decoded at once.
        seed: of the choice of held-out images, where a part of them is used.
        folder: for temporary files of decoded pictures; None is the system's folder for these.

    Raises:
        DataError: fewer than 2 held-out images.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        heldout: ImageDataset,
        protocol: dict[str, Any],
        *,
        device: torch.device,
        batch_size: int,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        if len(heldout) < 2:
            raise DataError(
                f"the number of held-out images is {len(heldout)}; evaluation needs at least 2: "
                "raise --heldout_fraction in every stage, or add images"
            )
        self.autoencoder, self.device, self.batch_size = autoencoder, device, batch_size
        self.protocol, self.folder = protocol, folder
        self.dataset, self.heldout_labels = heldout, heldout.labels
        self.even_subset = partial(heldout.even_subset, seed=seed)
        self.lpips = LPIPS.from_embedded().to(device)

    @cached_property
    def heldout(self) -> StoredImages:
        """All held-out images."""
        return stored_pictures(self.dataset, folder=self.folder)

    def as_input(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) on the device and in the precision of the autoencoder."""
        return images.to(self.device, next(self.autoencoder.parameters()).dtype)

    @torch.no_grad()
    def reconstruct(self, images: Images) -> tuple[Tensor, Tensor]:
        """Latents of images (N, C, H, W), and their reconstructions (N, C, H, W) in [-1, 1]."""
        latents, decoded = [], []
        for batch in images.split(self.batch_size):
            latents.append(self.autoencoder.encode(self.as_input(batch)))
            decoded.append(self.autoencoder.decode(latents[-1]).float().clamp(-1, 1).cpu())
        return torch.cat(latents).cpu(), torch.cat(decoded)

    def reconstruction(self, grid: Path, extractors: Sequence[FeatureExtractor] = ()) -> Found:
        """Metrics over all held-out images; `grid` shows some of them, evenly over the classes,
        above their reconstructions.

        Args:
            extractors: for each, the Frechet distance between reconstructions and originals.
        """
        spec = self.autoencoder.spec
        shown = self.even_subset(SHOWN_RECONSTRUCTIONS)
        shown_outputs: list[Tensor] = []
        counts = torch.zeros(spec.vocab_size if isinstance(spec, CodeSpec) else 0).long()

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            first = 0
            for batch in self.heldout.split(self.batch_size):
                latents, output = self.reconstruct(batch)
                if isinstance(spec, CodeSpec):
                    counts.add_(code_counts(latents, spec.vocab_size))
                here = [row - first for row in shown if first <= row < first + len(batch)]
                shown_outputs.append(output[here])
                first += len(batch)
                yield output, batch

        metrics = streamed_reconstruction_metrics(pairs(), self.lpips, self.protocol, extractors)
        both = torch.cat([self.heldout[shown], *shown_outputs])
        names = ("held-out original", "reconstruction")
        save_png(grid, image_grid(both, columns=len(shown), row_labels=names, scale=2))
        if isinstance(spec, CodeSpec):
            pixels = math.prod(height_and_width(self.autoencoder.image_size))
            metrics |= codebook_metrics(counts, spec.length, pixels, self.protocol)
        return metrics


# -------------------------------------------------------------------------------------------------
# Samples


class BitsPerDimension(Protocol):
    """-log2 p(latents | condition) per code or per element of the latents, (B,)."""

    def __call__(
        self, latents: Tensor, condition: Any, *, generator: torch.Generator | None = None
    ) -> Tensor: ...


class SampleEvaluator:
    """Compares samples with the images that their model was trained on, and with held-out ones.

    Args:
        tokenizer: the evaluator of the tokenizer that decodes the samples.
        train: the training images.
        num_references: samples are compared with at most this many of them, evenly spaced.
        seed: of the classifier, of random subsets and of likelihoods.
    """

    def __init__(
        self, tokenizer: TokenizerEvaluator, train: ImageDataset, *, num_references: int, seed: int
    ) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.class_counts = train.labels.bincount(minlength=len(train.classes))
        self.dataset, self.rows = train, reference_rows(train, num_references)
        self.train_labels = train.labels if self.rows is None else train.labels[self.rows]

    @cached_property
    def train(self) -> StoredImages:
        """The training images that samples are compared with."""
        return stored_pictures(self.dataset, self.rows, self.tokenizer.folder)

    def generator(self, purpose: str) -> torch.Generator:
        """A generator for one purpose: the random numbers of one metric do not affect another."""
        return generator(self.seed, "evaluate", purpose)

    def labels(self, count: int) -> Tensor:
        """Labels (count,) of samples to generate, in the class proportions of the training set."""
        in_order = torch.arange(len(self.class_counts)).repeat_interleave(self.class_counts)
        return in_order[evenly_spaced(count, len(in_order))]

    def sets(self, samples: Images, labels: Tensor) -> ImageSets:
        """Samples (N, C, H, W) in [-1, 1] of the classes `labels` (N,), and the real images."""
        heldout, heldout_labels = self.tokenizer.heldout, self.tokenizer.heldout_labels
        return ImageSets(samples, labels, heldout, heldout_labels, self.train)

    def _classes_of(self, rows: Sequence[int]) -> Tensor:
        return self.tokenizer.heldout_labels[list(rows)].to(self.tokenizer.device)

    @torch.no_grad()
    def likelihood(
        self,
        bits_per_dimension: BitsPerDimension,
        condition_of: Callable[[Sequence[int]], Any] | None = None,
    ) -> dict[str, Metric]:
        """Negative log2 likelihood of held-out latents given their condition, per dimension.

        Args:
            condition_of: positions of held-out images -> their condition; None: class labels.
        """
        if condition_of is None:
            condition_of = self._classes_of
        tokenizer, autoencoder = self.tokenizer, self.tokenizer.autoencoder
        chosen = tokenizer.even_subset(LIKELIHOOD_IMAGES)
        images = tokenizer.heldout[chosen]
        posterior = self.generator("posterior")
        bits = []
        parts = (chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH))
        for batch, rows in zip(images.split(BATCH), parts, strict=True):
            latents = autoencoder.encode(tokenizer.as_input(batch), generator=posterior)
            probes = self.generator("likelihood")
            bits.append(bits_per_dimension(latents, condition_of(rows), generator=probes))
        discrete = isinstance(autoencoder.spec, CodeSpec)
        dimension = "a code" if discrete else "a number; of a density"
        protocol = {
            **tokenizer.protocol,
            "dimension": dimension,
            "num_pictures": len(chosen),
            "chosen": "evenly over classes and groups",
        }
        return {"heldout_bits_per_dimension": Metric(torch.cat(bits).mean().item(), protocol)}

    def distances(
        self, sets: ImageSets, extractors: Sequence[FeatureExtractor], protocol: dict[str, Any]
    ) -> Found:
        """Frechet distance and KID on the features of each network, and the mean ratio of Frechet
        distances over the networks."""
        found: Found = {}
        for extractor in extractors:
            found |= distance_metrics(sets, extractor, protocol, self.generator)
        return found | ratio_metrics(found, extractors) if extractors else found

    def given(
        self,
        samples: Images,
        rows: Sequence[int],
        shown: StoredImages,
        known: Tensor | None,
        protocol: dict[str, Any],
        strip: Path,
    ) -> Found:
        """How close samples (N, C, H, W) of given pictures are to the originals, beside the
        tokenizer's reconstructions of the originals, which limit them. `strip` shows originals,
        what was given of them, and the samples.

        Args:
            rows: N positions of held-out images, the originals.
            shown: what was given of each, (N, C, H, W): enlarged, or with grey in place of what is
                not known.
            known: (N, 1, H, W) bool, the pixels that were given, which are compared; None: enlarged
                pictures, which are compared as a whole, beside the samples.
        """
        tokenizer = self.tokenizer
        originals = stored_pictures(tokenizer.dataset, torch.tensor(rows), tokenizer.folder)
        batches = originals.split(tokenizer.batch_size)
        decoded = stored((tokenizer.reconstruct(part)[1] for part in batches), tokenizer.folder)
        sets: dict[str, Images] = {"samples": samples, "tokenizer": decoded}
        some = slice(0, SHOWN_GIVEN)
        columns = torch.cat([originals[some], shown[some], samples[some]])
        names = ("held-out original", "given", "sample")
        count = min(SHOWN_GIVEN, len(rows))
        save_png(strip, image_grid(columns, columns=count, row_labels=names, scale=2))
        if known is not None:
            return known_pixel_metrics(sets, originals, known, protocol)
        return enlargement_metrics({**sets, "bicubic": shown}, originals, tokenizer.lpips, protocol)

    def classification(
        self, sets: ImageSets, protocol: dict[str, Any], *, epochs: int, dtype: torch.dtype
    ) -> Found:
        """Accuracy on samples of a classifier trained on the real training images alone.

        Args:
            dtype: arithmetic of the classifier's training.
        """
        if len(self.class_counts) < 2:
            return dict.fromkeys(CLASSIFIER_METRICS, Undefined("there is one class"))
        return {**classifier_metrics(sets, self.trained_classifier(epochs, dtype), protocol)}

    def trained_classifier(self, epochs: int, dtype: torch.dtype) -> ImageClassifier:
        """A classifier trained on the real training images alone, in arithmetic of `dtype`."""
        steps = epochs * -(-len(self.train) // BATCH)  # rounded up
        with tqdm(total=steps, desc="train the classifier") as bar:
            return train_classifier(
                self.train,
                self.train_labels,
                len(self.class_counts),
                generator=self.generator("classifier"),
                epochs=epochs,
                batch_size=BATCH,
                device=self.tokenizer.device,
                dtype=dtype,
                progress=bar.update,
            )

    def retrieval(
        self, samples: Images, prompts: Sequence[str], protocol: dict[str, Any], *, epochs: int
    ) -> Found:
        """Accuracy of a scorer, trained on the real training images and captions alone, that
        chooses the prompt of each sample (N, C, H, W) in [-1, 1] among other captions."""
        extractor, heldout = ImageFeatures(self.tokenizer.lpips), self.tokenizer.dataset
        if len({*prompts, *(heldout.captions(row)[0] for row in range(len(heldout)))}) < 2:
            one = Undefined("the held-out pictures have one caption; retrieval needs 2 or more")
            return dict.fromkeys(RETRIEVAL_METRICS, one)
        rows = range(len(self.dataset)) if self.rows is None else self.rows.tolist()
        train = captioned(self.dataset, rows, extractor)
        texts = [(prompt,) for prompt in prompts]
        parts = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
        asked = CaptionedImages.of(zip(samples.split(BATCH), parts, strict=True), extractor)
        real = captioned(heldout, range(len(heldout)), extractor)
        with tqdm(total=epochs * -(-len(train) // RETRIEVAL_BATCH), desc="train retrieval") as bar:
            scorer = train_scorer(
                train,
                generator=self.generator("retrieval"),
                epochs=epochs,
                batch_size=RETRIEVAL_BATCH,
                device=self.tokenizer.device,
                progress=bar.update,
            )
        wrong = self.generator("wrong captions")
        return {**retrieval_metrics(scorer, asked, real, protocol, generator=wrong)}

    def neighbours(
        self, sets: ImageSets, protocol: dict[str, Any], grid: Path
    ) -> dict[str, Metric]:
        """Distances to the nearest training image, mirrored ones included, and the share of
        samples that nearly copy one; `grid` shows some samples above their nearest images."""
        samples, heldout, train = sets.stored()
        nearest, nearest_heldout, nearest_copy = map(NeighbourSearch, (samples, heldout, samples))
        positions = torch.arange(len(train))
        for rows in tqdm(positions.split(train.per_block), desc="find neighbours", delay=2):
            block = train[rows]
            references = torch.cat([block, block.flip(-1)])
            where = torch.cat([rows, rows + len(train)])
            nearest.add(references, where)
            nearest_heldout.add(references, where)
            # A sample of a memorised image has the tokenizer's error: it is a copy of the
            # reconstruction.
            _, reconstructed = self.tokenizer.reconstruct(references)
            nearest_copy.add(rounded(reconstructed), where)

        single = len(sets.sample_labels.unique()) == 1  # as of an unconditional prior
        each = SHOWN_PER_CLASS * (SHOWN_CLASSES if single else 1)
        shown = first_of_each(sets.sample_labels, each)
        found = nearest.indices[shown]
        mirrored = (found >= len(train))[:, None, None, None]
        originals = train[found % len(train)]
        neighbours = torch.where(mirrored, originals.flip(-1), originals)
        pairs = torch.cat([samples[shown], neighbours])
        names = ("sample", "nearest training picture")
        save_png(grid, image_grid(pairs, columns=len(shown), row_labels=names, scale=2))

        scale = (2 / 255) * train.values_per_picture**0.5  # Euclidean -> grey levels per value
        protocol = {
            **protocol,
            "distance": "root mean square over pixels, in grey levels of 255",
            "references": f"{len(train)} training pictures and their mirror images",
        }
        copy_protocol = {
            **protocol,
            "threshold": NEAR_COPY,
            "references": f"reconstructions of {2 * len(train)}",
        }
        copies = (nearest_copy.distances / scale < NEAR_COPY).double().mean().item()
        of_samples, of_heldout = (
            (found.distances / scale).mean().item() for found in (nearest, nearest_heldout)
        )
        return {
            "nearest_training_distance_samples": Metric(of_samples, protocol),
            "nearest_training_distance_heldout": Metric(of_heldout, protocol),
            "share_of_near_copies": Metric(copies, copy_protocol),
        }
