"""The critic of stage one: how it is trained beside a tokenizer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.seeding import generator
from smalti.tokenizer.discriminators.objective import DRAWS, CriticObjective
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.training.checkpoint import OptimizerState
from smalti.training.draws import shares
from smalti.training.log import mean_of
from smalti.training.run import Run


class CriticStage:
    """A critic, its optimizer, and one step of both."""

    def __init__(self, run: Run, config: ObjectiveConfig, image_size: int) -> None:
        self.run = run
        self.objective = CriticObjective(config, image_size).to(run.device)
        self.optimizer = run.adamw(self.objective)
        run.track(
            discriminator=self.objective, discriminator_optimizer=OptimizerState(self.optimizer)
        )
        # Gradients are synchronised by this wrapper alone, so every pass that makes some uses it.
        self.wrapped = run.replicate(self.objective)

    def train_step(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        draws: Sequence[Tensor],
        step: int,
    ) -> dict[str, Tensor]:
        """One optimizer step; returns losses for the log.

        Args:
            pairs: pictures and reconstructions, (B, 3, H, W) each, of every micro-batch.
            draws: (B, DRAWS) of every micro-batch, see `critic_draws`.
        """
        parts = []
        for index, ((images, fakes), numbers) in enumerate(zip(pairs, draws, strict=True)):
            with self.run.micro_batch(index, self.wrapped):
                loss = self.wrapped(images, fakes, numbers, step)
                self.run.backward(loss.total)
            parts.append(loss.parts)
        norm = self.run.apply(self.optimizer, self.objective, step)
        if self.run.count_step(norm, step, "critic"):
            self.objective.after_step()
        else:
            self.objective.discard_step()
        return {**mean_of(parts), "discriminator_gradient_norm": torch.tensor(norm)}


def critic_draws(run: Run, step: int) -> list[Tensor]:
    """Uniform numbers (B, DRAWS) for the pictures of each micro-batch of this process.

    A picture's numbers depend on its place in the whole batch of the step alone, not on how that
    is shared among processes or cut into micro-batches.
    """
    numbers = generator(run.config.seed, "critic", step)
    return shares(run, torch.rand(run.config.train_batch_size, DRAWS, generator=numbers))
