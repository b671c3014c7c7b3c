"""Runs that diverge: their good checkpoints stay, their skipped steps are limited."""

import logging
from pathlib import Path

import pytest
import torch
from runs import losses
from toy_run import infinite_loss, toy_config, train

from smalti.errors import SmaltiError
from smalti.training import budget
from smalti.training.budget import Budget
from smalti.training.checkpoint import checkpoints, prune, save_checkpoint
from smalti.training.divergence import SETTLED, LossLevel
from smalti.training.optim import FEW_STEPS, StepGuard


def guard(**options) -> StepGuard:
    return StepGuard(20, lambda values: values, **options)


def take(own: StepGuard, step: int, loss: float) -> bool:
    return own.accepts("model", step, [torch.tensor(loss)], torch.tensor(1.0))


def test_the_level_is_the_running_mean_and_the_deviation_from_it() -> None:
    level = LossLevel()
    for loss in (2.0, 4.0, 3.0):
        level.update(loss)
    assert level.mean == pytest.approx(3.0) and level.steps == 3  # a plain mean at first
    for _ in range(2000):
        level.update(5.0)
    assert level.mean == pytest.approx(5.0) and level.deviation == pytest.approx(0.0, abs=1e-6)


def test_a_finite_spike_is_told_once(caplog) -> None:
    own = guard()
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    for step, value in enumerate(noise):
        assert take(own, step, 2 + value)
    assert caplog.messages == []
    for step in range(200, 220):
        assert take(own, step, 40.0)
    (told,) = caplog.messages
    assert "step 200: the loss of the model is 40" in told and "lower --learning_rate" in told


def test_the_level_of_a_resumed_run_is_that_of_the_whole() -> None:
    whole, cut = guard(), guard()
    for step in range(120):
        take(whole, step, 1 + step % 7)
        if step == 60:
            again = guard()
            again.restore(cut.state())
            cut = again
        take(cut, step, 1 + step % 7)
    assert cut.state() == whole.state()


def test_the_model_comes_first_in_a_checkpoint_though_its_first_step_is_skipped() -> None:
    """Its level, not the discriminator's, says whether the run has diverged."""
    own, norm = guard(), torch.tensor(1.0)
    assert not own.accepts("tokenizer", 0, [torch.tensor(float("nan"))], norm)
    assert own.accepts("discriminator", 0, [torch.tensor(1.0)], norm)
    assert list(own.state()["levels"]) == ["tokenizer", "discriminator"]


def test_skipped_steps_are_limited_in_all(tmp_path: Path) -> None:
    """27 of 30 steps were skipped, never 20 in a row, and the run exported a model."""

    def mostly(run, model, step, loss):
        return loss if step % 10 == 9 else infinite_loss(run, model, step, loss)

    with pytest.raises(SmaltiError, match=r"not finite in 6 of 6 steps, more than .*share 0\.05"):
        train(toy_config(tmp_path / "run", max_train_steps=30), mostly)
    assert not (tmp_path / "run" / "model").exists()
    own = guard(share=0.05)
    for step in range(1000):
        take(own, step, float("nan") if step % 25 == 0 else 1.0)  # 4 %
    assert own.refused == {"model": 40} and own.total == 40
    few = guard(share=0.0)
    for step in range(FEW_STEPS):
        assert not take(few, step, float("inf"))
    with pytest.raises(SmaltiError, match="lower --learning_rate"):
        take(few, FEW_STEPS, float("inf"))


def write(folder: Path, step: int, mean: float, steps: int = SETTLED) -> None:
    level = {"mean": mean, "deviation": 0.01, "steps": steps}
    state = {"skipped": {"levels": {"model": level, "discriminator": {**level, "mean": 9.0}}}}
    save_checkpoint(folder, step, {}, state, keep=2)


def names(folder: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoints(folder)]


def test_ruined_checkpoints_do_not_replace_the_best(tmp_path: Path, caplog) -> None:
    for step, mean in ((1, 0.9), (2, 0.5), (3, 0.51), (4, 0.505)):
        write(tmp_path, step, mean)
    assert names(tmp_path) == [3, 4]  # as good: the newest stay
    assert caplog.messages == []
    for step in range(5, 9):
        write(tmp_path, step, 7.0)
    assert names(tmp_path) == [4, 7, 8]
    assert "--resume_from_checkpoint checkpoint-000004" in caplog.messages[-1]
    write(tmp_path, 9, 0.4)
    assert names(tmp_path) == [8, 9]


def test_checkpoints_without_a_level_are_kept_by_age(tmp_path: Path) -> None:
    write(tmp_path, 1, 0.1)
    for step in (2, 3):
        save_checkpoint(tmp_path, step, {}, {}, keep=2)  # as smalti 0.1 writes them
    assert names(tmp_path) == [2, 3]
    write(tmp_path, 4, 0.2, steps=3)  # too few steps to say anything
    assert names(tmp_path) == [3, 4]
    prune(tmp_path, 1, spare=checkpoints(tmp_path)[-1])
    assert names(tmp_path) == [4]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", checkpoints_total_limit=1)

    def ruin(run, model, step, loss):
        if step == 3:
            model.layers[1].bias.data[0] = float("nan")  # after the loss was computed
        return loss

    with pytest.raises(SmaltiError, match=r"layers.1.bias of the model is not finite after step 4"):
        train(config, ruin)
    assert [path.name for path in checkpoints(config.output_dir)] == ["checkpoint-000002"]


def test_validation_keeps_to_its_share_of_time(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    own = Budget(0.1)
    made = []
    for _ in range(40):  # 100 s of training, then 30 s of validation if that is allowed
        now[0] += 100
        if own.allows():
            with own.spending():
                now[0] += 30
        made.append(own.spent)
    assert made[:2] == [30, 60]  # within the first minute and its share
    assert 0.08 < (own.spent - 60) / own.training <= 0.1
    assert Budget(0.0).allows()  # the first is always made


def test_a_validation_over_its_budget_is_skipped_and_told(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(Budget, "allows", lambda self: self.spent == 0)
    caplog.set_level(logging.INFO)
    run = train(toy_config(tmp_path / "run"))
    steps = [line["step"] for line in losses(tmp_path / "run") if "val_norm" in line]
    assert steps == [2, 6]  # the first, and after the last step
    (told,) = [text for text in caplog.messages if "are skipped" in text]
    assert told.startswith("step 4: validation and preview are skipped")
    assert "validation_budget is 0.1" in told and run.final_picture("samples") is None
