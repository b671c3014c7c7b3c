"""A run in a folder starts, resumes or refuses; it never overwrites what is not its own."""

import gc
import json
import os
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from smalti.errors import BusyError, SmaltiError
from smalti.training import processes as precision
from smalti.training.checkpoint import checkpoints, save_checkpoint, verify
from smalti.training.config import RunConfig
from smalti.training.folder import METRICS, RECIPE, refuse_other_settings
from smalti.training.run import Run


@dataclass(frozen=True)
class OtherConfig(RunConfig):
    """A second command's."""

    width: int = 1


def config_in(folder: Path, **changes) -> RunConfig:
    base = RunConfig(folder, mixed_precision="no", max_train_steps=4, logging_steps=1)
    return replace(base, **changes)


def train(config: RunConfig, until: int = 10**6, data: str = "data", **options) -> Run:
    """A run of one weight that counts its steps; one that dies in step `until`."""
    result = options.pop("result", config.output_dir / "model")
    run = Run(config, kind="test", result=result)
    weight = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(weight.weight)
    run.track(model=weight)
    run.resume(data)
    with run.interruptible():
        for step in run.remaining_steps():
            if step == until:
                raise ZeroDivisionError
            with torch.no_grad():
                weight.weight += 1
            run.log(step, {"count": weight.weight.item()})
            if run.due(step, config.checkpointing_steps):
                run.save(step)
    run.export(lambda folder: save_model(folder, "weights"))
    return run


