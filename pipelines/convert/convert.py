"""Published weights -> our folders, and back.

    import   read -> Source.recognises -> infer our config -> layout -> import_tensors -> write
    export   Source.fits -> layout -> export_tensors -> write

Nothing is written before everything is verified, and a folder appears complete or not at all.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.config import Difference, differences
from smalti.errors import ConversionError, SmaltiError
from smalti.files import read_json, write_json
from smalti.folders import replacing_file, replacing_folder
from smalti.pipelines.convert import PUBLISHED_SOURCES
from smalti.pipelines.convert.layout import Imported, export_tensors, import_tensors, matches
from smalti.pipelines.convert.reader import (
    CONFIG,
    PICKLES,
    SAFETENSORS,
    PublishedCheckpoint,
    read_checkpoint,
)
from smalti.pipelines.convert.source import Inferred, Options, Source, check_stated
from smalti.pipelines.model_index import INDEX
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.registry import PRIORS
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.registry import TOKENIZERS
from smalti.weights import save_weights, state_to_save

Converted = Tokenizer | Prior | Pipeline

# -- class names ----------------------------------------------------------------------------------

NUM_CLASSES = 1000  # of ImageNet


def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's classes in the order of their labels, all different.

    They come from torchvision; where it has one name for two classes, their numbers are appended.
    """
    from torchvision.models import AlexNet_Weights

    names: list[str] = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return tuple(f"{n} ({i})" if n in repeated else n for i, n in enumerate(names))


def class_names(count: int) -> tuple[str, ...]:
    """Class names of a published model: ImageNet's for 1000 classes, else their numbers."""
    if count == NUM_CLASSES:
        return imagenet_classes()
    return tuple(str(number) for number in range(count))


# -- writing --------------------------------------------------------------------------------------


def _check_out(out: Path) -> None:
    """Raise `ConversionError` if there is anything at `out` but an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ConversionError(f"{out} exists: choose another path, nothing is overwritten")


def _write_tensors(path: Path, tensors: dict[str, Tensor], suffix: str, wrapper: str) -> None:
    """Write a safetensors file, or a pickle under the key that the original code looks for.

    Args:
        suffix: of the name that the file will have.
    """
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if suffix == SAFETENSORS:
        save_file(contiguous, path, metadata={"format": "pt"})
    else:
        torch.save({wrapper: contiguous} if wrapper else contiguous, path)


# -- import ---------------------------------------------------------------------------------------


def _check_not_ours(path: Path) -> None:
    """Raise `ConversionError` if `path` is a folder that smalti wrote, or the weights in one."""
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
        raise ConversionError(f"{path} is a smalti model already: it needs no conversion")


def _read_checked(reader: Source, path: Path) -> PublishedCheckpoint:
    """The checkpoint at `path`.

    Raises:
        ConversionError: it does not look like one of this source; the message names those that it
            looks like.
    """
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
    raise ConversionError(f"{checkpoint.path} is no {reader.title}: {hint} (it holds {first}, ...)")


def _build(
    reader: Source, checkpoint: PublishedCheckpoint, inferred: Inferred, options: Options
) -> tuple[Tokenizer | Prior, Imported]:
    """The model with its weights; its memory is allocated only after names and shapes agree."""
    layout = reader.layout(inferred.config)
    with torch.device("meta"):
        expected = reader.registry.build(inferred.config).state_dict()
    imported = import_tensors(layout, checkpoint, expected, reader.title)
    own = reader.own_tensors(inferred.config, options)
    tensors = imported.tensors | own
    unfilled = expected.keys() ^ tensors.keys()
    if unfilled or any(not matches(name, layout.own) for name in own):
        raise AssertionError(f"the layout of {reader.title} is wrong about {sorted(unfilled)[:3]}")
    with torch.random.fork_rng(devices=[]):  # initialisation must not change the caller's state
        model = reader.registry.build(inferred.config)
    model.load_state_dict(tensors)
    return model.eval(), imported


def _report(
    reader: Source, checkpoint: PublishedCheckpoint, inferred: Inferred, imported: Imported
) -> list[str]:
    """What was found in the file, as lines to print."""
    others = ", ".join(f'"{other}"' for other in checkpoint.others)
    beside = f"; not used: {others}" if others else ""
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


def _class_name_lines(model: Prior | Pipeline) -> list[str]:
    """A line about the class names of a model with ImageNet's number of classes."""
    if isinstance(model, Pipeline):
        return ["class names: ImageNet's"] if len(model.classes) == NUM_CLASSES else []
    if model.num_classes != NUM_CLASSES:
        return []
    return ["only pipelines have class names: convert with --tokenizer to get ImageNet's"]


