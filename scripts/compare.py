"""Several tokenizers or pipelines side by side: one table of quality, speed and size, one grid.

    smalti compare runs/a/pipeline runs/b/pipeline --data emoji --output_dir runs/comparison
    smalti compare runs/kl/tokenizer runs/vq/tokenizer --data emoji

The folder holds comparison.md and comparison.html (the table and the grid), comparison.json (every
value), the grid (samples.png of pipelines, with the same classes or prompts and seeds for each of
them, or reconstructions.png of tokenizers), and the evaluation of each model in a folder of its
name. After an interruption, the same command continues with the models that were not measured.
"""

import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Annotated, Any, ClassVar

import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from tyro.conf import Positional, arg

from smalti.cli import parse_config, run_command
from smalti.config import check_at_least
from smalti.data.dataset import DataOptions
from smalti.data.image_io import image_grid, save_png
from smalti.data.latents import resolution
from smalti.errors import ConfigurationError, DataError
from smalti.evaluation.metrics import Metric
from smalti.files import read_hashed_json, write_hashed_json, write_text
from smalti.hub import CONFIG
from smalti.pipelines.conditions import arguments_for, check_options
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.model_index import INDEX
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.scripts.evaluate import EvaluateConfig, claim, evaluate
from smalti.scripts.options import Sampling
from smalti.scripts.pages import html_table, markdown, page
from smalti.tokenizer.base import Tokenizer
from smalti.training.processes import fills_folder

QUALITY = {  # metric in summary.json: heading and format
    "fd_alexnet": ("Frechet distance, AlexNet", ".1f"),
    "fd_efflite0": ("Frechet distance, EfficientNet", ".1f"),
    "classifier_accuracy_ratio": ("classifier, samples / held-out", ".2f"),
    "retrieval_accuracy_samples": ("caption retrieval", ".3f"),
    "heldout_bits_per_dimension": ("held-out bits per dimension", ".2f"),
    "share_of_near_copies": ("near copies", ".2%"),
    "bits_per_pixel": ("bits/pixel", ".2f"),
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "lpips": ("LPIPS", ".4f"),
    "codebook_usage": ("codebook usage", ".1%"),
}
OF_TOKENIZERS = ("bits_per_pixel", "psnr", "ssim", "lpips", "codebook_usage")
GRID_ROWS = 12  # classes or prompts, or pictures of tokenizers
POLL = 0.005  # seconds between two looks at the memory of the process


@dataclass(frozen=True)
class CompareConfig(DataOptions, Sampling):
    """Compare tokenizers or pipelines: quality, speed, size and memory, and what they make.

    Sampling options are for all pipelines; without one, each pipeline has its own default.
    """

    models: Positional[
        Annotated[
            tuple[Annotated[str, arg(metavar="MODEL")], ...],
            place_of("Tokenizers or pipelines, each", "a folder (also of a run or demo)"),
        ]
    ] = ()
    output_dir: Path = Path("runs/comparison")  # continues a comparison in it
    names: tuple[str, ...] = ()  # of the models, in their order; default: from their paths
    # Allow data that a pipeline was not trained on; then all of its images are held out.
    other_data: bool = False
    num_samples: int = 1024  # of each pipeline, with the class proportions of the training images
    num_references: int = 20_000  # at most this many training images, evenly spaced
    seed: int = 0  # of the samples, the classifier, and the random subsets of metrics
    batch_size: int = 128  # images encoded, decoded or sampled at once in the evaluation
    features: tuple[str, ...] = ("alexnet",)  # networks, as of smalti evaluate
    feature_weights: Path | None = None  # weight file of efflite0, as of smalti evaluate
    classifier_epochs: int = 12  # of training the classifier, as of smalti evaluate
    timed_images: int = 64  # images of a timed batch
    rounds: int = 3  # timed batches of each model, in turn with the others; the median counts
    columns: int = 4  # samples of each pipeline in a row of the grid

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "timed_images", "rounds", "columns")
        if self.names and len(self.names) != len(self.models):
            raise ConfigurationError(
                f"{len(self.names)} names were given for {len(self.models)} models: give one each"
            )
        names = self.names or tuple(map(short_name, self.models))
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigurationError(
                f"two models have the name {twice}: give one for each with --names"
            )

    def evaluation(self, name: str, model: str) -> EvaluateConfig:
        """The evaluation of one model."""
        ours = {part.name: getattr(self, part.name) for part in fields(self)}
        shared = {
            part.name: ours[part.name] for part in fields(EvaluateConfig) if part.name in ours
        }
        return EvaluateConfig(**{**shared, "model": model, "output_dir": self.output_dir / name})


