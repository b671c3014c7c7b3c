"""The saved index of a large folder: its files and their sizes, so that it opens quickly again.

To list a folder of a million files takes a system call for each. The result is therefore saved in
the user's cache folder, and the next time only the folders in it are asked when they changed, with
one `stat` each; those that did are listed again. A file that is added, removed or renamed changes
its folder. One that is written over in place does not: its new size is not noticed.
"""

import contextlib
import gzip
import json
import logging
import os
import stat
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from smalti.data.sources.download import folder_name
from smalti.data.sources.listing import HIDDEN, SPECIAL, PassedOver
from smalti.files import replacing

logger = logging.getLogger(__name__)

CACHE = "SMALTI_CACHE"  # environment variable: the cache folder; set, but empty: nothing is cached
SAVED_FROM = 10_000  # files; a smaller folder is listed each time
VERSION = 1
# File systems record times in steps. A folder that changed this shortly before it was listed may
# change again without another time, and is not trusted.
SETTLED = 2 * 10**9  # ns
UNTRUSTED = -1


def cache_folder() -> Path | None:
    """Where indices are kept: `SMALTI_CACHE`, or `smalti` in the user's cache folder; None: an
    empty `SMALTI_CACHE` turns them off."""
    named = os.environ.get(CACHE)
    if named is not None:
        return Path(named).expanduser() if named else None
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "smalti"


@dataclass
class Entries:
    """What one folder directly contains, all sorted by name."""

    changed: int  # ns: when an entry was last added, removed or renamed
    folders: list[str] = field(default_factory=list)
    # Of the files, with "/" between them, which no name contains. A text of many names is read and
    # put behind the name of the folder in a fraction of the time that a list takes.
    names: str = ""
    sizes: list[int] = field(default_factory=list)  # bytes, of the files
    hidden: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)  # pipes, devices and sockets


@dataclass
class FolderListing:
    """Everything below a folder: relative paths with "/", in the order of their folders."""

    files: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)

    def count_unread(self, passed: PassedOver) -> None:
        """Count what is never opened: hidden files, pipes, devices and sockets."""
        for kind, names in ((HIDDEN, self.hidden), (SPECIAL, self.special)):
            for name in names:
                passed.add(kind, name)


def files_below(folder: Path, passed: PassedOver) -> Iterator[Path]:
    """Every file below a folder; hidden files, pipes and devices are counted in `passed`."""
    listing = list_folder(folder)
    listing.count_unread(passed)
    yield from (folder / name for name in listing.files)


def list_folder(root: Path) -> FolderListing:
    """Every file below a folder, from its index where nothing changed. Links are followed, except
    to a folder that contains them.

    Raises:
        OSError: it is not a folder, or cannot be read.
    """
    path = _index_path(root)
    known = {} if path is None else _load(path)
    listing, current, listed, texts = FolderListing(), dict[str, Entries](), 0, list[str]()
    now = time.time_ns()
    with tqdm(desc=f"list {root}", unit=" files", delay=2, leave=False) as bar:
        for name, entries, is_new in _walk(root, known, bar):
            current[name] = entries
            listed += is_new
            prefix = f"{name}/" if name else ""
            if entries.sizes:
                listing.sizes += entries.sizes
                texts.append(prefix + entries.names.replace("/", f"\0{prefix}"))
            listing.hidden += [prefix + entry for entry in entries.hidden]
            listing.special += [prefix + entry for entry in entries.special]
    listing.files = "\0".join(texts).split("\0") if texts else []
    if path is not None and (listed or current.keys() != known.keys()):
        if len(listing.files) >= SAVED_FROM:
            _save(path, current, now)
        elif known:
            with contextlib.suppress(OSError):  # it is not used again
                path.unlink()
    return listing


def _walk(root: Path, known: dict[str, Entries], bar: tqdm) -> Iterator[tuple[str, Entries, bool]]:
    """Relative name, content, and whether it was listed now, of a folder and all below it."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        name, above = waiting.pop()
        folder = os.path.join(root, name)
        found = os.stat(folder)
        here = (found.st_dev, found.st_ino)
        if here in above:  # a loop of links
            continue
        entries = known.get(name)
        # Programs that unpack or copy set the time of modification back, not that of the change.
        changed = max(found.st_mtime_ns, found.st_ctime_ns)
        is_new = entries is None or entries.changed != changed
        if entries is None or is_new:
            entries = _entries_of(folder, changed, bar)
        yield name, entries, is_new
        inside = (f"{name}/{entry}" if name else entry for entry in reversed(entries.folders))
        waiting += [(folder, above | {here}) for folder in inside]


def _entries_of(folder: str, changed: int, bar: tqdm) -> Entries:
    entries, names = Entries(changed), list[str]()
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: os.fsencode(entry.name)):
            if entry.name.startswith("."):
                entries.hidden.append(entry.name)
            elif _is_folder(entry):
                entries.folders.append(entry.name)
            else:
                _add_file(entry, entries, names)
                bar.update()
    entries.names = "/".join(names)
    return entries


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which is named when it is opened
        return False


def _add_file(entry: os.DirEntry, entries: Entries, names: list[str]) -> None:
    try:
        found = entry.stat()
    except OSError:  # a dangling link, likewise
        names.append(entry.name)
        entries.sizes.append(0)
        return
    if stat.S_ISREG(found.st_mode):
        names.append(entry.name)
        entries.sizes.append(found.st_size)
    else:
        entries.special.append(entry.name)


# -- The file of an index: compressed JSON --------------------------------------------------------


def _index_path(root: Path) -> Path | None:
    cache = cache_folder()
    if cache is None:
        return None
    place = os.path.realpath(root)
    return cache / "folders" / f"{folder_name(place, place)}.json.gz"


def _load(path: Path) -> dict[str, Entries]:
    """The folders of an index; {} if there is none that can be read."""
    try:
        return {name: Entries(**entries) for name, entries in (read_index(path) or {}).items()}
    except (TypeError, AttributeError):
        return {}


def _save(path: Path, folders: dict[str, Entries], now: int) -> None:
    content = {
        name: {**asdict(entries), "changed": UNTRUSTED}
        if entries.changed > now - SETTLED
        else asdict(entries)
        for name, entries in folders.items()
    }
    save_index(path, content)


def read_index(path: Path) -> Any:
    """The content of an index; None if there is none that can be read."""
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(gzip.decompress(path.read_bytes()))
        if content["version"] == VERSION:
            return content["index"]
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError):
        logger.warning("the index %s is damaged, and is made again", path)
    return None


def save_index(path: Path, index: Any) -> None:
    """Write an index. Without one, opening takes longer and nothing else, so that a cache folder
    that cannot be written to is named in the log only."""
    # Names that are not UTF-8 survive: JSON escapes what stands for their bytes.
    text = json.dumps({"version": VERSION, "index": index})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(gzip.compress(text.encode(), 1, mtime=0))
    except OSError as error:
        logger.warning("no index is saved: %s; %s names another cache folder", error, CACHE)
        return
    logger.info("saved an index, so that the next opening is quick: %s", path)
