"""A generation job keeps a hash of each picture, may be extended, and may be killed anywhere."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from generated import files_of, manifest
from PIL import Image
from runs import in_a_fork, kill_at

from smalti.cli import main
from smalti.data.sources.base import open_source
from smalti.errors import SmaltiError
from smalti.files import read_json, sha256_of, write_hashed_json
from smalti.folders import FolderLock, locked
from smalti.pipelines.generation import continued_labels, generate_folder
from smalti.pipelines.manifest import problems_in
from smalti.pipelines.picture_files import class_folders
from smalti.pipelines.pipeline import Pipeline

CLASSES = ("cat", "dog", "a/b: c")
LABELS = [0, 1, 2, 0, 1]


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


def generate(pipe: Pipeline, folder: Path, labels=LABELS, **changes) -> list[Path]:
    options = {"seed": 1, "guidance_scale": 1.0, "batch_size": 2, **changes}
    return generate_folder(pipe, folder, labels, **options)


def test_the_manifest_names_file_class_and_hash_of_each_picture(pipe, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    paths = generate(pipe, folder)
    assert manifest(folder) == [
        {
            "index": index,
            "seed": 1,
            "file": f"{index:06d}.png",
            "class": CLASSES[label],
            "label": label,
            "sha256": sha256_of(paths[index]),
        }
        for index, label in enumerate(LABELS)
    ]
    records = ["generation.json", "index.html", "manifest.jsonl"]
    assert sorted(os.listdir(folder)) == [*(f"{index:06d}.png" for index in range(5)), *records]


def test_a_folder_with_the_index_of_an_earlier_version_is_continued(
    pipe, tmp_path: Path, capsys
) -> None:
    """It has index.json instead of manifest.jsonl, and no page."""
    generate(pipe, tmp_path / "whole")
    folder = tmp_path / "old"
    paths = generate(pipe, folder, LABELS[:3])
    names = ("file", "class", "label", "sha256")
    entries = [{name: row[name] for name in names} for row in manifest(folder)]
    write_hashed_json(folder / "index.json", {"pictures": entries})
    for name in ("manifest.jsonl", "index.html"):
        (folder / name).unlink()
    assert main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "3 of 3, seed 1" in shown and "each picture has its hash" in shown
    times = [path.stat().st_mtime_ns for path in paths]
    generate(pipe, folder)
    assert [path.stat().st_mtime_ns for path in paths] == times
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_a_killed_process_of_an_earlier_version_loses_nothing(pipe, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    paths = generate(pipe, folder, LABELS[:3])
    lines = [json.dumps({"file": row["file"], "sha256": row["sha256"]}) for row in manifest(folder)]
    (folder / ".index-00000.jsonl").write_text("\n".join([*lines[:2], lines[2][:9]]))
    for name in ("manifest.jsonl", "index.html"):
        (folder / name).unlink()
    times = [path.stat().st_mtime_ns for path in paths]
    generate(pipe, folder, LABELS[:3])
    kept = [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)]
    assert kept == [True, True, False]
    assert len(manifest(folder)) == 3 and not (folder / ".index-00000.jsonl").exists()


def test_swapped_edited_and_foreign_files_are_found(pipe, tmp_path: Path, caplog, capsys) -> None:
    folder = tmp_path / "a"
    generate(pipe, folder)
    before = files_of(folder)
    assert main(["info", str(folder)]) == 0
    assert "5 of 5, seed 1" in capsys.readouterr().out
    (folder / "000000.png").rename(folder / "x")
    (folder / "000001.png").rename(folder / "000000.png")
    (folder / "x").rename(folder / "000001.png")
    Image.new("RGB", (16, 16)).save(folder / "000003.png")
    (folder / "000004.png").unlink()
    Image.new("RGB", (16, 16)).save(folder / "holiday.png")
    changed = [folder / f"00000{i}.png" for i in (0, 1, 3)]
    wrong = [f"{path} is not the picture that this job wrote" for path in changed]
    wrong.append(f"{folder / '000004.png'} is missing")
    foreign = f"{folder / 'holiday.png'} was not written by this job"
    assert problems_in(folder) == [*wrong, foreign]
    assert main(["info", str(folder)]) == 1
    assert all(problem in capsys.readouterr().out for problem in wrong[:1])
    generate(pipe, folder)
    assert [message for message in caplog.messages if "generated again" in message] == [
        f"{problem}: it is generated again" for problem in wrong[:3]
    ]
    assert "1 files that this job did not write, for example holiday.png" in caplog.text
    (folder / "holiday.png").unlink()
    assert files_of(folder) == before


def test_an_interrupted_job_is_not_damaged(pipe, tmp_path: Path, capsys) -> None:
    """A process that was killed had written a picture, and not yet noted its hash."""
    folder = tmp_path / "a"
    generate(pipe, folder, LABELS[:3])
    generate(pipe, tmp_path / "b")
    for name in ("generation.json", "000003.png"):
        shutil.copy(tmp_path / "b" / name, folder / name)
    assert problems_in(folder) == []
    assert main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "3 of 5, seed 1" in shown and "repeat the command" in shown
    (folder / "holiday.png").touch()
    assert problems_in(folder) == [f"{folder / 'holiday.png'} was not written by this job"]
    (folder / "holiday.png").unlink()
    generate(pipe, folder)
    assert files_of(folder) == files_of(tmp_path / "b")


def test_a_folder_of_smalti_0_1_0_without_hashes_is_kept(pipe, tmp_path: Path, capsys) -> None:
    paths = generate(pipe, tmp_path / "a")
    for name in ("manifest.jsonl", "index.html"):
        (tmp_path / "a" / name).unlink()
    settings = read_json(tmp_path / "a" / "generation.json")
    settings = {name: settings[name] for name in settings if name not in ("layout", "sha256")}
    (tmp_path / "a" / "generation.json").write_text(json.dumps(settings))
    assert main(["info", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "5 of 5, seed 1" in shown and "no hash: smalti 0.1.0 recorded none" in shown
    paths[2].write_bytes(b"cut")
    times = [path.stat().st_mtime_ns for path in paths]
    generate(pipe, tmp_path / "a")
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert len(manifest(tmp_path / "a")) == 5


@pytest.mark.slow
def test_a_job_that_is_killed_anywhere_ends_with_the_same_files(pipe, tmp_path: Path) -> None:
    """F21: at every file operation."""
    labels = LABELS[:2]
    generate(pipe, tmp_path / "whole", labels)
    whole = files_of(tmp_path / "whole")
    torch.set_num_threads(1)
    for number in itertools.count(1):
        folder = tmp_path / "cut"

        def killed(number: int = number, folder: Path = folder) -> None:
            kill_at(number, folder)
            generate(pipe, folder, labels)

        status = in_a_fork(killed)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        with locked(folder):
            generate(pipe, folder, labels)
        assert files_of(folder) == whole, f"killed at operation {number}"
        shutil.rmtree(folder)
    assert number > 10


# -- more pictures ----------------------------------------------------------------------------


def test_more_pictures_of_a_job_keep_the_old_ones(pipe, tmp_path: Path) -> None:
    old = generate(pipe, tmp_path / "a", LABELS[:2])
    times = [path.stat().st_mtime_ns for path in old]
    generate(pipe, tmp_path / "a")
    assert [path.stat().st_mtime_ns for path in old] == times
    generate(pipe, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with pytest.raises(SmaltiError, match="holds 5 images of this job, and 2 are wanted: ask"):
        generate(pipe, tmp_path / "a", LABELS[:2])
    with pytest.raises(SmaltiError, match="its labels differs"):
        generate(pipe, tmp_path / "a", [0, 2, 2, 0, 1, 1])
    with pytest.raises(SmaltiError, match="its layout differs"):
        generate(pipe, tmp_path / "a", layout="class")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_labels_of_a_larger_job_begin_with_those_of_the_smaller(tmp_path: Path) -> None:
    assert continued_labels(tmp_path, [0, 0, 1, 1]) == ([0, 0, 1, 1], [])
    (tmp_path / "generation.json").write_text('{"labels": [0, 0, 1, 1]}')
    for wanted, order in (
        ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1]),  # 3 of each class instead of 2
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]),  # another class
        ([0, 1, 0, 1], [0, 0, 1, 1]),  # the same number, in another order
        ([0, 1, 2], [0, 1, 2]),  # fewer: refused when the job begins
    ):
        assert continued_labels(tmp_path, wanted)[0] == order
        if wanted != [0, 1, 2]:
            (tmp_path / "b").mkdir(exist_ok=True)
            (tmp_path / "b" / "generation.json").write_text(json.dumps({"labels": order}))
            assert continued_labels(tmp_path / "b", wanted)[0] == order


def test_the_command_extends_a_finished_folder(pipe, tmp_path: Path, capsys) -> None:
    pipe.save_pretrained(tmp_path / "pipe")

    def run(*flags: str) -> int:
        places = ["--model", str(tmp_path / "pipe"), "--output_dir", str(tmp_path / "out")]
        return main(["generate", *places, "--layout", "class", *flags])

    assert run("--num_images", "4") == 0
    before = files_of(tmp_path / "out")
    images = [name for name in before if name.endswith(".png")]
    assert images == ["a_b_ c/000002.png", "cat/000000.png", "cat/000003.png", "dog/000001.png"]
    assert run("--num_images", "7") == 0
    after = files_of(tmp_path / "out")
    assert all(after[name] == before[name] for name in images)
    assert len([name for name in after if name.endswith(".png")]) == 7
    assert run("--num_images_per_class", "3") == 0  # 9 pictures, 7 of which are there
    assert all(files_of(tmp_path / "out")[n] == after[n] for n in after if n.endswith(".png"))
    assert len(manifest(tmp_path / "out")) == 9
    shown = open_source(str(tmp_path / "out"))
    assert shown.classes == ("a_b_ c", "cat", "dog") and len(shown) == 9
    assert run("--num_images", "4") == 2 and run("--num_images", "0") == 2
    assert run("--num_images", "9", "--num_images_per_class", "3") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert "ask for 9 or more" in errors[-3] and "give one of them" in errors[-1]


def test_each_class_has_a_folder_of_its_own() -> None:
    names = ["cat", "Cat", "..", "", "a/b", "a:b", "x" * 300, "\x1b[1mred", "Käse"]
    folders = class_folders(names)
    assert len({name.lower() for name in folders}) == len(names)
    assert folders[0] == "cat (0)" and folders[1] == "Cat (1)" and folders[8] == "Käse"
    assert all(Path(name).name == name and len(name.encode()) < 200 for name in folders)
    assert not any(name.startswith(".") or "\x1b" in name for name in folders)


# -- one job at a time ------------------------------------------------------------------------


def test_a_second_job_in_the_folder_is_refused_and_leftovers_are_cleared(
    pipe, tmp_path: Path, capsys
) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    out = tmp_path / "out"
    job = ["generate", "--model", str(tmp_path / "pipe"), "--output_dir", str(out)]
    job += ["--num_images", "2"]
    (out / "cat").mkdir(parents=True)
    for name in (".tmp-000000.png-12", "cat/.tmp-000000.png-0123abcd"):
        (out / name).touch()
    with FolderLock(out):
        assert in_a_fork(lambda: os._exit(main(job))) == 2
    (out / ".tmp-pipeline-0123abcd").mkdir()
    with FolderLock(out / "pipeline", beside=True):  # another process is writing this one
        shutil.rmtree(out / "cat")
        assert main(job) == 0
        assert (out / ".tmp-pipeline-0123abcd").is_dir()
    assert main(job) == 0
    records = ["generation.json", "index.html", "manifest.jsonl"]
    assert sorted(os.listdir(out)) == ["000000.png", "000001.png", *records]
