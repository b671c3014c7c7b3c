"""The saved index of a large folder: what it saves, what it notices, and where it is kept."""

import gzip
import os
import time
from pathlib import Path

import pytest

from smalti.data.sources import index
from smalti.data.sources.index import cache_folder, list_folder

FOLDERS, FILES = 30, 100
HOUR = 3600 * 10**9  # ns


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SAVED_FROM", 100)
    return tmp_path / "cache" / "folders"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """3,000 small files in 30 folders that have not changed for an hour."""
    root = tmp_path / "tree"
    for folder in range(FOLDERS):
        (root / f"class {folder:02}" / "deep").mkdir(parents=True)
        for number in range(FILES):
            path = root / f"class {folder:02}" / ("deep" if number % 2 else ".") / f"{number}.png"
            path.write_bytes(b"x" * number)
    now = time.time_ns() + HOUR
    monkeypatch.setattr(time, "time_ns", lambda: now)
    return root


class Calls:
    """Counts system calls for files and folders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.listed: list[str] = []
        self.stats = 0
        scandir, stat = os.scandir, os.stat

        def counted_scandir(path):
            self.listed.append(os.fspath(path))
            return scandir(path)

        def counted_stat(*args, **kwargs):
            self.stats += 1
            return stat(*args, **kwargs)

        monkeypatch.setattr(os, "scandir", counted_scandir)
        monkeypatch.setattr(os, "stat", counted_stat)


def test_the_second_time_one_call_per_folder_and_none_per_file(
    tree: Path, cache: Path, monkeypatch
) -> None:
    first = list_folder(tree)
    assert len(first.files) == FOLDERS * FILES == len(first.sizes)
    assert all(size == int(Path(n).stem) for n, size in zip(first.files, first.sizes, strict=True))
    assert len(list(cache.iterdir())) == 1 and not any(".json" in name for name in first.files)
    calls = Calls(monkeypatch)
    assert list_folder(tree) == first
    # One per folder, and a few for the index itself.
    assert not calls.listed and calls.stats <= 2 * FOLDERS + 1 + 10


def test_only_folders_that_changed_are_listed_again(tree: Path, cache: Path, monkeypatch) -> None:
    first = list_folder(tree)
    (tree / "class 03" / "new.png").write_bytes(b"new")
    (tree / "class 07" / "deep" / "1.png").unlink()
    (tree / "class 09" / "0.png").rename(tree / "class 09" / "renamed.png")
    calls = Calls(monkeypatch)
    second = list_folder(tree)
    changed = ["class 03", "class 07/deep", "class 09"]
    assert sorted(calls.listed) == [str(tree / name) for name in changed]
    gone, new = set(first.files) - set(second.files), set(second.files) - set(first.files)
    assert gone == {"class 07/deep/1.png", "class 09/0.png"}
    assert new == {"class 03/new.png", "class 09/renamed.png"}
    assert second.sizes[second.files.index("class 03/new.png")] == 3


def test_a_folder_that_changed_just_before_it_was_listed_is_not_trusted(
    tree: Path, cache: Path, monkeypatch
) -> None:
    """It may change again within one step of the clock of the file system."""
    os.utime(tree / "class 05", ns=(time.time_ns(), time.time_ns()))
    list_folder(tree)
    calls = Calls(monkeypatch)
    list_folder(tree)
    assert calls.listed == [str(tree / "class 05")]


def test_a_file_is_noticed_if_the_time_of_its_folder_was_set_back(tree: Path, cache: Path) -> None:
    """As tar and rsync do, which restore the times of folders."""
    first, folder = list_folder(tree), tree / "class 04"
    before = folder.stat()
    (folder / "new.png").write_bytes(b"new")
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert set(list_folder(tree).files) - set(first.files) == {"class 04/new.png"}


def test_a_file_written_over_in_place_is_not_noticed(tree: Path, cache: Path) -> None:
    """What the documentation says of it."""
    list_folder(tree)
    (tree / "class 01" / "2.png").write_bytes(b"longer than before")
    listing = list_folder(tree)
    assert listing.sizes[listing.files.index("class 01/2.png")] == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", gzip.compress(b"[1]"), gzip.compress(b"{}")],
    ids=["empty", "junk", "list", "object"],  # compressed bytes contain the time
)
def test_a_damaged_index_is_replaced(tree: Path, cache: Path, content: bytes, caplog) -> None:
    first = list_folder(tree)
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert list_folder(tree) == first and "is damaged" in caplog.text
    assert path.read_bytes() != content


def test_an_empty_variable_turns_it_off_and_small_folders_have_none(
    tree: Path, cache: Path, monkeypatch
) -> None:
    list_folder(tree / "class 00" / "deep")
    assert not cache.exists()
    monkeypatch.setenv("SMALTI_CACHE", "")
    list_folder(tree)
    assert not cache.exists() and cache_folder() is None


def test_it_is_kept_in_the_users_cache_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SMALTI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "smalti"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "smalti"


def test_a_cache_folder_that_cannot_be_written_is_named(
    tree: Path, cache: Path, monkeypatch, caplog
) -> None:
    cache.parent.write_text("a file")
    assert len(list_folder(tree).files) == FOLDERS * FILES
    assert "no index is saved" in caplog.text and "SMALTI_CACHE names another" in caplog.text


def test_links_loops_hidden_files_and_pipes(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.png").write_bytes(b"1")
    (root / "a" / ".hidden").write_bytes(b"1")
    (root / "a" / "up").symlink_to(root)  # a loop
    (root / "b").symlink_to(root / "a")
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    (root / "self.png").symlink_to("self.png")
    os.mkfifo(root / "pipe.png")
    os.close(os.open(os.fsencode(root) + b"/\xff.png", os.O_CREAT | os.O_WRONLY))
    listing = list_folder(root)
    assert sorted(listing.files) == ["a/1.png", "b/1.png", "gone.png", "self.png", "\udcff.png"]
    assert listing.hidden == ["a/.hidden", "b/.hidden"] and listing.special == ["pipe.png"]
