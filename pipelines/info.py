"""What `smalti info` prints for saved models: tokenizers, priors and pipelines."""

from pathlib import Path

from smalti.data.dataset import read_options
from smalti.errors import SmaltiError
from smalti.files import Info, command, read_hashed_json, read_json, recorded_hashes
from smalti.pipelines.card import image_words
from smalti.pipelines.generation import SETTINGS, picture_hashes, problems_in
from smalti.pipelines.pipeline import INDEX, Pipeline
from smalti.prior.base import Prior
from smalti.prior.registry import PRIORS
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.registry import TOKENIZERS

CONFIG = "config.json"  # of a saved model


def is_pipeline(path: Path) -> bool:
    """Whether a folder is a saved pipeline."""
    return (path / INDEX).is_file()


def is_generated(path: Path) -> bool:
    """Whether a folder holds the pictures of a generation job."""
    return (path / SETTINGS).is_file()


def of_generated(path: Path) -> Info:
    """The pictures of a generation job."""
    try:
        settings, hashes = read_hashed_json(path / SETTINGS), picture_hashes(path)
    except SmaltiError as error:
        return Info([("kind", "generated pictures"), ("verified", f"no: {error}")], whole=False)
    problems = problems_in(path)
    wanted, there = len(settings["labels"]), len(hashes) or len(list(path.glob("*.png")))
    good = "yes: each picture has its hash" if hashes else "no hash: smalti 0.1.0 recorded none"
    next_step = [] if wanted == len(hashes) else [("next", "repeat the command that made them")]
    return Info(
        [
            ("kind", "generated pictures"),
            ("pictures", f"{there} of {wanted}, seed {settings['seed']}"),
            ("verified", f"no: {problems[0]}" if problems else good),
            *(("damaged", problem) for problem in problems[1:]),
            *next_step,
        ],
        whole=not problems,
    )


def is_model(path: Path) -> bool:
    """Whether a folder is a saved tokenizer or prior."""
    if not (path / CONFIG).is_file():
        return False
    content = read_json(path / CONFIG)
    return isinstance(content, dict) and content.get("type") in [*TOKENIZERS, *PRIORS]


def of_model(path: Path) -> Info:
    """A saved tokenizer or prior."""
    name = str(read_json(path / CONFIG)["type"])
    is_tokenizer = name in TOKENIZERS
    kind = f"{name} {'tokenizer' if is_tokenizer else 'prior'}"
    try:
        loaded = (Tokenizer if is_tokenizer else Prior).from_pretrained(path)
        read_options(path)  # has a hash
    except SmaltiError as error:
        return Info([("kind", kind), ("verified", f"no: {error}")], whole=False)
    assert isinstance(loaded, Tokenizer | Prior)
    next_command = command("encode", "--tokenizer", path, "--data", "THE_PICTURES")
    return Info(
        [
            ("kind", kind),
            *_model_lines(loaded),
            ("verified", _verified(path / CONFIG, "every tensor is there, and no other")),
            *([("next", next_command)] if is_tokenizer else []),
        ]
    )


def of_pipeline(path: Path) -> Info:
    """A saved pipeline."""
    try:
        pipe = Pipeline.from_pretrained(path)
        read_options(path)  # has a hash
    except SmaltiError as error:
        return Info([("kind", "pipeline"), ("verified", f"no: {error}")], whole=False)
    some = ", ".join(pipe.classes[:5]) + (", ..." if len(pipe.classes) > 5 else "")
    prompts = ["--prompts", "FILE"] if "text" in pipe.prior.condition_kinds else []
    return Info(
        [
            ("kind", "pipeline"),
            *((f"tokenizer {k}", v) for k, v in _model_lines(pipe.tokenizer)),
            *((f"prior {k}", v) for k, v in _model_lines(pipe.prior)),
            ("condition", " and ".join(pipe.prior.condition_kinds)),
            *([("classes", f"{len(pipe.classes)}: {some}")] if pipe.classes else []),
            ("verified", _verified(path / INDEX, "tokenizer and prior belong together")),
            ("next", command("generate", "--model", path, *prompts)),
        ]
    )


def _verified(path: Path, what: str) -> str:
    """What loading has verified of a folder that records its hashes in `path`."""
    if recorded_hashes(path):
        return f"yes: {what}; config and weights have the hashes that were saved with them"
    return (
        f"no hash: {what}; smalti 0.1.0 saved it, and its values cannot be compared. Save it again"
    )


def _model_lines(model: Tokenizer | Prior) -> list[tuple[str, str]]:
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f", {image_words(model, 'px')}" if isinstance(model, Tokenizer) else ""
    return [
        ("type", f"{type(model).__name__}{size}"),
        ("latents", model.spec.in_words),
        ("parameters", f"{count:,}"),
        ("fingerprint", model.fingerprint[:12]),
    ]
