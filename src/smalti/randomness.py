"""Reproducible random numbers.

The caller of a sampling function passes generators: one for the batch, or a list with one per
sample, so that a sample does not depend on the others in the batch. Training derives seeds from
(run seed, purpose, step, ...), so that a resumed run repeats them.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smalti.errors import GenerationError


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed that depends on every part: (run seed, purpose, step, rank, ...)."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big")  # a CPU generator uses 32 bits of its seed


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


Generators = torch.Generator | Sequence[torch.Generator] | None
RandomInputs = Mapping[str, Tensor]  # random numbers of a training pass by name, a row per sample


def check_generators(generator: Generators, rows: int) -> None:
    """Raise `GenerationError` unless it is None, a generator, or a list of `rows` generators."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    each = generator if isinstance(generator, Sequence) else [generator]
    wrong = [value for value in each if not isinstance(value, torch.Generator)]
    if wrong:
        raise GenerationError(
            f"generator contains {wrong[0]!r}: give a torch.Generator, or a list of one per sample"
        )
    if len(each) != rows:
        raise GenerationError(
            f"{len(each)} generators were given for {rows} samples: give one each"
        )


def given_or_new(generator: Generators, rows: int) -> torch.Generator | Sequence[torch.Generator]:
    """The generators for `rows` samples; for None a new one with a random seed.

    Raises:
        GenerationError: it is not a generator, or a list whose length is not `rows`.
    """
    check_generators(generator, rows)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return generator


class NormalSource:
    """Noise from N(0, I) for `rows` samples, new at every call.

    With a list of generators, the noise of sample i comes from generators[i] only. Noise is sampled
    on the device of the generator: a CPU generator gives the same noise for any device. None is a
    new generator with a random seed; torch's global random state does not change.

    Raises:
        GenerationError: the length of the list is not `rows`.
    """

    def __init__(self, generator: Generators, rows: int) -> None:
        self.generator = given_or_new(generator, rows)

    def __call__(self, like: Tensor) -> Tensor:
        """Noise with the shape (rows, ...), type and device of `like`."""
        if isinstance(self.generator, torch.Generator):
            return _normal(like.shape, self.generator, like)
        rows = [_normal(like.shape[1:], own, like) for own in self.generator]
        return torch.stack(rows) if rows else torch.empty_like(like)


def _normal(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    # In fp32 or better whatever the type of the samples, then rounded: the same noise in any type.
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return values.to(like)
