"""What `smalti info` reports about a folder: one type for runs, caches, image sets and models."""

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Info:
    """Lines (name, value) about a folder, and whether its contents are complete and undamaged."""

    lines: list[tuple[str, str]]
    whole: bool = True


def command(*words: str | Path) -> str:
    """A command of smalti, quoted for a shell."""
    return shlex.join(["smalti", *map(str, words)])
