"""Stage one: train a tokenizer on a set of pictures.

smalti train-tokenizer --data emoji --output_dir runs/tokenizer
accelerate launch scripts/train_tokenizer.py --config scripts/configs/emoji_tokenizer.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from smalti.cli import parse_config, run_command
from smalti.data.dataset import ImageBatch, ImageDataset
from smalti.data.image_io import image_grid, save_png
from smalti.data.latents import CodeSpec
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.evaluation.codebook import code_counts, usage
from smalti.evaluation.reconstruction import psnr
from smalti.scripts.options import DataOptions
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.discriminator import PatchGAN
from smalti.tokenizer.objective import (
    ObjectiveConfig,
    ObjectiveLoss,
    discriminator_loss,
    generator_loss,
)
from smalti.tokenizer.perceptual import LPIPS
from smalti.tokenizer.vq import PRESETS, VQConfig
from smalti.training.checkpoint import OptimizerState
from smalti.training.ema import EMA
from smalti.training.log import mean_of
from smalti.training.run import Run, RunConfig
from smalti.training.seeding import generator

VALIDATION_IMAGES = 512
PREVIEW_IMAGES = 16


@dataclass(frozen=True)
class TrainTokenizerConfig(RunConfig, DataOptions):
    """Train a tokenizer: images -> codes -> images."""

    output_dir: Path = Path("runs/tokenizer")
    PRESETS: ClassVar[dict[str, Any]] = {"tokenizer": PRESETS}

    tokenizer: VQConfig = field(default_factory=lambda: PRESETS["vq-32-tiny"])
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    flip: bool = True  # mirror half of the pictures


class Stage:
    """The models of stage one and one optimizer step of each."""

    def __init__(self, run: Run, config: TrainTokenizerConfig) -> None:
        torch.manual_seed(config.seed)
        self.run = run
        self.objective = config.objective
        self.tokenizer: Tokenizer = Tokenizer.registry.build(config.tokenizer).to(run.device)
        self.critic = PatchGAN(config.objective.discriminator).to(run.device)
        self.perceptual = LPIPS.from_embedded().to(run.device)
        self.optimizer = run.adamw(self.tokenizer)
        self.critic_optimizer = run.adamw(self.critic)
        self.ema = EMA(self.tokenizer, config.ema_decay)
        run.track(
            model=self.tokenizer,
            ema=self.ema,
            optimizer=OptimizerState(self.optimizer),
            discriminator=self.critic,
            discriminator_optimizer=OptimizerState(self.critic_optimizer),
        )
        # Gradients are synchronised by these wrappers alone, so every pass goes through them.
        self.wrapped_tokenizer = run.accelerator.prepare(self.tokenizer)
        self.wrapped_critic = run.accelerator.prepare(self.critic)

    def train_step(self, micro_batches: list[ImageBatch], step: int) -> dict[str, torch.Tensor]:
        """Tokenizer, then critic, on the same pictures; returns losses for the log."""
        self.wrapped_tokenizer.train()
        parts = []
        fakes = []
        for index, batch in enumerate(micro_batches):
            images = batch.images.to(self.run.device)
            with self.run.micro_batch(index, self.wrapped_tokenizer):
                loss, reconstructed = self.generator_loss(images, step)
                self.run.backward(loss.total)
            parts.append(loss.parts)
            fakes.append(reconstructed.detach())
        norm = self.run.apply(self.optimizer, self.tokenizer, step)
        self.accept(norm, step)
        for index, (batch, fake) in enumerate(zip(micro_batches, fakes, strict=True)):
            images = batch.images.to(self.run.device)
            with self.run.micro_batch(index, self.wrapped_critic):
                loss = discriminator_loss(self.wrapped_critic, images, fake)
                self.run.backward(loss.total)
            parts[index] |= loss.parts
        self.run.apply(self.critic_optimizer, self.critic, step)
        return {**mean_of(parts), "gradient_norm": torch.tensor(norm)}

    def generator_loss(self, images: torch.Tensor, step: int) -> tuple[ObjectiveLoss, torch.Tensor]:
        """The tokenizer's loss and its reconstructions (B, 3, H, W)."""
        reconstruction = self.wrapped_tokenizer(images)
        # The unwrapped, frozen critic: no gradients of it are made, none are communicated.
        self.critic.requires_grad_(False)
        with self.run.accelerator.autocast():
            loss = generator_loss(
                self.objective,
                reconstruction,
                images,
                perceptual=self.perceptual,
                discriminator=self.critic,
                last_layer=self.tokenizer.last_layer,
                step=step,
            )
        self.critic.requires_grad_(True)
        return loss, reconstruction.images

    def accept(self, gradient_norm: float, step: int) -> None:
        """Update codebook and EMA, or forget the step if its gradient was not finite."""
        accepted = self.run.count_step(gradient_norm, step)
        if accepted:
            self.tokenizer.after_step(generator(self.run.config.seed, "after_step", step))
            self.ema.update(self.tokenizer)
        else:
            self.tokenizer.discard_step()


@torch.no_grad()
def validate(tokenizer: Tokenizer, images: ImageDataset, device: torch.device) -> dict[str, float]:
    """PSNR and codebook usage on the first held-out pictures."""
    scores, latents = [], []
    for batch in images.batches(64, stop=VALIDATION_IMAGES):
        latents.append(tokenizer.encode(batch.images.to(device)))
        scores.append(psnr(tokenizer.decode(latents[-1]).float().cpu(), batch.images))
    values = {"val_psnr": torch.cat(scores).mean().item()}
    if isinstance(tokenizer.spec, CodeSpec):
        counts = code_counts(torch.cat(latents), tokenizer.spec.vocab_size)
        values["val_usage"] = usage(counts)
    return values


@torch.no_grad()
def preview(tokenizer: Tokenizer, images: ImageDataset, path: Path, device: torch.device) -> None:
    """A grid: originals above their reconstructions."""
    batch = next(iter(images.batches(PREVIEW_IMAGES)))
    output = tokenizer.reconstruct(batch.images.to(device)).cpu()
    save_png(path, image_grid(torch.cat([batch.images, output]), columns=len(output)))


def train(config: TrainTokenizerConfig) -> Path:
    """Train, and return the folder of the finished tokenizer (EMA weights)."""
    run = Run(config, kind="train-tokenizer")
    size = config.tokenizer.image_size
    images = config.dataset("train", size, flip=config.flip, seed=config.seed)
    heldout = config.dataset("heldout", size)
    stage = Stage(run, config)
    run.resume()
    batches = stream_batches(
        images,
        DataOrder(len(images), config.train_batch_size, config.seed),
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
            run.log_alone(step, validate(stage.ema.model, heldout, run.device))
            picture = run.folder / "reconstructions" / f"step_{step + 1:06d}.png"
            preview(stage.ema.model, heldout, picture, run.device)
    return run.export(stage.ema.model.save_pretrained, run.folder / "tokenizer")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti train-tokenizer`."""
    folder = train(parse_config(TrainTokenizerConfig, argv, prog="smalti train-tokenizer"))
    print(f"tokenizer: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
