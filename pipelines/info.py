"""What `smalti info` prints for saved models: tokenizers, priors and pipelines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smalti.data.dataset import read_options
from smalti.data.generated import SETTINGS, recorded_rows
from smalti.errors import SmaltiError
from smalti.files import Info, command, read_hashed_json, read_json, recorded_hashes
from smalti.pipelines.card import image_words
from smalti.pipelines.conditions import CONDITION_SOURCES
from smalti.pipelines.editing import STRIP
from smalti.pipelines.image_tasks import make_task
from smalti.pipelines.manifest import problems_in
from smalti.pipelines.model_index import INDEX
from smalti.pipelines.pipeline import Pipeline
from smalti.pipelines.sampling import sampling_words
from smalti.prior.base import Prior
from smalti.prior.flow.classifier import CLASSIFIERS, LatentClassifier
from smalti.prior.flow.path import PATHS
from smalti.prior.registry import PRIORS
from smalti.repository import short_name_of
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.registry import TOKENIZERS

CONFIG = "config.json"  # of a saved model
MODELS: tuple[type[Tokenizer | Prior | LatentClassifier], ...] = (
    Tokenizer,
    Prior,
    LatentClassifier,
)


def is_pipeline(path: Path) -> bool:
    """Whether a folder is a saved pipeline."""
    return (path / INDEX).is_file()


def is_generated(path: Path) -> bool:
    """Whether a folder holds the pictures of a generation job."""
    return (path / SETTINGS).is_file()


def of_generated(path: Path) -> Info:
    """The pictures of a generation job."""
    try:
        settings, (rows, _) = read_hashed_json(path / SETTINGS), recorded_rows(path)
    except SmaltiError as error:
        return Info([("kind", "generated pictures"), ("verified", f"no: {error}")], whole=False)
    problems = problems_in(path)
    wanted, there = len(settings["labels"]), len(rows) or len(list(path.glob("*.png")))
    good = "yes: each picture has its hash" if rows else "no hash: smalti 0.1.0 recorded none"
    next_step = [] if wanted == len(rows) else [("next", "repeat the command that made them")]
    return Info(
        [
            ("kind", "generated pictures"),
            ("pictures", f"{there} of {wanted}, seed {settings['seed']}"),
            ("format", settings.get("format", "png")),
            *_guide_lines(settings.get("options", {})),
            ("verified", f"no: {problems[0]}" if problems else good),
            *(("damaged", problem) for problem in problems[1:]),
            *next_step,
        ],
        whole=not problems,
    )


def _guide_lines(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The classifier that guided a generation job, if there was one."""
    if "classifier" not in options:
        return []
    return [("classifier", f"{options['classifier'][:12]}, scale {options['classifier_scale']}")]


def is_edited(path: Path) -> bool:
    """Whether a folder holds pictures that `smalti edit` made."""
    return (path / STRIP).is_file() and bool(_edited(path))


def of_edited(path: Path) -> Info:
    """Edited pictures; their numbers are consecutive."""
    found = _edited(path)
    missing = sorted({f"{number:06d}.png" for number in range(int(found[-1][:6]))} - {*found})
    verified = f"no: {missing[0]} is missing" if missing else "no hash: no number is missing"
    return Info(
        [
            ("kind", "edited pictures"),
            ("pictures", f"{len(found)}, and {STRIP} with the originals"),
            ("verified", verified),
        ],
        whole=not missing,
    )


def _edited(path: Path) -> list[str]:
    return sorted(each.name for each in path.glob("[0-9]" * 6 + ".png"))


def is_model(path: Path) -> bool:
    """Whether a folder is a saved tokenizer, prior or classifier."""
    if not (path / CONFIG).is_file():
        return False
    content = read_json(path / CONFIG)
    return isinstance(content, dict) and content.get("type") in [*TOKENIZERS, *PRIORS, *CLASSIFIERS]


def of_model(path: Path) -> Info:
    """A saved tokenizer, prior or classifier."""
    name = str(read_json(path / CONFIG)["type"])
    base = next(base for base in MODELS if name in base.registry)
    kind = f"{name} {base.registry.kind}"
    try:
        loaded = base.from_pretrained(path)
        read_options(path)  # has a hash
    except SmaltiError as error:
        return Info([("kind", kind), ("verified", f"no: {error}")], whole=False)
    following: list[str | Path] = []
    if isinstance(loaded, Tokenizer):
        following = ["encode", "--tokenizer", path, "--data", "THE_PICTURES"]
    if isinstance(loaded, LatentClassifier):
        following = ["generate", "--model", "THE_PIPELINE", "--classifier", path]
    return Info(
        [
            ("kind", kind),
            *_model_lines(loaded),
            ("verified", _verified(path / CONFIG, "every tensor is there, and no other")),
            *([("next", command(*following))] if following else []),
        ]
    )


def of_pipeline(path: Path) -> Info:
    """A saved pipeline."""
    try:
        pipe = Pipeline.from_pretrained(path)
        read_options(path)  # has a hash
    except SmaltiError as error:
        return Info([("kind", "pipeline"), ("verified", f"no: {error}")], whole=False)
    kinds = pipe.prior.condition_kinds
    name = short_name_of(path) or path
    following = ["edit" if "image" in kinds else "generate", "--model", name]
    if image := pipe.prior.config.image:
        following += ["--image", "FILE"]
        following += ["--mask", "FILE"] if make_task(image.task).takes_mask else []
        following += ["--prompt", "TEXT"] if "text" in kinds else []
    elif "text" in kinds:
        following += ["--prompts", "FILE"]
    for source in map(CONDITION_SOURCES.resolve, kinds):
        following += [f"--{source.FLAGS[0]}", "VALUE"] if source.FLAG_HELP else []
    return Info(
        [
            ("kind", "pipeline"),
            *((f"tokenizer {k}", v) for k, v in _model_lines(pipe.tokenizer)),
            *((f"prior {k}", v) for k, v in _model_lines(pipe.prior)),
            *([("buckets", ", ".join(b.in_words for b in pipe.buckets))] if pipe.buckets else []),
            ("condition", " and ".join(pipe.prior.condition_kinds)),
            *([("classes", _some(pipe.classes))] if pipe.classes else []),
            ("sampling", sampling_words(pipe.sampling)),
            *((f"dtype auto on {kind}", name) for kind, name in pipe.auto_dtype.items()),
            ("verified", _verified(path / INDEX, "tokenizer and prior belong together")),
            ("next", command(*following)),
        ]
    )


def _verified(path: Path, what: str) -> str:
    """What loading has verified of a folder that records its hashes in `path`."""
    if recorded_hashes(path):
        return f"yes: {what}; config and weights have the hashes that were saved with them"
    return (
        f"no hash: {what}; smalti 0.1.0 saved it, and its values cannot be compared. Save it again"
    )


def _some(classes: Sequence[str]) -> str:
    """The number of the classes, and the names of the first."""
    return f"{len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"


def _model_lines(model: Tokenizer | Prior | LatentClassifier) -> list[tuple[str, str]]:
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f", {image_words(model, 'px')}" if isinstance(model, Tokenizer) else ""
    about = []
    if isinstance(model, LatentClassifier):
        about = [
            ("classes", _some(model.classes)),
            ("path", PATHS.name_of(type(model.config.path))),
        ]
    return [
        ("type", f"{type(model).__name__}{size}"),
        ("latents", model.spec.in_words),
        *about,
        ("parameters", f"{count:,}"),
        ("fingerprint", model.fingerprint[:12]),
    ]
