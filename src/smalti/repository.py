"""Folders of models, local or from the Hugging Face Hub; a local folder never uses the network."""

import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from smalti.errors import CheckpointError, ConfigurationError

logger = logging.getLogger(__name__)

# What is downloaded of a repository: never a pickle.
PATTERNS = ("*.json", "*.safetensors", "*.md", "samples.png")


def check_options(*, variant: str | None, low_cpu_mem_usage: bool | None) -> None:
    """Refuse options of Diffusers and transformers that smalti does not have.

    Raises:
        ConfigurationError: there is such an option.
    """
    if variant is not None:
        raise ConfigurationError(
            f'variant is "{variant}"; a folder of smalti holds one set of weights, which are '
            'converted while loading: give dtype="float16" or "bfloat16" instead'
        )
    if low_cpu_mem_usage is False:
        raise ConfigurationError(
            "low_cpu_mem_usage is False; loading never takes more memory than needed: leave it out"
        )


def resolve_folder(
    path_or_hub_id: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    needs: Sequence[str] = (),
    patterns: Sequence[str] = PATTERNS,
) -> Path:
    """A local folder, or the local copy of a Hub repository (JSON, safetensors and model card).

    Args:
        subfolder: a folder in it, which is returned; nothing else is downloaded.
        needs: files without which the copy of a repository is not complete.
        patterns: of the files that are downloaded.

    Raises:
        CheckpointError: no such folder, and no such repository that can be downloaded.
    """
    text, inside = os.path.expanduser(str(path_or_hub_id)), subfolder or "."
    if os.path.isdir(text):
        return Path(text, inside)
    parts = text.split("/")
    looks_like_path = isinstance(path_or_hub_id, Path) or text.startswith((".", "/", "~"))
    if looks_like_path or len(parts) != 2 or not all(parts) or os.path.isdir(parts[0]):
        raise CheckpointError(f"folder not found: {path_or_hub_id}")
    import huggingface_hub

    logger.info('there is no folder "%s" here: it is loaded from the Hub', text)
    try:
        copy = huggingface_hub.snapshot_download(
            text,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            allow_patterns=[f"{subfolder}/{p}" if subfolder else p for p in patterns],
        )
    except Exception as error:  # the Hub client raises many types; all mean "not available"
        raise CheckpointError(
            f'there is no folder "{text}" here, and it cannot be downloaded from the Hub: '
            f"{first_line(error)}"
        ) from error
    folder = Path(copy, inside)
    missing = [name for name in needs if not (folder / name).is_file()]
    if missing and (local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE):
        raise CheckpointError(
            f'the copy of "{text}" in {folder} has no {missing[0]}: its download was not finished, '
            "or the repository has none; load it once with a network connection, without "
            "local_files_only and HF_HUB_OFFLINE"
        )
    return folder


class Uploadable(ABC):
    """What can be saved can be pushed to the Hub."""

    uploaded_as: ClassVar[str]  # what the commit message calls it

    @abstractmethod
    def save_pretrained(self, path: str | Path) -> Path:
        """Write a folder."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit; return the URL of the commit.

        Args:
            commit_message: by default "Upload smalti model" or "Upload smalti pipeline".
            revision: the branch, which is made if there is none; None: the main one.

        Raises:
            CheckpointError: the Hub cannot be reached, or refuses.
        """
        return upload(
            self.save_pretrained,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message or f"Upload smalti {self.uploaded_as}",
            create_pr=create_pr,
            revision=revision,
        )


def upload(
    save: Callable[[Path], Any],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    commit_message: str,
    create_pr: bool,
    revision: str | None,
) -> str:
    """Save into a temporary folder and upload it to the Hub in one commit.

    Raises:
        CheckpointError: the Hub cannot be reached, or refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        save(folder)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            info = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                create_pr=create_pr,
                revision=revision,
            )
        except Exception as error:  # many types, as above
            raise CheckpointError(
                f'"{repo_id}" cannot be uploaded to the Hub: {first_line(error)}; write the model '
                "to disk with save_pretrained, and push it when the Hub can be reached"
            ) from error
    return str(info)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
