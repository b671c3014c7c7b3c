"""The weights of a model in safetensors files, compared with the model before they are used.

    chosen_dtype    the precision that a user asks for
    plain_state     a state dict without what torch.compile, DataParallel and others put into names
    state_to_save   the tensors of a model, if loading would accept them
    save_weights, WeightsFile, hash_weights

Names and shapes are compared, and the size of the model with that of the file, before memory is
allocated. Pickle is never read.

Tensors are read here, each once, straight into the memory of the model, and hashed on the way:
safetensors' `load_file` maps the file, so that the mapped pages count beside the copies, and the
hash would take a second pass. The library verifies the header. Values that are converted, to
another precision or for a hash, pass through a small piece of memory: the embedding of a small
prior alone is a fifth of it.
"""

import hashlib
import json
import math
from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from smalti.config import nearest
from smalti.errors import CheckpointError, ConfigurationError
from smalti.files import changed, replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PIECE = 2**22  # bytes that are converted at once
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# -------------------------------------------------------------------------------------------------
# Precision: a `torch.dtype`, its name, or "auto", that of the saved weights; of a pipeline also
# int8 or int4, of the weights of linear layers alone, and "auto" may be the one that was measured

AS_SAVED = "auto"

TYPES = {  # in a safetensors file -> in torch
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
    "C64": "complex64",
}
PRECISIONS = ("bfloat16", "float16", "float32", "float64")  # of a model
WEIGHT_ONLY_NAMES = ("int8", "int4")  # of a prior, see smalti.prior.weight_only
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def chosen_dtype(
    dtype: "torch.dtype | str | None",
    torch_dtype: "torch.dtype | str | None" = None,
    weight_only: bool = False,
) -> "torch.dtype | Literal['auto'] | None":
    """The value of `dtype=` or of `torch_dtype=`, its older name; None if neither is given.

    Args:
        weight_only: whether int8 and int4 are possible.

    Raises:
        ConfigurationError: they differ, or one is not a precision.
    """
    given = _read_dtype("dtype", dtype, weight_only)
    older = _read_dtype("torch_dtype", torch_dtype, weight_only)
    if given is not None and older is not None and given != older:
        raise ConfigurationError(
            f"dtype is {dtype}, torch_dtype is {torch_dtype}: they differ, give one of them"
        )
    return older if given is None else given


def _read_dtype(
    argument: str, value: "torch.dtype | str | None", weight_only: bool
) -> "torch.dtype | Literal['auto'] | None":
    import torch

    if value is None or value == AS_SAVED:
        return value
    known = (*PRECISIONS, *(WEIGHT_ONLY_NAMES if weight_only else ()))
    name = SHORT_NAMES.get(str(value), str(value).removeprefix("torch."))
    if name in known:
        return getattr(torch, name)
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return value
    hint = nearest(name, {AS_SAVED, *known})
    raise ConfigurationError(f"{argument} is {value!r}, not a precision of a model; {hint}")


def short_name(dtype: "torch.dtype") -> str:
    """The short name of a precision: fp32, bf16, fp16; or its own: int8."""
    name = str(dtype).removeprefix("torch.")
    return next((short for short, long in SHORT_NAMES.items() if long == name), name)


# -------------------------------------------------------------------------------------------------
# Models inside torch.compile, DataParallel and the like

# The attributes in which torch.compile, DataParallel and its kin, FSDP, activation checkpointing
# and training scripts keep the model that they wrap.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "net")
COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel's, beside its "module."


def _inner(module: "nn.Module") -> "tuple[str, nn.Module] | None":
    """The name and the module inside a wrapper of torch; None if `module` is no wrapper."""
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return "module", module.module
    compiled = module._modules.get("_orig_mod")
    return None if compiled is None else ("_orig_mod", compiled)


