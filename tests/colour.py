"""A kind of condition that smalti does not know: two small classes, and one line to register them.

    python tests/colour.py COMMAND ...    the console command, with the condition "colour"

Pictures of a mean colour: `smalti encode --condition colour` stores it, `train-prior` gives it to
any prior, `pipe(colour=[[1, 0, 0]])` and `smalti generate --colour 1,0,0` ask for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smalti.cli import main
from smalti.data.latent_cache.cache import LatentBatch
from smalti.data.latent_cache.manifest import StoredCondition
from smalti.data.order import Key
from smalti.errors import GenerationError
from smalti.pipelines.conditions import CONDITION_SOURCES, ConditionSource, Inputs, PictureEncoder
from smalti.prior.conditions.base import ConditionKind, VectorKind
from smalti.tokenizer.base import Tokenizer


class ColourKind(VectorKind):
    """Colours (B, 3) in [0, 1], or rows of NaN for "any colour"."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.embedding = nn.Linear(3, width)
        self.no_colour = nn.Parameter(torch.zeros(width))

    def forward(self, value: Tensor) -> Tensor:
        is_null = value.isnan().any(1, keepdim=True)
        colour = value.nan_to_num().to(self.embedding.weight.dtype)
        return torch.where(is_null, self.no_colour, self.embedding(colour))

    def check(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != 3:
            raise GenerationError(f"colour is {value!r:.60}: give (B, 3) of numbers in [0, 1]")

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(0, 3, device=device)

    def null(self, value: Tensor) -> Tensor:
        return torch.full_like(value, torch.nan)


class MeanColour(PictureEncoder):
    """What the latent cache holds: the mean of each view of a picture."""

    @property
    def stored(self) -> Sequence[StoredCondition]:
        return (StoredCondition("colour", (3,), "float32", "view", "mean of RGB"),)

    def of_images(self, images: Tensor, keys: Sequence[Key]) -> Mapping[str, Tensor]:
        return {"colour": (images.mean((2, 3)) + 1) / 2}


class ColourSource(ConditionSource):
    """Where colours come from."""

    Kind: ClassVar[type[ConditionKind]] = ColourKind
    ARGUMENTS: ClassVar[tuple[str, ...]] = ("colour",)
    STORED: ClassVar[tuple[str, ...]] = ("colour",)
    FLAGS: ClassVar[tuple[str, ...]] = ("colour",)
    FLAG_HELP: ClassVar[str] = "mean colours of the pictures, each R,G,B in [0, 1]"

    @classmethod
    def picture_encoder(cls, options: Any, tokenizer: Tokenizer) -> MeanColour | None:
        return MeanColour() if "colour" in options.condition.split("+") else None

    def of_batch(self, batch: LatentBatch) -> Tensor:
        return batch.conditions["colour"]

    def of_call(self, inputs: Inputs) -> Tensor:
        return torch.as_tensor(inputs.get("colour"), dtype=torch.float32)

    def read(self, text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    @property
    def example(self) -> str:
        return "colour=[[1, 0, 0]]"

    @property
    def in_words(self) -> str:
        return "They have a mean colour."


if __name__ == "__main__":
    CONDITION_SOURCES.register("colour", ColourSource)
    raise SystemExit(main())
