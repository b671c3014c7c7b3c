"""Convert: published weights -> a smalti folder, ready to sample, evaluate and fine-tune.

    smalti convert llamagen-tokenizer vq_ds16_c2i.pt models/vq16
    smalti convert llamagen-prior c2i_B_256.pt models/llamagen-b --tokenizer models/vq16

Only tensors are read; code in a file never runs. Sizes come from the shapes of the tensors; what
shapes do not determine has a default and a flag.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from smalti.cli import parse_config, run_command
from smalti.config import ImageSize
from smalti.errors import ConfigurationError
from smalti.pipelines.convert import PUBLISHED_SOURCES
from smalti.pipelines.convert.convert import convert
from smalti.pipelines.convert.source import Options
from smalti.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class ConvertConfig:
    """Convert published weights to a smalti folder."""

    # the code base and the kind of model
    source: Positional[Annotated[str, arg(metavar="SOURCE")]] = ""
    # a .safetensors, .pt, .pth or .ckpt file, or a folder
    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]] = Path()
    # a new folder, for a tokenizer, a prior or a pipeline
    out: Positional[Annotated[Path, arg(metavar="OUT")]] = Path()
    tokenizer: Path | None = None  # folder of the prior's tokenizer; the result is a pipeline
    heads: int | None = None  # attention heads of a prior
    scales: str | None = None  # sides of the code grids: 1,2,3,4 or one number for a single grid
    # of a tokenizer, in pixels: the side of a square, or height x width as in 48x64; default: 256
    image_size: ImageSize | None = None
    # Number of classes of a prior, without the null class. Needed if the model was trained without
    # class dropout: its class table then has no row for the null class.
    num_classes: int | None = None
    scaling_factor: float | None = None  # by which the latents of a KL autoencoder are multiplied

    @property
    def sides(self) -> tuple[int, ...] | None:
        """The scales as integers.

        Raises:
            ConfigurationError: they are not numbers and commas.
        """
        if self.scales is None:
            return None
        parts = [part.strip() for part in self.scales.split(",")]
        if not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts):
            raise ConfigurationError(
                f"scales is {self.scales!r}; give numbers and commas, for example 1,2,3,4"
            )
        return tuple(map(int, parts))


ConvertConfig.__doc__ = (
    f"{ConvertConfig.__doc__}\n\nSOURCE is one of: {', '.join(PUBLISHED_SOURCES)}."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti convert`."""
    config = parse_config(ConvertConfig, argv, prog="smalti convert")
    if not config.source or Path() in (config.checkpoint, config.out):
        raise ConfigurationError("give three arguments: smalti convert SOURCE CHECKPOINT OUT")
    tokenizer = Tokenizer.from_pretrained(config.tokenizer) if config.tokenizer else None
    options = Options(
        heads=config.heads,
        scales=config.sides,
        image_size=config.image_size,
        num_classes=config.num_classes,
        scaling_factor=config.scaling_factor,
        tokenizer=tokenizer,
    )
    for line in convert(config.source, config.checkpoint, config.out, options):
        print(line)
    print(f"model: {config.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
