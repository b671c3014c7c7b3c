"""Which tokenizer, which prior, which trick: trials that differ in one thing, with equal pictures
and equal seconds of training, over several seeds.

    python benchmarks/bake_off.py --output_dir runs/bake_off                    # hours, resumable
    python benchmarks/bake_off.py --groups optimizer "random order" --seeds 0

Every trial is the recipe of `smalti demo` on a CPU with one change; `--size small` does all of it
with models and grids of codes that train ten times faster. The number of steps is what the
seconds allow: a trial whose steps take longer has fewer. Seconds are those of the processor on a
CPU, so that other programs do not count, and those of the clock on a GPU. Trials that need the same
tokenizer share it. Finished stages are not repeated; the table and the plot are made of what is
finished.
"""

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from smalti.cli import parse_config, run_command
from smalti.config import nearest
from smalti.errors import ConfigurationError
from smalti.files import read_json, write_json
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.times import UniformTimes
from smalti.scripts.demo import SCALES, Scale
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.evaluate import EvaluateConfig, evaluate
from smalti.scripts.pages import markdown
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.presets import PRESETS as TOKENIZERS

# -------------------------------------------------------------------------------------------------
# The trials

Changes = Mapping[str, Any]  # dotted name of a field of `Scale` -> its value
Recipe = TrainTokenizerConfig | TrainPriorConfig


@dataclass(frozen=True)
class Trial:
    """The recipe of the demo for one kind of prior, with changes."""

    kind: str = "next-token"
    changes: Changes = field(default_factory=dict)
    perceptual_weights: bool = False  # whether it needs those of VGG16

    def scale(self, data: str, size: str, perceptual_weights: Path | None) -> Scale:
        """The recipes, for some pictures, in a size of SIZES."""
        scale = SCALES["cpu"].of_kind(self.kind)
        changes = {"tokenizer.data": data, **self.changes}
        for kind in ("", self.kind):
            changes |= SIZES[size].get(kind, {})
        if self.perceptual_weights:
            changes["tokenizer.objective.perceptual_weights"] = perceptual_weights
        for name, value in changes.items():
            scale = changed(scale, name, value)
        return scale


def changed(config: Any, name: str, value: Any) -> Any:
    """A configuration with another value of a field, whose dotted name may lead into its parts."""
    first, _, rest = name.partition(".")
    return replace(
        config, **{first: changed(getattr(config, first), rest, value) if rest else value}
    )


def quantizer(preset: str) -> Trial:
    return Trial(changes={"tokenizer.tokenizer": TOKENIZERS[preset]})


def network(name: str) -> Changes:
    """A narrow and shallow network in a field of the prior's configuration, or in all of it."""
    return {f"prior.{name}.{field}": value for field, value in SMALL_NETWORK.items()}