def short_name(model: str) -> str:
    """A name for a model: the folder of its run, as in runs/NAME/pipeline, or its own."""
    parts = [part for part in Path(model).parts if part not in ("/", "..")]
    while len(parts) > 1 and parts[-1] in ("pipeline", "tokenizer", "prior"):
        parts.pop()
    return parts[-1] if parts else model


def located(model: str) -> str:
    """The pipeline, or else the tokenizer, in the folder of a run or a demo; other paths as they
    are."""
    folder = Path(model)
    inside = (folder / "pipeline" / INDEX, folder / "tokenizer" / CONFIG)
    if (folder / INDEX).is_file() or (folder / CONFIG).is_file():
        return model
    return next((str(file.parent) for file in inside if file.is_file()), model)


# -------------------------------------------------------------------------------------------------
# What is compared


class Candidate(ABC):
    """A model with its measurements."""

    GRID: ClassVar[str]  # file of the grid
    COLUMNS: ClassVar[tuple[str, ...]]  # of the table, among QUALITY

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.metrics: dict[str, Metric] = {}
        self.seconds: list[float] = []  # of each timed batch
        self.memory = 0  # bytes that the fullest batch needed beside the model

    @property
    @abstractmethod
    def parts(self) -> list[Tokenizer | Prior]:
        """The networks; the last one names the kind."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def make(self, task: "Task", count: int) -> Tensor:
        """The first `count` images of the task, (count, C, H, W) in [-1, 1]."""

    def claimed(self, config: EvaluateConfig) -> EvaluateConfig:
        """The evaluation as its folder records it."""
        return config

    @property
    def device(self) -> torch.device:
        return next(self.tokenizer.parameters()).device

    def evaluate(self, config: EvaluateConfig) -> None:
        """Take the metrics of the summary in its folder, or else measure them."""
        summary = config.output_dir / "summary.json"
        if summary.is_file():
            claim(self.claimed(config), *(part.fingerprint for part in self.parts))
            stored = read_hashed_json(summary)["metrics"]
            self.metrics = {name: Metric(**metric) for name, metric in stored.items()}
        else:
            self.metrics = evaluate(config)

    def time(self, task: "Task", count: int) -> None:
        """Time one more batch."""
        with peak_memory(self.device) as peak:
            started = time.perf_counter()
            self.make(task, count)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - started)
        self.memory = max(self.memory, peak[0])

    def row(self, images: int) -> dict[str, str]:
        """Its row of the table.

        Args:
            images: of a timed batch.
        """
        kind = self.parts[-1]
        parameters = [p for part in self.parts for p in part.parameters()]
        held = sum(p.numel() * p.element_size() for p in parameters)
        return {
            "model": self.name,
            "kind": kind.registry.name_of(type(kind)),
            "latents": self.tokenizer.spec.in_words,
            "parameters": f"{sum(p.numel() for p in parameters) / 1e6:.1f} M",
            **self.qualities(),
            "seconds per picture": f"{statistics.median(self.seconds) / images:.4f}",
            "memory, MB": f"{held / 1e6:.0f} + {self.memory / 1e6:.0f}",
        }

    def qualities(self) -> dict[str, str]:
        """Heading -> value of its metrics in the table."""
        return {
            QUALITY[name][0]: format(self.metrics[name].value, QUALITY[name][1])
            for name in self.COLUMNS
            if name in self.metrics
        }

    def record(self) -> dict[str, Any]:
        """What comparison.json says of it."""
        return {
            "model": self.path,
            "fingerprints": [part.fingerprint for part in self.parts],
            "seconds": self.seconds,
            "peak_memory_bytes": self.memory,
            "device": str(self.device),
            "metrics": {name: metric.value for name, metric in self.metrics.items()},
        }


class TokenizerCandidate(Candidate):
    """A tokenizer, which reconstructs held-out pictures."""

    GRID = "reconstructions.png"
    COLUMNS = OF_TOKENIZERS

    def __init__(self, name: str, path: str, model: Tokenizer) -> None:
        super().__init__(name, path)
        self.model = model

    @property
    def parts(self) -> list[Tokenizer | Prior]:
        return [self.model]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model

    def make(self, task: "Task", count: int) -> Tensor:
        """Reconstructions; after the last image, the first follows."""
        originals = task.originals[torch.arange(count) % len(task.originals)]
        return self.model.reconstruct(originals.to(self.device)).cpu()


class PipelineCandidate(Candidate):
    """A pipeline, which makes samples."""

    GRID = "samples.png"
    COLUMNS = tuple(name for name in QUALITY if name not in OF_TOKENIZERS)

    def __init__(self, name: str, path: str, model: Pipeline) -> None:
        super().__init__(name, path)
        self.model = model
        self.evaluations, self.options = 0, dict[str, Any]()

    @property
    def parts(self) -> list[Tokenizer | Prior]:
        return [self.model.tokenizer, self.model.prior]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    def claimed(self, config: EvaluateConfig) -> EvaluateConfig:
        return config.guided_like(self.model)

    def make(self, task: "Task", count: int) -> Tensor:
        """Samples; image i has the same seed in every pipeline."""
        self.options = task.options
        with counted(self.model.prior) as calls:
            output = self.model(
                **task.given_to(self.model, count),
                generator=[picture_generator(task.seed, i) for i in range(count)],
                output_type="pt",
                **task.options,
            )
        self.evaluations = calls[0]
        return output.images * 2 - 1

    def qualities(self) -> dict[str, str]:
        """Also the Frechet distances in the features of other networks."""
        ends = ("_heldout", "_floor")
        others = (n for n in self.metrics if n.startswith("fd_") and not n.endswith(ends))
        distances = {
            f"Frechet distance, {name.removeprefix('fd_')}": f"{self.metrics[name].value:.1f}"
            for name in others
            if name not in QUALITY
        }
        return distances | super().qualities()

    def row(self, images: int) -> dict[str, str]:
        row = super().row(images)
        seconds, memory = row.pop("seconds per picture"), row.pop("memory, MB")
        costs = {"seconds per picture": seconds, "memory, MB": memory}
        return {**row, "evaluations": str(self.evaluations), **costs}

    def record(self) -> dict[str, Any]:
        return {
            **super().record(),
            "evaluations": self.evaluations,
            "sampling": self.model.sampling_options(self.options),
        }


@dataclass(frozen=True)
class Task:
    """What all models are asked to make."""

    originals: Tensor  # held-out images (N, C, H, W) in [-1, 1], for tokenizers
    labels: list[int]  # of the samples of a grid; zeros without classes
    prompts: list[str]  # of the same samples; empty without prompts
    names: list[str]  # of the rows of the grid; empty if they have none
    seed: int
    options: dict[str, Any]  # of sampling

    @classmethod
    def of(cls, candidates: Sequence[Candidate], config: "CompareConfig") -> "Task":
        """The first classes, or the captions of some held-out images, in rows of the grid."""
        pipelines = [one.model for one in candidates if isinstance(one, PipelineCandidate)]
        first = candidates[0].tokenizer
        heldout = config.dataset("heldout", first.image_size, channels=first.image_channels)
        wanted = GRID_ROWS if pipelines else max(GRID_ROWS, config.timed_images)
        chosen = heldout.even_subset(wanted, config.seed)
        classes = next((pipeline.classes for pipeline in pipelines if pipeline.classes), ())
        texts: list[str] = []
        if any("text" in pipeline.prior.condition_kinds for pipeline in pipelines):
            heldout.source.require_captions()
            texts = [heldout.captions(row)[0] for row in chosen]
        names = texts or list(classes[:GRID_ROWS])
        rows = range(len(names) or GRID_ROWS)
        return cls(
            torch.cat([batch.images for batch in heldout.batches_of(chosen, 64)]),
            [row % max(len(classes), 1) for row in rows for _ in range(config.columns)],
            [text for text in texts for _ in range(config.columns)],
            names,
            config.seed,
            config.options,
        )

    def given_to(self, pipeline: Pipeline, count: int) -> dict[str, Any]:
        """The arguments of a pipeline for `count` images; after the last one, the first follows."""
        chosen = [i % len(self.labels) for i in range(count)]
        takes_prompts = "text" in pipeline.prior.condition_kinds
        prompts = [self.prompts[i] for i in chosen] if takes_prompts else ()
        return arguments_for(pipeline.classes, [self.labels[i] for i in chosen], prompts)


def candidate(name: str, path: str) -> Candidate:
    """The pipeline or the tokenizer in a folder or a repository.

    Raises:
        SmaltiError: neither can be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (Path(path) / CONFIG).is_file():
        return TokenizerCandidate(name, path, Tokenizer.from_pretrained(path).to(device))
    return PipelineCandidate(name, path, Pipeline.from_pretrained(path, device=device))


