"""Folders of models, local or from the Hugging Face Hub; a local folder never uses the network."""

import importlib.util
import logging
import os
import shlex
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from smalti import checkpoints
from smalti.errors import CheckpointError, ConfigurationError, SmaltiError
from smalti.files import command, read_config_file
from smalti.shards import weight_patterns

logger = logging.getLogger(__name__)

# What is downloaded of a repository whose kind of model is not known: never a pickle.
PATTERNS = ("*.json", "*.safetensors", "*.md", "samples.png")
PIPELINE = "model_index.json"  # of our pipelines, and of Diffusers'
MODEL = "config.json"
# Files of Diffusers' pipelines that say how smalti converts them.
PARTS_OF_DIFFUSERS = ("vae/config.json", "transformer/config.json")

# Pipelines that ship with smalti: "smalti/NAME" is the folder NAME of this one in the package.
SHIPPED, OWNER = "shipped", "smalti"


def shipped_pipelines() -> dict[str, Path]:
    """The folders of the pipelines that ship with smalti, by the names that load them."""
    found = importlib.util.find_spec("smalti.pipelines")
    places = found.submodule_search_locations or [] if found else []
    files = (file for place in places for file in Path(place, SHIPPED).glob(f"*/{PIPELINE}"))
    return {f"{OWNER}/{file.parent.name}": file.parent for file in sorted(files)}


def local_folder(model: str | Path) -> Path:
    """The folder of a pipeline that ships with smalti, for its name; any other path as it is."""
    path = Path(model).expanduser()
    return path if path.is_dir() else shipped_pipelines().get(path.as_posix(), path)


def short_name_of(folder: Path) -> str | None:
    """The name that loads the pipeline in a folder, if it ships with smalti."""
    return next((name for name, own in shipped_pipelines().items() if own == folder), None)


def _shipped_folder(name: str) -> Path | None:
    """The folder of a pipeline that ships with smalti; None for a name of another owner.

    Raises:
        CheckpointError: no pipeline of this name ships.
    """
    owner, _, rest = name.partition("/")
    if owner != OWNER or not rest or "/" in rest:
        return None
    shipped = shipped_pipelines()
    if name not in shipped:
        raise CheckpointError(
            f'no pipeline that ships with smalti is called "{name}"; there are '
            f"{', '.join(shipped) or 'none'}; a repository of that name on the Hub is loaded from "
            f"a copy: {shlex.join(['hf', 'download', name, '--local-dir', rest])}"
        )
    return shipped[name]


def files_of_model(part: str, weights: checkpoints.Weights, variant: str | None) -> tuple[str, ...]:
    """What loading a model reads, as patterns: of a saved model, of a checkpoint, or of the folder
    `part` of a pipeline.

    Args:
        weights: of a checkpoint.
        variant: of the weights of a saved model.

    Raises:
        ConfigurationError: there is no such set of weights; the name of the variant cannot be part
            of a file name.
    """
    own = (MODEL, *weight_patterns(variant))
    of_checkpoint = (checkpoints.STATE, checkpoints.MANIFEST, checkpoints.file_of(weights))
    inside = tuple(f"{part}/{name}" for name in own)
    return (PIPELINE, *own, *of_checkpoint, *inside, *PARTS_OF_DIFFUSERS)


def check_loading_options(*, device_map: Any, low_cpu_mem_usage: bool | None) -> None:
    """Refuse options of Diffusers and transformers that smalti does not have.

    Raises:
        ConfigurationError: there is such an option.
    """
    if device_map is not None:
        raise ConfigurationError(
            f"device_map is {device_map!r}; a model of smalti is on one device: give "
            'device="cuda", or call enable_model_cpu_offload() of a pipeline if memory is short'
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
    needs: Sequence[str | Sequence[str]] = (),
    patterns: Sequence[str] = PATTERNS,
    part: str = "",
) -> Path:
    """A local folder, a pipeline that ships with smalti ("smalti/NAME"), or the local copy of a Hub
    repository (the files that `patterns` name).

    Args:
        revision: of a repository on the Hub, whatever its name.
        subfolder: a folder in it, which is returned; nothing else is downloaded.
        needs: files without which the copy of a repository is not complete; of a sequence, one.
        patterns: of the files that are downloaded.
        part: the folder in that of a pipeline that is returned, if it is a pipeline.

    Raises:
        CheckpointError: no such folder, and no such repository that can be downloaded; it is a
            model of Diffusers.
    """
    text, inside = os.path.expanduser(str(path_or_hub_id)), subfolder or "."
    local = Path(text) if os.path.isdir(text) else None
    if local is None and revision is None:
        local = _shipped_folder(text)
    if local is not None:
        folder = part_of_pipeline(local / inside, part)
        _check_not_diffusers(folder)
        return folder
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
    folder = part_of_pipeline(Path(copy, inside), part)
    _check_not_diffusers(folder, text, inside)
    choices = [(names,) if isinstance(names, str) else names for names in needs]
    missing = [
        names[0] for names in choices if not any((folder / name).is_file() for name in names)
    ]
    if missing and (local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE):
        raise CheckpointError(
            f'the copy of "{text}" in {folder} has no {missing[0]}: its download was not finished, '
            "or the repository has none; load it once with a network connection, without "
            "local_files_only and HF_HUB_OFFLINE"
        )
    return folder


