"""Fine-tuning: a training run that starts from the settings and the weights of a saved model.

saved_tokenizer, saved_prior    the settings; what depends on the new data is left out
load_initial_weights            the weights, if the settings give them the same meaning
"""

import logging
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from smalti.checkpoints import Weights
from smalti.config import first_difference
from smalti.errors import CheckpointError, ConfigurationError
from smalti.prior.base import Prior
from smalti.prior.presets import PriorConfig
from smalti.repository import files_of_model, resolve_folder
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.presets import TokenizerConfig

logger = logging.getLogger(__name__)
Model = TypeVar("Model", Tokenizer, Prior)


def fitted_as(config: PriorConfig, other: Any) -> PriorConfig:
    """The settings of a prior, for the latents and classes of `other`."""
    quantizer = getattr(other, "quantizer", None)
    classes = config.classes_of(other.num_classes)
    return config.fitted(other.spec, classes, other.tokenizer_fingerprint, quantizer)


def saved_prior(path_or_hub_id: str) -> PriorConfig:
    """The settings of a saved prior, without those that the latents determine.

    Raises:
        CheckpointError: there is no saved prior.
    """
    saved = Prior.saved_config(folder_of(Prior, path_or_hub_id))
    return fitted_as(saved, type(saved)())


def saved_tokenizer(path_or_hub_id: str) -> TokenizerConfig:
    """The settings of a saved tokenizer, without those that are measured after training.

    Raises:
        CheckpointError: there is no saved tokenizer.
    """
    saved = Tokenizer.saved_config(folder_of(Tokenizer, path_or_hub_id))
    return Tokenizer.registry.resolve(saved.kind).settings_before_training(saved)


def load_initial_weights(
    model: Model,
    path_or_hub_id: str,
    weights: Weights = "ema",
    *,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Copy the weights of a saved model, in a pipeline or in a folder of its own, into a new one.

    If the number of classes differs, class embeddings are newly initialised, except that of the
    null class, and this is logged. So is what becomes of the weights of conditions that only one
    of the priors has, and of the positions of a prior whose latents have other grids, because its
    tokenizer had images of another size.

    Args:
        weights: of a checkpoint: the average over its run ("ema"), or those it trained ("raw").
        tokenizer: that of the latents of a new prior.

    Raises:
        CheckpointError: there is no saved model; it is of another type, or its settings give its
            weights another meaning; a prior was trained on the latents of another tokenizer.
    """
    base = Tokenizer if isinstance(model, Tokenizer) else Prior
    source = base.from_pretrained(folder_of(base, path_or_hub_id), weights=weights)
    if type(source) is not type(model):
        raise ConfigurationError(
            f"{path_or_hub_id} holds a {type(source).__name__}; this run trains a "
            f"{type(model).__name__}"
        )
    _check_settings(model, source, path_or_hub_id)
    tensors = source.state_dict()
    if isinstance(model, Prior) and isinstance(source, Prior):
        _check_tokenizer(model, source, tokenizer, path_or_hub_id)
        if model.spec != source.spec:
            done = model.adapt_positions(tensors, source)
            logger.info(
                "%s models %s, this run %s: %s", path_or_hub_id, source.spec, model.spec, done
            )
        ours, theirs = (prior.config for prior in (model, source))
        if (ours.condition, ours.text, ours.image) != (
            theirs.condition,
            theirs.text,
            theirs.image,
        ):
            done = model.adapt_conditions(tensors, source)
            logger.info(
                "%s has condition %s, this run %s: %s",
                *(path_or_hub_id, _condition_in_words(theirs), _condition_in_words(ours), done),
            )
        if model.num_classes != source.num_classes and model.class_table in tensors:
            tensors[model.class_table] = _new_classes(model, tensors[model.class_table])
            logger.info(
                "%s has %d classes, this run %d: class embeddings are newly initialised",
                path_or_hub_id,
                source.num_classes,
                model.num_classes,
            )
    _copy(model, tensors, path_or_hub_id)


def _condition_in_words(config: PriorConfig) -> str:
    """The kinds of condition, with the task of pictures and the encoder and length of captions."""
    more = [config.image.task] if config.image else []
    if config.text:
        more.append(f"{config.text.encoder or 'features'}, {config.text.length} tokens")
    return f"{config.condition} ({'; '.join(more)})" if more else config.condition


def folder_of(base: type[Tokenizer] | type[Prior], path_or_hub_id: str) -> Path:
    """The folder of the model: inside a pipeline, or `path_or_hub_id` itself."""
    part = base.registry.kind
    patterns = files_of_model(part, "ema", None)
    return resolve_folder(path_or_hub_id, patterns=patterns, part=part)


def _check_settings(model: Model, source: Model, where: str) -> None:
    """Raise `ConfigurationError` if settings differ; shapes do not determine all of them."""
    kind, theirs = type(model).registry.kind, source.config
    if isinstance(model, Prior) and isinstance(source, Prior):
        ours = model.config
        theirs = source.config.conditioned(ours.condition, ours.text, ours.image)
        theirs = fitted_as(theirs, ours)
    found = first_difference(model.config, theirs, kind, free="NON_ARCHITECTURE_FIELDS")
    if found:
        raise ConfigurationError(
            f"{found.name} is {found.value}, but {found.other} in {where}: give the same settings, "
            f"or give no settings of the {kind} to use the saved ones"
        )


def _check_tokenizer(model: Prior, source: Prior, tokenizer: Tokenizer | None, where: str) -> None:
    """Raise `ConfigurationError` if the prior was trained on latents of another tokenizer; the
    same one may encode images of another size."""
    ours, theirs = model.tokenizer_fingerprint, source.tokenizer_fingerprint
    if ours is None or theirs is None or ours == theirs:
        return
    if tokenizer is None or tokenizer.for_latents(source.spec, theirs) is None:
        raise ConfigurationError(
            f"{where} was trained on the latents of another tokenizer: encode the images with the "
            "tokenizer of the saved prior (for pictures of another size, smalti encode "
            "--image_size)"
        )


def _new_classes(model: Prior, old: Tensor) -> Tensor:
    """Class embeddings of the new model, (classes + 1, width), with the null class of old ones."""
    table = model.state_dict()[model.class_table].clone()
    if table.shape[1:] == old.shape[1:]:
        table[-1] = old[-1]
    return table


def _copy(model: Model, weights: dict[str, Tensor], where: str) -> None:
    """Load the weights; names and shapes must agree."""
    ours = model.state_dict()
    for name in sorted(ours.keys() ^ weights.keys()):
        holder = where if name in weights else "this run's model"
        raise CheckpointError(
            f"only {holder} has {name}: give the same settings as the saved model's"
        )
    for name, weight in weights.items():
        if ours[name].shape != weight.shape:
            raise CheckpointError(
                f"{name} is {tuple(weight.shape)} in {where} and {tuple(ours[name].shape)} in this "
                "run: give the same settings as the saved model's"
            )
    model.load_state_dict(weights)
