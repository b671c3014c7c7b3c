"""Models by name; saving and loading them like any Hugging Face model, but strictly.

    folder/config.json          {"type": registry name, "format_version": 1, "smalti_version": ...,
                                 the fields of the model's config, and "sha256": the hashes of
                                 all this and of model.safetensors, which loading verifies}
    folder/model.safetensors    every parameter and buffer; shards, and variants: see shards.py

Only JSON and safetensors are ever read, never pickle; a name in a file is looked up in a registry,
never imported; a tensor that is missing, unknown or of the wrong shape is an error. Loading a local
folder never uses the network.
"""

import json
import pkgutil
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from smalti import checkpoints
from smalti.checkpoints import is_checkpoint
from smalti.config import config_from_dict, config_to_dict, nearest, read_value, saved_fields
from smalti.errors import CheckpointError, ConfigurationError, SmaltiError
from smalti.files import HASHES, check_hashes, read_config_file, recorded_hashes, write_hashed_json
from smalti.folders import contents, replacing_folder
from smalti.repository import (
    Uploadable,
    check_loading_options,
    files_of_model,
    first_line,
    resolve_folder,
)
from smalti.shards import (
    MAX_SHARD_SIZE,
    find_shards,
    is_weight_file,
    save_shards,
    variant_of,
    weight_names,
)
from smalti.weights import (
    AS_SAVED,
    WeightsFile,
    chosen_dtype,
    hash_weights,
    plain_state,
    state_to_save,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


FORMAT_VERSION = 1
CONFIG = "config.json"
COPY = "copy_of"  # in config.json: of weights whose precision was changed by `cast`, by variant

# The registries of models: an error names the right one if a model is loaded as another kind.
REGISTRIES = (
    "smalti.tokenizer.registry:TOKENIZERS",
    "smalti.prior.registry:PRIORS",
    "smalti.prior.flow.classifier:CLASSIFIERS",
)


# -------------------------------------------------------------------------------------------------
# Classes by name


class Registry:
    """Classes by name. An entry is a class, or "module:Class", which is imported at its first use.

    A registered class is a model or a part of one, and has its configuration class in `Config`; a
    configuration that needs no other class (a path, a solver) is registered itself.
    """

    def __init__(self, kind: str, entries: Mapping[str, str | type]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """All names, in order of registration."""
        return list(self._entries)

    def register(self, name: str, target: str | type) -> None:
        """Add a class, or "module:Class", under a new name.

        Raises:
            ConfigurationError: the name is taken.
        """
        if name in self._entries:
            raise ConfigurationError(f'a {self.kind} is already called "{name}": choose another')
        self._entries[name] = target

    def resolve(self, name: str) -> Any:
        """The class registered under `name`.

        Raises:
            ConfigurationError: no such name; the message names the nearest one.
        """
        if name not in self._entries:
            hint = nearest(name, self._entries)
            raise ConfigurationError(f'no {self.kind} is called "{name}"; {hint}')
        target = self._entries[name]
        if isinstance(target, str):
            target = self._entries[name] = pkgutil.resolve_name(target)
        return target

    def config_class(self, name: str) -> type:
        """The configuration of the class registered under `name`."""
        cls = self.resolve(name)
        return getattr(cls, "Config", cls)

    def name_of(self, cls: type) -> str:
        """The name under which `cls` is registered.

        Raises:
            ConfigurationError: it is not registered.
        """
        target = f"{cls.__module__}:{cls.__qualname__}"
        for name, entry in self._entries.items():
            if entry in (cls, target):
                return name
        raise ConfigurationError(
            f"{cls.__name__} is not registered as a {self.kind}: register it in one line, "
            f'registry.register("name", {cls.__name__})'
        )

    def configured(self, wanted: str | Mapping[str, Any]) -> Any:
        """A registered dataclass by name, "heun", or with options, "ddim:eta=1.0" or
        {"kind": "ddim", "eta": 1.0}.

        Raises:
            ConfigurationError: no such name, option or value.
        """
        options = named_options(wanted) if isinstance(wanted, str) else wanted
        name = options.get("kind") if isinstance(options, Mapping) else None
        if not isinstance(name, str):
            raise ConfigurationError(
                f"{self.kind} is {wanted!r}; give a name, name:option=value,... or "
                '{"kind": name, option: value, ...}'
            )
        others = {key: value for key, value in options.items() if key != "kind"}
        return config_from_dict(self.resolve(name), others, f"{self.kind} {name}")

    def build(self, config: Any, *arguments: Any) -> Any:
        """A new object of the class whose `Config` is the type of `config`: cls(config, ...).

        Raises:
            ConfigurationError: no registered class has such a `Config`.
        """
        for name in self._entries:
            cls = self.resolve(name)
            if cls.Config is type(config):
                return cls(config, *arguments)
        raise ConfigurationError(f"no {self.kind} is configured by {type(config).__name__}")


class Presets(Mapping[str, Any]):
    """The configurations in the `PRESETS` of all registered classes, in one mapping.

    It reads the registry at each use, so it includes classes that are registered later.

    Args:
        own: further configurations, which come first.
        latents: what the models of a configuration make or take, in words, for help texts.
    """

    def __init__(
        self,
        registry: Registry,
        own: Mapping[str, Any] | None = None,
        latents: "Callable[[Any], str] | None" = None,
    ) -> None:
        self.registry, self.own, self.latents = registry, dict(own or {}), latents or str

    def about(self, config: Any) -> str:
        """Latents, parameters and memory of the model of a configuration, in one line."""
        import torch

        with torch.device("meta"):
            model: torch.nn.Module = self.registry.build(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        return f"{self.latents(model)}, {count / 1e6:,.1f} M parameters, {count / 5e7:,.1f} GB"

    def _all(self) -> dict[str, Any]:
        classes = map(self.registry.resolve, self.registry)
        registered = {name: preset for cls in classes for name, preset in cls.PRESETS.items()}
        return {**self.own, **registered}

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def named_options(text: str) -> dict[str, Any]:
    """ "ddim:eta=1.0,..." as {"kind": "ddim", "eta": 1.0, ...}; a name alone as {"kind": name}.

    Raises:
        ConfigurationError: what follows the colon is not option=value, or an option is repeated.
    """
    kind, colon, rest = text.partition(":")
    options: dict[str, Any] = {"kind": kind}
    for part in rest.split(",") if colon else ():
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ConfigurationError(
                f'"{part}" in "{text}" is not an option: write {kind}:option=value,...'
            )
        if name in options:
            raise ConfigurationError(f'"{name}" is repeated in "{text}": give each option once')
        try:
            options[name] = read_value(value)
        except ConfigurationError as error:
            raise ConfigurationError(
                f'"{value}" in "{text}" is not a value: write {kind}:{name}=1.0'
            ) from error
    return options


# -------------------------------------------------------------------------------------------------
# Models that are saved and loaded


@dataclass(frozen=True)
class Copy:
    """Weights with the hash `checksum` are those of the model `fingerprint`, rounded by `cast`."""

    fingerprint: str
    checksum: str


class Pretrained(Uploadable):
    """A mixin that saves and loads an `nn.Module`.

    A subclass sets `Config`, keeps its config in `self.config`, and is built by `cls(config)`,
    which initialises parameters with functions such as those of torch.nn.init: while a model is
    loaded, they have no values until the file is read. Its base class sets `registry`;
    `from_pretrained` on the base class finds the class by "type".
    """

    uploaded_as: ClassVar[str] = "model"
    registry: ClassVar[Registry]
    Config: ClassVar[type]
    config: Any
    compiled_parts: ClassVar[tuple[str, ...]] = ()  # modules that `compile_parts` takes, by name
    compiled_with: dict[str, Any] | None = None  # the options of `compile_parts`, if it was called
    _copy_of: Copy | None = None  # set by `cast`; no longer valid once the weights change

    def compile_parts(self, **options: Any) -> None:
        """Compile the modules that sampling or decoding runs, with options of torch.compile. Names
        and values of weights stay."""
        for part in (getattr(self, name) for name in self.compiled_parts):
            for module in part if hasattr(part, "__iter__") else [part]:
                module.compile(**options)
        self.compiled_with = options

    def save_pretrained(
        self,
        path: str | Path,
        *,
        variant: str | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        replaces: Path | None = None,
    ) -> Path:
        """Write config.json and model.safetensors into the folder `path`, replaced as a whole.

        Parts inside torch.compile, DataParallel or pruning are saved as they are without.

        Args:
            variant: a part of the name of the weights: "fp16" writes model.fp16.safetensors. Other
                variants of the same weights that the folder has stay.
            max_shard_size: of a file, in bytes or as a text; larger weights are saved in several.
            replaces: the folder whose other variants are kept; None: `path`.

        Raises:
            CheckpointError: the folder exists and contains something else than such a model; the
                model could not be loaded again; a weight is infinite or NaN. The folder then stays
                as it was.
        """
        folder = Path(path)
        before = [name for name in contents(folder) if is_weight_file(name)]
        weight_names(variant)  # raises
        with replacing_folder(
            folder, products=before, check=lambda: _check_target(folder, self.registry)
        ) as new:
            content, model = self._content_of_config(variant), cast("nn.Module", self)
            state = state_to_save(model, lambda: type(self)(self.config))  # type: ignore[call-arg]
            names = save_shards(new, state, variant, max_shard_size)
            names += self._keep_variants(replaces or folder, new, variant, content)
            write_hashed_json(new / CONFIG, content, names)
        return folder

    def _keep_variants(
        self, old: Path, new: Path, variant: str | None, content: dict[str, Any]
    ) -> list[str]:
        """Copy the other variants of these weights in an old folder to a new one.

        Args:
            content: of config.json, where they are recorded as copies.

        Returns:
            The names of their files.
        """
        kept = []
        weights = filter(is_weight_file, contents(old))
        for other in sorted({variant_of(name) for name in weights} - {variant}, key=str):
            try:
                _, config, copies = type(self)._saved(old)
                paths, indices = find_shards(old, other)
                file = WeightsFile(paths, partial(_build, type(self), config, old))
                checksum, copy = file.hash_weights(_hashed(config)), copies.get(_copy_key(other))
                original = _read_copy(copy, checksum, old).fingerprint if copy else checksum
            except SmaltiError:
                continue  # of another kind of model, or damaged
            if config == self.config and original == self.fingerprint:
                own = [*(path.name for path in paths), *indices]
                for name in own:
                    shutil.copyfile(old / name, new / name)
                if copy:
                    content[_copy_key(other)] = copy
                kept += own
        return kept

    def _content_of_config(self, variant: str | None) -> dict[str, Any]:
        """The content of config.json, which loading turns into an equal config."""
        fields = saved_fields(self.config)
        if config_from_dict(type(self.config), fields, "the config") != self.config:
            raise CheckpointError(
                f"the config {self.config} is not the same after it was saved and loaded: use "
                "tuples for lists, and finite numbers"
            )
        header = {
            "type": self.registry.name_of(type(self)),
            "format_version": FORMAT_VERSION,
            "smalti_version": version("smalti"),
        }
        if self._copy_of is not None and self._copy_of.checksum == self.checksum:
            header[_copy_key(variant)] = config_to_dict(self._copy_of)
        return {**header, **_rename_key(fields, "kind", "type")}

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        dtype: "torch.dtype | str | None" = None,
        torch_dtype: "torch.dtype | str | None" = None,
        device: "torch.device | str | None" = None,
        weights: checkpoints.Weights = "ema",
        verify: bool = True,
        variant: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        device_map: Any = None,
    ) -> Self:
        """Load a model saved by `save_pretrained`, from a folder or from the Hub, in eval mode.

        A folder may also be a checkpoint of a training run, or a pipeline with such a model, also
        one that ships with smalti ("smalti/fashion-next-token").

        Args:
            weights: of a checkpoint: "ema", the average over the run, or "raw".
            subfolder: the folder of the model within the path or the repository; nothing else is
                downloaded.
            revision, token, local_files_only, cache_dir: for the Hub, as in Diffusers.
            dtype: precision of the weights, a type or its name, such as "bfloat16"; "auto": that
                of the saved weights; None: fp32.
            torch_dtype: another name of `dtype`.
            verify: compare config and weights with the hashes that were saved with them; the
                weights are hashed while they are read. Models of smalti 0.1.0 have no hashes.
            variant: of the weights, such as "fp16", as Diffusers names it: it reads
                model.fp16.safetensors.
            low_cpu_mem_usage: always True, and False is refused: loading takes little more memory
                than the model.
            device_map: refused: give `device`.

        Raises:
            CheckpointError: there is no model, or one of another kind; a config key or a tensor is
                missing, unknown or of the wrong type or shape; a file is damaged.
            ConfigurationError: no such precision; an option that cannot be met, such as raw
                weights of a saved model, which has one set.
        """
        check_loading_options(device_map=device_map, low_cpu_mem_usage=low_cpu_mem_usage)
        precision = chosen_dtype(dtype, torch_dtype)
        folder = resolve_folder(
            path_or_hub_id,
            subfolder=subfolder,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            needs=(CONFIG, weight_names(variant)),
            patterns=files_of_model(cls.registry.kind, weights, variant),
            part=cls.registry.kind,
        )
        checkpoints.check_weights(folder, weights, variant)
        target, config, copies = cls._saved(folder)
        copy = copies.get(_copy_key(variant))
        beside, hashes, indices = (), {}, []
        if is_checkpoint(folder):
            paths, beside = [checkpoints.weight_file(folder, weights)], (checkpoints.UPDATES,)
        else:
            paths, indices = find_shards(folder, variant)
            hashes = recorded_hashes(folder / CONFIG) if verify else {}
        file = WeightsFile(paths, lambda: _build(target, config, folder), beside)
        if precision == AS_SAVED:
            precision = file.saved_dtype()
        model: Any = file.load(hashes or None, precision)
        if verify and not is_checkpoint(folder):
            # last: errors in a config that have a more precise message come first
            check_hashes(folder / CONFIG, indices)
        if copy is not None or precision is not None:
            checksum = file.hash_weights(_hashed(model.config))  # before `precision`
            original = _read_copy(copy, checksum, folder).fingerprint if copy else checksum
            model._keep_fingerprint(original)
        return model.to(device=device).eval()

    @classmethod
    def saved_config(cls, folder: Path) -> Any:
        """The config of the model in a local folder, without its weights.

        Raises:
            CheckpointError: there is no model, or one of another kind; a config key is wrong.
        """
        return cls._saved(folder)[1]

    @classmethod
    def _saved(cls, folder: Path) -> tuple[Any, Any, Any]:
        """The class, the config, and the `copy_of` entries of config.json."""
        if is_checkpoint(folder):
            copies, where = {}, folder
            settings = checkpoints.model_settings(folder, cls.registry.kind)
            name = settings["kind"]
        else:
            content, where = _read_config(folder, cls.registry), folder / CONFIG
            copies = {key: content.pop(key) for key in list(content) if key.startswith(COPY)}
            name = content.pop("type")
            settings = _rename_key(content, "type", "kind")
        target: Any = cls.registry.resolve(name)
        if not issubclass(target, cls):
            raise CheckpointError(f"{folder} contains a {target.__name__}, not a {cls.__name__}")
        return target, config_from_dict(target.Config, settings, str(where)), copies

    def cast(self, dtype: "torch.dtype") -> Self:
        """Change the precision of all weights in place, keep the fingerprint, and return self.

        After `model.to(dtype)` the rounded weights count as another model.
        """
        fingerprint = self.fingerprint
        cast("nn.Module", self).to(dtype)
        self._keep_fingerprint(fingerprint)
        return self

    def _keep_fingerprint(self, fingerprint: str) -> None:
        """Record that the weights are those of the model `fingerprint`, rounded."""
        checksum = self.checksum
        self._copy_of = Copy(fingerprint, checksum) if checksum != fingerprint else None

    @property
    def checksum(self) -> str:
        """sha256 over config and weights as they are, equal on any device."""
        weights = sorted(plain_state(cast("nn.Module", self)).items())
        return hash_weights(weights, _hashed(self.config))

    @property
    def fingerprint(self) -> str:
        """The checksum, or for a copy made by `cast` that of the original. A prior stores the
        fingerprint of its tokenizer."""
        checksum = self.checksum
        if self._copy_of is not None and self._copy_of.checksum == checksum:
            return self._copy_of.fingerprint
        return checksum


def _hashed(config: Any) -> bytes:
    """What the checksum of a model takes of its config."""
    return json.dumps(saved_fields(config), sort_keys=True).encode()


def _rename_key(content: Any, old: str, new: str) -> Any:
    """Plain values in which every key `old` is renamed to `new`.

    In config.json the key "type" has the type of the model and of each of its parts, as in Hugging
    Face's files; dataclasses call it `kind`, because `type` is a builtin. Files of smalti 0.1
    contain both keys.
    """
    if isinstance(content, Mapping):
        return {
            new if key == old else key: _rename_key(value, old, new)
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        return [_rename_key(value, old, new) for value in content]
    return content


def _check_target(folder: Path, registry: Registry) -> None:
    """Refuse to write a model over anything but a model of the same kind."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: choose a folder")
    if not contents(folder):
        return
    try:
        _read_config(folder, registry)
    except SmaltiError as error:
        raise CheckpointError(
            f"{folder} exists and is not a saved {registry.kind}: choose another folder"
        ) from error


def _read_config(folder: Path, registry: Registry) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not a saved {registry.kind}")
    content = read_config_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        raise CheckpointError(f'{path} has no "type": it is not a saved {registry.kind}')
    found = content.pop("format_version", None)
    if found != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {found}; this smalti reads {FORMAT_VERSION}")
    content.pop("smalti_version", None)  # for readers of the file: the release that wrote it
    content.pop(HASHES, None)
    if content["type"] not in registry:
        raise CheckpointError(f"{path}: {_unknown_type(content['type'], registry)}")
    return content


def _copy_key(variant: str | None) -> str:
    """The name of the `copy_of` entry of a variant."""
    return COPY if variant is None else f"{COPY}.{variant}"


def _read_copy(content: Any, checksum: str, folder: Path) -> Copy:
    """The `copy_of` entry of config.json, if the weights are those that were saved."""
    copy = config_from_dict(Copy, content, f"{folder / CONFIG}: {COPY}")
    if copy.checksum != checksum:
        raise CheckpointError(
            f"the weights in {folder} are not the copy of {copy.fingerprint[:12]} that {CONFIG} "
            f'records: save it again, or remove "{COPY}" from {CONFIG} if it is another model now'
        )
    return copy


def _unknown_type(name: str, registry: Registry) -> str:
    for other in map(pkgutil.resolve_name, REGISTRIES):
        if name in other:
            return f'"{name}" is a {other.kind}, not a {registry.kind}'
    return f'no {registry.kind} is called "{name}"; {nearest(name, registry)}'


def _build(target: Any, config: Any, folder: Path) -> Any:
    """A new model; an error that torch raises for an impossible config becomes one line."""
    try:
        return target(config)
    except SmaltiError:
        raise
    except (
        ArithmeticError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{folder / CONFIG} describes an impossible model: {first_line(error)}"
        ) from error
