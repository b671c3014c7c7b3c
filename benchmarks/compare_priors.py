"""The three families of priors side by side: the README's table, and one picture.

    python benchmarks/compare_priors.py --output_dir runs/priors

Each is the demo's, `smalti demo --prior NAME`, but for 1000 steps: the same pictures and batch
size, with the tokenizer that it needs. Finished parts are not made again.
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
from smalti.errors import SmaltiError
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.presets import PRESETS
from smalti.scripts.demo import DemoConfig, chosen_scale, demo

METRICS = {  # of summary.json: heading and format
    "fd_alexnet": ("Frechet distance", ".1f"),
    "classifier_accuracy_ratio": ("classifier, samples / held-out", ".2f"),
    "heldout_bits_per_dimension": ("held-out bits per dimension", ".2f"),
}
TIMED_PICTURES = 64
ROUNDS = 3
PRIOR_STEPS = 1000


@dataclass(frozen=True)
class CompareConfig:
    """Train and measure priors side by side."""

    output_dir: Path = Path("runs/priors")
    priors: tuple[str, ...] = ("gpt-nano", "var-nano", "flow-nano")
    data: str = "emoji"
    quick: bool = False  # as the demo's
    tokenizer_steps: int = 0  # 0 = the demo's
    prior_steps: int = 0  # 0 = 1000, somewhat more than the demo's; quick: the demo's
    columns: int = 4  # pictures of each prior in a row

    def __post_init__(self) -> None:
        for name in self.priors:
            if name not in PRESETS:
                raise SmaltiError(f'no prior is called "{name}"; {nearest(name, PRESETS)}')


@dataclass
class Contestant:
    """A trained prior, and how its demo sampled it."""

    name: str
    folder: Path
    pipeline: Pipeline
    sampling: dict[str, Any]

    def draw(self, labels: Sequence[int]) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] of these classes."""
        generators = [picture_generator(0, i) for i in range(len(labels))]
        output = self.pipeline(labels, generator=generators, output_type="pt", **self.sampling)
        return output.images * 2 - 1

    def row(self) -> dict[str, str]:
        """Its line of the table."""
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
        """Seconds per picture in a batch, decoding included, and how often the network runs for it;
        with guidance each time for two rows."""
        labels = [i % len(self.pipeline.classes) for i in range(TIMED_PICTURES)]
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        handle = first_block(self.pipeline.prior).register_forward_hook(count)
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            self.draw(labels)
            seconds.append(time.perf_counter() - started)
        handle.remove()
        return min(seconds) / len(labels), calls // ROUNDS


def first_block(prior: Prior) -> nn.Module:
    """The first of the transformer's blocks: it runs once in every evaluation of the network."""
    stacks = [module for module in prior.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))[0]


def train(config: CompareConfig, name: str) -> Contestant:
    """The demo with one prior, or what it left."""
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
    return Contestant(name, folder, pipeline, sampling)


def side_by_side(contestants: Sequence[Contestant], columns: int, picture: Path) -> None:
    """New pictures, a row per class, some columns for each prior."""
    names = contestants[0].pipeline.classes
    labels = [label for label in range(len(names)) for _ in range(columns)]
    grids = [c.draw(labels).unflatten(0, (len(names), columns)) for c in contestants]
    images = torch.cat(grids, 1).flatten(0, 1)  # row by row
    grid = image_grid(
        images,
        columns * len(contestants),
        row_labels=names,
        column_labels=[contestant.name for contestant in contestants],
        scale=2,
    )
    save_png(picture, grid)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: train, measure, draw, print a Markdown table."""
    config = parse_config(CompareConfig, argv, prog="compare_priors")
    contestants = [train(config, name) for name in config.priors]
    picture = config.output_dir / "side_by_side.png"
    side_by_side(contestants, config.columns, picture)
    rows = [contestant.row() for contestant in contestants]
    print(f"\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")
    print(f"\n{picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
