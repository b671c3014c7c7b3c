"""Trains the three families of priors alike and compares them: the table of docs/priors.md.

    python benchmarks/compare_priors.py --output_dir runs/priors

Each prior is trained as by `smalti demo --prior NAME`, but for 1000 steps: the same images and
batch size, with the tokenizer that it needs. `smalti compare` then measures them. Finished stages
are not repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smalti.cli import parse_config, run_command
from smalti.config import nearest
from smalti.errors import ConfigurationError
from smalti.prior.presets import PRESETS
from smalti.scripts.compare import CompareConfig, compare
from smalti.scripts.demo import DemoConfig, demo
from smalti.scripts.pages import markdown

PRIOR_STEPS = 1000


@dataclass(frozen=True)
class PriorsConfig:
    """Train several priors with the same recipe and compare them."""

    output_dir: Path = Path("runs/priors")  # a folder for each prior, and one of the comparison
    priors: tuple[str, ...] = ("gpt-nano", "var-nano", "flow-nano")  # presets
    data: str = "emoji"  # as in `smalti demo`
    quick: bool = False  # as in `smalti demo`
    tokenizer_steps: int = 0  # 0 = as in the demo
    prior_steps: int = 0  # 0 = 1000, somewhat more than in the demo; with quick as in the demo
    num_samples: int = 768  # of each prior

    def __post_init__(self) -> None:
        for name in self.priors:
            if name not in PRESETS:
                raise ConfigurationError(f'no prior is called "{name}"; {nearest(name, PRESETS)}')


def train(config: PriorsConfig, name: str) -> Path:
    """Run the demo with one prior, unless its results exist; return its pipeline."""
    folder = config.output_dir / name
    if not (folder / "summary.json").is_file():
        demo(
            DemoConfig(
                data=config.data,
                output_dir=folder,
                prior=name,
                quick=config.quick,
                tokenizer_steps=config.tokenizer_steps,
                prior_steps=config.prior_steps or (0 if config.quick else PRIOR_STEPS),
            )
        )
    return folder / "pipeline"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: train, compare, print a Markdown table."""
    config = parse_config(PriorsConfig, argv, prog="compare_priors")
    models = tuple(str(train(config, name)) for name in config.priors)
    comparison = CompareConfig(
        models=models,
        names=config.priors,
        data=config.data,
        output_dir=config.output_dir / "comparison",
        num_samples=config.num_samples,
    )
    print(f"\n{markdown(compare(comparison))}\n\n{comparison.output_dir / 'samples.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
