"""What tests ask of training runs: their state, their losses, and an end at any step."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.training.optim import StepGuard


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file of the last checkpoint."""
    last = sorted(folder.glob("checkpoint-*"))[-1]
    return {
        f"{file.name}/{name}": value
        for file in sorted(last.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(a: Path, b: Path) -> None:
    """Bitwise equal state and logged losses."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []
    assert losses(a) == losses(b)


def stop_after(config, step: int, train) -> None:
    """Run until a SIGINT arrives during a step, as if the user pressed Ctrl-C."""
    original = StepGuard.accepts
    sent = []

    def accepts(self, model, at, *values) -> bool:
        if at == step - 1 and not sent:
            sent.append(at)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, at, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGuard, "accepts", accepts)
        with pytest.raises(SystemExit) as stop:
            train(config)
    assert stop.value.code == 130
    assert (config.output_dir / f"checkpoint-{step:06d}").is_dir()
