"""Unreadable examples: each is logged once and counted; too many are an error."""

import threading

from absl import logging

from bn_keras.errors import BucketUnavailableError, ReportedError, UsageError
from bn_keras.storage import is_temporary, reason_of
from bn_keras.text import first_line


class UnreadableExamples:
    """Unreadable examples of a split that this process has found; any thread may add one.

    Args:
      limit: how many are accepted, `data.max_bad_examples`.

    Attributes:
      error: the error to raise once there are more than `limit`; None before.
      missing: positions of the examples that the current validation pass left out. Unlike `count`,
        they include both places of an example that is listed twice, and no example that only an
        earlier pass could not read.
    """

    def __init__(self, limit: int) -> None:
        self.error: ReportedError | None = None
        self.missing: set[tuple[int, int]] = set()
        self._limit = limit
        self._names: set[str] = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Number of different unreadable examples."""
        return len(self._names)

    def add(self, name: str, reason: Exception) -> None:
        """Logs and counts an example unless it is known.

        Raises:
          UsageError: there are more than the limit.
          BucketUnavailableError: the example is in a bucket that does not answer.
        """
        with self._lock:
            # A known example may be decoded again after the one that exceeded the limit.
            if self.error:
                raise self.error
            if is_temporary(reason):
                # Another example in its place would make the run inexact.
                self.error = BucketUnavailableError(
                    f"example {name} cannot be read: {reason_of(reason)}"
                )
                raise self.error
            if name in self._names:
                return
            self._names.add(name)
            text = f"unreadable example {name}: {first_line(reason)}"
            if self.count > self._limit:
                self.error = UsageError(
                    f"{text}; data.max_bad_examples={self._limit} is exceeded: raise it and"
                    " resume this run, or repair or remove the example and train in a new workdir"
                )
                raise self.error
            logging.warning("%s (%d of at most %d)", text, self.count, self._limit)

    def fail(self, reason: str) -> ReportedError:
        """Records an error that no limit accepts, unless there is one, and returns the recorded."""
        with self._lock:
            self.error = self.error or UsageError(reason)
            return self.error