def save_model(folder: Path, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(content)


def counts(folder: Path) -> list[float]:
    return [json.loads(line)["count"] for line in (folder / METRICS).read_text().splitlines()]


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damage(path: Path) -> None:
    (path / "state.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


@pytest.fixture
def latest(tmp_path: Path) -> RunConfig:
    return config_in(tmp_path / "run", resume_from_checkpoint="latest")


# -- a folder that holds no run ---------------------------------------------------------------


@pytest.mark.parametrize("wanted", [None, "latest"])
def test_an_absent_or_empty_folder_is_a_fresh_start(tmp_path: Path, wanted: str | None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    for name in ("absent", "empty"):
        train(config_in(tmp_path / name, resume_from_checkpoint=wanted))
        assert counts(tmp_path / name) == [1, 2, 3, 4]


@pytest.mark.parametrize("wanted", [None, "latest"])
@pytest.mark.parametrize("name", ["thesis.tex", RECIPE, METRICS])
def test_a_folder_of_other_things_is_refused_untouched(
    tmp_path: Path, name: str, wanted: str | None
) -> None:
    (tmp_path / name).write_text("steps: 3  # mine\n")
    before = state_of(tmp_path)
    with pytest.raises(SmaltiError, match="another --output_dir"):
        train(config_in(tmp_path, resume_from_checkpoint=wanted))
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("wanted", [None, "latest"])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, wanted: str | None) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SmaltiError, match="is a file, not a folder: choose another --output_dir"):
        train(config_in(tmp_path / "file", resume_from_checkpoint=wanted))


def test_a_run_that_fails_in_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train(config, until=0)
    assert list((tmp_path / "run").iterdir()) == []
    train(replace(config, learning_rate=1.0))


# -- a run that was killed before its first checkpoint ----------------------------------------


def test_a_run_without_a_checkpoint_starts_again_if_nothing_changed(latest: RunConfig) -> None:
    with pytest.raises(ZeroDivisionError):
        train(latest, until=2)
    with pytest.raises(SmaltiError, match="already holds a run"):
        train(replace(latest, resume_from_checkpoint=None))
    assert counts(latest.output_dir) == [1, 2]
    train(latest)
    assert counts(latest.output_dir) == [1, 2, 3, 4]


@pytest.mark.parametrize("changes", [{"seed": 3}, {"train_batch_size": 4}])
def test_a_run_without_a_checkpoint_is_not_mixed_with_another(latest: RunConfig, changes) -> None:
    with pytest.raises(ZeroDivisionError):
        train(latest, until=2)
    before = state_of(latest.output_dir)
    with pytest.raises(SmaltiError, match="was made with"):
        train(replace(latest, **changes))
    other = OtherConfig(**vars(latest), width=2)  # a setting that the run did not store
    with pytest.raises(SmaltiError, match="was made with width = 1, this run has 2"):
        train(other)
    assert state_of(latest.output_dir) == before


def test_a_finished_run_without_checkpoints_does_not_start_again(latest: RunConfig) -> None:
    train(latest)
    for path in checkpoints(latest.output_dir):
        path.rename(latest.output_dir.parent / path.name)
    before = state_of(latest.output_dir)
    with pytest.raises(SmaltiError, match=r"exported\.json, but no checkpoint"):
        train(latest)
    assert state_of(latest.output_dir) == before


# -- a run with checkpoints -------------------------------------------------------------------


def test_a_new_run_never_overwrites_a_checkpoint(latest: RunConfig) -> None:
    train(latest)
    with pytest.raises(SmaltiError, match="already holds a run"):
        train(replace(latest, resume_from_checkpoint=None))


def test_when_no_checkpoint_can_be_read_the_run_is_refused(latest: RunConfig) -> None:
    train(replace(latest, checkpointing_steps=2))
    for path in checkpoints(latest.output_dir):
        damage(path)
    before = state_of(latest.output_dir)
    with pytest.raises(SmaltiError, match=r"no checkpoint in .* can be read"):
        train(latest)
    assert state_of(latest.output_dir) == before


@pytest.mark.parametrize("by_path", [False, True])
def test_a_checkpoint_of_another_version_is_refused(latest: RunConfig, by_path: bool) -> None:
    train(latest)
    newest = checkpoints(latest.output_dir)[-1]
    state = json.loads((newest / "state.json").read_text())
    del state["num_processes"]
    shutil.rmtree(newest)
    save_checkpoint(latest.output_dir, state.pop("step"), {}, state, keep=0)
    wanted = str(newest) if by_path else "latest"
    with pytest.raises(SmaltiError, match=r"has no entry num_processes: another version"):
        train(replace(latest, resume_from_checkpoint=wanted, max_train_steps=8))
    with pytest.raises(SmaltiError, match=r"folder not found: .*nowhere"):
        train(replace(latest, resume_from_checkpoint=str(latest.output_dir / "nowhere")))


def test_damaged_checkpoints_give_way_to_the_next_good_one(latest: RunConfig) -> None:
    config = replace(latest, max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2)
    train(replace(config, checkpoints_total_limit=0))
    damage(latest.output_dir / "checkpoint-000004")
    damage(latest.output_dir / "checkpoint-000006")
    train(replace(config, max_train_steps=3))
    assert names(latest.output_dir) == ["checkpoint-000002", "checkpoint-000003"]
    train(config)
    assert names(latest.output_dir) == ["checkpoint-000004", "checkpoint-000006"]
    assert counts(latest.output_dir) == [1, 2, 3, 4, 5, 6]


def test_going_back_by_a_path_replaces_what_came_after(latest: RunConfig) -> None:
    config = replace(latest, max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=0)
    train(config)
    back = replace(config, resume_from_checkpoint=str(latest.output_dir / "checkpoint-000002"))
    train(replace(back, max_train_steps=3))
    assert names(latest.output_dir) == ["checkpoint-000002", "checkpoint-000003"]


def test_a_path_never_overwrites_another_run(latest: RunConfig, tmp_path: Path) -> None:
    train(latest)
    other = replace(latest, output_dir=tmp_path / "other")
    train(other)
    before = state_of(other.output_dir)
    path = str(latest.output_dir / "checkpoint-000004")
    with pytest.raises(SmaltiError, match="choose another --output_dir"):
        train(replace(other, resume_from_checkpoint=path))
    assert state_of(other.output_dir) == before
    branch = replace(latest, output_dir=tmp_path / "branch", resume_from_checkpoint=path)
    branch = replace(branch, max_train_steps=8)
    with pytest.raises(ZeroDivisionError):
        train(branch, until=6)
    train(branch)  # killed before its first checkpoint, it resumes at the path again
    assert counts(branch.output_dir) == [5, 6, 7, 8]


def test_a_run_is_not_finished_below_its_checkpoint(latest: RunConfig) -> None:
    train(latest)
    before = state_of(latest.output_dir)
    with pytest.raises(SmaltiError, match=r"is beyond max_train_steps 3"):
        train(replace(latest, max_train_steps=3))
    assert state_of(latest.output_dir) == before


def test_other_data_are_refused(latest: RunConfig) -> None:
    train(latest)
    with pytest.raises(SmaltiError, match="was trained on other data"):
        train(replace(latest, max_train_steps=8), data="changed")


def test_a_precision_is_kept_on_another_machine(latest: RunConfig, monkeypatch) -> None:
    config = replace(latest, mixed_precision="auto", max_train_steps=2)
    for has_units, steps in ((True, 2), (False, 4)):
        monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda has=has_units: has)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert train(replace(config, max_train_steps=steps)).precision == "bf16"


# -- where the result goes --------------------------------------------------------------------


