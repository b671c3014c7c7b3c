"""Model folders from the Hugging Face Hub and to it. A local folder never touches the network."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smalti.errors import SmaltiError


def resolve_folder(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder, or the local copy of a Hub repository (JSON, safetensors and model card).

    Raises:
        SmaltiError: no such folder, or the Hub cannot give it.
    """
    text = os.path.expanduser(str(path_or_hub_id))
    if os.path.isdir(text):
        return Path(text)
    parts = text.split("/")
    looks_like_path = isinstance(path_or_hub_id, Path) or text.startswith((".", "/", "~"))
    if looks_like_path or len(parts) != 2 or not all(parts) or os.path.isdir(parts[0]):
        raise SmaltiError(f"folder not found: {path_or_hub_id}")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                text,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=["*.json", "*.safetensors", "*.md", "samples.png"],
            )
        )
    except Exception as error:  # the Hub client raises many kinds; all mean "not available"
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise SmaltiError(
            f'"{text}" is no local folder, and the Hub did not give it: {first_line}'
        ) from error


def upload(
    save: Callable[[str | Path], Any],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Save into a temporary folder and upload it to the Hub in one commit."""
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(info)
