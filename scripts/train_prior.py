"""Stage two: train a prior on cached latents; save it with its tokenizer as a pipeline.

smalti train-prior --latents runs/latents --tokenizer runs/tokenizer/tokenizer
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from smalti.cli import parse_config, run_command
from smalti.data.cache import LatentBatch, LatentCache
from smalti.data.image_io import save_png
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.errors import SmaltiError
from smalti.pipelines.generation import class_grid
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Loss, Prior
from smalti.prior.next_token import PRESETS, NextTokenConfig
from smalti.tokenizer.base import Tokenizer
from smalti.training.checkpoint import OptimizerState
from smalti.training.config import RunConfig
from smalti.training.ema import EMA
from smalti.training.log import mean_of
from smalti.training.run import Run

VALIDATION_SAMPLES = 1024
FITTED = ("spec", "num_classes", "tokenizer_fingerprint")  # what the latents decide of a prior


@dataclass(frozen=True)
class TrainPriorConfig(RunConfig):
    """Train a prior, a distribution over latents given a class; save a pipeline."""

    PRESETS: ClassVar[dict[str, Any]] = {"prior": PRESETS}

    output_dir: Path = Path("runs/prior")
    latents: Path = Path("runs/latents")  # folder written by `smalti encode`
    tokenizer: Path = Path("runs/tokenizer/tokenizer")  # the one that made the latents
    pipeline_dir: Path | None = None  # where the result goes; default: output_dir/pipeline
    # Its latents, number of classes and tokenizer fingerprint are taken from the cache.
    prior: NextTokenConfig = field(default_factory=lambda: PRESETS["gpt-nano"])
    preview_guidance_scale: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = type(self.prior)()
        for name in FITTED:
            value = getattr(self.prior, name)
            if value != getattr(defaults, name):
                raise SmaltiError(
                    f"prior.{name} is {value}, but it is taken from the latents: leave it out"
                )


class Stage:
    """The prior and one optimizer step of it."""

    def __init__(self, run: Run, config: TrainPriorConfig, latents: LatentCache) -> None:
        torch.manual_seed(config.seed)
        self.run, self.config = run, config
        self.tokenizer = Tokenizer.from_pretrained(str(config.tokenizer)).to(run.device)
        if self.tokenizer.fingerprint != latents.info.tokenizer_fingerprint:
            raise SmaltiError(
                f"the latents in {config.latents} were made by another tokenizer than "
                f"{config.tokenizer}: encode again, or give the tokenizer that made them"
            )
        fitted = config.prior.fitted(
            latents.spec, latents.num_classes, latents.info.tokenizer_fingerprint
        )
        self.prior: Prior = Prior.registry.build(fitted).to(run.device)
        self.optimizer = run.adamw(self.prior)
        self.ema = EMA(self.prior, config.ema_decay)
        run.track(model=self.prior, ema=self.ema, optimizer=OptimizerState(self.optimizer))
        self.wrapped = run.accelerator.prepare(self.prior)
        self.pipeline = Pipeline(self.tokenizer, self.ema.model, latents.classes)
        self.pipeline.training_pictures = latents.info.dataset_fingerprint

    def train_step(self, micro_batches: list[LatentBatch], step: int) -> dict[str, torch.Tensor]:
        """One optimizer step; returns losses for the log."""
        self.wrapped.train()
        parts = []
        for index, batch in enumerate(micro_batches):
            with self.run.micro_batch(index, self.wrapped):
                loss = self.loss(self.wrapped, batch)
                self.run.backward(loss.total)
            parts.append({"loss": loss.total.detach(), **loss.parts})
        norm = self.run.apply(self.optimizer, self.prior, step)
        if self.run.count_step(norm, step):
            self.ema.update(self.prior)
        return {**mean_of(parts), "gradient_norm": torch.tensor(norm)}

    def loss(self, prior: torch.nn.Module, batch: LatentBatch) -> Loss:
        """The loss of one batch under a prior, wrapped or not."""
        latents = self.tokenizer.latents(batch.stored.to(self.run.device))
        return prior(latents, batch.labels.to(self.run.device))

    @torch.no_grad()
    def validate(self, heldout: LatentCache) -> dict[str, float]:
        """Loss of the EMA weights on the first held-out latents."""
        count = min(len(heldout), VALIDATION_SAMPLES)
        total = 0.0
        for start in range(0, count, 128):
            batch = heldout.first_view(range(start, min(start + 128, count)))
            with self.run.accelerator.autocast():
                loss = self.loss(self.ema.model, batch).total
            total += loss.item() * len(batch.labels)
        return {"val_loss": total / count}

    def preview(self) -> Image.Image:
        """A grid of samples, a row per class."""
        return class_grid(self.pipeline, guidance_scale=self.config.preview_guidance_scale)

    def save_pipeline(self, folder: Path) -> None:
        """Tokenizer and EMA weights of the prior, as `Pipeline.from_pretrained` reads them."""
        self.pipeline.save_pretrained(folder, samples=self.preview())


def train(config: TrainPriorConfig) -> Path:
    """Train, and return the folder of the finished pipeline (EMA weights)."""
    result = config.pipeline_dir or config.output_dir / "pipeline"
    run = Run(config, kind="train-prior", result=result)
    latents = LatentCache(config.latents / "train", seed=config.seed)
    heldout = LatentCache(config.latents / "heldout")
    stage = Stage(run, config, latents)
    run.resume(latents.fingerprint)
    batches = stream_batches(
        latents,
        DataOrder(len(latents), config.train_batch_size, config.seed),
        start_step=run.start_step,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        micro_batches=config.gradient_accumulation_steps,
        num_workers=config.dataloader_num_workers,
    )
    for step in run.steps():
        parts = stage.train_step(next(batches), step)
        if run.due(step, config.logging_steps):
            run.log(step, {**parts, "learning_rate": run.learning_rate(step)})
        if run.due(step, config.validation_steps) and run.accelerator.is_main_process:
            run.log_alone(step, stage.validate(heldout))
            picture = run.folder / "samples" / f"step_{step + 1:06d}.png"
            save_png(picture, stage.preview())
    return run.export(stage.save_pipeline)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti train-prior`."""
    folder = train(parse_config(TrainPriorConfig, argv, prog="smalti train-prior"))
    print(f"pipeline: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
