"""How long a checkpoint delays training, compared with writing the same bytes to the same disk.

    python benchmarks/checkpoint_stall.py --parameters 100e6

Prints the median of a ratio of seconds: `save_checkpoint` of a model, its EMA and AdamW's two
moments (written, hashed, flushed to disk, renamed), over one plain file of as many bytes, written
and flushed. The two alternate, so that a busy disk slows both equally.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from smalti.training.checkpoint import OptimizerState, Stateful, collect, save_checkpoint
from smalti.training.optim import EMA

WIDTH = 1024


def trained_model(parameters: float) -> dict[str, Stateful]:
    """The objects that a run tracks, after one step."""
    depth = max(1, round(parameters / WIDTH**2))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "ema": EMA(model, 0.999), "optimizer": OptimizerState(optimizer)}


def seconds_to_save(folder: Path, objects: dict[str, Stateful], step: int) -> float:
    """Seconds for which the training loop waits for a checkpoint."""
    start = time.perf_counter()
    save_checkpoint(folder, step, collect(objects, keep=True), {"kind": "benchmark"}, keep=1)
    return time.perf_counter() - start


def seconds_to_write(path: Path, objects: dict[str, Stateful]) -> float:
    """Seconds to write the same tensors as the bytes of one file."""
    tensors = [t for state in collect(objects, keep=True).values() for t in state.values()]
    start = time.perf_counter()
    with path.open("wb") as stream:
        for tensor in tensors:
            stream.write(memoryview(tensor.view(-1).numpy()).cast("B"))
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=100e6, help="of the model")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    args = parser.parse_args()
    objects = trained_model(args.parameters)
    size = sum(t.nbytes for s in collect(objects, keep=True).values() for t in s.values())
    saves, writes = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        for step in range(args.rounds):
            writes.append(seconds_to_write(folder / "plain", objects))
            saves.append(seconds_to_save(folder / "run", objects, step))
    ratio = statistics.median(save / write for save, write in zip(saves, writes, strict=True))
    print(f"{size / 1e6:,.0f} MB: checkpoint {statistics.median(saves):.2f} s, ", end="")
    print(f"plain file {statistics.median(writes):.2f} s, stall / write = {ratio:.2f}")


if __name__ == "__main__":
    main()
