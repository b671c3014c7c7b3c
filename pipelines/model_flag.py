"""The help text of a flag that names a saved model, in one form for all commands."""

from typing import Any

from tyro.conf import arg


def place_of(what: str, folder: str = "a folder", **options: Any) -> Any:
    """The annotation of a field that names a model: where it may lie.

    Args:
        what: the model, with its article.
        folder: which folders are meant.
        options: of `tyro.conf.arg`.
    """
    places = (
        f"{folder}, one that ships with smalti by its name (smalti/fashion-next-token), a "
        "repository on the Hub, or a checkpoint of a run"
    )
    return arg(help=f"{what}: {places}.", **options)
