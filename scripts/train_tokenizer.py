"""Stage one: train a tokenizer on a set of images (VQGAN, 2012.09841; KL-VAE, 2112.10752).

    smalti train-tokenizer --data emoji --output_dir runs/tokenizer
    accelerate launch scripts/train_tokenizer.py --config scripts/configs/emoji_tokenizer.yaml

A step trains the tokenizer on reconstruction and adversarial losses, then the discriminator on the
same images and their reconstructions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from smalti.checkpoints import Weights
from smalti.cli import in_python, parse_config, run_command
from smalti.config import ImageSize
from smalti.data.dataset import (
    DataOptions,
    ImageBatch,
    ImageDataset,
    TrainingPictures,
    write_options,
)
from smalti.data.image_io import image_grid
from smalti.data.latents import CodeSpec, as_image_size
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.errors import ConfigurationError
from smalti.evaluation.reconstruction import code_counts, perplexity, psnr, usage
from smalti.pipelines.finetune import load_initial_weights, saved_tokenizer
from smalti.pipelines.model_flag import place_of
from smalti.randomness import RandomInputs, generator
from smalti.tokenizer.base import Tokenizer, image_channels_of
from smalti.tokenizer.discriminators.adversarial import (
    compute_adaptive_weight,
    last_layer_gradients,
)
from smalti.tokenizer.losses.alignment import AlignedTokenizer, AlignmentConfig
from smalti.tokenizer.losses.objective import (
    UNIFORMS_PER_IMAGE,
    DiscriminatorObjective,
    LossNetworks,
    ObjectiveConfig,
    adversarial_loss,
    generator_loss,
    reconstruction_losses,
    sum_of,
)
from smalti.tokenizer.losses.perceptual import LPIPS
from smalti.tokenizer.presets import PRESETS, TokenizerConfig
from smalti.training.checkpoint import OptimizerState
from smalti.training.config import RunConfig
from smalti.training.logging import mean_of
from smalti.training.optim import (
    EMA,
    clip_gradients,
    learning_rate,
    logged_norm,
    make_optimizer,
    set_learning_rate,
)
from smalti.training.processes import replicate, say
from smalti.training.run import Run, local_micro_batches, random_inputs_of_step, seed_everything

VALIDATION_IMAGES = 512
PREVIEW_IMAGES = 16


@dataclass(frozen=True)
class TrainTokenizerConfig(RunConfig, TrainingPictures):
    """Train a tokenizer: images -> latents -> images."""

    output_dir: Path = Path("runs/tokenizer")  # folder of checkpoints, logs and the tokenizer
    PRESETS: ClassVar[dict[str, Any]] = {"tokenizer": PRESETS}
    SAVED: ClassVar[dict[str, Any]] = {"tokenizer": saved_tokenizer}

    # Kind and sizes of the tokenizer.
    tokenizer: TokenizerConfig = field(default_factory=lambda: PRESETS["vq-32-tiny"])
    # Pixels: the side of a square, or height x width as in 48x64; default: --tokenizer.image_size.
    # Scales of a multi-scale tokenizer are stretched to it.
    image_size: ImageSize | None = None
    initial: Annotated[
        str, place_of("A pipeline or tokenizer whose settings and weights the run starts from")
    ] = ""
    weights: Weights = "ema"  # of a checkpoint in --initial: averaged over its run (ema), or raw
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)  # losses and weights
    # Aligns a KL tokenizer's latents with the features of a vision model; in recipes only.
    alignment: AlignmentConfig | None = None

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        TrainingPictures.__post_init__(self)
        if self.image_size is not None:
            object.__setattr__(self, "tokenizer", config_at(self.tokenizer, self.image_size))
        self.for_channels(image_channels_of(self.tokenizer))  # raises if the background is wrong


def config_at(config: TokenizerConfig, size: ImageSize) -> TokenizerConfig:
    """The configuration of a tokenizer at an image size; its scales, if it has several, are kept
    where they fit, and stretched otherwise."""
    try:
        with torch.device("meta"):
            tokenizer: Tokenizer = Tokenizer.registry.build(config)
    except ConfigurationError:
        return replace(config, image_size=size)  # its own size has no latents
    same = as_image_size(size) == tokenizer.image_size
    return config if same else tokenizer.config_at(size)


def open_images(config: TrainTokenizerConfig) -> tuple[ImageDataset, ImageDataset]:
    """The training images, randomly cropped and mirrored as configured, and the held-out images."""
    size, channels = config.tokenizer.image_size, image_channels_of(config.tokenizer)
    return config.training_and_heldout(size, channels, config.seed, captions=False)


# -------------------------------------------------------------------------------------------------
# The networks. One whose loss weight is 0 is neither built nor trained nor saved.

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Trained(Generic[Module]):
    """A module that an optimizer trains.

    `wrapped` averages its gradients over the processes; its `forward` is the training objective.
    """

    module: Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer


def with_optimizer(module: Module, run: Run) -> Trained[Module]:
    """A module on the run's device, with a new optimizer."""
    module = module.to(run.device)
    return Trained(module, replicate(run.accelerator, module), make_optimizer(module, run.config))


