"""The manifest of WebDataset shards: a JSON file beside them with the number of samples of each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smalti.data.sources.remote import RemoteFile
from smalti.errors import DataError
from smalti.files import read_json

# Beside the shards: {"000.tar": 1000, ...}, the same under "shards", or wids' "shardlist".
MANIFESTS = ("manifest.json", "sizes.json", "_shards.json")
BESIDE_SHARDS = (*MANIFESTS, "classes.json")  # files in the folder of shards that are also read


def read_manifest(folder: Path) -> dict[str, int] | None:
    """The number of samples of each shard in a folder; None without a manifest.

    Raises:
        DataError: the manifest has other content.
    """
    for name in MANIFESTS:
        if (folder / name).is_file():
            return _counts_in(folder / name)
    return None


def _counts_in(path: Path) -> dict[str, int]:
    content: Any = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("shardlist"), list):
        content = {
            Path(str(entry["url"])).name: entry["nsamples"]
            for entry in content["shardlist"]
            if isinstance(entry, dict) and {"url", "nsamples"} <= entry.keys()
        }
    elif isinstance(content, dict) and isinstance(content.get("shards"), dict):
        content = content["shards"]
    if not isinstance(content, dict) or not all(type(count) is int for count in content.values()):
        raise DataError(
            f"{path} does not list the number of samples of each shard: remove it, or write "
            "another with smalti check-data --write_manifest"
        )
    return content


def check_count(path: Path | RemoteFile, found: int, counts: dict[str, int] | None) -> None:
    """Raise `DataError` if a shard does not hold the number of samples that its manifest states.

    Args:
        counts: of the manifest; None: there is none.
    """
    if counts is None:
        return
    if path.name not in counts:
        raise DataError(
            f"the manifest beside {path} does not name it: add it there, or remove the manifest"
        )
    if found != counts[path.name]:
        remedy = "copy it again"
        if found > counts[path.name]:
            remedy += ", or, if the manifest is wrong, replace that by check-data --write_manifest"
        raise DataError(
            f"the shard {path} holds {found} samples, but {counts[path.name]} are listed in the "
            f"manifest beside it: {remedy}"
        )


def refuse_missing(shards: Sequence[Path], manifests: Mapping[Path, dict[str, int] | None]) -> None:
    """Raise `DataError` if a shard that a manifest names does not exist."""
    for folder, counts in manifests.items():
        for name in sorted(counts or {}):
            if folder / name not in shards and not (folder / name).is_file():
                raise DataError(
                    f"the shard {folder / name} is missing, and its manifest names it: copy it"
                )
