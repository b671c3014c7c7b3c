"""The options of a prior's `sample`, checked before any work is done or any folder is claimed."""

import inspect
from collections.abc import Mapping
from typing import Any

from smalti.config import nearest
from smalti.errors import SmaltiError
from smalti.prior.base import Prior

OUR_OWN = {"condition", "generator"}  # parameters of `sample` that a pipeline fills


class UnknownOption(SmaltiError, TypeError):
    """A keyword that a prior's `sample` does not take."""


def check_names(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `UnknownOption` if `prior.sample` has no option of a name."""
    known = set(inspect.signature(prior.sample).parameters) - OUR_OWN
    for name in options:
        if name not in known:
            kind = Prior.registry.name_of(type(prior))
            raise UnknownOption(
                f'a {kind} prior is not sampled with the option "{name}"; {nearest(name, known)}'
            )


def check_options(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `SmaltiError` if `prior.sample` would refuse an option: it is asked for no samples."""
    check_names(prior, options)
    prior.sample(prior.no_conditions(), **options)
