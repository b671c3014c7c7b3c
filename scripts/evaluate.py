"""Measure a saved tokenizer or pipeline on held-out images and on samples.

smalti evaluate --model runs/demo/pipeline --data emoji --output_dir runs/demo/evaluation
smalti evaluate --samples runs/samples --reference emoji --reference_split train
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smalti.checkpoints import has_prior
from smalti.cli import parse_config, run_command
from smalti.config import ImageSize, check_at_least, saved_fields
from smalti.data.buckets import Bucket
from smalti.data.dataset import ImageDataset
from smalti.data.image_io import save_png
from smalti.data.latents import height_and_width
from smalti.errors import ConfigurationError, DataError, GenerationError
from smalti.evaluation.evaluator import SampleEvaluator, TokenizerEvaluator, evenly_spaced
from smalti.evaluation.features import feature_extractors
from smalti.evaluation.metrics import (
    SETTINGS,
    Found,
    Metric,
    Undefined,
    defined,
    table,
    write_summary,
)
from smalti.evaluation.pictures import StoredImages, stored
from smalti.files import first_difference, read_hashed_json, write_hashed_json
from smalti.hub import resolve_folder
from smalti.pipelines.conditions import Inputs, arguments_for, check_options, conditions_of
from smalti.pipelines.generation import picture_generator, sample_grid
from smalti.pipelines.image_tasks import (
    GREY,
    Given,
    ImageTask,
    make_task,
    with_image_condition,
)
from smalti.pipelines.image_tasks import resized as enlarged
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.model_index import INDEX
from smalti.pipelines.pipeline import DEMO, Pipeline, check_model
from smalti.prior.conditions.base import moved
from smalti.scripts.evaluate_sets import Comparison, SetOptions
from smalti.scripts.options import Sampling
from smalti.tokenizer.base import Tokenizer
from smalti.training.processes import agreed_errors, fills_folder, join_job, resolve_precision, say
from smalti.weights import short_name

SUMMARY = "summary.json"
PRODUCTS = ("samples.png", "reconstructions.png", "neighbours.png", "summary.json")

SEEN = {  # what networks for RGB see of images with other channels
    1: "grey, repeated as RGB",
    4: "RGB on white; LPIPS the mean over black and white",
}
SHOWN_PROMPTS = 12  # rows of the grid of a pipeline of captions
PIPELINE_FLAGS = {field.name for field in fields(Sampling)} | {
    "other_data",
    "num_samples",
    "num_references",
    "classifier_epochs",
    "dtype",
}


@dataclass(frozen=True)
class EvaluateConfig(SetOptions):
    """Measure a saved tokenizer or pipeline on held-out images, and the samples of a pipeline; or
    compare two sets of pictures."""

    TRAINED: ClassVar[str] = "model"

    model: Annotated[str, place_of("A pipeline or tokenizer")] = DEMO
    # Allow data that the pipeline was not trained on; then all of its images are held out.
    other_data: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(16, self, "num_samples", "num_references")
        check_at_least(1, self, "batch_size", "classifier_epochs")
        self.check_sets()
        for name in ("model", "data", "other_data", "heldout_data"):
            if self.samples and getattr(self, name) != getattr(EvaluateConfig, name):
                raise ConfigurationError(
                    f"--{name} is for the evaluation of a model, and --samples for two sets of "
                    "pictures: leave one out; --samples may be a pipeline, --reference a data set"
                )

    @classmethod
    def stored_defaults(cls, given: Callable[[str], Any]) -> dict[str, Any]:
        """Of the pictures that the model was trained on; none for two sets of pictures."""
        return {} if given("samples") else super().stored_defaults(given)


def evaluate(config: EvaluateConfig) -> dict[str, Metric]:
    """`measured`, without what is not defined."""
    return defined(measured(config))


@fills_folder()
def measured(config: EvaluateConfig) -> Found:
    """Measure; write reconstructions.png and summary.json, and for a pipeline samples.png and
    neighbours.png; of two sets of pictures summary.json alone.

    Returns:
        The metrics by name; in place of one that is not defined, the reason.
    """
    if config.samples:
        return compare_sets(config)
    check_model(config.model)
    folder = resolve_folder(config.model)
    config.note_stored()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (folder / INDEX).is_file() or has_prior(folder):
        pipeline = Pipeline.from_pretrained(
            folder, device=device, weights=config.weights, dtype=config.dtype
        )
        if config.image_size is not None:
            pipeline = resized(config, pipeline, config.image_size)
        return evaluate_pipeline(config, pipeline)
    refuse_pipeline_flags(config)
    tokenizer = Tokenizer.from_pretrained(folder, device=device, weights=config.weights)
    if config.image_size is not None:
        tokenizer = tokenizer.resized(config.image_size)
    return evaluate_tokenizer(config, tokenizer)


def compare_sets(config: EvaluateConfig) -> Found:
    """Metrics of two sets of pictures, see `evaluate_sets.py`."""
    comparison = Comparison.open(config)
    with agreed_errors():
        if join_job().is_main_process:
            claim(config, *comparison.identities)
    return comparison.measure()


def resized(config: EvaluateConfig, pipeline: Pipeline, size: ImageSize) -> Pipeline:
    """The pipeline at another image size. It knows its training pictures by a fingerprint that
    contains the size, which is replaced by that at the new one."""
    same = pipeline.resized(size)
    channels = pipeline.tokenizer.image_channels
    before, after = (
        config.dataset(
            "train", one.tokenizer.image_size, channels=channels, bucket=one.bucket
        ).fingerprint
        for one in (pipeline, same)
    )
    if same.training_pictures == before:
        same.training_pictures = after
    return same


def evaluate_tokenizer(config: EvaluateConfig, tokenizer: Tokenizer) -> Found:
    """Metrics of reconstructions."""
    evaluator = tokenizer_evaluator(config, tokenizer)
    extractors = feature_extractors(
        config.features, evaluator.lpips, config.feature_weights, config.inception
    )
    claim(config, tokenizer.fingerprint)
    metrics = evaluator.reconstruction(config.output_dir / "reconstructions.png", extractors)
    summary = config.output_dir / "summary.json"
    write_summary(summary, metrics, tokenizer=tokenizer.fingerprint)
    return metrics


def evaluate_pipeline(config: EvaluateConfig, pipeline: Pipeline) -> Found:
    """Metrics of reconstructions, of the prior's likelihood, and of samples."""
    config = config.guided_like(pipeline)
    evaluator = sample_evaluator(config, pipeline)
    tokenizer = evaluator.tokenizer
    extractors = feature_extractors(
        config.features, tokenizer.lpips, config.feature_weights, config.inception
    )
    check_options(pipeline.prior, config.options)
    fingerprints = {
        "tokenizer": pipeline.tokenizer.fingerprint,
        "prior": pipeline.prior.fingerprint,
    }
    asked = requests(config, pipeline, evaluator)
    claim(config, *fingerprints.values())
    out = config.output_dir

    if asked.given is None:
        grid = sample_grid(pipeline, prompts=asked.shown, seed=config.seed, **config.options)
        save_png(out / "samples.png", grid)
    metrics = tokenizer.reconstruction(out / "reconstructions.png", extractors)
    if pipeline.prior.has_likelihood:
        condition_of = partial(heldout_condition, pipeline, evaluator, given=asked.given)
        metrics |= evaluator.likelihood(pipeline.prior.bits_per_dimension, condition_of)
    else:
        metrics["heldout_bits_per_dimension"] = Undefined("the prior has no likelihood")
    sets = evaluator.sets(sample(config, pipeline, asked), asked.labels)
    protocol = {
        **tokenizer.protocol,
        "sampling": {
            "num_samples": len(asked.labels),
            "seed": config.seed,
            **precision_of(pipeline),
            **config.options,
            **asked.protocol,
        },
    }
    if asked.given is not None:
        shown, known = asked.given.shown(), asked.given.known()
        strip = out / "samples.png"
        rows = asked.given.rows
        metrics |= evaluator.given(sets.samples, rows, shown, known, protocol, strip)
    metrics |= evaluator.neighbours(sets, protocol, out / "neighbours.png")
    metrics |= evaluator.distances(sets, extractors, protocol)
    kinds, epochs = pipeline.prior.condition_kinds, config.classifier_epochs
    if "class" in kinds:
        bf16 = resolve_precision("auto", tokenizer.device) == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        metrics |= evaluator.classification(sets, protocol, epochs=epochs, dtype=dtype)
    if "text" in kinds:
        metrics |= evaluator.retrieval(sets.samples, asked.prompts, protocol, epochs=epochs)
    write_summary(out / "summary.json", metrics, **fingerprints)
    return metrics