def test_a_result_replaces_only_what_the_run_saved_itself(latest: RunConfig) -> None:
    target = latest.output_dir.parent / "model"
    train(latest, result=target)
    (target / "README.md").write_text("a better card")
    train(latest, result=target)
    other = replace(latest, output_dir=latest.output_dir.parent / "other")
    with pytest.raises(SmaltiError, match="was not saved by this run"):
        train(other, result=target)
    assert not other.output_dir.exists()
    save_model(target, "of somebody else")
    with pytest.raises(SmaltiError, match="was not saved by this run"):
        train(latest, result=target)


def test_a_result_that_was_cut_short_is_saved_again(latest: RunConfig, monkeypatch) -> None:
    target = latest.output_dir.parent / "model"

    def cut(folder: Path, content: str) -> None:
        (folder / "model.safetensors").write_text(content[:2])
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setitem(globals(), "save_model", cut)
        train(latest, result=target)
    assert os.listdir(target.parent) == ["run"]
    train(latest, result=target)
    assert (target / "model.safetensors").read_text() == "weights"


def test_a_result_that_smalti_0_1_0_left_unfinished_is_saved_again(latest: RunConfig) -> None:
    target = latest.output_dir.parent / "model"
    train(latest)
    save_model(target, "wei")
    record = {"folder": str(target), "weights": None}
    (latest.output_dir / "exported.json").write_text(json.dumps(record))
    train(latest, result=target)
    assert (target / "model.safetensors").read_text() == "weights"


def test_two_runs_with_one_result_are_refused_at_the_start_and_at_the_end(
    latest: RunConfig,
) -> None:
    target = latest.output_dir.parent / "model"
    other = replace(latest, output_dir=latest.output_dir.parent / "other")
    first = Run(latest, kind="test", result=target)
    first.resume("data")
    with ThreadPoolExecutor(1) as pool, pytest.raises(BusyError, match="another run is active"):
        pool.submit(train, other, result=target).result()
    assert not other.output_dir.exists() or os.listdir(other.output_dir) == []
    save_model(target, "of somebody else")  # by a program that takes no lock
    with pytest.raises(SmaltiError, match="was not saved by this run"):
        first.export(lambda folder: save_model(folder, "weights"))
    assert (target / "model.safetensors").read_text() == "of somebody else"


def test_a_run_that_is_over_does_not_keep_its_models_in_memory(latest: RunConfig) -> None:
    """`smalti demo` trains one model after the other in one process."""
    over = weakref.ref(train(latest))
    gc.collect()
    assert over() is None


@pytest.mark.parametrize("name", ["run", "."])
def test_a_result_must_not_contain_the_run(latest: RunConfig, name: str) -> None:
    with pytest.raises(SmaltiError, match="which contains the run's folder"):
        train(latest, result=latest.output_dir.parent / name)


def test_a_file_is_no_place_for_a_result(latest: RunConfig) -> None:
    target = latest.output_dir.parent / "file"
    target.write_text("x")
    with pytest.raises(SmaltiError, match="was not saved by this run"):
        train(latest, result=target)
    assert os.listdir(target.parent) == ["file"]


# -- what may change --------------------------------------------------------------------------


def test_a_checkpoint_may_be_named_without_its_folder(latest: RunConfig) -> None:
    train(replace(latest, checkpointing_steps=2))
    train(replace(latest, resume_from_checkpoint="checkpoint-000002"))
    assert counts(latest.output_dir)[-1] == 4


def test_hidden_files_do_not_damage_a_checkpoint(latest: RunConfig) -> None:
    train(latest)
    newest = checkpoints(latest.output_dir)[-1]
    (newest / ".DS_Store").touch()
    assert verify(newest).step == 4
    (newest / "notes.txt").touch()
    with pytest.raises(SmaltiError, match=r"holds notes\.txt"):
        verify(newest)


def test_moved_data_are_the_same_data_and_a_setting_is_named_to_its_last_part() -> None:
    before = {"data": "a", "tokenizer": "b", "initial": "c"}
    refuse_other_settings({**before, "data": "/x/a", "tokenizer": "../b"}, before, "it")
    with pytest.raises(SmaltiError, match="it was made with initial = c, this run has d"):
        refuse_other_settings({**before, "initial": "d"}, before, "it")
    one, two = ({"tokenizer": {"conv": {"width": w}, "size": 8}} for w in (1, 2))
    with pytest.raises(SmaltiError, match=r"tokenizer\.conv\.width = 1, this run has 2"):
        refuse_other_settings(two, one, "it")
