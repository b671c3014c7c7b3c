"""How the tensors of a published checkpoint and ours correspond, read in either direction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.pipelines.convert.reader import PublishedCheckpoint

Tensors = Sequence[Tensor]


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Link:
    """Tensors of ours and tensors of theirs that hold the same numbers.

    `to_ours` takes theirs in the order of their names and returns ours in the order of our names;
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
    """Tensors of ours with equally many rows, which theirs holds end to end."""
    return Link(
        tuple(ours),
        (theirs,),
        to_ours=lambda tensors: tensors[0].chunk(len(ours)),
        to_theirs=lambda tensors: [torch.cat(list(tensors))],
    )


def pointwise(ours: str, theirs: str) -> Link:
    """A 1x1 convolution of ours (O, I, 1, 1), which theirs holds as a matrix (O, I)."""
    return Link(
        (ours,),
        (theirs,),
        to_ours=lambda tensors: [t[..., None, None] if t.ndim == 2 else t for t in tensors],
        to_theirs=lambda tensors: [t[..., 0, 0] for t in tensors],
    )


@dataclass(frozen=True)
class Buffer:
    """A tensor of theirs that carries nothing new: not stored here, and made again on export."""

    value: Tensor
    # Whether the numbers follow from the sizes of the model, so that they can be checked; else they
    # are statistics of a training run.
    derived: bool = True
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Layout:
    """Everything that a published file may hold, and where it belongs in our model."""

    links: Sequence[Link]
    buffers: Mapping[str, Buffer] = field(default_factory=dict)  # theirs
    # Patterns of names of theirs that no model needs: losses, critics, shadow copies.
    surplus: Sequence[str] = ()
    # Patterns of names of ours that theirs does not have.
    own: Sequence[str] = ()


@dataclass(frozen=True)
class Imported:
    """What became of a published file."""

    tensors: dict[str, Tensor]  # ours
    used: int  # tensors of theirs
    checked: list[str]  # buffers of theirs that hold what the sizes of the model say
    dropped: list[str]  # names of theirs that no model needs


def import_tensors(
    layout: Layout, checkpoint: PublishedCheckpoint, expected: Mapping[str, Tensor], source: str
) -> Imported:
    """Our tensors from theirs, every one of which is used exactly once.

    Args:
        expected: the state dict of our model, for its shapes (it may be on the meta device).

    Raises:
        SmaltiError: a tensor is missing, unknown, of the wrong shape or kind, or not finite; a
            buffer does not hold what the sizes of the model say.
    """
    theirs, path = checkpoint.tensors, checkpoint.path
    wanted = [name for link in layout.links for name in link.theirs]
    dropped = [n for n in theirs if n not in wanted and matches(n, layout.surplus)]
    surplus = sorted(theirs.keys() - set(wanted) - layout.buffers.keys() - set(dropped))
    missing = [name for name in wanted if name not in theirs]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = f"; it has {surplus[0]}, which is unknown" if surplus else ""
        raise SmaltiError(f"{path} lacks the tensor {missing[0]}{more}{hint}")
    if surplus:
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise SmaltiError(
            f"{path} has a tensor {surplus[0]}{more} that no {source} of its size has"
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
        raise SmaltiError(f"the published layout has no place for {unknown[0]}")
    theirs: dict[str, Tensor] = {}
    for link in layout.links:
        made = link.to_theirs([ours[name] for name in link.ours])
        theirs |= dict(zip(link.theirs, made, strict=True))
    return theirs | {name: buffer.value.clone() for name, buffer in layout.buffers.items()}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits any of the patterns, "loss.*"."""
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
        raise SmaltiError(wrong) from error
    for name, tensor in ours.items():
        if tensor.shape != expected[name].shape:
            raise SmaltiError(f"{wrong}: expected {tuple(expected[name].shape)} for {name}")
        floats = expected[name].is_floating_point()
        if any(found.is_floating_point() != floats for found in (*theirs, tensor)):
            kinds = ", ".join(str(found.dtype) for found in theirs)
            raise SmaltiError(f"{checkpoint.path}: {names} holds {kinds} numbers")
    for name in link.theirs:
        _check_finite(name, checkpoint)
    return ours


def _check_finite(name: str, checkpoint: PublishedCheckpoint) -> None:
    """Raise `SmaltiError` if a tensor holds what is no number in single precision."""
    wrong = (~checkpoint.tensors[name].float().isfinite()).sum().item()
    if wrong:
        raise SmaltiError(
            f"{checkpoint.path}: {name} holds {wrong} numbers that are infinite or NaN: the file "
            "is damaged, or its training went wrong"
        )


def _check_buffer(name: str, buffer: Buffer, checkpoint: PublishedCheckpoint) -> None:
    found = checkpoint.tensors[name]
    if found.shape != buffer.value.shape:
        raise SmaltiError(
            f"{checkpoint.path}: {name} has shape {tuple(found.shape)}; the sizes of the model "
            f"say {tuple(buffer.value.shape)}"
        )
    rounding = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    tolerance = max(buffer.tolerance, rounding)
    close = torch.isclose(found.double(), buffer.value.double(), rtol=0, atol=tolerance)
    if not close.all():
        raise SmaltiError(
            f"{checkpoint.path}: {name} is not what the sizes of the model say, in "
            f"{int((~close).sum())} of {found.numel()} numbers"
        )