@dataclass(frozen=True)
class GivenPictures:
    """What an image-conditional pipeline is given: held-out pictures, reduced or with a mask."""

    task: ImageTask
    dataset: ImageDataset
    rows: Sequence[int]  # of the pictures that samples are made of
    size: ImageSize
    batch_size: int
    folder: Path  # for temporary files

    def of(self, rows: Sequence[int]) -> Given:
        """What is given of some pictures; their masks depend on their rows alone."""
        originals = torch.cat([b.images for b in self.dataset.batches_of(rows, len(rows))])
        return self.task.degraded(originals, [(0, row) for row in rows])

    def added_to(self, arguments: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """Arguments of a pipeline, with what is given of some pictures, which says how many."""
        given = self.of(rows)
        others = {name: value for name, value in arguments.items() if name != "num_images"}
        return {**others, "image": (given.images + 1) / 2, "mask_image": given.mask}

    def batches(self) -> Iterator[Given]:
        for first in range(0, len(self.rows), self.batch_size):
            yield self.of(self.rows[first : first + self.batch_size])

    def shown(self) -> StoredImages:
        """All of them in the full size: enlarged (bicubic), or with grey inside the mask."""

        def whole(given: Given) -> Tensor:
            if given.mask is None:
                return enlarged(given.images, *height_and_width(self.size))
            return torch.where(given.mask > 0.5, GREY, given.images)

        return stored(map(whole, self.batches()), self.folder)

    def known(self) -> Tensor | None:
        """The pixels outside the masks, (N, 1, H, W) bool; None for a task without masks."""
        if not self.task.takes_mask:
            return None
        masks = [given.mask for given in self.batches()]
        return torch.cat([mask < 0.5 for mask in masks if mask is not None])


@dataclass(frozen=True)
class Requests:
    """What the samples are asked to show."""

    labels: Tensor  # (N,), classes; 0 where the pictures have none
    protocol: dict[str, str]  # how they were chosen
    prompts: Sequence[str] = ()  # N of them, or none
    given: GivenPictures | None = None  # the pictures that they are made of

    @property
    def shown(self) -> list[str]:
        """Some of the prompts, each once, for the grid."""
        different = list(dict.fromkeys(self.prompts))
        return different[:: max(1, len(different) // SHOWN_PROMPTS)][:SHOWN_PROMPTS]


def requests(config: EvaluateConfig, pipeline: Pipeline, evaluator: SampleEvaluator) -> Requests:
    """Classes in the proportions of the training pictures; of a pipeline of captions, the captions
    of held-out pictures, and their classes; of one that is given pictures, held-out pictures, and
    their captions and classes.

    Raises:
        SmaltiError: the pictures have no captions; one is too long; what encodes them, or what
            pictures are given, is unknown.
    """
    heldout = evaluator.tokenizer.dataset
    kinds = pipeline.prior.condition_kinds
    if not {"text", "image"} & set(kinds):
        chosen = {"labels": "as in the training pictures"} if "class" in kinds else {}
        return Requests(evaluator.labels(config.num_samples), chosen)
    given, chosen = None, {}
    rows = evenly_spaced(config.num_samples, len(heldout)).tolist()
    if "image" in kinds:
        given = given_pictures(config, pipeline, heldout)
        rows = list(given.rows)
        chosen["given"] = f"{given.task.text}, of held-out pictures, evenly over classes and groups"
    prompts = []
    if "text" in kinds:
        prompts = prompts_of(config, pipeline, heldout, rows)
        chosen["prompts"] = "first captions of held-out pictures, evenly spaced"
        if given is not None:
            chosen["prompts"] = "first captions of the given pictures"
    return Requests(heldout.labels[rows], chosen, prompts, given)


def prompts_of(
    config: EvaluateConfig, pipeline: Pipeline, heldout: ImageDataset, rows: Sequence[int]
) -> list[str]:
    """The first captions of some held-out pictures; raises as `requests`."""
    heldout.source.require_captions()
    if pipeline.text_encoder is None:
        raise GenerationError(
            f"{config.model} was trained on features of an unknown text encoder, so it cannot be "
            "given captions: measure one of smalti train-prior --text.encoder"
        )
    prompts = [heldout.captions(row)[0] for row in rows]
    pipeline.text_encoder.check_captions(prompts, pipeline.prior.config.text.length)
    return prompts


def given_pictures(
    config: EvaluateConfig, pipeline: Pipeline, heldout: ImageDataset
) -> GivenPictures:
    """The held-out pictures that a pipeline is given; raises as `requests`."""
    image = pipeline.prior.config.image
    if not image.task:
        raise GenerationError(
            f"{config.model} was trained on pictures of an unknown task, so it cannot be given "
            "pictures: measure one of smalti encode --image_task"
        )
    rows = heldout.even_subset(config.num_samples, config.seed)
    size, task = pipeline.tokenizer.image_size, make_task(image.task)
    return GivenPictures(task, heldout, rows, size, config.batch_size, config.output_dir)


def heldout_condition(
    pipeline: Pipeline,
    evaluator: SampleEvaluator,
    rows: Sequence[int],
    given: GivenPictures | None = None,
) -> Any:
    """The condition of held-out pictures, on the device of the prior."""
    heldout = evaluator.tokenizer.dataset
    takes_prompts = "text" in pipeline.prior.condition_kinds
    prompts = [heldout.captions(row)[0] for row in rows] if takes_prompts else ()
    arguments = arguments_for(pipeline.classes, heldout.labels[list(rows)], prompts)
    if given is None:
        inputs = Inputs(**arguments)
    else:
        inputs = Inputs(**given.added_to(arguments, rows))
        inputs, _ = with_image_condition(pipeline.tokenizer, pipeline.prior, inputs)
    encoder = pipeline.text_encoder if inputs.needs_encoder else None
    found = conditions_of(pipeline.prior, inputs, 1, pipeline.classes, encoder)
    return moved(found.value, pipeline.device)


def sample(config: EvaluateConfig, pipeline: Pipeline, asked: Requests) -> StoredImages:
    """Samples; sample i has a generator of its own."""

    def batches() -> Iterator[Tensor]:
        for rows in tqdm(torch.arange(len(asked.labels)).split(config.batch_size), unit="batch"):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            arguments = arguments_for(pipeline.classes, asked.labels[part], asked.prompts[part])
            if asked.given is not None:
                arguments = asked.given.added_to(arguments, asked.given.rows[part])
            output = pipeline(
                **arguments,
                generator=[picture_generator(config.seed, i) for i in rows.tolist()],
                output_type="pt",
                **config.options,
            )
            yield output.images * 2 - 1

    return stored(batches(), config.output_dir)


# -------------------------------------------------------------------------------------------------
# The evaluators of a configuration


def tokenizer_evaluator(
    config: EvaluateConfig,
    tokenizer: Tokenizer,
    classes: Sequence[str] = (),
    bucket: Bucket | None = None,
    **protocol: Any,
) -> TokenizerEvaluator:
    """The evaluator of a tokenizer on held-out images; `protocol` is recorded beside the data.

    Args:
        classes: the names of the classes in the order of a pipeline's labels.
        bucket: only the pictures of this one; None: all.
    """
    size, channels = tokenizer.image_size, tokenizer.image_channels
    heldout = config.dataset("heldout", size, channels=channels, bucket=bucket)
    if classes:
        heldout.number_as(classes)
    data_protocol = {
        "data": config.data,
        "image_size": tokenizer.image_size,
        **({"heldout_data": config.heldout_data} if config.heldout_data else {}),
        "heldout_fraction": config.heldout_fraction,
        "split_seed": config.split_seed,
        "split": "heldout",
        "heldout_fingerprint": heldout.fingerprint,
    }
    if bucket is not None:
        data_protocol["buckets"] = list(bucket.sizes)
    if tokenizer.image_channels != 3:
        data_protocol["image_channels"] = tokenizer.image_channels
        data_protocol["networks_see"] = SEEN[tokenizer.image_channels]
    return TokenizerEvaluator(
        tokenizer,
        heldout,
        {**data_protocol, **protocol},
        device=next(tokenizer.parameters()).device,
        batch_size=config.batch_size,
        seed=config.seed,
        folder=config.output_dir,
    )


def sample_evaluator(config: EvaluateConfig, pipeline: Pipeline) -> SampleEvaluator:
    """The evaluator of a pipeline's samples.

    Raises:
        DataError: the data has other classes than the pipeline, or its training images are not
            those of the pipeline and `other_data` does not allow that.
    """
    train = training_images(config, pipeline)
    trained_on_the_rest = check_training_images(config, pipeline, train)
    return SampleEvaluator(
        tokenizer_evaluator(
            config,
            pipeline.tokenizer,
            pipeline.classes,
            pipeline.bucket,
            trained_on_the_rest=trained_on_the_rest,
        ),
        train,
        num_references=config.num_references,
        seed=config.seed,
    )


def training_images(config: EvaluateConfig, pipeline: Pipeline) -> ImageDataset:
    """The training images: all pictures of `data`, if others are held out; but those that the
    pipeline was trained on, if a part of `data` was held out then."""
    size, channels = pipeline.tokenizer.image_size, pipeline.tokenizer.image_channels
    read: dict[str, Any] = {"channels": channels, "bucket": pipeline.bucket}
    train = config.dataset("train", size, **read)
    if config.heldout_data and pipeline.training_pictures not in ("", train.fingerprint):
        divided = replace(config, heldout_data="").dataset("train", size, **read)
        if divided.fingerprint == pipeline.training_pictures:
            return divided
    return train


def check_training_images(config: EvaluateConfig, pipeline: Pipeline, train: ImageDataset) -> str:
    """Whether the pipeline was trained on `train`, and so not on the held-out images: "yes", "no"
    or "not known".

    Raises:
        DataError: see `sample_evaluator`.
    """
    if pipeline.classes and not train.number_as(pipeline.classes):
        found = f"the classes {', '.join(train.classes)}" if train.classes else "no classes"
        raise DataError(
            f"{config.data} has {found}; the pipeline was trained on "
            f"{', '.join(pipeline.classes)}: give --data as in training"
        )
    known = pipeline.training_pictures
    if known and known != train.fingerprint and not config.other_data:
        raise DataError(
            f"the training images of {config.data}, with this --heldout_fraction and --split_seed, "
            "are not those of the pipeline, so it may have learned from the held-out images: give "
            "--data, --heldout_fraction and --split_seed as in training, or --other_data"
        )
    return {"": "not known", train.fingerprint: "yes"}.get(known, "no")


def precision_of(pipeline: Pipeline) -> dict[str, str]:
    """The precision of the samples, for the protocol; none for fp32."""
    name = short_name(pipeline.dtype)
    return {} if name == "fp32" else {"dtype": name}


def refuse_pipeline_flags(config: EvaluateConfig) -> None:
    """Raise `ConfigurationError` if a flag for pipelines is given for a tokenizer."""
    for field in fields(config):
        if field.name in PIPELINE_FLAGS and getattr(config, field.name) != field.default:
            raise ConfigurationError(
                f"{config.model} is a tokenizer and has no samples: leave out --{field.name}"
            )


# -------------------------------------------------------------------------------------------------
# The output folder


def claim(config: EvaluateConfig, *fingerprints: str) -> None:
    """Mark the output folder as that of this evaluation.

    Raises:
        ConfigurationError: it contains another evaluation, or files of these names from elsewhere.
    """
    path = config.output_dir / SETTINGS
    settings = {**saved_fields(config), "models": list(fingerprints)}
    del settings["output_dir"], settings["weights"]  # the fingerprints tell the weights apart
    if path.is_file():
        defaults = saved_fields(EvaluateConfig())
        different = first_difference(read_hashed_json(path), settings, defaults)
        if different:
            raise ConfigurationError(
                f"{config.output_dir} holds another evaluation (its {different[0]} differs): "
                "choose another --output_dir"
            )
        return
    foreign = [name for name in PRODUCTS if (config.output_dir / name).exists()]
    if foreign:
        raise ConfigurationError(
            f"{config.output_dir} already holds a {foreign[0]} that no evaluation with these "
            "settings made: choose another --output_dir"
        )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_hashed_json(path, settings)


# -------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti evaluate`."""
    config = parse_config(EvaluateConfig, argv, prog="smalti evaluate")
    found = measured(config)
    say("\n".join([*([table(found)] if found else []), f"summary: {config.output_dir / SUMMARY}"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