SMALL_NETWORK = {"depth": 4, "num_heads": 2, "width": 128}  # in this order, each fits
# What a size changes in the recipes: size -> kind of prior, or "" for all -> changes.
SIZES: dict[str, dict[str, Changes]] = {
    "demo": {},
    "small": {
        "": {
            "tokenizer.tokenizer.conv.patch_size": 4,  # 4 x 4 codes of 8 x 8 pixels
            "tokenizer.tokenizer.conv.channels": 32,
            "tokenizer.objective.discriminator.channels": 16,
            "tokenizer.train_batch_size": 32,
            "classifier_epochs": 1,
        },
        "next-token": network("prior"),
        "next-scale": {
            "tokenizer.tokenizer.quantizer.scales": tuple((side, side) for side in (1, 2, 3, 4)),
            **network("prior"),
        },
        "flow": network("prior.network"),
    },
}
BASE = Trial()
FLOW = Trial("flow")
GROUPS: dict[str, dict[str, Trial]] = {
    "quantizer": {
        "512 codes": BASE,
        "1,024 codes": quantizer("vq-1024-tiny"),
        "1,024 codes, running means": quantizer("ema-32-tiny"),
        "1,024 codes, SimVQ": quantizer("simvq-32-tiny"),
        "1,024 codes, rotation": quantizer("rotation-32-tiny"),
        "FSQ, 1,000 codes": quantizer("fsq-32-tiny"),
        "lookup-free, 1,024 codes": quantizer("lfq-32-tiny"),
        "spherical bits, 1,024 codes": quantizer("bsq-32-tiny"),
    },
    "adversarial loss": {
        "on": BASE,
        "off": Trial(changes={"tokenizer.objective.adversarial_weight": 0.0}),
    },
    "LPIPS": {
        "AlexNet": BASE,
        "VGG16": Trial(
            changes={"tokenizer.objective.perceptual_network": "vgg"}, perceptual_weights=True
        ),
    },
    "prior": {
        "next-token": BASE,
        "next-scale": Trial("next-scale"),
        "flow, 12 steps": FLOW,
        "flow, 4 steps": Trial("flow", {"sampling.num_inference_steps": 4}),
    },
    "order": {
        "raster": BASE,
        "random, annealed": Trial(changes={"prior.prior.random_order": (0.5, 0.75)}),
    },
    "context": {
        "clean": BASE,
        "a tenth random": Trial(changes={"prior.prior.token_corruption": 0.1}),
    },
    "queries and keys": {
        "plain": BASE,
        "normalised": Trial(changes={"prior.prior.qk_norm": True}),
    },
    "EMA of the prior": {
        str(decay): Trial(changes={"prior.ema_decay": decay}) for decay in (0.9, 0.99, 0.995)
    },
    "label dropout": {
        str(share): Trial(changes={"prior.prior.label_dropout": share})
        for share in (0.05, 0.1, 0.2)
    },
    "times of a flow": {
        "logit-normal": FLOW,
        "uniform": Trial("flow", {"prior.prior.times": UniformTimes()}),
    },
    "equivariance of latents": {
        "0": FLOW,
        "0.5": Trial("flow", {"tokenizer.tokenizer.equivariance": 0.5}),
    },
    "optimizer of the prior": {
        "AdamW": BASE,
        "Muon": Trial(changes={"prior.optimizer": "muon"}),
    },
}


@dataclass(frozen=True)
class BakeOffConfig:
    """Train trials that differ in one thing, measure them, and print a table."""

    output_dir: Path = Path("runs/bake_off")  # folder of all runs, table.md and plot.png
    groups: tuple[str, ...] = tuple(GROUPS)  # groups of trials, see GROUPS
    seeds: tuple[int, ...] = (0, 1, 2)  # of weights, order, samples and evaluation
    data: str = "emoji"  # as in `smalti train-tokenizer`
    size: str = "demo"  # of models and their grids of codes: demo, or small
    # Of each stage; several give several points of a trial in the plot, and the longest the table.
    seconds: tuple[float, ...] = (150.0, 600.0)
    num_samples: int = 768  # of each pipeline
    # A safetensors file with LPIPS's VGG16; without one, its trial is left out.
    perceptual_weights: Path | None = None

    def __post_init__(self) -> None:
        for name in self.groups:
            if name not in GROUPS:
                raise ConfigurationError(f'no group is called "{name}"; {nearest(name, GROUPS)}')
        if self.size not in SIZES:
            raise ConfigurationError(f"size is {self.size}: choose {' or '.join(SIZES)}")
        for name, values in (("seeds", self.seeds), ("seconds", self.seconds)):
            if not values or min(values) < 0 or len(set(values)) < len(values):
                raise ConfigurationError(f"{name} is {values}: give different values of 0 or more")

    def trials(self) -> dict[tuple[str, str], Trial]:
        """The trials by group and name, but for those whose weights are missing."""
        found = {
            (group, name): trial for group in self.groups for name, trial in GROUPS[group].items()
        }
        for key, trial in list(found.items()):
            if trial.perceptual_weights and self.perceptual_weights is None:
                print(f"left out: {' '.join(key)}: give --perceptual_weights")
                del found[key]
        return found


# -------------------------------------------------------------------------------------------------
# Equal seconds

CALIBRATION = 4.0  # seconds of training that tell how long a step takes
AT_LEAST = 2  # steps of a run, whatever they take


def processor_or_clock() -> float:
    """Seconds of training so far: of the processor, or of the clock where a GPU works."""
    return time.monotonic() if torch.cuda.is_available() else time.process_time()


