"""Stage two: train a prior on cached latents; save it with its tokenizer as a pipeline.

    smalti train-prior --latents runs/latents --tokenizer runs/tokenizer/tokenizer
    smalti train-prior --data my_pictures --crop random --tokenizer runs/tokenizer/tokenizer

The second one encodes the pictures of each step instead of reading them from a latent cache.
The loop is the same for all priors: a prior's `forward` is its training objective.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from smalti.checkpoints import Weights, is_checkpoint
from smalti.cli import in_python, parse_config, run_command
from smalti.config import config_to_dict, first_difference
from smalti.data.classes import warn_of_empty_classes
from smalti.data.dataset import DataOptions, TrainingPictures, read_options, write_options
from smalti.data.latent_cache.buckets import BucketedLatents, open_buckets
from smalti.data.latent_cache.cache import LatentBatch, LatentCache
from smalti.data.latent_cache.manifest import TOKENIZER, bucket_folders, training_cache
from smalti.data.latent_cache.on_the_fly import Latents, OnTheFlyLatents
from smalti.data.latent_cache.splits import open_splits
from smalti.data.order import Key
from smalti.data.transforms import VIEW_SETS
from smalti.errors import CheckpointError, ConfigurationError
from smalti.pipelines.conditions import CONDITION_SOURCES, BatchConditions, check_options
from smalti.pipelines.finetune import fitted_as, load_initial_weights, saved_prior
from smalti.pipelines.generation import condition_grid, sample_grid
from smalti.pipelines.image_tasks import make_task
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.pipeline import Pipeline
from smalti.pipelines.sampling import sampling_of_run
from smalti.prior.base import Loss, Prior
from smalti.prior.conditions.base import Condition, moved
from smalti.prior.flow.rectified import check_straight
from smalti.prior.presets import PRESETS, PriorConfig
from smalti.randomness import RandomInputs, generator
from smalti.scripts.encode import latents_of, picture_encoders
from smalti.scripts.options import Sampling, TextOptions
from smalti.tokenizer.base import Tokenizer
from smalti.training.blocks import prepare_blocks
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
from smalti.training.processes import say, shard
from smalti.training.run import Run, on_device, random_inputs_of_step, seed_everything

LATENTS = Path("runs/latents")
VALIDATION_SAMPLES = 1024
SHOWN_PROMPTS = 8  # rows of the preview of a prior of captions


@dataclass(frozen=True)
class TrainPriorConfig(RunConfig, TrainingPictures):
    """Train a prior, a distribution over latents given a condition; save a pipeline."""

    PRESETS: ClassVar[dict[str, Any]] = {"prior": PRESETS}
    SAVED: ClassVar[dict[str, Any]] = {"prior": saved_prior}
    TRAINED: ClassVar[str] = "tokenizer"

    output_dir: Path = Path("runs/prior")  # folder of checkpoints and logs
    latents: Path = LATENTS  # folder written by `smalti encode`
    # Instead of --latents: pictures that are encoded for each step, with the options of the
    # pictures and the augmentation that train-tokenizer has.
    data: str = ""
    tokenizer: Annotated[Path, place_of("The tokenizer that encoded the latents")] = Path(
        "runs/tokenizer/tokenizer"
    )
    pipeline_dir: Path | None = None  # folder of the result; default: output_dir/pipeline
    # Its fields about latents, classes and the tokenizer are taken from the cache.
    prior: PriorConfig = field(default_factory=lambda: PRESETS["gpt-nano"])
    # What the prior is given: class, text (captions), image (the pictures that were encoded with
    # --image_task; flow priors), several of them (class+text), or none. Default: that of --initial,
    # or else the classes of the latents, or none if they have none.
    condition: str = ""
    text: TextOptions = field(default_factory=TextOptions)
    # With --data and condition image: super-resolution (from a quarter of the size, or
    # super-resolution:factor=2) or inpainting (a new random mask in every step).
    image_task: str = ""
    # Keep the input of each block alone, and compute the block again in the backward pass: less
    # memory for a third more operations, and the same gradients.
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the blocks: the first step takes minutes
    initial: Annotated[
        str, place_of("A pipeline or prior whose settings and weights the run starts from")
    ] = ""
    weights: Weights = "ema"  # of a checkpoint in --initial: averaged over its run (ema), or raw
    # Sampling options of the preview grids, and the sampling defaults of the pipeline.
    preview: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        TrainingPictures.__post_init__(self)
        self._check_source()
        if self.pipeline_dir == self.output_dir / "pipeline":  # the default, written out
            object.__setattr__(self, "pipeline_dir", None)
        given = first_difference(self.prior, fitted_as(self.prior, type(self.prior)()), "prior")
        if given:
            raise ConfigurationError(
                f"{given.name} is {given.value}, but it is taken from the latents: leave it out"
            )

    def _check_source(self) -> None:
        """Raise `ConfigurationError` if options for a cache and for pictures are mixed."""
        if self.data and self.latents != LATENTS:
            raise ConfigurationError(
                f"--latents is {self.latents} and --data is {self.data}: leave out one of them"
            )
        if self.image_task:
            make_task(self.image_task)  # raises if there is no such task
        usual = TrainingPictures(data="")
        names = () if self.data else ["image_task", *(part.name for part in fields(usual))]
        for name in names:
            if getattr(self, name) != getattr(usual, name, ""):
                raise ConfigurationError(
                    f"{name} was given, but latents are read from a cache: give it to smalti "
                    "encode, or add --data"
                )

    @classmethod
    def stored_defaults(cls, given: Callable[[str], Any]) -> dict[str, Any]:
        """The options of the pictures that the tokenizer was trained on, if `data` names them."""
        return super().stored_defaults(given) if given("data") else {}


# -------------------------------------------------------------------------------------------------
# The latents, and the models.


def open_latents(
    config: TrainPriorConfig, device: torch.device
) -> tuple[Tokenizer, Latents, Latents]:
    """The tokenizer, the training latents and the held-out latents: those of a cache, or encoded
    when they are needed.

    Raises:
        SmaltiError: tokenizer and latents do not fit together, or the pictures cannot be used.
    """
    if not config.data:
        opened = open_buckets if bucket_folders(config.latents) else open_splits
        latents, heldout = opened(config.latents, seed=config.seed)
        return tokenizer_of(latents, config.tokenizer, device), latents, heldout
    config.note_stored()
    if is_checkpoint(config.tokenizer):
        raise CheckpointError(
            f"{config.tokenizer} is a checkpoint, which does not have the statistics of its "
            "latents: finish its run, or encode the pictures (smalti encode --tokenizer "
            f"{config.tokenizer}) and read the cache (smalti train-prior --latents runs/latents)"
        )
    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer)).to(device)
    size, channels = tokenizer.image_size, tokenizer.image_channels
    views = VIEW_SETS["identity"]
    encoders = picture_encoders(config, tokenizer)
    stored = tuple(condition for encoder in encoders for condition in encoder.stored)

    def conditions(images: Tensor, keys: Sequence[Key]) -> dict[str, Tensor]:
        return {k: v for encoder in encoders for k, v in encoder.of_images(images, keys).items()}

    train, heldout = (
        OnTheFlyLatents(
            images,
            replace(latents_of(tokenizer, images, views, len(images)), conditions=stored),
            tokenizer.store,
            device,
            place,
            conditions,
        )
        for place, images in zip(
            (config.data, config.heldout_data or config.data),
            config.training_and_heldout(size, channels, config.seed),
            strict=True,
        )
    )
    return tokenizer, train, heldout


def conditioned(config: TrainPriorConfig, latents: Latents) -> PriorConfig:
    """The settings of the prior, with the condition of the run.

    Raises:
        SmaltiError: the latents do not have what the condition needs; there is no such condition;
            the text encoder cannot be loaded.
    """
    condition = config.condition or config.prior.condition
    if not config.condition and not config.initial and not latents.classes:
        condition = "none"
    given: dict[str, Any] = {}
    for kind in condition.split("+"):
        if kind in config.prior.known_conditions:
            found = CONDITION_SOURCES.resolve(kind).prior_options(config, latents, condition)
            given |= {} if found is None else {kind: found}
    prior = config.prior.conditioned(condition, **given)
    config.text.refuse_unless("text" in given)
    if config.image_task and "image" not in given:
        raise ConfigurationError(
            f"image_task is {config.image_task}, but condition is {condition}: add image to "
            "--condition, or leave it out"
        )
    return prior


def build_prior(config: PriorConfig, latents: Latents, tokenizer: Tokenizer) -> Prior:
    """A new prior of this size for these latents.

    Raises:
        ConfigurationError: the prior does not model such latents.
    """
    quantizer: Any = getattr(tokenizer, "quantizer", None)
    fitted = config.fitted(
        latents.spec,
        config.classes_of(latents.num_classes),
        latents.info.tokenizer_fingerprint,
        getattr(quantizer, "config", None),
    ).bucketed(latents.buckets)
    prior: Prior = Prior.registry.build(fitted)
    prior.bind(quantizer)
    return prior


def tokenizer_of(
    latents: LatentCache | BucketedLatents, folder: Path, device: torch.device
) -> Tokenizer:
    """The tokenizer in a folder, at the image size of the latents, or of those of the first bucket.

    Raises:
        CheckpointError: it is not the one that encoded them.
    """
    given = Tokenizer.from_pretrained(str(folder)).to(device)
    bucketed = isinstance(latents, BucketedLatents)
    caches = latents.caches if bucketed else (latents,)
    found = [given.for_latents(c.spec, c.info.tokenizer_fingerprint) for c in caches]
    tokenizer = found[0]
    if tokenizer is None or None in found:
        place = latents.folder if bucketed else latents.folder.parent
        beside = place / TOKENIZER
        remedy = f"give --tokenizer {beside}" if beside.is_dir() else "give the one that made them"
        raise CheckpointError(
            f"the latents in {place} were made by another tokenizer than "
            f"{folder}: {remedy}, or encode again with this one"
        )
    return tokenizer


def initial_prior(config: TrainPriorConfig, latents: Latents, tokenizer: Tokenizer) -> Prior:
    """A prior with its initial weights, on the device of the tokenizer.

    Raises:
        SmaltiError: latents, prior, initial weights or sampling options do not fit together.
    """
    prior = build_prior(conditioned(config, latents), latents, tokenizer)
    prior = prior.to(next(tokenizer.parameters()).device)
    if config.initial:
        load_initial_weights(prior, config.initial, config.weights, tokenizer=tokenizer)
    if latents.info.pairs:
        check_straight(prior)
    check_options(prior, config.preview.options)
    return prior


# -------------------------------------------------------------------------------------------------
# Parts of a step.


def posterior_noise(
    run: Run, tokenizer: Tokenizer, step: int, **options: Any
) -> list[Tensor | None]:
    """Noise that samples latents from their posterior, for each micro-batch of this process; None
    for codes."""
    source = generator(run.config.seed, "posterior", step, 0, 0)
    inputs = random_inputs_of_step(run, tokenizer, step, source, **options)
    return [part.get("noise") for part in inputs]


def prior_loss(
    prior: nn.Module,
    batch: LatentBatch,
    *,
    tokenizer: Tokenizer,
    device: torch.device,
    pairs: bool,
    condition_of: Callable[[LatentBatch], Condition],
    noise: Tensor | None = None,
    random_inputs: RandomInputs | None = None,
) -> Loss:
    """The loss of one batch under a prior, wrapped or not.

    Args:
        pairs: whether the cache holds pairs of latents and the noise they were generated from
            (reflow), stacked along the channels.
        condition_of: the conditions of a batch.
        noise: samples continuous latents from their posterior; None takes its mean.
        random_inputs: of the prior; None samples them from torch's global generators.
    """
    stored, condition = on_device(batch.stored, device), moved(condition_of(batch), device)
    if pairs:  # reflow: the flow's noise is stored beside each latent
        latents, start = stored.chunk(2, dim=1)
        return prior(latents, condition, {**(random_inputs or {}), "noise": start})
    return prior(tokenizer.latents(stored, noise=noise), condition, random_inputs)


# -------------------------------------------------------------------------------------------------
# The loop of one model on cached latents, also that of `smalti train-classifier`.

Model = TypeVar("Model", bound=nn.Module)


class Learner(Generic[Model]):
    """A model in training: its optimizer, the average of its weights, and `wrapped`, which averages
    its gradients over the processes."""

    def __init__(self, module: Model, run: Run) -> None:
        self.module = module
        self.optimizer = make_optimizer(module, run.config)
        self.ema = EMA(module, run.config.ema_decay)
        run.track(model=module, ema=self.ema, optimizer=OptimizerState(self.optimizer))
        # DDP, or FSDP2 in place
        self.wrapped = shard(run.accelerator, module, self.optimizer)


def learn(
    run: Run,
    learner: Learner[Any],
    batches: Iterator[list[LatentBatch]],
    loss_of: Callable[..., Loss],
    tokenizer: Tokenizer,
    measure: Callable[[int], None],
) -> None:
    """The remaining steps of a run.

    Args:
        batches: the micro-batches of each step.
        loss_of: `prior_loss` of (model, micro-batch), with its random numbers as keywords.
        measure: called with a step after which held-out latents are measured.
    """
    config, optimizer = run.config, learner.optimizer
    module, model = learner.module, learner.wrapped
    with run.interruptible():
        run.catch_up(measure)
        for step in run.remaining_steps():
            seed_everything(config.seed, step, run.rank)  # a resumed step repeats its noise
            rate = learning_rate(config, step)
            with run.timed():
                model.train()
                if isinstance(module, Prior):
                    module.set_progress(step / config.max_train_steps)
                micro_batches = next(batches)
                grid = micro_batches[0].grid  # that of all samples of the step
                options: dict[str, Any] = {} if grid is None else {"grid": grid}
                random_inputs = random_inputs_of_step(run, module, step, **options)
                noise = posterior_noise(run, tokenizer, step, **options)
                losses, parts = [], []
                for index, batch in enumerate(micro_batches):
                    with run.micro_batch(index, model):
                        loss = loss_of(
                            model, batch, noise=noise[index], random_inputs=random_inputs[index]
                        )
                        run.backward(loss.total)
                    losses.append(loss.total.detach())
                    parts.append({"loss": loss.total.detach(), **loss.parts})
                norm = clip_gradients(module, config.max_grad_norm)
                if accepted := run.guard.accepts("model", step, losses, norm):
                    set_learning_rate(optimizer, rate)
                    optimizer.step()
                    learner.ema.update(module)
                optimizer.zero_grad(set_to_none=True)
                values = {**mean_of(parts), "gradient_norm": logged_norm(norm, accepted)}

            if run.due(step, config.logging_steps):
                run.log(step, {**values, "learning_rate": rate})
            if run.due(step, config.validation_steps):
                measure(step)
            run.checkpoint(step)
    learner.ema.gather()


# -------------------------------------------------------------------------------------------------
# Training.


@torch.no_grad()
def validate(
    prior: Prior,
    heldout: Latents,
    loss_of: Callable[[nn.Module, LatentBatch], Loss],
    run: Run,
    progress: Callable[[int], object] = lambda samples: None,
) -> dict[str, float]:
    """Mean loss per sample of held-out latents, evenly over the classes, at the mean of their
    posterior."""
    total, count = 0.0, 0
    for batch in validation_batches(heldout, run):
        with run.accelerator.autocast():
            loss = loss_of(prior, batch).total
        total += loss.item() * len(batch.labels)
        count += len(batch.labels)
        progress(len(batch.labels))
    return {"val_loss": total / count}


def validation_batches(heldout: Latents, run: Run) -> Iterator[LatentBatch]:
    """The held-out latents that are measured, evenly over the classes."""
    chosen = heldout.even_subset(VALIDATION_SAMPLES, run.config.seed)
    yield from heldout.batches_of(chosen, 128)


def shown_prompts(prior: Prior, heldout: Latents) -> list[str]:
    """Captions of held-out pictures, the prompts of the preview; [] without captions."""
    if prior.config.text is None:
        return []
    captions = heldout.all_captions(heldout.even_subset(SHOWN_PROMPTS, 0)) or []
    return list(dict.fromkeys(texts[0] for texts in captions))


def save(
    folder: Path,
    run: Run,
    pipeline: Pipeline,
    grid: Callable[[], Image.Image],
    pictures: DataOptions | None,
) -> None:
    """Save tokenizer and prior as `Pipeline.from_pretrained` reads them, with a grid of samples
    (that of the last step, if it was just sampled) and the options of the pictures, if known."""
    samples = run.final_picture("samples") or grid()
    pipeline.save_pretrained(folder, samples=samples)
    if pictures is not None:
        write_options(folder / "tokenizer", pictures)


def train(config: TrainPriorConfig) -> Path:
    """Train, and return the folder of the finished pipeline (EMA weights)."""
    run = Run(config, "train-prior", result=config.pipeline_dir or config.output_dir / "pipeline")
    torch.manual_seed(config.seed)
    tokenizer, latents, heldout = open_latents(config, run.device)
    prior = initial_prior(config, latents, tokenizer)
    learner = Learner(prior, run)
    prepare_blocks(prior, compiled=config.compile, recomputed=config.gradient_checkpointing)
    ema = learner.ema
    warn_of_empty_classes(latents.classes, latents.labels, latents.place)
    pairs = bool(latents.info.pairs)  # of latents and noise, for reflow
    pipeline = Pipeline(tokenizer, ema.model, latents.classes if prior.num_classes else ())
    condition_of = BatchConditions(prior.config, pipeline.text_encoder, latents, heldout)
    loss_of = partial(
        prior_loss,
        tokenizer=tokenizer,
        device=run.device,
        pairs=pairs,
        condition_of=condition_of,
    )
    shown = partial(sample_grid, pipeline, prompts=shown_prompts(prior, heldout))
    if not all(source.HAS_NAMES for source in condition_of.sources.values()):
        shown = partial(condition_grid, pipeline, heldout)
    pipeline.training_pictures = latents.info.dataset_fingerprint
    pipeline.sampling = sampling_of_run(config_to_dict(config), pipeline.prior)
    run.latents = latents.info if config.data else None
    order = latents.order(config.train_batch_size, config.seed)
    run.resume(order.identity(latents.fingerprint))
    batches = run.reading(latents.batches(order, **run.share_of_data()))

    def measure(step: int) -> None:
        ema.gather()  # FSDP2: every process sends its shards
        run.measure(
            step,
            partial(validate, ema.model, heldout, loss_of, run),
            min(len(heldout), VALIDATION_SAMPLES),
            samples=partial(shown, **config.preview.options),
        )

    learn(run, learner, batches, loss_of, tokenizer, measure)
    read = read_options(training_cache(config.latents)) or read_options(config.tokenizer)
    pictures = config if config.data else read
    grid = partial(shown, **config.preview.options)
    finished = partial(save, run=run, pipeline=pipeline, grid=grid)
    return run.export(partial(finished, pictures=pictures))


def train_prior(config: TrainPriorConfig | None = None, **settings: Any) -> Pipeline:
    """Train a prior, and return the finished pipeline: `smalti train-prior` in Python.

    Args:
        config: all settings; or give `settings`.
        settings: fields of `TrainPriorConfig`, as in a recipe: `prior="gpt-nano"` is a preset.

    Raises:
        SmaltiError: as the command.
        KeyboardInterrupt: the run was stopped; `resume_from_checkpoint="latest"` continues it.
    """
    return Pipeline.from_pretrained(in_python(train, TrainPriorConfig, config, settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti train-prior`."""
    folder = train(parse_config(TrainPriorConfig, argv, prog="smalti train-prior"))
    say(f"pipeline: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
