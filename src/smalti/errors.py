"""Errors that the user can correct, and the exit status of commands.

SmaltiError                 the root: catch this one to catch all
  ConfigurationError        a recipe, a flag or an option of a model
  DataError                 images, latent caches and generated folders on disk
  CheckpointError           saved models, checkpoints and runs
  ConversionError           import and export of published checkpoints
  GenerationError           arguments of sampling, and generation jobs
  BusyError                 a folder into which another process is writing
"""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_FAILURE = 1  # a machine error: disk full, no permission
EXIT_INPUT_ERROR = 2  # the input is wrong, and the message names the remedy
EXIT_INTERRUPTED = 130  # 128 + SIGINT, also used for SIGTERM: saved, and ready to resume


class SmaltiError(ValueError):
    """An error in the input, with its explanation.

    The message is one line: what is wrong, the value, and the remedy. The command line prints it
    without a traceback and exits with status 2; in Python it is an ordinary `ValueError`.

    Args:
        argument: the name of the argument of a call that is wrong; None: not known.
    """

    def __init__(self, *message: object, argument: str | None = None) -> None:
        super().__init__(*message)
        self.argument = argument


@contextmanager
def about(argument: str | None) -> Iterator[None]:
    """Context in which errors are about an argument of a call, unless they name another one."""
    try:
        yield
    except SmaltiError as error:
        error.argument = error.argument or argument
        raise


class ConfigurationError(SmaltiError):
    """A recipe, a flag, or an option of a model has a wrong name or value."""


class DataError(SmaltiError):
    """Images or latents cannot be read, are damaged, or do not fit the request."""


class CheckpointError(SmaltiError):
    """A saved model, a checkpoint or a run is missing, damaged, or belongs to another run."""


class ConversionError(SmaltiError):
    """A published checkpoint cannot be read, recognised, mapped or written."""


class GenerationError(SmaltiError):
    """An argument of sampling is wrong, or a generation job cannot be started or continued."""


class BusyError(SmaltiError):
    """Another process is writing into a folder."""