def seconds_of(train: Callable[[Any], object], recipe: Recipe, steps: int) -> float:
    """Of a run of so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        started = processor_or_clock()
        train(shortened(recipe, steps, Path(folder) / "run"))
        return processor_or_clock() - started


def seconds_per_step(train: Callable[[Any], object], recipe: Recipe) -> float:
    """Of a recipe: what twice as many steps take longer, without what a run does once."""
    steps, taken, before = 8, 0.0, seconds_of(train, recipe, 8)
    while taken < CALIBRATION:
        steps *= 2
        now = seconds_of(train, recipe, steps)
        taken, before = now - before, now
    return taken / (steps / 2)


def shortened(recipe: Recipe, steps: int, folder: Path) -> Recipe:
    """A recipe of so many steps, with all that its steps determine in the same proportion."""
    share = steps / recipe.max_train_steps
    recipe = replace(
        recipe,
        output_dir=folder,
        max_train_steps=steps,
        lr_warmup_steps=round(share * recipe.lr_warmup_steps),
        validation_steps=steps,
        checkpointing_steps=steps,
        dataloader_num_workers=0,  # their seconds would not be those of this process
        resume_from_checkpoint="latest",
    )
    if isinstance(recipe, TrainTokenizerConfig):
        start, ramp = recipe.objective.adversarial_start, recipe.objective.adversarial_ramp
        losses = {
            "adversarial_start": round(share * start),
            "adversarial_ramp": round(share * ramp),
        }
        recipe = replace(recipe, objective=replace(recipe.objective, **losses))
    else:
        recipe = replace(recipe, pipeline_dir=None)
    return recipe


def steps_of(train: Callable[[Any], object], recipe: Recipe, seconds: float, file: Path) -> int:
    """The number of steps in so many seconds, measured once: it is the same for all seeds."""
    if not file.is_file():
        number = round(seconds / seconds_per_step(train, recipe)) if seconds else 0
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, max(AT_LEAST, number))
    return read_json(file)


# -------------------------------------------------------------------------------------------------
# One trial


@dataclass(frozen=True)
class Result:
    """What one trial with one seed and one number of seconds gave."""

    metrics: Mapping[str, float]
    steps: tuple[int, int]  # of the tokenizer, and of the prior
    parameters: int  # of both


def run_trial(config: BakeOffConfig, trial: Trial, seed: int, seconds: float) -> Result:
    """Both stages, and the evaluation."""
    scale = trial.scale(config.data, config.size, config.perceptual_weights)
    stage_one, stage_two = scale.tokenizer, scale.prior

    def folder(kind: str, *made_by: object) -> Path:
        """The same for trials that share a stage."""
        key = hashlib.sha256(repr((made_by, seconds)).encode()).hexdigest()[:16]
        return config.output_dir / kind / key

    file = folder("steps", stage_one).with_suffix(".json")
    steps_one = steps_of(train_tokenizer, stage_one, seconds, file)
    one = folder("tokenizers", stage_one, seed)
    recipe = replace(stage_one, seed=seed)
    tokenizer = train_tokenizer(shortened(recipe, steps_one, one / "run"))
    latents = encode(
        EncodeConfig(
            data=config.data, tokenizer=tokenizer, output_dir=one / "latents", views="flip"
        )
    )
    recipe = replace(stage_two, latents=latents, tokenizer=tokenizer, seed=seed)
    file = folder("steps", stage_one, stage_two).with_suffix(".json")
    steps_two = steps_of(train_prior, recipe, seconds, file)
    two = folder("priors", stage_one, stage_two, seed)
    pipeline = train_prior(shortened(recipe, steps_two, two / "run"))
    sampling = replace(scale.sampling, guidance_scale=2.0)
    measured = folder(f"priors/{two.name}", sampling)
    results = measured / "results.json"
    if not results.is_file():
        metrics = evaluate(
            EvaluateConfig(
                model=str(pipeline),
                data=config.data,
                output_dir=measured,
                num_samples=config.num_samples,
                classifier_epochs=scale.classifier_epochs,
                seed=seed,
                **sampling.options,
            )
        )
        write_json(results, {name: metric.value for name, metric in metrics.items()})
    model = Pipeline.from_pretrained(pipeline)
    parts = model.tokenizer, model.prior
    return Result(
        read_json(results),
        (steps_one, steps_two),
        sum(weights.numel() for part in parts for weights in part.parameters()),
    )


# -------------------------------------------------------------------------------------------------
# The table and the plot

COLUMNS = {  # metric -> heading, decimals
    "psnr": ("PSNR of the tokenizer, dB", 2),
    "fd_alexnet": ("Frechet distance", 1),
    "classifier_accuracy_ratio": ("classifier ratio", 3),
    "share_of_near_copies": ("near copies", 3),
}
Results = dict[tuple[str, str], dict[float, list[Result]]]  # group, trial -> seconds -> by seed


def rows_of(results: Results) -> list[dict[str, str]]:
    """A row for each trial, of the most seconds that it has."""
    rows = []
    for (group, name), by_seconds in results.items():
        seconds = max(by_seconds)
        found = by_seconds[seconds]
        row = {"what": group, "trial": name, "seconds of a stage": f"{seconds:g}"}
        row["steps"] = " + ".join(
            f"{statistics.median(s):g}" for s in zip(*(r.steps for r in found), strict=True)
        )
        row["parameters"] = f"{found[0].parameters / 1e6:.1f} M"
        for metric, (heading, decimals) in COLUMNS.items():
            values = [r.metrics[metric] for r in found if metric in r.metrics]
            if values:
                row[heading] = spread(values, decimals)
        rows.append(row)
    return rows


def spread(values: Sequence[float], decimals: int) -> str:
    """The mean over the seeds, and the least and greatest."""
    low, mean, high = (f"{f(values):.{decimals}f}" for f in (min, statistics.fmean, max))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def plot(results: Results, path: Path) -> None:
    """Frechet distance against seconds of both stages: a panel for each group, a line for each
    trial, the mean over its seeds between the least and the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(group for group, _ in results))
    columns = min(4, len(groups))
    shape = -(-len(groups) // columns), columns
    figure, axes = plt.subplots(*shape, figsize=(4 * shape[1], 3 * shape[0]), squeeze=False)
    for group, panel in zip(groups, axes.flat, strict=False):
        for (of, name), by_seconds in results.items():
            if of == group:
                seconds = sorted(by_seconds)
                values = [[r.metrics["fd_alexnet"] for r in by_seconds[s]] for s in seconds]
                means = [statistics.fmean(each) for each in values]
                lows = [mean - min(each) for mean, each in zip(means, values, strict=True)]
                highs = [max(each) - mean for mean, each in zip(means, values, strict=True)]
                xs = [2 * s for s in seconds]
                panel.errorbar(xs, means, [lows, highs], label=name, marker="o", capsize=3)
        panel.set(title=group, xlabel="seconds of training", ylabel="Frechet distance")
        panel.legend(fontsize=7)
    for unused in axes.flat[len(groups) :]:
        unused.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: train and measure what is missing, print the table."""
    config = parse_config(BakeOffConfig, argv, prog="bake_off")
    results: Results = {}
    trials = config.trials()
    for seconds in sorted(config.seconds):
        for seed in config.seeds:
            for key, trial in trials.items():
                print(f"{': '.join(key)}, seed {seed}, {seconds:g} s", flush=True)
                found = results.setdefault(key, {}).setdefault(seconds, [])
                found.append(run_trial(config, trial, seed, seconds))
            _write(config.output_dir, results)
    print(f"\n{markdown(rows_of(results))}\n\n{config.output_dir / 'plot.png'}")
    return 0


def _write(folder: Path, results: Results) -> None:
    (folder / "table.md").write_text(markdown(rows_of(results)) + "\n")
    rows = [
        {"group": group, "trial": name, "seconds": seconds, "seeds": [r.metrics for r in found]}
        for (group, name), by_seconds in results.items()
        for seconds, found in by_seconds.items()
    ]
    (folder / "results.json").write_text(json.dumps(rows, indent=1))
    plot(results, folder / "plot.png")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
