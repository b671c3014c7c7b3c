"""The fault table: what may happen to a run, and what must not come of it.

Each test quotes its row and the criterion. Faults are planted by named hooks (functions replaced,
arguments of a child), never by timing. Rows that are held elsewhere, because they need no run:

    F12-F15  images, tar files and shards: tests/data (sources of pictures)
    F18, F19 weights and configs of saved models: tests/smalti/test_hub.py, tests/pipelines
    F21      `generate` killed and restarted: tests/pipelines/test_pipeline.py
    F22      `encode` killed and finished by others: tests/data/test_cache.py, tests/scripts

F2 and F3 are held for each tokenizer and prior in tests/scripts, too.
"""

import contextlib
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import GeneralTracker
from jobs import forked, program
from PIL import Image
from runs import assert_same, in_a_fork, kill_at, kill_self, losses, weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from toy_run import infinite_loss, toy_config, train

from smalti.cli import main, run_command
from smalti.data.latent_cache.cache import CacheInfo, EncodedRange, write_cache
from smalti.data.latent_cache.export import export_cache
from smalti.data.latents import CodeSpec
from smalti.errors import EXIT_INTERRUPTED, SmaltiError
from smalti.evaluation.metrics import Metric, write_summary
from smalti.folders import LAPSE, LOCK, UNREPORTED, FolderLock, locked
from smalti.pipelines.convert.convert import convert
from smalti.pipelines.convert.convert import export as export_weights
from smalti.pipelines.generation import generate_folder
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.scripts import demo
from smalti.scripts import train_tokenizer as script
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.evaluate import EvaluateConfig, claim
from smalti.scripts.info import info
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer
from smalti.training import checkpoint as module
from smalti.training.checkpoint import MANIFEST, checkpoints, newest_valid
from smalti.training.folder import export as export_result

TOY = Path(__file__).with_name("toy_run.py")
EMA_VQ = VQConfig(
    image_size=16,
    conv=ConvConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=()),
    quantizer=NearestConfig(codebook=CodebookConfig(16, 4, learning="ema", revive_after=1)),
)
SMALL_VQ = VQConfig(  # of LlamaGen's structure
    image_size=8,
    conv=ConvConfig(32, (1, 1), 1, attention_levels=(1,), z_channels=4, norm_groups=32),
    quantizer=NearestConfig(codebook=CodebookConfig(8, 4)),
)


def latest(folder: Path, **changes):
    return toy_config(folder, resume_from_checkpoint="latest", **changes)


def whole_run(folder: Path, **changes) -> Path:
    train(toy_config(folder, **changes))
    return folder


# -- F1: points at which a save is killed -----------------------------------------------------


def after_model(patch: pytest.MonkeyPatch) -> None:
    original = module.save_file
    patch.setattr(module, "save_file", lambda *a, **k: (original(*a, **k), kill_self()))


def mid_file(patch: pytest.MonkeyPatch) -> None:
    def half(tensors, path):
        path.write_bytes(b"x" * 40)
        kill_self()

    patch.setattr(module, "save_file", half)


def before_manifest(patch: pytest.MonkeyPatch) -> None:
    original = module.write_json
    patch.setattr(
        module, "write_json", lambda p, c: kill_self() if p.name == MANIFEST else original(p, c)
    )


def before_rename(patch: pytest.MonkeyPatch) -> None:
    original = os.replace
    patch.setattr(os, "replace", lambda a, b: kill_self() if Path(a).is_dir() else original(a, b))


def after_rename(patch: pytest.MonkeyPatch) -> None:
    original = os.replace

    def replace_and_die(a, b):
        original(a, b)
        if Path(b).is_dir():
            kill_self()

    patch.setattr(os, "replace", replace_and_die)


def during_prune(patch: pytest.MonkeyPatch) -> None:
    def half(path, **options):
        next(Path(path).iterdir()).unlink()
        kill_self()

    patch.setattr(shutil, "rmtree", half)


POINTS = [after_model, mid_file, before_manifest, before_rename, after_rename, during_prune]


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_f1_a_save_that_is_killed_anywhere_leaves_a_valid_checkpoint(
    tmp_path: Path, point, limit: int
) -> None:
    """F1 kill -9 during save: resume picks the newest *valid* one; at least one valid always
    exists (also limit=1); no traceback; temporary folders cleaned at the next start."""
    config = latest(tmp_path / "run", checkpoints_total_limit=limit, max_train_steps=8)

    def killed() -> None:
        patch = pytest.MonkeyPatch()

        def arm(run, model, step, loss):
            if step == 2 * limit:  # the save after it is the first that also removes one
                point(patch)
            return loss

        train(config, arm)

    assert in_a_fork(killed) == -signal.SIGKILL
    found, _ = newest_valid(config.output_dir)
    assert found is not None and found.step >= 2 * limit

    def cleaned(run, model, step, loss):
        assert not list(run.folder.glob(".tmp-*"))
        return loss

    train(config, cleaned)
    left = [p.name for p in config.output_dir.iterdir() if p.name.startswith((".tmp", LOCK))]
    assert left == []
    assert len(checkpoints(config.output_dir)) == limit
    assert_same(whole_run(tmp_path / "whole", max_train_steps=8), config.output_dir)