def build_tokenizer(
    config: TrainTokenizerConfig, run: Run
) -> tuple[Tokenizer, Trained[nn.Module], EMA[Tokenizer]]:
    """A tokenizer; what is trained: itself, or with the projection of its alignment; its EMA.

    Raises:
        SmaltiError: the initial weights or the alignment do not fit.
    """
    tokenizer: Tokenizer = Tokenizer.registry.build(config.tokenizer).to(run.device)
    if config.initial:
        load_initial_weights(tokenizer, config.initial, config.weights)
    module: nn.Module = tokenizer
    if config.alignment is not None:
        module = AlignedTokenizer.of(tokenizer, config.alignment)
        run.track(alignment=module.alignment.projection)
    ema = EMA(tokenizer, config.ema_decay)
    model: Trained[nn.Module] = with_optimizer(module, run)
    run.track(model=tokenizer, ema=ema, optimizer=OptimizerState(model.optimizer))
    return tokenizer, model, ema


def build_loss_networks(
    config: TrainTokenizerConfig, run: Run
) -> tuple[LossNetworks, Trained[DiscriminatorObjective] | None]:
    """The networks that the tokenizer's losses use, and the discriminator as it is trained.

    Those losses use the unwrapped discriminator, whose weights get no gradients from them.
    """
    networks, discriminator = LossNetworks(None, None), None
    if config.objective.needs_discriminator:
        images = config.tokenizer
        module = DiscriminatorObjective(
            config.objective, images.image_size, image_channels_of(images)
        )
        discriminator = with_optimizer(module, run)
        run.track(
            discriminator=module,
            discriminator_optimizer=OptimizerState(discriminator.optimizer),
        )
        networks.discriminator = module.discriminator
    if config.objective.needs_features:
        objective = config.objective
        lpips = LPIPS.of(objective.perceptual_network, objective.perceptual_weights)
        networks.perceptual = lpips.to(run.device)
    return networks, discriminator


# -------------------------------------------------------------------------------------------------
# Parts of a step.

MicroBatch = tuple[Tensor, RandomInputs, Tensor]  # images, random inputs of the tokenizer, uniforms


def discriminator_uniforms(run: Run, step: int) -> list[Tensor]:
    """Uniforms (B, UNIFORMS_PER_IMAGE) for the images of each micro-batch of this process.

    The uniforms of an image depend on its position in the full batch of the step alone, not on how
    the batch is divided among processes and micro-batches.
    """
    # "critic" seeds these numbers: another word would change the runs of smalti 0.1.
    source = generator(run.config.seed, "critic", step)
    uniforms = torch.rand(run.config.train_batch_size, UNIFORMS_PER_IMAGE, generator=source)
    return local_micro_batches(run, uniforms)


def micro_batches_of(
    run: Run, tokenizer: Tokenizer, batches: Sequence[ImageBatch], step: int
) -> list[MicroBatch]:
    """The images of a step on the run's device, with the random numbers that belong to them."""
    images = [batch.images.to(run.device) for batch in batches]
    random_inputs = random_inputs_of_step(run, tokenizer, step)
    return list(zip(images, random_inputs, discriminator_uniforms(run, step), strict=True))


