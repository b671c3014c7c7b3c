"""The precision that a model is loaded in, as users of Hugging Face say it: a `torch.dtype`, its
name, or "auto"."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smalti.config import nearest
from smalti.errors import SmaltiError

if TYPE_CHECKING:
    import torch

AS_SAVED = "auto"
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # in safetensors


def chosen_dtype(
    dtype: "torch.dtype | str | None", torch_dtype: "torch.dtype | str | None"
) -> "torch.dtype | Literal['auto'] | None":
    """What `dtype=` and `torch_dtype=`, its older name, ask for together; None: neither is given.

    Raises:
        SmaltiError: they differ, or one of them is no floating-point type.
    """
    given, older = _read("dtype", dtype), _read("torch_dtype", torch_dtype)
    if given is not None and older is not None and given != older:
        raise SmaltiError(
            f"dtype is {dtype}, torch_dtype is {torch_dtype}: they mean the same, give one of them"
        )
    return older if given is None else given


def _read(
    argument: str, value: "torch.dtype | str | None"
) -> "torch.dtype | Literal['auto'] | None":
    import torch

    if value is None or value == AS_SAVED:
        return value
    if isinstance(value, str) and value in NAMES.values():
        return getattr(torch, value)
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return value
    hint = nearest(str(value).removeprefix("torch."), {AS_SAVED, *NAMES.values()})
    raise SmaltiError(f"{argument} is {value!r}, no precision of a model; {hint}")


def saved_dtype(path: Path) -> "torch.dtype | None":
    """The type of the floating-point numbers in a safetensors file; None if there are several."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        codes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    names = {NAMES[code] for code in codes if code in NAMES}
    return getattr(torch, names.pop()) if len(names) == 1 else None
