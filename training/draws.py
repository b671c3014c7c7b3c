"""What models draw in training, as a function of a sample's place in the whole batch of a step.

Numbers are drawn for the whole batch on every process, which takes its rows: so gradients are the
same however the batch is shared among processes or cut into micro-batches.
"""

from typing import Protocol

import torch
from torch import Tensor

from smalti.seeding import derive_seed
from smalti.training.run import Run


class Drawing(Protocol):
    """A model that draws random numbers in training."""

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]: ...


def drawn_for(run: Run, model: Drawing, step: int) -> list[dict[str, Tensor]]:
    """What a model draws for each micro-batch of this process."""
    config = run.config
    generator = torch.Generator(run.device).manual_seed(derive_seed(config.seed, step, 0))
    whole = model.draw(config.train_batch_size, generator)
    parts = {name: shares(run, values) for name, values in whole.items()}
    return [
        {name: part[index] for name, part in parts.items()}
        for index in range(config.gradient_accumulation_steps)
    ]


def shares(run: Run, whole: Tensor) -> list[Tensor]:
    """The rows of each micro-batch of this process, of rows for the whole batch."""
    mine = whole.chunk(run.accelerator.num_processes)[run.accelerator.process_index]
    return list(mine.to(run.device).chunk(run.config.gradient_accumulation_steps))
