"""Measure a saved pipeline: reconstruction, samples, and how near they are to training pictures.

smalti evaluate --model runs/demo/pipeline --data emoji --output_dir runs/demo/evaluation
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm.auto import tqdm

from smalti.cli import parse_config, run_command
from smalti.data.image_io import image_grid, save_png
from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.evaluation.classifier import ImageClassifier, train_classifier
from smalti.evaluation.codebook import code_counts
from smalti.evaluation.features import (
    AlexNetFeatures,
    EfficientNetFeatures,
    FeatureExtractor,
    find_efficientnet,
)
from smalti.evaluation.neighbours import nearest_neighbours
from smalti.evaluation.protocol import Metric, write_summary
from smalti.evaluation.reconstruction import rounded
from smalti.evaluation.samples import (
    PictureSets,
    classifier_metrics,
    codebook_metrics,
    distance_metrics,
    reconstruction_metrics,
)
from smalti.pipelines.generation import class_grid, picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.scripts.options import DataOptions
from smalti.tokenizer.perceptual import LPIPS
from smalti.training.precision import resolve_precision
from smalti.training.seeding import generator

NEIGHBOURS_PER_CLASS = 2  # samples shown beside their nearest training pictures
SHOWN_RECONSTRUCTIONS = 12
CLASSIFIER_BATCH = 128


@dataclass(frozen=True)
class EvaluateConfig(DataOptions):
    """Measure a saved pipeline on held-out pictures and on fresh samples."""

    model: str = "runs/demo/pipeline"
    output_dir: Path = Path("runs/evaluation")
    num_samples: int = 1024  # classes in the proportions of the training pictures
    guidance_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 128
    # Networks behind Frechet distance and KID; efflite0 needs smalti[eval] or --feature_weights.
    features: tuple[Literal["alexnet", "efflite0"], ...] = ("alexnet",)
    feature_weights: Path | None = None  # EfficientNet-Lite0; found by itself if installed
    classifier_epochs: int = 12

    def __post_init__(self) -> None:
        if self.num_samples < 16:
            raise SmaltiError(f"num_samples is {self.num_samples}; use at least 16")
        if self.batch_size < 1 or self.classifier_epochs < 1:
            raise SmaltiError("batch_size and classifier_epochs must be at least 1")


@dataclass
class Evaluation:
    """A pipeline and the pictures it is measured on."""

    config: EvaluateConfig
    pipeline: Pipeline
    train: torch.Tensor  # (N, 3, S, S) in [-1, 1]
    train_labels: torch.Tensor
    heldout: torch.Tensor
    heldout_labels: torch.Tensor
    lpips: LPIPS

    @classmethod
    def load(cls, config: EvaluateConfig) -> "Evaluation":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = Pipeline.from_pretrained(config.model, device=device)
        size = pipeline.tokenizer.image_size
        train, heldout = config.dataset("train", size), config.dataset("heldout", size)
        if train.classes != pipeline.classes:
            raise SmaltiError(
                f"{config.data} has the classes {', '.join(train.classes)}; the pipeline was "
                f"trained on {', '.join(pipeline.classes)}: give --data as in training"
            )
        if len(heldout) < 2:
            raise SmaltiError(
                f"{config.data} has {len(heldout)} held-out picture: evaluation needs at least 2; "
                "raise --heldout_fraction in every stage, or add pictures"
            )
        return cls(
            config,
            pipeline,
            train.all_images(),
            train.labels,
            heldout.all_images(),
            heldout.labels,
            LPIPS.from_embedded().to(device),
        )

    @property
    def protocol(self) -> dict[str, object]:
        """What every metric shares."""
        return {
            "data": self.config.data,
            "image_size": self.pipeline.tokenizer.image_size,
            "heldout_fraction": self.config.heldout_fraction,
            "split_seed": self.config.split_seed,
            "split": "heldout",
        }

    @property
    def sampling_protocol(self) -> dict[str, object]:
        """What every metric of samples shares."""
        config = self.config
        sampling = {"num_samples": config.num_samples, "seed": config.seed, **self.sampling}
        return {**self.protocol, "sampling": {**sampling, "labels": "as in the training pictures"}}

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of the pipeline."""
        names = ("guidance_scale", "temperature", "top_k", "top_p")
        return {name: getattr(self.config, name) for name in names}

    def seed(self, purpose: str) -> torch.Generator:
        return generator(self.config.seed, "evaluate", purpose)

    @torch.no_grad()
    def reconstruction(self, picture: Path) -> dict[str, Metric]:
        """Metrics on all held-out pictures; the first ones are shown above their originals."""
        tokenizer, latents, parts = self.pipeline.tokenizer, [], []
        for images in self.heldout.split(self.config.batch_size):
            latents.append(tokenizer.encode(images.to(self.pipeline.device)))
            parts.append(tokenizer.decode(latents[-1]).float().clamp(-1, 1).cpu())
        output = torch.cat(parts)
        spread = torch.linspace(0, len(output) - 1, min(SHOWN_RECONSTRUCTIONS, len(output))).long()
        both = torch.cat([self.heldout[spread], output[spread]])
        names = ("held-out original", "reconstruction")
        save_png(picture, image_grid(both, columns=len(spread), row_labels=names, scale=2))
        metrics = reconstruction_metrics(output, self.heldout, self.lpips, self.protocol)
        if isinstance(tokenizer.spec, CodeSpec):
            counts = code_counts(torch.cat(latents).cpu(), tokenizer.spec.vocab_size)
            metrics |= codebook_metrics(counts, self.protocol)
        return metrics

    def grid(self) -> Image.Image:
        """New pictures, a row per class."""
        return class_grid(self.pipeline, seed=self.config.seed, **self.sampling)

    def sample(self) -> PictureSets:
        """Fresh samples; picture i comes from its own generator."""
        config = self.config
        rows = torch.linspace(0, len(self.train_labels) - 1, config.num_samples).long()
        labels = self.train_labels.sort().values[rows]
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

    def classifier(self) -> ImageClassifier:
        """Trained on the real training pictures alone."""
        config = self.config
        steps = config.classifier_epochs * -(-len(self.train) // CLASSIFIER_BATCH)
        precision = resolve_precision("auto", self.pipeline.device)
        with tqdm(total=steps, desc="train the judging classifier") as bar:
            return train_classifier(
                self.train,
                self.train_labels,
                len(self.pipeline.classes),
                generator=self.seed("classifier"),
                epochs=config.classifier_epochs,
                batch_size=CLASSIFIER_BATCH,
                device=self.pipeline.device,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
                progress=bar.update,
            )

    def neighbours(self, sets: PictureSets, picture: Path) -> dict[str, Metric]:
        """Distance to the nearest training picture, mirrored ones included; some are shown."""
        references = torch.cat([self.train, self.train.flip(-1)])
        found = nearest_neighbours(rounded(sets.samples), references)
        other = nearest_neighbours(self.heldout, references)
        shown = self._shown(sets.sample_labels)
        columns = torch.cat([sets.samples[shown], references[found.indices[shown]]])
        names = ("sample", "nearest training picture")
        save_png(picture, image_grid(columns, columns=len(shown), row_labels=names, scale=2))
        scale = (2 / 255) * self.train[0].numel() ** 0.5  # Euclidean -> grey levels per value
        protocol = {
            **self.sampling_protocol,
            "distance": "root mean square over pixels, in grey levels of 255",
            "references": "training pictures and their mirror images",
        }
        values = {"samples": found.distances / scale, "heldout": other.distances / scale}
        metrics = {
            f"nearest_training_distance_{k}": Metric(v.mean().item(), protocol)
            for k, v in values.items()
        }
        copies = (values["samples"] < 2.0).double().mean().item()
        metrics["share_of_near_copies"] = Metric(copies, {**protocol, "threshold": 2.0})
        return metrics

    def _shown(self, labels: torch.Tensor) -> torch.Tensor:
        """The first samples of each class."""
        classes = labels.unique()[:12]
        return torch.cat(
            [(labels == c).nonzero().flatten()[:NEIGHBOURS_PER_CLASS] for c in classes]
        )

    def extractors(self) -> list[FeatureExtractor]:
        """The networks named by `features`."""
        found: list[FeatureExtractor] = []
        if "alexnet" in self.config.features:
            found.append(AlexNetFeatures(self.lpips))
        if "efflite0" in self.config.features:
            weights = find_efficientnet(self.config.feature_weights)
            found.append(EfficientNetFeatures(weights, self.pipeline.device))
        return found


def evaluate(config: EvaluateConfig) -> dict[str, Metric]:
    """Measure; write samples.png, reconstructions.png, neighbours.png and summary.json.

    Returns:
        The metrics by name.
    """
    evaluation = Evaluation.load(config)
    extractors = evaluation.extractors()
    folder = config.output_dir
    save_png(folder / "samples.png", evaluation.grid())
    metrics = evaluation.reconstruction(folder / "reconstructions.png")
    sets = evaluation.sample()
    metrics |= evaluation.neighbours(sets, folder / "neighbours.png")
    for extractor in extractors:
        protocol = evaluation.sampling_protocol
        metrics |= distance_metrics(sets, extractor, protocol, evaluation.seed)
    metrics |= classifier_metrics(sets, evaluation.classifier(), evaluation.sampling_protocol)
    pipeline = evaluation.pipeline
    write_summary(
        folder / "summary.json",
        metrics,
        tokenizer=pipeline.tokenizer.fingerprint,
        prior=pipeline.prior.fingerprint,
    )
    return metrics


def table(metrics: dict[str, Metric]) -> str:
    """The metrics, one per line."""
    width = max(map(len, metrics))
    return "\n".join(f"{name:{width}}  {metric.value:10.4f}" for name, metric in metrics.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti evaluate`."""
    config = parse_config(EvaluateConfig, argv, prog="smalti evaluate")
    print(table(evaluate(config)))
    print(f"summary: {config.output_dir / 'summary.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
