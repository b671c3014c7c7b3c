"""One optimizer step: micro-batches, clipping, the learning rate, and when it is not taken."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.training import processes
from smalti.training.checkpoint import full_tensor
from smalti.training.config import RunConfig

# -------------------------------------------------------------------------------------------------
# Steps that must not be taken: their loss or their gradient is not finite on some process.

logger = logging.getLogger(__name__)


class StepGuard:
    """Decides on every optimizer step, alike on all processes, and counts those refused.

    Args:
        limit: refused steps in a row, of one model, that end the run.
        sum_over_processes: of a tensor.
    """

    def __init__(self, limit: int, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        self.limit = limit
        self.in_a_row: dict[str, int] = {}  # by model
        self.total = 0
        self._sum = sum_over_processes
        self._losses: list[Tensor] = []

    def observe(self, loss: Tensor) -> None:
        """Remember the loss of a micro-batch, a scalar, until the step is decided on."""
        self._losses.append(loss.detach())

    def accepts(self, gradient_norm: Tensor) -> bool:
        """Whether losses and gradient are finite on all processes; every process must call this."""
        numbers = torch.stack([*(loss.float() for loss in self._losses), gradient_norm.float()])
        self._losses = []
        return self._sum((~numbers.isfinite()).sum()).item() == 0

    def count(self, gradient_norm: float, step: int, model: str) -> bool:
        """Whether a step of `model` was taken.

        Args:
            gradient_norm: what `Run.apply` returned.

        Raises:
            SmaltiError: too many in a row were not.
        """
        accepted = math.isfinite(gradient_norm)
        self.in_a_row[model] = 0 if accepted else self.in_a_row.get(model, 0) + 1
        self.total += not accepted
        if self.in_a_row[model] == 1:
            logger.warning("step %d of the %s is skipped: not finite", step, model)
        if self.in_a_row[model] >= self.limit:
            raise SmaltiError(
                f"the loss or the gradient of the {model} was not finite in {self.limit} steps in a"
                f" row, up to step {step}: lower --learning_rate or use --mixed_precision no; the"
                " last checkpoint is untouched"
            )
        return accepted

    def state(self) -> dict[str, Any]:
        """The counters, for state.json."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.in_a_row = dict(state.get("in_a_row", {}))
        self.total = int(state.get("total", 0))


# -------------------------------------------------------------------------------------------------
# Which parameters weight decay acts on.

LAYERS = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
)


def split_by_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters that decay, and those that do not.

    Weights of layers decay. Biases, norms and bare parameters (positions, codebooks, attention
    scales) do not, nor do those that the module names in `undecayed`.
    """
    spared = set(getattr(module, "no_weight_decay", ()))
    matrices = {
        id(layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, LAYERS) and f"{name}.weight" not in spared
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if id(parameter) in matrices]
    return decayed, [parameter for parameter in trained if id(parameter) not in matrices]


# -------------------------------------------------------------------------------------------------
# Learning-rate schedule as a pure function of the step: nothing to save, nothing to restore.


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final_ratio: float) -> float:
    """Learning rate at a step.

    Rises linearly to `peak` over `warmup` steps, then falls along half a cosine to
    `final_ratio * peak` at `total` (Loshchilov and Hutter, 1608.03983). Constant from there.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_ratio + (1 - final_ratio) * cosine)


# -------------------------------------------------------------------------------------------------
# One optimizer step: micro-batches, clipping, the learning rate, and when it is not taken.


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
        norm = full_tensor(nn.utils.clip_grad_norm_(module.parameters(), self.config.max_grad_norm))
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
