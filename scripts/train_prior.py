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
from smalti.config import first_difference
from smalti.data.image_io import save_png
from smalti.data.latent_cache.cache import LatentBatch, LatentCache
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.errors import SmaltiError
from smalti.pipelines.conditions import check_options
from smalti.pipelines.finetune import fitted_as, load_initial_weights, saved_prior
from smalti.pipelines.generation import class_grid
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Loss, Prior
from smalti.prior.flow.rectified import check_straight
from smalti.prior.presets import PRESETS, PriorConfig
from smalti.randomness import RandomInputs, generator
from smalti.scripts.options import Sampling
from smalti.tokenizer.base import Tokenizer
from smalti.training.checkpoint import OptimizerState
from smalti.training.config import RunConfig
from smalti.training.ema import EMA
from smalti.training.logging import mean_of
from smalti.training.processes import say
from smalti.training.run import Run, random_inputs_for, shares

VALIDATION_SAMPLES = 1024


@dataclass(frozen=True)
class TrainPriorConfig(RunConfig):
    """Train a prior, a distribution over latents given a class; save a pipeline."""

    PRESETS: ClassVar[dict[str, Any]] = {"prior": PRESETS}
    SAVED: ClassVar[dict[str, Any]] = {"prior": saved_prior}

    output_dir: Path = Path("runs/prior")
    latents: Path = Path("runs/latents")  # folder written by `smalti encode`
    tokenizer: Path = Path("runs/tokenizer/tokenizer")  # the one that made the latents
    pipeline_dir: Path | None = None  # where the result goes; default: output_dir/pipeline
    # What it says of latents, classes and the tokenizer is replaced by what the cache says.
    prior: PriorConfig = field(default_factory=lambda: PRESETS["gpt-nano"])
    initial: str = ""  # a pipeline or prior with whose settings and weights training begins
    preview: Sampling = field(default_factory=Sampling)  # of the grids of samples

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pipeline_dir == self.output_dir / "pipeline":  # the default, written out
            object.__setattr__(self, "pipeline_dir", None)
        given = first_difference(self.prior, fitted_as(self.prior, type(self.prior)()), "prior")
        if given:
            raise SmaltiError(
                f"{given.name} is {given.value}, but it is taken from the latents: leave it out"
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
        self.prior = build_prior(config.prior, latents, self.tokenizer).to(run.device)
        if config.initial:
            load_initial_weights(self.prior, config.initial)
        self.pairs = bool(latents.info.pairs)
        if self.pairs:
            check_straight(self.prior)
        check_options(self.prior, config.preview.options)
        self.optimizer = run.adamw(self.prior)
        self.ema = EMA(self.prior, config.ema_decay)
        run.track(model=self.prior, ema=self.ema, optimizer=OptimizerState(self.optimizer))
        self.wrapped = run.shard(self.prior, self.optimizer)
        self.pipeline = Pipeline(self.tokenizer, self.ema.model, latents.classes)
        self.pipeline.training_pictures = latents.info.dataset_fingerprint

    def train_step(self, micro_batches: list[LatentBatch], step: int) -> dict[str, torch.Tensor]:
        """One optimizer step; returns losses for the log."""
        self.wrapped.train()
        self.prior.set_progress(step / self.config.max_train_steps)
        parts = []
        random_inputs = random_inputs_for(self.run, self.prior, step)
        for index, (batch, noise) in enumerate(zip(micro_batches, self.noise(step), strict=True)):
            with self.run.micro_batch(index, self.wrapped):
                loss = self.loss(self.wrapped, batch, noise, random_inputs[index])
                self.run.backward(loss.total)
            parts.append({"loss": loss.total.detach(), **loss.parts})
        norm = self.run.apply(self.optimizer, self.prior, step)
        if self.run.count_step(norm, step):
            self.ema.update(self.prior)
        return {**mean_of(parts), "gradient_norm": torch.tensor(norm)}

    def noise(self, step: int) -> list[torch.Tensor | None]:
        """Draws latents from their posterior, for each micro-batch of this process; codes are
        certain and need none."""
        config, draws = self.config, generator(self.config.seed, "posterior", step, 0, 0)
        whole = self.tokenizer.sample_random_inputs(config.train_batch_size, draws).get("noise")
        if whole is None:
            return [None] * config.gradient_accumulation_steps
        return list(shares(self.run, whole))

    def loss(
        self,
        prior: torch.nn.Module,
        batch: LatentBatch,
        noise: torch.Tensor | None = None,
        random_inputs: RandomInputs | None = None,
    ) -> Loss:
        """The loss of one batch under a prior, wrapped or not.

        Args:
            noise: draws continuous latents from their posterior; None takes its mean.
            drawn: what the prior draws; None or nothing leaves that to itself.
        """
        stored, labels = batch.stored.to(self.run.device), batch.labels.to(self.run.device)
        if self.pairs:  # reflow: the cache holds the noise that belongs to each latent
            data, start = stored.chunk(2, dim=1)
            return prior(data, labels, random_inputs={**(random_inputs or {}), "noise": start})
        options: dict[str, Any] = {"random_inputs": random_inputs} if random_inputs else {}
        return prior(self.tokenizer.latents(stored, noise=noise), labels, **options)

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
        return class_grid(self.pipeline, **self.config.preview.options)

    def save_pipeline(self, folder: Path) -> None:
        """Tokenizer and EMA weights of the prior, as `Pipeline.from_pretrained` reads them."""
        self.pipeline.save_pretrained(folder, samples=self.preview())


def build_prior(config: PriorConfig, latents: LatentCache, tokenizer: Tokenizer) -> Prior:
    """A new prior of this size for these latents.

    Raises:
        SmaltiError: it does not model such latents.
    """
    quantizer: Any = getattr(tokenizer, "quantizer", None)
    fitted = config.fitted(
        latents.spec,
        latents.num_classes,
        latents.info.tokenizer_fingerprint,
        getattr(quantizer, "config", None),
    )
    prior: Prior = Prior.registry.build(fitted)
    prior.bind(quantizer)
    return prior


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
        if run.validates(step):
            run.log_alone(step, stage.validate(heldout))
            picture = stage.preview()
            save_png(run.folder / "samples" / f"step_{step + 1:06d}.png", picture)
            run.show(step, "samples", picture)
    return run.export(stage.save_pipeline)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti train-prior`."""
    folder = train(parse_config(TrainPriorConfig, argv, prog="smalti train-prior"))
    say(f"pipeline: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
