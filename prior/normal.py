"""Standard normal numbers for a batch of samples, each from a generator of its own if wanted."""

import torch
from torch import Tensor

from smalti.prior.sampling import Generators, given_or_new


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
        drawn = [_draw(like.shape[1:], own, like) for own in self.generator]
        return torch.stack(drawn) if drawn else torch.empty_like(like)


def _draw(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    # Drawn in fp32 or better whatever the type of the samples, then rounded.
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    drawn = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return drawn.to(like)