def read_published(
    source: str, path: Path, options: Options | None = None
) -> tuple[Converted, list[str]]:
    """The model in a published checkpoint, and what was found, as lines to print.

    Raises:
        SmaltiError: there is no such source; or a `ConversionError`: the file is damaged, contains
            code or another kind of model, or is ours already; a tensor is missing, unknown,
            mis-shaped or not finite; config.json belongs to another model; an option does not
            apply; the tokenizer does not fit the prior.
    """
    reader: Source = PUBLISHED_SOURCES.resolve(source)()
    options = options or Options()
    for name in sorted(options.given - reader.options):
        raise ConversionError(f"--{name} does not apply to a {reader.title}: leave it out")
    checkpoint = _read_checked(reader, path)
    try:
        inferred = reader.infer(checkpoint, options)
        check_stated(checkpoint, reader.stated(inferred.config))
        model, imported = _build(reader, checkpoint, inferred, options)
    except SmaltiError as error:
        places = (checkpoint.path, checkpoint.path.with_name(CONFIG))
        if any(str(place) in str(error) for place in places):
            raise
        # The errors of config classes do not name the file.
        raise ConversionError(f"{checkpoint.path}: {error}") from error
    lines = _report(reader, checkpoint, inferred, imported)
    if not isinstance(model, Prior):
        return model, lines
    if options.tokenizer is not None:
        model = Pipeline(options.tokenizer, model, class_names(model.num_classes))
    return model, lines + _class_name_lines(model)


def convert(source: str, checkpoint: Path, out: Path, options: Options | None = None) -> list[str]:
    """Turn a published checkpoint into a folder that `from_pretrained` reads.

    A tokenizer becomes the folder of a tokenizer; a prior that of a prior, or with
    `options.tokenizer` that of a pipeline.

    Args:
        source: a name in `PUBLISHED_SOURCES`.

    Returns:
        What was found in the file, as lines to print.

    Raises:
        SmaltiError: see `read_published`; or `out` exists and is not an empty folder, or another
            process is writing it. Nothing is written then.
    """
    with replacing_folder(out, check=lambda: _check_out(out), retry=True) as new:
        model, lines = read_published(source, checkpoint, options)
        model.save_pretrained(new)
    return lines


# -- export ---------------------------------------------------------------------------------------


def _fitting_layout(model: Tokenizer | Prior, is_file: bool) -> str:
    """The first layout that fits the model; for a file, the first without a config.json."""
    fitting: list[str] = []
    for name in PUBLISHED_SOURCES:
        source: Source = PUBLISHED_SOURCES.resolve(name)()
        if source.registry is model.registry and source.fits(model.config):
            if not is_file or source.export_config(model.config) is None:
                return name
            fitting.append(name)
    if fitting:
        return fitting[0]
    raise ConversionError(
        f"no published layout fits this {model.registry.kind}: {_unpublished(model)}"
    )


