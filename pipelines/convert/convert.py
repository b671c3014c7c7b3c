"""Published weights -> our folders, and back: read, infer, map, verify, write.

    checkpoint -> Source.infer -> config -> Source.layout -> every tensor in its place -> OUT

Nothing is written before everything is verified, and then at once.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.files import read_json, replacing, write_json
from smalti.pipelines.convert import PUBLISHED_SOURCES
from smalti.pipelines.convert.diffusers_autoencoder import check_stated
from smalti.pipelines.convert.layout import Imported, export_tensors, import_tensors, matches
from smalti.pipelines.convert.reader import (
    CONFIG,
    PICKLES,
    SAFETENSORS,
    PublishedCheckpoint,
    read_checkpoint,
)
from smalti.pipelines.convert.source import Inferred, Options, Source
from smalti.pipelines.index import INDEX
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.registry import PRIORS
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.registry import TOKENIZERS

# -------------------------------------------------------------------------------------------------
# The names of the 1000 classes of ImageNet, as models of them number their labels.

NUM_CLASSES = 1000


def imagenet_classes() -> tuple[str, ...]:
    """The names in label order, each once.

    They come with torchvision; where it calls two classes alike, the number tells them apart.
    """
    from torchvision.models import AlexNet_Weights

    names: list[str] = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return tuple(f"{n} ({i})" if n in repeated else n for i, n in enumerate(names))


def class_names(count: int) -> tuple[str, ...]:
    """Names for the classes of a published model: ImageNet's for 1000, else their numbers."""
    if count == NUM_CLASSES:
        return imagenet_classes()
    return tuple(str(number) for number in range(count))


# -------------------------------------------------------------------------------------------------
# Published weights -> our folders, and back: read, infer, map, verify, write.

Converted = Tokenizer | Prior | Pipeline


def convert(source: str, checkpoint: Path, out: Path, options: Options | None = None) -> list[str]:
    """Turn a published checkpoint into a folder that `from_pretrained` reads.

    A tokenizer becomes a tokenizer's folder; a prior one of its own, or with `options.tokenizer` a
    pipeline's.

    Args:
        source: a name in `SOURCES`.

    Returns:
        What was found in the file, as lines to print.

    Raises:
        SmaltiError: see `read_published`; or `out` exists and is not an empty folder. Nothing is
            written then.
    """
    _check_out(out)
    model, lines = read_published(source, checkpoint, options)
    _write_folder(out, model.save_pretrained)
    return lines


def read_published(
    source: str, path: Path, options: Options | None = None
) -> tuple[Converted, list[str]]:
    """The model in a published checkpoint, and what was found, as lines to print.

    Raises:
        SmaltiError: no such source; the file is damaged, holds code or another kind of model, or
            is ours already; a tensor is missing, unknown, mis-shaped or not finite; config.json
            is another model's; an option does not apply; the tokenizer does not fit the prior.
    """
    reader: Source = PUBLISHED_SOURCES.resolve(source)()
    options = options or Options()
    for name in sorted(options.given - reader.options):
        raise SmaltiError(f"--{name} says nothing about a {reader.title}: leave it out")
    checkpoint = _recognised(reader, path)
    try:
        inferred = reader.infer(checkpoint, options)
        check_stated(checkpoint, reader.stated(inferred.config))
        model, imported = _build(reader, checkpoint, inferred, options)
    except SmaltiError as error:
        places = (checkpoint.path, checkpoint.path.with_name(CONFIG))
        if any(str(place) in str(error) for place in places):
            raise
        # A config class says what is wrong, but not where.
        raise SmaltiError(f"{checkpoint.path}: {error}") from error
    lines = _report(reader, checkpoint, inferred, imported)
    if not isinstance(model, Prior):
        return model, lines
    if options.tokenizer is not None:
        model = Pipeline(options.tokenizer, model, class_names(model.num_classes))
    return model, lines + _told_of_classes(model)


def _told_of_classes(model: Prior | Pipeline) -> list[str]:
    """Where the names of ImageNet's classes are, if they are meant."""
    if isinstance(model, Pipeline):
        return ["class names: ImageNet's"] if len(model.classes) == NUM_CLASSES else []
    if model.num_classes != NUM_CLASSES:
        return []
    return ["class names stand in pipelines: convert with --tokenizer to get one with ImageNet's"]


def _check_not_ours(path: Path) -> None:
    """Raise `SmaltiError` if `path` is a folder of our own, or the weights in one."""
    folder = path if path.is_dir() else path.parent
    if path not in (folder, folder / "model.safetensors"):
        return
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        ours = isinstance(index, dict) and "format_version" in index
    else:
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        kind = config.get("type") if isinstance(config, dict) else None
        ours = kind in [*TOKENIZERS, *PRIORS]
    if ours:
        raise SmaltiError(f"{path} is a smalti model already: it needs no conversion")


def _recognised(reader: Source, path: Path) -> PublishedCheckpoint:
    """The checkpoint, if it looks like one of this source."""
    _check_not_ours(path)
    checkpoint = reader.prepare(read_checkpoint(path, reader.wrappers))
    if reader.recognises(checkpoint):
        return checkpoint
    others: list[str] = []
    for name in PUBLISHED_SOURCES:
        other: Source = PUBLISHED_SOURCES.resolve(name)()
        if other.recognises(other.prepare(checkpoint)):
            others.append(name)
    hint = f"it looks like {' or '.join(others)}" if others else "it looks like no known source"
    first = next(iter(checkpoint.tensors))
    raise SmaltiError(f"{checkpoint.path} is no {reader.title}: {hint} (it holds {first}, ...)")


