"""`model_index.json`: what a pipeline folder holds besides the two models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smalti.config import config_from_dict, config_to_dict
from smalti.errors import SmaltiError
from smalti.files import read_json, write_json

FORMAT_VERSION = 1
INDEX = "model_index.json"


@dataclass(frozen=True)
class Components:
    """The registry names of the models in tokenizer/ and prior/."""

    tokenizer: str
    prior: str


@dataclass(frozen=True)
class PipelineIndex:
    """The content of the file."""

    components: Components
    classes: tuple[str, ...]
    notes: str = ""  # Markdown for the model card
    training_pictures: str = ""  # fingerprint of what the prior learned from; empty = not known
    _class_name: Literal["Pipeline"] = "Pipeline"
    format_version: int = FORMAT_VERSION


def write_index(folder: Path, index: PipelineIndex) -> None:
    """Write the file, after everything that it speaks of."""
    write_json(folder / INDEX, config_to_dict(index))


def read_index(folder: Path) -> PipelineIndex:
    """Read the file, strictly.

    Raises:
        SmaltiError: there is none; it is damaged, of another format or another kind of pipeline;
            a key is missing, unknown or of the wrong type.
    """
    path = folder / INDEX
    if not path.is_file():
        raise SmaltiError(f"{folder} has no {INDEX}: it is not a saved pipeline")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise SmaltiError(f"{path} has no list of class names: it is not a smalti pipeline")
    found = content.get("format_version")
    if found != FORMAT_VERSION:
        raise SmaltiError(f"{path} has format {found}; this smalti reads {FORMAT_VERSION}")
    return config_from_dict(PipelineIndex, content, str(path))
