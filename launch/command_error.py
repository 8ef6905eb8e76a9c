"""The error that ends a command with one line and an exit status."""

import difflib
from collections.abc import Iterable


class CommandError(Exception):
    """The command cannot do what was requested; not a bug.

    The message is one line, and all that is printed. Unlike bn_keras.errors, this module does not
    import TensorFlow.

    Attributes:
      status: exit status; cli.py lists them.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'NAME'?)" with the most similar known name, or ""."""
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
