"""A lock on a folder in a bucket, held by one process at a time."""

import contextlib
import json
import os
import pathlib
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging
from etils import epath

from bn_keras import storage
from bn_keras.errors import BucketUnavailableError, WorkdirInUseError
from bn_keras.runs.lock_holder import UNKNOWN_HOLDER, describe_holder, in_use_error
from bn_keras.storage import writing

# The holder's heartbeat has this period.
HEARTBEAT_SECONDS = 30.0
# Without a heartbeat for this long, a holder is dead. TensorFlow's retries take three minutes.
DEAD_SECONDS = 300.0
_POLL_SECONDS = 5.0
# Number of claims by a process that meets another one at the same moment.
_ATTEMPTS = 5
_CLAIM, _HEARTBEAT = ".claim", ".alive"

# The claims that this process makes or holds. Any other claim of this process is left over from an
# outage, during which it could not be deleted.
_own_claims: set[str] = set()


class BucketLock:
    """A lock made of objects: a bucket has no locks, and TensorFlow's client no conditional writes.

    Decisions:
      - Each process claims the workdir by an object of its own name, and then lists all claims. It
        holds the lock if its claim is the only one. Lists are consistent: of two processes, the one
        that claims later sees the other. If both see each other, both withdraw and try again.
      - The holder rewrites another object every HEARTBEAT_SECONDS, its heartbeat. After
        DEAD_SECONDS without one, the next process deletes the claim. It compares times of the
        service only, so that clocks may differ. A dead process of the same machine is recognized
        immediately.
      - A claim is never written again, so its deletion is final. A holder that was delayed or cut
        off from the bucket for that long detects the deletion by `verify`, before it writes again.

    Args:
      folder: folder of the claims, in the workdir.
    """

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self._name = uuid.uuid4().hex
        self._is_held = False
        self._is_released = threading.Event()
        self._heartbeat_thread: threading.Thread | None = None

    def acquire(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Acquires the lock; waits while it is unknown whether the holder is alive.

        Args:
          on_wait: called every few seconds of such a wait; an error that it raises ends it.

        Raises:
          WorkdirInUseError: another process holds the lock.
          StorageError: the folder cannot be read or written.
        """
        _own_claims.add(self._name)
        try:
            with writing(f"{self._folder}"):
                self._claim(on_wait)
        except BaseException as error:
            _own_claims.discard(self._name)
            if not isinstance(error, BucketUnavailableError):
                self._withdraw()
            raise
        self._is_held = True
        self._is_released.clear()
        self._heartbeat_thread = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._heartbeat_thread.start()

    def verify(self) -> None:
        """Raises WorkdirInUseError if another process has replaced this holder."""
        if self._is_held and self._name not in self._claims():
            raise WorkdirInUseError(
                f"another process has taken over workdir {self._folder.parent}, because this one"
                f" sent no heartbeat for {DEAD_SECONDS / 60:g} minutes: this one ends and writes"
                " nothing more"
            )

    def release(self) -> None:
        """Releases the lock if it is held."""
        if self._is_held:
            self.abandon()
            self._withdraw()

    def abandon(self) -> None:
        """Stops the heartbeat without a request, for a bucket that does not answer."""
        self._is_held = False
        _own_claims.discard(self._name)
        self._is_released.set()
        if self._heartbeat_thread is not None:
            # A thread inside TensorFlow must end before Python's interpreter does.
            self._heartbeat_thread.join()
            self._heartbeat_thread = None

    def _claim(self, on_wait: Callable[[], None]) -> None:
        for _ in range(_ATTEMPTS):
            self._wait_until_free(on_wait)
            self._write(_CLAIM, json.dumps(_describe_process()) + "\n")
            if self._claims() == [self._name]:
                return
            self._withdraw()
            time.sleep(random.uniform(0, 2))
        raise in_use_error(self._folder.parent, UNKNOWN_HOLDER)

    def _wait_until_free(self, on_wait: Callable[[], None]) -> None:
        """Deletes the claims of dead processes; raises WorkdirInUseError for a living one."""
        first_beats: dict[str, float] = {}
        clock_offset: float | None = None
        while names := self._claims():
            if clock_offset is None:
                clock_offset = self._time_of_service() - time.monotonic()
            now = clock_offset + time.monotonic()
            if any([self._may_be_alive(name, now, first_beats) for name in names]):
                on_wait()
                time.sleep(_POLL_SECONDS)

    def _may_be_alive(self, name: str, now: float, first_beats: dict[str, float]) -> bool:
        """Returns False for a claim that was withdrawn, or of a dead process, which it deletes.

        Args:
          name: name of the claim.
          now: the service's time, in seconds.
          first_beats: time of each claim's first heartbeat that was seen; one is added.

        Raises:
          WorkdirInUseError: the process is alive.
        """
        heartbeat, process = self._last_heartbeat(name), self._read_claim(name)
        if heartbeat is None or process is None:
            return False
        holder, is_running = process["holder"], _is_running(process, name)
        if is_running is False or (is_running is None and now - heartbeat > DEAD_SECONDS):
            logging.warning("workdir %s: %s is dead and replaced", self._folder.parent, holder)
            self._remove(name)
            return False
        if is_running or heartbeat != first_beats.get(name, heartbeat):
            raise in_use_error(self._folder.parent, holder)
        if name not in first_beats:
            first_beats[name] = heartbeat
            logging.warning(
                "workdir %s was held by %s: waiting at most %.0f s for its heartbeat",
                self._folder.parent,
                holder,
                DEAD_SECONDS - (now - heartbeat),
            )
        return True

    def _claims(self) -> list[str]:
        """Returns the names of all claims."""
        names = storage.list_folder(self._folder)
        return [name.removesuffix(_CLAIM) for name in names if name.endswith(_CLAIM)]

    def _read_claim(self, name: str) -> dict[str, Any] | None:
        """Returns the process that has made a claim; None if it was withdrawn."""
        content = storage.read(self._folder / f"{name}{_CLAIM}")
        if content is None:
            return None
        try:
            return {"holder": UNKNOWN_HOLDER} | json.loads(content)
        except (ValueError, TypeError):
            return {"holder": UNKNOWN_HOLDER}

    def _last_heartbeat(self, name: str) -> float | None:
        """Returns the service's time of the last heartbeat, or of the claim if there is none."""
        for ending in (_HEARTBEAT, _CLAIM):
            with contextlib.suppress(tf.errors.NotFoundError):
                return (
                    tf.io.gfile.stat(os.fspath(self._folder / f"{name}{ending}")).mtime_nsec / 1e9
                )
        return None

    def _time_of_service(self) -> float:
        self._write(_HEARTBEAT, "")
        return self._last_heartbeat(self._name) or 0.0

    def _send_heartbeats(self) -> None:
        while not self._is_released.wait(HEARTBEAT_SECONDS):
            # An outage ends the training at its next save, not before.
            with contextlib.suppress(OSError, tf.errors.OpError):
                if self._name in self._claims():
                    self._write(_HEARTBEAT, "")

    def _write(self, ending: str, text: str) -> None:
        storage.write_atomically(self._folder / f"{self._name}{ending}", text)

    def _withdraw(self) -> None:
        # The next process recognizes a claim that remains.
        with contextlib.suppress(OSError, tf.errors.OpError):
            self._remove(self._name)

    def _remove(self, name: str) -> None:
        for ending in (_CLAIM, _HEARTBEAT):
            storage.remove(self._folder / f"{name}{ending}")


def _describe_process() -> dict[str, Any]:
    """Describes this process; others on the same machine can check whether it is alive."""
    return {
        "holder": describe_holder(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "machine": _machine(),
    }


def _is_running(process: dict[str, Any], claim: str) -> bool | None:
    """Returns whether the process of a claim is alive and needs it; None if on another machine."""
    if not process.get("machine") or process["machine"] != _machine():
        return None
    if process["pid"] == os.getpid() and claim not in _own_claims:
        return False
    return _start_time(process["pid"]) == process["started"]


def _machine() -> str:
    """Returns an identity of the running kernel and of its process numbers; "" if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Returns when a process started, in ticks of the kernel; None if it has ended."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field, the name in parentheses, may contain anything.
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
