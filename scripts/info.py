"""What a folder is: a run, a checkpoint, latents, shards, a tokenizer, a prior or a pipeline.

smalti info runs/prior
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from smalti.cli import parse_config, run_command
from smalti.errors import SmaltiError
from smalti.pipelines.info import info

EXIT_DAMAGED = 1


@dataclass(frozen=True)
class InfoConfig:
    """Explain a folder in a few lines: what it is, whether it is whole, how to go on with it.

    The exit status is 1 if something in it is damaged.
    """

    # a run, a checkpoint, a latent cache, shards, a tokenizer, a prior or a pipeline
    path: Positional[Annotated[Path, arg(metavar="PATH")]] = Path()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti info`."""
    config = parse_config(InfoConfig, argv, prog="smalti info")
    if config.path == Path():
        raise SmaltiError("give a folder: smalti info PATH")
    found = info(config.path)
    width = max(len(name) for name, _ in found.lines)
    for name, value in found.lines:
        print(f"{name:{width}}  {value}")
    return 0 if found.whole else EXIT_DAMAGED


if __name__ == "__main__":
    raise SystemExit(run_command(main))
