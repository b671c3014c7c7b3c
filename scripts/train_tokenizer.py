"""Stage one: train a tokenizer on a set of pictures.

smalti train-tokenizer --data emoji --output_dir runs/tokenizer
accelerate launch scripts/train_tokenizer.py --config scripts/configs/emoji_tokenizer.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from smalti.cli import parse_config, run_command
from smalti.data.dataset import DataOptions, ImageBatch, ImageDataset
from smalti.data.image_io import image_grid, save_png
from smalti.data.latents import CodeSpec
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.data.transforms import RandomCrop
from smalti.errors import SmaltiError
from smalti.evaluation.reconstruction import code_counts, perplexity, psnr, usage
from smalti.pipelines.finetune import load_initial_weights, saved_tokenizer
from smalti.randomness import RandomInputs, generator
from smalti.tokenizer.base import Reconstruction, Tokenizer
from smalti.tokenizer.discriminators.adversarial import (
    compute_adaptive_weight,
    last_layer_gradients,
)
from smalti.tokenizer.discriminators.objective import (
    UNIFORMS_PER_IMAGE,
    DiscriminatorObjective,
)
from smalti.tokenizer.losses.alignment import AlignedTokenizer, AlignmentConfig
from smalti.tokenizer.losses.objective import (
    LossNetworks,
    ObjectiveConfig,
    ObjectiveLoss,
    adversarial_loss,
    generator_loss,
    reconstruction_losses,
    sum_of,
)
from smalti.tokenizer.losses.perceptual import LPIPS
from smalti.tokenizer.presets import PRESETS, TokenizerConfig
from smalti.training.checkpoint import OptimizerState
from smalti.training.ema import EMA
from smalti.training.logging import mean_of
from smalti.training.processes import say
from smalti.training.run import Run, RunConfig, random_inputs_for, shares

# -------------------------------------------------------------------------------------------------
# The critic of stage one: how it is trained beside a tokenizer.


class DiscriminatorStage:
    """A critic, its optimizer, and one step of both."""

    def __init__(self, run: Run, config: ObjectiveConfig, image_size: int) -> None:
        self.run = run
        self.objective = DiscriminatorObjective(config, image_size).to(run.device)
        self.optimizer = run.adamw(self.objective)
        run.track(
            discriminator=self.objective, discriminator_optimizer=OptimizerState(self.optimizer)
        )
        # Gradients are synchronised by this wrapper alone, so every pass that makes some uses it.
        self.wrapped = run.replicate(self.objective)

    def train_step(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        draws: Sequence[Tensor],
        step: int,
    ) -> dict[str, Tensor]:
        """One optimizer step; returns losses for the log.

        Args:
            pairs: pictures and reconstructions, (B, 3, H, W) each, of every micro-batch.
            draws: (B, UNIFORMS_PER_IMAGE) of every micro-batch, see `critic_draws`.
        """
        parts = []
        for index, ((images, fakes), numbers) in enumerate(zip(pairs, draws, strict=True)):
            with self.run.micro_batch(index, self.wrapped):
                loss = self.wrapped(images, fakes, numbers, step)
                self.run.backward(loss.total)
            parts.append(loss.parts)
        norm = self.run.apply(self.optimizer, self.objective, step)
        if self.run.count_step(norm, step, "critic"):
            self.objective.after_step()
        else:
            self.objective.discard_step()
        return {**mean_of(parts), "discriminator_gradient_norm": torch.tensor(norm)}


def discriminator_uniforms(run: Run, step: int) -> list[Tensor]:
    """Uniform numbers (B, UNIFORMS_PER_IMAGE) for the pictures of each micro-batch of this process.

    A picture's numbers depend on its place in the whole batch of the step alone, not on how that
    is shared among processes or cut into micro-batches.
    """
    numbers = generator(run.config.seed, "critic", step)
    return shares(
        run, torch.rand(run.config.train_batch_size, UNIFORMS_PER_IMAGE, generator=numbers)
    )


# -------------------------------------------------------------------------------------------------
# Stage one: train a tokenizer on a set of pictures.

VALIDATION_IMAGES = 512
PREVIEW_IMAGES = 16


@dataclass(frozen=True)
class TrainTokenizerConfig(RunConfig, DataOptions):
    """Train a tokenizer: images -> latents -> images."""

    output_dir: Path = Path("runs/tokenizer")
    PRESETS: ClassVar[dict[str, Any]] = {"tokenizer": PRESETS}
    SAVED: ClassVar[dict[str, Any]] = {"tokenizer": saved_tokenizer}

    tokenizer: TokenizerConfig = field(default_factory=lambda: PRESETS["vq-32-tiny"])
    initial: str = ""  # a tokenizer or pipeline with whose settings and weights training begins
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    # Draws a KL tokenizer's latents towards the features of a vision model; recipes only.
    alignment: AlignmentConfig | None = None
    flip: bool = True  # mirror half of the pictures
    crop: Literal["centre", "random"] = "centre"
    random_crop: RandomCrop = field(default_factory=RandomCrop)  # ADM's; if crop is random

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        DataOptions.__post_init__(self)
        if self.crop == "centre" and self.random_crop != RandomCrop():
            raise SmaltiError("random_crop is for --crop random: pass that, too")


class Stage:
    """The models of stage one and one optimizer step of each."""

    def __init__(self, run: Run, config: TrainTokenizerConfig) -> None:
        torch.manual_seed(config.seed)
        self.run = run
        self.objective = config.objective
        self.tokenizer: Tokenizer = Tokenizer.registry.build(config.tokenizer).to(run.device)
        if config.initial:
            load_initial_weights(self.tokenizer, config.initial)
        self.trained: nn.Module = self.tokenizer
        if config.alignment is not None:
            self.trained = AlignedTokenizer.of(self.tokenizer, config.alignment).to(run.device)
            run.track(alignment=self.trained.alignment.projection)
        self.optimizer = run.adamw(self.trained)
        self.ema = EMA(self.tokenizer, config.ema_decay)
        run.track(
            model=self.tokenizer,
            ema=self.ema,
            optimizer=OptimizerState(self.optimizer),
        )
        # Gradients are synchronised by this wrapper alone, so every pass that makes some uses it.
        self.wrapped_tokenizer = run.replicate(self.trained)
        self.codes: list[torch.Tensor] = []  # of the last step, on this process
        # A network whose weight is 0 is neither built nor trained nor saved.
        objective = config.objective
        size = config.tokenizer.image_size
        self.discriminator = (
            DiscriminatorStage(run, objective, size) if objective.needs_discriminator else None
        )
        perceptual = None
        if objective.needs_features:
            perceptual = LPIPS.of(objective.perceptual_network, objective.perceptual_weights)
            perceptual.to(run.device)
        self.loss_networks = LossNetworks(
            perceptual, self.discriminator.objective.discriminator if self.discriminator else None
        )

    def train_step(self, micro_batches: list[ImageBatch], step: int) -> dict[str, torch.Tensor]:
        """Tokenizer, then critic, on the same pictures; returns losses for the log."""
        self.wrapped_tokenizer.train()
        images = [batch.images.to(self.run.device) for batch in micro_batches]
        draws = discriminator_uniforms(self.run, step)
        random_inputs = random_inputs_for(self.run, self.tokenizer, step)
        balance = self.balance(images, random_inputs, draws, step)
        parts, pairs, self.codes = [], [], []
        for index, (real, chance, numbers) in enumerate(
            zip(images, random_inputs, draws, strict=True)
        ):
            with self.run.micro_batch(index, self.wrapped_tokenizer):
                loss, output = self.generator_loss(real, chance, numbers, step, balance)
                self.run.backward(loss.total)
            parts.append(loss.parts)
            pairs.append((output.targets, output.images.detach()))
            if output.codes is not None:
                self.codes.append(output.codes)
        norm = self.run.apply(self.optimizer, self.trained, step)
        self.accept(norm, step)
        values = {**mean_of(parts), "gradient_norm": torch.tensor(norm)}
        if self.discriminator is not None:
            values |= self.discriminator.train_step(pairs, draws, step)
        return values

    def generator_loss(
        self,
        images: torch.Tensor,
        random_inputs: RandomInputs,
        draws: torch.Tensor,
        step: int,
        balance: torch.Tensor | None = None,
    ) -> tuple[ObjectiveLoss, Reconstruction]:
        """The tokenizer's loss, and what it made of images (B, 3, H, W)."""
        reconstruction = self.wrapped_tokenizer(images, random_inputs)
        # The unwrapped critic: no gradients of it are made, none are communicated.
        with self.run.accelerator.autocast():
            loss = generator_loss(
                self.objective,
                self.loss_networks,
                reconstruction,
                uniforms=draws,
                last_layer=self.tokenizer.last_layer,
                step=step,
                adaptive_weight=balance,
            )
        return loss, reconstruction

    def balance(
        self,
        images: list[torch.Tensor],
        random_inputs: Sequence[RandomInputs],
        draws: list[torch.Tensor],
        step: int,
    ) -> torch.Tensor | None:
        """The adaptive weight of the whole batch, if it is needed and comes in micro-batches.

        It takes a pass of its own: the gradients of the first micro-batch cannot be weighed
        before those of the last are known. That pass stops at the decoder's last layer.
        """
        config, discriminator = self.objective, self.loss_networks.discriminator
        heard = config.adversarial_strength(step) > 0
        if discriminator is None or not (heard and config.adaptive and len(images) > 1):
            return None
        gradients = []
        devices = [self.run.device] if self.run.device.type == "cuda" else []
        # The same random numbers as in the pass that trains; what it collects is forgotten.
        with (
            torch.random.fork_rng(devices),
            self.run.accelerator.no_sync(self.wrapped_tokenizer),
            self.run.accelerator.autocast(),
        ):
            for real, chance, numbers in zip(images, random_inputs, draws, strict=True):
                output = self.wrapped_tokenizer(real, chance)
                reconstruction_loss = sum_of(
                    reconstruction_losses(config, self.loss_networks, output)
                )
                adversarial = adversarial_loss(config, discriminator, output.images, numbers)
                gradients.append(
                    last_layer_gradients(
                        reconstruction_loss, adversarial, self.tokenizer.last_layer
                    )
                )
        self.tokenizer.discard_step()
        return compute_adaptive_weight(gradients)

    def codebook_use(self) -> dict[str, float]:
        """Usage and perplexity of the last step's codes on all processes; every process calls."""
        if not self.codes:
            return {}
        assert isinstance(self.tokenizer.spec, CodeSpec)
        counts = code_counts(torch.cat(self.codes), self.tokenizer.spec.vocab_size)
        counts = self.run.accelerator.reduce(counts, reduction="sum")
        assert isinstance(counts, torch.Tensor)
        return {"code_usage": usage(counts), "code_perplexity": perplexity(counts)}

    def accept(self, gradient_norm: float, step: int) -> None:
        """Update codebook and EMA, or forget the step if its gradient was not finite."""
        accepted = self.run.count_step(gradient_norm, step, "tokenizer")
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
def preview(tokenizer: Tokenizer, images: ImageDataset, device: torch.device) -> Image.Image:
    """A grid: originals above their reconstructions."""
    batch = next(iter(images.batches(PREVIEW_IMAGES)))
    output = tokenizer.reconstruct(batch.images.to(device)).cpu()
    return image_grid(torch.cat([batch.images, output]), columns=len(output))


