"""What a folder is: a run, a checkpoint, latents, shards, a tokenizer, a prior or a pipeline."""

from collections.abc import Callable
from pathlib import Path

from smalti.data.set_info import (
    holds_latents,
    is_shards,
    of_cache,
    of_shards,
    spec_in_words,
    splits,
)
from smalti.errors import SmaltiError
from smalti.files import read_json
from smalti.folder_info import Info, command
from smalti.pipelines.index import INDEX
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.registry import PRIORS
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.registry import TOKENIZERS
from smalti.training.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from smalti.training.checkpoint import STATE
from smalti.training.run_info import is_run, of_checkpoint, of_run

CONFIG = "config.json"  # of a saved model


def info(path: Path) -> Info:
    """What is known of a folder.

    Raises:
        SmaltiError: there is no such folder, or nothing in it is known.
    """
    if not path.is_dir():
        raise SmaltiError(f"folder not found: {path}")
    for is_one, explain in KINDS:
        if is_one(path):
            return explain(path)
    inside = {child.name: _kind(child) for child in sorted(path.iterdir()) if child.is_dir()}
    if any(inside.values()):  # what a demo leaves, for example
        known = [(name, kind) for name, kind in inside.items() if kind]
        return Info([("kind", "folder with others in it: ask for one of them"), *known])
    raise SmaltiError(
        f"{path} is nothing that smalti writes: give the folder of a run, a checkpoint, latents, a "
        "tokenizer, a prior or a pipeline"
    )


def _kind(path: Path) -> str:
    """What a folder is, in a word or two; empty if nothing in it is known."""
    for is_one, explain in KINDS:
        if is_one(path):
            return explain(path).lines[0][1]
    return ""


def of_model(path: Path) -> Info:
    """A saved tokenizer or prior."""
    name = str(read_json(path / CONFIG)["type"])
    is_tokenizer = name in TOKENIZERS
    kind = f"{name} {'tokenizer' if is_tokenizer else 'prior'}"
    try:
        loaded = (Tokenizer if is_tokenizer else Prior).from_pretrained(path)
    except SmaltiError as error:
        return Info([("kind", kind), ("verified", f"no: {error}")], whole=False)
    assert isinstance(loaded, Tokenizer | Prior)
    go_on = command("encode", "--tokenizer", path, "--data", "THE_PICTURES")
    return Info(
        [
            ("kind", kind),
            *_model_lines(loaded),
            ("verified", "yes: every tensor is there, and no other"),
            *([("go on", go_on)] if is_tokenizer else []),
        ]
    )


def of_pipeline(path: Path) -> Info:
    """A saved pipeline."""
    try:
        pipe = Pipeline.from_pretrained(path)
    except SmaltiError as error:
        return Info([("kind", "pipeline"), ("verified", f"no: {error}")], whole=False)
    some = ", ".join(pipe.classes[:5]) + (", ..." if len(pipe.classes) > 5 else "")
    return Info(
        [
            ("kind", "pipeline"),
            *((f"tokenizer {k}", v) for k, v in _model_lines(pipe.tokenizer)),
            *((f"prior {k}", v) for k, v in _model_lines(pipe.prior)),
            ("classes", f"{len(pipe.classes)}: {some}"),
            ("verified", "yes: tokenizer and prior belong together, every tensor is there"),
            ("go on", command("generate", "--model", path)),
        ]
    )


def _model_lines(model: Tokenizer | Prior) -> list[tuple[str, str]]:
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f", {model.image_size} px" if isinstance(model, Tokenizer) else ""
    return [
        ("type", f"{type(model).__name__}{size}"),
        ("latents", spec_in_words(model.spec)),
        ("parameters", f"{count:,}"),
        ("fingerprint", model.fingerprint[:12]),
    ]


def _is_model(path: Path) -> bool:
    if not (path / CONFIG).is_file():
        return False
    content = read_json(path / CONFIG)
    return isinstance(content, dict) and content.get("type") in [*TOKENIZERS, *PRIORS]


# The first that fits explains the folder.
KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], Info]]] = [
    (
        lambda path: (path / STATE).is_file() or (path / CHECKPOINT_MANIFEST).is_file(),
        of_checkpoint,
    ),
    (is_run, of_run),
    (lambda path: (path / INDEX).is_file(), of_pipeline),
    (_is_model, of_model),
    (is_shards, of_shards),
    (lambda path: holds_latents(path) or bool(splits(path)), of_cache),
]
