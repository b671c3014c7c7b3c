"""Published checkpoints, read without trusting them: tensors come out, code never runs.

    scan_checkpoint    which classes a pickle imports, and how their objects are filled
    read_pickle        the content of a .pt, .pth or .ckpt file, with placeholders for objects
    read_checkpoint    the state dict inside a pickle or a safetensors file

This is our own for safety. torch's weights-only reader builds tensors and plain containers and
refuses everything else, but training runs save other objects beside the weights, such as an
`argparse.Namespace` or a `defaultdict`. Allowing the real classes would run their code; a
placeholder runs nothing, but torch fills only exact dicts and exact lists, so the kind
that an object needs must be known in advance. The function
`torch.serialization.get_unsafe_globals_in_checkpoint` does not give it: it returns class names
only, reads zip files only, and does not read newer pickle protocols.
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

from smalti.errors import ConversionError, SmaltiError
from smalti.files import read_json
from smalti.weights import COUNTER, without_wrappers
from smalti.weights import WRAPPERS as WRAPPED_IN

# -------------------------------------------------------------------------------------------------
# Scanning a pickle. A pickle is a program for a stack machine; this one keeps only class names on
# its stack and builds nothing.

Kind = Literal["object", "dict", "list"]  # how the objects of a class are filled

FILLS: dict[str, Kind] = {  # instructions that put items into the object below them
    "SETITEM": "dict",
    "SETITEMS": "dict",
    "APPEND": "list",
    "APPENDS": "list",
}
BUILDS = ("REDUCE", "NEWOBJ", "BUILD")  # make or change an object of the lowest argument's class
STORES = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")  # the last takes the next free number
FETCHES = ("GET", "BINGET", "LONG_BINGET")
MARK = object()


@dataclass
class PickleScan:
    """What a pickle imports."""

    protocol: int | None = None  # of pickle, where the file states it
    kinds: dict[str, Kind] = field(default_factory=dict)  # class name -> how its objects are filled


def scan_checkpoint(path: Path, *, zipped: bool) -> PickleScan:
    """Scan the pickled objects in a file of torch.save; empty if it is no such file.

    Raises:
        Exception: damaged bytes can fail in any way.
    """
    if zipped:
        pickled = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
        return _scan(BytesIO(pickled))
    # Before torch 1.6 a file held four pickles: magic number, version, system, objects.
    with path.open("rb") as file:
        if not _starts_with_magic_number(file):
            return PickleScan()
        _scan(file)
        _scan(file)
        return _scan(file)


def _starts_with_magic_number(file: IO[bytes]) -> bool:
    if file.read(1) != b"\x80":  # PROTO, the first instruction since protocol 2
        return False
    file.seek(0)
    magic = torch.serialization.MAGIC_NUMBER
    return sum(argument == magic for _, argument, _ in pickletools.genops(file)) == 1


def _scan(file: IO[bytes]) -> PickleScan:
    """Follow the instructions of one pickle up to its end."""
    scan = PickleScan()
    stack: list[Any] = []  # the class name for a class or an object of it, else None
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
            taken = _pop(stack, instruction.stack_before)
            if name in FILLS:
                if isinstance(taken[0], str):
                    scan.kinds[taken[0]] = FILLS[name]
                stack.append(taken[0])
            elif name in BUILDS:
                stack.append(taken[0])
            else:
                stack += [None] * len(instruction.stack_after)
    return scan


def _pop(stack: list[Any], before: Sequence[Any]) -> list[Any]:
    """Take the arguments of an instruction from the stack, the lowest first."""
    taken: list[Any] = []
    count = len(before)
    if pickletools.markobject in before:  # everything above the mark, and what is named below it
        while (top := stack.pop()) is not MARK:
            taken.append(top)
        count = before.index(pickletools.markobject)
    taken += [stack.pop() for _ in range(count)]
    return taken[::-1]


def _class_name(argument: str) -> str:
    """ "module name" -> "module.name"; protocol 2 uses Python 2's names, which are translated."""
    module, _, name = argument.partition(" ")
    if (module, name) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[(module, name)])
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


# -------------------------------------------------------------------------------------------------
# Reading a pickle through torch's weights-only reader, with placeholders for harmless classes.