def check_comparable(candidates: Sequence[Candidate], config: "CompareConfig") -> None:
    """Raise `SmaltiError` unless the models do the same with the same images."""
    first, *others = candidates
    for other in others:
        if type(other) is not type(first):
            raise ConfigurationError(
                f"{first.name} and {other.name} are a pipeline and a tokenizer: compare pipelines "
                "with pipelines; the tokenizer of one is in its folder tokenizer"
            )
        ours, theirs = (
            (resolution(one.tokenizer.image_size), one.tokenizer.image_channels)
            for one in (first, other)
        )
        if ours != theirs:
            raise ConfigurationError(
                f"{first.name} has images of {ours[0]} with {ours[1]} channels, and {other.name} "
                f"of {theirs[0]} with {theirs[1]}: compare models of the same images"
            )
    pipelines = [one for one in candidates if isinstance(one, PipelineCandidate)]
    named = [one for one in pipelines if one.model.classes]
    for other in named[1:]:
        if other.model.classes != named[0].model.classes:
            raise DataError(
                f"{named[0].name} and {other.name} have different classes: compare pipelines of "
                "the same pictures"
            )
    for one in pipelines:
        if "image" in one.model.prior.condition_kinds:
            raise ConfigurationError(
                f"{one.name} makes pictures of given ones: measure it with smalti evaluate, and "
                "compare the others"
            )
        check_options(one.model.prior, config.options)


