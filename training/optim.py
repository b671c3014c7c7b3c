"""One optimizer step: weight decay groups, learning rate, clipping, skipped steps, and the EMA.

The training loops call these functions directly. The guard of skipped steps is written here rather
than taken from a library: mixed-precision scalers skip on one process and for gradients only; here
all processes skip the same steps, also for losses, and too many skipped steps, in a row or in all,
end the run.
"""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from smalti.checkpoints import UPDATES
from smalti.errors import ConfigurationError, SmaltiError
from smalti.training.blocks import blocks_of
from smalti.training.checkpoint import full_tensor, is_sharded, sharded_like
from smalti.training.config import RunConfig
from smalti.training.divergence import LossLevel

logger = logging.getLogger(__name__)

FEW_STEPS = 5  # of one model that may be skipped in any case
QUIET_STEPS = 100  # between two warnings of a spike

# -------------------------------------------------------------------------------------------------
# AdamW (Loshchilov and Hutter, 1711.05101) with weight decay on the matrices of layers only.

LAYERS_WITH_DECAY = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
)


def split_by_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters with weight decay, and those without.

    Weights of layers decay. Biases, norms and bare parameters (positions, codebooks, attention
    scales) do not, nor do those that the module names in `no_weight_decay`.
    """
    excluded = set(getattr(module, "no_weight_decay", ()))
    matrices = {
        id(layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, LAYERS_WITH_DECAY) and f"{name}.weight" not in excluded
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if id(parameter) in matrices]
    return decayed, [parameter for parameter in trained if id(parameter) not in matrices]


def adamw(module: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of a module, fused where torch can."""
    return _adamw(*split_by_decay(module), config)


def _adamw(
    decayed: list[nn.Parameter],
    others: list[nn.Parameter],
    config: RunConfig,
    kind: Any = None,
) -> Any:
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    filled = [group for group in groups if group["params"]]
    kind = kind or partial(torch.optim.AdamW, fused=True)
    return kind(filled, lr=config.learning_rate, betas=betas)


def make_optimizer(module: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the trained parameters of a module.

    Raises:
        ConfigurationError: it does not fit the module.
    """
    if config.optimizer == "muon":
        return MuonWithAdamW(module, config)
    if config.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return _adamw(*split_by_decay(module), config, AdamW8bit)
    return adamw(module, config)


# -------------------------------------------------------------------------------------------------
# Muon: the momentum of a matrix, orthogonalised (Jordan et al., 2024); scaled so that its learning
# rates are those of AdamW (Liu et al., 2502.16982), which trains everything else.


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of linear layers in repeated blocks, AdamW for the other parameters:
    embeddings, the output layer, convolutions, biases and norms.

    Raises:
        ConfigurationError: there are no such matrices.
    """

    def __init__(self, module: nn.Module, config: RunConfig) -> None:
        layers = [m for block in blocks_of(module) for m in block.modules()]
        linear = {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}
        decayed, others = split_by_decay(module)
        matrices = [weight for weight in decayed if id(weight) in linear]
        if not matrices:
            raise ConfigurationError(
                f"optimizer is muon, but {type(module).__name__} has no linear layers in repeated "
                "blocks: use --optimizer adamw"
            )
        rate, decay = config.learning_rate, config.weight_decay
        self.muon = torch.optim.Muon(
            matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = _adamw([w for w in decayed if id(w) not in linear], others, config)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {"lr": rate})
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the state of this object."""
        self.muon.param_groups = self.param_groups[:1]
        self.adamw.param_groups = self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        del closure
        self.muon.step()
        self.adamw.step()


# -------------------------------------------------------------------------------------------------
# The learning rate as a pure function of the step: nothing to save, nothing to restore.


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final_ratio: float) -> float:
    """Learning rate at a step, counted from 0.

    It rises linearly to `peak` over `warmup` steps, then falls along half a cosine to
    `final_ratio * peak` at step `total` (Loshchilov and Hutter, 1608.03983), and stays there.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_ratio + (1 - final_ratio) * cosine)


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of a run at a step, counted from 0."""
    return warmup_cosine(
        step,
        peak=config.learning_rate,
        warmup=config.lr_warmup_steps,
        total=config.max_train_steps,
        final_ratio=config.lr_final_ratio,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # of a compiled optimizer
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# -------------------------------------------------------------------------------------------------
# Clipping, and skipped steps: those with a loss or gradient that is not finite on some process.


def clip_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of at most `max_norm`.

    Returns:
        The norm over all parameters before clipping, a scalar; of the full gradient if the module
        is sharded.
    """
    return full_tensor(nn.utils.clip_grad_norm_(module.parameters(), max_norm))


def logged_norm(gradient_norm: Tensor, accepted: bool) -> Tensor:
    """The gradient norm for the log: not finite if the step was skipped, whatever the reason."""
    if accepted or not gradient_norm.isfinite():
        return gradient_norm
    return torch.full_like(gradient_norm, math.nan)


