"""Export: a latent cache -> parquet files or WebDataset shards, for other code to read.

smalti export-latents runs/latents latents_parquet
smalti export-latents runs/latents latents_tar --format webdataset
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from smalti.cli import parse_config, run_command
from smalti.data.latent_cache.export import Format, export_cache
from smalti.errors import ConfigurationError


@dataclass(frozen=True)
class ExportLatentsConfig:
    """Write a latent cache, with its manifest, in a format that other code reads."""

    # folder of a cache, or of the caches of all splits
    latents: Positional[Annotated[Path, arg(metavar="LATENTS")]] = Path()
    # a new folder
    out: Positional[Annotated[Path, arg(metavar="OUT")]] = Path()
    format: Format = "parquet"  # parquet, or webdataset: tar files


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti export-latents`."""
    config = parse_config(ExportLatentsConfig, argv, prog="smalti export-latents")
    if Path() in (config.latents, config.out):
        raise ConfigurationError("give two folders: smalti export-latents LATENTS OUT")
    files = export_cache(config.latents, config.out, config.format)
    print(f"written: {config.out} ({len(files)} files)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