# Classes, and packages of classes ("numpy."), that training runs save beside the weights. None is
# imported or called: a placeholder takes the place of each. All other names are refused.
IGNORED_CLASSES = (
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
    """Replaces an object beside the weights: accepts any arguments and state, and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class DictPlaceholder:
    """Replaces a class of dicts; torch's reader sets items of exact dict types alone."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()  # unlike a dict, it can also be given attributes


class ListPlaceholder:
    """Replaces a class of lists; torch's reader appends to exact lists alone."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return []


PLACEHOLDERS: dict[Kind, Callable[..., Any]] = {
    "object": Placeholder,
    "dict": DictPlaceholder,
    "list": ListPlaceholder,
}


def read_pickle(path: Path) -> Any:
    """The content of a file of torch.save, with placeholders for `IGNORED_CLASSES`.

    Raises:
        ConversionError: it is damaged, cut short or no checkpoint; it would run code; or it has an
            object that only its own code could fill.
    """
    zipped = zipfile.is_zipfile(path)  # else the format before torch 1.6, or no checkpoint at all
    scan = PickleScan()
    try:
        if zipped:
            _verify_checksums(path)
        scan = scan_checkpoint(path, zipped=zipped)
        replaced = {name: PLACEHOLDERS[kind] for name, kind in scan.kinds.items() if _ignored(name)}
        allowed = torch.serialization.safe_globals([(new, name) for name, new in replaced.items()])
        with allowed, warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (SmaltiError, PermissionError, MemoryError):
        raise
    except Exception as error:  # damaged bytes can fail in any way
        reason = str(error) or type(error).__name__
        raise ConversionError(f"{path} {_explain(reason, scan)}") from error


def _ignored(name: str) -> bool:
    """Whether a class is in `IGNORED_CLASSES`."""
    return any(name.startswith(c) if c.endswith(".") else name == c for c in IGNORED_CLASSES)


def _verify_checksums(path: Path) -> None:
    """Raise `ConversionError` if the bytes of a zip file are not those that were written, or if its
    members would take more space than the file: torch neither compresses nor overlaps them."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > path.stat().st_size:
            raise ConversionError(
                f"{path} takes {path.stat().st_size / 1e6:,.1f} MB, and its parts would take "
                f"{size / 1e6:,.1f} MB: torch.save writes no such file"
            )
        if not any(member.CRC for member in archive.infolist()):  # torch can be set to write none
            return
        damaged = archive.testzip()  # reads a megabyte at a time
    if damaged is not None:
        raise ConversionError(
            f"{path} is damaged: the checksum of {damaged} inside does not match; download or copy "
            "the file again"
        )


def _explain(message: str, scan: PickleScan) -> str:
    """The cause of an error of torch's reader, without its advice to disable the check."""
    if "nsupported global" in message or "unsupported GLOBAL" in message:
        name = message.partition("GLOBAL ")[2].split()[0]
        name = name if "." in name else f"builtins.{name}"
        return (
            f"is a pickle that calls {name}, which is code and is never run here: if you trust the "
            "file, save its state dict alone, best as safetensors"
        )
    reason = message.rpartition("WeightsUnpickler error: ")[2].strip().splitlines()[0]
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
# The state dict inside a checkpoint.

CONFIG = "config.json"
SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (SAFETENSORS, *PICKLES)
SHARDS = ".index.json"  # end of the name of the file that lists which shard holds which tensor

# Keys under which training scripts save a state dict, the first choice first: most authors sample
# from the exponential moving average.
WRAPPERS = ("ema", "model", "module", "state_dict")

# What training scripts put before all names; in the middle of a name it may be a layer's own.
PREFIX = "net."

# The tensors of a checkpoint may have this many times the bytes of its file: some are shared
# between names, or repeated along an axis, and take no space of their own there.
EXPANSION = 4


@dataclass(frozen=True)
class PublishedCheckpoint:
    """The tensors of a published file, and the config.json beside it."""

    path: Path
    tensors: dict[str, Tensor]
    wrapper: str = ""  # the keys around them, "model" or "trainer.ema"; empty: none
    others: tuple[str, ...] = ()  # alternatives to the last key, with tensors
    config: dict[str, Any] = field(default_factory=dict)  # config.json beside the file, if any

    def shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """The shape of a tensor, none of whose dimensions is 0.

        Raises:
            ConversionError: the tensor is missing or empty, or has another number of dimensions.
        """
        if name not in self.tensors:
            raise ConversionError(f"{self.path} lacks the tensor {name}")
        shape = tuple(self.tensors[name].shape)
        if 0 in shape:
            raise ConversionError(f"{self.path}: {name} is empty, shape {shape}")
        if dimensions is not None and len(shape) != dimensions:
            raise ConversionError(
                f"{self.path}: {name} has shape {shape}; expected {dimensions} dimensions"
            )
        return shape

    def renamed(self, rename: Callable[[str], str]) -> "PublishedCheckpoint":
        """The same tensors under other names.

        Raises:
            ConversionError: two tensors would get the same name.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if rename(name) in tensors:
                raise ConversionError(f"{self.path} has the tensor {name} under two names")
            tensors[rename(name)] = tensor
        return replace(self, tensors=tensors)

    def has(self, prefix: str) -> bool:
        """Whether the name of any tensor starts with `prefix`."""
        return any(name.startswith(prefix) for name in self.tensors)

    def count(self, template: str) -> int:
        """The number of parts: one more than the highest i for which a name starts with `template`
        ("blocks.{}."), or 0.

        Raises:
            ConversionError: an index i is not below the number of tensors in the file.
        """
        before, _, after = template.partition("{}")
        highest = -1
        for name in self.tensors:
            number, _, rest = name.removeprefix(before).partition(".")
            if not name.startswith(before) or not number.isdecimal():
                continue
            if len(number) > 6 or int(number) >= len(self.tensors):
                raise ConversionError(
                    f"{self.path} has a tensor {name[:80]}, but no part before it"
                )
            if f".{rest}".startswith(after):
                highest = max(highest, int(number))
        return highest + 1


def read_checkpoint(path: Path, wrappers: Sequence[str] = WRAPPERS) -> PublishedCheckpoint:
    """The tensors of a file, or of the one weights file in a folder.

    Args:
        wrappers: keys under which the state dict may be saved, the first choice first.

    Raises:
        ConversionError: there is no such file, or not exactly one in the folder; it is damaged; it
            is a pickle that would run code; it contains no tensors, or tensors that are not dense.
    """
    file = _weights_file(path)
    content = _read_safetensors(file) if file.suffix == SAFETENSORS else read_pickle(file)
    tensors, keys = _unwrap(content, wrappers)
    if not tensors:
        raise ConversionError(f"{file} holds no tensors: it is not a checkpoint of a model")
    _check_tensors(tensors, file)
    config = file.parent / CONFIG
    settings = read_json(config) if config.is_file() else {}
    return PublishedCheckpoint(
        path=file,
        tensors=_without_prefixes(tensors, file),
        wrapper=".".join(keys),
        others=_others(content, keys, wrappers),
        config=settings if isinstance(settings, dict) else {},
    )


def _check_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise `ConversionError` unless tensors are dense, and not far larger than their file."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ConversionError(
                f"{file}: {name} is sparse, quantized or on the meta device; only dense tensors "
                "with values are read"
            )
    size, limit = sum(t.nbytes for t in tensors.values()), EXPANSION * file.stat().st_size
    if size > limit:
        largest = max(tensors, key=lambda name: tensors[name].nbytes)
        raise ConversionError(
            f"{file} takes {file.stat().st_size / 1e6:,.1f} MB, its tensors would take "
            f"{size / 1e6:,.1f} MB ({largest} has shape {tuple(tensors[largest].shape)}): values "
            "are repeated or shared; save the state dict again with every tensor cloned"
        )


def _weights_file(path: Path) -> Path:
    if not path.exists():
        raise ConversionError(f"{path} does not exist: give a checkpoint file or folder")
    inside = [path] if path.is_file() else sorted(path.iterdir())
    found = [p for p in inside if p.suffix in SUFFIXES]
    # The same weights are often published several times: as safetensors and as a pickle, or also in
    # half precision, as model.fp16.safetensors.
    found = [p for p in found if p.suffix == SAFETENSORS] or found
    found = [p for p in found if not any(p.stem.startswith(f"{o.stem}.") for o in found)]
    if len(found) == 1:
        return found[0]
    if any(p.name.endswith(SHARDS) for p in inside):
        raise ConversionError(
            f"{path} is split into shards: join them in one file, best as safetensors"
        )
    if path.is_file():  # its format is read from the content, whatever its name
        return path
    if found:
        names = ", ".join(p.name for p in found)
        raise ConversionError(
            f"{path} holds {len(found)} weights files ({names}): name one of them"
        )
    inner = sorted(p.name for p in path.iterdir() if (p / CONFIG).is_file())
    hint = f": give one of the folders inside, {', '.join(inner)}" if inner else ""
    raise ConversionError(f"{path} holds no weights file ({', '.join(SUFFIXES)}){hint}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConversionError(f"{path} is damaged or cut short: {error}") from error


def _unwrap(
    content: Any, wrappers: Sequence[str], depth: int = 4
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside a checkpoint, and the keys that lead to it."""
    if not isinstance(content, Mapping) or not depth:  # a pickle may contain itself
        return {}, []
    for key in wrappers:
        tensors, keys = _unwrap(content.get(key), wrappers, depth - 1)
        if tensors:
            return tensors, [key, *keys]
    return {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}, []


def _others(content: Any, keys: Sequence[str], wrappers: Sequence[str]) -> tuple[str, ...]:
    """Keys of other state dicts beside the one that `keys` lead to."""
    for key in keys[:-1]:
        content = content[key]
    return tuple(
        w for w in wrappers if keys and w != keys[-1] and _unwrap(content.get(w), wrappers)[0]
    )


def _without_prefixes(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors under the names that they had before the model was wrapped, without counters."""
    wrappers = [part for part in WRAPPED_IN if f"{part}." != PREFIX]
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == COUNTER:
            continue
        inside = without_wrappers(name, wrappers)
        if inside in plain:
            raise ConversionError(
                f"{file} has {inside} twice, once as {name}: save the state dict of one model alone"
            )
        plain[inside] = tensor
    while plain and all(name.startswith(PREFIX) for name in plain):
        plain = {name.removeprefix(PREFIX): tensor for name, tensor in plain.items()}
    return plain
