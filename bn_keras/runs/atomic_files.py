"""Files that are written completely or not at all, local or in a bucket."""

import contextlib
import os
from collections.abc import Iterator

import tensorflow as tf
from etils import epath

from bn_keras.errors import StorageError
from bn_keras.text import first_line


def is_local(path: epath.Path) -> bool:
    """Returns whether a path is on a file system of this machine, not in a bucket."""
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def writing(what: str, advice: str = "") -> Iterator[None]:
    """Turns file errors of Python and TensorFlow, such as a full disk, into StorageError.

    Args:
      what: name of what the block writes.
      advice: what to do; "" for none.

    Raises:
      StorageError: "WHAT cannot be written: REASON; ADVICE".
    """
    try:
        yield
    except StorageError:
        # A nested block has already named the file more precisely.
        raise
    except (OSError, tf.errors.OpError) as error:
        advice = advice and f"; {advice}"
        raise StorageError(f"{what} cannot be written: {reason_of(error)}{advice}") from None


def reason_of(error: Exception) -> str:
    """Returns the cause in the message of a file error, without the path.

    TensorFlow's messages have the form "a/temporary/file; No space left on device".
    """
    return first_line(error).rpartition("; ")[2]


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file; if that fails, the previous file remains."""
    unfinished = path.parent / f"{path.name}.unfinished"
    unfinished.write_text(text)
    move(unfinished, path)


def move(source: epath.Path, target: epath.Path) -> None:
    """Renames a file after flushing it to disk, replacing the target if it exists."""
    if is_local(source):
        # Windows flushes only files that are open for writing.
        descriptor = os.open(source, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    source.replace(target)