def unwrapped(model: "nn.Module") -> "nn.Module":
    """The model inside torch.compile, DataParallel and the like; else `model` itself."""
    while (inner := _inner(model)) is not None:
        model = inner[1]
    return model


def plain_state(model: "nn.Module") -> "dict[str, Tensor]":
    """The state dict of a model, as if no part of it were wrapped or pruned.

    A pruned weight (torch.nn.utils.prune keeps the original and a mask) is 0 where it is masked.
    """
    inside = set()
    for name, part in model.named_modules(remove_duplicate=False):
        if (inner := _inner(part)) is not None:
            inside.add(f"{name}.{inner[0]}" if name else inner[0])
    state = dict(model.state_dict())
    if inside:
        state = {_without(name, inside): value for name, value in state.items()}
    for name in list(state):
        base = name.removesuffix("_mask")
        if name.endswith("_mask") and f"{base}_orig" in state and base not in state:
            weight, mask = state.pop(f"{base}_orig"), state.pop(name)
            state[base] = mask.to(weight.dtype) * weight
    return state


def _without(name: str, inside: Container[str]) -> str:
    """A name without the parts that lead into the modules `inside` wrappers."""
    path, kept = "", []
    for part in name.split("."):
        path = f"{path}.{part}" if path else part
        if path not in inside:
            kept.append(part)
    return ".".join(kept)


def plain_names(found: Iterable[str], expected: Collection[str]) -> dict[str, str]:
    """For each name in a file, the name of our model that it means; counters are left out.

    A name that is not expected loses the parts of `WRAPPERS`, wherever they are in it. A name that
    still is not expected, or means a tensor that is there already, stays as it is.
    """
    plain = {without_wrappers(name): name for name in expected}
    taken = {name for name in found if name in expected}
    names: dict[str, str] = {}
    for name in found:
        if name in expected:
            names[name] = name
        elif name.rpartition(".")[2] != COUNTER:
            meant = plain.get(without_wrappers(name), name)
            names[name] = name if meant in taken else meant
            taken.add(names[name])
    return names


def without_wrappers(name: str, wrappers: Collection[str] = WRAPPERS) -> str:
    """ "module.blocks.0._orig_mod.weight" -> "blocks.0.weight"."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


# -------------------------------------------------------------------------------------------------
# Headers: what is known of tensors before they are read


@dataclass(frozen=True)
class _Header:
    """Shape and kind of a tensor; loading never converts the kind."""

    shape: tuple[int, ...]
    kind: str  # "float", "integer", "bool" or "complex"
    code: str = ""  # of the type in a safetensors file
    start: int = 0  # of the values in that file, in bytes
    path: Path = Path()  # that file

    @property
    def dtype(self) -> "torch.dtype":
        """The type in the file."""
        import torch

        return getattr(torch, TYPES[self.code])

    def pieces(self, stream: BinaryIO, memory: "Tensor") -> "Iterator[Tensor]":
        """The values in the file, in order, as many at once as `memory` (bytes) has place for. A
        piece is valid until the next one is read."""
        rest, size = math.prod(self.shape), self.dtype.itemsize
        stream.seek(self.start)
        while rest:
            count = min(rest, len(memory) // size)
            piece = memory[: count * size].view(self.dtype)
            _fill(piece, stream)
            rest -= count
            yield piece


def _header(tensor: "Tensor") -> _Header:
    dtype = tensor.dtype
    if dtype.is_floating_point or dtype.is_complex:
        return _Header(tuple(tensor.shape), "complex" if dtype.is_complex else "float")
    return _Header(tuple(tensor.shape), "bool" if str(dtype) == "torch.bool" else "integer")


# First letter of a type in a safetensors file (BF16, F8_E4M3, I64, U8, C64) -> kind of number.
KINDS = {"B": "float", "F": "float", "I": "integer", "U": "integer", "C": "complex"}


def _read_headers(path: Path) -> dict[str, _Header]:
    """The headers of the tensors in a file, in the order of their values.

    Raises:
        CheckpointError: the file is damaged, or has a type of numbers that torch has not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass  # the library has verified the header: values lie in the file, without gaps
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(size))
    entries.pop("__metadata__", None)
    headers = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        code = entry["dtype"]
        if code not in TYPES:
            raise CheckpointError(f"{path}: {name} has numbers of type {code}, which are not read")
        kind = "bool" if code == "BOOL" else KINDS[code[0]]
        start = 8 + size + entry["data_offsets"][0]
        headers[name] = _Header(tuple(entry["shape"]), kind, code, start, path)
    return headers


