"""Compares the three families of priors: the table of the README, and one grid of samples.

    python benchmarks/compare_priors.py --output_dir runs/priors

Each prior is trained as by `smalti demo --prior NAME`, but for 1000 steps: the same images and
batch size, with the tokenizer that it needs. Finished stages are not repeated.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.cli import parse_config, run_command
from smalti.config import nearest
from smalti.data.image_io import image_grid, save_png
from smalti.errors import ConfigurationError
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.presets import PRESETS
from smalti.scripts.demo import DemoConfig, chosen_scale, demo

METRICS = {  # name in summary.json: heading and format
    "fd_alexnet": ("Frechet distance", ".1f"),
    "classifier_accuracy_ratio": ("classifier, samples / held-out", ".2f"),
    "heldout_bits_per_dimension": ("held-out bits per dimension", ".2f"),
}
TIMED_IMAGES = 64
ROUNDS = 3
PRIOR_STEPS = 1000


@dataclass(frozen=True)
class CompareConfig:
    """Train several priors with the same recipe and compare them."""

    output_dir: Path = Path("runs/priors")  # a folder for each prior, and side_by_side.png
    priors: tuple[str, ...] = ("gpt-nano", "var-nano", "flow-nano")  # presets
    data: str = "emoji"  # as in `smalti demo`
    quick: bool = False  # as in `smalti demo`
    tokenizer_steps: int = 0  # 0 = as in the demo
    prior_steps: int = 0  # 0 = 1000, somewhat more than in the demo; with quick as in the demo
    columns: int = 4  # samples of each prior in a row

    def __post_init__(self) -> None:
        for name in self.priors:
            if name not in PRESETS:
                raise ConfigurationError(f'no prior is called "{name}"; {nearest(name, PRESETS)}')


@dataclass
class TrainedPrior:
    """A trained prior, and the sampling options of its demo."""

    name: str
    folder: Path
    pipeline: Pipeline
    sampling: dict[str, Any]

    def sample(self, labels: Sequence[int]) -> Tensor:
        """Samples (B, 3, S, S) in [-1, 1] of these classes."""
        generators = [picture_generator(0, i) for i in range(len(labels))]
        output = self.pipeline(labels, generator=generators, output_type="pt", **self.sampling)
        return output.images * 2 - 1

    def row(self) -> dict[str, str]:
        """Its row of the table."""
        metrics = json.loads((self.folder / "summary.json").read_text())["metrics"]
        prior = self.pipeline.prior
        seconds, evaluations = self.cost()
        return {
            "prior": f"`{self.name}`",
            "kind": Prior.registry.name_of(type(prior)),
            "parameters": f"{sum(p.numel() for p in prior.parameters()) / 1e6:.1f} M",
            **{
                heading: format(metrics[name]["value"], how)
                for name, (heading, how) in METRICS.items()
            },
            "network evaluations": str(evaluations),
            "seconds per picture": f"{seconds:.3f}",
        }

    def cost(self) -> tuple[float, int]:
        """Seconds per image of a batch, decoding included, and the number of network evaluations;
        with guidance, each evaluation is of two rows per image."""
        labels = [i % len(self.pipeline.classes) for i in range(TIMED_IMAGES)]
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        handle = first_block(self.pipeline.prior).register_forward_hook(count)
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            self.sample(labels)
            seconds.append(time.perf_counter() - started)
        handle.remove()
        return min(seconds) / len(labels), calls // ROUNDS


def first_block(prior: Prior) -> nn.Module:
    """The first transformer block: it runs once in every evaluation of the network."""
    stacks = [module for module in prior.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))[0]


def train(config: CompareConfig, name: str) -> TrainedPrior:
    """Run the demo with one prior, unless its results exist."""
    folder = config.output_dir / name
    recipe = DemoConfig(
        data=config.data,
        output_dir=folder,
        prior=name,
        quick=config.quick,
        tokenizer_steps=config.tokenizer_steps,
        prior_steps=config.prior_steps or (0 if config.quick else PRIOR_STEPS),
    )
    if not (folder / "summary.json").is_file():
        demo(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.from_pretrained(folder / "pipeline", device=device)
    sampling = {**chosen_scale(recipe).sampling.options, "guidance_scale": recipe.guidance_scale}
    return TrainedPrior(name, folder, pipeline, sampling)


def side_by_side(priors: Sequence[TrainedPrior], columns: int, path: Path) -> None:
    """Write a grid of samples, a row per class, `columns` columns for each prior."""
    names = priors[0].pipeline.classes
    labels = [label for label in range(len(names)) for _ in range(columns)]
    grids = [prior.sample(labels).unflatten(0, (len(names), columns)) for prior in priors]
    images = torch.cat(grids, 1).flatten(0, 1)  # (rows x all columns, 3, S, S), row by row
    grid = image_grid(
        images,
        columns * len(priors),
        row_labels=names,
        column_labels=[prior.name for prior in priors],
        scale=2,
    )
    save_png(path, grid)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: train, measure, sample, print a Markdown table."""
    config = parse_config(CompareConfig, argv, prog="compare_priors")
    priors = [train(config, name) for name in config.priors]
    grid = config.output_dir / "side_by_side.png"
    side_by_side(priors, config.columns, grid)
    rows = [prior.row() for prior in priors]
    print(f"\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")
    print(f"\n{grid}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
