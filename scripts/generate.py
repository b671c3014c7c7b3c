"""Batch generation: a pipeline and a seed -> a folder of numbered PNG files.

    smalti generate --model runs/demo/pipeline --output_dir samples --num_images_per_class 8
    smalti generate --model runs/text/pipeline --prompts prompts.txt     a pipeline of captions
    smalti generate --model runs/flow/pipeline --classifier runs/classifier/classifier

After an interruption the same command continues. With a larger number it adds pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smalti.checkpoints import Weights
from smalti.cli import parse_config, run_command
from smalti.config import ImageSize, check_at_least
from smalti.errors import ConfigurationError, DataError, GenerationError
from smalti.pipelines.conditions import conditional_on
from smalti.pipelines.generation import Layout, continued_labels, generate_folder
from smalti.pipelines.guided import GuidedPipeline
from smalti.pipelines.pipeline import DEMO, Pipeline, check_model
from smalti.prior.flow.classifier import LatentClassifier
from smalti.scripts.options import Sampling
from smalti.training.processes import fills_folder, join_job, say, shared_work


@dataclass(frozen=True)
class GenerateConfig(Sampling):
    """Sample pictures with a saved pipeline."""

    # A pipeline: a folder, a repository on the Hub, or a checkpoint of a train-prior run.
    model: str = DEMO
    weights: Weights = "ema"  # of a checkpoint: averaged over its run (ema), or raw
    output_dir: Path = Path("samples")  # folder of the PNG files
    class_labels: tuple[str, ...] = ()  # class names or numbers; empty = all classes
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
    seed: int = 0  # picture i depends on the seed and i alone
    # Pictures sampled at once in half precision. In fp32 their number is fixed, because the last
    # bits of a picture depend on it.
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

    def texts(self) -> list[str]:
        """The prompts, as given.

        Raises:
            DataError: the file cannot be read, or has no prompt.
        """
        return list(self.prompt) if self.prompts is None else read_prompts(self.prompts)

    def rows(self, pipeline: Pipeline) -> tuple[list[int], list[str]]:
        """The class label, and the prompt if there are prompts, of each picture.

        Raises:
            GenerationError: a class or prompts are given to a prior that takes none, or the prompts
                are missing; there is no such class.
        """
        kinds, texts = {*pipeline.prior.condition_kinds}, self.texts()
        described = f"{self.model} is {conditional_on(kinds)}"
        kinds |= {"class"} if pipeline.classes else set()  # of a classifier, for an unguided prior
        for flag, kind in (
            ("class_labels", "class"),
            ("prompts", "text"),
            ("prompt", "text"),
            ("negative_prompt", "text"),
        ):
            if getattr(self, flag) and kind not in kinds:
                raise GenerationError(f"--{flag} is given, but {described}: leave it out")
        if "text" in kinds and not texts:
            raise GenerationError(
                f"{self.model} makes pictures of prompts: give --prompts FILE, a prompt in each "
                'line, or --prompt "a red apple"'
            )
        number, other = "num_images_per_class", "num_images_per_prompt"
        if texts:
            number, other = other, number
        if getattr(self, other) != getattr(GenerateConfig, other):
            raise GenerationError(
                f"{other} is {getattr(self, other)}, but {described}: give --{number} or "
                "--num_images"
            )
        ids = [0]
        if pipeline.classes:
            ids = pipeline.label_ids(self.class_labels or range(len(pipeline.classes)))
        wanted = [(label, text) for text in texts or [""] for label in ids]
        each = getattr(self, number)
        total = len(wanted) * each if self.num_images is None else self.num_images
        chosen = [
            wanted[i // each if self.num_images is None else i % len(wanted)] for i in range(total)
        ]
        return [label for label, _ in chosen], [text for _, text in chosen if texts]


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
    pipeline = Pipeline.from_pretrained(config.model, device=state.device, weights=config.weights)
    if config.image_size is not None:
        pipeline = pipeline.resized(config.image_size)
    if config.classifier:
        classifier = LatentClassifier.from_pretrained(config.classifier)
        pipeline = GuidedPipeline(pipeline, classifier, config.classifier_scale)
    labels, prompts = continued_labels(config.output_dir, *config.rows(pipeline))
    with shared_work(len(labels), "generate") as share:
        paths = generate_folder(
            pipeline,
            config.output_dir,
            labels,
            seed=config.seed,
            batch_size=config.batch_size,
            prompts=prompts,
            negative_prompt=config.negative_prompt,
            layout=config.layout,
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
