"""What tests ask of training runs: their state, their losses, and an end at any step."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.errors import SmaltiError
from smalti.files import checked_lines
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
    """The lines of the log, none of which is damaged."""
    lines, damaged = checked_lines(folder / "metrics.jsonl")
    assert damaged == []
    return lines


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


def in_a_fork(work: Callable[[], None]) -> int:
    """The status of a forked child that does some work: -signal, or what it returned with."""
    child = os.fork()
    if child == 0:
        status = 0
        try:
            torch.set_num_threads(1)
            work()
        except BaseException as error:
            traceback.print_exc()
            status = 2 if isinstance(error, SmaltiError) else 98
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def small_demo(patch: pytest.MonkeyPatch) -> None:
    """Let `smalti demo` train the smallest priors on batches of 8, and measure 16 samples."""
    from smalti.prior.flow.config import PRESETS as FLOWS
    from smalti.prior.next_scale.config import PRESETS as SCALED
    from smalti.prior.next_token.config import PRESETS as TOKENS
    from smalti.scripts.demo import SCALES

    size = {"depth": 1, "width": 32, "num_heads": 2}
    flow = FLOWS["flow-nano"]
    patch.setitem(FLOWS, "flow-nano", replace(flow, network=replace(flow.network, **size)))
    patch.setitem(SCALED, "var-nano", replace(SCALED["var-nano"], **size))
    patch.setitem(TOKENS, "gpt-nano", replace(TOKENS["gpt-nano"], **size))
    for name, scale in SCALES.items():
        small = replace(
            scale,
            tokenizer=replace(scale.tokenizer, train_batch_size=8),
            prior=replace(scale.prior, train_batch_size=8, prior=TOKENS["gpt-nano"]),
            num_samples=16,
            classifier_epochs=1,
        )
        patch.setitem(SCALES, name, small)


def kill_self(*args, **options) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "ctypes.dlsym"}


def kill_at(number: int, root: Path, by: signal.Signals = signal.SIGKILL) -> None:
    """Send this process a signal just before its file operation of that number below `root`;
    exchanging two folders, which Python calls through ctypes, counts too."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            below = isinstance(args[0], str | bytes) and os.fsdecode(args[0]).startswith(str(root))
            counted = below and args[2] & WRITES
        else:
            counted = event in OPERATIONS
        count += bool(counted)
        if count == number:
            count += 1
            os.kill(os.getpid(), by)

    sys.addaudithook(hook)
