"""The measurements behind `smalti evaluate`: of a tokenizer, and of a pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from smalti.data.dataset import ImageDataset
from smalti.data.image_io import image_grid, save_png
from smalti.data.latents import CodeSpec, rounded
from smalti.errors import SmaltiError
from smalti.evaluation.classifier import ImageClassifier, train_classifier
from smalti.evaluation.features import (
    AlexNetFeatures,
    EfficientNetFeatures,
    FeatureExtractor,
    find_efficientnet,
)
from smalti.evaluation.neighbours import nearest_neighbours
from smalti.evaluation.protocol import Metric
from smalti.evaluation.reconstruction import code_counts
from smalti.evaluation.samples import (
    PictureSets,
    classifier_metrics,
    codebook_metrics,
    distance_metrics,
    reconstruction_metrics,
)
from smalti.pipelines.generation import class_grid, picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.randomness import generator
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.losses.perceptual import LPIPS
from smalti.training.processes import resolve_precision

if TYPE_CHECKING:
    from smalti.scripts.evaluate import EvaluateConfig

NEIGHBOURS_PER_CLASS = 2  # samples shown beside their nearest training pictures
SHOWN_RECONSTRUCTIONS = 12
BATCH = 128  # of measurements that depend on it: the judging classifier's training, likelihoods
LIKELIHOOD_PICTURES = 128
NEAR_COPY = 2.0  # grey levels


class TokenizerEvaluation:
    """A tokenizer and the held-out pictures it is measured on."""

    def __init__(self, config: "EvaluateConfig", tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.device = next(tokenizer.parameters()).device
        dataset = config.dataset("heldout", tokenizer.image_size)
        if len(dataset) < 2:
            raise SmaltiError(
                f"{config.data} has {len(dataset)} held-out picture: evaluation needs at least 2; "
                "raise --heldout_fraction in every stage, or add pictures"
            )
        self.heldout, self.heldout_labels = dataset.all_images(), dataset.labels
        self.fingerprint = dataset.fingerprint
        self.lpips = LPIPS.from_embedded().to(self.device)

    @classmethod
    def load(cls, config: "EvaluateConfig", folder: Path) -> Self:
        """From a tokenizer's folder."""
        return cls(config, Tokenizer.from_pretrained(folder).to(best_device()).eval())

    @property
    def protocol(self) -> dict[str, object]:
        """What every metric shares."""
        return {
            "data": self.config.data,
            "image_size": self.tokenizer.image_size,
            "heldout_fraction": self.config.heldout_fraction,
            "split_seed": self.config.split_seed,
            "split": "heldout",
            "heldout_fingerprint": self.fingerprint,
        }

    @torch.no_grad()
    def reconstruction(self, picture: Path) -> dict[str, Metric]:
        """Metrics on all held-out pictures; some are shown above their reconstructions."""
        latents, output = self.round_trip(self.heldout)
        evenly_spaced = torch.linspace(
            0, len(output) - 1, min(SHOWN_RECONSTRUCTIONS, len(output))
        ).long()
        both = torch.cat([self.heldout[evenly_spaced], output[evenly_spaced]])
        names = ("held-out original", "reconstruction")
        save_png(picture, image_grid(both, columns=len(evenly_spaced), row_labels=names, scale=2))
        metrics = reconstruction_metrics(output, self.heldout, self.lpips, self.protocol)
        spec = self.tokenizer.spec
        if isinstance(spec, CodeSpec):
            counts = code_counts(latents, spec.vocab_size)
            pixels = self.tokenizer.image_size**2
            metrics |= codebook_metrics(counts, spec.length, pixels, self.protocol)
        return metrics

    @torch.no_grad()
    def round_trip(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of images (N, 3, S, S), and the images that they give back."""
        latents, parts = [], []
        for batch in images.split(self.config.batch_size):
            latents.append(self.tokenizer.encode(batch.to(self.device)))
            parts.append(self.tokenizer.decode(latents[-1]).float().clamp(-1, 1).cpu())
        return torch.cat(latents).cpu(), torch.cat(parts)


class PipelineEvaluation(TokenizerEvaluation):
    """A pipeline, and the pictures that its samples are held against."""

    def __init__(self, config: "EvaluateConfig", pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        train = config.dataset("train", pipeline.tokenizer.image_size)
        if train.classes != pipeline.classes:
            raise SmaltiError(
                f"{config.data} has the classes {', '.join(train.classes)}; the pipeline was "
                f"trained on {', '.join(pipeline.classes)}: give --data as in training"
            )
        known = pipeline.training_pictures
        if known and known != train.fingerprint and not config.other_data:
            raise SmaltiError(
                f"{config.data}, divided so, gives other training pictures than the pipeline's: "
                "what is held out here it may have learned; give --data, --heldout_fraction and "
                "--split_seed as in training, or --other_data"
            )
        self.saw_training = {"": "not known", train.fingerprint: "yes"}.get(known, "no")
        super().__init__(config, pipeline.tokenizer)
        self.class_counts = train.labels.bincount(minlength=len(train.classes))
        self.train, self.train_labels = evenly_spaced(train, config.num_references)

    @classmethod
    def load(cls, config: "EvaluateConfig", folder: Path) -> Self:
        """From a pipeline's folder."""
        return cls(config, Pipeline.from_pretrained(folder, device=best_device()))

    @property
    def protocol(self) -> dict[str, object]:
        """What every metric shares."""
        return {**super().protocol, "trained_on_the_rest": self.saw_training}

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of the pipeline."""
        return self.config.options

    @property
    def sampling_protocol(self) -> dict[str, object]:
        """What every metric of samples shares."""
        config = self.config
        sampling = {"num_samples": config.num_samples, "seed": config.seed, **self.sampling}
        return {**self.protocol, "sampling": {**sampling, "labels": "as in the training pictures"}}

    def seed(self, purpose: str) -> torch.Generator:
        """A generator for one purpose."""
        return generator(self.config.seed, "evaluate", purpose)

    def show(self, picture: Path) -> None:
        """New pictures, a row per class."""
        grid: Image.Image = class_grid(self.pipeline, seed=self.config.seed, **self.sampling)
        save_png(picture, grid)

    def sample(self) -> PictureSets:
        """Fresh samples; picture i comes from its own generator."""
        config = self.config
        everyone = torch.arange(len(self.class_counts)).repeat_interleave(self.class_counts)
        rows = torch.linspace(0, len(everyone) - 1, config.num_samples).long()
        labels = everyone[rows]
        output = self.pipeline(
            labels,
            generator=[picture_generator(config.seed, i) for i in range(len(labels))],
            batch_size=config.batch_size,
            output_type="pt",
            progress=True,
            **self.sampling,
        )
        samples = output.images * 2 - 1
        return PictureSets(samples, labels, self.heldout, self.heldout_labels, self.train)

    @torch.no_grad()
    def likelihood(self) -> dict[str, Metric]:
        """How well the prior foretells held-out latents of their class."""
        count = min(len(self.heldout), LIKELIHOOD_PICTURES)
        images, labels = self.heldout[:count], self.heldout_labels[:count]
        draws, prior = self.seed("posterior"), self.pipeline.prior
        bits = []
        for batch, classes in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            latents = self.tokenizer.encode(batch.to(self.device), generator=draws)
            probes = self.seed("likelihood")
            bits.append(
                prior.bits_per_dimension(latents, classes.to(self.device), generator=probes)
            )
        dimension = "a code" if isinstance(prior.spec, CodeSpec) else "a number; of a density"
        protocol = {**self.protocol, "dimension": dimension, "num_pictures": count}
        return {"heldout_bits_per_dimension": Metric(torch.cat(bits).mean().item(), protocol)}

    def distances(self, sets: PictureSets, extractor: FeatureExtractor) -> dict[str, Metric]:
        """Frechet distance and KID on the features of one network."""
        return distance_metrics(sets, extractor, self.sampling_protocol, self.seed)

    def classification(self, sets: PictureSets) -> dict[str, Metric]:
        """How often a classifier sees the class that was asked for."""
        return classifier_metrics(sets, self._classifier(), self.sampling_protocol)

    def _classifier(self) -> ImageClassifier:
        """Trained on the real training pictures alone."""
        config = self.config
        steps = config.classifier_epochs * -(-len(self.train) // BATCH)
        precision = resolve_precision("auto", self.device)
        with tqdm(total=steps, desc="train the judging classifier") as bar:
            return train_classifier(
                self.train,
                self.train_labels,
                len(self.pipeline.classes),
                generator=self.seed("classifier"),
                epochs=config.classifier_epochs,
                batch_size=BATCH,
                device=self.device,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
                progress=bar.update,
            )

    def neighbours(self, sets: PictureSets, picture: Path) -> dict[str, Metric]:
        """Distance to the nearest training picture, mirrored ones included; some are shown."""
        references = torch.cat([self.train, self.train.flip(-1)])
        found = nearest_neighbours(rounded(sets.samples), references)
        other = nearest_neighbours(self.heldout, references)
        shown = first_of_each(sets.sample_labels, NEIGHBOURS_PER_CLASS)
        columns = torch.cat([sets.samples[shown], references[found.indices[shown]]])
        names = ("sample", "nearest training picture")
        save_png(picture, image_grid(columns, columns=len(shown), row_labels=names, scale=2))
        scale = (2 / 255) * self.train[0].numel() ** 0.5  # Euclidean -> grey levels per value
        protocol = {
            **self.sampling_protocol,
            "distance": "root mean square over pixels, in grey levels of 255",
            "references": f"{len(self.train)} training pictures and their mirror images",
        }
        values = {"samples": found.distances / scale, "heldout": other.distances / scale}
        metrics = {
            f"nearest_training_distance_{k}": Metric(v.mean().item(), protocol)
            for k, v in values.items()
        }
        # A memorised picture comes back with the tokenizer's own error: it is a copy of the
        # reconstruction.
        _, known = self.round_trip(references)
        nearest = nearest_neighbours(rounded(sets.samples), rounded(known)).distances / scale
        copies = (nearest < NEAR_COPY).double().mean().item()
        about = {"threshold": NEAR_COPY, "references": f"reconstructions of {len(references)}"}
        metrics["share_of_near_copies"] = Metric(copies, {**protocol, **about})
        return metrics

    def extractors(self) -> list[FeatureExtractor]:
        """The networks named by `features`."""
        found: list[FeatureExtractor] = []
        if "alexnet" in self.config.features:
            found.append(AlexNetFeatures(self.lpips))
        if "efflite0" in self.config.features:
            weights = find_efficientnet(self.config.feature_weights)
            found.append(EfficientNetFeatures(weights, self.device))
        return found


def best_device() -> str:
    """Where to measure."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def evenly_spaced(dataset: ImageDataset, limit: int) -> tuple[Tensor, Tensor]:
    """At most `limit` pictures (N, 3, S, S), evenly spread over the set, and their labels (N,)."""
    if len(dataset) <= limit:
        return dataset.all_images(), dataset.labels
    rows = torch.linspace(0, len(dataset) - 1, limit).long()
    parts = [dataset.__getitems__([(0, i) for i in part.tolist()]) for part in rows.split(512)]
    return torch.cat([part.images for part in parts]), dataset.labels[rows]


def first_of_each(labels: Tensor, count: int, classes: int = 12) -> Tensor:
    """Positions of the first `count` samples of each of the first classes."""
    shown = labels.unique()[:classes]
    return torch.cat([(labels == c).nonzero().flatten()[:count] for c in shown])
