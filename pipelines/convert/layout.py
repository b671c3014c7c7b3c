"""How the tensors of a published checkpoint ("theirs") correspond to ours, in both directions.

Link            some of our tensors <-> some of theirs, with the same values
Layout          all links of a model, and what theirs and ours have beyond them
import_tensors  theirs -> ours, verified: nothing missing, unknown, mis-shaped or not finite
export_tensors  ours -> theirs
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import ConversionError
from smalti.pipelines.convert.reader import PublishedCheckpoint

Tensors = Sequence[Tensor]


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Link:
    """Tensors of ours and tensors of theirs with the same values.

    `to_ours` maps their tensors, in the order of `theirs`, to ours, in the order of `ours`;
    `to_theirs` is its inverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors] = _unchanged
    to_theirs: Callable[[Tensors], Tensors] = _unchanged


def same(ours: str, theirs: str) -> Link:
    """One tensor, under two names."""
    return Link((ours,), (theirs,))


def joined(ours: Sequence[str], theirs: str) -> Link:
    """Tensors of ours with equally many rows, which theirs concatenates along the rows."""
    return Link(
        tuple(ours),
        (theirs,),
        to_ours=lambda tensors: tensors[0].chunk(len(ours)),
        to_theirs=lambda tensors: [torch.cat(list(tensors))],
    )


def pointwise(ours: str, theirs: str) -> Link:
    """A 1x1 convolution of ours, (O, I, 1, 1), which theirs stores as a matrix (O, I)."""
    return Link(
        (ours,),
        (theirs,),
        to_ours=lambda tensors: [t[..., None, None] if t.ndim == 2 else t for t in tensors],
        to_theirs=lambda tensors: [t[..., 0, 0] for t in tensors],
    )


def class_table(ours: str, theirs: str, num_classes: int, *, null_is_optional: bool) -> Link:
    """Embeddings of the classes, and of the null class in the last row.

    Args:
        null_is_optional: without class dropout, theirs has no row for the null class. Ours is zero
            then, see `Prior.has_null_class`.
    """

    def to_ours(tensors: Tensors) -> Tensors:
        (table,) = tensors
        return [F.pad(table, (0, 0, 0, 1)) if len(table) == num_classes else table]

    def to_theirs(tensors: Tensors) -> Tensors:
        (table,) = tensors
        return [table[:-1] if null_is_optional and not table[-1].any() else table]

    return Link((ours,), (theirs,), to_ours, to_theirs)


@dataclass(frozen=True)
class Buffer:
    """A tensor of theirs that our model does not store: `value` is written on export."""

    value: Tensor
    # True: the value follows from the sizes of the model, and is compared on import.
    # False: it is a statistic of a training run, and is dropped on import.
    derived: bool = True
    tolerance: float = 1e-5  # of the comparison, absolute


@dataclass(frozen=True)
class Layout:
    """Everything that a published file may contain, and its place in our model."""

    links: Sequence[Link]
    buffers: Mapping[str, Buffer] = field(default_factory=dict)  # theirs
    # Patterns of their names that are dropped: losses, discriminators, moving averages.
    surplus: Sequence[str] = ()
    # Patterns of our names that theirs does not have.
    own: Sequence[str] = ()


@dataclass(frozen=True)
class Imported:
    """The result of `import_tensors`."""

    tensors: dict[str, Tensor]  # ours
    used: int  # number of their tensors
    checked: list[str]  # their buffers that were compared
    dropped: list[str]  # their tensors that our model does not need


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches any of the patterns, such as "loss.*"."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _import_link(
    link: Link, checkpoint: PublishedCheckpoint, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    theirs = [checkpoint.tensors[name] for name in link.theirs]
    names, shapes = ", ".join(link.theirs), ", ".join(str(tuple(t.shape)) for t in theirs)
    wrong = f"{checkpoint.path}: {names} has shape {shapes}, which does not fit the other tensors"
    try:
        made = list(link.to_ours(theirs))
        ours = dict(zip(link.ours, made, strict=True))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConversionError(wrong) from error
    for name, tensor in ours.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(f"{wrong}: expected {tuple(expected[name].shape)} for {name}")
        floats = expected[name].is_floating_point()
        if any(found.is_floating_point() != floats for found in (*theirs, tensor)):
            kinds = ", ".join(str(found.dtype) for found in theirs)
            wanted = "floating-point" if floats else "integer"
            raise ConversionError(
                f"{checkpoint.path}: {names} holds {kinds} values; expected {wanted} ones"
            )
    for name in link.theirs:
        _check_finite(name, checkpoint)
    return ours


