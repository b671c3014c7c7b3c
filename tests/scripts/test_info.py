"""`smalti info` reports what a folder is, whether it is complete, and how to continue."""

import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from toy_run import toy_config
from toy_run import train as train_toy

import smalti
from smalti.cli import main
from smalti.data.latent_cache.shard import shard_path
from smalti.folders import LOCK, FolderLock
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.info import info
from smalti.training.checkpoint import checkpoints

# A process that takes the folder of a run, and keeps it.
OTHER_RUN = """
import sys, time
from pathlib import Path
from smalti.folders import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("taken", flush=True)
time.sleep(60)
"""


def told(capsys, path: Path, status: int = 0) -> dict[str, str]:
    """What the command prints; the last line of each name."""
    assert main(["info", str(path)]) == status
    rows = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return {name.strip(): value.strip() for name, value in rows}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_a_recipe_that_was_edited_is_reported(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    train_toy(toy_config(folder))
    assert "recipe" not in told(capsys, folder)
    recipe = folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace("max_train_steps: 6", "max_train_steps: 7"))
    assert told(capsys, folder)["recipe"] == (
        "config.yaml differs from the checkpoint in max_train_steps"
    )


def test_a_run_reports_its_step_and_how_to_continue(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    train_toy(toy_config(folder))
    lines = told(capsys, folder)
    assert lines["kind"] == "toy run" and lines["step"] == "6 of 6"
    assert lines["numbers"].startswith("59 in")  # 4 x 6 + 6 + 6 x 4 + 4, and a counter
    assert lines["files"] == "ema, model, optimizer"
    assert lines["verified"].startswith("yes") and "images_per_second" in lines["speed"]
    assert lines["result"] == str(folder / "model")
    assert lines["next"] == (
        f"smalti toy --config {folder}/config.yaml --output_dir {folder} "
        "--resume_from_checkpoint latest"
    )
    shutil.rmtree(folder / "model")
    assert told(capsys, folder)["result"] == f"not made yet: {folder / 'model'} does not exist"
    (folder / "exported.json").unlink()
    assert told(capsys, folder)["result"] == "not made yet"
    damage(checkpoints(folder)[-1] / "model.safetensors")
    lines = told(capsys, folder, status=1)
    assert lines["step"] == "4 of 6" and "model.safetensors is damaged" in lines["damaged"]


def test_all_checkpoints_of_a_run_are_verified(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    train_toy(toy_config(folder))
    assert len(checkpoints(folder)) > 1
    damage(checkpoints(folder)[0] / "ema.safetensors")
    lines = told(capsys, folder, status=1)
    assert lines["step"] == "6 of 6" and "ema.safetensors is damaged" in lines["damaged"]


def test_an_active_run_reports_its_process(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    train_toy(toy_config(folder))
    other = subprocess.Popen([sys.executable, "-c", OTHER_RUN, folder], stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None and other.stdout.readline() == b"taken\n"
        before = (folder / LOCK).read_bytes()
        for path in (folder, checkpoints(folder)[-1]):
            lines = told(capsys, path)
            assert lines["active"] == f"yes: process {other.pid} on {socket.gethostname()}"
            assert lines["verified"].startswith("yes")
            assert "next" not in lines  # the lock would refuse it
        assert (folder / LOCK).read_bytes() == before
        other.kill()
    for path in (folder, checkpoints(folder)[-1]):  # the lock of a dead process
        assert (folder / LOCK).is_file() and "active" not in told(capsys, path)


def test_a_run_before_its_first_step_is_recognised(tmp_path: Path, capsys) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    lines = told(capsys, tmp_path)
    assert lines["kind"] == "training run" and lines["active"].startswith("yes: process ")
    assert lines["step"] == "no checkpoint to resume from"
    lock.release()
    (tmp_path / LOCK).touch()  # that of another program
    assert main(["info", str(tmp_path)]) == 2


def test_a_checkpoint_reports_whether_it_is_complete(tmp_path: Path, capsys) -> None:
    train_toy(toy_config(tmp_path / "run"))
    path = checkpoints(tmp_path / "run")[-1]
    assert told(capsys, path)["next"].endswith(f"--resume_from_checkpoint {path}")
    damage(path / "optimizer.safetensors")
    assert "optimizer.safetensors is damaged" in told(capsys, path, status=1)["verified"]


def test_latents_report_their_tokenizer(tokenizer, pictures, tmp_path: Path, capsys) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    job = EncodeConfig(
        data=str(pictures), tokenizer=tmp_path / "tok", output_dir=tmp_path / "latents"
    )
    encode(job)
    lines = told(capsys, tmp_path / "latents")
    assert lines["kind"] == "latent cache" and lines["tokenizer"] == tokenizer.fingerprint[:12]
    assert lines["latents"].endswith("64 codes of 16 (8 x 8)")
    one = told(capsys, tmp_path / "latents" / "train")
    assert one["verified"] == "yes: all shards"
    assert one["next"] == lines["next"]  # a prior takes the folder of both splits
    assert f"--latents {tmp_path / 'latents'} " in one["next"]
    damage(tmp_path / "latents" / "train" / "shard-00000.safetensors")
    assert told(capsys, tmp_path / "latents" / "train", status=1)["verified"].startswith(
        "no: shard"
    )


def test_unfinished_latents_are_reported(pictures, tmp_path: Path, capsys) -> None:
    latents = tmp_path / "my latents"
    for split in ("train", "heldout"):
        (latents / split).mkdir(parents=True)
        shard_path(latents / split, 0).write_bytes(b"cut")
    lines = told(capsys, latents, status=1)
    assert lines["kind"] == "latent cache" and lines["verified"].startswith("train: no: not fin")
    assert f"--latents '{latents}'" in lines["next"]  # as a shell takes it
    assert told(capsys, latents / "train", status=1)["verified"].startswith("no: not finished")


def test_a_cache_without_its_other_split_is_not_recommended(
    tokenizer, pictures, tmp_path: Path, capsys
) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    latents = tmp_path / "latents"
    encode(EncodeConfig(data=str(pictures), tokenizer=tmp_path / "tok", output_dir=latents))
    shutil.rmtree(latents / "heldout")
    for path in (latents, latents / "train"):
        assert "next" not in told(capsys, path)


def test_shards_with_a_manifest_are_recognised(tmp_path: Path, capsys) -> None:
    shards = tmp_path / "sets" / "my shards"
    shards.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as archive:
            for key in range(3):
                archive.addfile(tarfile.TarInfo(f"{key}.png"))
                label = tarfile.TarInfo(f"{key}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(str(key).encode()))
    listed = str(tmp_path / "bad.txt")
    check = ["check-data", "--data", str(shards), "--write_manifest", "--bad_files", listed]
    assert main(check) == 1  # its pictures are empty
    capsys.readouterr()
    lines = told(capsys, shards)
    assert lines["kind"] == "WebDataset shards" and lines["shards"] == "2"
    assert lines["pictures"].startswith("6") and lines["classes"] == "3"
    assert lines["verified"].startswith("yes")
    assert lines["next"] == f"smalti check-data --data '{shards}'"
    assert told(capsys, shards.parent)["my shards"] == "WebDataset shards"
    (shards / "1.tar").unlink()
    assert "1.tar is missing" in told(capsys, shards, status=1)["verified"]
    (shards / "0.tar").unlink()
    assert "holds no pictures" in told(capsys, shards, status=1)["verified"]


def test_models_and_pipelines_report_their_size(tokenizer, prior, tmp_path: Path, capsys) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    lines = told(capsys, tmp_path / "tok")
    count = sum(p.numel() for p in tokenizer.parameters())
    assert lines["kind"] == "vq tokenizer" and lines["parameters"] == f"{count:,}"
    assert lines["type"] == "VQTokenizer, 16 x 16 px"
    prior.save_pretrained(tmp_path / "prior")
    assert told(capsys, tmp_path / "prior")["kind"] == "next-token prior"
    own = type(prior)(replace(prior.config, tokenizer_fingerprint=tokenizer.fingerprint))
    smalti.Pipeline(tokenizer, own, ("a", "b", "c")).save_pretrained(tmp_path / "pipe")
    lines = told(capsys, tmp_path / "pipe")
    assert lines["kind"] == "pipeline" and lines["classes"] == "3: a, b, c"
    assert lines["next"] == f"smalti generate --model {tmp_path / 'pipe'}"
    (tmp_path / "pipe" / "prior" / "model.safetensors").write_bytes(b"x")
    assert told(capsys, tmp_path / "pipe", status=1)["verified"].startswith("no: ")


def test_models_without_hashes_are_told_apart(tokenizer, prior, tmp_path: Path, capsys) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    smalti.Pipeline(tokenizer, prior, ("a", "b", "c")).save_pretrained(tmp_path / "pipe")
    for name, record in (("tok", "config.json"), ("pipe", "model_index.json")):
        assert "have the hashes" in told(capsys, tmp_path / name)["verified"]
        content = json.loads((tmp_path / name / record).read_text())
        del content["sha256"]  # as smalti 0.1.0 saved it
        (tmp_path / name / record).write_text(json.dumps(content))
        assert told(capsys, tmp_path / name)["verified"].startswith("no hash: ")
    damage(tmp_path / "pipe" / "tokenizer" / "model.safetensors")
    assert "is damaged" in told(capsys, tmp_path / "pipe", status=1)["verified"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a folder: smalti info PATH"),
        (["nowhere"], "folder not found: nowhere"),
        (["."], "is nothing that smalti writes"),
        (["odd"], "is nothing that smalti writes"),
        (["run"], "exported.json does not contain settings"),
    ],
)
def test_unknown_folders_are_one_line(
    tmp_path: Path, monkeypatch, capsys, arguments, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "odd", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"type": ["vq"]}')
    for name, text in (("config.yaml", "a: 1"), ("metrics.jsonl", ""), ("exported.json", "[]")):
        (tmp_path / "run" / name).write_text(text)
    arguments = ["here" if a == "." else a for a in arguments]
    assert main(["info", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_edited_pictures_are_recognised(tmp_path: Path, capsys) -> None:
    for name in ("000000.png", "000001.png", "strip.png"):
        (tmp_path / name).touch()
    found = told(capsys, tmp_path)
    assert found == {
        "kind": "edited pictures",
        "pictures": "2, and strip.png with the originals",
        "verified": "no hash: no number is missing",
    }
    (tmp_path / "000000.png").rename(tmp_path / "000003.png")
    assert told(capsys, tmp_path, status=1)["verified"] == "no: 000000.png is missing"


def test_a_folder_of_folders_lists_them(tmp_path: Path, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path / "vq")
    (tmp_path / "notes").mkdir()
    found = info(tmp_path)
    assert [name for name, _ in found.lines] == ["kind", "vq"]
    assert "give one of them" in found.lines[0][1]
    assert found.lines[1][1] == info(tmp_path / "vq").lines[0][1]
