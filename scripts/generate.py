"""Batch generation: a pipeline and a seed -> a folder of numbered PNG files.

    smalti generate --model runs/demo/pipeline --output_dir samples --num_images_per_class 8

Killed? The same command goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from tqdm.auto import tqdm

from smalti.cli import parse_config, run_command
from smalti.errors import SmaltiError
from smalti.pipelines.generation import generate_folder
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.sampling import SamplingOptions


@dataclass(frozen=True)
class GenerateConfig:
    """Sample pictures with a saved pipeline."""

    model: str = "runs/demo/pipeline"  # a folder, or a repository on the Hub
    output_dir: Path = Path("samples")
    class_labels: tuple[str, ...] = ()  # names or numbers; empty = all classes
    num_images_per_class: int = 8
    seed: int = 0
    guidance_scale: float = 2.0
    guidance_schedule: Literal["constant", "linear", "cosine", "power-cosine"] = "constant"
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("num_images_per_class", "batch_size"):
            if getattr(self, name) < 1:
                raise SmaltiError(f"{name} is {getattr(self, name)}; it must be at least 1")
        SamplingOptions(  # refuses what is out of range before the folder is claimed
            self.temperature, self.top_k, self.top_p, self.guidance_scale, self.guidance_schedule
        )


def generate(config: GenerateConfig) -> list[Path]:
    """Write the pictures, class by class, and return their paths."""
    state = PartialState()
    pipeline = Pipeline.from_pretrained(config.model, device=state.device)
    ids = pipeline.label_ids(config.class_labels or range(len(pipeline.classes)))
    labels = [label for label in ids for _ in range(config.num_images_per_class)]
    with tqdm(total=len(labels), desc="generate", disable=not state.is_main_process) as bar:
        paths = generate_folder(
            pipeline,
            config.output_dir,
            labels,
            seed=config.seed,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
            rank=state.process_index,
            world_size=state.num_processes,
            barrier=state.wait_for_everyone,
            progress=bar.update,
            guidance_schedule=config.guidance_schedule,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
    state.wait_for_everyone()
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti generate`."""
    config = parse_config(GenerateConfig, argv, prog="smalti generate")
    print(f"{len(generate(config))} pictures: {config.output_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
