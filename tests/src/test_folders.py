"""Folders of results: swapped in whole, held by a lock, cleared of what killed processes left."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smalti import folders
from smalti.errors import BusyError, SmaltiError
from smalti.folders import (
    BEGINNING,
    UNREPORTED,
    FolderLock,
    claimed,
    locked,
    replacing_file,
    replacing_folder,
)


def write(target: Path, content: str = "new", **options) -> None:
    with replacing_folder(target, **options) as new:
        (new / "sub").mkdir()
        for name in ("a", "sub/b"):
            (new / name).write_text(content)


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


NEW = {"a": "new", "sub/b": "new"}


@pytest.fixture(params=["one call", "two renames"])
def exchanging(request, monkeypatch) -> None:
    """Where the system exchanges two folders in one call, and where it cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_exchange", lambda one, two: False)


@pytest.mark.usefixtures("exchanging")
def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for content in ("old", "new"):
        write(target, content)
    assert tree(target) == NEW and os.listdir(target.parent) == ["model"]


@pytest.mark.usefixtures("exchanging")
def test_what_else_the_folder_holds_is_kept_and_old_products_are_not(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    for name in (".git/objects/1", "notes.txt", "sub/notes.txt", "samples.png", ".tmp-a-0", "a"):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (tmp_path / "model" / "link").symlink_to("notes.txt")
    (tmp_path / "model").chmod(0o750)
    write(tmp_path / "model", products=("samples.png",))
    kept = dict.fromkeys((".git/objects/1", "notes.txt", "sub/notes.txt", "link"), "mine")
    assert tree(tmp_path / "model") == NEW | kept
    assert (tmp_path / "model" / "link").is_symlink()
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "model") as new:
        (new / "a").write_text("new")
        raise ZeroDivisionError
    assert tree(tmp_path / "model") == {"a": "old", "sub/b": "old"}
    assert os.listdir(tmp_path) == ["model"]


def test_the_target_is_checked_again_before_the_swap(tmp_path: Path) -> None:
    def refuse_anything() -> None:
        if (tmp_path / "model").exists():
            raise SmaltiError("it exists")

    refused = pytest.raises(SmaltiError, match="it exists")
    with refused, replacing_folder(tmp_path / "model", check=refuse_anything):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "a").write_text("mine")
    assert tree(tmp_path / "model") == {"a": "mine"} and os.listdir(tmp_path) == ["model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "model", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "disk" / "model") == NEW


def test_the_parts_of_a_result_are_written_in_it(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "model") as new:
        write(new)
        write(new / "part")
        assert sorted(os.listdir(new)) == ["a", "part", "sub"]
        assert len(os.listdir(tmp_path)) == 2  # it and the lock
    assert tree(tmp_path / "model") == NEW | {f"part/{name}": "new" for name in NEW}


def test_what_cannot_be_swapped_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    for folder in (Path(), tmp_path / "model", tmp_path):
        with pytest.raises(SmaltiError, match=r"contains the current folder.* choose a new folder"):
            write(folder)
        write(folder / "new")  # the remedy works
    (tmp_path / "file").touch()
    with pytest.raises(SmaltiError, match="is a file: choose a folder"):
        write(tmp_path / "file")


def refuse_what_exists(target: Path) -> None:
    if target.exists():
        raise SmaltiError("it exists")


def test_a_result_that_was_swapped_in_but_not_reported_is_replaced(tmp_path: Path) -> None:
    target, check = tmp_path / "model", lambda: refuse_what_exists(tmp_path / "model")
    write(target, "old", check=check, retry=True)
    assert not (target / UNREPORTED).exists()
    with pytest.raises(SmaltiError, match="it exists"):
        write(target, check=check, retry=True)
    (target / UNREPORTED).touch()  # its process was killed just after the swap
    with pytest.raises(SmaltiError, match="it exists"):
        write(target, check=check)
    write(target, check=check, retry=True)
    assert tree(target) == NEW


@pytest.mark.parametrize("same", [True, False])
def test_a_file_that_was_swapped_in_but_not_reported_is_replaced(
    tmp_path: Path, same: bool
) -> None:
    target = tmp_path / "a.pt"

    def write_file(content: str) -> None:
        check = lambda: refuse_what_exists(target)  # noqa: E731
        with replacing_file(target, check=check, retry=True) as new:
            new.write_text(content)

    write_file("old")
    left = tmp_path / ".tmp-a.pt-0123abcd"
    left.hardlink_to(target) if same else left.write_text("old")
    if same:
        write_file("new")
    else:
        with pytest.raises(SmaltiError, match="it exists"):
            write_file("new")
    assert target.read_text() == ("new" if same else "old") and os.listdir(tmp_path) == ["a.pt"]


def test_only_the_attempts_at_this_target_are_cleared(tmp_path: Path) -> None:
    cleared = [".tmp-model-0123abcd", ".tmp-model-4242", ".old-model-0123abcd"]
    kept = [".tmp-model-2-0123abcd", ".tmp-mod-0123abcd", ".tmp-model-x", "model-4242"]
    write(tmp_path / "model", "old")
    for name in cleared + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    write(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "model"])


def test_a_folder_that_was_set_aside_is_put_back(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".old-model-0123abcd")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "model"):
        raise ZeroDivisionError
    assert tree(tmp_path / "model") == {"a": "old", "sub/b": "old"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "hold",
    [
        lambda path: replacing_folder(path),
        lambda path: claimed(path, lambda: None),
        lambda path: locked(path),
    ],
)
def test_a_second_writer_is_refused_and_the_first_is_not_disturbed(
    tmp_path: Path, hold: Callable
) -> None:
    def second() -> None:
        with hold(tmp_path / "model"):
            pass

    refused = pytest.raises(BusyError, match=rf"another run is active in .*process {os.getpid()}")
    with ThreadPoolExecutor(1) as pool, hold(tmp_path / "model"), refused:
        pool.submit(second).result()
    second()
    assert set(os.listdir(tmp_path)) <= {"model"}


def test_a_locked_folder_is_cleared_and_removed_if_nothing_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-000001.png-17").touch()
    for name in ("a", "b"):
        with locked(tmp_path / name):
            assert os.listdir(tmp_path / name) == [".lock"]
    assert os.listdir(tmp_path) == ["a"]
    assert FolderLock(tmp_path / "a").holder() is None


def test_the_holder_may_take_the_lock_again_and_keeps_it(tmp_path: Path) -> None:
    outer = FolderLock(tmp_path)
    outer.acquire()
    with FolderLock(tmp_path):
        pass
    with ThreadPoolExecutor(1) as pool, pytest.raises(BusyError):
        pool.submit(FolderLock(tmp_path).acquire).result()
    outer.release()
    assert os.listdir(tmp_path) == []


def test_a_lock_without_a_holder_is_taken_over_soon(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.path.touch()  # its process was killed before it wrote its name
    with pytest.raises(BusyError, match="an unknown process"):
        lock.acquire()
    os.utime(lock.path, (time.time() - BEGINNING - 1,) * 2)
    lock.acquire()
    lock.release()
