"""Checkpoints are whole or absent; damage is named; nothing in them can run."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from smalti.errors import SmaltiError
from smalti.training import checkpoint as module
from smalti.training.checkpoint import (
    OptimizerState,
    checkpoints,
    collect,
    newest_valid,
    save_checkpoint,
    verify,
)


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, step: int, keep: int = 0) -> Path:
    model, optimizer = trained(step)
    objects = {"model": model, "optimizer": OptimizerState(optimizer)}
    return save_checkpoint(folder, step, collect(objects, keep=True), {"note": "x"}, keep=keep)


def test_round_trip_is_exact_and_training_goes_on_alike(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    model, optimizer = trained(0)
    found = verify(path)
    assert found.step == 3 and found.state["note"] == "x"
    found.restore({"model": model, "optimizer": OptimizerState(optimizer)})
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    expected, _ = trained(4)
    assert torch.equal(model.weight, expected.weight)


def test_files_are_safetensors_and_json_only(tmp_path: Path) -> None:
    names = sorted(p.name for p in save(tmp_path, 1).iterdir())
    assert names == ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000002", "checkpoint-000010"]


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    for step in (4, 6):
        damage_flip(save(tmp_path, step))
    save(tmp_path, 3, keep=2)
    assert verify(tmp_path / "checkpoint-000003").step == 3


def test_what_a_checkpoint_replaces_goes_after_it_is_written(tmp_path: Path) -> None:
    good, *damaged = [save(tmp_path, step) for step in (2, 4, 6)]
    model, _ = trained(1)
    save_checkpoint(tmp_path, 3, {"model": model.state_dict()}, {}, keep=0, replaces=damaged)
    assert checkpoints(tmp_path) == [good, tmp_path / "checkpoint-000003"]
    assert newest_valid(tmp_path)[1] == []


def damage_flip(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(bytes(content))


DAMAGE = {
    "flipped bit": (damage_flip, "model.safetensors is damaged"),
    "cut": (lambda p: (p / "optimizer.safetensors").write_bytes(b"x"), "optimizer.safetensors is"),
    "missing": (lambda p: (p / "model.safetensors").unlink(), "lacks model.safetensors"),
    "surplus": (lambda p: (p / "virus.pkl").write_bytes(b"x"), "holds virus.pkl"),
    "unfinished": (lambda p: (p / "MANIFEST.json").unlink(), "never finished"),
    "scribbled": (lambda p: (p / "MANIFEST.json").write_text("{"), "not valid JSON"),
    "garbage": (lambda p: (p / "MANIFEST.json").write_bytes(b"\xff\xfe\x80"), "not valid JSON"),
    "folder": (lambda p: (p / "nested").mkdir(), "cannot be read"),
    "list": (lambda p: (p / "MANIFEST.json").write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    harm, message = DAMAGE[kind]
    harm(path)
    with pytest.raises(SmaltiError, match=message):
        verify(path)
    found, skipped = newest_valid(tmp_path)
    assert found is not None and found.step == 1
    assert len(skipped) == 1 and message in skipped[0]


@pytest.mark.parametrize("point", ["save_file", "write_json", "flush"])
def test_a_failure_while_writing_leaves_the_old_ones(tmp_path: Path, monkeypatch, point) -> None:
    save(tmp_path, 1, keep=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, point, full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert verify(tmp_path / "checkpoint-000001").step == 1


def test_leftovers_of_a_killed_run_are_ignored_and_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".tmp-checkpoint-000005-abcd").mkdir()
    assert newest_valid(tmp_path) == (None, [])
    save(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_a_checkpoint_of_something_else_does_not_load(tmp_path: Path) -> None:
    found = verify(save(tmp_path, 1))
    with pytest.raises(SmaltiError, match="does not fit this run"):
        found.restore({"model": nn.Linear(4, 4)})
    with pytest.raises(SmaltiError, match=r"has no ema\.safetensors"):
        found.restore({"ema": nn.Linear(3, 2)})


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_with_a_matching_manifest_is_still_not_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["model.safetensors"] = module._describe(path / "model.safetensors")
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(SmaltiError, match="does not fit"):
        verify(path).restore({"model": nn.Linear(3, 2)})
    assert not Path("exploded").exists()
