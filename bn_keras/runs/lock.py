"""A lock on a folder, held by one process at a time."""

import datetime
import os
import socket
from typing import IO

from absl import logging
from etils import epath

from bn_keras.errors import UsageError
from bn_keras.runs.atomic_files import is_local, writing

try:
    import fcntl
except ImportError:
    # On Windows.
    fcntl = None  # type: ignore[assignment]


class Lock:
    """A file locked with flock, which the kernel releases at the latest when the process ends.

    In a bucket, on Windows and on file systems without locks, nothing is locked.

    Args:
      path: file to lock; it remains after the release, and its text names the last holder.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Acquires the lock.

        Raises:
          UsageError: another process holds it.
          StorageError: the file cannot be written.
        """
        if fcntl is None or not is_local(self._path):
            return
        with writing(f"{self._path}"):
            self._file = file = open(self._path, "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode().strip() or "another process"
            self.release()
            raise UsageError(
                f"workdir {self._path.parent} is in use: {holder} is training in it; wait until it"
                " ends, stop it, or use another workdir"
            ) from None
        except OSError as error:
            logging.warning(
                "%s cannot be locked (%s): make sure that no other process trains in it",
                self._path.parent,
                error.strerror,
            )
        with writing(f"{self._path}"):
            file.truncate(0)
            since = datetime.datetime.now().isoformat(" ", "seconds")
            holder = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
            file.write(holder.encode())

    def release(self) -> None:
        """Releases the lock if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None