def _compare(expected: Mapping[str, _Header], found: Mapping[str, _Header], what: str) -> None:
    """Raise `CheckpointError` unless names, shapes and kinds are those of the model."""
    missing, surplus = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = f"; it has {surplus[0]}, which is unknown" if surplus else ""
        raise CheckpointError(f"{what} lacks the tensor {missing[0]}{more}{hint}")
    if surplus:
        hint = nearest(surplus[0], expected)
        raise CheckpointError(
            f"{what} has a tensor {surplus[0]} that the model does not have; {hint}"
        )
    for name, header in expected.items():
        if found[name].shape != header.shape:
            raise CheckpointError(
                f"{what}: {name} has shape {found[name].shape}; the config requires {header.shape}"
            )
        if found[name].kind != header.kind:
            raise CheckpointError(
                f"{what}: {name} has {found[name].kind} values; the model takes {header.kind}"
            )


# -------------------------------------------------------------------------------------------------
# A model without memory

# Bytes of tables that a model computes from its config and does not save, beyond what the size of
# its file explains. The tables of a prior at 1024 px take about 20 MB.
TABLES = 64 * 2**20


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build models whose parameters have no memory; buffers have their values."""
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def on_parameter(module: object, name: str, parameter: Any) -> Any:
        del module, name
        return (
            parameter
            if parameter is None
            else nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        )

    handle = register_module_parameter_registration_hook(on_parameter)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _registering_at_most(limit: int, path: Path) -> Iterator[None]:
    """Stop building a model once it has more than `limit` parameters.

    Otherwise a config with a billion layers would exhaust the memory before the comparison.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def on_parameter(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise CheckpointError(
                f"{path} has far fewer tensors than the model that the config describes"
            )

    handle = register_module_parameter_registration_hook(on_parameter)
    try:
        yield
    finally:
        handle.remove()


def _check_tables(model: "nn.Module", paths: Collection[Path], path: Path) -> None:
    """Raise `CheckpointError` if tables that are not saved, but computed from the config, would
    take far more memory than the saved weights: for a grid of ten million positions, for example.
    """
    size = sum(buffer.nbytes for buffer in model.buffers())
    if size > TABLES + 4 * sum(own.stat().st_size for own in paths):
        raise CheckpointError(
            f"the tables of the model that the config beside {path} describes would take "
            f"{size / 1e6:,.0f} MB, far more than its weights: the config is damaged or hostile"
        )


# -------------------------------------------------------------------------------------------------
# Saving


def state_to_save(model: "nn.Module", build: "Callable[[], nn.Module]") -> "dict[str, Tensor]":
    """The tensors of a model under the names that loading demands.

    What torch.compile and DataParallel put around layers is left out, and what pruning masks is 0.

    Args:
        build: makes another model of the same config.

    Raises:
        CheckpointError: the model has other tensors than one of its config; a value is infinite or
            NaN.
    """
    import torch

    with torch.device("meta"):
        expected = {name: _header(value) for name, value in build().state_dict().items()}
    state = plain_state(model)
    try:
        found = {name: _header(value) for name, value in state.items()}
        _compare(expected, found, f"this {type(model).__name__}")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: it could not be loaded again, so nothing was written; undo what was done to "
            "its layers, for example with torch.nn.utils.parametrize.remove_parametrizations"
        ) from error
    for name, value in state.items():
        _check_finite(name, value)
    return {name: state[name] for name in expected}