def adaptive_weight_of(
    run: Run,
    config: TrainTokenizerConfig,
    networks: LossNetworks,
    tokenizer: Tokenizer,
    model: Trained[nn.Module],
    batch: Sequence[MicroBatch],
    step: int,
) -> Tensor | None:
    """The adaptive weight (VQGAN, eq. 7) of a batch that is divided into micro-batches, a scalar.

    It needs a separate forward pass: the gradients of the first micro-batch cannot be weighted
    before those of the last are known. Its backward pass stops at the decoder's last layer.
    None if no weight is needed, or if there is one micro-batch: then `generator_loss` computes it.
    """
    objective = config.objective
    adversarial_on = objective.adversarial_strength(step) > 0
    if not (adversarial_on and objective.adaptive and len(batch) > 1):
        return None
    assert networks.discriminator is not None, "an adversarial loss has a discriminator"
    last_layer, gradients = tokenizer.last_layer, []
    devices = [run.device] if run.device.type == "cuda" else []
    # The same random numbers as in the pass that trains; what `forward` collects is discarded.
    with (
        torch.random.fork_rng(devices),
        run.accelerator.no_sync(model.wrapped),
        run.accelerator.autocast(),
    ):
        for images, random_inputs, uniforms in batch:
            output = model.wrapped(images, random_inputs)
            reconstruction = sum_of(reconstruction_losses(objective, networks, output))
            adversarial = adversarial_loss(
                objective, networks.discriminator, output.images, uniforms
            )
            gradients.append(last_layer_gradients(reconstruction, adversarial, last_layer))
    tokenizer.discard_step()
    return compute_adaptive_weight(gradients)


def codebook_use(run: Run, tokenizer: Tokenizer, codes: Sequence[Tensor]) -> dict[str, float]:
    """Usage (0 to 1) and perplexity of a step's codes (B, L) on all processes. A collective call.

    Empty for a continuous tokenizer, which has no codes.
    """
    if not codes:
        return {}
    assert isinstance(tokenizer.spec, CodeSpec)
    counts = code_counts(torch.cat(list(codes)), tokenizer.spec.vocab_size)
    counts = run.sum_over_processes(counts)
    return {"code_usage": usage(counts), "code_perplexity": perplexity(counts)}


# -------------------------------------------------------------------------------------------------
# Between steps.


@torch.no_grad()
def validate(
    tokenizer: Tokenizer,
    images: ImageDataset,
    run: Run,
    progress: Callable[[int], object] = lambda images: None,
) -> dict[str, float]:
    """PSNR in dB and codebook usage (0 to 1) on held-out images, evenly over the classes.

    Args:
        progress: called with the number of images that were measured since the last call.
    """
    scores, latents, device = [], [], run.device
    chosen = images.even_subset(VALIDATION_IMAGES, run.config.seed)
    for batch in images.batches_of(chosen, 64):
        latents.append(tokenizer.encode(batch.images.to(device)))
        scores.append(psnr(tokenizer.decode(latents[-1]).float().cpu(), batch.images))
        progress(len(batch.images))
    values = {"val_psnr": torch.cat(scores).mean().item()}
    if isinstance(tokenizer.spec, CodeSpec):
        counts = code_counts(torch.cat(latents), tokenizer.spec.vocab_size)
        values["val_usage"] = usage(counts)
    return values


@torch.no_grad()
def preview(tokenizer: Tokenizer, images: ImageDataset, run: Run) -> Image.Image:
    """A grid: originals above their reconstructions, evenly over the classes."""
    chosen = images.even_subset(PREVIEW_IMAGES, run.config.seed)
    (batch,) = images.batches_of(chosen, PREVIEW_IMAGES)
    output = tokenizer.reconstruct(batch.images.to(run.device)).cpu()
    return image_grid(torch.cat([batch.images, output]), columns=len(output))


def measure(run: Run, tokenizer: Tokenizer, images: ImageDataset, step: int) -> None:
    """Validation and preview of a step."""
    run.measure(
        step,
        partial(validate, tokenizer, images, run),
        min(len(images), VALIDATION_IMAGES),
        reconstructions=partial(preview, tokenizer, images, run),
    )


def save(
    folder: Path,
    tokenizer: Tokenizer,
    images: ImageDataset,
    device: torch.device,
    options: DataOptions,
) -> None:
    """Save the finished tokenizer, with the statistics of its latents on the training images, and
    the options of the images for later stages."""
    tokenizer.calibrate(batch.images.to(device) for batch in images.batches(64))
    tokenizer.save_pretrained(folder)
    write_options(folder, options)


# -------------------------------------------------------------------------------------------------
# Training.


