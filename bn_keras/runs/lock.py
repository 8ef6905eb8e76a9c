"""A lock on a folder, held by one process at a time."""

from collections.abc import Callable
from typing import IO

from absl import logging
from etils import epath

from bn_keras.runs.bucket_lock import BucketLock
from bn_keras.runs.lock_holder import UNKNOWN_HOLDER, describe_holder, in_use_error
from bn_keras.storage import is_local, writing

try:
    import fcntl
except ImportError:
    # On Windows.
    fcntl = None  # type: ignore[assignment]
_HAS_FLOCK = fcntl is not None


def make_lock(workdir: epath.Path) -> "Lock | BucketLock":
    """Returns the lock of a workdir, which is acquired later."""
    path = workdir / "lock"
    return Lock(path) if is_local(path) else BucketLock(path)


class Lock:
    """A file locked with flock, which the kernel releases at the latest when the process ends.

    On Windows and on file systems without locks, nothing is locked.

    Args:
      path: file to lock; it remains after the release, and its text names the last holder.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Acquires the lock.

        Args:
          on_wait: not called, because this never waits; see `BucketLock.acquire`.

        Raises:
          WorkdirInUseError: another process holds it.
          StorageError: the file cannot be written.
        """
        if not _HAS_FLOCK:
            return
        # In a run copied from a bucket, there is a folder with the claims of `BucketLock`.
        path = self._path / "local" if self._path.is_dir() else self._path
        with writing(f"{path}"):
            self._file = file = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode().strip() or UNKNOWN_HOLDER
            self.release()
            raise in_use_error(self._path.parent, holder) from None
        except OSError as error:
            logging.warning(
                "%s cannot be locked (%s): make sure that no other process trains in it",
                self._path.parent,
                error.strerror,
            )
        with writing(f"{self._path}"):
            file.truncate(0)
            file.write(f"{describe_holder()}\n".encode())

    def verify(self) -> None:
        """Does nothing: the kernel keeps the lock as long as this process lives."""

    def release(self) -> None:
        """Releases the lock if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Releases the lock; see `BucketLock.abandon`."""
        self.release()