def _check_finite(name: str, value: "Tensor") -> None:
    if value.is_meta:
        raise CheckpointError(f"{name} is on the meta device: load its values before saving")
    if not value.is_floating_point() or value.isfinite().all():
        return
    count = int((~value.isfinite()).sum())
    half = ", or the precision bfloat16, whose range is larger" if value.itemsize == 2 else ""
    raise CheckpointError(
        f"{name} has {count:,} values that are infinite or NaN, so nothing was written: take the "
        f"weights of an earlier checkpoint{half}"
    )


def save_weights(path: Path, state: "Mapping[str, Tensor]") -> None:
    """Write tensors, from any device, to a safetensors file."""
    from safetensors.torch import save_file

    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt"})


def hash_weights(weights: "Iterable[tuple[str, Tensor]]", prefix: bytes = b"") -> str:
    """sha256 over `prefix` and the names, shapes and values of tensors, on any device, by name.

    Half-precision values are hashed as the equal 32-bit values, so that a model has the same hash
    in memory, on disk, and after loading.
    """
    digest = hashlib.sha256(prefix)
    for name, tensor in weights:
        values = tensor.detach().flatten()
        _add_to_hash(digest, name, tensor.dtype, tensor.shape, values.split(PIECE // 4))
    return digest.hexdigest()


def _add_to_hash(
    digest: Any, name: str, dtype: "torch.dtype", shape: Iterable[int], pieces: "Iterable[Tensor]"
) -> None:
    """Add a tensor of type `dtype`, the values of which come in pieces of any type."""
    import torch

    hashed = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    digest.update(f"{name}/{hashed}/{tuple(shape)}".encode())
    for piece in pieces:
        digest.update(_bytes_of(piece.cpu().to(dtype).to(hashed)))


# -------------------------------------------------------------------------------------------------
# Loading


class WeightsFile:
    """Safetensors files that have every parameter and buffer of a model, and nothing else.

    Args:
        paths: one, or several of which each has some of the tensors.
        build: makes the model. It is called with parameters on the meta device, so it initialises
            them with functions such as those of torch.nn.init, and does not read their values.
        beside: names of tensors that the files may have and that are not of the model.

    Raises:
        CheckpointError: a file is damaged; a tensor is missing, unknown, in two files, or has the
            wrong shape or kind.
    """

    def __init__(
        self, paths: Sequence[Path], build: "Callable[[], nn.Module]", beside: Collection[str] = ()
    ) -> None:
        import torch

        self.paths, self._build = paths, build
        headers: dict[str, _Header] = {}
        for own in paths:
            for name, header in _read_headers(own).items():
                if name in headers:
                    raise CheckpointError(f"{own} and {headers[name].path} both have {name}")
                headers[name] = header
        path = paths[0] if len(paths) == 1 else paths[0].parent
        with torch.device("meta"), _registering_at_most(4 * len(headers) + 64, path):
            self._outline = build()
        expected = self._outline.state_dict()
        names = plain_names([name for name in headers if name not in beside], expected)
        found = {names[name]: header for name, header in headers.items() if name in names}
        _compare({name: _header(value) for name, value in expected.items()}, found, str(path))
        _check_tables(self._outline, paths, path)
        self._headers = found  # in the order of the values
        self._types = {name: value.dtype for name, value in expected.items()}

    def saved_dtype(self) -> "torch.dtype | None":
        """The precision that the model was saved in, apart from parts that it keeps in another;
        None if the files have several precisions otherwise."""
        import torch

        names = {name: TYPES[header.code] for name, header in self._headers.items()}
        names = {name: kind for name, kind in names.items() if kind in PRECISIONS}
        floating = {name: getattr(torch, kind) for name, kind in names.items()}
        for dtype in dict.fromkeys(floating.values()):
            cast = self._outline.to(dtype).state_dict()
            if all(cast[name].dtype == saved for name, saved in floating.items()):
                return dtype
        return None

    def load(
        self, sha256: Mapping[str, str] | None = None, dtype: "torch.dtype | None" = None
    ) -> "nn.Module":
        """The model, with all values read from the files.

        The memory in use never exceeds that of the model by more than one of its tensors, or than
        a few times `PIECE`. The global random state stays as it was.

        Args:
            sha256: the hash that each file must have, by name; None: any.
            dtype: as of `model.to(dtype)`; None: the precision that the model is built in.

        Raises:
            CheckpointError: a file has another hash.
        """
        import torch

        with torch.random.fork_rng(devices=[]), _parameters_on_meta():
            model = self._build()
        types = self._types
        if dtype is not None:
            model.to(dtype)
            types = {k: v.dtype for k, v in self._outline.to(dtype).state_dict().items()}
        state: dict[str, Tensor] = {}
        for path in self.paths:
            digest = hashlib.sha256() if sha256 is not None else None
            state.update(self._read(path, types, digest))
            if digest is not None and sha256 and digest.hexdigest() != sha256.get(path.name):
                raise changed(path)
        model.load_state_dict(state, assign=True)
        return model

    def hash_weights(self, prefix: bytes) -> str:
        """`hash_weights` of the model in the precision that it is built in, from the files."""
        import torch

        digest, memory = hashlib.sha256(prefix), torch.empty(PIECE, dtype=torch.uint8)
        for name in sorted(self._headers):
            header = self._headers[name]
            with header.path.open("rb") as stream:
                pieces = header.pieces(stream, memory)
                _add_to_hash(digest, name, self._types[name], header.shape, pieces)
        return digest.hexdigest()

    def _read(
        self, path: Path, types: "Mapping[str, torch.dtype]", digest: Any
    ) -> "Iterator[tuple[str, Tensor]]":
        """Names and tensors of a file, of the given types, in its order; `digest`, if given, takes
        all its bytes.

        Memory for conversions is allocated once, before the tensors: between them it would leave
        holes, which together were a fifth of a model.
        """
        import torch

        headers = {name: header for name, header in self._headers.items() if header.path == path}
        position, memory = 0, torch.empty(PIECE, dtype=torch.uint8)
        with path.open("rb") as stream:
            for name, header in headers.items():
                if digest is not None:  # the header, and counters, which are no tensors of a model
                    digest.update(stream.read(header.start - position))
                built, wanted = self._types[name], types[name]
                tensor = torch.empty(header.shape, dtype=wanted)
                if header.dtype == wanted and wanted.itemsize <= built.itemsize:
                    stream.seek(header.start)
                    _fill(tensor, stream)
                    if digest is not None:
                        digest.update(_bytes_of(tensor))
                else:
                    parts = tensor.flatten().split(PIECE // header.dtype.itemsize)
                    for part, piece in zip(parts, header.pieces(stream, memory), strict=False):
                        part.copy_(piece if wanted == built else piece.to(built))
                        if digest is not None:
                            digest.update(_bytes_of(piece))
                position = stream.tell()
                yield name, tensor
            if digest is not None:
                digest.update(stream.read())


def pickle_hint(folder: Path) -> str:
    """The end of a sentence that names a pickle in a folder, if there is one."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    return f" ({names[0]} is a pickle, which can run code and is not read)" if names else ""


def _fill(tensor: "Tensor", stream: BinaryIO) -> None:
    """Read the values of a contiguous tensor."""
    values = _bytes_of(tensor)
    if stream.readinto(values) != len(values):  # type: ignore[attr-defined]
        raise CheckpointError(f"{stream.name} became shorter while it was read: load it again")


def _bytes_of(tensor: "Tensor") -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    return tensor.flatten().view(torch.uint8).numpy().data
