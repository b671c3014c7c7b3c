"""The one exception for mistakes that a person can mend, and how an interrupted command ends."""

EXIT_INTERRUPTED = 130  # 128 + SIGINT, also used for SIGTERM: saved, and ready to go on


class SmaltiError(ValueError):
    """Bad input, explained.

    The message is one clear line: what was wrong, with the value, and what to do about it. The
    command line prints it without a traceback and exits with status 2; in Python it is an
    ordinary `ValueError`.
    """
