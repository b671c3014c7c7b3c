"""Batch generation: a pipeline and a seed -> a folder of numbered PNG files.

    smalti generate --model runs/demo/pipeline --output_dir samples --num_images_per_class 8

After an interruption the same command continues. With a larger number it adds pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smalti.checkpoints import Weights
from smalti.cli import parse_config, run_command
from smalti.config import ImageSize, check_at_least
from smalti.errors import ConfigurationError, GenerationError
from smalti.pipelines.generation import Layout, continued_labels, generate_folder
from smalti.pipelines.pipeline import DEMO, Pipeline, check_model
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
    num_images_per_class: int = 8  # pictures of each class
    num_images: int | None = None  # total, classes in turn; instead of --num_images_per_class
    # Pixels, the side of a square or height x width as in 48x64, if not the size of the training
    # pictures. Priors with learned positions (next-scale) refuse it.
    image_size: ImageSize | None = None
    layout: Layout = "flat"  # flat: one folder; class: one for each class
    seed: int = 0  # picture i depends on the seed and i alone
    # Pictures sampled at once in half precision. In fp32 their number is fixed, because the last
    # bits of a picture depend on it.
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_images_per_class", "batch_size")
        if self.num_images is not None:
            check_at_least(1, self, "num_images")
            if self.num_images_per_class != GenerateConfig.num_images_per_class:
                raise ConfigurationError(
                    f"num_images is {self.num_images} and num_images_per_class is "
                    f"{self.num_images_per_class}: give one of them"
                )

    def labels(self, ids: Sequence[int]) -> list[int]:
        """The label of each picture, for the labels of the classes."""
        if self.num_images is None:
            return [label for label in ids for _ in range(self.num_images_per_class)]
        return [ids[i % len(ids)] for i in range(self.num_images)]


@fills_folder(deep=True)
def generate(config: GenerateConfig) -> list[Path]:
    """Write the pictures, and return their paths.

    Raises:
        GenerationError: the pipeline is text-conditional, or no class has such a name or number.
    """
    state = join_job()
    check_model(config.model)
    pipeline = Pipeline.from_pretrained(config.model, device=state.device, weights=config.weights)
    if config.image_size is not None:
        pipeline = pipeline.resized(config.image_size)
    if not pipeline.classes:
        raise GenerationError(
            f"{config.model} is text-conditional: call it in Python with prompt_embeds"
        )
    ids = pipeline.label_ids(config.class_labels or range(len(pipeline.classes)))
    labels = continued_labels(config.output_dir, config.labels(ids))
    with shared_work(len(labels), "generate") as share:
        paths = generate_folder(
            pipeline,
            config.output_dir,
            labels,
            seed=config.seed,
            batch_size=config.batch_size,
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
