"""Import: latents that LlamaGen or LightningDiT extracted -> a latent cache.

smalti import-latents imagenet_code_c2i_flip_ten_crop runs/latents --tokenizer models/vq16
smalti import-latents imagenet_train_256 runs/latents --tokenizer models/vavae --format lightningdit

Which tokenizer made them cannot be seen: you say it, and the caches will. Killed? The same command
goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from smalti.cli import parse_config, run_command
from smalti.data.latent_cache.imports import Division, Format, Origin, import_latents, open_foreign
from smalti.errors import SmaltiError
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.kl import KLTokenizer
from smalti.training.processes import join_job, say, shared_work


@dataclass(frozen=True)
class ImportLatentsConfig(Division):
    """Write the latents of other code as caches train/ and heldout/.

    The caches will say that the tokenizer made them. Only sizes can be checked: you vouch for it.
    A file classes.json in SOURCE, a list of names, names the classes.
    """

    # a folder
    source: Positional[Annotated[Path, arg(metavar="SOURCE")]] = Path()
    # a new folder, or one that such an import began
    out: Positional[Annotated[Path, arg(metavar="OUT")]] = Path()
    format: Format = "llamagen"  # whose latents they are
    tokenizer: Path = Path("runs/tokenizer/tokenizer")  # the one that made the latents
    normalised: bool = False  # LightningDiT's were stored normalised by latents_stats.pt


def origin_of(tokenizer: Tokenizer) -> Origin:
    """What the latents of a tokenizer are like."""
    spec, fingerprint = tokenizer.spec, tokenizer.fingerprint
    if not isinstance(tokenizer, KLTokenizer):
        return Origin(spec, fingerprint)
    mean, std = (tuple(t.flatten().tolist()) for t in (tokenizer.shift, tokenizer.scale))
    return Origin(spec, fingerprint, mean, std)


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
        raise SmaltiError("give two things: smalti import-latents SOURCE OUT")
    say(f"latents: {imported(config)}, as made by {config.tokenizer} on your word")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
