"""All stages in one command: pictures -> tokenizer -> latents -> prior -> new pictures.

    smalti demo                      emoji; 9 to 16 minutes on two CPU cores
    smalti demo --quick              fashion; lower quality, in 2 to 4 minutes
    smalti demo --data my_pictures   a folder with one sub-folder per class
    smalti demo --prior var-nano     another family of priors, with the tokenizer that it needs
    smalti demo --condition text     pictures of sentences: the captions of the set
    smalti demo --condition image    enlarged pictures; with --image_task inpainting, completed ones

After an interruption the same command continues.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from smalti.cli import parse_config, run_command
from smalti.config import ImageSize, added, nearest, saved_fields
from smalti.data.dataset import DataOptions
from smalti.errors import ConfigurationError
from smalti.evaluation.metrics import table
from smalti.files import first_difference, read_hashed_json, write_hashed_json
from smalti.folders import contents
from smalti.prior.base import Prior, PriorConfig
from smalti.prior.conditions.text_encoder import ByteTokenizer
from smalti.prior.presets import PRESETS as PRIORS
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.evaluate import EvaluateConfig, measured
from smalti.scripts.options import Sampling, TextOptions
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.presets import PRESETS as TOKENIZERS

# -------------------------------------------------------------------------------------------------
# What the demo trains: a scale for each kind of machine, with a recipe for each kind of prior


@dataclass(frozen=True)
class Scale:
    """The size of the demo: the recipes with a next-token prior, and the changes for others."""

    tokenizer: TrainTokenizerConfig
    prior: TrainPriorConfig
    others: dict[str, tuple[str, str, dict[str, Any]]]  # kind: tokenizer, prior, changes of recipe
    num_samples: int
    classifier_epochs: int
    num_references: int = 20_000  # training pictures that samples are compared with
    sampling: Sampling = field(default_factory=Sampling)

    def of_kind(self, kind: str) -> "Scale":
        """This scale with another kind of prior."""
        if kind not in self.others:
            return self
        tokenizer, prior, changes = self.others[kind]
        return replace(
            self,
            tokenizer=replace(self.tokenizer, tokenizer=TOKENIZERS[tokenizer]),
            prior=replace(self.prior, prior=PRIORS[prior], **changes),
            sampling=SAMPLING.get(kind, self.sampling),
        )

    def with_captions(self) -> "Scale":
        """This scale in about the same time with captions, of which each sample takes longer: a
        flow prior evaluates its network 24 times where a next-token prior does so once."""
        steps = self.prior.max_train_steps * 4 // 5
        prior = replace(self.prior, max_train_steps=steps)
        return replace(self, prior=prior, num_samples=self.num_samples // 2)


SAMPLING = {"flow": Sampling(num_inference_steps=12)}  # type: ignore[call-arg]
TOKENIZER_CPU = TrainTokenizerConfig(
    tokenizer=TOKENIZERS["vq-32-tiny"],
    objective=ObjectiveConfig(
        perceptual_weight=0.3,
        adversarial_weight=0.05,
        adaptive=True,
        adversarial_start=250,
        adversarial_ramp=150,
        discriminator=PatchGANConfig(channels=32, num_layers=2),
    ),
    max_train_steps=550,
    train_batch_size=64,
    learning_rate=1e-3,
    lr_warmup_steps=50,
    lr_final_ratio=0.05,
    adam_beta2=0.99,
    ema_decay=0.995,
    validation_steps=275,
    checkpointing_steps=275,
)
PRIOR_CPU = TrainPriorConfig(
    prior=PRIORS["gpt-nano"],
    max_train_steps=850,
    train_batch_size=64,
    learning_rate=1e-3,
    lr_warmup_steps=40,
    lr_final_ratio=0.05,
    weight_decay=0.05,
    ema_decay=0.99,
    validation_steps=425,
    checkpointing_steps=425,
)
OTHERS_CPU: dict[str, tuple[str, str, dict[str, Any]]] = {
    "next-scale": ("var-32-tiny", "var-nano", {}),
    "flow": ("kl-32-tiny", "flow-nano", {}),
}
SCALES = {
    "quick": Scale(
        replace(TOKENIZER_CPU, max_train_steps=120, validation_steps=120),
        replace(
            PRIOR_CPU,
            prior=replace(PRIORS["gpt-nano"], depth=4, width=192, num_heads=3),
            learning_rate=2e-3,
            max_train_steps=260,
            validation_steps=260,
        ),
        others=OTHERS_CPU,
        num_samples=256,
        num_references=2000,
        classifier_epochs=6,
    ),
    "cpu": Scale(TOKENIZER_CPU, PRIOR_CPU, others=OTHERS_CPU, num_samples=768, classifier_epochs=8),
    "gpu": Scale(
        replace(
            TOKENIZER_CPU,
            tokenizer=TOKENIZERS["vq-64-small"],
            max_train_steps=6000,
            train_batch_size=128,
            learning_rate=4e-4,
            ema_decay=0.999,
            validation_steps=1000,
            checkpointing_steps=1000,
            objective=replace(
                TOKENIZER_CPU.objective,
                adversarial_start=2000,
                adversarial_ramp=500,
                discriminator=PatchGANConfig(channels=64, num_layers=3),
            ),
        ),
        replace(
            PRIOR_CPU,
            prior=PRIORS["gpt-micro"],
            max_train_steps=6000,
            train_batch_size=256,
            learning_rate=6e-4,
            ema_decay=0.999,
            validation_steps=1000,
            checkpointing_steps=1000,
        ),
        others={
            "next-scale": ("var-64-small", "var-micro", {}),
            "flow": ("kl-64-small", "flow-micro", {}),
        },
        num_samples=2048,
        classifier_epochs=20,
    ),
}


# -------------------------------------------------------------------------------------------------
# The four stages, each resumed where it stopped

SETTINGS = "demo.json"
LONGEST_CAPTION = 256  # bytes
CONDITIONS = ("none", "class", "text", "class+text", "image")
# A caption costs a flow prior less: its cross-attention is cheaper than a longer sequence.
CHEAPER = {"text": "flow", "class+text": "flow"}


@dataclass(frozen=True)
class DemoConfig(DataOptions):
    """From a set of pictures to new pictures, in one command."""

    data: str = ""  # emoji, fashion or a folder; empty = emoji, or fashion with --quick
    output_dir: Path = Path("runs/demo")  # folder of all results; resumes a demo in it
    quick: bool = False  # lower quality, in 2 to 4 minutes
    # Pixels: the side of a square, or height x width as in 48x64; default: the tokenizer's.
    image_size: ImageSize | None = None
    seed: int = 0  # of training, sampling and evaluation
    guidance_scale: float = 2.0  # s in uncond + s (cond - uncond); 1 is off, as without condition
    # What pictures are made of: class, text (captions), class+text, image (another picture), or
    # none. Default: the classes of the pictures, or none if they have none.
    condition: str = ""
    # With --condition image: super-resolution (from a quarter of the size) or inpainting.
    image_task: str = added("")
    tokenizer: str = ""  # a tokenizer preset; empty = chosen for prior and machine
    prior: str = ""  # a prior preset; empty = chosen for tokenizer and machine
    tokenizer_steps: int = 0  # optimizer steps of stage one; 0 = chosen for the machine
    prior_steps: int = 0  # optimizer steps of stage two; 0 = chosen for the machine


def demo(config: DemoConfig) -> Path:
    """Run every stage that is not done yet; return the folder of the results."""
    config = replace(
        config,
        data=config.data or ("fashion" if config.quick else "emoji"),
        image_task=config.image_task or ("super-resolution" if config.condition == "image" else ""),
    )
    folder, scale = config.output_dir, chosen_scale(config)
    conditional = prior_condition(config, scale.prior.prior)
    unguided = conditional["condition"] in ("none", "image")  # nothing to guide
    guidance = 1.0 if unguided else config.guidance_scale
    sampling = replace(scale.sampling, guidance_scale=guidance)
    shared = {field.name: getattr(config, field.name) for field in fields(DataOptions)}
    run = {"seed": config.seed, "resume_from_checkpoint": "latest"}
    stage_one = replace(scale.tokenizer, output_dir=folder / "tokenizer", **run, **shared)
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
            image_task=config.image_task,
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
            **conditional,
            **run,
        )
    )
    _announce(4, "sample and evaluate")
    print(f"\n{table(measured(replace(measure, model=str(pipeline))))}\n")
    return folder


def prior_condition(config: DemoConfig, prior: PriorConfig) -> dict[str, Any]:
    """The condition of the prior, and the longest caption if it takes captions.

    Raises:
        SmaltiError: the pictures cannot be used, or do not have what the condition needs.
    """
    sources = config.sources()
    condition = config.condition or ("class" if sources[0].classes else "none")
    if condition not in CONDITIONS:
        raise ConfigurationError(
            f"condition is {condition}; the demo has {', '.join(CONDITIONS)}: choose one of them"
        )
    if not {"none", *prior.CONDITIONS}.issuperset(condition.split("+")):
        raise ConfigurationError(
            f"condition is {condition}, and this kind of prior takes none or "
            f"{' or '.join(prior.CONDITIONS)}: leave out --prior and --tokenizer"
        )
    if config.image_task and condition != "image":
        raise ConfigurationError(
            f"image_task is {config.image_task}, and condition is {condition}: give --condition "
            "image, or leave it out"
        )
    if "class" in condition and not sources[0].classes:
        raise ConfigurationError(
            f"condition is {condition}, but {config.data} has no classes: give --condition none"
        )
    if "text" not in condition.split("+"):
        return {"condition": condition}
    lengths = [0]
    for source in sources:
        source.require_captions()
        captions = [text for index in range(len(source)) for text in source.captions(index)]
        lengths += map(len, ByteTokenizer().tokens(captions))
    if max(lengths) > LONGEST_CAPTION:
        raise ConfigurationError(
            f"a caption has {max(lengths)} bytes, and those of the demo at most {LONGEST_CAPTION}: "
            "train with smalti train-tokenizer, encode and train-prior --text.length"
        )
    length = -(-max(lengths) // 8) * 8  # a multiple of 8
    return {"condition": condition, "text": TextOptions(length=length)}


def chosen_scale(config: DemoConfig) -> Scale:
    """The scale for this machine, with the requested tokenizer and prior.

    Raises:
        ConfigurationError: no such tokenizer or prior, or the two do not fit.
    """
    name = "quick" if config.quick else "gpu" if torch.cuda.is_available() else "cpu"
    kind = _kind(config)
    scale = SCALES[name].of_kind(kind)
    if "text" in config.condition.split("+"):
        scale = scale.with_captions()
    tokenizer, prior = scale.tokenizer, scale.prior
    if config.tokenizer:
        tokenizer = replace(tokenizer, tokenizer=TOKENIZERS[config.tokenizer])
    if config.prior:
        prior = replace(prior, prior=PRIORS[config.prior])
    if config.image_size is not None:
        tokenizer = replace(tokenizer, image_size=config.image_size)
    if config.tokenizer_steps:
        tokenizer = replace(tokenizer, max_train_steps=config.tokenizer_steps)
    if config.prior_steps:
        prior = replace(prior, max_train_steps=config.prior_steps)
    return replace(scale, tokenizer=tokenizer, prior=prior)


def _kind(config: DemoConfig) -> str:
    """The kind of prior: as requested, or the first that models the latents of the tokenizer and
    takes the condition."""
    for what, name, known in (
        ("tokenizer", config.tokenizer, TOKENIZERS),
        ("prior", config.prior, PRIORS),
    ):
        if name and name not in known:
            raise ConfigurationError(f'no {what} preset is called "{name}"; {nearest(name, known)}')
    registry = Prior.registry
    fitting = registry.names()
    if config.tokenizer:
        with torch.device("meta"):
            spec = Tokenizer.registry.build(TOKENIZERS[config.tokenizer]).spec
        fitting = [kind for kind in fitting if registry.resolve(kind).supports(spec)]
    if not config.prior:
        parts = {*config.condition.split("+")} - {"", "none"}
        takers = [k for k in fitting if parts <= {*registry.config_class(k).CONDITIONS}]
        cheaper = CHEAPER.get(config.condition)
        return cheaper if cheaper in fitting else (takers or fitting)[0]
    wanted = PRIORS[config.prior].kind
    if wanted not in fitting:
        raise ConfigurationError(
            f"{config.prior} is a {wanted} prior; the latents of {config.tokenizer} need a "
            f"{' or '.join(fitting)} prior: leave out --tokenizer or --prior"
        )
    return wanted


def _claim(config: DemoConfig) -> None:
    """Write the demo's settings into the folder; raise if it contains anything else."""
    folder, settings = config.output_dir, saved_fields(config)
    del settings["output_dir"]
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file, not a folder: choose another --output_dir")
    if set(contents(folder)) - {SETTINGS}:
        _refuse_another_demo(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_hashed_json(folder / SETTINGS, settings)


def _refuse_another_demo(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.is_file():
        raise ConfigurationError(f"{folder} is not empty: choose another --output_dir")
    defaults = saved_fields(DemoConfig())
    different = first_difference(read_hashed_json(path), settings, defaults)
    if different:
        name, value = different
        raise ConfigurationError(
            f"{folder} holds a demo with another {name} ({value}): choose another --output_dir"
        )


def _announce(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti demo`."""
    started = time.monotonic()
    folder = demo(parse_config(DemoConfig, argv, prog="smalti demo"))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"Done in {minutes} min {seconds} s{_peak_memory()}. Everything is in {folder}")
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
    """The peak memory of this process, as text; empty if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f" with {used / 1e9:.1f} GB of memory at most"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
