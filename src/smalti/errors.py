"""Errors that a person can correct, and the exit status of an interrupted command.

SmaltiError                 the root: catch this one to catch all
  ConfigurationError        a recipe, a flag or an option of a model
  DataError                 images, latent caches and generated folders on disk
  CheckpointError           saved models, checkpoints and runs
  ConversionError           published checkpoints, in and out
  GenerationError           arguments of sampling, and generation jobs
"""

EXIT_INTERRUPTED = 130  # 128 + SIGINT, also used for SIGTERM: saved, and ready to resume


class SmaltiError(ValueError):
    """Bad input, explained.

    The message is one line: what was wrong, with the value, and what to do about it. The command
    line prints it without a traceback and exits with status 2; in Python it is an ordinary
    `ValueError`.
    """


class ConfigurationError(SmaltiError):
    """A recipe, a flag, or an option of a model has a wrong name or value."""


class DataError(SmaltiError):
    """Images or latents cannot be read, are damaged, or do not fit what is asked of them."""


class CheckpointError(SmaltiError):
    """A saved model, a checkpoint or a run is missing, damaged, or belongs to something else."""


class ConversionError(SmaltiError):
    """A published checkpoint cannot be read, recognised, mapped or written."""


class GenerationError(SmaltiError):
    """An argument of sampling is wrong, or a generation job cannot be started or continued."""
