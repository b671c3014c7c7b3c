"""model_index.json, which makes a folder a pipeline: which models, the class names, and hashes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smalti.config import config_from_dict
from smalti.errors import CheckpointError
from smalti.files import HASHES, read_config_file
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

FORMAT_VERSION = 1
INDEX = "model_index.json"
CONFIGS = ("tokenizer/config.json", "prior/config.json")  # whose hashes the index records
WEIGHTS = ("tokenizer/model.safetensors", "prior/model.safetensors")


@dataclass(frozen=True)
class Components:
    """The registry names of the models in tokenizer/ and prior/."""

    tokenizer: str
    prior: str


@dataclass(frozen=True)
class PipelineIndex:
    """The content of model_index.json."""

    components: Components
    classes: tuple[str, ...]
    notes: str = ""  # Markdown for the model card
    training_pictures: str = ""  # fingerprint of the prior's training data; empty if unknown
    guidance_scale: float | None = None  # of a call that gives none; None: the default
    _class_name: Literal["Pipeline"] = "Pipeline"
    format_version: int = FORMAT_VERSION


def read_index(folder: Path) -> PipelineIndex:
    """Read model_index.json, strictly.

    Raises:
        CheckpointError: there is none, or it is of another format.
        SmaltiError: it is damaged; a key is missing, unknown or of the wrong type.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {INDEX}: it is not a saved pipeline")
    content = read_config_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise CheckpointError(f"{path} has no list of class names: it is not a smalti pipeline")
    found = content.get("format_version")
    if found != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {found}; this smalti reads {FORMAT_VERSION}")
    content.pop(HASHES, None)
    return config_from_dict(PipelineIndex, content, str(path))


def components_of(tokenizer: Tokenizer, prior: Prior) -> Components:
    """The names of two models."""
    return Components(
        tokenizer=Tokenizer.registry.name_of(type(tokenizer)),
        prior=Prior.registry.name_of(type(prior)),
    )
