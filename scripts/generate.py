"""Batch generation: a pipeline and a seed -> a folder of numbered picture files, WebDataset shards
or one npz.

    smalti generate --model runs/demo/pipeline --output_dir samples --num_images_per_class 8
    smalti generate --model runs/text/pipeline --prompts prompts.txt     a pipeline of captions
    smalti generate --model runs/flow/pipeline --classifier runs/classifier/classifier
    smalti generate --model runs/demo/pipeline --format npz --num_images 50000 --dtype bf16

After an interruption the same command continues. With a larger number it adds pictures.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from smalti.checkpoints import Weights
from smalti.cli import parse_config, run_command
from smalti.config import ImageSize, check_at_least
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latent_cache.manifest import MANIFEST
from smalti.data.sources.base import open_unverified
from smalti.data.sources.options import SourceOptions
from smalti.errors import ConfigurationError, DataError, GenerationError
from smalti.pipelines.conditions import conditional_on, sources_of
from smalti.pipelines.generation import continued_labels, generate_folder
from smalti.pipelines.guided import GuidedPipeline
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.picture_files import FormatName, Layout, PictureFormat
from smalti.pipelines.pipeline import DEMO, Pipeline, check_model
from smalti.prior.flow.classifier import LatentClassifier
from smalti.scripts.options import ConditionFlags, DType, Sampling, refuse_other_conditions
from smalti.training.processes import fills_folder, join_job, say, shared_work


@dataclass(frozen=True)
class GenerateConfig(Sampling, ConditionFlags):
    """Sample pictures with a saved pipeline."""

    model: Annotated[str, place_of("A pipeline")] = DEMO
    weights: Weights = "ema"  # of a checkpoint: averaged over its run (ema), or raw
    output_dir: Path = Path("samples")  # folder of the pictures
    class_labels: tuple[str, ...] = ()  # class names or numbers; empty = all classes
    # Shares of the classes in num_images: a number for each of class_labels; or the place of
    # pictures or of latents that have these shares. Empty = equal.
    class_weights: tuple[str, ...] = ()
    prompts: Path | None = None  # text file with a prompt in each line, for a prior of captions
    prompt: tuple[str, ...] = ()  # prompts, instead of a file
    negative_prompt: str = ""  # what guidance leads away from; empty = no text
    num_images_per_class: int = 8  # pictures of each class
    num_images_per_prompt: int = 1  # pictures of each prompt
    # In all, classes or prompts in turn, instead of a number for each. Default without either: 8.
    num_images: int | None = None
    # Pixels, the side of a square or height x width as in 48x64, if not the size of the training
    # pictures. Priors with learned positions (next-scale) refuse it.
    image_size: ImageSize | None = None
    # A classifier of noisy latents, made by smalti train-classifier, that guides a flow prior.
    classifier: str = ""
    classifier_scale: float = 1.0  # factor of the classifier's gradient
    layout: Layout = "flat"  # flat: one folder; class: one for each class
    # webp is lossless unless a quality is given. webdataset: tar files of 1000 pictures; npz: one
    # file for ADM's evaluator.
    format: FormatName = "png"
    quality: int | None = None  # of jpeg (default: 95) and of lossy webp, 1 to 100
    # Precision: fp32, bf16 or fp16 of both models; int8 or int4 of the linear layers of a
    # next-token or next-scale prior; auto: the fastest without loss in smalti sweep --dtype. In
    # bf16 and fp16 a picture depends on how many are sampled at once.
    dtype: DType = "fp32"
    compile: bool = False  # torch.compile in minutes, or packed weights: for large jobs
    seed: int = 0  # picture i depends on the seed and i alone
    # Pictures sampled at once in half precision. In fp32, int8 and int4 their number is fixed,
    # because the last bits of a picture depend on it.
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_images_per_class", "num_images_per_prompt", "batch_size")
        if self.num_images is not None:
            check_at_least(1, self, "num_images")
            for name in ("num_images_per_class", "num_images_per_prompt"):
                if getattr(self, name) != getattr(GenerateConfig, name):
                    raise ConfigurationError(
                        f"num_images is {self.num_images} and {name} is {getattr(self, name)}: "
                        "give one of them"
                    )
        if self.classifier_scale != 1 and not self.classifier:
            raise ConfigurationError(
                f"classifier_scale is {self.classifier_scale}, but there is no classifier: give "
                "--classifier, or leave it out"
            )
        if self.prompt and self.prompts is not None:
            raise ConfigurationError("give --prompts or --prompt, one of them")

        if self.class_weights and self.num_images is None:
            raise ConfigurationError("class_weights are shares of num_images: give --num_images")
        _ = self.picture_format  # raises

    @property
    def picture_format(self) -> PictureFormat:
        """The format of the files.

        Raises:
            ConfigurationError: it has no quality, or not this one.
        """
        return PictureFormat(self.format, self.quality)

    def texts(self) -> list[str]:
        """The prompts, as given.

        Raises:
            DataError: the file cannot be read, or has no prompt.
        """
        return list(self.prompt) if self.prompts is None else read_prompts(self.prompts)

    def rows(self, pipeline: Pipeline) -> tuple[list[int], list[str], dict[str, list[Any]]]:
        """The class label, and the prompt if there are prompts, of each picture; and the rows of
        other conditions, which the pictures take in turn.

        Raises:
            GenerationError: a condition is given to a prior that does not take it, or is missing;
                there is no such class.
        """
        kinds = {*pipeline.prior.condition_kinds}
        described = f"{self.model} is {conditional_on(kinds)}"
        kinds |= {"class"} if pipeline.classes else set()  # of a classifier, for an unguided prior
        refuse_other_conditions(self, kinds, described)
        sources = sources_of(sorted(kinds), pipeline.prior.config, pipeline.classes)
        given = {source.ARGUMENTS[0]: source.chosen(self) for source in sources.values()}
        ids, texts = given.pop("class_labels", [0]), given.pop("prompt", [])
        number, other = "num_images_per_class", "num_images_per_prompt"
        if texts:
            number, other = other, number
        if getattr(self, other) != getattr(GenerateConfig, other):
            raise GenerationError(
                f"{other} is {getattr(self, other)}, but {described}: give --{number} or "
                "--num_images"
            )
        wanted = [(label, text) for text in texts or [""] for label in ids]
        if self.num_images is None:
            chosen = [row for row in wanted for _ in range(getattr(self, number))]
        else:
            names = [pipeline.classes[i] for i in ids] if pipeline.classes else []
            weights = class_weights(self.class_weights, names)
            shares = [weight for _ in texts or [""] for weight in weights] or [1.0] * len(wanted)
            chosen = [wanted[i] for i in by_shares(shares, self.num_images)]
        others = {name: rows for name, rows in given.items() if rows}
        return [label for label, _ in chosen], [text for _, text in chosen if texts], others


def class_weights(given: Sequence[str], classes: Sequence[str]) -> list[float]:
    """The shares of some classes, which need not add up to 1; empty if none are given.

    Args:
        given: numbers, or the place of pictures or latents.

    Raises:
        GenerationError: they are not one finite number of 0 or more for each class, or all 0; the
            pictures have none of the classes.
        DataError: the pictures cannot be opened.
    """
    try:
        weights = [float(text) for text in given]
    except ValueError:
        if len(given) > 1:
            raise GenerationError(
                f"class_weights are {' '.join(given)}: give numbers, or one place of pictures"
            ) from None
        weights = _counted(given[0], classes)
    if given and len(weights) != len(classes):
        raise GenerationError(
            f"{len(weights)} class_weights were given for {len(classes)} classes: give one each"
        )
    if any(not 0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
        raise GenerationError(
            f"class_weights are {' '.join(given)}: give numbers of 0 or more, not all 0"
        )
    return weights


def _counted(place: str, classes: Sequence[str]) -> list[float]:
    """The numbers of pictures of some classes in a set of pictures, or in a latent cache or the
    training split of one."""
    folders = (Path(place), Path(place, "train"))
    caches = [folder for folder in folders if (folder / MANIFEST).is_file()]
    found = LatentCache(caches[0]) if caches else open_unverified(place, SourceOptions())
    counts = Counter(found.classes[label] for label in found.labels.tolist() if found.classes)
    if missing := [name for name in classes if name not in found.classes]:
        raise GenerationError(
            f"class_weights are those of {place}, which has no class {missing[0]}: give "
            "--class_labels of classes that it has, or numbers"
        )
    return [float(counts[name]) for name in classes]


def by_shares(shares: Sequence[float], total: int) -> list[int]:
    """A sequence of numbers 0 to len(shares) - 1, each as often as its share says.

    The method of Webster and Sainte-Lague: the next place goes to the largest share / (2 n + 1),
    where n is how many places it has. So a longer sequence begins with the shorter one, and equal
    shares take turns.
    """
    queue = [(-share, number) for number, share in enumerate(shares) if share > 0]
    heapq.heapify(queue)
    given = [0] * len(shares)
    chosen = []
    for _ in range(total):
        number = queue[0][1]
        chosen.append(number)
        given[number] += 1
        heapq.heapreplace(queue, (-shares[number] / (2 * given[number] + 1), number))
    return chosen


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one in each line; empty lines are left out.

    Raises:
        DataError: it cannot be read, is no UTF-8, or has no prompt.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): give a text file in UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path} has no prompt: write one in each line")
    return prompts


@fills_folder(deep=True)
def generate(config: GenerateConfig) -> list[Path]:
    """Write the pictures, and return their paths.

    Raises:
        SmaltiError: the classes or prompts are not those of the pipeline.
    """
    state = join_job()
    check_model(config.model)
    picture_format = config.picture_format
    pipeline = Pipeline.from_pretrained(
        config.model, device=state.device, weights=config.weights, dtype=config.dtype
    )
    if config.image_size is not None:
        pipeline = pipeline.resized(config.image_size)
    if config.classifier:
        classifier = LatentClassifier.from_pretrained(config.classifier)
        pipeline = GuidedPipeline(pipeline, classifier, config.classifier_scale)
    labels, prompts, given = config.rows(pipeline)
    labels, prompts = continued_labels(config.output_dir, labels, prompts)
    if config.compile:
        pipeline.compile()
    with shared_work(len(labels), "generate", unit=" images") as share:
        paths = generate_folder(
            pipeline,
            config.output_dir,
            labels,
            seed=config.seed,
            batch_size=config.batch_size,
            prompts=prompts,
            negative_prompt=config.negative_prompt,
            given=given,
            layout=config.layout,
            picture_format=picture_format,
            compiled=config.compile,
            **share,
            **config.options,
        )
    state.wait_for_everyone()
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti generate`."""
    config = parse_config(GenerateConfig, argv, prog="smalti generate")
    say(f"{len(generate(config))} pictures: {config.output_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
