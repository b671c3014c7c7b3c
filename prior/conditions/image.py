"""Pictures as a condition: their latents, beside the noisy latents of a flow prior.

The network takes the latents of the picture as further input channels (latent diffusion,
2112.10752, section 4.3.2; InstructPix2Pix, 2211.09800, section 3.2): each position of the sample
sees the same position of the picture. What picture is given, and how it is encoded, is a matter of
the task: `pipelines/image_tasks.py`.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from smalti.errors import ConfigurationError, GenerationError
from smalti.prior.conditions.base import Condition, ConditionKind


@dataclass(frozen=True)
class ImageConfig:
    """The pictures that a prior takes."""

    channels: int  # C', of their latents
    task: str = ""  # what they show: the text of a task in `pipelines.image_tasks`; "": unknown

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `PriorConfig`."""
        return {"image_channels": self.channels, "image_task": self.task}


@dataclass(frozen=True, eq=False)
class ImageCondition:
    """Encoded pictures.

    Raises:
        GenerationError: the latents have another shape or type.
    """

    latents: Tensor  # (B, C', h, w) floating point: the grid of the samples, any channels

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or not self.latents.is_floating_point():
            raise GenerationError(
                f"the latents of an image condition have shape {tuple(self.latents.shape)} and "
                f"type {self.latents.dtype}; give (B, C, h, w) of a floating-point type"
            )

    def __len__(self) -> int:
        return len(self.latents)


class ImageKind(ConditionKind):
    """Latents (B, channels, h, w) of pictures, (h, w) one of `grids`. A picture is its own null: it
    is the condition of both passes of classifier-free guidance, so guidance is of classes and
    captions alone."""

    def __init__(self, channels: int, *grids: tuple[int, int]) -> None:
        self.shapes = [(channels, *grid) for grid in grids]

    @classmethod
    def of(cls, prior: Any, name: str) -> Self:
        del name
        own = (prior.spec.height, prior.spec.width)
        return cls(prior.config.image_channels, *getattr(prior.config, "grids", [own]))

    @classmethod
    def check_config(cls, config: Any, used: bool, num_classes: int) -> None:
        """Raise `ConfigurationError` unless there are channels if, and only if, they are used."""
        del num_classes
        if used != (config.image_channels > 0):
            raise ConfigurationError(
                f"image_channels is {config.image_channels}, and the condition {config.condition}: "
                "a prior has both or neither"
            )

    def check(self, value: Condition) -> None:
        """Raise `GenerationError` unless these are pictures of the right channels and grid."""
        if not isinstance(value, ImageCondition):
            raise GenerationError(
                f"this prior takes pictures, not a {type(value).__name__}: give an ImageCondition"
            )
        if tuple(value.latents.shape[1:]) not in self.shapes:
            taken = (f"(B, {', '.join(map(str, shape))})" for shape in self.shapes)
            raise GenerationError(
                f"the latents of an image condition have shape {tuple(value.latents.shape)}; this "
                f"prior takes {' or '.join(taken)}"
            )

    def empty(self, device: torch.device) -> ImageCondition:
        return ImageCondition(torch.empty(0, *self.shapes[0], device=device))

    def null(self, value: ImageCondition) -> ImageCondition:
        return value

    @property
    def has_null(self) -> bool:
        """False: without another condition there is nothing to guide."""
        return False

    def dropped(self, value: ImageCondition, which: Tensor) -> ImageCondition:
        """The pictures: they are never dropped."""
        del which
        return value
