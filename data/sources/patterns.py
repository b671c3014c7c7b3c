"""Which files a pattern of shards means."""

import re
from glob import glob
from itertools import product
from pathlib import Path

from smalti.errors import SmaltiError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_SHARDS = 1_000_000
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst")


def expand_shards(spec: str) -> list[str]:
    """Paths or URLs of shards, in order: {000..009} counts, {a,b} lists, * and ? look around.

    Raises:
        SmaltiError: a command instead of files, no such files, or a pattern that cannot be read.
    """
    if spec.startswith("pipe:") or "::" in spec:
        raise SmaltiError(
            f"--data is {spec}: commands and chained locations are not run; name files or URLs"
        )
    if spec.endswith(COMPRESSED):
        raise SmaltiError(f"--data is {spec}: decompress the shards, then name the .tar files")
    names = expand_braces(spec)
    if "://" in spec:
        return names
    paths = [Path(name).expanduser() for name in names]
    found = [path for pattern in paths for path in _files(pattern)]
    if not found:
        raise SmaltiError(f"no shards fit {spec}: check --data")
    return [str(path) for path in found]


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern with {a,b} and {000..009} stands for.

    Raises:
        SmaltiError: braces that hold neither, or too many names.
    """
    choices = [_choices(body, pattern) for body in BRACES.findall(pattern)]
    literals = BRACES.split(pattern)[::2]
    count = 1
    for options in choices:
        count *= len(options)
    if count > MAX_SHARDS:
        raise SmaltiError(f"{pattern} stands for {count} files: more than {MAX_SHARDS}")
    return [
        literals[0] + "".join(a + b for a, b in zip(chosen, literals[1:], strict=True))
        for chosen in product(*choices)
    ]


def _choices(body: str, pattern: str) -> list[str]:
    if found := RANGE.fullmatch(body):
        first, last = found.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        if not 0 <= int(last) - int(first) < MAX_SHARDS:
            raise SmaltiError(f"{{{body}}} in {pattern} does not count upwards: mend the range")
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," in body:
        return body.split(",")
    raise SmaltiError(f"{{{body}}} in {pattern} is neither a range nor a list: {{000..009}} counts")


def _files(pattern: Path) -> list[Path]:
    if pattern.is_dir():
        seen = sorted(path for path in pattern.iterdir() if path.name[0] != ".")
        for path in seen:
            if path.name.endswith(COMPRESSED):
                raise SmaltiError(f"{path} would be passed over: decompress it, or move it away")
        return [path for path in seen if path.suffix == ".tar"]
    if not pattern.exists() and any(letter in str(pattern) for letter in "*?["):
        return [Path(name) for name in sorted(glob(str(pattern)))]
    return [pattern]  # one that is missing is named when it is opened
