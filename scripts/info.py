"""What a folder is: a run, a checkpoint, latents, a tokenizer, a prior or a pipeline.

smalti info runs/prior
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError, safe_open
from tyro.conf import Positional, arg

from smalti.cli import parse_config, run_command
from smalti.data.cache import MANIFEST as CACHE_MANIFEST
from smalti.data.cache import CacheInfo, read_manifest
from smalti.data.cache_shard import shard_path
from smalti.data.latents import CodeSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.files import read_json, sha256_of
from smalti.pipelines.index import INDEX
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.registry import PRIORS
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.registry import TOKENIZERS
from smalti.training.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from smalti.training.checkpoint import STATE, Checkpoint, checkpoints, verify
from smalti.training.folder import EXPORTED, METRICS, RECIPE, REPORT, TIMING, told_by_run
from smalti.training.log import read_lines

EXIT_DAMAGED = 1
CONFIG = "config.json"  # of a saved model
# Settings that say most about a run, in this order; a run has some of them.
TOLD = ("data", "latents", "train_batch_size", "learning_rate", "max_train_steps", "seed")


@dataclass(frozen=True)
class InfoConfig:
    """Explain a folder in a few lines: what it is, whether it is whole, how to go on with it.

    The exit status is 1 if something in it is damaged.
    """

    # a run, a checkpoint, a latent cache, a tokenizer, a prior or a pipeline
    path: Positional[Annotated[Path, arg(metavar="PATH")]] = Path()


@dataclass(frozen=True)
class Info:
    """Lines (name, value) about a folder, and whether all in it is whole."""

    lines: list[tuple[str, str]]
    whole: bool = True


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


# -- runs and checkpoints ---------------------------------------------------------------------


def _kind(path: Path) -> str:
    """What a folder is, in a word or two; empty if nothing in it is known."""
    for is_one, explain in KINDS:
        if is_one(path):
            return explain(path).lines[0][1]
    return ""


def of_checkpoint(path: Path) -> Info:
    """A checkpoint of a run."""
    try:
        found = told_by_run(verify(path))
    except SmaltiError as error:
        return Info([("kind", "checkpoint"), ("verified", f"no: {error}")], whole=False)
    how = [("kind", f"checkpoint of a {found.state['kind']} run"), *_state_lines(found)]
    return Info([*how, ("go on", _resume(path.parent, found, str(path)))])


def of_run(path: Path) -> Info:
    """A run, finished or not."""
    lines, newest, damaged = [("kind", "training run")], None, []
    for folder in reversed(checkpoints(path)):
        try:
            newest = newest or told_by_run(verify(folder))
        except SmaltiError as error:
            damaged.append(("damaged", str(error)))
    if newest is not None:
        lines = [("kind", f"{newest.state['kind']} run"), *_state_lines(newest)]
    else:
        lines.append(("step", "no checkpoint to go on from"))
    lines += [("last logged", _last(path / METRICS)), ("speed", _last(path / TIMING))]
    report, exported = path / REPORT, path / EXPORTED
    lines += [("report", str(report))] if report.is_file() else []
    lines += [("result", _result(exported))] if exported.is_file() else []
    if newest is not None:
        lines.append(("go on", _resume(path, newest, "latest")))
    return Info([*[line for line in lines if line[1]], *damaged], whole=not damaged)


def _result(exported: Path) -> str:
    """Where the finished model of a run went."""
    record = read_json(exported)
    if not isinstance(record, dict) or "folder" not in record:
        raise SmaltiError(f"{exported} is damaged: it does not name a folder")
    return str(record["folder"])


def _state_lines(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    state, config = checkpoint.state, checkpoint.state["config"]
    files = sorted(checkpoint.path.glob("*.safetensors"))
    told = ", ".join(f"{name} {config[name]}" for name in TOLD if name in config)
    model = checkpoint.path / "model.safetensors"
    return [
        ("step", f"{checkpoint.step} of {config['max_train_steps']}"),
        ("config", told),
        ("numbers", f"{_count(model):,} in {model.name}" if model.is_file() else ""),
        ("files", ", ".join(file.stem for file in files)),
        ("trained on", f"{state['num_processes']} process(es), precision {state['precision']}"),
        ("verified", "yes: all files have the hashes of their manifest"),
    ]


def _resume(run: Path, checkpoint: Checkpoint, wanted: str) -> str:
    options = ("--config", run / RECIPE, "--output_dir", run, "--resume_from_checkpoint", wanted)
    return _command(checkpoint.state["kind"], *options)


def _last(path: Path) -> str:
    """The last line of a log, in short."""
    lines = read_lines(path) if path.is_file() else []
    return ", ".join(f"{k} {_short(v)}" for k, v in lines[-1].items()) if lines else ""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- latents ----------------------------------------------------------------------------------


def of_cache(path: Path) -> Info:
    """A latent cache, or a folder of several splits."""
    folders = [path] if _holds_latents(path) else _splits(path)
    lines, whole = [("kind", "latent cache")], True
    for folder in folders:
        name = "" if folder == path else f"{folder.name}: "
        if (folder / CACHE_MANIFEST).is_file():
            found = read_manifest(folder)
            bad = [f"{shard} differs from the manifest" for shard in _damaged_shards(folder, found)]
            lines += _cache_lines(name, found)
        else:
            bad = ["not finished, the command that began it goes on"]
        lines.append(("verified", f"{name}no: {bad[0]}" if bad else f"{name}yes: all shards"))
        whole = whole and not bad
    options = ("--latents", path, "--tokenizer", "THE_TOKENIZER")
    lines.append(("go on", _command("train-prior", *options)))
    return Info(lines, whole)


def _cache_lines(name: str, found: CacheInfo) -> list[tuple[str, str]]:
    views = ", ".join(found.views)
    return [
        ("latents", f"{name}{found.num_samples:,} x {views}, {of(found.spec)}"),
        ("classes", f"{name}{len(found.classes)}"),
        ("tokenizer", found.tokenizer_fingerprint[:12]),
    ]


def _holds_latents(path: Path) -> bool:
    """Whether a folder is a cache, or would be one if its encoding had been finished."""
    return (path / CACHE_MANIFEST).is_file() or shard_path(path, 0).is_file()


def _splits(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if _holds_latents(folder))


def _damaged_shards(folder: Path, found: CacheInfo) -> list[str]:
    """Names of shards that are missing or have other hashes than the manifest says."""
    files = [shard_path(folder, number) for number in range(found.num_shards)]
    pairs = zip(files, found.shards, strict=True)
    return [file.name for file, hash in pairs if not file.is_file() or sha256_of(file) != hash]


def of(spec: LatentSpec) -> str:
    """A latent spec in words."""
    if isinstance(spec, CodeSpec):
        grids = ", ".join(f"{height} x {width}" for height, width in spec.grids)
        return f"{spec.length} codes of {spec.vocab_size:,} ({grids})"
    return f"{spec.channels} x {spec.height} x {spec.width} numbers"


# -- models -----------------------------------------------------------------------------------


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
    go_on = _command("encode", "--tokenizer", path, "--data", "THE_PICTURES")
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
            ("go on", _command("generate", "--model", path)),
        ]
    )


def _model_lines(model: Tokenizer | Prior) -> list[tuple[str, str]]:
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f", {model.image_size} px" if isinstance(model, Tokenizer) else ""
    return [
        ("type", f"{type(model).__name__}{size}"),
        ("latents", of(model.spec)),
        ("parameters", f"{count:,}"),
        ("fingerprint", model.fingerprint[:12]),
    ]


def _count(file: Path) -> int:
    """How many numbers a file of weights holds; only its header is read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise SmaltiError(f"{file} is damaged: {error}") from error
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def _command(*words: str | Path) -> str:
    """A command of smalti as a shell takes it."""
    return shlex.join(["smalti", *map(str, words)])


def _is_model(path: Path) -> bool:
    if not (path / CONFIG).is_file():
        return False
    content = read_json(path / CONFIG)
    return isinstance(content, dict) and content.get("type") in [*TOKENIZERS, *PRIORS]


def _is_run(path: Path) -> bool:
    return bool(checkpoints(path)) or all((path / name).is_file() for name in (RECIPE, METRICS))


# The first that fits explains the folder.
KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], Info]]] = [
    (
        lambda path: (path / STATE).is_file() or (path / CHECKPOINT_MANIFEST).is_file(),
        of_checkpoint,
    ),
    (_is_run, of_run),
    (lambda path: (path / INDEX).is_file(), of_pipeline),
    (_is_model, of_model),
    (lambda path: _holds_latents(path) or bool(_splits(path)), of_cache),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti info`."""
    config = parse_config(InfoConfig, argv, prog="smalti info")
    if config.path == Path():
        raise SmaltiError("give a folder: smalti info PATH")
    found = info(config.path)
    width = max(len(name) for name, _ in found.lines)
    for name, value in found.lines:
        print(f"{name:{width}}  {value}")
    return 0 if found.whole else EXIT_DAMAGED


if __name__ == "__main__":
    raise SystemExit(run_command(main))