def part_of_pipeline(folder: Path, part: str) -> Path:
    """The folder of a model: `part` of the folder of a pipeline, else `folder` itself."""
    inside = folder / part
    is_pipeline = (folder / PIPELINE).is_file() and not (folder / MODEL).is_file()
    return inside if part and is_pipeline and (inside / MODEL).is_file() else folder


# Diffusers' classes that smalti converts -> the source of `smalti convert`
DIFFUSERS = {
    "AutoencoderKL": "diffusers-kl",
    "VQModel": "diffusers-vq",
    "DiTTransformer2DModel": "diffusers-dit",
    "Transformer2DModel": "diffusers-dit",
}


def _check_not_diffusers(folder: Path, hub_id: str = "", inside: str = ".") -> None:
    """Raise `CheckpointError`, with the command that converts it, if a folder is Diffusers'.

    Args:
        hub_id: of the repository of which the folder is a copy without weights.
        inside: the place of the folder in that repository.
    """
    for name in (PIPELINE, MODEL):
        kind, ours = _class_name(folder / name)
        if kind and not ours:
            what = f"{hub_id or folder} is a {kind} of Diffusers, not a model of smalti"
            if not hub_id:
                raise CheckpointError(what + _conversion(folder, kind, folder))
            local = hub_id.rpartition("/")[2]
            steps = _conversion(folder, kind, Path(local, inside))
            get = shlex.join(["hf", "download", hub_id, "--local-dir", local])
            raise CheckpointError(f"{what}{steps}; {get} downloads it")


def _conversion(folder: Path, kind: str, place: Path) -> str:
    """What to do with a folder of Diffusers, as the end of a sentence, when it lies at `place`."""
    out = f"{place.resolve().name}-smalti"
    if kind in DIFFUSERS:
        tokenizer = ("--tokenizer", "DIR") if DIFFUSERS[kind] == "diffusers-dit" else ()
        words = command("convert", DIFFUSERS[kind], place, out, *tokenizer)
        about = ", where DIR is the converted VAE" if tokenizer else ""
        return f": convert it with {words}{about}"
    vae, transformer = folder / "vae", folder / "transformer"
    source = DIFFUSERS.get(_class_name(vae / MODEL)[0])
    if source is None:
        return ", and none that smalti converts"
    pixels = _image_size(vae, transformer)
    tokenizer_out = f"{out}-vae"
    first = command("convert", source, place / "vae", tokenizer_out, *pixels)
    if DIFFUSERS.get(_class_name(transformer / MODEL)[0]) != "diffusers-dit":
        return f", and none that smalti converts; its VAE is converted by {first}"
    network = place / "transformer"
    second = command("convert", "diffusers-dit", network, out, "--tokenizer", tokenizer_out)
    return f": convert it with {first} and then {second}"


def _class_name(path: Path) -> tuple[str, bool]:
    """The class that a JSON file of Diffusers names, or "", and whether the file is smalti's."""
    try:
        content = read_config_file(path) if path.is_file() else {}
    except SmaltiError:  # reading it as ours names what is wrong
        content = {}
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        return "", False
    return content["_class_name"], "classes" in content or "type" in content


def _image_size(vae: Path, transformer: Path) -> tuple[str, ...]:
    """The flag for the size of the pictures of a Diffusers pipeline, if its files state it."""
    side, levels = (
        read_config_file(path / MODEL).get(key) if (path / MODEL).is_file() else None
        for path, key in ((transformer, "sample_size"), (vae, "block_out_channels"))
    )
    if type(side) is not int or not isinstance(levels, list):
        return ()
    return ("--image_size", str(side * 2 ** (len(levels) - 1)))


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