def _check_finite(name: str, checkpoint: PublishedCheckpoint) -> None:
    """Raise `ConversionError` if a tensor is infinite or NaN anywhere in single precision."""
    wrong = (~checkpoint.tensors[name].float().isfinite()).sum().item()
    if wrong:
        raise ConversionError(
            f"{checkpoint.path}: {name} holds {wrong} values that are infinite or NaN: the file is "
            "damaged, or its training diverged"
        )


def _check_buffer(name: str, buffer: Buffer, checkpoint: PublishedCheckpoint) -> None:
    found = checkpoint.tensors[name]
    if found.shape != buffer.value.shape:
        raise ConversionError(
            f"{checkpoint.path}: {name} has shape {tuple(found.shape)}; a model of this size has "
            f"{tuple(buffer.value.shape)}"
        )
    rounding = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    tolerance = max(buffer.tolerance, rounding)
    close = torch.isclose(found.double(), buffer.value.double(), rtol=0, atol=tolerance)
    if not close.all():
        raise ConversionError(
            f"{checkpoint.path}: {name} differs from that of a model of this size in "
            f"{int((~close).sum())} of {found.numel()} values"
        )


def import_tensors(
    layout: Layout, checkpoint: PublishedCheckpoint, expected: Mapping[str, Tensor], source: str
) -> Imported:
    """Our tensors from theirs, every one of which is used exactly once.

    Args:
        expected: the state dict of our model, for its shapes (it may be on the meta device).

    Raises:
        ConversionError: a tensor is missing, unknown, of the wrong shape or type, or not finite; a
            derived buffer has another value.
    """
    theirs, path = checkpoint.tensors, checkpoint.path
    wanted = [name for link in layout.links for name in link.theirs]
    dropped = [n for n in theirs if n not in wanted and matches(n, layout.surplus)]
    surplus = sorted(theirs.keys() - set(wanted) - layout.buffers.keys() - set(dropped))
    missing = [name for name in wanted if name not in theirs]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = f"; it has {surplus[0]}, which is unknown" if surplus else ""
        raise ConversionError(f"{path} lacks the tensor {missing[0]}{more}{hint}")
    if surplus:
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise ConversionError(
            f"{path} has a tensor {surplus[0]}{more} that no {source} of this size has"
        )
    tensors: dict[str, Tensor] = {}
    for link in layout.links:
        tensors |= _import_link(link, checkpoint, expected)
    checked: list[str] = []
    for name in layout.buffers.keys() & theirs.keys():
        if layout.buffers[name].derived:
            _check_buffer(name, layout.buffers[name], checkpoint)
        (checked if layout.buffers[name].derived else dropped).append(name)
    return Imported(tensors, len(wanted), sorted(checked), dropped)


def export_tensors(layout: Layout, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours: the inverse of `import_tensors`."""
    linked = {name for link in layout.links for name in link.ours}
    unknown = sorted(n for n in ours.keys() - linked if not matches(n, layout.own))
    if unknown:
        raise ConversionError(f"the published layout has no place for {unknown[0]}")
    theirs: dict[str, Tensor] = {}
    for link in layout.links:
        made = link.to_theirs([ours[name] for name in link.ours])
        theirs |= dict(zip(link.theirs, made, strict=True))
    return theirs | {name: buffer.value.clone() for name, buffer in layout.buffers.items()}