def _unpublished(model: Tokenizer | Prior) -> str:
    """The settings of a model that the nearest published layout does not have, in words."""
    found: list[tuple[str, list[Difference]]] = []
    for name in PUBLISHED_SOURCES:
        source: Source = PUBLISHED_SOURCES.resolve(name)()
        if source.registry is model.registry and (settings := _obstacles(source, model.config)):
            found.append((source.title, settings))
    if not found:
        return "no original code has such a model"
    title, settings = min(found, key=lambda entry: len(entry[1]))
    return f"for a {title}, {', '.join(map(_in_words, settings))}"


def _in_words(setting: Difference) -> str:
    return f"{setting.name} is {setting.value} instead of {setting.other}"


def _obstacles(source: Source, config: Any) -> list[Difference]:
    """The fewest settings that keep a config out of a layout; none if the layout is for models of
    another type."""
    example = source.example(type(config))
    if type(example) is not type(config) or not source.fits(example):
        return []

    def fits_without(settings: Iterable[Difference]) -> bool:
        try:
            return source.fits(_as_published(config, example, [one.name for one in settings]))
        except SmaltiError:  # these settings do not go together
            return False

    different = list(differences(config, example))
    for count in range(1, 4):
        for some in combinations(different, count):
            if fits_without(some):
                return list(some)
    needed = different
    for one in different:
        others = [other for other in needed if other is not one]
        needed = others if fits_without(others) else needed
    return needed


def _as_published(config: Any, example: Any, names: Iterable[str]) -> Any:
    """A config with the values of a published one for some settings, by their dotted names."""
    inside: dict[str, list[str]] = {}
    for name in names:
        field, _, rest = name.partition(".")
        inside.setdefault(field, []).extend([rest] if rest else [])
    changes: dict[str, Any] = {}
    for field, parts in inside.items():
        value = getattr(example, field)
        changes[field] = _as_published(getattr(config, field), value, parts) if parts else value
    return replace(config, **changes)


def export(model: Tokenizer | Prior, out: Path, layout: str | None = None) -> list[str]:
    """Write a model the way the original code, or Diffusers, reads it.

    Args:
        out: a file if its name ends in .safetensors, .pt, .pth, .ckpt or .bin; else a folder, with
            model.safetensors or what Diffusers reads.
        layout: a name in `PUBLISHED_SOURCES`; None takes the first that fits the model and `out`.

    Returns:
        What was written, as lines to print.

    Raises:
        ConversionError: `out` exists; no layout fits, or the one that was named does not.
        CheckpointError: a weight is infinite or NaN; the model has other tensors than its config.
    """
    is_file = out.suffix in (SAFETENSORS, *PICKLES)
    name = layout or _fitting_layout(model, is_file)
    writer: Source = PUBLISHED_SOURCES.resolve(name)()
    if not writer.fits(model.config):
        settings = map(_in_words, _obstacles(writer, model.config))
        parts = [*settings, "choose another layout, or none"]
        raise ConversionError(f"this model is no {writer.title}: {', '.join(parts)}")
    state = state_to_save(model, lambda: type(model)(model.config))  # type: ignore[call-arg]
    ours = {name: tensor.cpu() for name, tensor in state.items()}
    tensors = export_tensors(writer.layout(model.config), ours)
    config = writer.export_config(model.config)
    if config is not None and is_file:
        raise ConversionError(f"{name} is written as a folder: name one instead of {out.name}")
    if is_file:
        with replacing_file(out, check=lambda: _check_out(out), retry=True) as new:
            _write_tensors(new, tensors, out.suffix, writer.export_wrapper)
    else:
        file = "model" if config is None else "diffusion_pytorch_model"
        with replacing_folder(out, check=lambda: _check_out(out), retry=True) as new:
            save_weights(new / f"{file}{SAFETENSORS}", tensors)
            if config is not None:
                write_json(new / "config.json", config)
    flags = "".join(f" --{key} {value}" for key, value in writer.flags(model.config).items())
    return [
        f"{len(tensors)} tensors in the layout of a {writer.title}",
        f"to read it again: smalti convert {name} {out} FOLDER{flags}",
        *writer.remarks(model.config),
    ]
