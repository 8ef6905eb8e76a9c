"""Writes the metrics of a run: lines of metrics.jsonl, and TensorBoard events."""

import contextlib
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from etils import epath

from bn_keras import storage
from bn_keras.errors import BucketUnavailableError, StorageError, WorkdirInUseError
from bn_keras.runs.metrics_log import MetricsLine
from bn_keras.runs.workdir import Workdir
from bn_keras.storage import is_local, writing

# An upload replaces the whole object. Between saves, the files of a run in a bucket are uploaded at
# most this often, and larger files less often.
_SECONDS_BETWEEN_UPLOADS = 30.0
_BYTES_PER_SECOND = 20_000


class MetricsWriter:
    """Appends metrics to a run's metrics.jsonl and to its TensorBoard events.

    Locally, each line is written immediately. In a bucket, where a file can only be replaced, the
    files are written on this machine and uploaded from time to time. `sync` makes all lines
    durable: call it before a checkpoint is saved, so that a run that resumes from it has all lines
    before it. The end of the writer does the same.

    Args:
      workdir: folder of the run, already created.
      global_batch_size: examples per step.

    Raises:
      StorageError: the files cannot be written; every method can raise it.
      WorkdirInUseError: another process has taken over the workdir; likewise.
    """

    def __init__(self, workdir: Workdir, global_batch_size: int) -> None:
        self._workdir = workdir
        self._global_batch_size = global_batch_size
        self._uploaded_at = time.monotonic()
        self._is_synced = True
        with contextlib.ExitStack() as opened, self._writing():
            self._folder = workdir.path
            if not is_local(workdir.path):
                name = opened.enter_context(tempfile.TemporaryDirectory(prefix="bn_keras_"))
                self._folder = epath.Path(name)
                if workdir.writes:
                    storage.copy(workdir.metrics, self._folder / workdir.metrics.name)
            if workdir.writes:
                self._lines = open(self._folder / workdir.metrics.name, "a")
                self._events = tf.summary.create_file_writer(os.fspath(self._folder))
            else:
                self._lines = open(os.devnull, "a")
                self._events = tf.summary.create_noop_writer()
            self._opened = opened.pop_all()

    def write(self, step: int, values: Mapping[str, float | str | None]) -> MetricsLine:
        """Writes one line and returns it: "step", "examples", and the values by name."""
        line: MetricsLine = {"step": step, "examples": step * self._global_batch_size}
        # JSON has no NaN or infinity.
        line |= {k: None if _is_infinite_or_nan(v) else v for k, v in values.items()}
        with self._writing(f" of step {step}"):
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self._lines.flush()
            with self._events.as_default(step=step):
                for name, value in values.items():
                    if isinstance(value, int | float):
                        tf.summary.scalar(name, value)
            self._is_synced = False
            if not is_local(self._workdir.path) and self._is_upload_due():
                self.sync()
        return line

    def sync(self) -> None:
        """Makes all lines durable: flushes them to disk, or uploads them."""
        if not self._workdir.writes or self._is_synced:
            return
        with self._writing():
            if is_local(self._workdir.path):
                os.fsync(self._lines.fileno())
            else:
                self._workdir.verify_owner()
                storage.in_parallel(
                    functools.partial(storage.copy, file, self._workdir.path / file.name)
                    for file in self._folder.iterdir()
                )
                self._uploaded_at = time.monotonic()
            self._is_synced = True

    def _is_upload_due(self) -> bool:
        num_bytes = sum(os.path.getsize(file) for file in self._folder.iterdir())
        seconds = max(_SECONDS_BETWEEN_UPLOADS, num_bytes / _BYTES_PER_SECOND)
        return time.monotonic() - self._uploaded_at >= seconds

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: Any
    ) -> None:
        # A failed close must not mask the original error.
        ignored = (StorageError, WorkdirInUseError) if kind else ()
        with contextlib.suppress(*ignored), self._opened, self._writing():
            try:
                # After these errors, another attempt would take minutes, or must not be made.
                if not isinstance(error, BucketUnavailableError | WorkdirInUseError):
                    self.sync()
            finally:
                try:
                    self._lines.close()
                finally:
                    self._events.close()

    def _writing(self, which: str = "") -> contextlib.AbstractContextManager[None]:
        return writing(
            f"the metrics{which} in {self._workdir.path}",
            "everything written and saved before is intact; fix the cause and start again",
        )


def _is_infinite_or_nan(value: float | str | None) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