def _build(
    reader: Source, checkpoint: PublishedCheckpoint, inferred: Inferred, options: Options
) -> tuple[Tokenizer | Prior, Imported]:
    """The model with its weights; memory is taken only after names and shapes agree."""
    layout = reader.layout(inferred.config)
    expected = _blank_model(reader, inferred.config).state_dict()
    imported = import_tensors(layout, checkpoint, expected, reader.title)
    own = reader.own_tensors(inferred.config, options)
    tensors = imported.tensors | own
    unfilled = expected.keys() ^ tensors.keys()
    if unfilled or any(not matches(name, layout.own) for name in own):
        raise AssertionError(f"the layout of {reader.title} is wrong about {sorted(unfilled)[:3]}")
    with torch.random.fork_rng(devices=[]):
        model = reader.registry.build(inferred.config)
    model.load_state_dict(tensors)
    return model.eval(), imported


def _blank_model(reader: Source, config: Any) -> nn.Module:
    with torch.device("meta"):
        return reader.registry.build(config)


def _report(
    reader: Source, checkpoint: PublishedCheckpoint, inferred: Inferred, imported: Imported
) -> list[str]:
    others = ", ".join(f'"{other}"' for other in checkpoint.others)
    beside = f"; not taken: {others}" if others else ""
    inside = f' (its "{checkpoint.wrapper}"{beside})' if checkpoint.wrapper else ""
    lines = [f"{reader.title}: {checkpoint.path}{inside}"]
    lines += [f"  {name}: {value}" for name, value in inferred.facts.items()]
    lines += [f"  {name}: {value} (not in the file)" for name, value in inferred.assumed.items()]
    parameters = sum(tensor.numel() for tensor in imported.tensors.values())
    lines.append(f"{imported.used} tensors, {parameters:,} numbers, each used exactly once")
    if imported.checked:
        lines.append(f"{len(imported.checked)} buffers checked: {', '.join(imported.checked)}")
    if imported.dropped:
        names = [name.removeprefix(reader.aside) for name in imported.dropped]
        groups = sorted({name.split(".")[0] for name in names})
        few = ", ".join(names if len(names) <= 3 else groups)
        lines.append(f"{len(names)} dropped, not needed: {few}")
    return lines


# -- and back -------------------------------------------------------------------------------------


def export(model: Tokenizer | Prior, out: Path, layout: str | None = None) -> list[str]:
    """Write a model the way the original code, or Diffusers, reads it.

    Args:
        out: a Diffusers folder; or the file, named .safetensors or as a pickle (.pt, .pth, .ckpt);
            without such a name a folder that will hold model.safetensors.
        layout: a name in `SOURCES`; None takes the first that fits model and `out`.

    Returns:
        What was written, as lines to print.

    Raises:
        SmaltiError: `out` exists; no layout fits, or not this one.
    """
    is_file = out.suffix in (SAFETENSORS, *PICKLES)
    name = layout or _fitting_layout(model, is_file)
    writer: Source = PUBLISHED_SOURCES.resolve(name)()
    if not writer.fits(model.config):
        raise SmaltiError(f"this model is no {writer.title}: its layout cannot hold it")
    _check_out(out)
    tensors = export_tensors(writer.layout(model.config), _on_cpu(model))
    config = writer.export_config(model.config)
    if config is not None and is_file:
        raise SmaltiError(f"{name} is written as a folder: give one instead of {out.name}")
    if is_file:
        _write_tensors(out, tensors, writer.export_wrapper)
    else:

        def fill(folder: Path) -> None:
            folder.mkdir(parents=True)
            file = "model" if config is None else "diffusion_pytorch_model"
            _write_tensors(folder / f"{file}{SAFETENSORS}", tensors)
            if config is not None:
                write_json(folder / "config.json", config)

        _write_folder(out, fill)
    flags = "".join(f" --{key} {value}" for key, value in writer.flags(model.config).items())
    return [
        f"{len(tensors)} tensors in the layout of a {writer.title}",
        f"to read it again: smalti convert {name} {out} FOLDER{flags}",
        *writer.remarks(model.config),
    ]


def _fitting_layout(model: Tokenizer | Prior, is_file: bool) -> str:
    """The first layout that holds the model; for a file, the first without a config.json."""
    fitting: list[str] = []
    for name in PUBLISHED_SOURCES:
        source: Source = PUBLISHED_SOURCES.resolve(name)()
        if source.registry is model.registry and source.fits(model.config):
            if not is_file or source.export_config(model.config) is None:
                return name
            fitting.append(name)
    if fitting:
        return fitting[0]
    kind = model.registry.kind
    raise SmaltiError(f"no published layout holds this {kind}: it has parts of our own")


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _write_tensors(path: Path, tensors: dict[str, Tensor], wrapper: str = "") -> None:
    """A safetensors file, or a pickle with the key that the original code looks for."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == SAFETENSORS:
            save_file(contiguous, temporary, metadata={"format": "pt"})
        else:
            torch.save({wrapper: contiguous} if wrapper else contiguous, temporary)


# -- where results go -----------------------------------------------------------------------------


def _check_out(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise SmaltiError(f"{out} exists: choose another place, nothing is overwritten")


def _write_folder(out: Path, write: Callable[[Path], object]) -> None:
    """What `write` puts into a folder appears at `out` whole or not at all."""
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        write(temporary)
        if out.is_dir():
            out.rmdir()  # empty, see `_check_out`
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
