"""Random numbers come from generators that the caller passes: one for all samples of a batch, or a
list with one for each, whose sample then does not depend on its neighbours."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smalti.errors import SmaltiError

# -------------------------------------------------------------------------------------------------
# Random numbers as a pure function of where they are used, so that a resumed run repeats them.


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed that depends on every part: (run seed, what for, step, rank, ...)."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big")  # all that a CPU generator keeps of its seed


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


# -------------------------------------------------------------------------------------------------
# Random numbers come from generators that the caller passes: one for all samples of a batch, or a
# list with one for each, whose sample then does not depend on its neighbours.

Generators = torch.Generator | Sequence[torch.Generator] | None
RandomInputs = Mapping[str, Tensor]  # random numbers that were drawn before they are used, by name


def check_generators(generator: Generators, rows: int) -> None:
    """Raise `SmaltiError` unless it is None, one generator, or a list with one for each of `rows`
    samples."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    each = generator if isinstance(generator, Sequence) else [generator]
    wrong = [value for value in each if not isinstance(value, torch.Generator)]
    if wrong:
        raise SmaltiError(
            f"generator holds {wrong[0]!r}: give a torch.Generator, or a list with one per sample"
        )
    if len(each) != rows:
        raise SmaltiError(f"{len(each)} generators were given for {rows} samples: give one each")


def given_or_new(generator: Generators, rows: int) -> torch.Generator | Sequence[torch.Generator]:
    """The generators of a sampling call of `rows` samples; for None a new, randomly seeded one.

    Raises:
        SmaltiError: it holds something else, or is a list of another length than there are samples.
    """
    check_generators(generator, rows)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return generator


class NormalSource:
    """Draws N(0, I) for `rows` samples, as often as it is called.

    With a list of generators sample i is drawn from generators[i] alone, so it does not depend on
    its neighbours. Numbers are drawn where the generator lives: a CPU generator gives the same on
    any device. None is a new generator with a random seed: torch's global random state, and so
    training, is left alone.

    Raises:
        SmaltiError: the list has another length than there are samples.
    """

    def __init__(self, generator: Generators, rows: int) -> None:
        self.generator = given_or_new(generator, rows)

    def __call__(self, like: Tensor) -> Tensor:
        """Numbers with the shape (rows, ...), type and device of `like`."""
        if isinstance(self.generator, torch.Generator):
            return _draw(like.shape, self.generator, like)
        rows = [_draw(like.shape[1:], own, like) for own in self.generator]
        return torch.stack(rows) if rows else torch.empty_like(like)


def _draw(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    # Drawn in fp32 or better whatever the type of the samples, then rounded.
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return values.to(like)
