"""Reflow (rectified flow, Liu et al., 2209.03003): pairs of noise and the sample that a trained
flow generates from it, on which a straighter flow is trained.

    smalti reflow --model runs/flow/pipeline --output_dir runs/pairs
    smalti train-prior --latents runs/pairs --tokenizer runs/flow/pipeline/tokenizer \\
        --initial runs/flow/pipeline --output_dir runs/straight

After an interruption the same command continues where it stopped.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from smalti.cli import parse_config, run_command
from smalti.config import check_at_least
from smalti.data.latent_cache.cache import EncodedRange, refuse_other_contents, write_cache
from smalti.data.latent_cache.manifest import CacheInfo
from smalti.errors import ConfigurationError
from smalti.pipelines.conditions import check_options
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.pipeline import DEMO, Pipeline, check_model
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.flow.rectified import check_straight, generate_pairs, straightness
from smalti.prior.flow.solvers.base import ODESolver, make_solver
from smalti.randomness import NormalSource, derive_seed
from smalti.scripts.options import Sampling
from smalti.training.processes import fills_folder, join_job, say, shared_work

MEASURED_PAIRS = 64  # over which the straightness is averaged


@dataclass(frozen=True)
class ReflowConfig(Sampling):
    """Generate pairs with a trained flow, and measure how straight it is."""

    model: Annotated[str, place_of("A pipeline with a flow prior on the linear path")] = DEMO
    output_dir: Path = Path("runs/pairs")  # folder of the pairs, train/ and heldout/
    num_pairs: int = 20_000  # pairs for training, of all classes in turn
    num_heldout: int = 512  # further pairs, for validation
    seed: int = 0  # pair i depends on the seed and i alone
    guidance_scale: float = 1.0  # s in uncond + s (cond - uncond); 1 is off
    batch_size: int = 128  # pairs generated at once
    shard_size: int = 8192  # pairs per file

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_pairs", "num_heldout", "batch_size", "shard_size")


def labels_of(prior: FlowPrior, indices: Tensor) -> Tensor:
    """The labels of pairs (B,): all classes in turn; zeros for an unconditional prior."""
    return indices % max(prior.num_classes, 1)


@dataclass
class PairMaker:
    """(start, stop) -> the pairs of that range, (N, 1, 2C, h, w): data and noise, concatenated.

    Pair i depends on its own generator alone.
    """

    prior: FlowPrior
    config: ReflowConfig
    split: str

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> EncodedRange:
        parts, labels = [], labels_of(self.prior, torch.arange(start, stop))
        device = next(self.prior.parameters()).device
        job = derive_seed(self.config.seed, "reflow", self.split)
        for indices in torch.arange(start, stop).split(self.config.batch_size):
            pairs = generate_pairs(
                self.prior,
                labels_of(self.prior, indices).to(device),
                generator=[picture_generator(job, i) for i in indices.tolist()],
                **self.config.options,
            )
            parts.append(torch.cat([pairs.data, pairs.noise], 1)[:, None].cpu())
        return EncodedRange(torch.cat(parts), labels)


def load(config: ReflowConfig) -> tuple[Pipeline, FlowPrior]:
    """The pipeline, and its flow prior.

    Raises:
        SmaltiError: the prior is no flow on the linear path, or is conditional on more than
            classes; pairs cannot be generated with these options.
    """
    check_model(config.model)
    pipeline = Pipeline.from_pretrained(config.model, device=join_job().device)
    prior = check_straight(pipeline.prior)
    if {*prior.config.conditions} - {"class"}:
        raise ConfigurationError(
            f"the prior in {config.model} is conditional on {prior.config.condition}: reflow takes "
            "priors of classes, or without a condition"
        )
    check_options(prior, config.options)
    # Raises unless the solver is an ODE solver.
    generate_pairs(prior, prior.no_conditions(), **config.options)
    return pipeline, prior


@fills_folder(deep=True)
def reflow(config: ReflowConfig) -> float:
    """Write pairs as a latent cache, train/ and heldout/; return the straightness of the flow."""
    refuse_other_contents(config.output_dir)
    pipeline, prior = load(config)
    recipe = json.dumps([prior.checksum, config.seed, config.options], sort_keys=True)
    for split, count in (("train", config.num_pairs), ("heldout", config.num_heldout)):
        info = CacheInfo(
            spec=prior.spec,
            classes=pipeline.classes,
            num_samples=count,
            views=("identity",),
            tokenizer_fingerprint=pipeline.tokenizer.fingerprint,
            dataset_fingerprint=pipeline.training_pictures,
            shard_size=config.shard_size,
            pairs=hashlib.sha256(recipe.encode()).hexdigest(),
        )
        with shared_work(count, f"pairs {split}") as share:
            write_cache(
                config.output_dir / split,
                info,
                PairMaker(prior, config, split),
                **share,
            )
    return mean_straightness(prior, config)


@torch.no_grad()
def mean_straightness(prior: FlowPrior, config: ReflowConfig) -> float:
    """Straightness of the flow, 0 for straight lines, averaged over noise and classes."""
    solver = make_solver(config.options.get("solver", "heun"))
    assert isinstance(solver, ODESolver)
    labels = labels_of(prior, torch.arange(MEASURED_PAIRS))
    generators = [picture_generator(config.seed, i) for i in range(MEASURED_PAIRS)]
    noise = prior.initial_noise(MEASURED_PAIRS, NormalSource(generators, MEASURED_PAIRS))
    options = config.options
    steps = options.get("num_inference_steps", 50)
    times = prior.time_grid(steps, solver, options.get("schedule"))
    interval = options.get("guidance_interval", (0.0, 1.0))
    dynamics = prior.dynamics(labels, config.guidance_scale, interval)
    return straightness(dynamics, noise, times, solver).mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti reflow`."""
    config = parse_config(ReflowConfig, argv, prog="smalti reflow")
    straight = reflow(config)
    say(f"pairs: {config.output_dir}")
    say(f"straightness of {config.model}: {straight:.4f} (0 is straight)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
