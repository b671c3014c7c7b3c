"""The files with the weights of a model, named as Hugging Face's libraries name them.

model.safetensors                       all weights, up to `max_shard_size`
model-00001-of-00002.safetensors ...    more, in several files ("shards"), and
model.safetensors.index.json            the file of each tensor
model.fp16.safetensors                  the variant "fp16" of the weights; its shards are
model.fp16-00001-of-00002.safetensors   in model.safetensors.index.fp16.json
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from smalti.errors import CheckpointError, ConfigurationError
from smalti.files import read_config_file, write_json
from smalti.weights import pickle_hint, save_weights

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_SIZE = "5GB"
WEIGHT_FILE = re.compile(r"model(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
INDEX_FILE = re.compile(r"model\.safetensors\.index(?:\.([\w-]+))?\.json")


def weight_names(variant: str | None) -> tuple[str, str]:
    """The name of the file with all weights, and of the index of shards.

    Raises:
        ConfigurationError: the name of the variant cannot be part of a file name.
    """
    if variant is None:
        return "model.safetensors", "model.safetensors.index.json"
    if not isinstance(variant, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", variant):
        raise ConfigurationError(
            f'variant is {variant!r}; give letters and digits, such as "fp16", which is a part of '
            "the names of the files"
        )
    return f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"


def weight_patterns(variant: str | None) -> tuple[str, str, str]:
    """The names of all files with these weights: the file, the index, and a pattern of shards."""
    single, index = weight_names(variant)
    return single, index, f"{single.removesuffix('.safetensors')}-?????-of-?????.safetensors"


def variant_of(name: str) -> str | None:
    """The variant whose weights, or index, a file has; None of the weights without a variant.

    Raises:
        ValueError: the file has no weights, and no index of them.
    """
    match = WEIGHT_FILE.fullmatch(name) or INDEX_FILE.fullmatch(name)
    if match is None:
        raise ValueError(name)
    return match[1]


def is_weight_file(name: str) -> bool:
    """Whether a file has weights of a model, or is an index of them."""
    return bool(WEIGHT_FILE.fullmatch(name) or INDEX_FILE.fullmatch(name))


def save_shards(
    folder: Path, state: "Mapping[str, Tensor]", variant: str | None, max_shard_size: int | str
) -> list[str]:
    """Write tensors into one file or several; return the names of the files.

    Raises:
        ConfigurationError: `max_shard_size` is no size.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    single, index = weight_names(variant)
    pattern = single.replace(".safetensors", "{suffix}.safetensors")
    try:
        split = split_torch_state_dict_into_shards(
            dict(state), filename_pattern=pattern, max_shard_size=max_shard_size
        )
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f'max_shard_size is {max_shard_size!r}; give a size such as "5GB", or bytes'
        ) from error
    for name, tensors in split.filename_to_tensors.items():
        save_weights(folder / name, {tensor: state[tensor] for tensor in tensors})
    if not split.is_sharded:
        return [single]
    write_json(folder / index, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return [*split.filename_to_tensors, index]


def find_shards(folder: Path, variant: str | None) -> tuple[list[Path], list[str]]:
    """The files with the weights in the folder of a model, and the names of its indices.

    Raises:
        CheckpointError: there are no such weights; the index is damaged, or a shard is missing.
    """
    single, index = weight_names(variant)
    if (folder / single).is_file():
        return [folder / single], []
    if not (folder / index).is_file():
        others = sorted(path.name for path in folder.iterdir() if is_weight_file(path.name))
        hint = pickle_hint(folder)
        if others and variant is not None:
            hint = f"; it has {others[0]}: leave variant out, or give another one"
        elif others:
            hint = f'; it has {others[0]}: give variant="{variant_of(others[0])}"'
        raise CheckpointError(f"{folder} has no {single}{hint}")
    content = read_config_file(folder / index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f'{folder / index} has no "weight_map": it is damaged')
    names = sorted(set(map(str, places.values())))
    for name in names:
        if not WEIGHT_FILE.fullmatch(name) or variant_of(name) != variant:
            raise CheckpointError(f"{folder / index} names {name!r}, which is no file of weights")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which {index} names: copy it again")
    return [folder / name for name in names], [index]
