"""Import: latents that LlamaGen or LightningDiT extracted -> a latent cache.

smalti import-latents imagenet_code_c2i_flip_ten_crop runs/latents --tokenizer models/vq16
smalti import-latents imagenet_train_256 runs/latents --tokenizer models/vavae --format lightningdit

The files do not record which tokenizer made them: `--tokenizer` names it, unverified. After an
interruption, the same command continues where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from smalti.cli import parse_config, run_command
from smalti.data.latent_cache.imports import Division, Format, Origin, import_latents, open_foreign
from smalti.data.latents import CodeSpec
from smalti.errors import ConfigurationError
from smalti.pipelines.model_flag import place_of
from smalti.tokenizer.base import Tokenizer
from smalti.training.processes import fills_folder, join_job, say, shared_work


@dataclass(frozen=True)
class ImportLatentsConfig(Division):
    """Write the latents of other code as caches train/ and heldout/.

    The caches record that the tokenizer made them, but only sizes can be verified.
    A file classes.json in SOURCE, a list of names, names the classes.
    """

    # a folder
    source: Positional[Annotated[Path, arg(metavar="SOURCE")]] = Path()
    # a new folder, or that of an interrupted import
    out: Positional[Annotated[Path, arg(metavar="OUT")]] = Path()
    format: Format = "llamagen"  # the code that wrote them
    tokenizer: Annotated[Path, place_of("The tokenizer that made the latents")] = Path(
        "runs/tokenizer/tokenizer"
    )
    normalised: bool = False  # LightningDiT: latents are normalised by latents_stats.pt


def origin_of(tokenizer: Tokenizer) -> Origin:
    """The properties of the tokenizer that an import uses."""
    origin = Origin(
        spec=tokenizer.spec,
        fingerprint=tokenizer.fingerprint,
        stored_shape=tokenizer.stored_shape,
        stored_statistics=tokenizer.stored_statistics,
    )
    if isinstance(tokenizer.spec, CodeSpec):
        return origin
    # `latents` gives (z - mean) / std, so the values at z = 0 and z = 1 determine mean and std.
    stored = torch.zeros(1, *tokenizer.stored_shape)
    at_zero = tokenizer.latents(stored)[0, :, 0, 0]  # (C,)
    stored[:, : len(at_zero)] = 1
    std = 1 / (tokenizer.latents(stored)[0, :, 0, 0] - at_zero)
    mean = 0.0 - at_zero * std
    return replace(origin, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


@fills_folder("out", deep=True)
def imported(config: ImportLatentsConfig) -> Path:
    """Write the caches of both splits, and return their folder."""
    join_job()
    origin = origin_of(Tokenizer.from_pretrained(str(config.tokenizer)))
    latents = open_foreign(config.source, config.format, origin, config.normalised)
    with shared_work(len(latents.labels), "import") as share:
        import_latents(latents, origin, config.out, config, **share)
    return config.out


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti import-latents`."""
    config = parse_config(ImportLatentsConfig, argv, prog="smalti import-latents")
    if Path() in (config.source, config.out):
        raise ConfigurationError("give two folders: smalti import-latents SOURCE OUT")
    say(f"latents: {imported(config)}, recorded as made by {config.tokenizer} (not verified)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
