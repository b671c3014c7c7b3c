"""One optimizer step: micro-batches, clipping, the learning rate, and when it is not taken."""

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.training import processes
from smalti.training.config import RunConfig
from smalti.training.decay import split_by_decay
from smalti.training.guard import StepGuard
from smalti.training.schedule import warmup_cosine
from smalti.training.sharding import whole


class Steps:
    """How the models of a run are wrapped and moved, alike on all its processes."""

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.device = accelerator.device
        self.guard = StepGuard(config.max_skipped_steps, self.sum_over_processes)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, a pure function of the config."""
        config = self.config
        return warmup_cosine(
            step,
            peak=config.learning_rate,
            warmup=config.lr_warmup_steps,
            total=config.max_train_steps,
            final_ratio=config.lr_final_ratio,
        )

    def adamw(self, module: nn.Module) -> torch.optim.AdamW:
        """AdamW with weight decay on the matrices of layers only, fused where torch can."""
        config = self.config
        decayed, others = split_by_decay(module)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (config.adam_beta1, config.adam_beta2)
        kept = [group for group in groups if group["params"]]
        return torch.optim.AdamW(kept, lr=config.learning_rate, betas=betas, fused=True)

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module to train: its backward pass averages gradients over the processes.

        Raises:
            SmaltiError: the job was launched to shard models.
        """
        return processes.replicate(self.accelerator, module)

    def shard(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Like `replicate`; under FSDP2 module and optimizer are sharded, in place.

        Averages of the module are made before, its state is restored after.
        """
        return processes.shard(self.accelerator, module, optimizer)

    @contextlib.contextmanager
    def micro_batch(self, index: int, model: nn.Module) -> Iterator[None]:
        """Gradients of all but the last micro-batch stay on their process."""
        last = index == self.config.gradient_accumulation_steps - 1
        with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch's share of the loss."""
        self.guard.observe(loss)
        self.accelerator.backward(loss / self.config.gradient_accumulation_steps)

    def apply(self, optimizer: torch.optim.Optimizer, module: nn.Module, step: int) -> float:
        """Clip, then step with this step's learning rate; zero the gradients.

        Returns:
            The gradient norm before clipping. It is not finite, and nothing was changed, if on any
            process the gradient or a loss since the last call was not: all skip alike.
        """
        norm = whole(nn.utils.clip_grad_norm_(module.parameters(), self.config.max_grad_norm))
        accepted = self.guard.accepts(norm)
        if accepted:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = norm.item()
        return value if accepted or not math.isfinite(value) else math.nan

    def count_step(self, gradient_norm: float, step: int, model: str = "model") -> bool:
        """Whether the step was taken. Ends the run after too many skipped ones in a row."""
        return self.guard.count(gradient_norm, step, model)

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes; every process must call this."""
        reduced = self.accelerator.reduce(values, reduction="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process; every process must call this."""
        return self.sum_over_processes(torch.tensor(int(flag), device=self.device)).item() > 0
