"""Requests to stop: which signal counts, what is abandoned, and what a resumed run makes up for."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import assert_same, losses
from toy_run import Numbers, toy_config, train

from smalti.cli import run_command
from smalti.signals import ending_the_command
from smalti.training import run as module
from smalti.training.checkpoint import newest_valid, save_checkpoint
from smalti.training.signals import Abandoned, InterruptGuard

TOY = Path(__file__).parents[1] / "toy_run.py"


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_closed_terminal_asks_once_however_often_it_signals() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with InterruptGuard() as guard:
        for _ in range(3):
            send(signal.SIGHUP)
        assert guard.requested
        send(signal.SIGTERM)  # torchrun sends it, too; the second of these stops at once
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptGuard() as guard, ending_the_command():
            send(signal.SIGHUP)
            assert not guard.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("by", ["signal", "thread"])
def test_work_that_may_be_abandoned_ends_at_once(by: str) -> None:
    with InterruptGuard() as guard:
        started = time.monotonic()
        with pytest.raises(Abandoned), guard.abandonable():
            if by == "signal":
                send(signal.SIGTERM)
            else:  # the launcher has ended
                threading.Timer(0.1, guard.request).start()
            while time.monotonic() < started + 20:
                time.sleep(0.01)
        assert guard.requested and time.monotonic() < started + 5
        with pytest.raises(Abandoned), guard.abandonable():  # and does not begin any more
            raise AssertionError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_command_as_an_interruption(number: int, capsys) -> None:
    """generate, encode, reflow, evaluate: what is not a training run ends at once."""
    before = signal.getsignal(signal.SIGTERM)
    # A shell lets what it starts in the background ignore SIGINT: as in the foreground here.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)

    def command(argv) -> None:
        send(number)
        time.sleep(20)

    started = time.monotonic()
    assert run_command(command, []) == 130
    assert time.monotonic() < started + 5
    assert capsys.readouterr().err == "error: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.parametrize("at", [2, 6])  # in the middle of the run, and after its last step
def test_a_validation_is_abandoned_and_made_up_for(tmp_path: Path, at: int) -> None:
    config = toy_config(tmp_path / "cut", resume_from_checkpoint="latest")
    calls = []

    def endless(validate, progress):
        calls.append(1)
        if len(calls) == at // 2:
            send(signal.SIGTERM)
            time.sleep(20)
        return validate(progress)

    started = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        train(config, values=endless)
    assert stop.value.code == 130 and time.monotonic() < started + 10
    found, _ = newest_valid(config.output_dir)
    assert found is not None and found.step == at and found.state["unmeasured"]
    assert "val_norm" not in losses(config.output_dir)[-1]
    train(config)
    train(toy_config(tmp_path / "whole"))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_what_is_made_up_for_can_be_abandoned_again(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", resume_from_checkpoint="latest")

    def endless(validate, progress):
        send(signal.SIGINT)
        time.sleep(20)

    for _ in range(2):
        with pytest.raises(SystemExit):
            train(config, values=endless)
    found, _ = newest_valid(config.output_dir)
    assert found is not None and found.step == 2 and found.state["unmeasured"]


def stuck_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Ask the run to stop while it waits for its batch of that number, counted from 0."""
    original, calls = Numbers.__getitems__, []

    def stuck(self, keys):
        calls.append(keys)
        if len(calls) == number + 1:
            send(signal.SIGTERM)
            time.sleep(20)
        return original(self, keys)

    patch.setattr(Numbers, "__getitems__", stuck)


@pytest.mark.parametrize("at", [0, 3])  # before anything was done, and later
def test_a_run_that_waits_for_data_is_saved_at_once(tmp_path: Path, monkeypatch, at: int) -> None:
    rarely = {"checkpointing_steps": 100, "validation_steps": 100}
    config = toy_config(tmp_path / "cut", resume_from_checkpoint="latest", **rarely)
    stuck_at(at, monkeypatch)
    started = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        train(config)
    assert stop.value.code == 130 and time.monotonic() < started + 10
    found, _ = newest_valid(config.output_dir)
    assert (found.step if found else 0) == at
    train(config)
    train(toy_config(tmp_path / "whole", **rarely))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_that_was_just_written_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    """Replacing it would remove it first: a kill in between would lose it."""
    saved = []

    def note(folder, step, *args, **options):
        saved.append(step)
        return save_checkpoint(folder, step, *args, **options)

    monkeypatch.setattr(module, "save_checkpoint", note)
    stuck_at(4, monkeypatch)
    with pytest.raises(SystemExit):
        train(toy_config(tmp_path / "run"))
    assert saved == [2, 4]


def test_a_run_that_is_stopped_before_a_step_says_how_it_goes_on(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """ "latest" would be another checkpoint than the one that it was told to go back to."""
    train(toy_config(tmp_path / "run", checkpoints_total_limit=0))
    capsys.readouterr()
    stuck_at(0, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        train(toy_config(tmp_path / "run", resume_from_checkpoint="checkpoint-000002"))
    assert stop.value.code == 130
    shown = capsys.readouterr().out
    assert "Repeat the same command" in shown and "latest" not in shown
    assert newest_valid(tmp_path / "run")[0].step == 6  # nothing was replaced


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_is_saved(tmp_path: Path) -> None:
    """SIGHUP, after which printing to the terminal fails."""
    folder = tmp_path / "run"
    changes = {"max_train_steps": 10_000, "checkpointing_steps": 10_000}
    job = {"folder": str(folder), "changes": changes, "fault": "dawdle"}
    main, own = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SESSION, str(TOY), json.dumps(job)],
        stdin=own,
        stdout=own,
        stderr=own,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )
    os.close(own)
    threading.Thread(target=read_all, args=(main,), daemon=True).start()
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGHUP)  # the kernel's, and the shell's
    os.close(main)
    assert process.wait(60) == 130
    assert newest_valid(folder)[0] is not None


SESSION = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal controls this session, and hangs it up
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def read_all(terminal: int) -> None:
    while True:
        try:
            if not os.read(terminal, 4096):
                return
        except OSError:
            return
