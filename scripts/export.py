"""Export: a model -> the file or folder that the original code, or Diffusers, reads.

smalti export models/kl models/kl_diffusers    # a Diffusers folder
smalti export models/dit DiT.pt                # a file for the authors' code
smalti export models/vq16 vq16.pt              # a file for LlamaGen's code
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from smalti.checkpoints import Weights, has_prior
from smalti.cli import parse_config, run_command
from smalti.errors import ConfigurationError
from smalti.files import read_json
from smalti.hub import resolve_folder
from smalti.pipelines.convert import PUBLISHED_SOURCES
from smalti.pipelines.convert.convert import export
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.model_index import INDEX
from smalti.prior.base import Prior
from smalti.prior.registry import PRIORS
from smalti.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class ExportConfig:
    """Write a model in the layout of published weights."""

    model: Positional[Annotated[str, place_of("A tokenizer or a prior", metavar="MODEL")]] = ""
    # a new folder, or a new .safetensors, .pt, .pth or .ckpt file
    out: Positional[Annotated[Path, arg(metavar="OUT")]] = Path()
    # the layout; by default Diffusers' for a KL autoencoder or DiT in a folder, else the authors'
    format: str | None = None
    weights: Weights = "ema"  # of a checkpoint: averaged over its run (ema), or raw


def load_model(name: str, weights: Weights = "ema") -> Tokenizer | Prior:
    """The tokenizer or prior in a folder or repository.

    Raises:
        SmaltiError: there is none, or it is a pipeline.
    """
    folder = resolve_folder(name)
    if (folder / INDEX).is_file():
        raise ConfigurationError(f"{name} is a pipeline: export {name}/tokenizer and {name}/prior")
    config = folder / "config.json"
    content = read_json(config) if config.is_file() else {}
    is_prior = isinstance(content, dict) and str(content.get("type")) in PRIORS
    base = Prior if is_prior or has_prior(folder) else Tokenizer
    return base.from_pretrained(folder, weights=weights)


ExportConfig.__doc__ = (
    f"{ExportConfig.__doc__}\n\nFORMAT is one of: {', '.join(PUBLISHED_SOURCES)}."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti export`."""
    config = parse_config(ExportConfig, argv, prog="smalti export")
    if not config.model or config.out == Path():
        raise ConfigurationError("give two arguments: smalti export MODEL OUT")
    for line in export(load_model(config.model, config.weights), config.out, config.format):
        print(line)
    print(f"written: {config.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
