"""Settings of `accelerate launch` and torchrun: obeyed, or refused with a command that works."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from runs import assert_same
from toy_run import toy_config, train

from smalti.errors import ConfigurationError, SmaltiError
from smalti.training import launch, processes
from smalti.training.launch import LaunchSettings, obeying, precision_of

TOY = Path(__file__).parents[1] / "toy_run.py"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SECONDS = 240


def of(*arguments: str) -> LaunchSettings:
    settings = LaunchSettings.of_command([*arguments, "-m", "package.script", "--seed", "3"])
    assert settings is not None
    return settings


def test_the_command_line_of_the_launcher_says_what_was_chosen() -> None:
    chosen = of("--mixed_precision", "fp16", "--gradient_accumulation_steps=4", "--cpu")
    assert chosen == LaunchSettings("fp16", 4, 1, "-m package.script")
    assert of("--cpu", "--num_processes", "2") == LaunchSettings(None, None, 2, "-m package.script")
    two = of("--num_machines=2", "--num_processes=16", "--mixed_precision=no")
    assert (two.num_processes, two.mixed_precision) == (8, "no")


def test_the_config_file_of_the_launcher_is_read(tmp_path: Path) -> None:
    config = tmp_path / "launch.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: fp16\n"
        "num_machines: 1\nnum_processes: 3\n"
    )
    settings = of("--config_file", str(config))
    assert (settings.mixed_precision, settings.num_processes) == ("fp16", 3)
    assert of("--config_file", str(config), "--mixed_precision=bf16").mixed_precision == "bf16"
    shipped = TOY.parents[1] / "scripts" / "configs" / "accelerate" / "one_gpu.yaml"
    assert of("--config_file", str(shipped)).mixed_precision is None  # "auto" holds


def test_processes_with_shares_of_hours_wait_for_one_another(tmp_path: Path, monkeypatch) -> None:
    """The main process of an evaluation trains a classifier alone, longer than torch waits."""
    join, waits = processes.join_job, list[float | None]()

    def watched(timeout: float | None = None) -> PartialState:
        waits.append(timeout)
        return join(timeout)

    monkeypatch.setattr(processes, "join_job", watched)
    with processes.job_in(tmp_path / "out"):
        assert waits[0] is not None and waits[0] >= 24 * 3600


def test_without_a_command_line_the_variables_say_it() -> None:
    names = {
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
    }
    assert LaunchSettings.of_environment(names) == LaunchSettings("fp8", 2)
    # Accelerate also passes "no" if nothing was chosen.
    assert LaunchSettings.of_environment({"ACCELERATE_MIXED_PRECISION": "no"}) == LaunchSettings()
    assert LaunchSettings.of_environment({}) == LaunchSettings()


@pytest.mark.parametrize(
    ("own", "asked", "found"),
    [
        ("auto", None, "auto"),
        ("bf16", None, "bf16"),
        ("auto", "bf16", "bf16"),
        ("auto", "no", "no"),
        ("no", "no", "no"),
        ("no", "bf16", "leave out one of the two"),
        ("bf16", "no", "leave out one of the two"),
        ("auto", "fp16", r"accelerate launch --mixed_precision bf16"),
        ("bf16", "fp8", r"sets mixed_precision fp8"),
    ],
)
def test_a_precision_is_obeyed_or_refused(own: str, asked: str | None, found: str) -> None:
    if found in ("auto", "no", "bf16"):
        assert precision_of(own, LaunchSettings(asked)) == found
        return
    with pytest.raises(ConfigurationError, match=found):
        precision_of(own, LaunchSettings(asked))


def test_accumulation_is_obeyed_or_refused(tmp_path: Path) -> None:
    four = LaunchSettings(gradient_accumulation_steps=4)
    assert obeying(toy_config(tmp_path), four).gradient_accumulation_steps == 4
    with pytest.raises(ConfigurationError, match="is 2, and the launcher sets 4: leave out one"):
        obeying(toy_config(tmp_path, gradient_accumulation_steps=2), four)


def test_a_run_obeys_the_variables_of_a_launch(tmp_path: Path, monkeypatch) -> None:
    """Accumulation as if the command had asked for it: Accelerate does not divide again."""
    train(toy_config(tmp_path / "one", gradient_accumulation_steps=4))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = train(toy_config(tmp_path / "two", mixed_precision="auto"))
    assert run.precision == "bf16" and run.config.gradient_accumulation_steps == 4
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    train(toy_config(tmp_path / "three"))
    assert_same(tmp_path / "one", tmp_path / "three")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SmaltiError, match="sets mixed_precision fp8"):
        train(toy_config(tmp_path / "four"))
    assert not (tmp_path / "four").exists()


def test_processes_that_did_not_meet_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="WORLD_SIZE is 2, but this process has joined no"):
        launch.refuse_fewer_processes(1, LaunchSettings())
    launch.refuse_fewer_processes(2, LaunchSettings())
    monkeypatch.delenv("WORLD_SIZE")
    launch.refuse_fewer_processes(1, LaunchSettings(num_processes=1))


def launched(command: list[str], folder: Path, **job) -> subprocess.CompletedProcess:
    """A toy run on a machine that shows no GPUs, without settings of its own for CPUs."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    changes = {"max_train_steps": 2, "mixed_precision": "auto"}
    text = json.dumps({"folder": str(folder), "changes": changes, **job})
    return subprocess.run(
        [*command, str(TOY), text],
        env={**own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.slow
def test_accelerate_launch_is_obeyed_or_refused_in_one_line(tmp_path: Path) -> None:
    done = launched([*ACCELERATE, "--cpu", "--mixed_precision", "fp16"], tmp_path / "run")
    assert "error: the launcher sets mixed_precision fp16" in done.stderr
    assert "smalti/training" not in done.stderr and not (tmp_path / "run").exists()
    asked = ("--cpu", "--mixed_precision", "bf16", "--gradient_accumulation_steps", "2")
    done = launched([*ACCELERATE, *asked], tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "run" / "checkpoint-000002" / "state.json").read_text())
    assert state["precision"] == "bf16" and state["config"]["gradient_accumulation_steps"] == 2


@pytest.mark.slow
def test_two_processes_on_cpus_train_together_by_the_command_that_is_named(tmp_path: Path) -> None:
    done = launched([*ACCELERATE, "--cpu", "--num_processes", "2"], tmp_path / "run")
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    named = re.search(r"ACCELERATE_USE_CPU=1 torchrun (--nproc_per_node 2 \S+)", done.stderr)
    assert named, done.stderr[-2000:]
    *options, script = shlex.split(named[1])
    assert script == str(TOY)
    followed = [sys.executable, "-m", "torch.distributed.run", *options]
    done = launched(["env", "ACCELERATE_USE_CPU=1", *followed], tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_torchrun_without_gpus_trains_on_cpus(tmp_path: Path) -> None:
    done = launched(TORCHRUN, tmp_path / "run", processes=2)  # which asserts that there are two
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("no GPU was found: 2 processes on CPUs") == 1
