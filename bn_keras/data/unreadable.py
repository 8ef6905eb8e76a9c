"""Examples that can't be read: named once each, counted, and too many of them stopped at."""

import re
import threading

from absl import logging

from bn_keras.errors import UsageError


class BadExamples:
    """The bad examples of a split that this process has met; any thread may add to them.

    Args:
      limit: how many there may be.

    Attributes:
      too_many: the error that says so, once there are.
    """

    def __init__(self, limit: int) -> None:
        self.too_many: UsageError | None = None
        self._limit = limit
        self._names = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many different ones there are."""
        return len(self._names)

    def add(self, name: str, error: Exception) -> None:
        """Takes note of an example, unless it is known; raises UsageError if that is too many."""
        with self._lock:
            # Also of a known one: it may come before the one too many, and be decoded after it.
            if self.too_many:
                raise self.too_many
            if name in self._names:
                return
            self._names.add(name)
            what = f"bad example {name}: {first_line(error)}"
            if self.count > self._limit:
                self.too_many = UsageError(
                    f"{what} (data.max_bad_examples is {self._limit}: repair or remove it, or raise"
                    " that number)"
                )
                raise self.too_many
            logging.warning("%s (%d of at most %d)", what, self.count, self._limit)


def first_line(error: Exception) -> str:
    """The first line of an error's message, without what TensorFlow says of its graph."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\{\{.*?\}\} ?|\s*\[Op:.*", "", line)
