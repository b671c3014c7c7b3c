"""Models of the package transformers, which measure pictures or encode captions: only safetensors,
JSON and vocabularies are read, no remote code runs, a local path never uses the network, and no
tensor is left random."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from smalti.errors import CheckpointError, ConfigurationError, SmaltiError
from smalti.repository import first_line

LOADING_ERRORS = (OSError, RuntimeError, ValueError, TypeError, ImportError, SafetensorError)


def import_transformers(user: str, otherwise: str = "") -> Any:
    """The package.

    Args:
        user: what needs it, for the message.
        otherwise: what to do without it.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            f"{user} needs the package transformers: pip install 'smalti[vision]'{otherwise}"
        ) from error
    return transformers


@contextmanager
def loading_errors(what: str, source: str | Path, remedy: str) -> Iterator[None]:
    """Raise what transformers raises in the block as a `CheckpointError`, with a remedy."""
    try:
        yield
    except SmaltiError:
        raise
    except LOADING_ERRORS as error:
        local = Path(source).expanduser().is_dir()
        why = "cannot be loaded" if local else "does not exist here and cannot be downloaded"
        raise CheckpointError(f"{what} {source} {why} ({first_line(error)}): {remedy}") from error


def load_part(loader: Any, source: str | Path) -> Any:
    """A config, an image processor or a tokenizer, by its class of transformers."""
    return loader.from_pretrained(_place(source), **_options(source))


def load_model(
    loader: Any, source: str | Path, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A model, by its class of transformers; the global random generator stays as it was.

    Raises:
        CheckpointError: it lacks a tensor, which transformers would leave random.
    """
    with torch.random.fork_rng(devices=[]):
        model, report = loader.from_pretrained(
            _place(source),
            **_options(source),
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{source} lacks the tensor {missing[0]}")
    return model


def _place(source: str | Path) -> str:
    """A local folder, or an id on the Hub."""
    folder = Path(source).expanduser()
    return str(folder if folder.is_dir() else source)


def _options(source: str | Path) -> dict[str, bool]:
    return {
        "local_files_only": Path(source).expanduser().is_dir(),
        "trust_remote_code": False,
    }