# -- F2: exactness ----------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("cuts", [(2,), (4,), (3, 5), (4, 5)])
def test_f2_a_killed_run_goes_on_bit_exactly(tmp_path: Path, cuts, micro: int) -> None:
    """F2 bit-exact resume: N steps against k + kill -9 + N-k: bitwise equal parameters, EMA,
    buffers, optimizer, logged losses; at an epoch's edge (3 steps), within it, twice in one
    epoch, and during accumulation."""
    accumulate = {"gradient_accumulation_steps": micro, "checkpointing_steps": 1}
    config = latest(tmp_path / "cut", **accumulate)
    for cut in cuts:

        def killed(cut: int = cut) -> None:
            def die(run, model, step, loss):
                return kill_self() if step == cut else loss

            train(config, die)

        assert in_a_fork(killed) == -signal.SIGKILL
        assert [p.name for p in checkpoints(config.output_dir)][-1] == f"checkpoint-{cut:06d}"
    train(config)
    assert_same(whole_run(tmp_path / "whole", **accumulate), config.output_dir)


# -- F5, F6: damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "extra"])
def test_f5_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, harm: str, caplog, capsys
) -> None:
    """F5 truncated / bit-flipped / missing / extra file, each in turn: hash mismatch named; falls
    back to the previous; explicit path -> exit status not 0 with the file name."""
    folder = whole_run(tmp_path / "run")
    newest = checkpoints(folder)[-1]
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        damaged = newest / "extra.bin" if harm == "extra" else file
        if harm == "missing":
            file.unlink()
        else:
            flipped = content[:-1] + bytes([content[-1] ^ 1])
            damaged.write_bytes(flipped if harm == "flip" else content[: len(content) // 2])
        found, skipped = newest_valid(folder)
        assert found is not None and found.path == checkpoints(folder)[-2]
        assert len(skipped) == 1 and damaged.name in skipped[0]
        config = toy_config(folder, resume_from_checkpoint=str(newest))
        assert run_command(lambda _, config=config: train(config)) == 2
        assert damaged.name in capsys.readouterr().err.strip().splitlines()[-1]
        damaged.unlink(missing_ok=True)
        file.write_bytes(content)
    assert newest_valid(folder)[1] == []


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_f6_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    """F6 pickle bomb in a checkpoint: the file never appears; clear error. (In saved models:
    tests/smalti/test_hub.py.)"""
    folder, exploded = whole_run(tmp_path / "run"), tmp_path / "exploded"
    newest = checkpoints(folder)[-1]
    manifest = json.loads((newest / MANIFEST).read_text())
    for file in sorted(newest.glob("*.safetensors")):
        content, described = file.read_bytes(), manifest["files"][file.name]
        file.write_bytes(pickle.dumps(Bomb(exploded)))
        manifest["files"][file.name] = module._describe(file)
        (newest / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(SmaltiError, match=rf"{file.name} does not fit this run"):
            train(latest(folder, max_train_steps=8))
        file.write_bytes(content)
        manifest["files"][file.name] = described
    assert not exploded.exists()


# -- F7: numbers that are not finite ----------------------------------------------------------


def tokenizer_config(pictures: Path, out: Path, **changes) -> script.TrainTokenizerConfig:
    base = script.TrainTokenizerConfig(
        output_dir=out,
        data=str(pictures),
        tokenizer=EMA_VQ,
        objective=ObjectiveConfig(
            perceptual_weight=0.0, adversarial_weight=0.1, discriminator=PatchGANConfig(8, 1)
        ),
        mixed_precision="no",
        train_batch_size=8,
        max_train_steps=4,
        checkpointing_steps=1,
        checkpoints_total_limit=0,
        validation_steps=100,
        logging_steps=1,
    )
    return replace(base, **changes)


def infinite(loss):
    loss.total = loss.total + torch.tensor(float("inf"))


def not_a_number(loss):
    loss.total = loss.total * float("nan")


def nan_gradient(loss):
    loss.total.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize("poison", [infinite, not_a_number, nan_gradient])
def test_f7_a_step_that_is_not_finite_changes_nothing(
    pictures: Path, tmp_path: Path, monkeypatch, poison
) -> None:
    """F7 NaN/Inf loss, gradient: params/EMA/codebook/optimizer unchanged by that step, also a
    codebook that is learned and revived in *forward*; counter logged."""
    original = script.generator_loss

    def poisoned(*args, step: int, **options):
        loss = original(*args, step=step, **options)
        if step == 2:
            poison(loss)
        return loss

    monkeypatch.setattr(script, "generator_loss", poisoned)
    config = tokenizer_config(pictures, tmp_path / "run")
    script.train(config)
    before, after, later = (
        {
            f"{file}/{name}": value
            for file in ("model", "ema", "optimizer")
            for name, value in load_file(path / f"{file}.safetensors").items()
        }
        for path in checkpoints(config.output_dir)[1:]
    )
    assert any("mean_counts" in name for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    moved = {name for name in before if not torch.equal(before[name], later[name])}
    assert {name.partition("/")[0] for name in moved} == {"model", "ema", "optimizer"}
    assert any("mean_counts" in name for name in moved)
    counted = [line.get("skipped_steps", 0.0) for line in losses(config.output_dir)]
    assert counted[:4] == [0.0, 0.0, 1.0, 1.0]


def test_f7_a_step_with_a_nan_image_is_skipped_too(
    pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    """F7 NaN image: nothing that is saved becomes NaN, discriminator included."""
    original = script.micro_batches_of

    def poisoned(run, tokenizer, batches, step):
        if step == 2:
            batches[0].images[0, 0, 0, 0] = float("nan")
        return original(run, tokenizer, batches, step)

    monkeypatch.setattr(script, "micro_batches_of", poisoned)
    config = tokenizer_config(pictures, tmp_path / "run")
    script.train(config)
    assert all(value.isfinite().all() for value in weights(config.output_dir).values())
    assert losses(config.output_dir)[-2]["skipped_steps"] == 2.0  # of both models


def test_f7_many_in_a_row_end_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    """F7 abort after n in a row, last good checkpoint intact; the count continues on resume."""
    config = latest(tmp_path / "run", max_train_steps=12, max_skipped_steps=3)

    def hook(run, model, step, loss):
        if step == 5:
            raise SystemExit(1)
        return infinite_loss(run, model, step, loss) if step >= 4 else loss

    with pytest.raises(SystemExit):  # after one bad step, before it is saved
        train(config, hook)
    assert newest_valid(config.output_dir)[0].step == 4
    good = weights(config.output_dir)

    def always(run, model, step, loss):
        return infinite_loss(run, model, step, loss)

    with pytest.raises(SmaltiError, match=r"not finite in 3 steps in a row, up to step 6"):
        train(config, always)
    assert {k: v.tolist() for k, v in weights(config.output_dir).items()} == {
        k: v.tolist() for k, v in good.items()
    }
    assert newest_valid(config.output_dir)[0].state["skipped"]["in_a_row"] == {"model": 2}
    with pytest.raises(SmaltiError, match=r"up to step 6"):  # 4 and 5 were before the checkpoint
        train(config, always)


def test_f7_a_discriminator_that_is_never_finite_ends_the_run_too(
    pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    """F7 counter, abort after n in a row: of each model by itself."""
    from smalti.tokenizer.losses.objective import DiscriminatorObjective

    original = DiscriminatorObjective.forward

    def poisoned(self, *args):
        loss = original(self, *args)
        loss.total = loss.total * float("nan")
        return loss

    monkeypatch.setattr(DiscriminatorObjective, "forward", poisoned)
    with pytest.raises(
        SmaltiError, match="gradient of the discriminator was not finite in 2 steps"
    ):
        script.train(tokenizer_config(pictures, tmp_path / "run", max_skipped_steps=2))


# -- F8: signals ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_f8_a_signal_saves_and_ends_with_its_status(tmp_path: Path, number) -> None:
    """F8 SIGTERM / SIGINT: finishes the step, saves a valid checkpoint, documented exit status;
    resume = F2."""
    rarely = {"checkpointing_steps": 100, "validation_steps": 100}
    config = latest(tmp_path / "run", **rarely)

    def interrupt(run, model, step, loss):
        if step == 2:
            os.kill(os.getpid(), number)
        return loss

    with pytest.raises(SystemExit) as stop:
        train(config, interrupt)
    assert stop.value.code == EXIT_INTERRUPTED == 130
    assert [p.name for p in checkpoints(config.output_dir)] == ["checkpoint-000003"]
    assert not (config.output_dir / LOCK).exists()
    assert (config.output_dir / "report.html").is_file()
    train(config)
    assert_same(
        whole_run(tmp_path / "whole", **rarely),
        config.output_dir,
    )


def test_f8_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """F8 second signal = immediate: no checkpoint of that step, status 130."""
    config = latest(tmp_path / "run")

    def interrupt(run, model, step, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    assert run_command(lambda _: train(config, interrupt)) == 130
    assert newest_valid(config.output_dir)[0].step == 2


def test_checkpoints_are_due_by_time_too_and_resume_stays_exact(tmp_path: Path) -> None:
    """A checkpoint every few minutes, whatever the number of steps."""
    rarely = {"checkpointing_steps": 100, "checkpoints_total_limit": 0, "validation_steps": 100}
    often = latest(tmp_path / "cut", checkpointing_minutes=1e-9, **rarely)

    def die(run, model, step, loss):
        return kill_self() if step == 4 else loss

    assert in_a_fork(lambda: train(often, die)) == -signal.SIGKILL
    assert [p.name for p in checkpoints(often.output_dir)][-1] == "checkpoint-000004"
    train(often)
    assert len(checkpoints(often.output_dir)) == 6
    whole = whole_run(tmp_path / "whole", checkpointing_minutes=0, **rarely)
    assert len(checkpoints(whole)) == 1
    assert_same(whole, often.output_dir)


# -- F10: disk full, no permission ------------------------------------------------------------


def full_for_safetensors(patch: pytest.MonkeyPatch) -> None:
    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    patch.setattr(module, "save_file", full)


def full_for_json(patch: pytest.MonkeyPatch) -> None:
    def full(*args, **options):
        raise OSError(28, "No space left on device", "state.json")

    patch.setattr(module, "write_json", full)


def full_from_the_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))


def read_only(patch: pytest.MonkeyPatch) -> None:
    def denied(self, *args, **options):
        if self.name.startswith(".tmp-checkpoint"):
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **options)

    original = Path.mkdir
    patch.setattr(Path, "mkdir", denied)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (full_for_safetensors, "free some space, or choose another disk"),
        (full_for_json, "free some space, or choose another disk"),
        (full_from_the_start, "MB and 0.0 MB are free; checkpoint-000002 is kept"),
        (read_only, "check the permissions"),
    ],
)
def test_f10_a_full_disk_keeps_the_old_checkpoint_and_reports_it(
    tmp_path: Path, monkeypatch, capsys, fault, message: str
) -> None:
    """F10 disk full / read-only / permission: old checkpoint kept, error says bytes needed;
    training stops (status 1)."""
    config = latest(tmp_path / "run", checkpoints_total_limit=1)

    def arm(run, model, step, loss):
        if step == 2:
            fault(monkeypatch)
        return loss

    assert run_command(lambda _: train(config, arm)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    monkeypatch.undo()
    assert [p.name for p in checkpoints(config.output_dir)] == ["checkpoint-000002"]
    assert not list(config.output_dir.glob(".tmp-*"))
    train(config)
    assert_same(whole_run(tmp_path / "whole"), config.output_dir)


def test_f10_a_write_that_really_fails_is_reported_in_one_line(tmp_path: Path) -> None:
    """F10 as the system tells it: a limit on the size of files makes safetensors' write fail."""
    resource = pytest.importorskip("resource")

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        tensors = {"model": {"weight": torch.zeros(10_000)}}
        try:
            module.save_checkpoint(tmp_path, 1, tensors, {}, keep=0)
        except OSError:
            os._exit(7)

    assert in_a_fork(limited) == 7
    assert list(tmp_path.iterdir()) == []


# -- F11: two runs in one folder --------------------------------------------------------------


def test_f11_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    """F11 concurrent run in the same output_dir: the second refuses; nothing of the first is
    touched."""
    config = latest(tmp_path / "run")
    statuses = []

    def start_another(run, model, step, loss):
        if step == 3:
            statuses.append(in_a_fork(lambda: train(config)))
        return loss

    train(config, start_another)
    assert statuses == [2]
    assert_same(whole_run(tmp_path / "whole"), config.output_dir)


def test_f11_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    """F11 stale lock taken over."""
    config = latest(tmp_path / "run")

    def killed() -> None:
        train(config, lambda run, model, step, loss: kill_self() if step == 3 else loss)

    assert in_a_fork(killed) == -signal.SIGKILL
    assert (config.output_dir / LOCK).exists()
    train(config)
    assert not (config.output_dir / LOCK).exists()


@pytest.mark.parametrize("harm", ["other start", "other machine", "empty"])
def test_f11_a_lock_is_judged_by_what_can_be_known(tmp_path: Path, harm: str) -> None:
    """F11: a number given to another process, another machine, a lock that is being written."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    holder = dict(line.split("=") for line in (tmp_path / LOCK).read_text().splitlines()[1:])
    lock.release()
    holder |= {"pid": os.getppid(), "start": 1}
    if harm == "other machine":
        holder["host"] = "node7"
    lines = ["filelock/2", *(f"{name}={value}" for name, value in holder.items()), ""]
    (tmp_path / LOCK).write_text("" if harm == "empty" else "\n".join(lines))
    if harm != "other start":
        with pytest.raises(SmaltiError, match="another run is active"):
            lock.acquire()
        long_ago = time.time() - LAPSE - 1
        os.utime(tmp_path / LOCK, (long_ago, long_ago))
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_f11_a_suspended_run_keeps_its_lock(tmp_path: Path) -> None:
    """F11: on its own machine a process holds the lock while it exists, however long it pauses."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    assert in_a_fork(lambda: FolderLock(tmp_path).acquire()) == 2
    lock.release()


# -- F28: kills at every file operation of an export ------------------------------------------


def files_of(target: Path) -> dict[str, bytes]:
    """The content of a file, or of each file in a folder; empty if there is nothing."""
    if target.is_file():
        return {"": target.read_bytes()}
    paths = [path for path in sorted(target.rglob("*")) if path.is_file()]
    paths = [path for path in paths if path.name != UNREPORTED]
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in paths}


@cache
def small_pipeline(seed: int) -> Pipeline:
    torch.manual_seed(seed)
    tokenizer = VQTokenizer(SMALL_VQ)
    spec = tokenizer.spec
    prior = NextTokenPrior(
        NextTokenConfig(spec=spec, num_classes=2, depth=1, width=16, num_heads=2, hidden=16)
    )
    return Pipeline(tokenizer, prior, ("one", "two"))


def save_a_pipeline(target: Path) -> None:
    small_pipeline(1).save_pretrained(target, samples=Image.new("RGB", (4, 4)))


def convert_weights(target: Path) -> None:
    convert("llamagen-tokenizer", target.with_name("published.pt"), target)


def export_a_folder(target: Path) -> None:
    export_weights(small_pipeline(1).tokenizer, target, "llamagen-tokenizer")


def export_a_file(target: Path) -> None:
    export_weights(small_pipeline(1).tokenizer, target, "llamagen-tokenizer")


def export_the_latents(target: Path) -> None:
    export_cache(target.with_name("latents"), target, "webdataset")


def finish_a_run(target: Path) -> None:
    run = target.with_name("run")
    run.mkdir(exist_ok=True)
    export_result(run, target, small_pipeline(1).save_pretrained)


def prepare(root: Path) -> None:
    """What the exports read."""
    export_weights(small_pipeline(1).tokenizer, root / "published.pt", "llamagen-tokenizer")
    fill_a_cache(root / "latents")


def fill_a_cache(target: Path) -> None:
    codes = torch.zeros(3, 1, 4, dtype=torch.int64)
    info = CacheInfo(
        spec=CodeSpec(8, ((2, 2),)),
        classes=("one", "two"),
        num_samples=3,
        views=("identity",),
        tokenizer_fingerprint="t",
        dataset_fingerprint="d",
        shard_size=2,
    )
    labels = torch.tensor([0, 1, 0])
    write_cache(target, info, lambda a, b: EncodedRange(codes[a:b], labels[a:b]))


@pytest.mark.parametrize(
    ("work", "name", "over"),
    [
        pytest.param(save_a_pipeline, "pipeline", True, marks=pytest.mark.slow),
        (finish_a_run, "pipeline", True),
        (convert_weights, "model", False),
        (export_a_folder, "theirs", False),
        (export_a_file, "theirs.pt", False),
        (export_the_latents, "parquet", False),
    ],
)
def test_f28_an_export_that_is_killed_anywhere_is_the_old_one_or_the_new_one(
    tmp_path: Path, work: Callable[[Path], None], name: str, over: bool
) -> None:
    """F28 kill -9 at every file operation of an export: the place has what it had before, or the
    new result, whole; the same command then succeeds, and nothing else is left."""
    start = tmp_path / "start"
    start.mkdir()
    prepare(start)
    if over and work is finish_a_run:
        (start / "run").mkdir()
        export_result(start / "run", start / name, small_pipeline(2).save_pretrained)
    elif over:
        small_pipeline(2).save_pretrained(start / name)
    before = files_of(start / name)
    shutil.copytree(start, tmp_path / "whole")
    work(tmp_path / "whole" / name)
    after = files_of(tmp_path / "whole" / name)
    listing = sorted(os.listdir(tmp_path / "whole"))
    assert before != after and (tmp_path / "whole" / name).exists()
    for number in itertools.count(1):
        root = tmp_path / str(number)
        shutil.copytree(start, root)

        def killed(number: int = number, root: Path = root) -> None:
            kill_at(number, root)
            work(root / name)

        status = in_a_fork(killed)
        assert status in (0, -signal.SIGKILL)
        assert files_of(root / name) in (before, after), f"killed at operation {number}"
        if status == 0:
            break
        work(root / name)
        assert files_of(root / name) == after
        assert sorted(os.listdir(root)) == listing
        assert not list(root.rglob(UNREPORTED))
        shutil.rmtree(root)
    assert number > 5


COMMANDS = {
    "encode": ["--data", "PICTURES", "--tokenizer", "START/pipe/tokenizer", "--output_dir"],
    "generate": ["--model", "START/pipe", "--num_images", "2", "--output_dir"],
    "convert": ["llamagen-tokenizer", "START/published.pt"],
    "export": ["START/pipe/tokenizer"],
    "export-latents": ["START/latents", "--format", "webdataset"],
}


@pytest.mark.parametrize(
    ("command", "number"),
    [
        *((command, signal.SIGTERM) for command in COMMANDS),
        ("generate", signal.SIGHUP),
        ("generate", signal.SIGINT),
    ],
)
def test_f28_a_signal_ends_every_command_with_its_status_and_leaves_nothing_unfinished(
    tmp_path: Path, pictures_once: Path, command: str, number: signal.Signals
) -> None:
    """F28 SIGTERM, SIGHUP, SIGINT in a command that is not training: status 130; no temporary file
    and no lock is left; the same command then succeeds."""
    start, out = tmp_path / "start", tmp_path / "out"
    start.mkdir()
    prepare(start)
    small_pipeline(1).save_pretrained(start / "pipe")
    places = {"START": str(start), "PICTURES": str(pictures_once)}
    filled = [re.sub("START|PICTURES", lambda at: places[at[0]], w) for w in COMMANDS[command]]
    words = [command, *filled, str(out)]
    for operation in (2, 5, 8):
        if command not in ("encode", "generate"):  # nothing is overwritten
            shutil.rmtree(out, ignore_errors=True)

        def stopped(operation: int = operation) -> None:
            kill_at(operation, tmp_path, by=number)
            os._exit(main(words))

        assert in_a_fork(stopped) in (130, 0)
        left = [p.name for p in tmp_path.rglob("*") if p.name.startswith((".tmp", ".old"))]
        assert left == [] and not list(tmp_path.rglob("*.lock"))
    if command in ("encode", "generate") or not out.exists():
        assert main(words) == 0


def claim_a_demo(target: Path) -> None:
    demo._claim(demo.DemoConfig(output_dir=target))


def claim_an_evaluation(target: Path) -> None:
    claim(EvaluateConfig(output_dir=target), "fingerprint")


@pytest.mark.parametrize("work", [fill_a_cache, claim_a_demo, claim_an_evaluation])
def test_f28_a_job_in_place_that_is_killed_anywhere_continues(
    tmp_path: Path, work: Callable[[Path], None]
) -> None:
    """F28 kill -9 at every file operation of what is filled in place: the same command succeeds,
    with the same files, and nothing else is left."""
    work(tmp_path / "whole")
    for number in itertools.count(1):
        folder = tmp_path / str(number)

        def killed(number: int = number, folder: Path = folder) -> None:
            kill_at(number, folder)
            with locked(folder):
                work(folder)

        if in_a_fork(killed) == 0:
            break
        with locked(folder):
            work(folder)
        assert files_of(folder) == files_of(tmp_path / "whole")
    assert number > 2


# -- F29: flipped bits --------------------------------------------------------------------------


def flips(path: Path, every: int = 1) -> Iterator[int]:
    """Flip each bit of a file in turn, and restore it."""
    written = path.read_bytes()
    for bit in range(0, 8 * len(written), every):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        yield bit
    path.write_bytes(written)


def is_damaged(folder: Path) -> bool:
    """Whether `smalti info` says so, or cannot read the folder."""
    try:
        return not info(folder).whole
    except SmaltiError:
        return True


def values_in(file: Path) -> list:
    """The values in a JSON file, or in each line of one."""
    text = file.read_text()
    return [json.loads(line) for line in (text.splitlines() if file.suffix == ".jsonl" else [text])]


@pytest.mark.parametrize("kind", ["settings", "pictures", "summary", "manifest"])
def test_f29_no_flipped_bit_of_a_record_is_silent(tmp_path: Path, kind: str) -> None:
    """F29 every bit of the JSON files beside results: `smalti info` finds it, or it changes
    nothing but white space or the form of a number."""
    prepare(tmp_path)
    folder = tmp_path / "out"
    if kind in ("settings", "pictures"):
        options = {"seed": 1, "guidance_scale": 1.0, "batch_size": 2}
        generate_folder(small_pipeline(1), folder, [0, 1], **options)
        file = folder / ("generation.json" if kind == "settings" else "manifest.jsonl")
    elif kind == "summary":
        folder.mkdir()
        write_summary(folder / "summary.json", {"psnr": Metric(20.5, {"data": "x"})}, model="m")
        file = folder / "summary.json"
    else:
        folder = tmp_path / "latents"
        file = folder / "manifest.json"
    assert not is_damaged(folder)
    content = values_in(file)
    for bit in flips(file, every=7):  # at least one of each byte
        try:
            same = values_in(file) == content
        except ValueError:
            same = False
        assert same or is_damaged(folder), f"bit {bit % 8} of byte {bit // 8}"


# -- F17, F20, F24, F25, F27 ------------------------------------------------------------------


def test_f17_latents_of_another_tokenizer_are_refused(pictures: Path, tmp_path: Path) -> None:
    """F17 wrong tokenizer for prior/cache: fingerprint error before step 0."""
    for name in ("one", "two"):
        VQTokenizer(EMA_VQ).save_pretrained(tmp_path / name)
    latents = tmp_path / "latents"
    encode(EncodeConfig(data=str(pictures), tokenizer=tmp_path / "one", output_dir=latents))
    config = TrainPriorConfig(
        output_dir=tmp_path / "prior", latents=latents, tokenizer=tmp_path / "two"
    )
    with pytest.raises(SmaltiError, match="were made by another tokenizer"):
        train_prior(config)
    assert not config.output_dir.exists()


def test_f20_a_run_needs_no_network(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """F20 offline, sockets blocked: local load and train work."""

    def blocked(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    folder = script.train(tokenizer_config(pictures, tmp_path / "run", max_train_steps=1))
    assert VQTokenizer.from_pretrained(folder).fingerprint


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"adam_beta2": 0.5}, True),
        ({"train_batch_size": 4}, True),
        ({"seed": 3}, True),
        ({"max_train_steps": 8, "logging_steps": 2, "process_timeout": 60}, False),
        ({"max_train_steps": 8, "learning_rate": 0.5, "mixed_precision": "bf16"}, False),
        ({"max_train_steps": 8, "gradient_accumulation_steps": 2, "max_grad_norm": 2.0}, False),
    ],
)
def test_f24_a_run_goes_on_only_as_what_it_was(
    tmp_path: Path, caplog, changes, refused: bool
) -> None:
    """F24 resume with changed config: what may change is logged; the rest is refused."""
    folder = whole_run(tmp_path / "run")
    if not refused:
        caplog.set_level(logging.INFO)
        train(latest(folder, **changes))
        assert checkpoints(folder)[-1].name == "checkpoint-000008"
        logged = [message for message in caplog.messages if ", now it is " in message]
        assert [message.split()[0] for message in logged] == sorted(changes)
        assert "max_train_steps was 6, now it is 8" in logged
        return
    with pytest.raises(SmaltiError, match=f"was made with {next(iter(changes))}"):
        train(latest(folder, **changes))
    with pytest.raises(SmaltiError, match="was trained on other data"):
        train(latest(folder), data="other")


