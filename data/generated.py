"""The records in a folder of `smalti generate`: which pictures it has, and how they were made.

    generation.json     settings of the job: model, seed, and the class of each picture
    manifest.jsonl      index, seed, file, class or prompt, and sha256 of each picture; written when
                        all processes are done
    index.json          the same, of earlier versions
    .manifest-00000.jsonl   the rows of what one process wrote, until then

The hash is that of the file; of the member in a shard; of the bytes of the pixels in an npz.
"""

import json
from pathlib import Path
from typing import Any

from smalti.errors import SmaltiError
from smalti.files import checked_lines, read_hashed_json

SETTINGS = "generation.json"
MANIFEST = "manifest.jsonl"
INDEX = "index.json"  # of earlier versions
PART = ".manifest-{:05d}.jsonl"
PARTS = (".manifest-", ".index-")  # begin the names of parts; the second, in earlier versions

Row = dict[str, Any]  # index, seed, file, class, label, prompt, sha256


def recorded_rows(folder: Path) -> tuple[dict[int, Row], list[str]]:
    """The recorded rows of the pictures of a job by index, from the manifest and its parts, and
    what is wrong with them.

    A row has at least index, file and sha256.
    """
    rows, damaged = dict[int, Row](), list[str]()
    if (folder / INDEX).is_file():
        try:
            for entry in read_hashed_json(folder / INDEX)["pictures"]:
                number = _number_of(entry)
                rows[number] = {"index": number, **_with_hash(entry)}
        except SmaltiError as error:
            damaged.append(str(error))
        except (LookupError, TypeError, ValueError):
            damaged.append(f"{folder / INDEX} is damaged")
    if (folder / MANIFEST).is_file():
        lines, wrong = checked_lines(folder / MANIFEST, "index")
        rows |= {line["index"]: line for line in lines}
        damaged += wrong
    for part in manifest_parts(folder):
        for text in part.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(text)
                rows[_number_of(entry)] = _with_hash(entry)
            except (ValueError, LookupError, TypeError):
                continue  # cut by a kill: its picture is generated again
    return rows, damaged


def _with_hash(entry: Row) -> Row:
    return {"file": entry["file"], "sha256": entry["sha256"], **entry}


def _number_of(entry: Row) -> int:
    """The index of a picture; in earlier versions only the name of its file has it."""
    return entry["index"] if "index" in entry else int(Path(entry["file"]).stem)


def manifest_parts(folder: Path) -> list[Path]:
    """The files of rows of a job that is not finished; it joins them at its end."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(PARTS))


def has_manifest(folder: Path) -> bool:
    """Whether a folder has records of its pictures, of a job that is finished or not."""
    named = any((folder / name).is_file() for name in (MANIFEST, INDEX))
    return named or bool(manifest_parts(folder))
