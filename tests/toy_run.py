"""A run of a toy model, fast enough to be killed often: here, or in children with a planted fault.

python toy_run.py '{"folder": "runs/toy", "changes": {"seed": 1}, "fault": "die", "at": 3}'
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from smalti.cli import run_command
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder, Key
from smalti.training import processes
from smalti.training.checkpoint import OptimizerState
from smalti.training.config import RunConfig
from smalti.training.optim import EMA, adamw, clip_gradients, learning_rate, set_learning_rate
from smalti.training.run import Run, seed_everything

SAMPLES, BATCH = 24, 8


class Numbers:
    """Rows (B, 4) that depend on (epoch, index) alone, as images and their flips do."""

    def __getitems__(self, keys: list[Key]) -> tuple[list[Key], Tensor]:
        rows = [
            torch.randn(4, generator=torch.Generator().manual_seed(97 * epoch + index))
            for epoch, index in keys
        ]
        return keys, torch.stack(rows)


class Toy(nn.Module):
    """Learns to return its input; counts its steps in a buffer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 4)])
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.dropout(rows)
        for layer in self.layers:
            hidden = layer(hidden)
        return (hidden - rows).square().mean()


Hook = Callable[[Run, Toy, int, Tensor], Tensor]  # (run, model, step, loss) -> loss


def toy_config(folder: Path, **changes) -> RunConfig:
    base = RunConfig(
        folder,
        mixed_precision="no",
        max_train_steps=6,
        train_batch_size=BATCH,
        learning_rate=1e-2,
        checkpointing_steps=2,
        validation_steps=2,
        logging_steps=1,
    )
    return replace(base, **changes)


def no_fault(run: Run, model: Toy, step: int, loss: Tensor) -> Tensor:
    return loss


def train(
    config: RunConfig, hook: Hook = no_fault, *, data="data", dropout=0.3, values=None
) -> Run:
    """Train, as the scripts do; `hook` sees every loss, and may put a fault there, and so may
    `values(validate, progress)` in validation."""
    torch.set_num_threads(1)
    run = Run(config, kind="toy", result=config.output_dir / "model")
    torch.manual_seed(config.seed)
    model = Toy(dropout)
    optimizer = adamw(model, config)
    ema = EMA(model, config.ema_decay)
    run.track(model=model, ema=ema, optimizer=OptimizerState(optimizer))
    wrapped = processes.shard(run.accelerator, model, optimizer)
    run.resume(data)
    order = DataOrder(SAMPLES, config.train_batch_size, config.seed)
    batches = run.reading(stream_batches(Numbers(), order, **run.share_of_data()))

    def validate(progress) -> dict[str, float]:
        return {"val_norm": ema.model.layers[1].weight.norm().item()}

    def measure(step: int) -> None:
        ema.gather()
        run.measure(step, validate if values is None else partial(values, validate))

    with run.interruptible():
        run.catch_up(measure)
        for step in run.remaining_steps():
            seed_everything(config.seed, step, run.rank)
            with run.timed():
                loss = toy_step(run, model, wrapped, optimizer, ema, next(batches), step, hook)
            if run.due(step, config.logging_steps):
                run.log(step, {"loss": loss, "learning_rate": learning_rate(config, step)})
            if run.due(step, config.validation_steps):
                measure(step)
            run.checkpoint(step)
    ema.gather()
    run.export(lambda folder: save(folder, ema.model))
    return run


def toy_step(run, model, wrapped, optimizer, ema, parts, step, hook) -> Tensor:
    """One optimizer step; returns its mean loss. The samples of each rank are noted in a file."""
    wrapped.train()
    losses = []
    for index, (keys, rows) in enumerate(parts):
        with run.micro_batch(index, wrapped):
            loss = hook(run, model, step, wrapped(rows))
            run.backward(loss)
        losses.append(loss.detach())
        with (run.folder / f".keys-{run.rank}").open("a") as stream:
            stream.write(json.dumps([step, keys]) + "\n")
    norm = clip_gradients(model, run.config.max_grad_norm)
    if run.guard.accepts("model", step, losses, norm):
        set_learning_rate(optimizer, learning_rate(run.config, step))
        optimizer.step()
        model.steps += 1
        ema.update(model)
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean()


def save(folder: Path, model: nn.Module) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")


# -- faults -----------------------------------------------------------------------------------


def on(rank: int, at: int, fault: Hook) -> Hook:
    """`fault` on one process at one step."""

    def hook(run, model, step, loss):
        here = run.rank == rank and step == at
        return fault(run, model, step, loss) if here else loss

    return hook


def infinite_loss(run, model, step, loss):
    return loss + torch.tensor(float("inf"))  # its gradient is finite


def perturb(run, model, step, loss):
    model.layers[1].weight.data[0, 0] += 1e-3
    return loss


def die(run, model, step, loss):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(run, model, step, loss):
    time.sleep(10_000)


def dawdle(run, model, step, loss):
    """Say that the run is under way, then take time for every step."""
    (run.folder / f".alive-{run.rank}").write_text(str(os.getpid()))
    time.sleep(0.1)
    return loss


def fault_named(name: str, at: int) -> Hook:
    one = {"infinite": infinite_loss, "perturb": perturb, "die": die, "hang": hang}
    return {"": no_fault, "dawdle": dawdle}.get(name) or on(1, at, one[name])


def shard_on_cpu() -> None:
    """Shard as Accelerate's FSDP2 does on GPUs: it has no setting that would on a CPU."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    original = processes.start_accelerator

    def start(*args):
        accelerator = original(*args)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        return accelerator

    processes.start_accelerator = start


def main(argv) -> int:
    job = json.loads(argv[0])
    if job.get("sharded"):
        shard_on_cpu()
    config = toy_config(Path(job["folder"]), **job.get("changes", {}))
    hook = fault_named(job.get("fault", ""), job.get("at", 0))
    run = train(config, hook, dropout=job.get("dropout", 0.3))
    assert run.world_size == job.get("processes", 1)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda _: main(sys.argv[1:])))
