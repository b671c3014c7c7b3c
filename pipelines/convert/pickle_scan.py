"""What a pickle would do, read off its instructions: nothing is built or called.

A pickle is a program for a stack machine. Going through it with a stack of names tells which
classes it asks for, and whether their objects are filled like dicts or like lists.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

import torch

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
