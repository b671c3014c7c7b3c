"""Pickled checkpoints (.pt, .pth, .ckpt), opened without trust: tensors come out, code never runs.

torch's weights-only reader builds tensors and plain containers, and nothing else. What training
runs leave beside the weights, such as an `argparse.Namespace` or a `defaultdict`, is replaced by
something inert; `pickle_scan` tells whether that has to be a dict, a list or nothing in particular.
Everything else is refused.
"""

import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smalti.errors import SmaltiError
from smalti.pipelines.convert.pickle_scan import Kind, PickleScan, scan_checkpoint

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
