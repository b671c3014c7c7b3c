"""The whole way in one command: pictures -> tokenizer -> latents -> prior -> new pictures.

    smalti demo                      emoji; under ten minutes on two CPU cores
    smalti demo --quick              fashion; rougher, under two minutes
    smalti demo --data my_pictures   a folder with one sub-folder per class
    smalti demo --prior var-nano     another family of priors, with the tokenizer that it needs

Run it again and it goes on where it stopped.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from smalti.cli import parse_config, run_command
from smalti.config import config_to_dict, nearest
from smalti.data.latents import CodeSpec
from smalti.data.options import DataOptions
from smalti.errors import SmaltiError
from smalti.files import first_difference, write_json
from smalti.prior.presets import PRESETS as PRIORS
from smalti.scripts.demo_scales import SCALES, Scale
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.evaluate import EvaluateConfig, evaluate, table
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.presets import PRESETS as TOKENIZERS
from smalti.tokenizer.presets import TokenizerConfig

SETTINGS = "demo.json"


@dataclass(frozen=True)
class DemoConfig(DataOptions):
    """From a set of pictures to new pictures, in one command."""

    data: str = ""  # emoji, fashion or a folder; empty = emoji, or fashion with --quick
    output_dir: Path = Path("runs/demo")
    quick: bool = False  # rougher, in under two minutes
    seed: int = 0
    guidance_scale: float = 2.0
    tokenizer: str = ""  # a tokenizer preset; empty = what suits prior and machine
    prior: str = ""  # a prior preset; empty = what suits tokenizer and machine
    tokenizer_steps: int = 0  # 0 = what suits the machine
    prior_steps: int = 0


def demo(config: DemoConfig) -> Path:
    """Run every stage that is not done yet; return the folder that holds the results."""
    config = replace(config, data=config.data or ("fashion" if config.quick else "emoji"))
    folder, scale = config.output_dir, chosen_scale(config)
    sampling = replace(scale.sampling, guidance_scale=config.guidance_scale)
    shared = {field.name: getattr(config, field.name) for field in fields(DataOptions)}
    run = {"seed": config.seed, "resume_from_checkpoint": "latest"}
    stage_one = replace(scale.tokenizer, output_dir=folder / "tokenizer", **run, **shared)
    config.source()  # a mistake in it must not claim the folder
    _claim(config)
    _announce(1, "train the tokenizer (images <-> latents)")
    tokenizer = train_tokenizer(stage_one)
    measure = EvaluateConfig(
        output_dir=folder,
        num_samples=scale.num_samples,
        num_references=scale.num_references,
        classifier_epochs=scale.classifier_epochs,
        seed=config.seed,
        **sampling.options,
        **shared,
    )
    _announce(2, "encode the pictures to latents")
    latents = encode(
        EncodeConfig(
            tokenizer=tokenizer,
            output_dir=folder / "latents",
            views="identity" if config.quick else "flip",
            **shared,
        )
    )
    _announce(3, "train the prior (a distribution over latents)")
    pipeline = train_prior(
        replace(
            scale.prior,
            output_dir=folder / "prior",
            latents=latents,
            tokenizer=tokenizer,
            pipeline_dir=folder / "pipeline",
            preview=sampling,
            **run,
        )
    )
    _announce(4, "sample and evaluate")
    print(f"\n{table(evaluate(replace(measure, model=str(pipeline))))}\n")
    return folder


def chosen_scale(config: DemoConfig) -> Scale:
    """What to do on this machine, with the tokenizer and the prior that were asked for.

    Raises:
        SmaltiError: no such tokenizer or prior, or the two do not fit.
    """
    name = "quick" if config.quick else "gpu" if torch.cuda.is_available() else "cpu"
    kind = _kind(config)
    scale = SCALES[name].of_kind(kind)
    tokenizer, prior = scale.tokenizer, scale.prior
    if config.tokenizer:
        tokenizer = replace(tokenizer, tokenizer=TOKENIZERS[config.tokenizer])
    if config.prior:
        prior = replace(prior, prior=PRIORS[config.prior])
    if config.tokenizer_steps:
        tokenizer = replace(tokenizer, max_train_steps=config.tokenizer_steps)
    if config.prior_steps:
        prior = replace(prior, max_train_steps=config.prior_steps)
    return replace(scale, tokenizer=tokenizer, prior=prior)


def _kind(config: DemoConfig) -> str:
    """The kind of prior: as asked for, or what models the latents of the tokenizer."""
    for what, name, known in (
        ("tokenizer", config.tokenizer, TOKENIZERS),
        ("prior", config.prior, PRIORS),
    ):
        if name and name not in known:
            raise SmaltiError(f'no {what} preset is called "{name}"; {nearest(name, known)}')
    wanted = PRIORS[config.prior].kind if config.prior else ""
    if not config.tokenizer:
        return wanted or "next-token"
    fitting = _kind_for(TOKENIZERS[config.tokenizer])
    if wanted and wanted != fitting:
        raise SmaltiError(
            f"{config.prior} is a {wanted} prior; the latents of {config.tokenizer} need a "
            f"{fitting} prior: leave out --tokenizer or --prior"
        )
    return fitting


def _kind_for(tokenizer: TokenizerConfig) -> str:
    """The kind of prior that models its latents."""
    with torch.device("meta"):
        spec = Tokenizer.registry.build(tokenizer).spec
    if not isinstance(spec, CodeSpec):
        return "flow"
    return "next-token" if len(spec.grids) == 1 else "next-scale"


def _claim(config: DemoConfig) -> None:
    """Mark the folder as this demo's; refuse one that holds anything else."""
    folder, settings = config.output_dir, config_to_dict(config)
    del settings["output_dir"]
    if folder.exists() and not folder.is_dir():
        raise SmaltiError(f"{folder} is a file, not a folder: choose another --output_dir")
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if held - {SETTINGS}:
        _refuse_another_demo(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)


def _refuse_another_demo(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.is_file():
        raise SmaltiError(f"{folder} is not empty: choose another --output_dir")
    different = first_difference(path, settings)
    if different:
        name, value = different
        raise SmaltiError(
            f"{folder} holds a demo with another {name} ({value}): choose another --output_dir"
        )


def _announce(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti demo`."""
    started = time.monotonic()
    folder = demo(parse_config(DemoConfig, argv, prog="smalti demo"))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"Done in {minutes} min {seconds} s{_peak_memory()}. Everything lies in {folder}")
    for name, what in (
        ("samples.png", "new pictures, a row per class"),
        ("reconstructions.png", "held-out pictures, encoded and decoded"),
        ("neighbours.png", "samples and their nearest training pictures"),
        ("summary.json", "every metric with its protocol"),
        ("pipeline/", f'smalti.Pipeline.from_pretrained("{folder / "pipeline"}")'),
    ):
        if (folder / name).exists():
            print(f"  {name:20} {what}")
    return 0


def _peak_memory() -> str:
    """The most memory that this process held, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f" with {used / 1e9:.1f} GB of memory at most"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
