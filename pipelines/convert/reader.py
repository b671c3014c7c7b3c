"""Published checkpoints, opened without trust: tensors come out, code never runs.

Safetensors files are read as they are, pickles (.pt, .pth, .ckpt) as `pickle_reader` says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.files import read_json
from smalti.pipelines.convert.pickle_reader import read_pickle

CONFIG = "config.json"
SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (SAFETENSORS, *PICKLES)
SHARDS = ".index.json"  # how the file ends that says which shard holds which tensor

# Where training scripts keep a state dict inside a checkpoint, the first choice first: the running
# mean is what most authors sample from.
WRAPPERS = ("ema", "model", "module", "state_dict")

# What wrappers of torch put before all names.
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a published file."""

    path: Path
    tensors: dict[str, Tensor]
    wrapper: str = ""  # the keys that led to them, "model" or "trainer.ema"; empty: none
    others: tuple[str, ...] = ()  # keys beside the last of those, which lead to tensors too
    config: dict[str, Any] = field(default_factory=dict)  # config.json beside the file, if any

    def shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            SmaltiError: there is no such tensor; it is empty, or has another number of dimensions.
        """
        if name not in self.tensors:
            raise SmaltiError(f"{self.path} lacks the tensor {name}")
        shape = tuple(self.tensors[name].shape)
        if 0 in shape:
            raise SmaltiError(f"{self.path}: {name} is empty, shape {shape}")
        if dimensions is not None and len(shape) != dimensions:
            raise SmaltiError(
                f"{self.path}: {name} has shape {shape}; expected {dimensions} dimensions"
            )
        return shape

    def renamed(self, rename: Callable[[str], str]) -> "Checkpoint":
        """The same tensors under other names.

        Raises:
            SmaltiError: two tensors would have one name.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if rename(name) in tensors:
                raise SmaltiError(f"{self.path} has the tensor {name} under two names")
            tensors[rename(name)] = tensor
        return replace(self, tensors=tensors)

    def has(self, prefix: str) -> bool:
        """Whether the name of any tensor begins so."""
        return any(name.startswith(prefix) for name in self.tensors)

    def count(self, template: str) -> int:
        """How many parts there are: one more than the highest i for which a name begins with
        `template` ("blocks.{}."), or 0.

        Raises:
            SmaltiError: they are numbered beyond what the file can hold.
        """
        before, _, after = template.partition("{}")
        highest = -1
        for name in self.tensors:
            number, _, rest = name.removeprefix(before).partition(".")
            if not name.startswith(before) or not number.isdecimal():
                continue
            if len(number) > 6 or int(number) >= len(self.tensors):
                raise SmaltiError(f"{self.path} has a tensor {name[:80]}, but no part before it")
            if f".{rest}".startswith(after):
                highest = max(highest, int(number))
        return highest + 1


def read_checkpoint(path: Path, wrappers: Sequence[str] = WRAPPERS) -> Checkpoint:
    """The tensors of a file, or of the one weights file in a folder.

    Args:
        wrappers: keys under which a state dict may lie, the first choice first.

    Raises:
        SmaltiError: no such file, none or several in the folder; damaged; a pickle that asks for
            code; no tensors inside, or other than plain ones.
    """
    file = _weights_file(path)
    content = _read_safetensors(file) if file.suffix == SAFETENSORS else read_pickle(file)
    tensors, keys = _unwrap(content, wrappers)
    if not tensors:
        raise SmaltiError(f"{file} holds no tensors: it is not a checkpoint of a model")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise SmaltiError(
                f"{file}: {name} is sparse, quantized or without numbers; only plain tensors are "
                "read"
            )
    config = file.parent / CONFIG
    settings = read_json(config) if config.is_file() else {}
    return Checkpoint(
        path=file,
        tensors=_without_prefixes(tensors),
        wrapper=".".join(keys),
        others=_others(content, keys, wrappers),
        config=settings if isinstance(settings, dict) else {},
    )


def _weights_file(path: Path) -> Path:
    if not path.exists():
        raise SmaltiError(f"{path} does not exist: give a checkpoint file or folder")
    inside = [path] if path.is_file() else sorted(path.iterdir())
    found = [p for p in inside if p.suffix in SUFFIXES]
    # The same weights are often published twice, as safetensors and as a pickle, or again in half
    # precision, as model.fp16.safetensors.
    found = [p for p in found if p.suffix == SAFETENSORS] or found
    found = [p for p in found if not any(p.stem.startswith(f"{o.stem}.") for o in found)]
    if len(found) == 1:
        return found[0]
    if any(p.name.endswith(SHARDS) for p in inside):
        raise SmaltiError(f"{path} is cut into shards: join them in one file, best as safetensors")
    if path.is_file():  # under a name that tells nothing
        return path
    if found:
        names = ", ".join(p.name for p in found)
        raise SmaltiError(f"{path} holds {len(found)} weights files ({names}): name one of them")
    inner = sorted(p.name for p in path.iterdir() if (p / CONFIG).is_file())
    hint = f": give one of the folders inside, {', '.join(inner)}" if inner else ""
    raise SmaltiError(f"{path} holds no weights file ({', '.join(SUFFIXES)}){hint}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SmaltiError(f"{path} is damaged or cut short: {error}") from error


def _unwrap(
    content: Any, wrappers: Sequence[str], depth: int = 4
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside a checkpoint, and the keys that lead to it."""
    if not isinstance(content, Mapping) or not depth:  # a pickle may hold itself
        return {}, []
    for key in wrappers:
        tensors, keys = _unwrap(content.get(key), wrappers, depth - 1)
        if tensors:
            return tensors, [key, *keys]
    return {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}, []


def _others(content: Any, keys: Sequence[str], wrappers: Sequence[str]) -> tuple[str, ...]:
    """Keys of other state dicts that lie beside the one that `keys` lead to."""
    for key in keys[:-1]:
        content = content[key]
    return tuple(
        w for w in wrappers if keys and w != keys[-1] and _unwrap(content.get(w), wrappers)[0]
    )


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return _without_prefixes({n.removeprefix(prefix): t for n, t in tensors.items()})
    return tensors
