"""The precision of a pipeline: which one is loaded, which one "auto" is, and what models refuse.

The names are those of `smalti.weights`. int8 and int4 are of the linear layers of a prior; the
tokenizer and all other weights are then fp32.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from smalti.checkpoints import is_checkpoint
from smalti.errors import ConfigurationError
from smalti.pipelines.model_index import Precision, read_index
from smalti.prior.base import Prior
from smalti.prior.weight_only import WEIGHT_ONLY
from smalti.repository import short_name_of
from smalti.tokenizer.base import Tokenizer
from smalti.weights import AS_SAVED, chosen_dtype

logger = logging.getLogger(__name__)

Device = torch.device | str | None


class Loading(NamedTuple):
    """How models are read, and what they are cast to after that."""

    read_as: Precision
    cast_to: torch.dtype | None


def loading(
    folder: Path,
    device: Device,
    dtype: torch.dtype | str | None,
    torch_dtype: torch.dtype | str | None,
) -> Loading:
    """What the options of `Pipeline.from_pretrained` mean.

    "auto" is the precision that was measured for the type of device, or else, with a warning, that
    of the saved weights.

    Raises:
        SmaltiError: there is no such precision; the folder is no pipeline.
    """
    wanted = chosen_dtype(dtype, torch_dtype, weight_only=True)
    if wanted == AS_SAVED:
        kind = torch.device(device or "cpu").type
        measured = {} if is_checkpoint(folder) else read_index(folder).auto_dtype or {}
        if kind in measured:
            wanted = chosen_dtype(measured[kind], weight_only=True)
        else:
            remedy = f"smalti sweep --model {folder} --data DATA --dtype float32 bfloat16"
            logger.warning(
                "dtype is auto, and no precision was measured for %s: the weights stay as they were"
                " saved%s",
                kind,
                "" if short_name_of(folder) else f". {remedy} measures two",
            )
    # Cast after loading: linear layers are quantized then, and a weight that float16 cannot hold is
    # not yet infinite.
    if isinstance(wanted, torch.dtype) and wanted in (*WEIGHT_ONLY, torch.float16):
        return Loading(None, wanted)
    return Loading(wanted, None)


def set_precision(
    tokenizer: Tokenizer, prior: Prior, dtype: torch.dtype | str | None, device: Device = None
) -> None:
    """Move two models to a device and change their precision, in place; None keeps what it is.

    Raises:
        ConfigurationError: there is no such precision; a model cannot have it.
    """
    wanted = chosen_dtype(dtype, weight_only=True)
    if wanted == AS_SAVED:
        raise ConfigurationError(
            f'dtype "{AS_SAVED}" is for from_pretrained: give a precision here'
        )
    if wanted == torch.float16:
        check_range(tokenizer, prior)
    for model in (prior, tokenizer):
        model.to(device=device)  # first: int4 is packed for its device
    if isinstance(wanted, torch.dtype):
        prior.cast(wanted)  # before the tokenizer: it may refuse
        tokenizer.cast(torch.float32 if wanted in WEIGHT_ONLY else wanted)
    prior.arrange_for_sampling()


def check_precision(tokenizer: Tokenizer, prior: Prior, dtype: torch.dtype | str) -> None:
    """Raise `ConfigurationError` unless two models, as they are saved, can have a precision."""
    wanted = chosen_dtype(dtype, weight_only=True)
    if wanted == torch.float16:
        check_range(tokenizer, prior)
    if isinstance(wanted, torch.dtype):
        prior.check_cast(wanted)


def check_range(*models: nn.Module) -> None:
    """Raise `ConfigurationError` if a weight is too large for float16."""
    largest = torch.finfo(torch.float16).max
    for model in models:
        for name, weight in model.named_parameters():
            if weight.numel() and weight.detach().abs().max() > largest:
                raise ConfigurationError(
                    f"dtype is float16, and {type(model).__name__}'s {name} has values beyond its "
                    f"largest number, {largest:,.0f}: use bfloat16, whose range is that of float32"
                )
