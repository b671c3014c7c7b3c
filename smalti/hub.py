"""Models by name, saved and loaded like any Hugging Face model, but strictly.

    folder/config.json          {"type": registry name, "format_version": 1, ...fields}
    folder/model.safetensors    every parameter and buffer

Only JSON and safetensors are ever read, never pickle; a name found in a file is looked up in a
registry, never imported; a missing, surplus or mis-shaped tensor is an error. A local folder never
touches the network.
"""

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from smalti.config import config_from_dict, config_to_dict, nearest
from smalti.errors import SmaltiError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Pretrained",
    "Registry",
    "config_from_dict",
    "config_to_dict",
    "resolve_folder",
    "upload",
    "write_json",
]

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Registry:
    """Classes by name; each entry is "module:Class" and is imported only when asked for."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def resolve(self, name: str) -> type:
        """The class registered under `name`.

        Raises:
            SmaltiError: no such name; the message offers the nearest.
        """
        if name not in self._entries:
            raise SmaltiError(f'no {self.kind} is called "{name}"; {nearest(name, self._entries)}')
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def name_of(self, cls: type) -> str:
        """The name under which `cls` is registered."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        for name, entry in self._entries.items():
            if entry == target:
                return name
        raise SmaltiError(f"{cls.__name__} is not registered as a {self.kind}")

    def build(self, config: Any) -> Any:
        """A new model of the class whose `Config` is the type of `config`."""
        for name in self._entries:
            cls: Any = self.resolve(name)
            if cls.Config is type(config):
                return cls(config)
        raise SmaltiError(f"no {self.kind} is configured by {type(config).__name__}")


class Pretrained:
    """What makes an `nn.Module` saveable; a mixin.

    A subclass sets `Config`, keeps its config in `self.config`, and is built by `cls(config)`. Its
    base class sets `registry`; `from_pretrained` on the base class finds the class by "type".
    """

    registry: ClassVar[Registry]
    Config: ClassVar[type]
    config: Any

    def save_pretrained(self, path: str | Path) -> Path:
        """Write config.json and model.safetensors into the folder `path`.

        Raises:
            SmaltiError: the folder exists and holds something that is not such a model.
        """
        from safetensors.torch import save

        folder = Path(path)
        if folder.is_file():
            raise SmaltiError(f"{folder} is a file: choose a folder")
        if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
            raise SmaltiError(f"{folder} exists and is not a saved model: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.contiguous().cpu() for k, v in self.state_dict().items()}  # type: ignore[attr-defined]
        write_bytes(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
        name = self.registry.name_of(type(self))
        header = {"type": name, "format_version": FORMAT_VERSION}
        write_json(folder / CONFIG, {**header, **config_to_dict(self.config)})
        return folder

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        dtype: "torch.dtype | None" = None,
        device: "torch.device | str | None" = None,
    ) -> Self:
        """Load a model saved by `save_pretrained`, from a folder or from the Hub, in eval mode.

        Raises:
            SmaltiError: nothing there; another kind of model; a config key or a tensor is
                missing, unknown or of the wrong type or shape; a file is damaged.
        """
        folder = resolve_folder(
            path_or_hub_id, revision=revision, token=token, local_files_only=local_files_only
        )
        folder = folder / subfolder if subfolder else folder
        content = _read_config(folder, cls.registry)
        target: Any = cls.registry.resolve(content.pop("type"))
        if not issubclass(target, cls):
            raise SmaltiError(f"{folder} holds a {target.__name__}, not a {cls.__name__}")
        config = config_from_dict(target.Config, content, str(folder / CONFIG))
        model = _load_weights(target, config, folder)
        return model.to(device=device, dtype=dtype).eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload smalti model",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit; return its address."""
        return upload(
            self.save_pretrained,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    @property
    def fingerprint(self) -> str:
        """sha256 over config and weights: equal wherever the model is, different if either is."""
        digest = hashlib.sha256()
        digest.update(json.dumps(config_to_dict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):  # type: ignore[attr-defined]
            raw = tensor.detach().cpu().contiguous().flatten()
            digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            digest.update(raw.view(_bytes_type()).numpy().tobytes())
        return digest.hexdigest()


def resolve_folder(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder, or the local copy of a Hub repository (JSON, safetensors and card only).

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
                allow_patterns=["*.json", "*.safetensors", "*.md"],
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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or wholly the new one."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON as `write_bytes` does."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _read_config(folder: Path, registry: Registry) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise SmaltiError(f"{folder} has no {CONFIG}: it is not a saved {registry.kind}")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SmaltiError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        raise SmaltiError(f'{path} has no "type": it is not a saved {registry.kind}')
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise SmaltiError(f"{path} has format {version}; this smalti reads {FORMAT_VERSION}")
    if content["type"] not in registry:
        hint = nearest(content["type"], registry)
        raise SmaltiError(f'{path}: no {registry.kind} is called "{content["type"]}"; {hint}')
    return content


def _load_weights(target: Any, config: Any, folder: Path) -> Any:
    """Build the model and fill it; names and shapes are compared before memory is taken."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
        hint = f" ({pickles[0]} is a pickle, which can run code and is not read)" if pickles else ""
        raise SmaltiError(f"{folder} has no {WEIGHTS}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in target(config).state_dict().items()}
        _compare_tensors(expected, found, path)
        model = target(config)
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise SmaltiError(f"{path} is damaged: {error}") from error
    except (RuntimeError, OverflowError, MemoryError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise SmaltiError(
            f"{folder / CONFIG} describes an impossible model: {first_line}"
        ) from error
    return model


def _compare_tensors(expected: dict[str, tuple], found: dict[str, tuple], path: Path) -> None:
    missing, surplus = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = f"; it has {surplus[0]}, which is unknown" if surplus else ""
        raise SmaltiError(f"{path} lacks the tensor {missing[0]}{more}{hint}")
    if surplus:
        hint = nearest(surplus[0], expected)
        raise SmaltiError(f"{path} has a tensor {surplus[0]} that the model does not know; {hint}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise SmaltiError(f"{path}: {name} has shape {found[name]}; the config says {shape}")


def _bytes_type() -> "torch.dtype":
    import torch

    return torch.uint8