class BrokenTracker(GeneralTracker):
    name = "broken"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__(_blank=True)

    @property
    def tracker(self):
        return None

    def log(self, values, step=None, **options):
        raise ConnectionError("no network")

    def finish(self):
        raise ConnectionError("no network")


def test_f25_a_tracker_that_fails_costs_one_warning(tmp_path: Path, caplog) -> None:
    """F25 clock jump, tracker failing/offline, tracker raising: training continues, one warning."""

    def hook(run, model, step, loss):
        if step == 1:
            run.accelerator.trackers = [BrokenTracker()]
        return loss

    train(latest(tmp_path / "run"), hook)
    assert [r.getMessage() for r in caplog.records if "broken" in r.getMessage()] == [
        "the tracker broken failed, the run continues without it: no network"
    ]
    assert losses(tmp_path / "run") == losses(whole_run(tmp_path / "whole"))


def test_f25_a_tracker_that_does_not_start_and_a_clock_that_jumps_do_not_matter(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    """F25 clock jump, tracker failing: training continues."""
    from accelerate import Accelerator

    def refuse(self, *args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    monkeypatch.setattr("smalti.training.config.check_tracker", lambda name: None)
    now = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: next(now))
    config = toy_config(tmp_path / "run", report_to="tensorboard")
    monkeypatch.setattr(Accelerator, "trackers", [], raising=False)
    train(config)
    assert "does not start" in caplog.text
    monkeypatch.undo()
    assert_same(whole_run(tmp_path / "whole"), tmp_path / "run")


@pytest.mark.parametrize("name", ["with space", "ünï — 画", "link", "-dash", "a" * 255])
def test_f27_odd_folders_work(tmp_path: Path, name: str) -> None:
    """F27 unwritable/huge/odd paths: spaces, unicode, symlinked output, long: works."""
    if name == "link":
        (tmp_path / "target").mkdir()
        (tmp_path / name).symlink_to(tmp_path / "target")
    train(toy_config(tmp_path / name, max_train_steps=2))
    train(latest(tmp_path / name, max_train_steps=4))
    assert len(losses(tmp_path / name)) == 6


def test_f27_a_name_that_is_too_long_is_one_line(tmp_path: Path, capsys) -> None:
    """F27 >255: clear error."""
    config = toy_config(tmp_path / ("a" * 256))
    assert run_command(lambda _: train(config)) in (1, 2)
    assert "choose a shorter name" in capsys.readouterr().err


# -- children ---------------------------------------------------------------------------------

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")},
    "ACCELERATE_USE_CPU": "1",
    "OMP_NUM_THREADS": "1",
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
SECONDS = 240  # that a job may take on a busy machine


def start(*launcher: str, **job) -> subprocess.Popen:
    """A toy run under a launcher, in a process group of its own."""
    job["folder"] = str(job["folder"])
    return subprocess.Popen(
        [sys.executable, *launcher, str(TOY), json.dumps(job)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and stderr; whatever is left of the group then is killed."""
    try:
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, errors


def on_processes(processes: int, **job) -> tuple[int, str]:
    """Status and stderr of a toy run on some processes, which asserts that there are so many."""
    text = json.dumps({"processes": processes, **job, "folder": str(job["folder"])})
    done = forked(program(TOY, text), processes)
    return done.returncode, done.stderr


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def keys_by_step(folder: Path) -> dict[int, list]:
    """Step -> samples of all ranks in order, of the last time it was done."""
    ranks = [
        dict(json.loads(line) for line in file.read_text().splitlines())
        for file in sorted(folder.glob(".keys-*"))
    ]
    return {step: [key for rank in ranks for key in rank[step]] for step in ranks[0]}


@pytest.mark.slow
def test_f3_two_processes_resume_bit_exactly(tmp_path: Path) -> None:
    """F3 as F2 on 2 processes (gloo), asserting the world size: bitwise equal, and both ranks
    alike (each save compares them)."""
    for name in ("whole", "cut"):
        if name == "cut":
            status, _ = on_processes(2, folder=tmp_path / name, fault="die", at=4)
            assert status != 0
        changes = {"resume_from_checkpoint": "latest"}
        status, errors = on_processes(2, folder=tmp_path / name, changes=changes)
        assert status == 0, errors[-2000:]
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_f4_the_data_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """F4 world size 2 -> 1 -> 4, fixed global batch: identical sequence of samples; loss within
    1e-5; log names the change."""
    folder = tmp_path / "run"
    seen, said = {}, ""
    for processes, steps in ((2, 2), (1, 4), (4, 6)):
        for file in folder.glob(".keys-*"):
            file.unlink()
        changes = {"resume_from_checkpoint": "latest", "max_train_steps": steps}
        status, errors = on_processes(processes, folder=folder, changes=changes, dropout=0.0)
        assert status == 0, errors[-2000:]
        seen |= keys_by_step(folder)
        said += errors
    assert "on 1 processes a run that had 2" in said and "on 4 processes a run that had 1" in said
    train(toy_config(tmp_path / "one"), dropout=0.0)
    assert seen == keys_by_step(tmp_path / "one")
    pairs = zip(losses(folder), losses(tmp_path / "one"), strict=True)
    close = [abs(a["loss"] - b["loss"]) < 1e-5 for a, b in pairs if "loss" in a and "loss" in b]
    assert len(close) == 6 and all(close)


@pytest.mark.slow
def test_f7_one_rank_that_is_not_finite_makes_all_skip(tmp_path: Path) -> None:
    """F7 same decision on all ranks: only rank 1 sees an infinite loss (of finite gradient)."""
    changes = {"checkpointing_steps": 1, "checkpoints_total_limit": 0}
    folder = tmp_path / "run"
    status, errors = on_processes(2, folder=folder, changes=changes, fault="infinite", at=2)
    assert status == 0, errors[-2000:]
    before, after = (
        load_file(tmp_path / "run" / f"checkpoint-{step:06d}" / "model.safetensors")
        for step in (2, 3)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert losses(tmp_path / "run")[-2]["skipped_steps"] == 1.0


@pytest.mark.slow
def test_f8_torchrun_passes_a_signal_on_and_all_ranks_agree(tmp_path: Path) -> None:
    """F8 to torchrun: the ranks agree on the step, save, and end; resume = F2."""
    folder = tmp_path / "run"
    changes = {"max_train_steps": 10_000, "checkpointing_steps": 10_000}
    launcher = (*TORCHRUN, "--nproc_per_node=2")
    process = start(*launcher, folder=folder, processes=2, changes=changes, fault="dawdle")
    wait_for((folder / "metrics.jsonl").is_file)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    found, _ = newest_valid(folder)
    assert status != 0 and found is not None, errors[-2000:]
    assert len([line for line in losses(folder) if "loss" in line]) == found.step


@pytest.mark.slow
@pytest.mark.parametrize("launched_by", ["accelerate", "torchrun"])
def test_f9_a_run_whose_launcher_is_killed_saves_and_ends(tmp_path: Path, launched_by) -> None:
    """F9 parent dies (orphan): trainer notices, saves, exits within T."""
    from smalti.training.signals import GRACE

    folder = tmp_path / "run"
    changes = {"max_train_steps": 10_000, "checkpointing_steps": 10_000}
    launcher = {
        "accelerate": ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"),
        "torchrun": (*TORCHRUN, "--nproc_per_node=1"),
    }[launched_by]
    process = start(*launcher, folder=folder, changes=changes, fault="dawdle")
    wait_for((folder / "metrics.jsonl").is_file)
    child = int((folder / ".alive-0").read_text())
    assert child != process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    wait_for(lambda: not running(child))
    assert time.monotonic() - began < GRACE
    assert newest_valid(folder)[0] is not None
    assert not (folder / LOCK).exists()
    finish(process)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die", "hang"])
def test_f16_a_rank_that_dies_or_hangs_ends_the_job(tmp_path: Path, fault: str) -> None:
    """F16 a rank dies / a rank hangs: the whole job ends non-zero within the timeout, checkpoint
    intact."""
    folder = tmp_path / "run"
    changes = {"process_timeout": 10}
    status, _ = on_processes(2, folder=folder, changes=changes, fault=fault, at=3)
    assert status != 0
    found, skipped = newest_valid(folder)
    assert found is not None and found.step == 2 and skipped == []


@pytest.mark.slow
def test_f16_a_worker_that_dies_ends_the_run(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """F16 a worker dies: the run ends with an error, checkpoint intact."""
    import multiprocessing

    original = script.micro_batches_of

    def kill_workers(run, tokenizer, batches, step):
        if step == 2:
            for worker in multiprocessing.active_children():
                worker.kill()
        return original(run, tokenizer, batches, step)

    monkeypatch.setattr(script, "micro_batches_of", kill_workers)
    config = tokenizer_config(
        pictures, tmp_path / "run", dataloader_num_workers=1, max_train_steps=40
    )
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        script.train(config)
    found, skipped = newest_valid(config.output_dir)
    assert found is not None and found.step >= 2 and skipped == []


@pytest.mark.slow
def test_f23_a_rank_with_other_weights_is_named(tmp_path: Path) -> None:
    """F23 DDP sync check (parameter checksum), perturb one rank: detected, named."""
    folder = tmp_path / "run"
    status, errors = on_processes(2, folder=folder, fault="perturb", at=3)
    assert status != 0
    assert "process 1 has other weights of model than process 0" in errors
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-000002"]


@pytest.mark.slow
def test_f26_a_long_run_does_not_grow(tmp_path: Path) -> None:
    """F26 memory: 1 k steps; resident memory and file handles: no growth."""
    marks = []

    def mark(run, model, step, loss):
        if step in (200, 999):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            marks.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        return loss

    changes = {"max_train_steps": 1000, "checkpointing_steps": 100, "validation_steps": 100}
    train(toy_config(tmp_path / "run", **changes), mark)
    (memory, files), (later_memory, later_files) = marks
    assert later_memory - memory < 20e6
    assert later_files <= files
