"""Published checkpoints, opened without trust: tensors come out, code never runs.

Safetensors files are read as they are, pickles (.pt, .pth, .ckpt) as `pickle_reader` says.
"""

import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.files import read_json

# -------------------------------------------------------------------------------------------------
# What a pickle would do, read off its instructions: nothing is built or called.
#
# A pickle is a program for a stack machine. Going through it with a stack of names tells which
# classes it asks for, and whether their objects are filled like dicts or like lists.

Kind = Literal["object", "dict", "list"]

FILLED: dict[str, Kind] = {  # instructions that put items into the object below them
    "SETITEM": "dict",
    "SETITEMS": "dict",
    "APPEND": "list",
    "APPENDS": "list",
}
MAKES_AN_OBJECT = ("REDUCE", "NEWOBJ", "BUILD")  # of what lies lowest among their arguments
STORES = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")  # the last under the next number
FETCHES = ("GET", "BINGET", "LONG_BINGET")
MARK = object()


@dataclass
class PickleScan:
    """What a checkpoint asks for."""

    protocol: int | None = None  # of pickle, where the file says it
    kinds: dict[str, Kind] = field(default_factory=dict)  # how objects of each class are used


def scan_checkpoint(path: Path, *, zipped: bool) -> PickleScan:
    """Scan the pickle of objects in a file of torch.save; of no such file, nothing is told.

    Raises:
        Exception: damaged bytes can fail in any way.
    """
    if zipped:
        pickled = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
        return _scan(BytesIO(pickled))
    with path.open("rb") as file:  # the older format: magic number, version, system, objects
        if not _is_magic(file):
            return PickleScan()
        _scan(file)
        _scan(file)
        return _scan(file)


def _is_magic(file: IO[bytes]) -> bool:
    if file.read(1) != b"\x80":  # every protocol from 2 begins so
        return False
    file.seek(0)
    magic = torch.serialization.MAGIC_NUMBER
    return sum(argument == magic for _, argument, _ in pickletools.genops(file)) == 1


def _scan(file: IO[bytes]) -> PickleScan:
    """Go through one pickle, up to its end."""
    scan = PickleScan()
    stack: list[Any] = []  # the name of a class for it and for its objects, else None
    memo: dict[Any, Any] = {}
    for instruction, argument, _ in pickletools.genops(file):
        name = instruction.name
        if name == "PROTO":
            scan.protocol = argument
        elif name in STORES:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in FETCHES:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(MARK)
        elif name == "GLOBAL":
            stack.append(_class_name(str(argument)))
            scan.kinds.setdefault(stack[-1], "object")
        else:
            taken = _taken(stack, instruction.stack_before)
            if name in FILLED:
                if isinstance(taken[0], str):
                    scan.kinds[taken[0]] = FILLED[name]
                stack.append(taken[0])
            elif name in MAKES_AN_OBJECT:
                stack.append(taken[0])
            else:
                stack += [None] * len(instruction.stack_after)
    return scan


def _taken(stack: list[Any], before: Sequence[Any]) -> list[Any]:
    """What an instruction takes from the stack, the lowest first."""
    taken: list[Any] = []
    count = len(before)
    if pickletools.markobject in before:
        while (top := stack.pop()) is not MARK:
            taken.append(top)
        count = before.index(pickletools.markobject)
    taken += [stack.pop() for _ in range(count)]
    return taken[::-1]


def _class_name(argument: str) -> str:
    """Protocol 2 calls classes as Python 2 did."""
    module, _, name = argument.partition(" ")
    if (module, name) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[(module, name)])
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


# -------------------------------------------------------------------------------------------------
# Pickled checkpoints (.pt, .pth, .ckpt), opened without trust: tensors come out, code never runs.
#
# torch's weights-only reader builds tensors and plain containers, and nothing else. What training
# runs leave beside the weights, such as an `argparse.Namespace` or a `defaultdict`, is replaced
# by something inert; `pickle_scan` tells whether that has to be a dict, a list or nothing in
# particular. Everything else is refused.

# Classes, and packages of classes ("numpy."), that lie beside the weights in training checkpoints.
# None is called or imported: a stand-in takes the place of each.
BYSTANDERS = (
    "addict.",
    "argparse.Namespace",
    *(f"builtins.{kind}" for kind in ("bool", "bytes", "complex", "dict", "float", "frozenset")),
    *(f"builtins.{kind}" for kind in ("int", "list", "object", "range", "set", "slice", "str")),
    "builtins.tuple",
    "collections.defaultdict",
    "collections.deque",
    "collections.UserDict",
    "collections.UserList",
    "datetime.",
    "decimal.Decimal",
    "easydict.",
    "fractions.Fraction",
    "functools.partial",
    "lightning.",
    "lightning_fabric.",
    "ml_collections.",
    "numpy.",
    "omegaconf.",
    "pathlib.",
    "pytorch_lightning.",
    "torch.optim.",
    "torch.torch_version.TorchVersion",
    "types.SimpleNamespace",
    "typing.Any",
    "uuid.UUID",
    "yacs.",
)


