"""A classifier of noisy latents, which guides a flow prior to a class (Dhariwal and Nichol,
2105.05233, section 4).

    smalti train-classifier --latents runs/latents --prior runs/demo/pipeline
    smalti generate --model runs/demo/pipeline --classifier runs/classifier/classifier

The prior need not know the classes: it may be unconditional. The loop is that of `smalti
train-prior`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from smalti.cli import in_python, parse_config, run_command
from smalti.config import first_difference
from smalti.data.classes import warn_of_empty_classes
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latent_cache.splits import open_splits
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.errors import ConfigurationError
from smalti.pipelines.finetune import folder_of
from smalti.pipelines.model_flag import place_of
from smalti.prior.base import Prior
from smalti.prior.flow.classifier import LatentClassifier, LatentClassifierConfig
from smalti.prior.flow.config import FlowConfig
from smalti.scripts.train_prior import (
    VALIDATION_SAMPLES,
    Learner,
    learn,
    prior_loss,
    tokenizer_of,
    validation_batches,
)
from smalti.tokenizer.base import Tokenizer
from smalti.training.config import RunConfig
from smalti.training.processes import say
from smalti.training.run import Run

BANDS = 4  # parts of the times [0, 1], for each of which the accuracy is measured


@dataclass(frozen=True)
class TrainClassifierConfig(RunConfig):
    """Train a classifier of noisy latents, which guides a flow prior to a class."""

    output_dir: Path = Path("runs/classifier")  # folder of checkpoints, logs and the classifier
    latents: Path = Path("runs/latents")  # folder written by `smalti encode`
    prior: Annotated[
        str,
        place_of("A pipeline with the flow prior to guide, whose path, times and tokenizer count"),
    ] = ""
    # The one that encoded the latents; default: that of the pipeline in --prior.
    tokenizer: Path | None = None
    # Its fields about latents, classes and the tokenizer are taken from the cache.
    classifier: LatentClassifierConfig = field(default_factory=LatentClassifierConfig)
    max_train_steps: int = 10_000  # number of optimizer steps
    # Both as in the paper's code.
    learning_rate: float = 3e-4  # of AdamW, at its peak
    weight_decay: float = 0.05  # of AdamW, on the matrices of layers only

    @classmethod
    def stored_defaults(cls, given: Callable[[str], Any]) -> dict[str, Any]:
        """A classifier with the path and the training times of the flow prior in --prior.

        Args:
            given: the value of a field on the command line or in the recipe, None if there is none.

        Raises:
            SmaltiError: there is no flow prior.
        """
        prior = given("prior")
        if not prior:
            return {}
        flow = flow_in(str(prior))
        return {"classifier": replace(LatentClassifierConfig(), path=flow.path, times=flow.times)}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in LatentClassifierConfig.FROM_LATENTS:
            value = getattr(self.classifier, name)
            if value != getattr(LatentClassifierConfig(), name):
                raise ConfigurationError(
                    f"classifier.{name} is {value}, but it is taken from the latents: leave it out"
                )


# -------------------------------------------------------------------------------------------------
# The models.


def flow_in(path_or_hub_id: str) -> FlowConfig:
    """The settings of the flow prior in a pipeline, or in a folder of its own.

    Raises:
        SmaltiError: there is no prior, or one of another kind.
    """
    config = Prior.saved_config(folder_of(Prior, path_or_hub_id))
    if not isinstance(config, FlowConfig):
        raise ConfigurationError(
            f"{path_or_hub_id} holds a {config.kind} prior; a classifier guides a flow prior"
        )
    return config


def check_prior(config: TrainClassifierConfig, latents: LatentCache) -> None:
    """Raise `ConfigurationError` unless the classifier will fit the prior that --prior names."""
    if not config.prior:
        return
    flow, tokenizer = flow_in(config.prior), latents.info.tokenizer_fingerprint
    if flow.spec != latents.spec or flow.tokenizer_fingerprint not in (None, tokenizer):
        raise ConfigurationError(
            f"the prior in {config.prior} models other latents than those in {config.latents}: "
            "give the latents that it was trained on"
        )
    found = first_difference(config.classifier.path, flow.path, "classifier.path")
    if found:
        raise ConfigurationError(
            f"{found.name} is {found.value}, but {found.other} in {config.prior}: leave it out"
        )


def build_models(
    config: TrainClassifierConfig, latents: LatentCache, device: torch.device
) -> tuple[Tokenizer, LatentClassifier]:
    """The tokenizer that encoded the latents, and a new classifier of them.

    Raises:
        SmaltiError: tokenizer, latents, prior and classifier do not fit together.
    """
    if latents.info.pairs:
        raise ConfigurationError(
            f"{config.latents} holds pairs for reflow: give the latents that the flow was trained "
            "on"
        )
    check_prior(config, latents)
    if config.tokenizer is None and not config.prior:
        raise ConfigurationError(
            "neither a prior nor a tokenizer was given: give --prior, the pipeline to guide, or "
            "--tokenizer, the one that encoded the latents"
        )
    tokenizer = config.tokenizer or folder_of(Tokenizer, config.prior)
    fingerprint = latents.info.tokenizer_fingerprint
    fitted = config.classifier.fitted(latents.spec, latents.classes, fingerprint)
    return tokenizer_of(latents, tokenizer, device), LatentClassifier(fitted).to(device)


# -------------------------------------------------------------------------------------------------
# Training.


@torch.no_grad()
def validate(
    classifier: LatentClassifier,
    tokenizer: Tokenizer,
    heldout: LatentCache,
    run: Run,
    progress: Callable[[int], object] = lambda samples: None,
) -> Mapping[str, float]:
    """Mean loss and accuracy of held-out latents, evenly over the classes, and the accuracy in each
    quarter of the times: `val_accuracy_q0` is at the most noise."""
    totals: dict[str, float] = {}
    count = 0
    for batch in validation_batches(heldout, run):
        latents = tokenizer.latents(batch.stored.to(run.device))
        labels = batch.labels.to(run.device)
        with run.accelerator.autocast():
            loss = classifier(latents, labels)
            found = classifier.recognised(latents, labels, BANDS)  # (BANDS, B)
        values = {"val_loss": loss.total, "val_accuracy": loss.parts["accuracy"]}
        quarters = found.float().mean(1)
        values |= {f"val_accuracy_q{i}": quarters[i] for i in range(BANDS)}
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value.item() * len(labels)
        count += len(labels)
        progress(len(labels))
    return {name: total / count for name, total in totals.items()}


def train(config: TrainClassifierConfig) -> Path:
    """Train, and return the folder of the finished classifier (EMA weights)."""
    run = Run(config, "train-classifier", result=config.output_dir / "classifier")
    latents, heldout = open_splits(config.latents, seed=config.seed)
    torch.manual_seed(config.seed)
    tokenizer, classifier = build_models(config, latents, run.device)
    learner = Learner(classifier, run)
    warn_of_empty_classes(latents.classes, latents.labels, latents.folder)
    loss_of = partial(
        prior_loss,
        tokenizer=tokenizer,
        device=run.device,
        pairs=False,
        condition_of=lambda batch: batch.labels,
    )
    run.resume(latents.fingerprint)
    order = DataOrder(len(latents), config.train_batch_size, config.seed)
    batches = run.reading(stream_batches(latents, order, **run.share_of_data()))

    def measure(step: int) -> None:
        learner.ema.gather()  # FSDP2: every process sends its shards
        run.measure(
            step,
            partial(validate, learner.ema.model, tokenizer, heldout, run),
            min(len(heldout), VALIDATION_SAMPLES),
        )

    learn(run, learner, batches, loss_of, tokenizer, measure)
    return run.export(learner.ema.model.save_pretrained)


def train_classifier(
    config: TrainClassifierConfig | None = None, **settings: Any
) -> LatentClassifier:
    """Train a classifier of noisy latents, and return it: `smalti train-classifier` in Python.

    Args:
        config: all settings; or give `settings`.
        settings: fields of `TrainClassifierConfig`, as in a recipe.

    Raises:
        SmaltiError: as the command.
        KeyboardInterrupt: the run was stopped; `resume_from_checkpoint="latest"` continues it.
    """
    return LatentClassifier.from_pretrained(
        in_python(train, TrainClassifierConfig, config, settings)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti train-classifier`."""
    folder = train(parse_config(TrainClassifierConfig, argv, prog="smalti train-classifier"))
    say(f"classifier: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