# -------------------------------------------------------------------------------------------------
# Memory and evaluations of the network


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list whose entry becomes the bytes that the block needed at most, beyond those that it
    found: of CUDA memory, or else of the resident memory of the process."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(POLL):
            found[0] = max(found[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def first_block(prior: Prior) -> nn.Module:
    """The first transformer block: it runs once in every evaluation of the network."""
    stacks = [module for module in prior.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))[0]


@contextmanager
def counted(prior: Prior) -> Iterator[list[int]]:
    """A list whose entry is the number of evaluations of the network in the block. With guidance,
    each is of two rows for an image."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    handle = first_block(prior).register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


# -------------------------------------------------------------------------------------------------
# The comparison


@fills_folder(deep=True)
def compare(config: CompareConfig) -> list[dict[str, str]]:
    """Measure every model, and write the table and the grid.

    Returns:
        The rows of the table: heading -> text.

    Raises:
        SmaltiError: a model cannot be loaded; tokenizers and pipelines are mixed, or models of
            images of different sizes or classes.
    """
    if len(config.models) < 2:
        raise ConfigurationError(
            f"{len(config.models)} models were given: give at least two folders, as in smalti "
            "compare runs/a/pipeline runs/b/pipeline"
        )
    names = config.names or tuple(map(short_name, config.models))
    paths = map(located, config.models)
    candidates = [candidate(name, path) for name, path in zip(names, paths, strict=True)]
    check_comparable(candidates, config)
    for one in candidates:
        one.evaluate(config.evaluation(one.name, one.path))
    task = Task.of(candidates, config)
    for _ in range(config.rounds):
        for one in candidates:
            one.time(task, config.timed_images)
    grid = candidates[0].GRID
    save_png(config.output_dir / grid, side_by_side(candidates, task, config.columns))
    rows = [one.row(config.timed_images) for one in candidates]
    write_text(
        config.output_dir / "comparison.md", f"{markdown(rows)}\n\n![{grid}]({grid})\n\n{NOTE}\n"
    )
    shown = f'<p>{escape(NOTE)}</p>\n<img src="{grid}" alt="the models side by side">\n'
    write_text(
        config.output_dir / "comparison.html", page("comparison", f"{html_table(rows)}{shown}")
    )
    write_hashed_json(
        config.output_dir / "comparison.json",
        {"images_per_batch": config.timed_images, **{one.name: one.record() for one in candidates}},
    )
    return rows


def side_by_side(candidates: Sequence[Candidate], task: Task, columns: int) -> Image.Image:
    """Of pipelines, a row for each class or prompt, with `columns` images of each pipeline; of
    tokenizers, a row for each image, with its reconstructions."""
    names = [one.name for one in candidates]
    if isinstance(candidates[0], TokenizerCandidate):
        shown = task.originals[:GRID_ROWS]
        made = [shown, *(one.make(task, len(shown)) for one in candidates)]
        images = torch.stack(made, 1).flatten(0, 1)
        return image_grid(images, len(made), column_labels=["original", *names], scale=2)
    made = [one.make(task, len(task.labels)).unflatten(0, (-1, columns)) for one in candidates]
    images = torch.cat(made, 1).flatten(0, 1)  # (rows x all columns, C, H, W), row by row
    per_row = columns * len(candidates)
    return image_grid(images, per_row, row_labels=task.names, column_labels=names, scale=2)


NOTE = (
    "Seconds are the median of batches timed in turn. Memory is that of the weights, and what the "
    "fullest batch needed beside them. With guidance, each evaluation of the network is of two "
    "rows for a picture."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti compare`."""
    config = parse_config(CompareConfig, argv, prog="smalti compare")
    print(f"\n{markdown(compare(config))}\n\n{config.output_dir / 'comparison.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