class StepGuard:
    """Accepts or refuses every optimizer step, the same on all processes; counts the refused, and
    warns if a finite loss is far above its recent level.

    Args:
        limit: refused steps in a row, of one model, at which the run ends.
        sum_over_processes: the sum of a tensor over all processes.
        rounded: whether the run computes in less than fp32, so that fp32 may be the remedy.
        share: of the steps of one model that may be refused before the run ends.
    """

    def __init__(
        self,
        limit: int,
        sum_over_processes: Callable[[Tensor], Tensor],
        rounded: bool = False,
        share: float = 1.0,
    ) -> None:
        self.limit, self.rounded, self.share = limit, rounded, share
        self.in_a_row: dict[str, int] = {}  # model -> refused steps since the last accepted one
        self.refused: dict[str, int] = {}  # model -> refused steps
        self.total = 0
        self.levels: dict[str, LossLevel] = {}  # model -> level of its loss
        self._sum = sum_over_processes
        self._warned = -QUIET_STEPS  # the step of the last warning of a spike

    def accepts(
        self,
        model: str,
        step: int,
        losses: Sequence[Tensor],
        gradient_norm: Tensor,
        followed: Sequence[Tensor] | None = None,
    ) -> bool:
        """Whether to take the step; every process must call this and gets the same result.

        Args:
            model: its name, in messages and counters.
            step: counted from 0, for messages.
            losses: the scalar losses of this process's micro-batches.
            gradient_norm: before clipping, a scalar.
            followed: the part of each loss that can be compared over the whole run; None: all.

        Raises:
            SmaltiError: too many steps of this model were refused, in a row or in all.
        """
        parts = torch.stack([loss.detach().float() for loss in losses])
        values = torch.cat([parts, gradient_norm.float().reshape(1)])
        bad = (~values.isfinite()).sum().float()
        level = torch.stack([loss.detach().float() for loss in followed or losses]).mean()
        summed = self._sum(torch.stack([bad, level, torch.ones_like(bad)])).tolist()
        accepted = summed[0] == 0
        self.levels.setdefault(model, LossLevel())  # in the order of the models in a step
        self.in_a_row[model] = 0 if accepted else self.in_a_row.get(model, 0) + 1
        self.refused[model] = self.refused.get(model, 0) + (not accepted)
        self.total += not accepted
        if accepted:
            self._follow(model, step, summed[1] / summed[2])
            return True
        if self.in_a_row[model] == 1:
            logger.warning("step %d of the %s is skipped: not finite", step, model)
        if self.in_a_row[model] >= self.limit:
            raise SmaltiError(
                f"the loss or the gradient of the {model} was not finite in {self.limit} steps in a"
                f" row, up to step {step}: {self._remedy}"
            )
        if self.refused[model] > max(FEW_STEPS, self.share * (step + 1)):
            raise SmaltiError(
                f"the loss or the gradient of the {model} was not finite in {self.refused[model]} "
                f"of {step + 1} steps, more than max_skipped_share {self.share:g}: if data are not "
                f"finite, encode them again; else {self._remedy}"
            )
        return False

    @property
    def _remedy(self) -> str:
        return (
            "repeat the command with --resume_from_checkpoint latest and a lower --learning_rate"
            f"{' or --mixed_precision no' if self.rounded else ''}; the last checkpoint is "
            "untouched"
        )

    def _follow(self, model: str, step: int, loss: float) -> None:
        """Include the mean loss of an accepted step in its level; warn if it is a spike."""
        level = self.levels[model]
        if level.is_spike(loss) and step - self._warned >= QUIET_STEPS:
            self._warned = step
            logger.warning(
                "step %d: the loss of the %s is %.4g, far above its recent mean %.4g: if it stays "
                "there, resume from an earlier checkpoint with a lower --learning_rate",
                step,
                model,
                loss,
                level.mean,
            )
        level.update(loss)

    def state(self) -> dict[str, Any]:
        """The counters and levels, for the checkpoint's state.json."""
        return {
            "in_a_row": self.in_a_row,
            "refused": self.refused,
            "total": self.total,
            "levels": {model: asdict(level) for model, level in self.levels.items()},
        }

    def restore(self, state: Mapping[str, Any], *, new_row: bool = False) -> None:
        """Continue from what `state` returned.

        Args:
            new_row: whether the counts start at 0 again, because settings were changed.
        """
        counters = dict(state.get("in_a_row", {}))
        if "critic" in counters:  # the name of the discriminator in checkpoints of smalti 0.1
            counters["discriminator"] = counters.pop("critic")
        self.in_a_row = {} if new_row else counters
        self.refused = {} if new_row else dict(state.get("refused", {}))
        self.total = int(state.get("total", 0))
        self.levels = {name: LossLevel(**part) for name, part in state.get("levels", {}).items()}


# -------------------------------------------------------------------------------------------------
# EMA: the exponential moving average of the weights


Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """theta_ema <- d theta_ema + (1 - d) theta, with d = min(decay, (1 + n) / (10 + n)), n updates.

    The warm-up of d quickly removes the random initial weights from the average. Buffers (an EMA
    codebook, counters) are copied, not averaged. `model` is the averaged module, in eval mode,
    ready to use.

    If the model is sharded after this object was created (FSDP2), so is the average: then `gather`
    updates `model` on process 0, and the other processes keep no full copy of it.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self._shards: list[Tensor] = []

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Move the average towards `model`; call once after every accepted optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, current in zip(self._averages(model), model.parameters(), strict=True):
            average.lerp_(current, 1 - decay)
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current)

    @torch.no_grad()
    def gather(self) -> None:
        """Update `model` on process 0; every process must call this."""
        for average, shard in zip(self.model.parameters(), self._shards, strict=False):
            average.copy_(full_tensor(shard))

    def _averages(self, model: Model) -> list[Tensor]:
        """The tensors that this process averages: all parameters, or its shards of them."""
        if not is_sharded(model):
            return list(self.model.parameters())
        if not self._shards:
            pairs = zip(self.model.parameters(), model.parameters(), strict=True)
            self._shards = [sharded_like(average, current).clone() for average, current in pairs]
            if torch.distributed.get_rank() > 0:
                self.model.to("meta")
        return self._shards

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged model as a flat dict; every process of a sharded run must call this."""
        self.gather()
        return {**self.model.state_dict(), UPDATES: torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; before the first update."""
        state = dict(state)
        self.updates = int(state.pop(UPDATES))
        self.model.load_state_dict(state)
