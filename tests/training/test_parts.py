"""Schedule, average, seeds, precision, interrupts and logs."""

import json
import multiprocessing
import os
import signal
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.errors import SmaltiError
from smalti.files import checked_lines
from smalti.randomness import derive_seed, generator
from smalti.training import processes as precision
from smalti.training.config import RunConfig, check_tracker
from smalti.training.logging import MetricsLog, mean_of
from smalti.training.optim import EMA, warmup_cosine
from smalti.training.signals import InterruptGuard


def rate(step: int, **changes) -> float:
    options = {"peak": 1.0, "warmup": 10, "total": 110, "final_ratio": 0.1, **changes}
    return warmup_cosine(step, **options)


def test_the_learning_rate_rises_linearly_then_falls_along_a_cosine() -> None:
    assert [rate(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(0.55)  # half way between 1 and 0.1
    assert rate(110) == rate(500) == pytest.approx(0.1)
    assert [rate(s, warmup=0, final_ratio=1.0) for s in (0, 50)] == [1.0, 1.0]


def test_the_average_is_its_recursion_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone()
    for n in range(30):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
        ema.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight
    torch.testing.assert_close(ema.model.weight, expected)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert not ema.model.training and not ema.model.weight.requires_grad


def test_the_average_survives_saving() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    ema.update(model)
    again = EMA(nn.Linear(2, 2), 0.9)
    again.load_state_dict(ema.state_dict())
    assert again.updates == 1 and torch.equal(again.model.weight, ema.model.weight)


def test_seeds_depend_on_every_part_and_fit_a_cpu_generator() -> None:
    seeds = {derive_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500 and max(seeds) < 2**32
    assert derive_seed(1, 23) != derive_seed(12, 3)
    a, b = generator("x", 1), generator("x", 1)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))


@pytest.mark.parametrize("feature", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_bf16_is_chosen_where_it_pays(feature: str, monkeypatch) -> None:
    cpu = torch.device("cpu")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    for has_it, expected in ((False, "no"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, feature, lambda has=has_it: has)
        assert precision.resolve_precision("auto", cpu) == expected
        assert precision.resolve_precision("bf16", cpu) == "bf16"
        assert precision.resolve_precision("no", cpu) == "no"


def test_the_first_signal_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with InterruptGuard() as guard:
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Numbers:
    """A data set whose batches are its keys."""

    def __getitems__(self, keys):
        return list(keys)


def test_a_signal_to_all_processes_leaves_the_loader_working() -> None:
    batches = stream_batches(Numbers(), DataOrder(8, 2, seed=0), num_workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    for _ in range(4):  # more than a worker prepares ahead
        assert len(next(batches)[0]) == 2
    assert worker.is_alive()
    batches.close()


def test_a_resumed_log_has_every_step_once(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    accelerator = Accelerator(cpu=True)
    log = MetricsLog(path, accelerator)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    path.write_text(path.read_text() + '3\n{"step": 4, "lo')  # killed while writing
    MetricsLog(path, accelerator, resume_step=2).write(3, {"loss": float("nan")})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] == "nan"


def test_every_flipped_bit_of_a_log_is_found(tmp_path, caplog) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, Accelerator(cpu=True))
    for step in (1, 2):
        log.write(step, {"loss": 0.5 / step, "psnr": float("nan")})
    written, lines = path.read_bytes(), [{"step": 1, "loss": 0.5, "psnr": "nan"}]
    lines.append({"step": 2, "loss": 0.25, "psnr": "nan"})
    assert checked_lines(path) == (lines, [])
    for bit in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found, damaged = checked_lines(path)
        assert damaged and all(line in lines for line in found)
    for cut in range(len(written)):  # a killed run leaves this
        path.write_bytes(written[:cut])
        assert checked_lines(path)[1] == []
    path.write_bytes(written.replace(b"0.5", b"0.4"))
    MetricsLog(path, Accelerator(cpu=True), resume_step=2)
    assert f"line 1 of {path} is damaged: it is left out" in caplog.text
    assert checked_lines(path) == (lines[1:], [])


def test_the_lines_of_smalti_0_1_0_have_no_checksum(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert checked_lines(path) == ([{"step": 1, "loss": 0.5}], [])


def test_a_log_is_rewritten_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        MetricsLog(path, Accelerator(cpu=True), resume_step=1)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def full_disk(*args, **kwargs) -> None:
    raise OSError(28, "No space left on device")


def test_means_over_micro_batches() -> None:
    parts = [{"a": torch.tensor(1.0)}, {"a": torch.tensor(3.0)}]
    assert mean_of(parts) == {"a": torch.tensor(2.0)}


def test_trackers_are_checked_before_training() -> None:
    check_tracker("none")
    with pytest.raises(SmaltiError, match="choose none, tensorboard"):
        check_tracker("tensorbord")
    with pytest.raises(SmaltiError, match=r"not installed|pip install|choose"):
        check_tracker("a_tracker_that_does_not_exist")


def test_a_folder_named_like_a_tracker_is_no_tracker(tmp_path, monkeypatch) -> None:
    (tmp_path / "trackio").mkdir()  # python -m puts the working directory on the path
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SmaltiError, match="not installed"):
        check_tracker("trackio")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"adam_beta1": 2.0}, "adam_beta1 is 2.0"),
        ({"adam_beta2": -0.1}, "adam_beta2 is -0.1"),
        ({"seed": 10**20}, "seed is 100000000000000000000"),
        ({"seed": -1}, "seed is -1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"lr_warmup_steps": -5}, "lr_warmup_steps is -5"),
        ({"lr_final_ratio": -1.0}, "lr_final_ratio is -1.0"),
        ({"checkpoints_total_limit": -1}, "checkpoints_total_limit is -1"),
        ({"report_to": "nowhere"}, "report_to"),
    ],
)
def test_impossible_runs_are_refused(options, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        RunConfig(**options)
