"""Many processes do what one does: gradients, samples, sharded models, launch configs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from first_gradients import PRIORS, TOKENIZERS, gradients_of, make_inputs
from jobs import forked, program
from runs import assert_same, losses, weights
from safetensors.torch import load_file
from toy_run import Toy, toy_config, train

from smalti.data.order import DataOrder
from smalti.errors import SmaltiError
from smalti.training import processes

TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "scripts" / "configs" / "accelerate"


def on_two(name: str, *arguments: str) -> None:
    """A script of tests/ on two processes (gloo)."""
    done = forked(program(TESTS / name, *arguments), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Inputs, and the first gradients of all stages on this process."""
    from PIL import Image

    root = tmp_path_factory.mktemp("gradients")
    numbers = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (root / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            pixels = torch.randint(256, (16, 16, 3), generator=numbers, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "pictures" / name / f"{number}.png")
            (root / "pictures" / name / f"{number}.txt").write_text(f"{name} {number}")
    make_inputs(root)
    (root / "one").mkdir()
    gradients_of(root, root / "one")
    return root


def assert_gradients_agree(one: Path, two: Path, files: set[str]) -> None:
    """Within 1e-5 of the length of the whole gradient."""
    for name in files:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        length = torch.cat([g.flatten() for g in a.values()]).norm()
        difference = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
        assert length > 0 and difference <= 1e-5 * length, (name, difference / length)


@pytest.mark.slow
def test_two_processes_sum_the_gradients_of_one(one_process: Path) -> None:
    """Both stages, with discriminator and adaptive weight, in two micro-batches."""
    (one_process / "two").mkdir()
    on_two("first_gradients.py", str(one_process), str(one_process / "two"))
    files = {f"prior-{name}-0.safetensors" for name in PRIORS}
    for name in TOKENIZERS:
        files |= {f"tokenizer-{name}-{optimizer}.safetensors" for optimizer in (0, 1)}
    assert files == {p.name for p in (one_process / "one").glob("*.safetensors")}
    assert_gradients_agree(one_process / "one", one_process / "two", files)


@pytest.mark.slow
def test_sharded_priors_have_the_gradients_of_one_process(one_process: Path) -> None:
    """FSDP2 through Accelerate, each kind of prior and of condition: trained, validated, sampled
    from, saved."""
    (one_process / "sharded").mkdir()
    on_two("first_gradients.py", str(one_process), str(one_process / "sharded"), "sharded")
    files = {f"prior-{name}-0.safetensors" for name in PRIORS}
    assert_gradients_agree(one_process / "one", one_process / "sharded", files)
    for name in PRIORS:
        assert (one_process / "sharded" / "run" / name / "pipeline" / "samples.png").is_file()


@pytest.mark.slow
def test_a_sharded_run_writes_and_reads_the_checkpoints_of_any_run(tmp_path: Path) -> None:
    """Weights, averages and optimizer have one format; resume is bit-exact; worlds may change."""
    whole, cut, mixed = tmp_path / "whole", tmp_path / "cut", tmp_path / "mixed"
    job = {"processes": 2, "sharded": True, "dropout": 0.0}
    on_two("toy_run.py", json.dumps({**job, "folder": str(whole)}))
    train(toy_config(tmp_path / "one"), dropout=0.0)
    assert_close(tmp_path / "one", whole)

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-000006")
    resumed = {"resume_from_checkpoint": "latest"}
    on_two("toy_run.py", json.dumps({**job, "folder": str(cut), "changes": resumed}))
    assert_same(whole, cut)

    train(toy_config(mixed, max_train_steps=4, lr_final_ratio=1.0), dropout=0.0)
    on_two("toy_run.py", json.dumps({**job, "folder": str(mixed), "changes": resumed}))
    assert_close(tmp_path / "one", mixed)
    shutil.rmtree(mixed / "checkpoint-000006")
    train(toy_config(mixed, **resumed), dropout=0.0)
    assert_close(tmp_path / "one", mixed)


def assert_close(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].shape == second[name].shape and first[name].dtype == second[name].dtype
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6, msg=name)
    for mine, theirs in zip(losses(a), losses(b), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    model = load_file(b / "model" / "model.safetensors")
    torch.testing.assert_close(model, load_file(a / "model" / "model.safetensors"))


def test_every_sample_is_seen_once_an_epoch_by_one_process() -> None:
    order = DataOrder(24, 8, seed=3)
    for world in (1, 2, 4, 8):
        for epoch in range(2):
            steps = range(3 * epoch, 3 * epoch + 3)
            keys = [k for s in steps for r in range(world) for k in order.shard(s, r, world)]
            assert sorted(keys) == [(epoch, index) for index in range(24)]
            assert keys == [key for step in steps for key in order.keys(step)]


# -- what launches processes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "processes", "machines"),
    [("one_gpu", 1, 1), ("eight_gpus", 8, 1), ("two_nodes", 16, 2), ("fsdp2_prior", 8, 1)],
)
def test_the_launch_configs_are_read_by_accelerate(name, processes: int, machines: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted(
        ["one_gpu", "eight_gpus", "two_nodes", "fsdp2_prior"]
    )


def test_the_fsdp_config_makes_a_plugin_of_version_2(monkeypatch) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = CONFIGS / "fsdp2_prior.yaml"
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(yaml.safe_load(file.read_text())["fsdp_config"]) <= set(known)
    args = launch_command_parser().parse_args([f"--config_file={file}", "script.py"])
    args, _, _ = _validate_launch_command(args)  # what `accelerate launch` does first
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap is None


def test_blocks_are_the_units_of_sharding() -> None:
    assert processes.repeated_blocks(Toy(0.0)) == ["Sequential"]  # and no single Linear


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_what_a_run_does_not_support_is_refused(tmp_path: Path, monkeypatch, kind: str) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    monkeypatch.setattr(Accelerator, "is_fsdp2", False)
    with pytest.raises(SmaltiError, match="not supported"):
        train(toy_config(tmp_path / "run"))


def test_a_compiled_run_is_named_and_saved_as_any_other(tmp_path: Path, monkeypatch) -> None:
    train(toy_config(tmp_path / "plain"))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    seen = []
    original = processes.shard

    def shard(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(processes, "shard", shard)
    train(toy_config(tmp_path / "compiled"))
    assert hasattr(seen[0], "_orig_mod")
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
    assert not [name for name in weights(tmp_path / "compiled") if "_orig_mod" in name]
    assert_same(tmp_path / "plain", tmp_path / "compiled")
