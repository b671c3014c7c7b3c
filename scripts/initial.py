"""Fine-tuning: a run that begins with the weights of a saved model."""

import logging
from typing import TypeVar

from torch import Tensor

from smalti.errors import SmaltiError
from smalti.hub import resolve_folder
from smalti.pipelines.index import INDEX
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)
Model = TypeVar("Model", Tokenizer, Prior)


def begin_from(model: Model, path_or_hub_id: str) -> None:
    """Give a new model the weights of a saved one: a pipeline's, or a folder of its own.

    If the number of classes differs, all class embeddings but that of no class begin anew, and
    this is logged.

    Raises:
        SmaltiError: nothing there, another kind of model, or one of another size; a prior that
            learned the latents of another tokenizer.
    """
    base = Tokenizer if isinstance(model, Tokenizer) else Prior
    folder = resolve_folder(path_or_hub_id)
    inside = base.registry.kind if (folder / INDEX).is_file() else None
    source = base.from_pretrained(folder, subfolder=inside)
    if type(source) is not type(model):
        raise SmaltiError(
            f"{path_or_hub_id} holds a {type(source).__name__}; this run trains a "
            f"{type(model).__name__}"
        )
    weights = source.state_dict()
    if isinstance(model, Prior) and isinstance(source, Prior):
        _check_tokenizer(model, source, path_or_hub_id)
        if model.num_classes != source.num_classes and model.class_table in weights:
            weights[model.class_table] = _new_classes(model, source)
            logger.info(
                "%s has %d classes, this run %d: class embeddings begin anew",
                path_or_hub_id,
                source.num_classes,
                model.num_classes,
            )
    _copy(model, weights, path_or_hub_id)


def _check_tokenizer(model: Prior, source: Prior, where: str) -> None:
    ours, theirs = model.tokenizer_fingerprint, source.tokenizer_fingerprint
    if None not in (ours, theirs) and ours != theirs:
        raise SmaltiError(
            f"{where} learned the latents of another tokenizer: encode the pictures with its own"
        )


def _new_classes(model: Prior, source: Prior) -> Tensor:
    """The new model's class embeddings, (classes + 1, width), with the old row of no class."""
    table = model.state_dict()[model.class_table].clone()
    old = source.state_dict()[model.class_table]
    if table.shape[1:] == old.shape[1:]:
        table[-1] = old[-1]
    return table


def _copy(model: Model, weights: dict[str, Tensor], where: str) -> None:
    ours = model.state_dict()
    for name in sorted(ours.keys() ^ weights.keys()):
        holder = where if name in weights else "this run's model"
        raise SmaltiError(f"only {holder} has {name}: give the same settings as the saved model's")
    for name, weight in weights.items():
        if ours[name].shape != weight.shape:
            raise SmaltiError(
                f"{name} is {tuple(weight.shape)} in {where} and {tuple(ours[name].shape)} in this "
                "run: give the same settings as the saved model's"
            )
    model.load_state_dict(weights)