class Placeholder:
    """Stands for an object beside the weights; takes whatever it is given and keeps none of it."""

    def __new__(cls, *_: object, **__: object) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class DictPlaceholder:
    """Stands for a class of dicts: torch's reader sets the items of exact dict types alone."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()  # which may be given attributes, too


class ListPlaceholder:
    """Stands for a class of lists: torch's reader appends to exact lists alone."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return []


STAND_INS: dict[Kind, Callable[..., Any]] = {
    "object": Placeholder,
    "dict": DictPlaceholder,
    "list": ListPlaceholder,
}


def read_pickle(path: Path) -> Any:
    """What torch's weights-only reader makes of a file.

    Raises:
        SmaltiError: damaged, cut short, no checkpoint; it asks for code; or an object in it cannot
            be read without.
    """
    zipped = zipfile.is_zipfile(path)  # else the format before torch 1.6, or no checkpoint at all
    scan = PickleScan()
    try:
        if zipped:
            _check_sums(path)
        scan = scan_checkpoint(path, zipped=zipped)
        inert = {name: STAND_INS[kind] for name, kind in scan.kinds.items() if _is_inert(name)}
        stand_ins = torch.serialization.safe_globals([(kind, name) for name, kind in inert.items()])
        with stand_ins, warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (SmaltiError, PermissionError, MemoryError):
        raise
    except Exception as error:  # damaged bytes can fail in any way
        said = str(error) or type(error).__name__
        raise SmaltiError(f"{path} {_what_is_wrong(said, scan)}") from error


def _is_inert(name: str) -> bool:
    """Whether something may stand in for a class: only code asks for others."""
    return any(name.startswith(b) if b.endswith(".") else name == b for b in BYSTANDERS)


def _check_sums(path: Path) -> None:
    """Raise `SmaltiError` if the bytes of a zip file are not those that were written."""
    with zipfile.ZipFile(path) as archive:
        if not any(member.CRC for member in archive.infolist()):  # torch can be told to keep none
            return
        damaged = archive.testzip()  # reads on in pieces of a megabyte
    if damaged is not None:
        raise SmaltiError(
            f"{path} is damaged: the checksum of {damaged} inside does not match; fetch or copy "
            "the file again"
        )


def _what_is_wrong(said: str, scan: PickleScan) -> str:
    """The reason for an error of torch's reader, without its advice to read without care."""
    if "nsupported global" in said or "unsupported GLOBAL" in said:
        name = said.partition("GLOBAL ")[2].split()[0]
        name = name if "." in name else f"builtins.{name}"
        return (
            f"is a pickle that calls {name}, which is code and is never run here: save the state "
            "dict alone, best as safetensors, where you trust the file"
        )
    reason = said.rpartition("WeightsUnpickler error: ")[2].strip().splitlines()[0]
    reason = reason.partition(". ")[0]
    if reason.startswith("Unsupported operand"):
        if scan.protocol not in (None, 2):
            return (
                f"has pickle protocol {scan.protocol}; only protocol 2 is read: save it again with "
                "torch.save's default, or as safetensors"
            )
        reason = "torch.save writes no such file by default"
    if "TorchScript" in reason:
        return "is a program of TorchScript, which is never run here: save its state dict alone"
    if reason.startswith(("Can only", "Trying to call")):
        filled = [name for name, kind in scan.kinds.items() if kind != "object"]
        names = f" ({', '.join(filled[:3])})" if filled else ""
        return (
            f"holds objects{names} that cannot be read without running code: save the state dict "
            "alone, best as safetensors"
        )
    return f"is damaged, cut short, or no checkpoint of PyTorch: {reason}"


# -------------------------------------------------------------------------------------------------
# Published checkpoints, opened without trust: tensors come out, code never runs.

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
class PublishedCheckpoint:
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

    def renamed(self, rename: Callable[[str], str]) -> "PublishedCheckpoint":
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


def read_checkpoint(path: Path, wrappers: Sequence[str] = WRAPPERS) -> PublishedCheckpoint:
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
    return PublishedCheckpoint(
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