def train(config: TrainTokenizerConfig) -> Path:
    """Train, and return the folder of the finished tokenizer (EMA weights)."""
    run = Run(config, kind="train-tokenizer", result=config.output_dir / "tokenizer")
    size = config.tokenizer.image_size
    crop = config.random_crop if config.crop == "random" else None
    images = config.dataset("train", size, flip=config.flip, crop=crop, seed=config.seed)
    heldout = config.dataset("heldout", size)
    stage = Stage(run, config)
    run.resume(images.fingerprint)
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
            values = {**parts, **stage.codebook_use(), "learning_rate": run.learning_rate(step)}
            run.log(step, values)
        if run.validates(step):
            run.log_alone(step, validate(stage.ema.model, heldout, run.device))
            picture = preview(stage.ema.model, heldout, run.device)
            save_png(run.folder / "reconstructions" / f"step_{step + 1:06d}.png", picture)
            run.show(step, "reconstructions", picture)

    def save(folder: Path) -> None:
        tokenizer = stage.ema.model
        tokenizer.calibrate(batch.images.to(run.device) for batch in images.batches(64))
        tokenizer.save_pretrained(folder)

    return run.export(save)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti train-tokenizer`."""
    folder = train(parse_config(TrainTokenizerConfig, argv, prog="smalti train-tokenizer"))
    say(f"tokenizer: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
