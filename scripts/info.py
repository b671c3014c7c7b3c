"""Info: what a folder is, whether it is complete, and the command that continues with it.

smalti info runs/prior
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from smalti.cli import parse_config, run_command
from smalti.data.inspection import holds_latents, is_shards, of_cache, of_shards, splits
from smalti.data.latent_cache.manifest import BUCKETS
from smalti.errors import ConfigurationError, DataError
from smalti.evaluation.metrics import of_summary
from smalti.files import Info
from smalti.pipelines.info import (
    is_edited,
    is_generated,
    is_model,
    is_pipeline,
    of_edited,
    of_generated,
    of_model,
    of_pipeline,
)
from smalti.repository import local_folder
from smalti.training.checkpoint import MANIFEST, STATE
from smalti.training.run_info import is_run, of_checkpoint, of_run

EXIT_DAMAGED = 1
SUMMARY, DEMO = "summary.json", "demo.json"  # of an evaluation; of a demo, which holds more

# Kinds of folders: how to recognise one, and what to print for it. The first that fits is used.
KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], Info]]] = [
    (lambda path: (path / STATE).is_file() or (path / MANIFEST).is_file(), of_checkpoint),
    (is_run, of_run),
    (is_pipeline, of_pipeline),
    (is_model, of_model),
    (is_generated, of_generated),
    (is_edited, of_edited),
    (is_shards, of_shards),
    (
        lambda path: holds_latents(path) or bool(splits(path)) or (path / BUCKETS).is_file(),
        of_cache,
    ),
    (
        lambda path: (path / SUMMARY).is_file() and not (path / DEMO).is_file(),
        lambda path: of_summary(path / SUMMARY),
    ),
]


@dataclass(frozen=True)
class InfoConfig:
    """Print what a folder is, whether it is complete, and which command continues with it.

    The exit status is 1 if something in it is damaged.
    """

    # a run, a checkpoint, a latent cache, shards, a tokenizer, a prior, a pipeline (or the
    # name of one that ships with smalti), its pictures, edited ones or an evaluation
    path: Positional[Annotated[Path, arg(metavar="PATH")]] = Path()


def info(path: Path) -> Info:
    """What a folder is.

    Raises:
        DataError: there is no such folder, or nothing in it is recognised.
    """
    path = local_folder(path)
    if not path.is_dir():
        raise DataError(f"folder not found: {path}")
    found = _explain(path)
    if found is not None:
        return found
    inside = {child.name: _explain(child) for child in sorted(path.iterdir()) if child.is_dir()}
    known = [(name, of.lines[0][1]) for name, of in inside.items() if of is not None]
    if known:  # the output of a demo, for example
        return Info([("kind", "folder with others in it: give one of them"), *known])
    raise DataError(
        f"{path} is nothing that smalti writes: give the folder of a run, a checkpoint, latents, a "
        "tokenizer, a prior or a pipeline"
    )


def _explain(path: Path) -> Info | None:
    """What to print for a folder, by the first kind that fits; None if no kind fits."""
    return next((explain(path) for fits, explain in KINDS if fits(path)), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti info`."""
    config = parse_config(InfoConfig, argv, prog="smalti info")
    if config.path == Path():
        raise ConfigurationError("give a folder: smalti info PATH")
    found = info(config.path)
    width = max(len(name) for name, _ in found.lines)
    for name, value in found.lines:
        print(f"{name:{width}}  {value}")
    return 0 if found.whole else EXIT_DAMAGED


if __name__ == "__main__":
    raise SystemExit(run_command(main))
