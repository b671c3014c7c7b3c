"""What tests ask of the folder of a generation job: its files and its manifest."""

from pathlib import Path

from smalti.files import checked_lines


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest(folder: Path) -> list[dict]:
    """The rows of a job, none of which is damaged."""
    rows, damaged = checked_lines(folder / "manifest.jsonl", "index")
    assert damaged == []
    return rows
