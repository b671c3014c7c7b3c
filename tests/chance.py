"""What tests ask of chance: models in which every weight matters, and generators by their seeds."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def randomised(model: Model, std: float = 0.3, vector_mean: float = 0.0) -> Model:
    """A model in eval mode in which every weight matters: a new one has zero layers.

    Args:
        vector_mean: of biases and of the weights of norms; matrices have the mean 0.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=vector_mean if parameter.ndim == 1 else 0.0, std=std)
    return model.eval()


def generators(*seeds: int) -> list[torch.Generator]:
    """One for each sample."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