def train(config: TrainTokenizerConfig) -> Path:
    """Train, and return the folder of the finished tokenizer (EMA weights)."""
    run = Run(config, kind="train-tokenizer", result=config.output_dir / "tokenizer")
    images, heldout = open_images(config)
    torch.manual_seed(config.seed)
    tokenizer, model, ema = build_tokenizer(config, run)
    networks, discriminator = build_loss_networks(config, run)
    loss_of = partial(generator_loss, config.objective, networks, last_layer=tokenizer.last_layer)
    order = DataOrder(len(images), config.train_batch_size, config.seed, images.blocks)
    run.resume(order.identity(images.fingerprint))
    batches = run.reading(stream_batches(images, order, **run.share_of_data()))

    measured = partial(measure, run, ema.model, heldout)

    with run.interruptible():
        run.catch_up(measured)
        for step in run.remaining_steps():
            seed_everything(config.seed, step, run.rank)  # a resumed step repeats its noise
            rate = learning_rate(config, step)
            with run.timed():
                batch = micro_batches_of(run, tokenizer, next(batches), step)

                # The tokenizer: reconstruction, quantization and adversarial losses.
                model.wrapped.train()
                weight = adaptive_weight_of(run, config, networks, tokenizer, model, batch, step)
                losses, parts, pairs, codes = [], [], [], []
                for index, (inputs, random_inputs, uniforms) in enumerate(batch):
                    with run.micro_batch(index, model.wrapped):
                        output = model.wrapped(inputs, random_inputs)
                        with run.accelerator.autocast():
                            loss = loss_of(
                                output, uniforms=uniforms, step=step, adaptive_weight=weight
                            )
                        run.backward(loss.total)
                    losses.append(loss.total.detach())
                    parts.append({"loss": loss.total.detach(), **loss.parts})
                    pairs.append((output.targets, output.images.detach(), uniforms))
                    codes += [] if output.codes is None else [output.codes]
                norm = clip_gradients(model.module, config.max_grad_norm)
                # The adversarial loss starts late, and rises as the discriminator learns.
                followed = [part["loss"] - part.get("adversarial", 0.0) for part in parts]
                if accepted := run.guard.accepts("tokenizer", step, losses, norm, followed):
                    set_learning_rate(model.optimizer, rate)
                    model.optimizer.step()
                    tokenizer.after_step(generator(config.seed, "after_step", step))
                    ema.update(tokenizer)
                else:
                    tokenizer.discard_step()
                model.optimizer.zero_grad(set_to_none=True)
                values = {**mean_of(parts), "gradient_norm": logged_norm(norm, accepted)}

                # The discriminator, from the first step: the same images, their reconstructions.
                if discriminator is not None:
                    losses, parts = [], []
                    for index, (targets, fakes, uniforms) in enumerate(pairs):
                        with run.micro_batch(index, discriminator.wrapped):
                            loss = discriminator.wrapped(targets, fakes, uniforms, step)
                            run.backward(loss.total)
                        losses.append(loss.total.detach())
                        parts.append(loss.parts)
                    norm = clip_gradients(discriminator.module, config.max_grad_norm)
                    if accepted := run.guard.accepts("discriminator", step, losses, norm):
                        set_learning_rate(discriminator.optimizer, rate)
                        discriminator.optimizer.step()
                        discriminator.module.after_step()
                    else:
                        discriminator.module.discard_step()
                    discriminator.optimizer.zero_grad(set_to_none=True)
                    values |= mean_of(parts)
                    values["discriminator_gradient_norm"] = logged_norm(norm, accepted)

            if run.due(step, config.logging_steps):
                use = codebook_use(run, tokenizer, codes)
                run.log(step, {**values, **use, "learning_rate": rate})
            if run.due(step, config.validation_steps):
                measured(step)
            run.checkpoint(step)

    finished = partial(save, tokenizer=ema.model, images=images, device=run.device, options=config)
    return run.export(finished)


def train_tokenizer(config: TrainTokenizerConfig | None = None, **settings: Any) -> Tokenizer:
    """Train a tokenizer, and return it: `smalti train-tokenizer` in Python.

    Args:
        config: all settings; or give `settings`.
        settings: fields of `TrainTokenizerConfig`, as in a recipe: `tokenizer="vq-32-tiny"` is a
            preset.

    Raises:
        SmaltiError: as the command.
        KeyboardInterrupt: the run was stopped; `resume_from_checkpoint="latest"` continues it.
    """
    return Tokenizer.from_pretrained(in_python(train, TrainTokenizerConfig, config, settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti train-tokenizer`."""
    folder = train(parse_config(TrainTokenizerConfig, argv, prog="smalti train-tokenizer"))
    say(f"tokenizer: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
