"""Files that are written whole or not at all, local or in a bucket."""

import contextlib
import os
import re
from collections.abc import Iterator

import tensorflow as tf
from etils import epath

from bn_keras.errors import UsageError


def is_local(path: epath.Path) -> bool:
    """Tells a path of this machine's file system from one of a bucket."""
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def writing(what: str, advice: str = "") -> Iterator[None]:
    """Turns a full disk and the like into one line, whatever of it TensorFlow or Python says.

    Args:
      what: is being written in the block.
      advice: what the line ends with.

    Raises:
      UsageError: "WHAT can't be written: REASON; ADVICE".
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        advice = advice and f"; {advice}"
        raise UsageError(f"{what} can't be written: {reason_of(error)}{advice}") from None


def reason_of(error: Exception) -> str:
    """Gives the part of an error's text that says what is wrong, on one line."""
    text = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
    # TensorFlow's: "{{node}} a/temporary/file; No space left on device [Op:SaveV2]".
    line = re.sub(r"^\{\{.*?\}\} | \[Op:.*", "", text.strip().partition("\n")[0])
    return line.rpartition("; ")[2] or type(error).__name__


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file that is there with all of its text, or as it was before."""
    unfinished = path.parent / f"{path.name}.unfinished"
    unfinished.write_text(text)
    move(unfinished, path)


def move(source: epath.Path, target: epath.Path) -> None:
    """Gives a file another name, once all of it is on the disk; replaces what is there."""
    if is_local(source):
        # For writing too, without which Windows refuses to.
        descriptor = os.open(source, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    source.replace(target)
